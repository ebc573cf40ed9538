"""Launchers and torch registration of the `token_split_concat_adaln` kernels."""

import math

import torch
import triton
from torch import Tensor

from .._launch import (
    common_alignment,
    dense_rows,
    on_device_of,
    refuse_double_backward,
    refuse_forward_mode,
    refuse_transforms,
)
from .._rows import choose_row_tile
from . import kernels


def _forward(x, skip, shift, scale, grid_h, grid_w, eps, out_dtype):
    x, skip, shift, scale = map(dense_rows, (x, skip, shift, scale))
    B, N, C = skip.shape
    out = torch.empty(B, N, 2 * C, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(B, N, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        tile = choose_row_tile(B, N, 2, C)
        with on_device_of(x):
            kernels.forward[(B * triton.cdiv(N, tile.rows),)](
                x, skip, shift, scale, out, mean, rstd, *x.stride()[:2], *skip.stride()[:2], shift.stride(0),
                scale.stride(0), N, grid_w, eps,
                C=C, ALIGN=math.gcd(C, common_alignment(x, skip, out)), ROWS=tile.rows, BLOCK_C=tile.block_c,
                num_warps=tile.num_warps,
            )  # fmt: skip
    return out, mean, rstd


def _backward(grad_out, x, skip, scale, mean, rstd, grid_h, grid_w):
    grad_out, x, skip, scale = map(dense_rows, (grad_out, x, skip, scale))
    B, N, C = skip.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_skip = torch.empty(skip.shape, dtype=skip.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x, grad_skip, torch.zeros(2, B, 2 * C, dtype=torch.float32, device=x.device)
    tile = choose_row_tile(B, N, 2, C)
    programs = triton.cdiv(N, tile.rows_per_program)
    partials = torch.empty(2, B, programs, 2 * C, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        kernels.backward[(B * programs,)](
            grad_out, x, skip, scale, mean, rstd, grad_x, grad_skip, partials,
            *grad_out.stride()[:2], *x.stride()[:2], *skip.stride()[:2], scale.stride(0),
            N, grid_w, tile.rows_per_program,
            C=C, ALIGN=math.gcd(C, common_alignment(x, skip, grad_out, grad_skip)), ROWS=tile.rows,
            BLOCK_C=tile.block_c, num_warps=tile.num_warps,
        )  # fmt: skip
    return grad_x, grad_skip, partials.sum(2)


torch.library.define(
    "edt_kernels::token_split_concat_adaln",
    "(Tensor x, Tensor skip, Tensor shift, Tensor scale, int grid_h, int grid_w, float eps, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "edt_kernels::token_split_concat_adaln_backward",
    "(Tensor grad_out, Tensor x, Tensor skip, Tensor scale, Tensor mean, Tensor rstd, int grid_h, int grid_w) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.impl("edt_kernels::token_split_concat_adaln", ("cuda", "cpu"))(_forward)
torch.library.impl("edt_kernels::token_split_concat_adaln_backward", ("cuda", "cpu"))(_backward)


@torch.library.register_fake("edt_kernels::token_split_concat_adaln")
def _(x, skip, shift, scale, grid_h, grid_w, eps, out_dtype):
    B, N, C = skip.shape
    mean, rstd = (x.new_empty(B, N, dtype=torch.float32) for _ in range(2))
    return x.new_empty(B, N, 2 * C, dtype=out_dtype), mean, rstd


@torch.library.register_fake("edt_kernels::token_split_concat_adaln_backward")
def _(grad_out, x, skip, scale, mean, rstd, grid_h, grid_w):
    sums = x.new_empty(2, *scale.shape, dtype=torch.float32)
    return x.new_empty(x.shape), skip.new_empty(skip.shape), sums


def _save_for_backward(ctx, inputs, output):
    x, skip, shift, scale, *ctx.grid, _, _ = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)  # no zeros for the statistics, which nobody differentiates
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, skip, scale, mean, rstd)


def _differentiate(ctx, grad_out, _grad_mean, _grad_rstd):
    saved = _, _, scale, *_ = ctx.saved_tensors  # once: a checkpoint recomputes for one reading
    grad_x, grad_skip, sums = torch.ops.edt_kernels.token_split_concat_adaln_backward(grad_out, *saved, *ctx.grid)
    return grad_x, grad_skip, sums[0].to(ctx.shift_dtype), sums[1].to(scale.dtype), *[None] * 4


torch.library.register_autograd(
    "edt_kernels::token_split_concat_adaln", _differentiate, setup_context=_save_for_backward
)
torch.library.register_autograd(
    "edt_kernels::token_split_concat_adaln_backward", refuse_double_backward("token_split_concat_adaln")
)
refuse_transforms("token_split_concat_adaln")


def token_split_concat_adaln(x, skip, shift, scale, grid, eps, out_dtype) -> Tensor:
    """`edt_kernels.token_split_concat_adaln` by the kernels; the arguments are checked."""
    refuse_forward_mode("token_split_concat_adaln", x, skip, shift, scale)
    return torch.ops.edt_kernels.token_split_concat_adaln(x, skip, shift, scale, *grid, eps, out_dtype)[0]
