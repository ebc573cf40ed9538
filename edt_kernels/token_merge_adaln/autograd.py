"""Launchers and torch registration of the `token_merge_adaln` kernels."""

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


def _keep_arguments(x: Tensor, keep: Tensor | None) -> tuple[Tensor, int, bool]:
    """Bytes, their stride by sample, and whether there is a mask; x stands in for one that is not read."""
    if keep is None:
        return x, 0, False
    keep = dense_rows(keep).view(torch.uint8)
    return keep, keep.stride(0), True


def _forward(x, shift, scale, keep, grid_h, grid_w, eps, out_dtype):
    x, shift, scale = map(dense_rows, (x, shift, scale))
    B, tokens, C = x.shape
    N = tokens // 4
    out = torch.empty(B, N, 4 * C, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(B, N, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        tile = choose_row_tile(B, N, 4, C)
        keep, stride_keep, masked = _keep_arguments(x, keep)
        with on_device_of(x):
            kernels.forward[(B * triton.cdiv(N, tile.rows),)](
                x, shift, scale, keep, out, mean, rstd, *x.stride()[:2], shift.stride(0), scale.stride(0),
                stride_keep, N, grid_w, eps,
                C=C, MASKED=masked, ALIGN=common_alignment(x, out), ROWS=tile.rows, BLOCK_C=tile.block_c,
                num_warps=tile.num_warps,
            )  # fmt: skip
    return out, mean, rstd


def _backward(grad_out, x, scale, keep, mean, rstd, grid_h, grid_w):
    grad_out, x, scale = map(dense_rows, (grad_out, x, scale))
    B, tokens, C = x.shape
    N = tokens // 4
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x, torch.zeros(2, B, 4 * C, dtype=torch.float32, device=x.device)
    tile = choose_row_tile(B, N, 4, C)
    programs = triton.cdiv(N, tile.rows_per_program)
    partials = torch.empty(2, B, programs, 4 * C, dtype=torch.float32, device=x.device)
    keep, stride_keep, masked = _keep_arguments(x, keep)
    with on_device_of(x):
        kernels.backward[(B * programs,)](
            grad_out, x, scale, keep, mean, rstd, grad_x, partials, *grad_out.stride()[:2], *x.stride()[:2],
            scale.stride(0), stride_keep, N, grid_w, tile.rows_per_program,
            C=C, MASKED=masked, ALIGN=common_alignment(x, grad_out, grad_x), ROWS=tile.rows,
            BLOCK_C=tile.block_c, num_warps=tile.num_warps,
        )  # fmt: skip
    return grad_x, partials.sum(2)


torch.library.define(
    "edt_kernels::token_merge_adaln",
    "(Tensor x, Tensor shift, Tensor scale, Tensor? keep, int grid_h, int grid_w, float eps, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "edt_kernels::token_merge_adaln_backward",
    "(Tensor grad_out, Tensor x, Tensor scale, Tensor? keep, Tensor mean, Tensor rstd, int grid_h, int grid_w) "
    "-> (Tensor, Tensor)",
)
torch.library.impl("edt_kernels::token_merge_adaln", ("cuda", "cpu"))(_forward)
torch.library.impl("edt_kernels::token_merge_adaln_backward", ("cuda", "cpu"))(_backward)


@torch.library.register_fake("edt_kernels::token_merge_adaln")
def _(x, shift, scale, keep, grid_h, grid_w, eps, out_dtype):
    B, tokens, C = x.shape
    mean, rstd = (x.new_empty(B, tokens // 4, dtype=torch.float32) for _ in range(2))
    return x.new_empty(B, tokens // 4, 4 * C, dtype=out_dtype), mean, rstd


@torch.library.register_fake("edt_kernels::token_merge_adaln_backward")
def _(grad_out, x, scale, keep, mean, rstd, grid_h, grid_w):
    return x.new_empty(x.shape), x.new_empty(2, *scale.shape, dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    x, shift, scale, keep, *ctx.grid, _, _ = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)  # no zeros for the statistics, which nobody differentiates
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale, keep, mean, rstd)


def _differentiate(ctx, grad_out, _grad_mean, _grad_rstd):
    saved = _, scale, *_ = ctx.saved_tensors  # once: a checkpoint recomputes for one reading
    grad_x, sums = torch.ops.edt_kernels.token_merge_adaln_backward(grad_out, *saved, *ctx.grid)
    return grad_x, sums[0].to(ctx.shift_dtype), sums[1].to(scale.dtype), *[None] * 5


torch.library.register_autograd("edt_kernels::token_merge_adaln", _differentiate, setup_context=_save_for_backward)
torch.library.register_autograd(
    "edt_kernels::token_merge_adaln_backward", refuse_double_backward("token_merge_adaln")
)
refuse_transforms("token_merge_adaln")


def token_merge_adaln(x, shift, scale, keep, grid, eps, out_dtype) -> Tensor:
    """`edt_kernels.token_merge_adaln` by the kernels; the arguments are checked."""
    refuse_forward_mode("token_merge_adaln", x, shift, scale)
    return torch.ops.edt_kernels.token_merge_adaln(x, shift, scale, keep, *grid, eps, out_dtype)[0]
