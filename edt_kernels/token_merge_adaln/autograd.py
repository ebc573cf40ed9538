"""Launchers and torch registration of the `token_merge_adaln` kernels."""

import torch
from torch import Tensor

from .._launch import define_gradient, define_op, dense_rows, refuse_forward_mode
from .._rows import empty_normed, launch_rows, modulation_gradients, row_program, save_for_backward, total
from . import kernels


def _keep_arguments(x: Tensor, keep: Tensor | None) -> tuple[Tensor, int, bool]:
    """Bytes, their stride by sample, and whether there is a mask; x stands in for one that is not read."""
    if keep is None:
        return x, 0, False
    keep = dense_rows(keep).view(torch.uint8)
    return keep, keep.stride(0), True


def _forward(x, shift, scale, keep, grid_h, grid_w, eps, out_dtype):
    x, shift, scale = map(dense_rows, (x, shift, scale))
    _, tokens, C = x.shape
    N = tokens // 4
    out, mean, rstd = empty_normed(x, N, 4 * C, out_dtype)
    tile = row_program("token_merge_adaln.forward", x, N, 4, C)
    keep, stride_keep, masked = _keep_arguments(x, keep)
    launch_rows(
        kernels.forward, tile, (x, out),
        x, shift, scale, keep, out, mean, rstd, *x.stride()[:2], shift.stride(0), scale.stride(0),
        stride_keep, N, grid_w, eps, MASKED=masked,
    )  # fmt: skip
    return out, mean, rstd


def _backward(grad_out, x, scale, keep, mean, rstd, grid_h, grid_w):
    grad_out, x, scale = map(dense_rows, (grad_out, x, scale))
    _, N, width = grad_out.shape
    tile = row_program("token_merge_adaln.backward", x, N, 4, width // 4)
    grad_x, partials = x.new_empty(x.shape), x.new_empty(2, *tile.programs, width, dtype=torch.float32)
    keep, stride_keep, masked = _keep_arguments(x, keep)
    launch_rows(
        kernels.backward, tile, (x, grad_out, grad_x),
        grad_out, x, scale, keep, mean, rstd, grad_x, partials, *grad_out.stride()[:2], *x.stride()[:2],
        scale.stride(0), stride_keep, N, grid_w, tile.rows_per_program, MASKED=masked,
    )  # fmt: skip
    return grad_x, total(partials)


def _fake_forward(x, shift, scale, keep, grid_h, grid_w, eps, out_dtype):
    _, tokens, C = x.shape
    return empty_normed(x, tokens // 4, 4 * C, out_dtype)


def _fake_backward(grad_out, x, scale, keep, mean, rstd, grid_h, grid_w):
    return x.new_empty(x.shape), x.new_empty(2, *scale.shape, dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    x, shift, scale, keep, *ctx.grid, _, _ = inputs
    _, *statistics = output
    save_for_backward(ctx, (x, scale, keep, *statistics), modulation=(shift, scale))


def _differentiate(ctx, grad_out, _grad_mean, _grad_rstd):
    grad_x, sums = torch.ops.edt_kernels.token_merge_adaln_backward(grad_out, *ctx.saved_tensors, *ctx.grid)
    return grad_x, *modulation_gradients(ctx, sums), *[None] * 5


define_op(
    "token_merge_adaln",
    "(Tensor x, Tensor shift, Tensor scale, Tensor? keep, int grid_h, int grid_w, float eps, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define_op(
    "token_merge_adaln_backward",
    "(Tensor grad_out, Tensor x, Tensor scale, Tensor? keep, Tensor mean, Tensor rstd, int grid_h, int grid_w) "
    "-> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
define_gradient("token_merge_adaln", _save_for_backward, _differentiate)


def token_merge_adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    keep: Tensor | None,
    grid: tuple[int, int],
    eps: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """`edt_kernels.token_merge_adaln` by the kernels; the arguments are checked."""
    refuse_forward_mode("token_merge_adaln", x, shift, scale)
    return torch.ops.edt_kernels.token_merge_adaln(x, shift, scale, keep, *grid, eps, out_dtype)[0]
