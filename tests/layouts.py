"""The same values at other strides."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LAYOUTS = (
    "dense",
    "transposed",
    "strided",
    "sliced",
    "every other row",
    "expanded batch",
    "expanded rows",
)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """(B, N, …, D) at the strides of `layout`, by differentiable steps. Neighbours in memory are NaN, and the
    expanded ones repeat their first item or row."""
    match layout:
        case "dense":
            return tensor
        case "transposed":  # tokens outermost
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        case "heads first":  # (B, heads, N, D) in memory
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        case "strided":  # the last dimension is not dense
            return tensor.transpose(1, -1).contiguous().transpose(1, -1)
        case "sliced":  # rows begin at odd addresses
            return F.pad(tensor, (3, 2), value=math.nan)[..., 3:-2]
        case "every other row":
            return torch.stack([tensor, torch.full_like(tensor, math.nan)], dim=2).flatten(1, 2)[:, ::2]
        case "expanded batch":
            return tensor[:1].expand_as(tensor)
        case "expanded rows":
            return tensor[:, :1].expand_as(tensor)
    raise ValueError(f"layout is {layout!r}")
