"""Launchers and torch registration of the `token_merge_adaln` kernels."""

import torch
from torch import Tensor

from .._launch import Op, dense_rows, has_gradient, on_device_of, once_differentiable
from .._rows import dense_like, empty_normed, in_dtypes, plan_rows, total
from .._tracing import signature
from . import kernels


def _as_bytes(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep.view(torch.uint8)


def _forward(x, shift, scale, keep, grid_w, eps, out_dtype, signature=None):
    x, shift, scale, keep = map(dense_rows, (x, shift, scale, _as_bytes(keep)))
    B, tokens, C = x.shape
    launch, _ = plan_rows(
        signature, "token_merge_adaln.forward", kernels.forward, (B, tokens // 4, 4, C),
        (x,), (shift, scale, keep), grid_w, eps, out_dtype=out_dtype,
    )  # fmt: skip
    outputs = empty_normed(x, tokens // 4, 4 * C, out_dtype)
    with on_device_of(x):
        launch(x, shift, scale, keep, *outputs)
    return outputs


def _backward(grad_out, x, scale, keep, statistics, grid_w, signature=None):
    grad_out, x, scale, keep = map(dense_rows, (grad_out, x, scale, _as_bytes(keep)))
    B, N, width = grad_out.shape
    launch, programs = plan_rows(
        signature,
        "token_merge_adaln.backward",
        kernels.backward,
        (B, N, 4, width // 4),
        (grad_out, x),
        (scale, keep),
        grid_w,
    )
    grad_x, partials = dense_like(x), x.new_empty((2, *programs, width), dtype=torch.float32)
    with on_device_of(x):
        launch(grad_out, x, scale, keep, statistics, grad_x, partials)
    return grad_x, total(partials)


_forward_op = Op(
    "token_merge_adaln",
    "(Tensor x, Tensor shift, Tensor scale, Tensor? keep, int grid_w, float eps, ScalarType out_dtype) "
    "-> (Tensor, Tensor)",
    _forward,
    lambda x, shift, scale, keep, grid_w, eps, out_dtype: empty_normed(
        x, x.shape[1] // 4, 4 * x.shape[2], out_dtype
    ),
)
_backward_op = Op(
    "token_merge_adaln_backward",
    "(Tensor grad_out, Tensor x, Tensor scale, Tensor? keep, Tensor statistics, int grid_w) -> (Tensor, Tensor)",
    _backward,
    lambda grad_out, x, scale, *_: (dense_like(x), x.new_empty((2, *scale.shape), dtype=torch.float32)),
)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, known, x, shift, scale, keep, grid_w, eps, out_dtype):
        out, statistics = _forward_op(known, x, shift, scale, keep, grid_w, eps, out_dtype)
        ctx.save_for_backward(x, scale, keep, statistics)
        ctx.shift_dtype, ctx.grid_w = shift.dtype, grid_w
        return out

    @staticmethod
    def backward(ctx, grad_out):
        saved = _, scale, _, _ = ctx.saved_tensors  # once: a checkpoint recomputes for one reading
        grad_x, sums = _backward_op(signature(grad_out, *saved), grad_out, *saved, ctx.grid_w)
        grads = None, grad_x, *in_dtypes(sums, ctx.shift_dtype, scale.dtype), *[None] * 4
        return once_differentiable("token_merge_adaln", (grad_out, *saved), grads)


def token_merge_adaln(known, x, shift, scale, keep, grid_w: int, eps: float, out_dtype: torch.dtype) -> Tensor:
    """`edt_kernels.token_merge_adaln` by the kernels; the arguments are checked, `known` is their
    tensors' signature."""
    arguments = known, x, shift, scale, keep, grid_w, eps, out_dtype
    return _Function.apply(*arguments) if has_gradient(x, shift, scale) else _forward_op(*arguments)[0]
