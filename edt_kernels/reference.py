"""Every op as its definition in plain torch, under the public names, on any device.

`edt_kernels.reference.<op>` takes the arguments of `edt_kernels.<op>` without checking them. float64 works,
which is what the tests judge the kernels by.
"""

from .adaln.reference import adaln
from .amm_attention.reference import amm_attention, amm_table
from .gated_residual.reference import gated_residual
from .gated_residual_adaln.reference import gated_residual_adaln
from .token_merge_adaln.reference import token_merge_adaln
from .token_split_concat_adaln.reference import token_split_concat_adaln

__all__ = [
    "adaln",
    "amm_attention",
    "amm_table",
    "gated_residual",
    "gated_residual_adaln",
    "token_merge_adaln",
    "token_split_concat_adaln",
]
