"""What every launcher needs: how wide its loads may be, on which device it runs."""

import contextlib
import math

import torch
from torch import Tensor


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


def define_gradient(name: str, save_for_backward, differentiate) -> None:
    """The gradient of `edt_kernels::name`, made by `edt_kernels::name_backward`, which has none itself."""
    torch.library.register_autograd(f"edt_kernels::{name}", differentiate, setup_context=save_for_backward)
    torch.library.register_autograd(f"edt_kernels::{name}_backward", refuse_double_backward(name))
