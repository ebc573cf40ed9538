"""Fused kernels for diffusion transformers, as torch autograd ops. `edt_kernels.reference` defines them."""

from . import reference
from .amm_attention import amm_attention, amm_table

__all__ = ["amm_attention", "amm_table", "reference"]
