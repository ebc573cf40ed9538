"""What `gated_residual_adaln` is, in plain torch."""

import torch
from torch import Tensor

from ..adaln.reference import default_out_dtype, layer_norm_modulate
from ..gated_residual.reference import gated_residual


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·y and LN(x')·(1+scale)+shift; x and y (B, N, C), the others (B, C) → (x', normed)."""
    x = gated_residual(x, y, gate)
    return x, layer_norm_modulate(x, shift, scale, eps).to(out_dtype or default_out_dtype(y))
