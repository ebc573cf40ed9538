"""Every op as its definition in plain torch, under the public names, on any device.

`edt_kernels.reference.<op>` takes the arguments of `edt_kernels.<op>` without checking them. float64 works,
which is what the tests judge the kernels by. `amm_table` has no kernel and is the same there.
"""

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
