"""What every launcher needs: launches that are planned once for each signature, and the ops' registration.

A call of an op finds out much that follows from the shapes, strides, dtypes and alignments of its tensors: tiles,
strides, what the compiler is told, the compiled kernel. `planned` keeps it, so that the next call like it only
allocates and launches.
"""

import contextlib
import math
import threading

import torch
from torch import Tensor
from torch.autograd import forward_ad
from triton.runtime.jit import JITFunction

from ._backend import _INTERPRETED

# Triton's interpreter has one running program and one patched language for all threads.
_one_at_a_time = threading.RLock() if _INTERPRETED else contextlib.nullcontext()
_nothing = contextlib.nullcontext()
_plans: dict[tuple, object] = {}
_MOST_PLANS = 4096  # a plan is some kB; who has more shapes than these has no use of them


class Launch:
    """So many programs of a kernel, with all of its arguments but the tensors: the numbers that follow them, and by
    name what decides how it is compiled. Called with the tensors, it runs on the current device.

    A product and a sum round once, not twice: what the kernels' errors and registers were measured with, and
    Triton's own choice before 3.10 only.
    """

    def __init__(self, kernel, programs: int, *numbers: float, **constants) -> None:
        self._kernel, self._programs, self._numbers, self._constants = kernel, programs, numbers, constants
        self._compiled = self._tail = None

    def __call__(self, *tensors: Tensor | None) -> None:
        if self._compiled is not None:
            self._compiled(*tensors, *self._tail)
        elif self._programs:
            self._first(tensors)

    def _first(self, tensors: tuple[Tensor | None, ...]) -> None:
        with _one_at_a_time:
            compiled = self._kernel[(self._programs,)](
                *tensors, *self._numbers, **self._constants, enable_fp_fusion=True
            )
        if compiled is not None:  # but for the interpreter. Its launcher is a tenth of JITFunction's work
            constants = (p.name for p in self._kernel.params if p.is_constexpr)
            self._tail = (*self._numbers, *(self._constants[name] for name in constants))
            self._compiled = compiled[(self._programs, 1, 1)]


def planned(plan, tensors: tuple[Tensor | None, ...], *arguments):
    """`plan(*tensors, *arguments)`, made once for all tensors that a launch cannot tell apart."""
    key = (
        plan, *arguments,
        *[t if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 63) for t in tensors],
    )  # fmt: skip
    try:
        return _plans[key]
    except KeyError:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = plan(*tensors, *arguments)
        return _plans[key]


def forget_plans() -> None:
    """Launches made after this choose anew."""
    _plans.clear()


def common_alignment(*tensors: Tensor | None) -> int:
    """The largest power of two, up to 16 elements, that divides every row's offset and address.

    Rows are what is left after the last, dense, dimension. The compiler sees whether a size is a multiple of 16,
    but not of 4 or 8, such as 52 and 312: told of it, its loads are 8 and 16 bytes wide instead of 2.
    """
    divisor = 16
    for tensor in tensors:
        if tensor is not None:
            divisor = math.gcd(divisor, *tensor.stride()[:-1], tensor.data_ptr() // tensor.element_size())
    return divisor


def dense_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself if its last dimension is dense, else a contiguous copy."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def on_device_of(tensor: Tensor):
    """Triton launches on the current device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _nothing


def define_op(name: str, schema: str, launch, fake):
    """Registers `edt_kernels::name`, without gradients, and returns it: `launch` runs it, `fake` makes the empty
    outputs of traced calls."""
    torch.library.define(f"edt_kernels::{name}", schema)
    torch.library.impl(f"edt_kernels::{name}", ("cuda", "cpu"))(launch)
    torch.library.register_fake(f"edt_kernels::{name}")(fake)
    return getattr(torch.ops.edt_kernels, name).default


def has_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call has to go by its `torch.autograd.Function`: for gradients, or for it to refuse forward mode
    and the transforms of torch.func, in which an op without it would lose tangents or mapped dimensions."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


class _OnceDifferentiable(torch.autograd.Function):
    """Gradients that a graph of them was asked for: to differentiate them again is an error."""

    @staticmethod
    def forward(ctx, op: str, _anchor: Tensor, *gradients: Tensor | None):
        ctx.op = op
        return gradients

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.op}'s Triton kernels cannot be differentiated twice; edt_kernels.reference.{ctx.op} can"
        )


def once_differentiable(op: str, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What a backward pass returns."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
        return _OnceDifferentiable.apply(op, torch.empty(0, requires_grad=True), *gradients)
    return gradients
