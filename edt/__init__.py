"""EDT, the Efficient Diffusion Transformer, on the kernels of `edt_kernels`.

Names are imported when they are first used: `edt.config`, which is plain data, needs no diffusers.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import initialize_from, load_checkpoint, load_released_state_dict
    from .config import AMM_PLACEMENTS, PRESETS, published_amm_blocks
    from .cuda_graph import GraphedStep
    from .diffusion import LossSecondMomentSampler, make_scheduler, training_losses
    from .model import EDTTransformer2DModel, load_preset
    from .pipeline import EDTPipeline
    from .sampling import sample
    from .step_cache import StepCacheConfig

_MODULES = {
    "AMM_PLACEMENTS": "config",
    "PRESETS": "config",
    "EDTPipeline": "pipeline",
    "EDTTransformer2DModel": "model",
    "GraphedStep": "cuda_graph",
    "LossSecondMomentSampler": "diffusion",
    "StepCacheConfig": "step_cache",
    "initialize_from": "checkpoint",
    "load_checkpoint": "checkpoint",
    "load_preset": "model",
    "load_released_state_dict": "checkpoint",
    "make_scheduler": "diffusion",
    "published_amm_blocks": "config",
    "sample": "sampling",
    "training_losses": "diffusion",
}
__all__ = [
    "AMM_PLACEMENTS",
    "PRESETS",
    "EDTPipeline",
    "EDTTransformer2DModel",
    "GraphedStep",
    "LossSecondMomentSampler",
    "StepCacheConfig",
    "initialize_from",
    "load_checkpoint",
    "load_preset",
    "load_released_state_dict",
    "make_scheduler",
    "published_amm_blocks",
    "sample",
    "training_losses",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
