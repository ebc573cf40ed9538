"""Launchers and torch registration of the `adaln` kernels."""

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


def _forward(x, shift, scale, eps, out_dtype):
    x, shift, scale = dense_rows(x), dense_rows(shift), dense_rows(scale)
    B, N, C = x.shape
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(B, N, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        tile = choose_row_tile(B, N, 1, C)
        with on_device_of(x):
            kernels.forward[(B * triton.cdiv(N, tile.rows),)](
                x, shift, scale, out, mean, rstd, *x.stride()[:2], shift.stride(0), scale.stride(0), N, eps,
                C=C, ALIGN=common_alignment(x, out), ROWS=tile.rows, BLOCK_C=tile.block_c,
                num_warps=tile.num_warps,
            )  # fmt: skip
    return out, mean, rstd


def _backward(grad_out, x, scale, mean, rstd):
    grad_out, x, scale = dense_rows(grad_out), dense_rows(x), dense_rows(scale)
    B, N, C = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x, torch.zeros(2, B, C, dtype=torch.float32, device=x.device)
    tile = choose_row_tile(B, N, 1, C)
    programs = triton.cdiv(N, tile.rows_per_program)
    partials = torch.empty(2, B, programs, C, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        kernels.backward[(B * programs,)](
            grad_out, x, scale, mean, rstd, grad_x, partials, *grad_out.stride()[:2], *x.stride()[:2],
            scale.stride(0), N, tile.rows_per_program,
            C=C, ALIGN=common_alignment(x, grad_out, grad_x), ROWS=tile.rows, BLOCK_C=tile.block_c,
            num_warps=tile.num_warps,
        )  # fmt: skip
    return grad_x, partials.sum(2)


torch.library.define(
    "edt_kernels::adaln",
    "(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "edt_kernels::adaln_backward",
    "(Tensor grad_out, Tensor x, Tensor scale, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
)
torch.library.impl("edt_kernels::adaln", ("cuda", "cpu"))(_forward)
torch.library.impl("edt_kernels::adaln_backward", ("cuda", "cpu"))(_backward)


@torch.library.register_fake("edt_kernels::adaln")
def _(x, shift, scale, eps, out_dtype):
    statistics = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), statistics, torch.empty_like(statistics)


@torch.library.register_fake("edt_kernels::adaln_backward")
def _(grad_out, x, scale, mean, rstd):
    return x.new_empty(x.shape), x.new_empty(2, *scale.shape, dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    x, shift, scale, _, _ = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)  # no zeros for the statistics, which nobody differentiates
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale, mean, rstd)


def _differentiate(ctx, grad_out, _grad_mean, _grad_rstd):
    saved = _, scale, *_ = ctx.saved_tensors  # once: a checkpoint recomputes for one reading
    grad_x, sums = torch.ops.edt_kernels.adaln_backward(grad_out, *saved)
    return grad_x, sums[0].to(ctx.shift_dtype), sums[1].to(scale.dtype), None, None


torch.library.register_autograd("edt_kernels::adaln", _differentiate, setup_context=_save_for_backward)
torch.library.register_autograd("edt_kernels::adaln_backward", refuse_double_backward("adaln"))
refuse_transforms("adaln")


def adaln(x, shift, scale, eps, out_dtype) -> Tensor:
    """`edt_kernels.adaln` by the kernels; the arguments are checked."""
    refuse_forward_mode("adaln", x, shift, scale)
    return torch.ops.edt_kernels.adaln(x, shift, scale, eps, out_dtype)[0]
