"""The error budget of every kernel: judged in float64, against what plain torch loses in the same dtype."""

import torch
from torch import Tensor


def assert_within_budget(name: str, result: Tensor, exact: Tensor, eager: Tensor, slack: float = 0.0) -> None:
    """‖result − exact‖ ≤ 2·‖eager − exact‖ + one rounding step of the result.

    `exact` is float64 on the same (already rounded) inputs, `eager` the reference in the result's dtype.
    `slack` is the rounding step of terms far larger than the result, where a sum of them cancels.
    """
    assert result.shape == exact.shape, f"{name}: shape {tuple(result.shape)} instead of {tuple(exact.shape)}"
    assert torch.isfinite(result).all(), f"{name}: {(~torch.isfinite(result)).sum()} values are not finite"
    rounding_step = torch.finfo(result.dtype).eps
    error = (result.double() - exact).norm().item()
    eager_error = (eager.double() - exact).norm().item()
    budget = 2 * eager_error + rounding_step * exact.norm().item() + slack
    assert error <= budget, f"{name}: error {error:.3e}, budget {budget:.3e} (eager's error {eager_error:.3e})"
