"""Launchers and torch registration of the `token_split_concat_adaln` kernels."""

import torch
from torch import Tensor

from .._launch import define_gradient, define_op, dense_rows, refuse_forward_mode
from .._rows import empty_normed, launch_rows, modulation_gradients, row_program, save_for_backward, total
from . import kernels


def _forward(x, skip, shift, scale, grid_h, grid_w, eps, out_dtype):
    x, skip, shift, scale = map(dense_rows, (x, skip, shift, scale))
    _, N, C = skip.shape
    out, mean, rstd = empty_normed(x, N, 2 * C, out_dtype)
    tile = row_program("token_split_concat_adaln.forward", skip, N, 2, C)
    launch_rows(
        kernels.forward, tile, (x, skip, out),
        x, skip, shift, scale, out, mean, rstd, *x.stride()[:2], *skip.stride()[:2], shift.stride(0),
        scale.stride(0), N, grid_w, eps,
    )  # fmt: skip
    return out, mean, rstd


def _backward(grad_out, x, skip, scale, mean, rstd, grid_h, grid_w):
    grad_out, x, skip, scale = map(dense_rows, (grad_out, x, skip, scale))
    _, N, C = skip.shape
    tile = row_program("token_split_concat_adaln.backward", skip, N, 2, C)
    grad_x, grad_skip = x.new_empty(x.shape), skip.new_empty(skip.shape)
    partials = x.new_empty(2, *tile.programs, 2 * C, dtype=torch.float32)
    launch_rows(
        kernels.backward, tile, (x, skip, grad_out, grad_skip),
        grad_out, x, skip, scale, mean, rstd, grad_x, grad_skip, partials,
        *grad_out.stride()[:2], *x.stride()[:2], *skip.stride()[:2], scale.stride(0),
        N, grid_w, tile.rows_per_program,
    )  # fmt: skip
    return grad_x, grad_skip, total(partials)


def _fake_forward(x, skip, shift, scale, grid_h, grid_w, eps, out_dtype):
    _, N, C = skip.shape
    return empty_normed(x, N, 2 * C, out_dtype)


def _fake_backward(grad_out, x, skip, scale, mean, rstd, grid_h, grid_w):
    sums = x.new_empty(2, *scale.shape, dtype=torch.float32)
    return x.new_empty(x.shape), skip.new_empty(skip.shape), sums


def _save_for_backward(ctx, inputs, output):
    x, skip, shift, scale, *ctx.grid, _, _ = inputs
    _, *statistics = output
    save_for_backward(ctx, (x, skip, scale, *statistics), modulation=(shift, scale))


def _differentiate(ctx, grad_out, _grad_mean, _grad_rstd):
    grad_x, grad_skip, sums = torch.ops.edt_kernels.token_split_concat_adaln_backward(
        grad_out, *ctx.saved_tensors, *ctx.grid
    )
    return grad_x, grad_skip, *modulation_gradients(ctx, sums), *[None] * 4


define_op(
    "token_split_concat_adaln",
    "(Tensor x, Tensor skip, Tensor shift, Tensor scale, int grid_h, int grid_w, float eps, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define_op(
    "token_split_concat_adaln_backward",
    "(Tensor grad_out, Tensor x, Tensor skip, Tensor scale, Tensor mean, Tensor rstd, int grid_h, int grid_w) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
define_gradient("token_split_concat_adaln", _save_for_backward, _differentiate)


def token_split_concat_adaln(
    x: Tensor,
    skip: Tensor,
    shift: Tensor,
    scale: Tensor,
    grid: tuple[int, int],
    eps: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """`edt_kernels.token_split_concat_adaln` by the kernels; the arguments are checked."""
    refuse_forward_mode("token_split_concat_adaln", x, skip, shift, scale)
    return torch.ops.edt_kernels.token_split_concat_adaln(x, skip, shift, scale, *grid, eps, out_dtype)[0]
