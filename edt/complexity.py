"""What a model costs: parameters, multiply-adds, memory."""

from dataclasses import dataclass

import torch
from torch import nn

from .layers import TimestepEmbedding
from .model import EDTTransformer2DModel

# Adan (three moments and the previous gradient) and the EMA each keep tensors of the weights' size.
ADAN_BUFFERS = 4


@dataclass(frozen=True)
class Part:
    """A row of the cost table. `grid` is what its output has; multiply-adds are for one image."""

    name: str
    grid: tuple[int, int] | None
    channels: int
    blocks: int
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Memory:
    """Estimates in bytes, float32; activations are for the batch, the rest is independent of it."""

    weights: int
    gradients: int
    optimizer_state: int
    ema: int
    training_activations: int
    attention_matrices: int
    inference_activations: int

    @property
    def training(self) -> int:
        return self.weights + self.gradients + self.optimizer_state + self.ema + self.training_activations

    @property
    def inference(self) -> int:
        return self.weights + self.inference_activations


def meta_model(config: dict) -> EDTTransformer2DModel:
    """The model of these arguments on the meta device: shapes only, no storage."""
    with torch.device("meta"):
        return EDTTransformer2DModel(**config)


def cost_table(model: EDTTransformer2DModel) -> list[Part]:
    """Parameters and multiply-adds part by part, from the model's configuration; they sum to the model's.

    With N tokens of C channels in a stage, C0 the conditioning's width and p the patch size:
        block       12·N·C² + 2·N²·C + 6·C·C0
        merge       4·C·C'·N' + 8·C·C0             N' = N/4 tokens of C' channels come out
        split       4·C·C'·N + 2·C'²·N' + 4·C'·C0  N' = 4·N
        patches in  p²·in_channels·C0·N
        timestep    256·C0 + C0²
        final layer N·C0·p²·out_channels + 2·C0²
    (12·N·C² with MLPs 4·C wide.) Norms, activations, biases and the attention modulation are not counted,
    as is the custom for "GFLOPs" in this literature.
    """
    config = model.config
    sizes, C0 = config.hidden_sizes, config.hidden_sizes[0]
    grids = [block_grid(stage) for stage in model.stages]
    tokens = [H * W for H, W in grids]
    patch = config.patch_size**2

    def stage(i: int) -> Part:
        N, C, depth = tokens[i], sizes[i], config.depths[i]
        per_block = (4 + 2 * config.mlp_ratio) * N * C**2 + 2 * N**2 * C + 6 * C * C0
        return _part(f"stage {i}", model.stages[i], grids[i], C, round(depth * per_block), depth)

    def merge(i: int) -> Part:
        C, C_out, N_out = sizes[i], sizes[i + 1], tokens[i + 1]
        macs = 4 * C * C_out * N_out + 8 * C * C0
        return _part(f"merge {i}", model.merges[i], grids[i + 1], C_out, macs)

    def split(i: int) -> Part:
        s = i + 2  # the stage whose tokens are split
        C, C_out, N, N_out = sizes[s], sizes[s + 1], tokens[s], tokens[s + 1]
        macs = 4 * C * C_out * N + 2 * C_out**2 * N_out + 4 * C_out * C0
        return _part(f"split {i}", model.splits[i], grids[s + 1], C_out, macs)

    embedding = patch * config.in_channels * C0 * tokens[0]
    timestep = TimestepEmbedding.frequencies * C0 + C0**2
    final = tokens[-1] * C0 * patch * config.out_channels + 2 * C0**2
    labels = [] if model.label_embedding is None else [_part("class table", model.label_embedding, None, C0, 0)]
    return [
        _part("patch embedding", model.patch_embedding, grids[0], C0, embedding),
        _part("timestep", model.timestep_embedding, None, C0, timestep),
        *labels,
        stage(0), merge(0), stage(1), merge(1), stage(2), split(0), stage(3), split(1), stage(4),
        _part("final layer", model.final_layer, grids[-1], config.out_channels, final),
    ]  # fmt: skip


def estimate_memory(config: dict, batch_size: int) -> Memory:
    """Bytes for training and inference in float32 with a batch of `batch_size`.

    Weights, gradients, optimiser and EMA are exact. Training activations are what autograd keeps on the Triton
    kernels for one forward pass without gradient checkpointing; temporary tensors are not counted. Attention
    without the kernel keeps `attention_matrices` more: the softmax, of N×N per head. Inference activations are the
    skips and the widest block: the residual stream, its norm, and the two 4·C wide tensors of the MLP.

    Raises:
        ValueError: if batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    model = meta_model(config)
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) * 4
    tokens = [_num_tokens(stage) for stage in model.stages]
    matrices = sum(
        depth * heads * N**2 for depth, heads, N in zip(config.depths, config.num_attention_heads, tokens)
    )
    widths = [N * C for N, C in zip(tokens, config.hidden_sizes)]
    live = sum(widths[:2]) + max((2 + 2 * config.mlp_ratio) * width for width in widths)
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer_state=ADAN_BUFFERS * weights,
        ema=weights,
        training_activations=4 * batch_size * _kept_for_backward(model),
        attention_matrices=4 * batch_size * matrices,
        inference_activations=round(4 * batch_size * live),
    )


def block_grid(stage: nn.Module) -> tuple[int, int]:
    return stage.blocks[0].attn.attention.grid


def _num_tokens(stage: nn.Module) -> int:
    H, W = block_grid(stage)
    return H * W


def _part(name, module, grid, channels, multiply_adds, blocks=0) -> Part:
    return Part(name, grid, channels, blocks, sum(p.numel() for p in module.parameters()), multiply_adds)


def _kept_for_backward(model: EDTTransformer2DModel) -> int:
    """Numbers that autograd keeps for an image on the Triton kernels, each tensor counted once.

    `Block` lists what its blocks keep. Beside those: what enters each stage; the modulations; and for each op the
    norm that the next Linear needs and two statistics for each of its rows.
    """
    config = model.config
    sizes, C0 = config.hidden_sizes, config.hidden_sizes[0]
    tokens = [_num_tokens(stage) for stage in model.stages]

    def stage(i: int) -> int:
        N, C, depth, heads = tokens[i], sizes[i], config.depths[i], config.num_attention_heads[i]
        per_token = 10 * C + int(C * config.mlp_ratio) + heads + 4
        return N * C + depth * (N * per_token + 6 * C)

    def merge(i: int) -> int:
        C, N_out = sizes[i], tokens[i + 1]
        return N_out * (4 * C + 2) + 8 * C

    def split(i: int) -> int:
        C_out, N_out = sizes[i + 3], tokens[i + 3]
        return N_out * (C_out + 2 * C_out + 2) + 4 * C_out  # before the shuffle, after the norm

    height, width = model.latent_size
    conditioning = TimestepEmbedding.frequencies + 4 * C0
    final = tokens[-1] * (C0 + 2) + 2 * C0
    ends = config.in_channels * height * width + conditioning + final
    return ends + sum(map(stage, range(len(sizes)))) + sum(merge(i) + split(i) for i in (0, 1))
