"""What every launcher needs: launches that are planned once for each signature, and the ops' registration.

A call of an op finds out much that follows from the shapes, strides, dtypes and alignments of its tensors: tiles,
strides, what the compiler is told, the compiled kernel. `planned` keeps it, so that the next call like it only
allocates and launches.
"""

import contextlib
import math
import threading
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._backend import _INTERPRETED, MOST_SIGNATURES
from ._tracing import described, in_func_transform

# Triton's interpreter has one running program and one patched language for all threads.
_one_at_a_time = threading.RLock() if _INTERPRETED else contextlib.nullcontext()
_nothing = contextlib.nullcontext()
_plans: dict[tuple, Any] = {}


class Launch:
    """So many programs of a kernel, with all of its arguments but the tensors: the numbers that follow them, and
    by name what decides how it is compiled. Called with the tensors, it runs on the current device."""

    def __init__(self, kernel, programs: int, *numbers: float | None, **constants) -> None:
        self.kernel, self.programs, self.numbers, self.constants = kernel, programs, numbers, constants
        self._run, self._tail = None, ()

    def __call__(self, *tensors: Tensor | None) -> None:
        if self._run is not None:
            self._run(*tensors, *self._tail)
        elif self.programs:
            # fp_fusion: a product and a sum round once, not twice. What the kernels' errors and registers were
            # measured with, and Triton's own choice before 3.10 only.
            run = self.kernel[(self.programs,)]
            with _one_at_a_time:
                compiled = run(*tensors, *self.numbers, **self.constants, enable_fp_fusion=True)
            if compiled is not None:  # but for the interpreter. Its launcher is a tenth of JITFunction's work
                constants = (self.constants[p.name] for p in self.kernel.params if p.name in self.constants)
                self._run, self._tail = compiled[(self.programs, 1, 1)], (*self.numbers, *constants)


def planned(plan, signature: tuple | None, tensors: tuple[Tensor | None, ...], *arguments) -> Any:
    """`plan(*tensors, *arguments)`, made once for each signature of the tensors and arguments."""
    key = plan, signature or described(*tensors), *arguments
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= MOST_SIGNATURES:
            _plans.clear()
        found = _plans[key] = plan(*tensors, *arguments)
    return found


def forget_plans() -> None:
    """Launches made after this choose anew."""
    _plans.clear()


def common_alignment(*tensors: Tensor | None) -> int:
    """The largest power of two, up to 16 elements, that divides the offset and address of every row, which is the
    last, dense, dimension. The compiler sees whether a size is a multiple of 16, but not of 4 or 8, such as 52 and
    312: told of it, its loads are 8 and 16 bytes wide instead of 2."""
    divisor = 16
    for tensor in tensors:
        if tensor is not None:
            divisor = math.gcd(divisor, *tensor.stride()[:-1], tensor.data_ptr() // tensor.element_size())
    return divisor


def dense_rows(tensor) -> Any:
    """The tensor itself if its last dimension is dense, else a contiguous copy; None of None."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def dense_like(tensor: Tensor) -> Tensor:
    """Empty, of the tensor's shape and dtype, contiguous."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def on_device_of(tensor: Tensor):
    """Triton launches on the current device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _nothing


class Op:
    """`edt_kernels::name`, an op of torch without gradients: `run(*arguments, signature=None)` computes it, `fake`
    makes the empty outputs of traced calls. Called with the signature of its tensors, it skips torch's dispatcher,
    which takes as long as all else, where nobody watches it (see `_tracing.signature`)."""

    def __init__(self, name: str, schema: str, run, fake) -> None:
        torch.library.define(f"edt_kernels::{name}", schema)
        torch.library.impl(f"edt_kernels::{name}", ("cuda", "cpu"))(run)
        torch.library.register_fake(f"edt_kernels::{name}")(fake)
        self._run, self._registered = run, getattr(torch.ops.edt_kernels, name).default

    def __call__(self, signature: tuple | None, *arguments):
        return self._registered(*arguments) if signature is None else self._run(*arguments, signature=signature)


def has_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call has to go by its `torch.autograd.Function`: for gradients, or for it to refuse forward mode
    and the transforms of torch.func, in which an op without it would lose tangents or mapped dimensions."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return not torch.compiler.is_compiling() and (forward_ad._current_level >= 0 or in_func_transform())


class _OnceDifferentiable(torch.autograd.Function):
    """Gradients of which a graph was asked for: to differentiate them again is an error."""

    @staticmethod
    def forward(ctx, op: str, inputs: int, *tensors: Tensor | None):
        ctx.op = op
        return tensors[inputs:]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.op}'s Triton kernels cannot be differentiated twice; edt_kernels.reference.{ctx.op} can"
        )


def once_differentiable(op: str, inputs: tuple, gradients: tuple) -> tuple:
    """What a backward pass returns, made of `inputs`."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
        return _OnceDifferentiable.apply(op, len(inputs), *inputs, *gradients)
    return gradients
