"""Argument checks that the ops share. Each error names the argument, what came and what is needed."""

import math
from numbers import Real

import torch
from torch import Tensor

# Asked once: torch 2.11's Dynamo cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "hpu", "mps", "mtia"))
)


def enabled_autocast_dtype(tensor) -> torch.dtype | None:
    """What autocast would cast to on the tensor's device, None where it is off or unknown (as for "meta")."""
    device = tensor.device.type if isinstance(tensor, Tensor) else "cpu"
    if device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def check_floating(name: str, tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} is {given}; it must be a floating-point tensor")


def check_like(name: str, tensor, shape: tuple[int, ...], other: str, like: Tensor) -> None:
    """A floating-point tensor of this shape on the device of `like`, which the message calls `other`."""
    check_floating(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; {other} of shape {tuple(like.shape)} needs {tuple(shape)}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {other}'s device, {like.device}")


def check_rows(name: str, tensor) -> None:
    """(B, N, C)."""
    check_floating(name, tensor)
    if tensor.ndim != 3 or tensor.shape[2] < 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be (B, N, C)")


def check_grid(grid) -> tuple[int, int]:
    if not (isinstance(grid, (tuple, list)) and len(grid) == 2 and all(type(n) is int for n in grid)):
        raise TypeError(f"grid is {grid!r}; it must be a pair of integers (H, W)")
    if min(grid) < 1:
        raise ValueError(f"grid is {tuple(grid)}; both sides must be at least 1")
    return tuple(grid)


def check_even_grid(grid) -> tuple[int, int]:
    grid = check_grid(grid)
    if grid[0] % 2 or grid[1] % 2:
        raise ValueError(f"grid is {grid}; both sides must be even to merge 2×2 tokens")
    return grid


def check_extra_tokens(extra) -> tuple[int, int]:
    if not (isinstance(extra, (tuple, list)) and len(extra) == 2 and all(type(n) is int for n in extra)):
        raise TypeError(f"num_extra_tokens is {extra!r}; it must be a pair of integers (before, after)")
    if min(extra) < 0:
        raise ValueError(f"num_extra_tokens is {tuple(extra)}; neither may be negative")
    return tuple(extra)


def check_scale(scale) -> float | None:
    if scale is not None and not isinstance(scale, Real):
        raise TypeError(f"scale is a {type(scale).__name__}; it must be a number or None")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")
    return scale


def check_eps(eps) -> float:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps is a {type(eps).__name__}; it must be a number")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps is {eps}; it must be positive and finite")
    return float(eps)


def check_out_dtype(out_dtype) -> None:
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise TypeError(f"out_dtype is {out_dtype!r}; it must be a floating-point torch.dtype or None")
