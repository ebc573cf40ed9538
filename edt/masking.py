"""Token masks of the second pass of a masking-training step."""

import torch
from torch import Tensor


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
