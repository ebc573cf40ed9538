"""Token masks of the second pass of a masking-training step."""

import torch
from torch import Tensor

from edt_kernels._checks import shown


def check_draw(batch_size: int, generator, device) -> torch.device | None:
    """The device to draw on: `device`, else the generator's; None where neither says.

    Raises:
        TypeError, ValueError: for a batch size, generator or device that does not fit.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, torch.SymInt)):
        raise TypeError(f"batch_size is {shown(batch_size)}; it must be an integer")
    if not 0 <= batch_size < 2**31:
        raise ValueError(f"batch_size is {shown(batch_size)}; it must be 0 to {2**31 - 1}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; it must be a torch.Generator or None")
    if device is None:
        return None if generator is None else generator.device
    try:
        device = torch.device(device)
    except (TypeError, RuntimeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"device is {shown(device)}; it must be a torch.device, its name or None") from None
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device}; to draw on {device} it must be there")
    return device


def draw_keep_mask(
    batch_size: int,
    num_tokens: int,
    ratio_range: tuple[float, float],
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """p ~ U(low, high) once, then keep[b, n] = (u[b, n] ≥ p): (batch_size, num_tokens) bool, True keeps.

    Source: the released EDT implementation; one ratio is drawn for the whole batch.
    """
    low, high = ratio_range
    ratio = low + (high - low) * torch.rand((), generator=generator, device=device)
    return torch.rand(batch_size, num_tokens, generator=generator, device=device) >= ratio
