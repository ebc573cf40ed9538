"""The layers of EDT. They own the projections; what is fused between them is a module of `edt_kernels.nn`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import edt_kernels
from edt_kernels._checks import enabled_autocast_dtype
from edt_kernels._tracing import in_func_transform
from edt_kernels.nn import HasConstants

BLOCK_MODULATIONS = 6  # shift, scale and gate, of attention and MLP


def sincos_position_embedding(channels: int, grid: tuple[int, int]) -> Tensor:
    """[sin(x·ω), cos(x·ω), sin(y·ω), cos(y·ω)] with ω_k = 10000^(−k/(channels/4)) → (H·W, channels)."""
    H, W = grid
    # On the CPU also where the default device is meta: this is in no state dict.
    omega = 10000.0 ** -(torch.arange(channels // 4, dtype=torch.float64, device="cpu") / (channels / 4))
    y = torch.arange(H, dtype=torch.float64, device="cpu").repeat_interleave(W)
    x = torch.arange(W, dtype=torch.float64, device="cpu").repeat(H)
    angles = [position[:, None] * omega for position in (x, y)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=-1).float()


class PositionEmbedding(HasConstants):
    """Adds the fixed sin-cos table of a grid."""

    table: Tensor

    def __init__(self, channels: int, grid: tuple[int, int]):
        super().__init__()
        self.register_constant("table", sincos_position_embedding(channels, grid))

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (B, N, C), the branch → (B, N, C) of `dtype`, the residual stream's."""
        return x + self.constant_on("table", x.device).to(dtype)


class Modulation(nn.Module):
    """Linear of the conditioning: `parts` vectors of `channels` for each sample."""

    def __init__(self, cond_channels: int, channels: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(cond_channels, parts * channels)

    def forward(self, cond: Tensor) -> Tensor:
        return self.linear(cond).unflatten(-1, (self.parts, -1))  # (B, parts, channels)


class PatchEmbedding(nn.Module):
    """Non-overlapping convolution: (B, in_channels, H·p, W·p) → (B, H·W, channels)."""

    def __init__(self, in_channels: int, channels: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        weight = self.proj.weight
        # Other kinds of parameters, and hooks, may change the dtype before the product.
        plain = type(weight) is nn.Parameter and not hasattr(self.proj, "_diffusers_hook")
        if plain and weight.dtype != latents.dtype:
            is_double = torch.float64 in (weight.dtype, latents.dtype)  # which autocast leaves as it is
            if is_double or enabled_autocast_dtype(latents) is None:
                raise TypeError(
                    f"hidden_states is {latents.dtype}, but the weights are {weight.dtype}; cast one"
                    + ("" if is_double else ", or use autocast")
                )
        return rearrange(self.proj(latents), "b c h w -> b (h w) c")


class TimestepEmbedding(HasConstants):
    """Sinusoid of 256 → Linear, SiLU, Linear."""

    frequencies = 256

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(self.frequencies, channels)
        self.fc2 = nn.Linear(channels, channels)
        half = self.frequencies // 2
        # Correctly rounded: the exponentials of float32 differ by device and by CPU, and one rounding, times
        # timesteps up to 999, moves the network's output by 10⁻⁵.
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu") / half
        omega = exponents.double().exp().float()
        self.register_constant("omega", omega)

    def forward(self, timestep: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B,) → (B, C0). The Linears' input has `dtype`: their weights' own may be one of storage alone."""
        angles = timestep.float()[:, None] * self.constant_on("omega", timestep.device)  # (B, 128)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.fc2(F.silu(self.fc1(sinusoid.to(dtype))))


class Attention(nn.Module):
    """QKV projection, attention with a learned relative position bias and AMM, output projection.

    Heads of 52 are loaded by 8 bytes, because they are 104 bytes apart in 16-bit dtypes. Padded to 56 inside the
    projections they could be loaded by 16, for 7.7 % more bytes and products there: not done, as not measured.
    """

    def __init__(
        self, channels: int, num_heads: int, grid: tuple[int, int], amm_form: str, amm_radius: float | None
    ):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.attention = edt_kernels.nn.AMMAttention(
            grid, num_heads, amm="never", form=amm_form, radius=amm_radius
        )
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        num_heads = self.attention.num_heads
        qkv = rearrange(self.qkv(x), "b n (three h d) -> b n three h d", three=3, h=num_heads)
        q, k, v = qkv.unbind(2)  # (B, N, heads, D) views
        return self.proj(self.attention(q, k, v).flatten(2))


class MLP(nn.Module):
    """Linear, GELU (tanh), Linear. Of the hidden layer only what goes into GELU is kept for backward.

    GELU is not fused into fc1's product: torch offers that as `_addmm_activation` alone, which has no derivative,
    is another GELU on the CPU, and takes fc1's weight, past what wraps or replaces the Linear.
    """

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.fc2 = nn.Linear(hidden_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if not hidden.requires_grad or in_func_transform():  # torch.func takes no saved-tensor hooks
            return self._activate_and_project(hidden)
        # GELU's output is as large as its input and cheap to compute again, so backward does: a fifth less memory
        # for activations. `checkpoint` stops before fc2's product. It calls fc2 as a module, so that what wraps or
        # replaces a Linear (adapters, quantisation, offloading) works; a Function of fc2's weight would bypass it.
        return checkpoint(self._activate_and_project, hidden, use_reentrant=False, preserve_rng_state=False)

    def _activate_and_project(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(hidden, approximate="tanh"))


class Block(nn.Module):
    """adaLN-Zero transformer block: x += gate·attn(adaln(x)); x += gate·mlp(adaln(x)).

    A residual and the norm that follows are one op, also where the norm is the next block's. For backward a block
    keeps on the Triton kernels, in bytes for a token and channel, under 16-bit autocast with x in float32:

    | kept | by | bytes |
    | --- | --- | --- |
    | x after attention, x after the MLP | the norms | 4 + 4 |
    | both norms | qkv, fc1 | 2 + 2 |
    | q, k, v | attention | 6 |
    | attention's output | attention and its projection | 2 |
    | both branches | the gates | 2 + 2 |
    | hidden layer before GELU | the MLP | 2·mlp_ratio |

    That is 32 with an MLP of 4·C (56 in float32), and 16 + 4·heads bytes of statistics for a token. With gradient
    checkpointing it keeps what enters it: x.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        mlp_ratio: float,
        grid: tuple[int, int],
        amm_form: str = "exp_cos",
        amm_radius: float | None = None,
    ):
        super().__init__()
        self.norm = edt_kernels.nn.AdaLN()
        self.residual_norm = edt_kernels.nn.GatedResidualAdaLN()
        self.attn = Attention(channels, num_heads, grid, amm_form, amm_radius)
        self.mlp = MLP(channels, int(channels * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        normed: Tensor | None = None,
        next_modulation: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            x: the residual stream (B, N, C).
            modulation: (B, 6, C): shift, scale and gate of the attention, then of the MLP.
            normed: this block's first norm, where the block before has computed it.
            next_modulation: of the next block, to compute its first norm here.

        Returns:
            The residual stream, and the next block's first norm, None without `next_modulation`.
        """
        shift, scale, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(1)  # (B, C) views
        if normed is None:
            normed = self.norm(x, shift, scale)
        y = self.attn(normed)
        x, normed = self.residual_norm(x, y, gate_attn, shift_mlp, scale_mlp)
        y = self.mlp(normed)
        if next_modulation is None:
            return edt_kernels.gated_residual(x, y, gate_mlp), None
        shift, scale, *_ = next_modulation.unbind(1)
        return self.residual_norm(x, y, gate_mlp, shift, scale)


class TokenMerge(nn.Module):
    """2×2 tokens → one: gather, LN over 4C, modulate, drop masked tokens' slices, Linear, position."""

    def __init__(self, channels: int, out_channels: int, cond_channels: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.modulation = Modulation(cond_channels, 4 * channels, parts=2)
        self.merge = edt_kernels.nn.TokenMerge(grid)
        self.reduction = nn.Linear(4 * channels, out_channels, bias=False)
        self.position = PositionEmbedding(out_channels, (grid[0] // 2, grid[1] // 2))

    def forward(self, x: Tensor, cond: Tensor, keep: Tensor | None = None) -> Tensor:
        shift, scale = self.modulation(cond).unbind(1)
        return self.position(self.reduction(self.merge(x, shift, scale, keep)), x.dtype)  # (B, N/4, C')


class TokenSplitConcat(nn.Module):
    """One token → 2×2: Linear, shuffle, concat the skip, LN over 2C', modulate, Linear, position."""

    def __init__(self, channels: int, out_channels: int, cond_channels: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.expand = nn.Linear(channels, 4 * out_channels, bias=False)
        self.modulation = Modulation(cond_channels, 2 * out_channels, parts=2)
        self.split = edt_kernels.nn.TokenSplitConcat(grid)
        self.fuse = nn.Linear(2 * out_channels, out_channels)
        self.position = PositionEmbedding(out_channels, (grid[0] * 2, grid[1] * 2))

    def forward(
        self, x: Tensor, skip: Tensor, cond: Tensor, expanded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: (B, N, C).
            skip: (B, 4N, C').
            cond: (B, C0).
            expanded: what to take in place of `expand`'s output (B, N, 4C'); x is not read then.

        Returns:
            The tokens (B, 4N, C'), and `expand`'s output.
        """
        tokens: Tensor = self.expand(x) if expanded is None else expanded
        shift, scale = self.modulation(cond).unbind(1)
        return self.position(self.fuse(self.split(tokens, skip, shift, scale)), skip.dtype), tokens


class FinalLayer(nn.Module):
    """adaLN and a Linear to the pixels of each patch: (B, N, C) → (B, out_channels, H·p, W·p)."""

    def __init__(
        self, channels: int, cond_channels: int, out_channels: int, patch_size: int, grid: tuple[int, int]
    ):
        super().__init__()
        self.grid = grid
        self.patch_size = patch_size
        self.modulation = Modulation(cond_channels, channels, parts=2)
        self.norm = edt_kernels.nn.AdaLN()
        self.linear = nn.Linear(channels, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.modulation(cond).unbind(1)
        patches = self.linear(self.norm(x, shift, scale))
        H, W, p = *self.grid, self.patch_size
        return rearrange(patches, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=H, w=W, p1=p, p2=p)


class Stage(nn.Module):
    """The blocks of one resolution, with one Linear for the modulations of all of them.

    `mid_block`: the block before which dropped tokens are replaced in the masked pass, None for no such block.
    """

    blocks: Any  # an nn.ModuleList, which does not say of what
    _gradient_checkpointing_func: Callable  # diffusers sets it

    def __init__(
        self,
        channels: int,
        cond_channels: int,
        num_heads: int,
        mlp_ratio: float,
        grid: tuple[int, int],
        depth: int,
        amm_form: str,
        amm_radius: float | None,
        mid_block: int | None = None,
    ):
        super().__init__()
        self.modulation = Modulation(cond_channels, channels, parts=depth * BLOCK_MODULATIONS)
        self.blocks = nn.ModuleList(
            Block(channels, num_heads, mlp_ratio, grid, amm_form, amm_radius) for _ in range(depth)
        )
        self.mid_block = mid_block
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        mid_keep: Tensor | None = None,
        replacement: Tensor | None = None,
        routing: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, C), cond (B, C0) → (B, N, C).

        Before `mid_block`, tokens where `mid_keep` (B, N) is False become those of `replacement` (N, C). Blocks
        see the channels of `routing` (B, 1, C) bool, the others pass them by.
        """
        modulations = self.modulation(cond).unflatten(1, (-1, BLOCK_MODULATIONS)).unbind(1)  # (B, 6, C) a block
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        mid_block = None if mid_keep is None else self.mid_block
        normed = passing = None
        for i, block in enumerate(self.blocks):
            if i == mid_block:
                x = torch.where(mid_keep.unsqueeze(-1), x, replacement.to(x.dtype))  # pyright: ignore[reportOptionalMemberAccess] - mid_block is None then
            if routing is not None:
                passing, x = x.masked_fill(routing, 0), x.masked_fill(~routing, 0)
            if checkpointing:  # each block by itself: a norm handed on would be kept beside x
                x, _ = self._gradient_checkpointing_func(block, x, modulations[i])
            else:
                last = routing is not None or i + 1 in (len(self.blocks), mid_block)
                x, normed = block(x, modulations[i], normed, None if last else modulations[i + 1])
            if passing is not None:
                x = x + passing
        return x
