"""2×2 tokens into one: gather, LayerNorm over all their channels, modulation, optional mask."""

import torch
from torch import Tensor

from .._backend import checked, select_backend, triton
from .._checks import check_dense, check_eps, check_even_grid, check_like, check_out_dtype, check_rows
from .._tracing import signature
from ..adaln.reference import default_out_dtype
from . import reference

if triton is not None:
    from .. import _norm_ops


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
    """keep ⊙ (LN([x₀₀, x₁₀, x₀₁, x₁₁])·(1+scale)+shift), the four tokens of each 2×2 cell on the channels.

    Subscripts are (row, column) within the cell, in the order of EDT's down-sampling; `keep` zeroes the C
    channels of a dropped token after the norm. Gradients flow to x, shift and scale; they are deterministic and
    cannot be differentiated again on the Triton path.

    Args:
        x: (B, N, C), N = H·W tokens in row-major order, any strides; a dense last dimension is read in place.
        shift, scale: (B, 4C), of any floating dtype; parts of one projection (`chunk`) are read in place.
        grid: (H, W), both even.
        keep: (B, N) bool, True keeps a token; None keeps all.
        eps: added to the variance.
        out_dtype: of the result. By default autocast's dtype under autocast, else x's.

    Returns:
        (B, N/4, 4C). Statistics and products are in float32. For backward the Triton path keeps x, scale, keep
        and two float32 for each merged token.

    Raises:
        TypeError: for tensors or an out_dtype of the wrong kind.
        ValueError: for shapes, devices, a grid or an eps that do not fit.
        RuntimeError: if the Triton backend was asked for where it cannot run.

    Source: EDT (arXiv 2410.23788), down-sampling and masking training.
    """
    tensors = x, shift, scale, keep
    known = signature(*tensors)
    if checked(_check, known, tensors, grid, eps, out_dtype) == "reference":
        return reference.token_merge_adaln(
            x, shift, scale, grid=grid, keep=keep, eps=float(eps), out_dtype=out_dtype
        )
    out_dtype = out_dtype or default_out_dtype(x)
    return _norm_ops.run(
        "token_merge_adaln", known, x, None, None, shift, scale, keep, grid[1], float(eps), out_dtype
    )[0]


def _check(x, shift, scale, keep, grid, eps, out_dtype) -> str:
    check_rows("x", x)
    grid = check_even_grid(grid)
    B, N, C = x.shape
    if grid[0] * grid[1] != N:
        raise ValueError(f"grid {grid} means {grid[0] * grid[1]} tokens, but x has {N} (shape {tuple(x.shape)})")
    check_like("shift", shift, (B, 4 * C), "x", x)
    check_like("scale", scale, (B, 4 * C), "x", x)
    if keep is not None:
        check_dense("keep", keep, "a bool tensor or None")
        if keep.dtype != torch.bool:
            raise TypeError(f"keep is {keep.dtype}; it must be a bool tensor or None")
        if tuple(keep.shape) != (B, N) or keep.device != x.device:
            raise ValueError(
                f"keep has shape {tuple(keep.shape)} on {keep.device}; x needs {(B, N)} on {x.device}"
            )
    check_eps(eps)
    check_out_dtype(out_dtype)
    return select_backend(x=x, shift=shift, scale=scale)
