"""Fused kernels for diffusion transformers, as torch autograd ops.

`edt_kernels.reference` defines them in plain torch; `edt_kernels.nn` has them as modules.
"""

from . import nn, reference
from .amm_attention import amm_attention, amm_table
from .norms import adaln, gated_residual, gated_residual_adaln, token_merge_adaln, token_split_concat_adaln

__version__ = "0.1.0"
__all__ = [
    "adaln", "amm_attention", "amm_table", "gated_residual", "gated_residual_adaln", "nn", "reference",
    "token_merge_adaln", "token_split_concat_adaln",
]  # fmt: skip
