"""Fused kernels for diffusion transformers, as torch autograd ops. `edt_kernels.reference` defines them."""

from . import reference
from .adaln import adaln
from .amm_attention import amm_attention, amm_table
from .gated_residual import gated_residual
from .gated_residual_adaln import gated_residual_adaln
from .token_merge_adaln import token_merge_adaln
from .token_split_concat_adaln import token_split_concat_adaln

__all__ = [
    "adaln",
    "amm_attention",
    "amm_table",
    "gated_residual",
    "gated_residual_adaln",
    "reference",
    "token_merge_adaln",
    "token_split_concat_adaln",
]
