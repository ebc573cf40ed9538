"""Which device a command runs on, and how exact its float32 products are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def torch_device(name: str) -> torch.device:
    """Raises ValueError for a name that is neither cpu nor cuda, or a GPU that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; it must be cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; it must be cpu or cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        seen = f"GPUs here up to cuda:{count - 1}" if count else "no GPU here, use cpu"
        raise ValueError(f"device is {name!r}; torch sees {seen}")
    return device


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """float32 products and convolutions in TF32 within, or exactly; afterwards as they were."""
    # Not allow_tf32: to read it raises once anybody has set fp32_precision.
    cudnn = torch.backends.cudnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)  # pyright: ignore[reportAttributeAccessIssue] - torch makes them as it is imported
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
