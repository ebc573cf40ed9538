"""EDT, the Efficient Diffusion Transformer, on the kernels of `edt_kernels`.

    files → model → diffusion, data → runs, evaluation → train → sampling → demo → cli

Each folder imports those to its left. Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from . import _former
from ._lazy import lazy
from ._package import __version__ as __version__
from ._package import other_edt

if TYPE_CHECKING:
    from .diffusion.cuda_graph import GraphedStep as GraphedStep
    from .diffusion.process import LossSecondMomentSampler as LossSecondMomentSampler
    from .diffusion.process import make_scheduler as make_scheduler
    from .diffusion.process import training_losses as training_losses
    from .diffusion.sampler import sample as sample
    from .model.presets import AMM_PLACEMENTS as AMM_PLACEMENTS
    from .model.presets import PRESETS as PRESETS
    from .model.presets import published_amm_blocks as published_amm_blocks
    from .model.step_cache import StepCacheConfig as StepCacheConfig
    from .model.transformer import EDTTransformer2DModel as EDTTransformer2DModel
    from .model.transformer import load_preset as load_preset
    from .runs.weights import initialize_from as initialize_from
    from .runs.weights import load_checkpoint as load_checkpoint
    from .runs.weights import load_released_state_dict as load_released_state_dict
    from .sampling.pipeline import EDTPipeline as EDTPipeline
else:
    _getattr, __dir__, __all__ = lazy(__name__)

    def __getattr__(name: str):
        try:
            return _getattr(name)
        except AttributeError as error:
            said = other_edt()  # of whose functions it may be one
            raise AttributeError(f"{error}; {said}" if said else error, name=name, obj=error.obj) from None


_former.install()
