"""EDT, the Efficient Diffusion Transformer, on the kernels of `edt_kernels`."""

from .checkpoint import load_checkpoint, load_released_state_dict
from .config import AMM_PLACEMENTS, PRESETS, published_amm_blocks
from .diffusion import LossSecondMomentSampler, make_scheduler, training_losses
from .model import EDTTransformer2DModel, load_preset
from .sample import sample

__all__ = [
    "AMM_PLACEMENTS",
    "PRESETS",
    "EDTTransformer2DModel",
    "LossSecondMomentSampler",
    "load_checkpoint",
    "load_preset",
    "load_released_state_dict",
    "make_scheduler",
    "published_amm_blocks",
    "sample",
    "training_losses",
]
