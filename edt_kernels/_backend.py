"""Which implementation a call takes: `EDT_KERNELS_BACKEND`, else the tensor's device."""

import os

from torch import Tensor

try:
    import triton
except ImportError:  # Triton has no build for this platform; every op still has its reference
    triton = None

# Whether @triton.jit made interpreted functions: fixed when kernels are imported, as they are with this module.
_INTERPRETED = triton is not None and triton.knobs.runtime.interpret

_DEVICE_BACKENDS = {"cuda": "triton", "cpu": "reference"}  # ROCm tensors are "cuda" to torch


def select_backend(tensor: Tensor) -> str:
    """ "triton" or "reference" for a call on `tensor`. Never falls back from a backend that was asked for."""
    device = tensor.device.type
    requested = os.environ.get("EDT_KERNELS_BACKEND", "")
    if requested not in ("", "triton", "reference"):
        raise ValueError(f"EDT_KERNELS_BACKEND is {requested!r}; it must be 'triton', 'reference' or unset")
    backend = requested or _DEVICE_BACKENDS.get(device, "reference")
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
    return backend
