"""What runs around a call, which decides what it may do beside computing."""

import torch
from torch import Tensor, nn
from torch._C import _autograd, _functorch, _get_tracing_state, _len_torch_dispatch_stack  # pyright: ignore

_PLAIN = Tensor, nn.Parameter


def in_func_transform() -> bool:
    """Whether `torch.func.grad`, `vmap` or another of its transforms runs."""
    return not torch.compiler.is_compiling() and _functorch.maybe_current_level() is not None


def described(*tensors: Tensor | None) -> tuple:
    """All of tensors that checks and launches depend on. 64 bytes are 16 float32, the widest alignment that a
    kernel is told of."""
    return tuple([
        t if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 63) for t in tensors
    ])  # fmt: skip


def signature(*tensors: Tensor | None) -> tuple | None:
    """`described`, or None where torch has to see a call as an op: for a compiler, a dispatch mode, a profiler, a
    transform of `torch.func`, subclasses of tensors, values stored negated. Also for what is no tensor, or has no
    strides or memory."""
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack() or _get_tracing_state():
        return None
    if in_func_transform() or _autograd._profiler_enabled():
        return None
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
            return None
    try:
        return described(*tensors)
    except RuntimeError:  # sparse, nested; a gradient of several at once (`is_grads_batched`)
        return None


def add_in_place(total: Tensor, term: Tensor) -> Tensor:
    """total + term, without memory for a third tensor. Under `torch.func`'s transforms the term may have a mapped
    dimension that the total has not; a compiler sees by itself what can be overwritten."""
    return total + term if torch.compiler.is_compiling() or in_func_transform() else total.add_(term)
