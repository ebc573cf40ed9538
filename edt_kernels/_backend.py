"""Which implementation a call takes: `EDT_KERNELS_BACKEND`, else the tensor's device."""

import os

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # Triton has no build for this platform; every op still has its reference
    triton = None

# Whether @triton.jit made interpreted functions: fixed when kernels are imported, as they are with this module.
_INTERPRETED = triton is not None and triton.knobs.runtime.interpret

_VARIABLE = "EDT_KERNELS_BACKEND"
_chosen: dict[tuple, str] = {}
MOST_SIGNATURES = 4096  # are remembered, with some kB each; who has more shapes than these has no use of them


def checked(check, signature: tuple | None, tensors: tuple, *arguments) -> str:
    """`check(*tensors, *arguments)`, which checks a call and chooses its backend, once for each `signature` of the
    tensors (see `_tracing.signature`) and arguments."""
    if signature is None:
        return check(*tensors, *arguments)
    kinds = [(*map(type, a),) if type(a) is tuple else type(a) for a in arguments]  # 4.0 and True equal integers
    key = check, signature, *arguments, *kinds, os.environ.get(_VARIABLE), triton, _INTERPRETED
    try:
        backend = _chosen.get(key)
    except TypeError:  # not hashable, such as a grid in a list
        return check(*tensors, *arguments)
    if backend is None:
        backend = check(*tensors, *arguments)
        if len(_chosen) >= MOST_SIGNATURES:
            _chosen.clear()
        _chosen[key] = backend
    return backend


def select_backend(**tensors: Tensor) -> str:
    """The backend of a call with these arguments: "triton" or "reference". The first one's device decides, unless
    the variable does; from a backend that was asked for it never falls back."""
    device = next(iter(tensors.values())).device.type
    requested = os.environ.get(_VARIABLE, "")
    if requested not in ("", "triton", "reference"):
        raise ValueError(f"EDT_KERNELS_BACKEND is {requested!r}; it must be 'triton', 'reference' or unset")
    backend = requested or ("triton" if device == "cuda" else "reference")  # ROCm tensors are "cuda" to torch
    if backend == "triton":
        if triton is None:
            raise RuntimeError(
                "the Triton kernels need the package triton, which is not installed; install it, or set "
                "EDT_KERNELS_BACKEND=reference"
            )
        if device != "cuda" and not _INTERPRETED:
            raise RuntimeError(
                f"the Triton kernels run on CUDA or ROCm tensors, not on {device!r} tensors; set "
                "EDT_KERNELS_BACKEND=reference, or TRITON_INTERPRET=1 before the import to interpret them"
            )
        for name, tensor in tensors.items():
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise TypeError(f"{name} is {tensor.dtype}; the Triton kernels take float32, bfloat16 or float16")
    return backend
