"""What `token_split_concat_adaln` is, in plain torch."""

import torch
from einops import rearrange
from torch import Tensor

from ..adaln.reference import adaln, default_out_dtype


def token_split_concat_adaln(
    x: Tensor, skip: Tensor, shift: Tensor, scale: Tensor, *, grid: tuple[int, int], eps: float = 1e-6
) -> Tensor:
    """LN over [pixel shuffle of x, skip], modulated: x (B, N, 4C'), skip (B, 4N, C'), shift and scale
    (B, 2C') → (B, 4N, 2C'). `grid` is x's; channel (2·p1+p2)·C'+c of token (y, x) goes to (2y+p1, 2x+p2)."""
    H, W = grid
    up = rearrange(x, "b (h w) (p1 p2 c) -> b (h p1 w p2) c", h=H, w=W, p1=2, p2=2)
    out_dtype = default_out_dtype(x)
    return adaln(torch.cat([up, skip], dim=-1), shift, scale, eps=eps, out_dtype=out_dtype)
