"""What `adaln` is, in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import enabled_autocast_dtype
from .._tracing import add_in_place


def default_out_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a normed output that the caller did not choose: autocast's, else the tensor's own."""
    return enabled_autocast_dtype(tensor) or tensor.dtype


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LN(x)·(1+scale)+shift in float32 (float64 for float64 inputs), the LayerNorm without affine."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(accumulate), x.shape[-1:], eps=eps)
    gain, shift = 1 + scale.to(accumulate).unsqueeze(1), shift.to(accumulate).unsqueeze(1)
    return add_in_place(normed * gain, shift)  # addcmul would multiply once more per gradient


def adaln(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x)·(1+scale)+shift: x (B, N, C), shift and scale (B, C) → (B, N, C)."""
    return layer_norm_modulate(x, shift, scale, eps).to(out_dtype or default_out_dtype(x))
