"""What `token_merge_adaln` is, in plain torch."""

import torch
from einops import rearrange, repeat
from torch import Tensor

from ..adaln.reference import adaln

# 2×2 neighbours in the order (row, column) = (0,0), (1,0), (0,1), (1,1): the column offset s is the slow one.
_MERGE = "b (h r w s) c -> b (h w) (s r c)"


def token_merge_adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    grid: tuple[int, int],
    keep: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LN over the four channels-concatenated neighbours, modulated: x (B, N, C), shift and scale (B, 4C),
    keep (B, N) bool zeroes the C-slices of dropped tokens afterwards → (B, N/4, 4C)."""
    H, W = grid
    sizes = {"h": H // 2, "r": 2, "w": W // 2, "s": 2}
    merged = adaln(rearrange(x, _MERGE, **sizes), shift, scale, eps=eps, out_dtype=out_dtype)
    if keep is None:
        return merged
    keep = repeat(keep, "b n -> b n c", c=x.shape[-1])
    return merged * rearrange(keep, _MERGE, **sizes)
