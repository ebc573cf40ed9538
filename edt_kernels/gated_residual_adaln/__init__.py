"""Between two sub-layers: gated residual and the next sub-layer's modulated norm, in one pass."""

import torch
from torch import Tensor

from .._backend import checked, select_backend, triton
from .._checks import check_eps, check_like, check_out_dtype, check_rows
from .._tracing import signature
from ..adaln.reference import default_out_dtype
from . import reference

if triton is not None:
    from .. import _norm_ops


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·y and LN(x')·(1+scale)+shift; both are returned.

    Gradients flow to all five; they are deterministic and cannot be differentiated again on the Triton path.

    Args:
        x: the residual stream (B, N, C), any strides; a dense last dimension is read in place.
        y: the branch (B, N, C), of any floating dtype.
        gate, shift, scale: (B, C), of any floating dtype; parts of one projection (`chunk`) are read in place.
        eps: added to the variance.
        out_dtype: of the norm. By default autocast's dtype under autocast, else y's.

    Returns:
        x' (B, N, C) in x's dtype, and the norm (B, N, C). Statistics, products and sums are in float32. For
        backward the Triton path keeps x', y, gate, scale and two float32 for each token.

    Raises:
        TypeError: for arguments that are no floating-point tensors, or an out_dtype that is no floating dtype.
        ValueError: for shapes, devices or an eps that do not fit.
        RuntimeError: if the Triton backend was asked for where it cannot run.

    Source: adaLN-Zero of DiT (arXiv 2212.09748).
    """
    tensors = x, y, gate, shift, scale
    known = signature(*tensors)
    if checked(_check, known, tensors, eps, out_dtype) == "reference":
        return reference.gated_residual_adaln(*tensors, eps=float(eps), out_dtype=out_dtype)
    out_dtype = out_dtype or default_out_dtype(y)
    return _norm_ops.run("gated_residual_adaln", known, *tensors, None, 0, float(eps), out_dtype)


def _check(x, y, gate, shift, scale, eps, out_dtype) -> str:
    check_rows("x", x)
    check_like("y", y, x.shape, "x", x)
    for name, tensor in (("gate", gate), ("shift", shift), ("scale", scale)):
        check_like(name, tensor, (x.shape[0], x.shape[2]), "x", x)
    check_eps(eps)
    check_out_dtype(out_dtype)
    return select_backend(x=x, y=y, gate=gate, shift=shift, scale=scale)
