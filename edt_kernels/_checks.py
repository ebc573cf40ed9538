"""Argument checks that the ops share. Each error names the argument, what came and what is needed."""

from numbers import Real

import torch
from torch import Tensor

# Asked once: torch 2.11's Dynamo cannot trace the question.
_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "hpu", "mps", "mtia")))


def enabled_autocast_dtype(tensor) -> torch.dtype | None:
    """What autocast would cast to on the tensor's device, None where it is off or unknown (as for "meta")."""
    device = tensor.device.type if isinstance(tensor, Tensor) else "cpu"
    if device in _AUTOCAST and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


_FLOATING = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
_FLOAT32 = torch.finfo(torch.float32)
_LARGEST_SIDE = 2**31 - 1  # the kernels count tokens in 32 bits


def shown(value) -> str:
    """A value in an error: in full if short. An integer of thousands of digits cannot be printed at all."""
    if type(value) is int and abs(value) >= 10**20:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # whatever the __repr__ of a foreign object does
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}… ({type(value).__name__})"


def check_dense(name: str, tensor, kind: str) -> None:
    """A tensor in plain strides; `kind` is what the message asks for."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; it must be {kind}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} is a tensor of layout {layout}; it must be {kind} that is dense, with strides")


def check_floating(name: str, tensor) -> None:
    check_dense(name, tensor, "a floating-point tensor")
    if tensor.dtype not in _FLOATING:
        needed = "a floating-point tensor" + " of 16, 32 or 64 bits" * tensor.is_floating_point()
        raise TypeError(f"{name} is {tensor.dtype}; it must be {needed}")


def check_like(name: str, tensor, other: str, like: Tensor, *shapes: tuple[int, ...]) -> None:
    """A floating-point tensor of one of these shapes on the device of `like`, which the message calls `other`."""
    check_floating(name, tensor)
    if all(tuple(tensor.shape) != shape for shape in shapes):  # torch.compile cannot look for symbols in a tuple
        needed = " or ".join(map(str, shapes))
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; {other} of shape {tuple(like.shape)} needs {needed}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {other}'s device, {like.device}")


def _check_pair(name: str, pair, meaning: str, parts: str, least: int) -> tuple[int, int]:
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(n) is int for n in pair)):
        raise TypeError(f"{name} is {shown(pair)}; it must be a pair of integers {meaning}")
    if min(pair) < least or max(pair) > _LARGEST_SIDE:
        raise ValueError(
            f"{name} is {shown(tuple(pair))}; both {parts} must be at least {least} and at most {_LARGEST_SIDE}"
        )
    return tuple(pair)


def check_grid(grid) -> tuple[int, int]:
    return _check_pair("grid", grid, "(H, W)", "sides", 1)


def check_even_grid(grid) -> tuple[int, int]:
    grid = check_grid(grid)
    if grid[0] % 2 or grid[1] % 2:
        raise ValueError(f"grid is {grid}; both sides must be even to merge 2×2 tokens")
    return grid


def check_extra_tokens(extra) -> tuple[int, int]:
    return _check_pair("num_extra_tokens", extra, "(before, after)", "counts", 0)


def check_number(name: str, value, needed: str = "a number") -> float:
    """A real number that a float holds, NaN and infinity included."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be {needed}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {shown(value)}; it must be within the range of a float") from None


def check_scale(scale) -> float | None:
    if scale is None:
        return None
    number = check_number("scale", scale, "a number or None")
    if not abs(number) <= _FLOAT32.max:
        raise ValueError(f"scale is {shown(scale)}; it must be finite in float32")
    return number


def check_eps(eps) -> float:
    number = check_number("eps", eps)
    if not _FLOAT32.tiny <= number <= _FLOAT32.max:
        raise ValueError(f"eps is {shown(eps)}; it must be positive and finite in float32")
    return number


def check_out_dtype(dtype, name: str = "out_dtype") -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in _FLOATING):
        raise TypeError(
            f"{name} is {shown(dtype)}; it must be a floating-point torch.dtype of 16, 32 or 64 bits or None"
        )
