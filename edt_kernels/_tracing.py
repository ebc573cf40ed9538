"""What a call may do beside computing: look at values, keep what it made or found out."""

import torch
from torch import Tensor, nn
from torch._C import _autograd, _functorch, _get_tracing_state, _len_torch_dispatch_stack  # pyright: ignore


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
    transform of `torch.func`, subclasses of tensors. Also for what is no tensor, or has no strides or memory."""
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack() or _get_tracing_state():
        return None
    if in_func_transform() or _autograd._profiler_enabled():
        return None
    for tensor in tensors:
        kind = type(tensor)
        if tensor is None:
            continue
        if kind is not Tensor and kind is not nn.Parameter:
            return None
        if tensor.layout is not torch.strided or tensor.is_nested:
            return None
    try:
        return described(*tensors)
    except RuntimeError:  # a gradient of several at once (`is_grads_batched`) has no memory of its own
        return None


def add_in_place(total: Tensor, term: Tensor) -> Tensor:
    """total + term, without memory for a third tensor. Under `torch.func`'s transforms the term may have a mapped
    dimension that the total has not; a compiler sees by itself what can be overwritten."""
    return total + term if torch.compiler.is_compiling() or in_func_transform() else total.add_(term)


def has_readable_values(tensor: Tensor) -> bool:
    """Whether a check may look at the values: they are there, and reading them neither waits nor breaks a graph.

    That is on a CPU in plain eager mode. A GPU would be waited for; a graph of `torch.compile` or `torch.export`
    cannot branch on them; a transform of `torch.func` has none for one sample; fake and meta tensors have none.
    """
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not in_func_transform()
        and type(tensor) in (Tensor, nn.Parameter)  # no fake one, no other subclass
        and tensor.numel() > 0
    )


class HasConstants(nn.Module):
    """A module with constants: tensors that its arguments make and no state dict brings back.

    They are no buffers. `to_empty` after the meta device loses a buffer's values, and so does offloading to a disk
    where something else than the module's own forward reads it; `.to(bfloat16)` rounds them. A constant keeps its
    values and its dtype, and goes where the module goes, or else where it is used.
    """

    _constants: tuple[str, ...] = ()

    def register_constant(self, name: str, constant: Tensor) -> None:
        """Made on the CPU, explicitly: under `torch.device("meta")` there would be no values."""
        self._constants = (*self._constants, name)
        setattr(self, name, constant)

    def constant_on(self, name: str, device: torch.device) -> Tensor:
        """The constant; moved for good where the module was moved past `_apply`, as FSDP2 does."""
        constant = getattr(self, name)
        if constant.device == device:
            return constant
        if torch.compiler.is_compiling():
            return constant.to(device)
        moved = _moved(constant, device)
        if type(moved) is Tensor and device.type != "meta" and not in_func_transform():
            setattr(self, name, moved)
        return moved

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name in self._constants:
            constant = getattr(self, name)
            device = fn(torch.empty(0, device=constant.device)).device
            if device.type != "meta":
                setattr(self, name, _moved(constant, device))
        return self


def _moved(constant: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # later calls may need gradients
        return constant.to(device)
