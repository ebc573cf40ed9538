"""Launchers and torch registration of the `token_merge_adaln` kernels."""

import torch
from torch import Tensor

from .._launch import define_op, dense_rows, has_gradient, on_device_of, once_differentiable
from .._rows import empty_normed, in_dtypes, plan_rows, total
from . import kernels


def _forward(x, shift, scale, keep, grid_w, eps, out_dtype):
    x, shift, scale, keep = map(dense_rows, (x, shift, scale, keep))
    B, tokens, C = x.shape
    launch, _ = plan_rows(
        "token_merge_adaln.forward", kernels.forward, (B, tokens // 4, 4, C), (x,), (shift, scale, keep), grid_w, eps,
        out_dtype=out_dtype,
    )  # fmt: skip
    outputs = empty_normed(x, tokens // 4, 4 * C, out_dtype)
    with on_device_of(x):
        launch(x, shift, scale, keep, *outputs)
    return outputs


def _backward(grad_out, x, scale, keep, mean, rstd, grid_w):
    grad_out, x, scale, keep = map(dense_rows, (grad_out, x, scale, keep))
    B, N, width = grad_out.shape
    launch, programs = plan_rows(
        "token_merge_adaln.backward", kernels.backward, (B, N, 4, width // 4), (grad_out, x), (scale, keep), grid_w
    )
    grad_x, partials = x.new_empty(x.shape), x.new_empty((2, *programs, width), dtype=torch.float32)
    with on_device_of(x):
        launch(grad_out, x, scale, keep, mean, rstd, grad_x, partials)
    return grad_x, total(partials)


_forward_op = define_op(
    "token_merge_adaln",
    "(Tensor x, Tensor shift, Tensor scale, Tensor? keep, int grid_w, float eps, ScalarType out_dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    lambda x, shift, scale, keep, grid_w, eps, out_dtype: empty_normed(
        x, x.shape[1] // 4, 4 * x.shape[2], out_dtype
    ),
)
_backward_op = define_op(
    "token_merge_adaln_backward",
    "(Tensor grad_out, Tensor x, Tensor scale, Tensor? keep, Tensor mean, Tensor rstd, int grid_w) "
    "-> (Tensor, Tensor)",
    _backward,
    lambda grad_out, x, scale, *_: (x.new_empty(x.shape), x.new_empty((2, *scale.shape), dtype=torch.float32)),
)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, keep, grid_w, eps, out_dtype):
        out, *statistics = _forward_op(x, shift, scale, keep, grid_w, eps, out_dtype)
        ctx.save_for_backward(x, scale, keep, *statistics)
        ctx.shift_dtype, ctx.grid_w = shift.dtype, grid_w
        return out

    @staticmethod
    def backward(ctx, grad_out):
        saved = _, scale, *_ = ctx.saved_tensors  # once: a checkpoint recomputes for one reading
        grad_x, sums = _backward_op(grad_out, *saved, ctx.grid_w)
        grads = grad_x, *in_dtypes(sums, ctx.shift_dtype, scale.dtype), *[None] * 4
        return once_differentiable("token_merge_adaln", grads)


def token_merge_adaln(
    x: Tensor, shift: Tensor, scale: Tensor, keep: Tensor | None, grid_w: int, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """`edt_kernels.token_merge_adaln` by the kernels; the arguments are checked."""
    arguments = x, shift, scale, keep if keep is None else keep.view(torch.uint8), grid_w, eps, out_dtype
    return _Function.apply(*arguments) if has_gradient(x, shift, scale) else _forward_op(*arguments)[0]
