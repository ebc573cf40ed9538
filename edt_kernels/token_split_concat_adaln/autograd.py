"""Launchers and torch registration of the `token_split_concat_adaln` kernels."""

import torch
from torch import Tensor

from .._launch import Op, dense_rows, has_gradient, on_device_of, once_differentiable
from .._rows import dense_like, empty_normed, in_dtypes, plan_rows, total
from .._tracing import signature
from . import kernels


def _forward(x, skip, shift, scale, grid_w, eps, out_dtype, signature=None):
    x, skip, shift, scale = map(dense_rows, (x, skip, shift, scale))
    B, N, C = skip.shape
    launch, _ = plan_rows(
        signature, "token_split_concat_adaln.forward", kernels.forward, (B, N, 2, C),
        (x, skip), (shift, scale), grid_w, eps, out_dtype=out_dtype,
    )  # fmt: skip
    outputs = empty_normed(x, N, 2 * C, out_dtype)
    with on_device_of(x):
        launch(x, skip, shift, scale, *outputs)
    return outputs


def _backward(grad_out, x, skip, scale, statistics, grid_w, signature=None):
    grad_out, x, skip, scale = map(dense_rows, (grad_out, x, skip, scale))
    B, N, C = skip.shape
    launch, programs = plan_rows(
        signature,
        "token_split_concat_adaln.backward",
        kernels.backward,
        (B, N, 2, C),
        (grad_out, x, skip),
        (scale,),
        grid_w,
    )
    grad_x, grad_skip = dense_like(x), dense_like(skip)
    partials = x.new_empty((2, *programs, 2 * C), dtype=torch.float32)
    with on_device_of(x):
        launch(grad_out, x, skip, scale, statistics, grad_x, grad_skip, partials)
    return grad_x, grad_skip, total(partials)


def _fake_backward(grad_out, x, skip, scale, statistics, grid_w):
    sums = x.new_empty((2, *scale.shape), dtype=torch.float32)
    return dense_like(x), dense_like(skip), sums


_forward_op = Op(
    "token_split_concat_adaln",
    "(Tensor x, Tensor skip, Tensor shift, Tensor scale, int grid_w, float eps, ScalarType out_dtype) "
    "-> (Tensor, Tensor)",
    _forward,
    lambda x, skip, shift, scale, grid_w, eps, out_dtype: empty_normed(
        x, skip.shape[1], 2 * skip.shape[2], out_dtype
    ),
)
_backward_op = Op(
    "token_split_concat_adaln_backward",
    "(Tensor grad_out, Tensor x, Tensor skip, Tensor scale, Tensor statistics, int grid_w) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, known, x, skip, shift, scale, grid_w, eps, out_dtype):
        out, statistics = _forward_op(known, x, skip, shift, scale, grid_w, eps, out_dtype)
        ctx.save_for_backward(x, skip, scale, statistics)
        ctx.shift_dtype, ctx.grid_w = shift.dtype, grid_w
        return out

    @staticmethod
    def backward(ctx, grad_out):
        saved = _, _, scale, _ = ctx.saved_tensors  # once: a checkpoint recomputes for one reading
        *grads, sums = _backward_op(signature(grad_out, *saved), grad_out, *saved, ctx.grid_w)
        grads = None, *grads, *in_dtypes(sums, ctx.shift_dtype, scale.dtype), *[None] * 3
        return once_differentiable("token_split_concat_adaln", (grad_out, *saved), grads)


def token_split_concat_adaln(
    known, x, skip, shift, scale, grid_w: int, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """`edt_kernels.token_split_concat_adaln` by the kernels; the arguments are checked, `known` is their
    tensors' signature."""
    arguments = known, x, skip, shift, scale, grid_w, eps, out_dtype
    return _Function.apply(*arguments) if has_gradient(x, skip, shift, scale) else _forward_op(*arguments)[0]
