"""What the norm-type ops are, in plain torch: the path that CPU tensors take."""

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from .._checks import enabled_autocast_dtype
from .._tracing import add_in_place

# 2×2 neighbours in the order (row, column) = (0,0), (1,0), (0,1), (1,1): the column offset s is the slow one.
_MERGE = "b (h r w s) c -> b (h w) (s r c)"


def adaln(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x)·(1+scale)+shift: x (B, N, C), shift and scale (B, C) → (B, N, C). LayerNorm without affine and all
    else in float32, or in float64 for float64 inputs."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(accumulate), x.shape[-1:], eps=eps)
    gain, shift = 1 + scale.to(accumulate).unsqueeze(1), shift.to(accumulate).unsqueeze(1)
    # addcmul, here and below, would multiply once more per gradient.
    return add_in_place(normed * gain, shift).to(out_dtype or enabled_autocast_dtype(x) or x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate·y in x's dtype, computed in float32: x and y (B, N, C), gate (B, C) → (B, N, C)."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    gate = gate.to(accumulate).unsqueeze(1)
    return add_in_place(gate * y.to(accumulate), x.to(accumulate)).to(x.dtype)


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *,
    eps: float = 1e-6, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x' = x + gate·y and LN(x')·(1+scale)+shift; x and y (B, N, C), the others (B, C) → (x', normed)."""
    x = gated_residual(x, y, gate)
    return x, adaln(x, shift, scale, eps=eps, out_dtype=out_dtype or enabled_autocast_dtype(y) or y.dtype)


def token_merge_adaln(
    x: Tensor, shift: Tensor, scale: Tensor, *, grid: tuple[int, int],
    keep: Tensor | None = None, eps: float = 1e-6, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """LN over the four channels-concatenated neighbours, modulated: x (B, N, C), shift and scale (B, 4C),
    keep (B, N) bool zeroes the C-slices of dropped tokens afterwards → (B, N/4, 4C)."""
    sizes = {"h": grid[0] // 2, "r": 2, "w": grid[1] // 2, "s": 2}
    merged = adaln(rearrange(x, _MERGE, **sizes), shift, scale, eps=eps, out_dtype=out_dtype)
    if keep is None:
        return merged
    return merged * rearrange(repeat(keep, "b n -> b n c", c=x.shape[-1]), _MERGE, **sizes)


def token_split_concat_adaln(
    x: Tensor, skip: Tensor, shift: Tensor, scale: Tensor, *, grid: tuple[int, int], eps: float = 1e-6
) -> Tensor:
    """LN over [pixel shuffle of x, skip], modulated: x (B, N, 4C'), skip (B, 4N, C'), shift and scale
    (B, 2C') → (B, 4N, 2C'). `grid` is x's; channel (2·p1+p2)·C'+c of token (y, x) goes to (2y+p1, 2x+p2)."""
    up = rearrange(x, "b (h w) (p1 p2 c) -> b (h p1 w p2) c", h=grid[0], w=grid[1], p1=2, p2=2)
    out_dtype = enabled_autocast_dtype(x) or x.dtype
    return adaln(torch.cat([up, skip], dim=-1), shift, scale, eps=eps, out_dtype=out_dtype)
