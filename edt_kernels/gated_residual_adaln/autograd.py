"""Launchers and torch registration of `adaln`, `gated_residual` and `gated_residual_adaln`."""

from typing import Any

import torch
from torch import Tensor

from .. import _norm_kernels as kernels
from .._launch import Op, dense_rows, has_gradient, on_device_of, once_differentiable
from .._rows import dense_like, empty_normed, in_dtypes, plan_rows, total
from .._tracing import signature


def _name(gate, scale) -> str:
    return "adaln" if gate is None else "gated_residual" if scale is None else "gated_residual_adaln"


def _existing(*tensors: Tensor | None) -> Any:
    return tuple([tensor for tensor in tensors if tensor is not None])


def _empty_outputs(x, y, gate, shift, scale, eps, out_dtype) -> tuple:
    """x' with a gate; the norm and its rows' statistics with a scale."""
    normed = (None, None) if scale is None else empty_normed(x, x.shape[1], x.shape[2], out_dtype)
    return None if gate is None else dense_like(x), *normed


def _forward(x, y, gate, shift, scale, eps, out_dtype, signature=None):
    x, y, gate, shift, scale = map(dense_rows, (x, y, gate, shift, scale))
    B, N, C = x.shape
    launch, _ = plan_rows(
        signature, f"{_name(gate, scale)}.forward", kernels.forward, (B, N, 1, C),
        (x, y), (gate, shift, scale), eps, out_dtype=out_dtype,
    )  # fmt: skip
    outputs = _empty_outputs(x, y, gate, shift, scale, eps, out_dtype)
    with on_device_of(x):
        launch(x, y, gate, shift, scale, *outputs)
    return _existing(*outputs) if scale is not None else outputs[0]


def _fake_forward(*arguments):
    outputs = _existing(*_empty_outputs(*arguments))
    return outputs if len(outputs) > 1 else outputs[0]


def _empty_gradients(x, y, scale):
    """dx with a scale (else it is what arrives), dy with a gate."""
    return None if scale is None else dense_like(x), None if y is None else dense_like(y)


def _backward(grad_x_out, grad_out, x, y, gate, scale, statistics, signature=None):
    grad_x_out, grad_out, x, y, gate, scale = map(dense_rows, (grad_x_out, grad_out, x, y, gate, scale))
    stream = y if x is None else x
    B, N, C = stream.shape
    launch, programs = plan_rows(
        signature, f"{_name(gate, scale)}.backward", kernels.backward, (B, N, 1, C),
        (grad_x_out, grad_out, x, y), (gate, scale),
    )  # fmt: skip
    grad_x, grad_y = _empty_gradients(x, y, scale)
    partials = stream.new_empty((_quantities(gate, scale), *programs, C), dtype=torch.float32)
    with on_device_of(stream):
        launch(grad_x_out, grad_out, x, y, gate, scale, statistics, grad_x, grad_y, partials)
    return _existing(grad_x, grad_y, total(partials))


def _quantities(gate, scale) -> int:
    return (gate is not None) + 2 * (scale is not None)


def _fake_backward(grad_x_out, grad_out, x, y, gate, scale, statistics):
    stream = y if x is None else x
    sums = stream.new_empty((_quantities(gate, scale), stream.shape[0], stream.shape[2]), dtype=torch.float32)
    return _existing(*_empty_gradients(x, y, scale), sums)


_OPS = {
    name: (
        Op(
            name,
            "(Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, float eps, ScalarType out_dtype) "
            f"-> {outputs}",
            _forward,
            _fake_forward,
        ),
        Op(
            f"{name}_backward",
            "(Tensor? grad_x_out, Tensor? grad_out, Tensor? x, Tensor? y, Tensor? gate, Tensor? scale, "
            f"Tensor? statistics) -> {gradients}",
            _backward,
            _fake_backward,
        ),
    )
    for name, outputs, gradients in (
        ("adaln", "(Tensor, Tensor)", "(Tensor, Tensor)"),
        ("gated_residual", "Tensor", "(Tensor, Tensor)"),
        ("gated_residual_adaln", "(Tensor, Tensor, Tensor)", "(Tensor, Tensor, Tensor)"),
    )
}


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, known, x, y, gate, shift, scale, eps, out_dtype):
        forward, _ = _OPS[_name(gate, scale)]
        outputs = forward(known, x, y, gate, shift, scale, eps, out_dtype)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [vector.dtype for vector in _existing(gate, shift, scale)]
        if scale is None:
            ctx.save_for_backward(None, y, gate, None, None)
            return (outputs,)
        ctx.save_for_backward(x if gate is None else outputs[0], y, gate, scale, outputs[-1])
        return outputs[:-1]

    @staticmethod
    def backward(ctx, *grads):
        x, y, gate, scale, statistics = ctx.saved_tensors  # once: a checkpoint recomputes for one reading
        grad_x_out, grad_out = (None, *grads) if gate is None else (*grads, None)[:2]
        if scale is not None and grad_out is None:
            grad_out = torch.zeros_like(x)
        if gate is not None and grad_x_out is None:
            grad_x_out = torch.zeros_like(x)
        tensors = grad_x_out, grad_out, x, y, gate, scale, statistics
        name = _name(gate, scale)
        *grads, sums = _OPS[name][1](signature(*tensors), *tensors)
        sums = in_dtypes(sums, *ctx.dtypes)
        if gate is None:
            grads = *grads, None, None, *sums
        elif scale is None:
            grads = grad_x_out, *grads, *sums, None, None
        else:
            grads = *grads, *sums
        return once_differentiable(name, tensors, (None, *grads, None, None))


def gated_residual_adaln(known, x, y, gate, shift, scale, eps: float, out_dtype: torch.dtype) -> Any:
    """The outputs of `edt_kernels.gated_residual_adaln` that there are, by the kernels; the arguments are checked.
    Without y and gate `edt_kernels.adaln`, without shift and scale `edt_kernels.gated_residual`. `known` is the
    signature of the tensors."""
    if has_gradient(x, y, gate, shift, scale):
        return _Function.apply(known, x, y, gate, shift, scale, eps, out_dtype)
    outputs = _OPS[_name(gate, scale)][0](known, x, y, gate, shift, scale, eps, out_dtype)
    return (outputs,) if scale is None else outputs[:-1]
