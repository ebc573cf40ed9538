"""The diffusion process: noise schedule, losses and guidance (`process`), the loop that draws (`sampler`), and its
step as a CUDA graph.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .cuda_graph import GraphedStep as GraphedStep
    from .process import LossSecondMomentSampler as LossSecondMomentSampler
    from .process import add_noise as add_noise
    from .process import guide as guide
    from .process import make_scheduler as make_scheduler
    from .process import predict as predict
    from .process import training_losses as training_losses
    from .sampler import ANCESTRAL as ANCESTRAL
    from .sampler import SOLVERS as SOLVERS
    from .sampler import NotFiniteError as NotFiniteError
    from .sampler import check_scheduler as check_scheduler
    from .sampler import sample as sample
    from .sampler import set_timesteps as set_timesteps
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
