"""A user's program: it runs here, and `make lint` checks that a type checker sees in it what it asserts."""

from typing import assert_type

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

import edt
import edt_kernels
from edt import model as model_wing
from edt.model import EDTTransformer2DModel, cost_table
from edt_kernels import reference
from edt_kernels.integrations.diffusers import apply_amm, fuse_adaln, remove_amm, unfuse_adaln
from edt_kernels.nn import AMMAttention, GatedResidualAdaLN

X, SKIP = torch.randn(2, 4, 32), torch.randn(2, 16, 8)
C8, C16, C32 = (torch.randn(2, channels) for channels in (8, 16, 32))


def test_ops():
    table = edt_kernels.amm_table((4, 4), radius=2.5)
    q, k, v = torch.randn(2, 16, 3, 2, 4).unbind(2)
    assert_type(table, Tensor)
    assert_type(edt_kernels.amm_attention(q, k, v, grid=(4, 4), modulation=table), Tensor)
    assert_type(edt_kernels.adaln(SKIP, C8, C8, out_dtype=torch.bfloat16), Tensor)
    assert_type(edt_kernels.gated_residual(SKIP, SKIP, C8), Tensor)
    assert_type(edt_kernels.gated_residual_adaln(SKIP, SKIP, C8, C8, C8), tuple[Tensor, Tensor])
    assert_type(edt_kernels.token_merge_adaln(SKIP, C32, C32, grid=(4, 4)), Tensor)
    assert_type(edt_kernels.token_split_concat_adaln(X, SKIP, C16, C16, grid=(2, 2)), Tensor)
    assert_type(reference.gated_residual_adaln(SKIP, SKIP, C8, C8, C8), tuple[Tensor, Tensor])
    assert_type(AMMAttention(grid=(4, 4), num_heads=2).rel_pos_bias, nn.Parameter | None)
    assert_type(GatedResidualAdaLN().forward(SKIP, SKIP, C8, C8, C8), tuple[Tensor, Tensor])


def test_model():
    small = edt.load_preset("EDT-S/2", sample_size=8)
    assert_type(small, EDTTransformer2DModel)
    assert_type(small.to("cpu"), EDTTransformer2DModel)
    assert_type(small.draw_keep_masks(2), list[Tensor])
    assert_type(edt.sample(small.eval(), torch.tensor([0]), num_inference_steps=1), Tensor)
    assert cost_table(small)


def test_integration():
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
    fuse_adaln(model)
    apply_amm(model, [0], grid=(4, 4), radius=2.0)
    remove_amm(model)
    unfuse_adaln(model)


def test_names_that_are_not_there():
    """A checker looks names up where they come from, and not in the functions that fetch them."""
    with pytest.raises(AttributeError):
        _ = edt.load_presets  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError):
        _ = model_wing.load_presets  # pyright: ignore[reportAttributeAccessIssue]
