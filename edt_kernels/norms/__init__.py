"""What stands between the matrix products of a diffusion transformer's block: norm, modulation, gate, residual.

Common to these ops: tensors may have any strides, say of parts (`chunk`) of one projection; what has a dense last
dimension is read in place. Each has a floating dtype of its own. Statistics, products and sums are in float32.
Gradients flow to all but `keep`; those of the Triton path are deterministic and cannot be differentiated again.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._backend import checked, select_backend, triton
from .._tracing import signature
from . import reference

if triton is not None:
    from . import autograd


def adaln(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x)·(1+scale)+shift with LN(x) = (x − mean)/√(variance + eps) over the channels.

    Args:
        x: (B, N, C), any floating dtype and strides.
        shift, scale: (B, C), likewise.
        eps: added to the variance.
        out_dtype: of the result. By default autocast's dtype under autocast, else x's.

    Returns:
        (B, N, C), computed in float32. For backward the Triton path keeps x, scale and two float32 a token.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range, by its name.
        RuntimeError: if the Triton backend was asked for where it cannot run.

    Source: adaLN of DiT (arXiv 2212.09748).
    """
    return _norm("adaln", x, shift=shift, scale=scale, eps=eps, out_dtype=out_dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate·y.

    Args:
        x: the residual stream (B, N, C), any floating dtype and strides.
        y: the branch (B, N, C), likewise.
        gate: (B, C), likewise.

    Returns:
        (B, N, C) in x's dtype, computed in float32. For backward y and gate are kept.

    Raises: as `adaln`.
    Source: adaLN-Zero of DiT (arXiv 2212.09748).
    """
    return _norm("gated_residual", x, y, gate)


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *,
    eps: float = 1e-6, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x' = x + gate·y and LN(x')·(1+scale)+shift; both are returned.

    Args:
        x: the residual stream (B, N, C), any floating dtype and strides.
        y: the branch (B, N, C), likewise.
        gate, shift, scale: (B, C), likewise.
        eps: added to the variance.
        out_dtype: of the norm. By default autocast's dtype under autocast, else y's.

    Returns:
        x' (B, N, C) in x's dtype, and the norm (B, N, C), computed in float32. For backward the Triton path keeps
        x', y, gate, scale and two float32 a token.

    Raises: as `adaln`.
    Source: adaLN-Zero of DiT (arXiv 2212.09748).
    """
    return _norm("gated_residual_adaln", x, y, gate, shift, scale, eps=eps, out_dtype=out_dtype)


def token_merge_adaln(
    x: Tensor, shift: Tensor, scale: Tensor, *, grid: tuple[int, int], keep: Tensor | None = None,
    eps: float = 1e-6, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """keep ⊙ (LN([x₀₀, x₁₀, x₀₁, x₁₁])·(1+scale)+shift), the four tokens of each 2×2 cell on the channels.

    Subscripts are (row, column) within the cell, in the order of EDT's down-sampling; `keep` zeroes the C channels
    of a dropped token after the norm.

    Args:
        x: (B, N, C), N = H·W tokens in row-major order, any floating dtype and strides.
        shift, scale: (B, 4C), likewise.
        grid: (H, W), both even.
        keep: (B, N) bool, True keeps a token; None keeps all.
        eps: added to the variance.
        out_dtype: of the result. By default autocast's dtype under autocast, else x's.

    Returns:
        (B, N/4, 4C), computed in float32. For backward the Triton path keeps x, scale, keep and two float32 a
        merged token.

    Raises: as `adaln`.
    Source: EDT (arXiv 2410.23788), down-sampling and masking training.
    """
    return _norm(
        "token_merge_adaln", x, shift=shift, scale=scale, keep=keep, grid=grid, eps=eps, out_dtype=out_dtype
    )


def token_split_concat_adaln(
    x: Tensor, skip: Tensor, shift: Tensor, scale: Tensor, *, grid: tuple[int, int], eps: float = 1e-6
) -> Tensor:
    """LN([shuffle(x), skip])·(1+scale)+shift over 2C' channels.

    shuffle sends channels (2·p1+p2)·C' to (2·p1+p2+1)·C' of token (y, x) to token (2y+p1, 2x+p2).

    Args:
        x: (B, N, 4C'), N = H·W tokens in row-major order, any floating dtype and strides.
        skip: (B, 4N, C') on the grid (2H, 2W), likewise.
        shift, scale: (B, 2C'), likewise.
        grid: (H, W), x's.
        eps: added to the variance.

    Returns:
        (B, 4N, 2C') in autocast's dtype under autocast, else in x's, computed in float32. For backward the Triton
        path keeps x, skip, scale and two float32 a fine token.

    Raises: as `adaln`.
    Source: EDT (arXiv 2410.23788), up-sampling with skip connections.
    """
    return _norm("token_split_concat_adaln", x, skip, shift=shift, scale=scale, grid=grid, eps=eps)


# The tensors of each op beside x (B, N, C), in the order of its arguments.
_SHAPES = {
    "adaln": lambda B, N, C: {"shift": (B, C), "scale": (B, C)},
    "gated_residual": lambda B, N, C: {"y": (B, N, C), "gate": (B, C)},
    "gated_residual_adaln": lambda B, N, C: {"y": (B, N, C), "gate": (B, C), "shift": (B, C), "scale": (B, C)},
    "token_merge_adaln": lambda B, N, C: {"shift": (B, 4 * C), "scale": (B, 4 * C)},
    "token_split_concat_adaln":
        lambda B, N, C: {"skip": (B, 4 * N, C // 4), "shift": (B, C // 2), "scale": (B, C // 2)},
}  # fmt: skip


def _norm(
    op: str, x, y: Any = None, gate=None, shift=None, scale=None, keep=None, grid=None, eps=None, out_dtype=None
) -> Any:
    """Checks a call of an op, whose y may be called skip, and computes it; None is what the op has not."""
    tensors = x, y, gate, shift, scale, keep
    known = signature(*tensors)
    if checked(_check, known, tensors, op, grid, eps, out_dtype) == "reference":
        options = {"keep": keep, "grid": grid, "eps": eps and float(eps), "out_dtype": out_dtype}
        given = {name: value for name, value in options.items() if value is not None}
        return getattr(reference, op)(*(t for t in tensors[:5] if t is not None), **given)
    if out_dtype is None and scale is not None:
        branch = x if gate is None else y
        out_dtype = _checks.enabled_autocast_dtype(branch) or branch.dtype
    outputs = autograd.run(op, known, *tensors, 0 if grid is None else grid[1], float(eps or 0), out_dtype)
    return outputs[0] if len(outputs) == 1 else outputs


def _check(x, y, gate, shift, scale, keep, op: str, grid, eps, out_dtype) -> str:
    _checks.check_floating("x", x)
    if x.ndim != 3 or x.shape[2] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, N, C)")
    B, N, C = x.shape
    if op == "token_merge_adaln":
        grid = _checks.check_even_grid(grid)
    elif op == "token_split_concat_adaln":
        grid = _checks.check_grid(grid)
        if C % 4:
            raise ValueError(f"x has {C} channels; they must be four times the skip's, to split into 2×2 tokens")
    if grid is not None and grid[0] * grid[1] != N:
        raise ValueError(f"grid {grid} means {grid[0] * grid[1]} tokens, but x has {N} (shape {tuple(x.shape)})")
    given = {"x": x, "y": y, "skip": y, "gate": gate, "shift": shift, "scale": scale}
    shapes = _SHAPES[op](B, N, C)
    for name, shape in shapes.items():
        _checks.check_like(name, given[name], "x", x, shape)
    if keep is not None:
        _checks.check_dense("keep", keep, "a bool tensor or None")
        if keep.dtype != torch.bool:
            raise TypeError(f"keep is {keep.dtype}; it must be a bool tensor or None")
        if tuple(keep.shape) != (B, N) or keep.device != x.device:
            raise ValueError(
                f"keep has shape {tuple(keep.shape)} on {keep.device}; x needs {(B, N)} on {x.device}"
            )
    if "scale" in shapes:
        _checks.check_eps(eps)
        _checks.check_out_dtype(out_dtype)
    return select_backend(**{name: given[name] for name in ("x", *shapes)})
