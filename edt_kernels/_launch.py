"""What every launcher needs: how wide its loads may be, on which device it runs, the launch itself."""

import contextlib
import math
import threading

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._backend import _INTERPRETED

# Kept, because what it registered goes with it.
_library = torch.library.Library("edt_kernels", "FRAGMENT")


def common_alignment(*tensors: Tensor) -> int:
    """The largest power of two, up to 16 elements, that divides every row's offset and address.

    Rows are what is left after the last, dense, dimension. The compiler sees whether a size is a multiple of 16,
    but not of 4 or 8, such as 52 and 312: told of it, its loads are 8 and 16 bytes wide instead of 2.
    """
    divisor = 16
    for tensor in tensors:
        divisor = math.gcd(divisor, *tensor.stride()[:-1], tensor.data_ptr() // tensor.element_size())
    return divisor


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is dense, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def on_device_of(tensor: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# Triton's interpreter has one running program and one patched language for all threads.
_one_at_a_time = threading.RLock() if _INTERPRETED else contextlib.nullcontext()


def launch(kernel, programs: int, *arguments, **constants) -> None:
    """Runs so many programs of a kernel on the current device; what is given by name decides how it is compiled.

    A product and a sum round once, not twice: what the kernels' errors and registers were measured with, and
    Triton's own choice before 3.10 only.
    """
    with _one_at_a_time:
        kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)


def define_op(name: str, schema: str, launch, fake) -> None:
    """Registers `edt_kernels::name`: `launch` runs it, `fake` makes the empty outputs of traced calls."""
    torch.library.define(f"edt_kernels::{name}", schema)
    torch.library.impl(f"edt_kernels::{name}", ("cuda", "cpu"))(launch)
    torch.library.register_fake(f"edt_kernels::{name}")(fake)


def refuse_double_backward(op: str):
    """The autograd formula of an op's backward."""

    def refuse(ctx, *_grads):
        raise RuntimeError(f"{op}'s Triton kernels cannot be differentiated twice; edt_kernels.reference.{op} can")

    return refuse


def refuse_transforms(op: str) -> None:
    """Registers a clear error for an op under torch.func's transforms (vmap, grad, jvp and what is made of them).

    Left alone, vmap would call the kernels in a loop, jvp would return a tangent of zero, and grad would ask for a
    `setup_context` that no formula of `torch.library.register_autograd` can have.
    """

    def refuse(*_args, **_kwargs):
        raise RuntimeError(
            f"{op}'s Triton kernels take no torch.func transforms: fold a mapped dimension into the batch instead "
            f"of vmap, call torch.autograd.grad instead of grad, or use edt_kernels.reference.{op}"
        )

    _library.impl(op, refuse, "FuncTorchDynamicLayerFrontMode")  # in the way only while a transform is active


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Without this the tangents of dual tensors would be lost without a word."""
    if forward_ad._current_level < 0:  # outside of every dual_level
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            f"{op}'s Triton kernels have no forward-mode derivative; edt_kernels.reference.{op} has one"
        )


def define_gradient(name: str, save_for_backward, differentiate) -> None:
    """The gradient of `edt_kernels::name`, made by `edt_kernels::name_backward`, which has none itself."""
    torch.library.register_autograd(f"edt_kernels::{name}", differentiate, setup_context=save_for_backward)
    torch.library.register_autograd(f"edt_kernels::{name}_backward", refuse_double_backward(name))
    refuse_transforms(name)


def forget_plans() -> None:
    """Launches made after this choose anew."""
