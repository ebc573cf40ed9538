"""EDT as one writes it without kernels: the transcription that the models are timed against.

The formulas are the released implementation's, in the idiom of timm: the relative position bias is gathered by
an index and the attention matrix materialised in every block, LayerNorm, modulation and gate are separate
operations. Parameter names are the released ones, so released weights load directly.
"""

import math

import torch
from torch import nn


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sincos_table(channels, size):
    omega = 1.0 / 10000 ** (torch.arange(channels // 4, dtype=torch.float64) / (channels / 4))
    rows, columns = torch.meshgrid(*2 * [torch.arange(size, dtype=torch.float64)], indexing="ij")
    halves = []
    for position in (columns, rows):
        angle = torch.outer(position.flatten(), omega)
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float().unsqueeze(0)  # (1, N, C)


def relative_position_index(size):
    rows, columns = torch.meshgrid(*2 * [torch.arange(size)], indexing="ij")
    coordinates = torch.stack([rows.flatten(), columns.flatten()])
    offsets = coordinates[:, :, None] - coordinates[:, None, :] + size - 1
    return offsets[0] * (2 * size - 1) + offsets[1]  # (N, N)


def modulation_matrix(size, form):
    rows, columns = torch.meshgrid(*2 * [torch.arange(size, dtype=torch.float64)], indexing="ij")
    coordinates = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    distance = torch.cdist(coordinates, coordinates, compute_mode="donot_use_mm_for_euclid_dist")
    farthest = (size - 1) * math.sqrt(2)
    cosine = torch.cos(math.pi / (2 * farthest) * distance)
    gain = {"exp_cos": 0.5 * torch.exp(cosine), "cos": 1.3 * cosine}[form]
    return torch.where(distance <= math.sqrt((size - 1) ** 2 + 4) + 1e-9, gain, 0.0).float()  # (N, N)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size, frequency_size=256):
        super().__init__()
        half = frequency_size // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        # Released, they are made on the CPU and copied in each forward, which no CUDA graph can hold.
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t):
        arguments = t[:, None].float() * self.frequencies
        return self.mlp(torch.cat([arguments.cos(), arguments.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels):
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(len(labels), device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class RelativePositionBias(nn.Module):
    def __init__(self, size, num_heads):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * size - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(size), persistent=False)

    def forward(self):
        num_tokens = len(self.relative_position_index)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        return bias.view(num_tokens, num_tokens, -1).permute(2, 0, 1).contiguous().unsqueeze(0)  # (1, h, N, N)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, size, amm, amm_form):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_bias = RelativePositionBias(size, num_heads)
        self.amm = amm
        if amm:
            self.register_buffer("modulation", modulation_matrix(size, amm_form), persistent=False)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        attn = attn + self.rel_pos_bias()
        attn = attn.softmax(dim=-1)
        if self.amm and not self.training:
            attn = attn * self.modulation
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, cond_dim, num_heads, size, amm, amm_form):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads, size, amm, amm_form)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 6 * dim))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class DownBlock(nn.Module):
    def __init__(self, dim, out_dim, cond_dim, size):
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(4 * dim, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 8 * dim))
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.register_buffer("pos_embed", sincos_table(out_dim, size // 2))

    def gather(self, x):
        x = x.view(x.shape[0], self.size, self.size, x.shape[-1])
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return torch.cat(parts, dim=-1).flatten(1, 2)

    def forward(self, x, c, keep=None):
        channels = x.shape[-1]
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        x = modulate(self.norm(self.gather(x)), shift, scale)
        if keep is not None:
            keep = self.gather(keep.unsqueeze(-1).to(x.dtype))  # (B, N/4, 4)
            x = x * keep.repeat_interleave(channels, dim=-1)
        return self.reduction(x) + self.pos_embed


class UpBlock(nn.Module):
    def __init__(self, dim, out_dim, size):
        super().__init__()
        self.size = size
        self.expand = nn.Linear(dim, 4 * out_dim, bias=False)

    def forward(self, x):
        x = self.expand(x)
        B, _, C = x.shape
        x = x.view(B, self.size, self.size, 2, 2, C // 4).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(B, 4 * self.size**2, C // 4)


class ConcatBlock(nn.Module):
    def __init__(self, dim, cond_dim, size):
        super().__init__()
        self.norm = nn.LayerNorm(2 * dim, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 4 * dim))
        self.cat = nn.Linear(2 * dim, dim)
        self.register_buffer("pos_embed", sincos_table(dim, size))

    def forward(self, x, skip, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        x = modulate(self.norm(torch.cat([x, skip], dim=-1)), shift, scale)
        return self.cat(x) + self.pos_embed


class PatchEmbed(nn.Module):
    def __init__(self, in_channels, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    def __init__(self, dim, cond_dim, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PlainEDT(nn.Module):
    """Square latents: what EDT-S, B and XL need at 256² and 512².

    `mid_block`: the block of stage 0 before which the masked pass replaces dropped tokens by their position, as
    EDT-XL does; None for no such block.
    """

    def __init__(
        self,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_classes=1000,
        hidden_sizes=(312, 416, 520, 416, 312),
        num_attention_heads=(6, 8, 10, 8, 6),
        depths=(2, 2, 2, 3, 3),
        class_dropout_prob=0.1,
        amm_blocks=(),
        amm_form="exp_cos",
        mid_block=None,
    ):
        super().__init__()
        size = sample_size // patch_size
        self.size, self.patch_size, self.out_channels, self.depths = size, patch_size, out_channels, depths
        self.mid_block = mid_block
        sizes = (size, size // 2, size // 4, size // 2, size)
        cond_dim = hidden_sizes[0]
        self.x_embedder = PatchEmbed(in_channels, cond_dim, patch_size)
        self.t_embedder = TimestepEmbedder(cond_dim)
        self.y_embedder = LabelEmbedder(num_classes, cond_dim, class_dropout_prob)
        self.register_buffer("pos_embed", sincos_table(cond_dim, size))
        stage_of = [stage for stage, depth in enumerate(depths) for _ in range(depth)]
        self.blocks = nn.ModuleList(
            Block(hidden_sizes[s], cond_dim, num_attention_heads[s], sizes[s], number in amm_blocks, amm_form)
            for number, s in enumerate(stage_of)
        )
        self.down_blocks = nn.ModuleList(
            DownBlock(hidden_sizes[s], hidden_sizes[s + 1], cond_dim, sizes[s]) for s in (0, 1)
        )
        self.up_blocks = nn.ModuleList(UpBlock(hidden_sizes[s], hidden_sizes[s + 1], sizes[s]) for s in (2, 3))
        self.concat_blocks = nn.ModuleList(
            ConcatBlock(hidden_sizes[s + 1], cond_dim, sizes[s + 1]) for s in (2, 3)
        )
        self.final_layer = FinalLayer(hidden_sizes[-1], cond_dim, patch_size, out_channels)

    def forward(self, x, t, y, keep_masks=(None, None)):
        """x (B, in_channels, size, size), t and y (B,) → (B, out_channels, size, size).

        keep_masks (B, N): of the two merges, and before them of `mid_block` where there is one.
        """
        *mid_mask, first, second = keep_masks
        keep_masks = (first, second)
        blocks = iter(self.blocks)
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        skips = []
        for stage, depth in enumerate(self.depths):
            if stage >= 3:
                x = self.concat_blocks[stage - 3](self.up_blocks[stage - 3](x), skips.pop(), c)
            elif stage < 2:
                skips.append(x)
            for number in range(depth):
                if mid_mask and stage == 0 and number == self.mid_block:
                    x = torch.where(mid_mask[0].unsqueeze(-1), x, self.pos_embed)
                x = next(blocks)(x, c)
            if stage < 2:
                x = self.down_blocks[stage](x, c, keep_masks[stage])
        return self.unpatchify(self.final_layer(x, c))

    def unpatchify(self, x):
        p, channels = self.patch_size, self.out_channels
        x = x.reshape(len(x), self.size, self.size, p, p, channels)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(len(x), channels, self.size * p, self.size * p)
