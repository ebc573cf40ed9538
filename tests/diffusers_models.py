"""Small diffusers models with random weights everywhere, and inputs for them."""

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

GRID = (4, 4)
NAMES = ("dit", "pixart", "sd3", "sd35", "flux")
_SIZES = {"num_attention_heads": 2, "num_layers": 3}
_PATCHES = {**_SIZES, "sample_size": 8, "patch_size": 2, "in_channels": 4}
_JOINT = {"joint_attention_dim": 12, "pooled_projection_dim": 20}
_SD3 = {**_PATCHES, **_JOINT, "attention_head_dim": 8, "caption_projection_dim": 16, "pos_embed_max_size": 8}
_CONFIGS = {
    "dit": ("DiTTransformer2DModel", {**_PATCHES, "attention_head_dim": 12, "num_embeds_ada_norm": 10}),
    "pixart": (
        "PixArtTransformer2DModel",
        {**_PATCHES, "attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 20},
    ),
    "sd3": ("SD3Transformer2DModel", {**_SD3, "out_channels": 4}),
    "sd35": (
        "SD3Transformer2DModel",
        {**_SD3, "out_channels": 4, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    ),
    "flux": (
        "FluxTransformer2DModel",
        {**_JOINT, "in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
         "num_single_layers": 2, "axes_dims_rope": (4, 4, 4), "guidance_embeds": True},
    ),
}  # fmt: skip


def make(name: str, **overrides):
    """In evaluation mode: in training DiT drops labels at random."""
    torch.manual_seed(0)
    class_name, config = _CONFIGS[name]
    model = getattr(diffusers, class_name)(**{**config, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh one may have gates of zero
            parameter.normal_(std=0.2)
    return model.eval()


def inputs(name: str, seed: int = 1, grid=GRID, batch_size: int = 2) -> dict:
    """Keyword arguments of a forward pass; other values for another seed."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    (H, W), B = grid, batch_size
    timestep = torch.randint(1000, (B,), generator=generator)
    latents, text, pooled = randn(B, 4, 2 * H, 2 * W), randn(B, 5, 12), randn(B, 20)
    if name == "dit":
        labels = torch.randint(10, (B,), generator=generator)
        return {"hidden_states": latents, "timestep": timestep, "class_labels": labels}
    if name == "pixart":
        mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])[:B]
        return {
            "hidden_states": latents,
            "timestep": timestep,
            "encoder_hidden_states": randn(B, 5, 20),
            "encoder_attention_mask": mask,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    joint = {"encoder_hidden_states": text, "pooled_projections": pooled}
    if name in ("sd3", "sd35"):
        return {"hidden_states": latents, "timestep": timestep, **joint}
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    return {
        "hidden_states": randn(B, H * W, 4),
        "timestep": timestep / 1000,
        "guidance": 3 * torch.rand(B, generator=generator),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(5, 3),
        **joint,
    }


def run(model, arguments: dict) -> Tensor:
    return model(**arguments, return_dict=False)[0]


def gradients(model, arguments: dict) -> dict[str, Tensor]:
    """The output, and the gradient of every parameter for a random upstream gradient."""
    model.zero_grad()
    out = run(model, arguments)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out))
    return {"output": out.detach()} | {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def cast(arguments: dict, dtype: torch.dtype) -> dict:
    """The floating-point tensors among them in another dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], floor: float = 0.0) -> None:
    """Each to 1e-5 of its norm, or of `floor` times the largest: a bias of keys has only rounding as gradient."""
    least = floor * max(tensor.norm() for tensor in expected.values())
    assert actual.keys() == expected.keys()
    for name in expected:
        error = (actual[name] - expected[name]).norm()
        assert error <= 1e-5 * max(expected[name].norm(), least), f"{name}: {error} of {expected[name].norm()}"


def blocks_of(model) -> list:
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


def image_attentions(block) -> list:
    if hasattr(block, "attn1"):
        return [block.attn1]
    return [attn for attn in (block.attn, getattr(block, "attn2", None)) if attn is not None]


class LoRALinear(nn.Module):
    """A Linear with a low-rank branch, as adapters wrap it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(0.3 * torch.randn(2, base.in_features))
        self.up = nn.Parameter(0.3 * torch.randn(base.out_features, 2))

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


class QuantizedLinear(nn.Module):
    """int8 and a scale a row, dequantised in forward; it has neither `weight` nor parameters."""

    def __init__(self, base):
        super().__init__()
        scale = base.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale.detach())
        self.register_buffer("values", (base.weight / scale).round().to(torch.int8).detach())
        self.register_buffer("offset", None if base.bias is None else base.bias.detach())

    def forward(self, x):
        return F.linear(x, self.values * self.scale, self.offset)


def replace_linears(model, replacement) -> None:
    """Of all blocks."""
    for block in blocks_of(model):
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, replacement(child))
