"""EDT, the Efficient Diffusion Transformer, on the kernels of `edt_kernels`."""

from .checkpoint import load_checkpoint, load_released_state_dict
from .config import AMM_PLACEMENTS, PRESETS, published_amm_blocks
from .model import EDTTransformer2DModel, load_preset

__all__ = [
    "AMM_PLACEMENTS",
    "PRESETS",
    "EDTTransformer2DModel",
    "load_checkpoint",
    "load_preset",
    "load_released_state_dict",
    "published_amm_blocks",
]
