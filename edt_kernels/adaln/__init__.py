"""LayerNorm without affine, modulated by a shift and a scale for each sample."""

import torch
from torch import Tensor

from .._backend import checked, select_backend, triton
from .._checks import check_eps, check_like, check_out_dtype, check_rows
from .._tracing import signature
from . import reference
from .reference import default_out_dtype

if triton is not None:
    from .. import _norm_ops


def adaln(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x)·(1+scale)+shift with LN(x) = (x − mean)/√(variance + eps) over the channels.

    Gradients flow to x, shift and scale; they are deterministic and cannot be differentiated again on the
    Triton path.

    Args:
        x: (B, N, C), any strides; a dense last dimension is read in place.
        shift, scale: (B, C), of any floating dtype; parts of one projection (`chunk`) are read in place.
        eps: added to the variance.
        out_dtype: of the result. By default autocast's dtype under autocast, else x's.

    Returns:
        (B, N, C). Statistics and products are in float32. For backward the Triton path keeps x, scale and two
        float32 for each token.

    Raises:
        TypeError: for arguments that are no floating-point tensors, or an out_dtype that is no floating dtype.
        ValueError: for shapes, devices or an eps that do not fit.
        RuntimeError: if the Triton backend was asked for where it cannot run.

    Source: adaLN of DiT (arXiv 2212.09748).
    """
    tensors = x, shift, scale
    known = signature(*tensors)
    if checked(_check, known, tensors, eps, out_dtype) == "reference":
        return reference.adaln(x, shift, scale, eps=float(eps), out_dtype=out_dtype)
    out_dtype = out_dtype or default_out_dtype(x)
    return _norm_ops.run("adaln", known, x, None, None, shift, scale, None, 0, float(eps), out_dtype)[0]


def _check(x, shift, scale, eps, out_dtype) -> str:
    check_rows("x", x)
    modulation_shape = (x.shape[0], x.shape[2])
    check_like("shift", shift, modulation_shape, "x", x)
    check_like("scale", scale, modulation_shape, "x", x)
    check_eps(eps)
    check_out_dtype(out_dtype)
    return select_backend(x=x, shift=shift, scale=scale)
