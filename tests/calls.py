"""One plain call of each op: random arguments by name, the call, its gradients."""

import torch
from torch import Tensor

OPS = (
    "adaln",
    "amm_attention",
    "gated_residual",
    "gated_residual_adaln",
    "token_merge_adaln",
    "token_split_concat_adaln",
)
# The ops, and the attention as EDT trains it, which takes other kernels.
CALLS = (*OPS, "amm_attention, bias alone")
GRID = (4, 2)


def arguments(
    op: str, *, grid=GRID, channels=24, batch_size=2, heads=2, dtype=torch.float32, device="cpu"
) -> dict[str, Tensor]:
    """Leaves that require gradients. `grid` and `channels` are x's, or those of all heads together."""
    (H, W), B, C = grid, batch_size, channels
    x, vector = (B, H * W, C), (B, C)
    shapes = {
        "adaln": {"x": x, "shift": vector, "scale": vector},
        "amm_attention": {
            **dict.fromkeys("qkv", (B, H * W, heads, C // heads)),
            "modulation": (2 * H - 1, 2 * W - 1),
            "rel_pos_bias": ((2 * H - 1) * (2 * W - 1), heads),
        },
        "amm_attention, bias alone": {
            **dict.fromkeys("qkv", (B, H * W, heads, C // heads)),
            "rel_pos_bias": ((2 * H - 1) * (2 * W - 1), heads),
        },
        "gated_residual": {"x": x, "y": x, "gate": vector},
        "gated_residual_adaln": {"x": x, "y": x, "gate": vector, "shift": vector, "scale": vector},
        "token_merge_adaln": {"x": x, "shift": (B, 4 * C), "scale": (B, 4 * C)},
        "token_split_concat_adaln": {
            "x": x,
            "skip": (B, 4 * H * W, C // 4),
            "shift": (B, C // 2),
            "scale": (B, C // 2),
        },
    }[op]
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def call(namespace, op: str, tensors: dict[str, Tensor], grid=GRID) -> tuple[Tensor, ...]:
    op = op.partition(",")[0]
    takes_grid = op in ("amm_attention", "token_merge_adaln", "token_split_concat_adaln")
    outputs = getattr(namespace, op)(**tensors, **({"grid": grid} if takes_grid else {}))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def random_like(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Upstream gradients."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(out.shape, generator=generator).to(out) for out in outputs]


def gradients(outputs: tuple[Tensor, ...], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every argument, for random upstream gradients."""
    grads = torch.autograd.grad(outputs, list(tensors.values()), random_like(outputs))
    return dict(zip(tensors, grads, strict=True))
