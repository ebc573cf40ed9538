"""What the tests, the benchmarks and the tuner share: the error budget that every kernel is held to."""

import torch
from torch import Tensor, finfo, isfinite


def error_and_budget(
    result: Tensor, exact: Tensor, eager: Tensor, *, eager_factor: float = 2.0, slack: float = 0.0
) -> tuple[float, float]:
    """‖result − exact‖ and its budget, eager_factor·‖eager − exact‖ + one rounding step of the result + slack.

    Args:
        result: what is judged, in any floating dtype.
        exact: the same in float64, from the same (already rounded) inputs.
        eager: plain torch's in the result's dtype, on those inputs.
        eager_factor: how many times eager's own error is allowed.
        slack: the rounding step of terms far larger than the result, where a sum of them cancels.

    Returns:
        Two numbers; the error is infinite where the result has another shape or values that are not finite.
    """
    budget = eager_factor * (eager.double() - exact).norm().item() + slack
    budget += finfo(result.dtype).eps * exact.norm().item()
    if result.shape != exact.shape or not isfinite(result).all():
        return float("inf"), budget
    return (result.double() - exact).norm().item(), budget


def assert_within_budget(name: str, result: Tensor, exact: Tensor, eager: Tensor, slack: float = 0.0) -> None:
    """Raises AssertionError, naming `name`, unless `error_and_budget`'s error is within its budget."""
    assert result.shape == exact.shape, f"{name}: shape {tuple(result.shape)} instead of {tuple(exact.shape)}"
    assert isfinite(result).all(), f"{name}: {(~isfinite(result)).sum()} values are not finite"
    error, budget = error_and_budget(result, exact, eager, slack=slack)
    eager_error = (eager.double() - exact).norm().item()
    assert error <= budget, f"{name}: error {error:.3e}, budget {budget:.3e} (eager's error {eager_error:.3e})"


def is_lost(device: torch.device) -> bool:
    """Whether a GPU no longer answers: after an illegal access every further call fails, whoever's it is."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
