"""Fused kernels for diffusion transformers, as torch autograd ops.

`edt_kernels.reference` defines them in plain torch; `edt_kernels.nn` has them as modules.
"""

from . import nn, reference
from .adaln import adaln
from .amm_attention import amm_attention, amm_table
from .gated_residual import gated_residual
from .gated_residual_adaln import gated_residual_adaln
from .token_merge_adaln import token_merge_adaln
from .token_split_concat_adaln import token_split_concat_adaln

__version__ = "0.1.0"
__all__ = [
    "adaln",
    "amm_attention",
    "amm_table",
    "gated_residual",
    "gated_residual_adaln",
    "nn",
    "reference",
    "token_merge_adaln",
    "token_split_concat_adaln",
]
