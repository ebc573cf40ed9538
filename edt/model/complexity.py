"""What a model costs: parameters, multiply-adds, memory. All by formulas, so that `edt info` loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..options import check_count, shown
from .presets import DEFAULTS, PRESETS

if TYPE_CHECKING:
    from .layers import Stage
    from .step_cache import StepCacheConfig
    from .transformer import EDTTransformer2DModel

# Tensors of the weights' size that optimisers keep; Adan's are three moments and the previous gradient.
OPTIMIZER_BUFFERS = {"adan": 4, "adamw": 2}

_FLOAT = 4  # bytes of a float32
_BRANCH_BYTES = {"float32": _FLOAT, "bfloat16": 2}
_FREQUENCIES = 256  # of the timestep's sinusoid
_NUM_MODULATIONS = 5 + 2 + 2 + 1  # of the stages, merges, splits and the final layer


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


def meta_model(config: dict) -> "EDTTransformer2DModel":
    """The model of these arguments on the meta device: shapes only, no storage."""
    import torch

    from .transformer import EDTTransformer2DModel

    with torch.device("meta"):
        return EDTTransformer2DModel(**config)


class _Sizes(SimpleNamespace):
    """The arguments of a model, its `grids` and numbers of `tokens` by stage."""

    def __init__(self, model: "EDTTransformer2DModel | Mapping[str, Any]"):
        if isinstance(model, Mapping) and model not in PRESETS.values():
            model = meta_model(dict(model))  # which checks its arguments
        config = model if isinstance(model, Mapping) else model.config
        super().__init__(**{name: config.get(name, default) for name, default in DEFAULTS.items()})
        size = self.sample_size
        self.height, self.width = (size, size) if isinstance(size, int) else size
        shifts = (0, 1, 2, 1, 0)
        self.grids = [tuple(side // self.patch_size >> by for side in (self.height, self.width)) for by in shifts]
        self.tokens = [H * W for H, W in self.grids]

    def hidden(self, stage: int) -> int:
        """Of the stage's MLPs."""
        return int(self.hidden_sizes[stage] * self.mlp_ratio)

    def bias_tables(self, stage: int) -> int:
        """Numbers in the bias tables of the stage's blocks."""
        H, W = self.grids[stage]
        return self.depths[stage] * self.num_attention_heads[stage] * (2 * H - 1) * (2 * W - 1)

    def class_table(self) -> int:
        return (self.num_classes + 1) * self.hidden_sizes[0] if self.num_classes else 0

    def expand(self, split: int) -> int:
        """Weights of a split's first Linear, C → 4·C'."""
        C, C_out = self.hidden_sizes[split + 2 : split + 4]
        return 4 * C * C_out


def cost_table(model: "EDTTransformer2DModel | Mapping[str, Any]") -> list[Part]:
    """Parameters and multiply-adds part by part, of a model or of the arguments of one; they sum to the model's.

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
    return _parts(_Sizes(model))


def _parts(sizes: _Sizes) -> list[Part]:
    widths, grids, tokens, C0 = sizes.hidden_sizes, sizes.grids, sizes.tokens, sizes.hidden_sizes[0]
    patch = sizes.patch_size**2

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs  # weights and biases

    def stage(i: int) -> Part:
        N, C, depth, hidden = tokens[i], widths[i], sizes.depths[i], sizes.hidden(i)
        parameters = linear(C, 3 * C) + linear(C, C) + linear(C, hidden) + linear(hidden, C) + linear(C0, 6 * C)
        per_block = (4 + 2 * sizes.mlp_ratio) * N * C**2 + 2 * N**2 * C + 6 * C * C0
        parameters = depth * parameters + sizes.bias_tables(i)
        return Part(f"stage {i}", grids[i], C, depth, parameters, round(depth * per_block))

    def merge(i: int) -> Part:
        C, C_out, N_out = widths[i], widths[i + 1], tokens[i + 1]
        macs = 4 * C * C_out * N_out + 8 * C * C0
        return Part(f"merge {i}", grids[i + 1], C_out, 0, 4 * C * C_out + linear(C0, 8 * C), macs)

    def split(i: int) -> Part:
        s = i + 2  # the stage whose tokens are split
        C_out, N_out, expand = widths[s + 1], tokens[s + 1], sizes.expand(i)
        parameters = expand + linear(2 * C_out, C_out) + linear(C0, 4 * C_out)
        macs = expand * tokens[s] + 2 * C_out**2 * N_out + 4 * C_out * C0
        return Part(f"split {i}", grids[s + 1], C_out, 0, parameters, macs)

    inputs, outputs = patch * sizes.in_channels, patch * sizes.out_channels
    timestep = _FREQUENCIES * C0 + C0**2
    final = tokens[-1] * C0 * outputs + 2 * C0**2
    return [
        Part("patch embedding", grids[0], C0, 0, linear(inputs, C0), inputs * C0 * tokens[0]),
        Part("timestep", None, C0, 0, linear(_FREQUENCIES, C0) + linear(C0, C0), timestep),
        *([Part("class table", None, C0, 0, sizes.class_table(), 0)] if sizes.num_classes else []),
        stage(0), merge(0), stage(1), merge(1), stage(2), split(0), stage(3), split(1), stage(4),
        Part("final layer", grids[-1], sizes.out_channels, 0, linear(C0, outputs) + linear(C0, 2 * C0), final),
    ]  # fmt: skip


def step_multiply_adds(model: "EDTTransformer2DModel | Mapping[str, Any]") -> dict[str, int]:
    """Of a denoising step of one image without guidance: "full", and what reuses "deep" or "encoder" features.

    See `StepCacheConfig`. Both compute the embeddings, the last split without its first Linear, the last stage
    and the final layer; reusing the encoder, also that Linear, stage 3 and the split before it.
    """
    sizes = _Sizes(model)
    parts = {part.name: part.multiply_adds for part in _parts(sizes)}
    expand = sizes.expand(1) * sizes.tokens[3]
    deep = (
        sum(parts[name] for name in ("patch embedding", "timestep", "split 1", "stage 4", "final layer")) - expand
    )
    encoder = deep + expand + parts["stage 3"] + parts["split 0"]
    return {"full": sum(parts.values()), "deep": deep, "encoder": encoder}


def sampling_multiply_adds(
    model: "EDTTransformer2DModel | Mapping[str, Any]", num_steps: int, config: "StepCacheConfig | None" = None
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
    sizes = _Sizes(config)
    weights = _FLOAT * sum(part.parameters for part in _parts(sizes))
    tables = _FLOAT * (sum(map(sizes.bias_tables, range(5))) + sizes.class_table())
    tokens, layers = sizes.tokens, zip(sizes.depths, sizes.num_attention_heads, sizes.tokens)
    matrices = sum(depth * heads * N**2 for depth, heads, N in layers)
    widths = [N * C for N, C in zip(tokens, sizes.hidden_sizes)]
    live = _FLOAT * sum(widths[:2]) + (_FLOAT + branch * (1 + 2 * sizes.mlp_ratio)) * max(widths)
    samples = 2 * batch_size if two_pass else batch_size
    return Memory(
        weights=weights,
        weight_copies=0 if branch == _FLOAT else (weights - tables) // _FLOAT * branch,  # of Linear and Conv2d
        gradients=weights,
        optimizer_state=OPTIMIZER_BUFFERS[optimizer] * weights,
        ema=weights,
        training_activations=samples * _kept_for_backward(sizes, branch, gradient_checkpointing),
        attention_matrices=_FLOAT * samples * matrices,
        inference_activations=round(batch_size * live),
    )


def block_grid(stage: "Stage") -> tuple[int, int]:
    return stage.blocks[0].attn.attention.grid


def _kept_for_backward(sizes: _Sizes, branch: int, gradient_checkpointing: bool) -> int:
    """Bytes that autograd keeps for an image on the Triton kernels, each tensor counted once.

    `branch`: bytes of a number outside of the residual stream and the statistics, which are float32. `Block` lists
    what its blocks keep. Beside those: what enters each stage; the modulations; and for each op the norm that the
    next Linear needs and two statistics for each of its rows.
    """
    widths, tokens, C0 = sizes.hidden_sizes, sizes.tokens, sizes.hidden_sizes[0]
    statistics = 2 * _FLOAT

    def inside_block(i: int) -> int:
        """All that a block keeps but what enters it and leaves it."""
        C, heads = widths[i], sizes.num_attention_heads[i]
        branches = branch * (8 * C + sizes.hidden(i))
        logsumexp = _FLOAT * heads * (2 if branch == _FLOAT else 1)  # of float32 inputs in two parts
        return tokens[i] * (_FLOAT * C + branches + 2 * statistics + logsumexp)

    def stage(i: int) -> int:
        stream, depth = _FLOAT * tokens[i] * widths[i], sizes.depths[i]
        inside = 0 if gradient_checkpointing else depth * inside_block(i)
        kept = (depth + 1) * stream + depth * branch * 6 * widths[i] + inside
        if i in (2, 3):  # what leaves the stage is only read by a Linear, in its dtype
            kept += (branch - _FLOAT) * tokens[i] * widths[i]
        if sizes.task_routing is not None:  # masks; and blocks keep their window of the stream, not the skip
            kept += (depth + 1) * widths[i] + (stream if i < 2 else 0)
        return kept

    def merge(i: int) -> int:
        C, N_out = widths[i], tokens[i + 1]
        return N_out * (branch * 4 * C + statistics) + branch * 8 * C

    def split(i: int) -> int:
        C_out, N_out = widths[i + 3], tokens[i + 3]
        return N_out * (branch * 3 * C_out + statistics) + branch * 4 * C_out  # before the shuffle, after the norm

    sinusoid_to_cond = branch * (_FREQUENCIES + 2 * C0)
    if sizes.num_classes > 0:  # the class table makes cond float32, and each modulation casts it anew
        cond = C0 * (_FLOAT + (_FLOAT if branch == _FLOAT else _NUM_MODULATIONS * branch))
    else:
        cond = C0 * 2 * branch
    final = tokens[-1] * (branch * C0 + statistics) + branch * 2 * C0
    ends = branch * sizes.in_channels * sizes.height * sizes.width + sinusoid_to_cond + cond + final
    stages = range(len(widths))
    kept = ends + sum(map(stage, stages)) + sum(merge(i) + split(i) for i in (0, 1))
    return kept + (max(map(inside_block, stages)) if gradient_checkpointing else 0)
