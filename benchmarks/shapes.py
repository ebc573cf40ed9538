"""The shapes that the static report compiles and the benchmarks time: EDT's stages, and other transformers'."""

from typing import NamedTuple

from edt.model.presets import PRESETS


class AttentionShape(NamedTuple):
    model: str
    grid: tuple[int, int]
    heads: int
    head_dim: int
    num_extra_tokens: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        before, after = self.num_extra_tokens
        extra = f" {before}+{after} extra" if before or after else ""
        return f"{self.model} {self.grid[0]}x{self.grid[1]} {self.heads}x{self.head_dim}{extra}"


class NormShape(NamedTuple):
    model: str
    grid: tuple[int, int]
    channels: int
    resizes: bool = False  # the stage is merged into the next one and, later, split back to

    def __str__(self) -> str:
        return f"{self.model} {self.grid[0]}x{self.grid[1]} C{self.channels}"


def _edt_shapes(tokens_across: int) -> tuple[list[AttentionShape], list[NormShape]]:
    """Every stage of EDT-S, B and XL where the first has so many tokens in a row."""
    attention, norms = [], []
    for model in ("EDT-S/2", "EDT-B/2", "EDT-XL/2"):
        preset = PRESETS[model]
        for stage in range(3):
            grid, channels = (tokens_across >> stage,) * 2, preset["hidden_sizes"][stage]
            heads = preset["num_attention_heads"][stage]
            attention.append(AttentionShape(model, grid, heads, channels // heads))
            norms.append(NormShape(model, grid, channels, resizes=stage < 2))
    return attention, norms


ATTENTION_256, NORMS_256 = _edt_shapes(16)  # images of 256² pixels
ATTENTION_512, NORMS_512 = _edt_shapes(32)
EDT_ATTENTION, EDT_NORMS = [*ATTENTION_256, *ATTENTION_512], [*NORMS_256, *NORMS_512]
# Other transformers that the ops are meant for. SD3's joint attention has 333 text tokens beside the image's.
OTHER_ATTENTION = [
    AttentionShape("DiT-XL/2", (16, 16), 16, 72),
    AttentionShape("DiT-XL/2", (32, 32), 16, 72),
    AttentionShape("PixArt-alpha", (64, 64), 16, 72),
    AttentionShape("SD3-medium", (64, 64), 24, 64, (0, 333)),
    AttentionShape("SD3-medium", (64, 64), 24, 64, (333, 0)),
]
OTHER_NORMS = [
    NormShape("DiT-XL/2", (16, 16), 1152),
    NormShape("DiT-XL/2", (32, 32), 1152),
    NormShape("PixArt-alpha", (64, 64), 1152),
    NormShape("SD3-medium", (64, 64), 1536),
]
