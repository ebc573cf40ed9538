"""One token into 2×2 with the skip connection beside it: shuffle, concat, LayerNorm, modulation."""

from torch import Tensor

from .._backend import checked, select_backend, triton
from .._checks import check_eps, check_floating, check_grid, check_like, check_rows
from .._tracing import signature
from ..adaln.reference import default_out_dtype
from . import reference

if triton is not None:
    from .. import _norm_ops


def token_split_concat_adaln(
    x: Tensor, skip: Tensor, shift: Tensor, scale: Tensor, *, grid: tuple[int, int], eps: float = 1e-6
) -> Tensor:
    """LN([shuffle(x), skip])·(1+scale)+shift over 2C' channels.

    shuffle sends channels (2·p1+p2)·C' to (2·p1+p2+1)·C' of token (y, x) to token (2y+p1, 2x+p2). Gradients flow
    to x, skip, shift and scale; they are deterministic and cannot be differentiated again on the Triton path.

    Args:
        x: (B, N, 4C'), N = H·W tokens in row-major order, any strides; a dense last dimension is read in place.
        skip: (B, 4N, C') on the grid (2H, 2W), of any floating dtype, likewise.
        shift, scale: (B, 2C'), of any floating dtype; parts of one projection (`chunk`) are read in place.
        grid: (H, W), x's.
        eps: added to the variance.

    Returns:
        (B, 4N, 2C') in autocast's dtype under autocast, else in x's. Statistics and products are in float32. For
        backward the Triton path keeps x, skip, scale and two float32 for each fine token.

    Raises:
        TypeError: for arguments that are no floating-point tensors.
        ValueError: for shapes, devices, a grid or an eps that do not fit.
        RuntimeError: if the Triton backend was asked for where it cannot run.

    Source: EDT (arXiv 2410.23788), up-sampling with skip connections.
    """
    tensors = x, skip, shift, scale
    known = signature(*tensors)
    if checked(_check, known, tensors, grid, eps) == "reference":
        return reference.token_split_concat_adaln(*tensors, grid=grid, eps=float(eps))
    out_dtype = default_out_dtype(x)
    return _norm_ops.run(
        "token_split_concat_adaln", known, x, skip, None, shift, scale, None, grid[1], float(eps), out_dtype
    )[0]


def _check(x, skip, shift, scale, grid, eps) -> str:
    check_rows("x", x)
    check_floating("skip", skip)
    grid = check_grid(grid)
    B, N, C = x.shape
    if grid[0] * grid[1] != N:
        raise ValueError(f"grid {grid} means {grid[0] * grid[1]} tokens, but x has {N} (shape {tuple(x.shape)})")
    if C % 4:
        raise ValueError(f"x has {C} channels; they must be four times the skip's, to split into 2×2 tokens")
    check_like("skip", skip, (B, 4 * N, C // 4), "x", x)
    check_like("shift", shift, (B, C // 2), "x", x)
    check_like("scale", scale, (B, C // 2), "x", x)
    check_eps(eps)
    return select_backend(x=x, skip=skip, shift=shift, scale=scale)
