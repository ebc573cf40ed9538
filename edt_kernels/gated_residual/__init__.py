"""The end of a sub-layer: its output, gated for each sample, onto the residual stream."""

from torch import Tensor

from .._backend import checked, select_backend, triton
from .._checks import check_like, check_rows
from .._tracing import signature
from . import reference

if triton is not None:
    from .. import _norm_ops


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate·y.

    Gradients flow to all three; they are deterministic and cannot be differentiated again on the Triton path.

    Args:
        x: the residual stream (B, N, C), any strides; a dense last dimension is read in place.
        y: the branch (B, N, C), of any floating dtype.
        gate: (B, C), of any floating dtype; part of a projection (`chunk`) is read in place.

    Returns:
        (B, N, C) in x's dtype; the product and the sum are in float32. For backward y and gate are kept.

    Raises:
        TypeError: for arguments that are no floating-point tensors.
        ValueError: for shapes or devices that do not fit.
        RuntimeError: if the Triton backend was asked for where it cannot run.

    Source: adaLN-Zero of DiT (arXiv 2212.09748).
    """
    tensors = x, y, gate
    known = signature(*tensors)
    if checked(_check, known, tensors) == "reference":
        return reference.gated_residual(x, y, gate)
    return _norm_ops.run("gated_residual", known, *tensors, None, None, None, 0, 0.0, x.dtype)[0]


def _check(x, y, gate) -> str:
    check_rows("x", x)
    check_like("y", y, x.shape, "x", x)
    check_like("gate", gate, (x.shape[0], x.shape[2]), "x", x)
    return select_backend(x=x, y=y, gate=gate)
