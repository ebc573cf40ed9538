"""What `gated_residual` is, in plain torch."""

import torch
from torch import Tensor

from .._tracing import add_in_place


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate·y in x's dtype, computed in float32: x and y (B, N, C), gate (B, C) → (B, N, C)."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    gate = gate.to(accumulate).unsqueeze(1)
    # addcmul: a product more per gradient
    return add_in_place(gate * y.to(accumulate), x.to(accumulate)).to(x.dtype)
