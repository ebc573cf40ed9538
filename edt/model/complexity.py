"""What a model costs: parameters, multiply-adds, memory."""

from dataclasses import dataclass

import torch
from torch import nn

from edt_kernels._checks import shown

from ..options import check_count
from .layers import Modulation, TimestepEmbedding
from .step_cache import StepCacheConfig
from .transformer import EDTTransformer2DModel, Stage

# Tensors of the weights' size that optimisers keep; Adan's are three moments and the previous gradient.
OPTIMIZER_BUFFERS = {"adan": 4, "adamw": 2}

_FLOAT = 4  # bytes of a float32
_BRANCH_BYTES = {"float32": _FLOAT, "bfloat16": 2}


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
    """Estimates in bytes; activations are for the batch, the rest is independent of it."""

    weights: int
    weight_copies: int
    gradients: int
    optimizer_state: int
    ema: int
    training_activations: int
    attention_matrices: int
    inference_activations: int

    @property
    def training(self) -> int:
        per_weight = self.weights + self.weight_copies + self.gradients + self.optimizer_state + self.ema
        return per_weight + self.training_activations

    @property
    def inference(self) -> int:
        return self.weights + self.weight_copies + self.inference_activations


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
        C_out, N_out = sizes[s + 1], tokens[s + 1]
        macs = _expand_multiply_adds(model, i) + 2 * C_out**2 * N_out + 4 * C_out * C0
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


def step_multiply_adds(model: EDTTransformer2DModel) -> dict[str, int]:
    """Of a denoising step of one image without guidance: "full", and what reuses "deep" or "encoder" features.

    See `StepCacheConfig`. Both compute the embeddings, the last split without its first Linear, the last stage
    and the final layer; reusing the encoder, also that Linear, stage 3 and the split before it.
    """
    parts = {part.name: part.multiply_adds for part in cost_table(model)}
    expand = _expand_multiply_adds(model, 1)
    deep = (
        sum(parts[name] for name in ("patch embedding", "timestep", "split 1", "stage 4", "final layer")) - expand
    )
    encoder = deep + expand + parts["stage 3"] + parts["split 0"]
    return {"full": sum(parts.values()), "deep": deep, "encoder": encoder}


def sampling_multiply_adds(
    model: EDTTransformer2DModel, num_steps: int, config: StepCacheConfig | None = None
) -> int:
    """Of all steps of sampling one image without guidance, with a step cache or without."""
    costs = step_multiply_adds(model)
    if config is None:
        return num_steps * costs["full"]
    return sum(costs["full" if config.is_full(step) else config.reuse] for step in range(num_steps))


def estimate_memory(
    config: dict,
    batch_size: int,
    *,
    precision: str = "float32",
    gradient_checkpointing: bool = False,
    two_pass: bool = False,
    optimizer: str = "adan",
) -> Memory:
    """Bytes for training and inference with a batch of `batch_size` images.

    Weights, gradients, optimiser and EMA are exact and float32. Training activations are what autograd keeps on
    the Triton kernels for one forward pass; temporary tensors are not counted. Attention without the kernel keeps
    `attention_matrices` more: the softmax, of N×N per head. Inference activations are the skips and the widest
    block: the residual stream, its norm, and the two 4·C wide tensors of the MLP.

    Args:
        config: arguments of `EDTTransformer2DModel`.
        precision: "float32", or "bfloat16" for autocast: matrix products, norms and modulations in 16 bits, the
            residual stream in float32, and `weight_copies` for the weights that autocast has cast.
        gradient_checkpointing: of a block only what enters it is kept, and in the backward pass everything of the
            one that takes most. All of `weight_copies` are counted with it, though the backward pass holds those
            of one block at a time.
        optimizer: "adan" or "adamw".
        two_pass: masking training with both passes in one batch: activations of 2·batch_size. Not for inference.

    Raises:
        TypeError, ValueError: if batch_size is no integer from 1, or precision is another.
    """
    check_count("batch_size", batch_size)
    if precision not in _BRANCH_BYTES:
        raise ValueError(
            f"precision is {shown(precision)}; it must be one of {', '.join(map(repr, _BRANCH_BYTES))}"
        )
    if optimizer not in OPTIMIZER_BUFFERS:
        raise ValueError(
            f"optimizer is {shown(optimizer)}; it must be one of {', '.join(map(repr, OPTIMIZER_BUFFERS))}"
        )
    branch = _BRANCH_BYTES[precision]
    model = meta_model(config)
    sizes = model.config
    weights = sum(p.numel() for p in model.parameters()) * _FLOAT
    copies = 0
    if branch != _FLOAT:
        cast = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        copies = branch * sum(p.numel() for module in cast for p in module.parameters())
    tokens = [_num_tokens(stage) for stage in model.stages]
    matrices = sum(
        depth * heads * N**2 for depth, heads, N in zip(sizes.depths, sizes.num_attention_heads, tokens)
    )
    widths = [N * C for N, C in zip(tokens, sizes.hidden_sizes)]
    live = _FLOAT * sum(widths[:2]) + (_FLOAT + branch * (1 + 2 * sizes.mlp_ratio)) * max(widths)
    samples = 2 * batch_size if two_pass else batch_size
    return Memory(
        weights=weights,
        weight_copies=copies,
        gradients=weights,
        optimizer_state=OPTIMIZER_BUFFERS[optimizer] * weights,
        ema=weights,
        training_activations=samples * _kept_for_backward(model, branch, gradient_checkpointing),
        attention_matrices=_FLOAT * samples * matrices,
        inference_activations=round(batch_size * live),
    )


def block_grid(stage: Stage) -> tuple[int, int]:
    return stage.blocks[0].attn.attention.grid


def _num_tokens(stage: Stage) -> int:
    H, W = block_grid(stage)
    return H * W


def _expand_multiply_adds(model: EDTTransformer2DModel, i: int) -> int:
    """Of a split's first Linear, C → 4·C'."""
    C, C_out = model.config.hidden_sizes[i + 2 : i + 4]
    return 4 * C * C_out * _num_tokens(model.stages[i + 2])


def _part(name, module, grid, channels, multiply_adds, blocks=0) -> Part:
    return Part(name, grid, channels, blocks, sum(p.numel() for p in module.parameters()), multiply_adds)


def _kept_for_backward(model: EDTTransformer2DModel, branch: int, gradient_checkpointing: bool) -> int:
    """Bytes that autograd keeps for an image on the Triton kernels, each tensor counted once.

    `branch`: bytes of a number outside of the residual stream and the statistics, which are float32. `Block` lists
    what its blocks keep. Beside those: what enters each stage; the modulations; and for each op the norm that the
    next Linear needs and two statistics for each of its rows.
    """
    config = model.config
    sizes, C0 = config.hidden_sizes, config.hidden_sizes[0]
    tokens = [_num_tokens(stage) for stage in model.stages]
    statistics = 2 * _FLOAT

    def inside_block(i: int) -> int:
        """All that a block keeps but what enters it and leaves it."""
        C, heads = sizes[i], config.num_attention_heads[i]
        branches = branch * (8 * C + int(C * config.mlp_ratio))
        logsumexp = _FLOAT * heads * (2 if branch == _FLOAT else 1)  # of float32 inputs in two parts
        return tokens[i] * (_FLOAT * C + branches + 2 * statistics + logsumexp)

    def stage(i: int) -> int:
        stream, depth = _FLOAT * tokens[i] * sizes[i], config.depths[i]
        inside = 0 if gradient_checkpointing else depth * inside_block(i)
        kept = (depth + 1) * stream + depth * branch * 6 * sizes[i] + inside
        if i in (2, 3):  # what leaves the stage is only read by a Linear, in its dtype
            kept += (branch - _FLOAT) * tokens[i] * sizes[i]
        if config.task_routing is not None:  # masks; and blocks keep their window of the stream, not the skip
            kept += (depth + 1) * sizes[i] + (stream if i < 2 else 0)
        return kept

    def merge(i: int) -> int:
        C, N_out = sizes[i], tokens[i + 1]
        return N_out * (branch * 4 * C + statistics) + branch * 8 * C

    def split(i: int) -> int:
        C_out, N_out = sizes[i + 3], tokens[i + 3]
        return N_out * (branch * 3 * C_out + statistics) + branch * 4 * C_out  # before the shuffle, after the norm

    height, width = model.latent_size
    sinusoid_to_cond = branch * (TimestepEmbedding.frequencies + 2 * C0)
    if config.num_classes > 0:  # the class table makes cond float32, and each modulation casts it anew
        num_modulations = sum(isinstance(module, Modulation) for module in model.modules())
        cond = C0 * (_FLOAT + (_FLOAT if branch == _FLOAT else num_modulations * branch))
    else:
        cond = C0 * 2 * branch
    final = tokens[-1] * (branch * C0 + statistics) + branch * 2 * C0
    ends = branch * config.in_channels * height * width + sinusoid_to_cond + cond + final
    stages = range(len(sizes))
    kept = ends + sum(map(stage, stages)) + sum(merge(i) + split(i) for i in (0, 1))
    return kept + (max(map(inside_block, stages)) if gradient_checkpointing else 0)
