"""Launchers and torch registration of `gated_residual_adaln` and, by the same kernels, `gated_residual`."""

import torch
from torch import Tensor

from .. import _norm_kernels as kernels
from .._launch import define_gradient, define_op, dense_rows, refuse_forward_mode
from .._rows import empty_normed, launch_rows, modulation_gradients, row_program, save_for_backward, total


def _op(norm: bool) -> str:
    return "gated_residual_adaln" if norm else "gated_residual"


def _strides(tensor: Tensor | None) -> tuple[int | None, ...]:
    return (None, None) if tensor is None else tensor.stride()[:-1]


def _launch_forward(x, y, gate, shift, scale, eps, x_out, out, mean, rstd) -> None:
    """With out None: the residual alone."""
    _, N, C = x.shape
    tile = row_program(f"{_op(out is not None)}.forward", x, N, 1, C)
    launch_rows(
        kernels.forward, tile, tuple(t for t in (x, y, x_out, out) if t is not None),
        x, y, gate, shift, scale, x_out, out, mean, rstd, *_strides(x), *_strides(y),
        gate.stride(0), *_strides(shift)[:1], *_strides(scale)[:1], N, eps,
    )  # fmt: skip


def _launch_backward(grad_x_out, grad_out, x_out, y, gate, scale, mean, rstd, grad_x, grad_y) -> Tensor:
    """Fills grad_x (unless grad_out is None) and grad_y; the sums (1 or 3, B, C) of dgate, dshift and dscale."""
    norm = grad_out is not None
    _, N, C = y.shape
    tile = row_program(f"{_op(norm)}.backward", grad_x_out, N, 1, C)
    partials = y.new_empty(3 if norm else 1, *tile.programs, C, dtype=torch.float32)
    launch_rows(
        kernels.backward, tile, tuple(t for t in (grad_x_out, grad_out, x_out, y, grad_y) if t is not None),
        grad_x_out, grad_out, x_out, y, gate, scale, mean, rstd, grad_x, grad_y, partials,
        *_strides(grad_x_out), *_strides(grad_out), *_strides(x_out), *_strides(y), gate.stride(0),
        *_strides(scale)[:1], N, tile.rows_per_program,
    )  # fmt: skip
    return total(partials)


def _forward(x, y, gate, shift, scale, eps, out_dtype):
    x, y, gate, shift, scale = map(dense_rows, (x, y, gate, shift, scale))
    x_out, normed = x.new_empty(x.shape), empty_normed(x, x.shape[1], x.shape[2], out_dtype)
    _launch_forward(x, y, gate, shift, scale, eps, x_out, *normed)
    return x_out, *normed


def _backward(grad_x_out, grad_out, x_out, y, gate, scale, mean, rstd):
    grad_x_out, grad_out, y, gate, scale = map(dense_rows, (grad_x_out, grad_out, y, gate, scale))
    grad_x, grad_y = x_out.new_empty(x_out.shape), y.new_empty(y.shape)
    sums = _launch_backward(grad_x_out, grad_out, x_out, y, gate, scale, mean, rstd, grad_x, grad_y)
    return grad_x, grad_y, sums


def _residual_forward(x, y, gate):
    x, y, gate = map(dense_rows, (x, y, gate))
    x_out = x.new_empty(x.shape)
    _launch_forward(x, y, gate, None, None, 0.0, x_out, None, None, None)
    return x_out


def _residual_backward(grad_x_out, y, gate):
    grad_x_out, y, gate = map(dense_rows, (grad_x_out, y, gate))
    grad_y = y.new_empty(y.shape)
    return grad_y, _launch_backward(grad_x_out, None, None, y, gate, None, None, None, None, grad_y)


def _fake_forward(x, y, gate, shift, scale, eps, out_dtype):
    return x.new_empty(x.shape), *empty_normed(x, x.shape[1], x.shape[2], out_dtype)


def _fake_backward(grad_x_out, grad_out, x_out, y, gate, scale, mean, rstd):
    return x_out.new_empty(x_out.shape), y.new_empty(y.shape), y.new_empty(3, *gate.shape, dtype=torch.float32)


def _fake_residual_forward(x, y, gate):
    return x.new_empty(x.shape)


def _fake_residual_backward(grad_x_out, y, gate):
    return y.new_empty(y.shape), y.new_empty(1, *gate.shape, dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    _, y, gate, shift, scale, _, _ = inputs
    x_out, _, *statistics = output
    save_for_backward(ctx, (x_out, y, gate, scale, *statistics), modulation=(gate, shift, scale))


def _differentiate(ctx, grad_x_out, grad_out, _grad_mean, _grad_rstd):
    saved = x_out, *_ = ctx.saved_tensors  # once: a checkpoint recomputes for one reading
    grad_x_out = torch.zeros_like(x_out) if grad_x_out is None else grad_x_out
    grad_out = torch.zeros_like(x_out) if grad_out is None else grad_out
    grad_x, grad_y, sums = torch.ops.edt_kernels.gated_residual_adaln_backward(grad_x_out, grad_out, *saved)
    return grad_x, grad_y, *modulation_gradients(ctx, sums), None, None


def _save_residual_for_backward(ctx, inputs, output):
    _, y, gate = inputs
    save_for_backward(ctx, (y, gate), modulation=(gate,))


def _differentiate_residual(ctx, grad_x_out):
    grad_y, sums = torch.ops.edt_kernels.gated_residual_backward(grad_x_out, *ctx.saved_tensors)
    return grad_x_out, grad_y, *modulation_gradients(ctx, sums)


define_op(
    "gated_residual_adaln",
    "(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps, ScalarType out_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define_op(
    "gated_residual_adaln_backward",
    "(Tensor grad_x_out, Tensor grad_out, Tensor x_out, Tensor y, Tensor gate, Tensor scale, Tensor mean, "
    "Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
define_gradient("gated_residual_adaln", _save_for_backward, _differentiate)
define_op(
    "gated_residual",
    "(Tensor x, Tensor y, Tensor gate) -> Tensor",
    _residual_forward,
    _fake_residual_forward,
)
define_op(
    "gated_residual_backward",
    "(Tensor grad_x_out, Tensor y, Tensor gate) -> (Tensor, Tensor)",
    _residual_backward,
    _fake_residual_backward,
)
define_gradient("gated_residual", _save_residual_for_backward, _differentiate_residual)


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """`edt_kernels.gated_residual_adaln` by the kernels; the arguments are checked."""
    refuse_forward_mode("gated_residual_adaln", x, y, gate, shift, scale)
    return torch.ops.edt_kernels.gated_residual_adaln(x, y, gate, shift, scale, eps, out_dtype)[:2]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`edt_kernels.gated_residual` by the kernels; the arguments are checked."""
    refuse_forward_mode("gated_residual", x, y, gate)
    return torch.ops.edt_kernels.gated_residual(x, y, gate)
