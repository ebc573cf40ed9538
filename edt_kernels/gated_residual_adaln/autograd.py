"""Launchers and torch registration of `gated_residual_adaln` and, by the same kernels, `gated_residual`."""

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


def _launch_forward(x, y, gate, shift, scale, eps, x_out, out, mean, rstd) -> None:
    """With out None: the residual alone. Absent tensors are stood in for by x, which the kernel does not read."""
    norm = out is not None
    B, N, C = x.shape
    if x.numel() == 0:
        return
    tile = choose_row_tile(B, N, 1, C)
    shift, scale, out, mean, rstd = (shift, scale, out, mean, rstd) if norm else (x,) * 5
    with on_device_of(x):
        kernels.forward[(B * triton.cdiv(N, tile.rows),)](
            x, y, gate, shift, scale, x_out, out, mean, rstd, *x.stride()[:2], *y.stride()[:2],
            gate.stride(0), shift.stride(0), scale.stride(0), N, eps,
            C=C, NORM=norm, ALIGN=common_alignment(x, y, x_out, out), ROWS=tile.rows, BLOCK_C=tile.block_c,
            num_warps=tile.num_warps,
        )  # fmt: skip


def _launch_backward(grad_x_out, grad_out, x_out, y, gate, scale, mean, rstd, grad_x, grad_y) -> Tensor:
    """Fills grad_x (unless grad_out is None) and grad_y; the sums (1 or 3, B, C) of dgate, dshift and dscale."""
    norm = grad_out is not None
    B, N, C = y.shape
    if y.numel() == 0:
        return torch.zeros(3 if norm else 1, B, C, dtype=torch.float32, device=y.device)
    tile = choose_row_tile(B, N, 1, C)
    programs = triton.cdiv(N, tile.rows_per_program)
    partials = torch.empty(3 if norm else 1, B, programs, C, dtype=torch.float32, device=y.device)
    if not norm:
        grad_out = x_out = scale = mean = rstd = grad_x = grad_x_out
    with on_device_of(y):
        kernels.backward[(B * programs,)](
            grad_x_out, grad_out, x_out, y, gate, scale, mean, rstd, grad_x, grad_y, partials,
            *grad_x_out.stride()[:2], *grad_out.stride()[:2], *y.stride()[:2], gate.stride(0), scale.stride(0),
            N, tile.rows_per_program,
            C=C, NORM=norm, ALIGN=common_alignment(grad_x_out, grad_out, x_out, y, grad_y), ROWS=tile.rows,
            BLOCK_C=tile.block_c, num_warps=tile.num_warps,
        )  # fmt: skip
    return partials.sum(2)


def _forward(x, y, gate, shift, scale, eps, out_dtype):
    x, y, gate, shift, scale = map(dense_rows, (x, y, gate, shift, scale))
    x_out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    _launch_forward(x, y, gate, shift, scale, eps, x_out, out, mean, rstd)
    return x_out, out, mean, rstd


def _backward(grad_x_out, grad_out, x_out, y, gate, scale, mean, rstd):
    grad_x_out, grad_out, y, gate, scale = map(dense_rows, (grad_x_out, grad_out, y, gate, scale))
    grad_x = torch.empty(x_out.shape, dtype=x_out.dtype, device=y.device)
    grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    sums = _launch_backward(grad_x_out, grad_out, x_out, y, gate, scale, mean, rstd, grad_x, grad_y)
    return grad_x, grad_y, sums


def _residual_forward(x, y, gate):
    x, y, gate = map(dense_rows, (x, y, gate))
    x_out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_forward(x, y, gate, None, None, 0.0, x_out, None, None, None)
    return x_out


def _residual_backward(grad_x_out, y, gate):
    grad_x_out, y, gate = map(dense_rows, (grad_x_out, y, gate))
    grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    return grad_y, _launch_backward(grad_x_out, None, None, y, gate, None, None, None, None, grad_y)


torch.library.define(
    "edt_kernels::gated_residual_adaln",
    "(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps, ScalarType out_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "edt_kernels::gated_residual_adaln_backward",
    "(Tensor grad_x_out, Tensor grad_out, Tensor x_out, Tensor y, Tensor gate, Tensor scale, Tensor mean, "
    "Tensor rstd) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("edt_kernels::gated_residual", "(Tensor x, Tensor y, Tensor gate) -> Tensor")
torch.library.define(
    "edt_kernels::gated_residual_backward", "(Tensor grad_x_out, Tensor y, Tensor gate) -> (Tensor, Tensor)"
)
torch.library.impl("edt_kernels::gated_residual_adaln", ("cuda", "cpu"))(_forward)
torch.library.impl("edt_kernels::gated_residual_adaln_backward", ("cuda", "cpu"))(_backward)
torch.library.impl("edt_kernels::gated_residual", ("cuda", "cpu"))(_residual_forward)
torch.library.impl("edt_kernels::gated_residual_backward", ("cuda", "cpu"))(_residual_backward)


@torch.library.register_fake("edt_kernels::gated_residual_adaln")
def _(x, y, gate, shift, scale, eps, out_dtype):
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), mean, rstd


@torch.library.register_fake("edt_kernels::gated_residual_adaln_backward")
def _(grad_x_out, grad_out, x_out, y, gate, scale, mean, rstd):
    return x_out.new_empty(x_out.shape), y.new_empty(y.shape), y.new_empty(3, *gate.shape, dtype=torch.float32)


@torch.library.register_fake("edt_kernels::gated_residual")
def _(x, y, gate):
    return x.new_empty(x.shape)


@torch.library.register_fake("edt_kernels::gated_residual_backward")
def _(grad_x_out, y, gate):
    return y.new_empty(y.shape), y.new_empty(1, *gate.shape, dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    _, y, gate, shift, scale, _, _ = inputs
    x_out, _, mean, rstd = output
    ctx.set_materialize_grads(False)  # no zeros for the statistics, which nobody differentiates
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x_out, y, gate, scale, mean, rstd)


def _differentiate(ctx, grad_x_out, grad_out, _grad_mean, _grad_rstd):
    saved = x_out, _, gate, scale, _, _ = ctx.saved_tensors  # once: a checkpoint recomputes for one reading
    grad_x_out = torch.zeros_like(x_out) if grad_x_out is None else grad_x_out
    grad_out = torch.zeros_like(x_out) if grad_out is None else grad_out
    grad_x, grad_y, sums = torch.ops.edt_kernels.gated_residual_adaln_backward(grad_x_out, grad_out, *saved)
    grad_gate, grad_shift, grad_scale = sums.unbind(0)
    grads = grad_gate.to(gate.dtype), grad_shift.to(ctx.shift_dtype), grad_scale.to(scale.dtype)
    return grad_x, grad_y, *grads, None, None


def _save_residual_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _differentiate_residual(ctx, grad_x_out):
    y, gate = ctx.saved_tensors
    grad_y, sums = torch.ops.edt_kernels.gated_residual_backward(grad_x_out, y, gate)
    return grad_x_out, grad_y, sums[0].to(gate.dtype)


torch.library.register_autograd(
    "edt_kernels::gated_residual_adaln", _differentiate, setup_context=_save_for_backward
)
torch.library.register_autograd(
    "edt_kernels::gated_residual", _differentiate_residual, setup_context=_save_residual_for_backward
)
for _op in ("gated_residual_adaln", "gated_residual"):
    torch.library.register_autograd(f"edt_kernels::{_op}_backward", refuse_double_backward(_op))
    refuse_transforms(_op)


def gated_residual_adaln(x, y, gate, shift, scale, eps, out_dtype) -> tuple[Tensor, Tensor]:
    """`edt_kernels.gated_residual_adaln` by the kernels; the arguments are checked."""
    refuse_forward_mode("gated_residual_adaln", x, y, gate, shift, scale)
    return torch.ops.edt_kernels.gated_residual_adaln(x, y, gate, shift, scale, eps, out_dtype)[:2]


def gated_residual(x, y, gate) -> Tensor:
    """`edt_kernels.gated_residual` by the kernels; the arguments are checked."""
    refuse_forward_mode("gated_residual", x, y, gate)
    return torch.ops.edt_kernels.gated_residual(x, y, gate)
