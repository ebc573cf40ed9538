"""Launchers and torch registration of the `adaln` kernels."""

import torch
from torch import Tensor

from .. import _norm_kernels as kernels
from .._launch import define_gradient, define_op, dense_rows, refuse_forward_mode
from .._rows import empty_normed, launch_rows, modulation_gradients, row_program, save_for_backward, total


def _forward(x, shift, scale, eps, out_dtype):
    x, shift, scale = map(dense_rows, (x, shift, scale))
    _, N, C = x.shape
    out, mean, rstd = empty_normed(x, N, C, out_dtype)
    tile = row_program("adaln.forward", x, N, 1, C)
    launch_rows(
        kernels.forward, tile, (x, out),
        x, None, None, shift, scale, None, out, mean, rstd, *x.stride()[:2], None, None, None, shift.stride(0),
        scale.stride(0), N, eps,
    )  # fmt: skip
    return out, mean, rstd


def _backward(grad_out, x, scale, mean, rstd):
    grad_out, x, scale = map(dense_rows, (grad_out, x, scale))
    _, N, C = x.shape
    tile = row_program("adaln.backward", x, N, 1, C)
    grad_x, partials = x.new_empty(x.shape), x.new_empty(2, *tile.programs, C, dtype=torch.float32)
    launch_rows(
        kernels.backward, tile, (x, grad_out, grad_x),
        None, grad_out, x, None, None, scale, mean, rstd, grad_x, None, partials, None, None,
        *grad_out.stride()[:2], *x.stride()[:2], None, None, None, scale.stride(0), N, tile.rows_per_program,
    )  # fmt: skip
    return grad_x, total(partials)


def _fake_forward(x, shift, scale, eps, out_dtype):
    return empty_normed(x, x.shape[1], x.shape[2], out_dtype)


def _fake_backward(grad_out, x, scale, mean, rstd):
    return x.new_empty(x.shape), x.new_empty(2, *scale.shape, dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    x, shift, scale, _, _ = inputs
    _, *statistics = output
    save_for_backward(ctx, (x, scale, *statistics), modulation=(shift, scale))


def _differentiate(ctx, grad_out, _grad_mean, _grad_rstd):
    grad_x, sums = torch.ops.edt_kernels.adaln_backward(grad_out, *ctx.saved_tensors)
    return grad_x, *modulation_gradients(ctx, sums), None, None


define_op(
    "adaln",
    "(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define_op(
    "adaln_backward",
    "(Tensor grad_out, Tensor x, Tensor scale, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
define_gradient("adaln", _save_for_backward, _differentiate)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype | None) -> Tensor:
    """`edt_kernels.adaln` by the kernels; the arguments are checked."""
    refuse_forward_mode("adaln", x, shift, scale)
    return torch.ops.edt_kernels.adaln(x, shift, scale, eps, out_dtype)[0]
