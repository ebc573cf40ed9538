"""Every op as its definition in plain torch, under its public name: the arguments unchecked, on any device, in
float64 too, which is what the tests judge the kernels by. `amm_table` has no kernel and is the same here."""

from .amm_attention import amm_table
from .amm_attention.reference import amm_attention
from .norms.reference import (
    adaln,
    gated_residual,
    gated_residual_adaln,
    token_merge_adaln,
    token_split_concat_adaln,
)  # fmt: skip

__all__ = [
    "adaln", "amm_attention", "amm_table", "gated_residual", "gated_residual_adaln", "token_merge_adaln",
    "token_split_concat_adaln",
]  # fmt: skip
