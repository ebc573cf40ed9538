"""Which models are supported, and where their blocks are."""

from typing import Any

from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.utils.torch_utils import is_compiled_module

_MODELS = (DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, FluxTransformer2DModel)


def supported(model: Any) -> Any:
    """The model, out of `torch.compile`'s wrapper: what is compiled sees the change and compiles again."""
    model = model._orig_mod if is_compiled_module(model) else model
    if not isinstance(model, _MODELS):
        names = ", ".join(each.__name__ for each in _MODELS)
        raise TypeError(f"model is a {type(model).__name__}; it must be one of diffusers' {names}")
    return model


def blocks_of(model) -> list[Any]:
    """Flux's double blocks come first, then its single ones."""
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]
