"""The released implementation's numbers and names, for the tests."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import edt

FIXTURES = Path(__file__).parent / "fixtures"

# The configuration of fixtures/edt_tiny_s.safetensors.
TINY = {
    "sample_size": 16,
    "num_classes": 10,
    "hidden_sizes": (32, 48, 64, 48, 32),
    "num_attention_heads": (2, 3, 4, 3, 2),
    "depths": (2, 2, 2, 3, 3),
    "amm_blocks": (7, 10),
    "class_dropout_prob": 0.0,
}

BLOCK_STAGE_AND_INDEX = [(s, b) for s, depth in enumerate(TINY["depths"]) for b in range(depth)]


def fixture(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries whose name begins with `prefix.`, without it."""
    return {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}


def tiny_model(**overrides) -> edt.EDTTransformer2DModel:
    """A small model with random weights everywhere: a fresh one has zero gates and a zero output."""
    torch.manual_seed(0)
    model = edt.EDTTransformer2DModel(**{**TINY, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def small_model(**overrides) -> edt.EDTTransformer2DModel:
    """A smaller one, of 8×8 tokens, in evaluation mode."""
    sizes = {
        "hidden_sizes": (16, 24, 32, 24, 16),
        "num_attention_heads": (2, 3, 4, 3, 2),
        "depths": (1, 1, 1, 2, 2),
    }
    sizes |= {"amm_blocks": (3, 5), "sample_size": 8, "patch_size": 1, "class_dropout_prob": 0.1}
    return tiny_model(**{**sizes, **overrides}).eval()


def released_model() -> edt.EDTTransformer2DModel:
    """The model of the fixture, with its weights."""
    model = edt.EDTTransformer2DModel(**TINY)
    edt.load_released_state_dict(model, under("param", fixture("edt_tiny_s")))
    return model


def released_shapes(hidden_sizes, depths, num_attention_heads, size=16, num_classes=1000, channels=4, patch=2):
    """Names and shapes of a released state dict, from the structure in the paper; `size` is stage 0's grid."""
    C0, sizes = hidden_sizes[0], (size, size // 2, size // 4, size // 2, size)
    shapes = {
        "pos_embed": (1, size**2, C0),
        "x_embedder.proj.weight": (C0, channels, patch, patch),
        "x_embedder.proj.bias": (C0,),
        "y_embedder.embedding_table.weight": (num_classes + 1, C0),
    }

    def linear(name, inputs, outputs, bias=True):
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    linear("t_embedder.mlp.0", 256, C0)
    linear("t_embedder.mlp.2", C0, C0)
    block = 0
    for C, depth, heads, n in zip(hidden_sizes, depths, num_attention_heads, sizes, strict=True):
        for _ in range(depth):
            linear(f"blocks.{block}.adaLN_modulation.1", C0, 6 * C)
            linear(f"blocks.{block}.attn.qkv", C, 3 * C)
            linear(f"blocks.{block}.attn.proj", C, C)
            shapes[f"blocks.{block}.attn.rel_pos_bias.relative_position_bias_table"] = ((2 * n - 1) ** 2, heads)
            linear(f"blocks.{block}.mlp.fc1", C, 4 * C)
            linear(f"blocks.{block}.mlp.fc2", 4 * C, C)
            block += 1
    for i in (0, 1):
        C, narrower, n = hidden_sizes[i], hidden_sizes[i + 1], sizes[i + 1]
        linear(f"down_blocks.{i}.adaLN_modulation.1", C0, 8 * C)
        linear(f"down_blocks.{i}.reduction", 4 * C, narrower, bias=False)
        shapes[f"down_blocks.{i}.pos_embed"] = (1, n**2, narrower)
        C, wider, n = hidden_sizes[i + 2], hidden_sizes[i + 3], sizes[i + 3]
        linear(f"up_blocks.{i}.expand", C, 4 * wider, bias=False)
        linear(f"concat_blocks.{i}.adaLN_modulation.1", C0, 4 * wider)
        linear(f"concat_blocks.{i}.cat", 2 * wider, wider)
        shapes[f"concat_blocks.{i}.pos_embed"] = (1, n**2, wider)
    linear("final_layer.adaLN_modulation.1", C0, 2 * C0)
    linear("final_layer.linear", C0, patch * patch * 2 * channels)
    return shapes


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual − expected| / max |expected|."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).abs().max() / expected.abs().max()).item()
