"""Denoising Task Routing: each timestep uses a window of the channels of every block."""

from numbers import Real

import torch
from torch import Tensor

from edt_kernels._checks import shown

from .presets import NUM_TRAIN_TIMESTEPS, is_number


def routing_mask(timestep: Tensor, channels: int, beta: float, alpha: float) -> Tensor:
    """m[b, 0, c] = (0 ≤ c − s_b < w), w = ⌊β·C⌋ and s_b = round((t_b/(T−1))^α·(C − w)), T = 1000.

    A block sees x⊙m, what is outside of the window passes it: out = Block(x⊙m) + x⊙(1−m). The window lies at the
    first channels for t = 0, almost clean, and at the last ones for t = T−1, pure noise. With α > 1 it moves
    fastest at high t, so that noisy steps, which fix what the image shows, share the fewest channels with each
    other.

    Args:
        timestep: (B,) of any dtype; what is outside of 0 to T−1 takes the window of the nearer end.
        channels: C.
        beta: share of the channels in the window, in (0, 1]; at least one channel is.
        alpha: 0 or more.

    Returns:
        (B, 1, C) bool, True in the window. The position is computed in float64, so that it does not depend on the
        device.

    Raises:
        TypeError, ValueError: as `check_task_routing`.

    Source: "Denoising Task Routing for Diffusion Models" (arXiv 2310.07138); its authors' code for the rounding (w
    down, s to the nearest, halves to even) and for masking the residual stream of whole blocks. Best there:
    β = 0.8, α = 4.
    """
    check_task_routing((beta, alpha))
    if type(channels) is not int or channels < 1:
        raise ValueError(f"channels is {shown(channels)}; it must be an integer of at least 1")
    if not isinstance(timestep, Tensor) or timestep.ndim != 1:
        given = tuple(timestep.shape) if isinstance(timestep, Tensor) else type(timestep).__name__
        raise TypeError(f"timestep is {given}; it must be a tensor (B,)")
    width = max(1, int(beta * channels))
    noise_level = timestep.double().div(NUM_TRAIN_TIMESTEPS - 1).clamp(0, 1)
    start = (noise_level**alpha * (channels - width)).round()[:, None]  # (B, 1)
    channel = torch.arange(channels, device=timestep.device)
    return ((channel >= start) & (channel < start + width)).unsqueeze(1)


def check_task_routing(task_routing: tuple[float, float] | None) -> None:
    """Raises TypeError or ValueError for what is neither None nor (β, α) with β in (0, 1] and finite α ≥ 0."""
    if task_routing is None:
        return
    if not isinstance(task_routing, (tuple, list)) or not all(
        isinstance(value, Real) and not isinstance(value, bool) for value in task_routing
    ):
        raise TypeError(f"task_routing is {shown(task_routing)}; it must be None or two numbers (beta, alpha)")
    if len(task_routing) != 2:
        raise ValueError(f"task_routing is {shown(task_routing)}; it must be None or two numbers (beta, alpha)")
    beta, alpha = task_routing
    if not 0 < beta <= 1:
        raise ValueError(f"task_routing has beta {shown(beta)}; it must be above 0 and at most 1")
    if not (is_number(alpha) and alpha >= 0):
        raise ValueError(f"task_routing has alpha {shown(alpha)}; it must be finite and not negative")
