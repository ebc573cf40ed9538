"""What a model costs: parameters, multiply-adds, memory."""

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

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

    Weights, gradients, optimiser and EMA are exact. Training activations are what autograd keeps for one
    forward pass, counted while fake tensors run through the reference path; of that,
    `attention_matrices` (of N×N per head) are reported apart and left out, because the fused attention does
    not write them. Inference activations are the skips and the widest block: the residual stream, its norm,
    and the two 4·C wide tensors of the MLP.

    Raises:
        ValueError: if batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    model = meta_model(config)
    weights = sum(p.numel() for p in model.parameters()) * 4
    kept, attention_matrices = _saved_for_backward(config, batch_size)
    stages = [(stage, C) for stage, C in zip(model.stages, model.config.hidden_sizes)]
    widths = [_num_tokens(stage) * C for stage, C in stages]
    live = sum(widths[:2]) + max((2 + 2 * model.config.mlp_ratio) * width for width in widths)
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer_state=ADAN_BUFFERS * weights,
        ema=weights,
        training_activations=kept,
        attention_matrices=attention_matrices,
        inference_activations=round(4 * batch_size * live),
    )


def block_grid(stage: nn.Module) -> tuple[int, int]:
    return stage.blocks[0].attn.attention.grid


def _num_tokens(stage: nn.Module) -> int:
    H, W = block_grid(stage)
    return H * W


def _part(name, module, grid, channels, multiply_adds, blocks=0) -> Part:
    return Part(name, grid, channels, blocks, sum(p.numel() for p in module.parameters()), multiply_adds)


def _saved_for_backward(config: dict, batch_size: int) -> tuple[int, int]:
    """Bytes that autograd keeps: (all but N×N attention matrices, those matrices)."""
    storages, matrices = {}, {}
    # Fake tensors have no storage either, but a real device type, which autocast asks for. Labels have values
    # that the model checks; without classes it keeps the same but for a vector.
    model = meta_model({**config, "num_classes": 0}).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        token_counts = {_num_tokens(stage) for stage in model.stages}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                square = tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2] in token_counts
                (matrices if square else storages)[storage._cdata] = storage  # held, so that no address recurs
            return tensor

        latents = torch.empty(batch_size, model.config.in_channels, *model.latent_size)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(latents, torch.empty(batch_size, dtype=torch.int64)).sample
        del output
    return tuple(sum(storage.nbytes() for storage in group.values()) for group in (storages, matrices))
