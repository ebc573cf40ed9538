"""EDT: the U-shaped diffusion transformer of "EDT: An Efficient Diffusion Transformer Framework Inspired by
Human-like Sketching" (arXiv 2410.23788), as released."""

import inspect
import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from edt_kernels._checks import enabled_autocast_dtype, shown

from .checks import NUM_MERGES, NUM_STAGES, check_block_numbers, check_config, check_inputs
from .layers import (
    FinalLayer,
    PatchEmbedding,
    PositionEmbedding,
    Stage,
    TimestepEmbedding,
    TokenMerge,
    TokenSplitConcat,
)
from .masking import check_draw, draw_keep_mask
from .presets import PRESETS
from .step_cache import NOTHING, Features, StepCache, StepCacheConfig
from .task_routing import routing_mask

# A saved folder brings files that name the installed classes, for diffusers' AutoModel and `trust_remote_code`.
AUTO_MODULE = "edt_transformer"
_AUTO_CODE = """try:
    from edt import {name}  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("edt", "edt_kernels"):  # another one is missing, which the error names
        raise
    raise ImportError("this model needs pip install edt-kernels") from error
"""


def import_code(name: str) -> str:
    """What such a file has in it."""
    return _AUTO_CODE.format(name=name)


@dataclass
class EDTOutput(Transformer2DModelOutput):
    """What the model returns with `return_hidden`: `sample`, and `hidden` (B, N/16, C2) of the middle stage."""

    hidden: Tensor | None = None


class EDTTransformer2DModel(ModelMixin, ConfigMixin, CacheMixin, PeftAdapterMixin):
    """Latents, timesteps and class labels → predicted noise and variance.

    Five stages of adaLN-Zero blocks on the grids H×W, H/2×W/2, H/4×W/4, H/2×W/2, H×W of patches; token merges
    between the first three, token splits with skip connections between the last three. Attention has a learned
    2-D relative position bias and, in evaluation mode in `amm_blocks`, the attention modulation matrix.

    Args:
        sample_size: side of the latents, or (height, width); a multiple of 4·patch_size.
        patch_size: side of the patches that become tokens.
        in_channels, out_channels: of the latents and of the prediction; twice as many where the variance is
            learned.
        num_classes: 0 for an unconditional model. Label `num_classes` is the null class.
        hidden_sizes, num_attention_heads, depths: per stage. hidden_sizes[0] is the conditioning's width too.
        mlp_ratio: hidden width of the MLPs over their input's.
        class_dropout_prob: share of labels replaced by the null class in training mode.
        amm_blocks: 0-based numbers of the blocks with AMM, counted over all stages.
        amm_form, amm_radius: see `edt_kernels.amm_table`.
        mask_ratios: ranges of the drop ratio in the masked pass, for the two merges.
        mid_mask: (block, (low, high)): in the masked pass, before this block of stage 0, dropped tokens are
            replaced by their position.
        task_routing: (beta, alpha) for Denoising Task Routing, such as (0.8, 4.0): every block works on the window
            of channels that the timestep selects, see `edt.model.routing_mask`. It belongs to the weights: what
            was trained with it needs it for sampling.

    Raises:
        TypeError: for an argument of the wrong kind.
        ValueError: for a configuration that does not fit together, or one of more numbers than a machine holds.

    Source: arXiv 2410.23788 and its released implementation.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _repeated_blocks = ("Block",)
    # Block-level offloading takes the lists in these for blocks: what they hold, not the stages as a whole. The
    # numbers are the members of the first three.
    _group_offload_block_modules = ("stages", "merges", "splits", *map(str, range(NUM_STAGES)))
    _skip_layerwise_casting_patterns = ("patch_embedding", "final_layer")
    config: Any  # a FrozenDict, whose entries are attributes; diffusers says dict
    stages: Any  # as `Stage.blocks`
    merges: Any
    splits: Any
    if TYPE_CHECKING:  # diffusers' has torch's type, by functools.wraps, in which no checker finds its self

        def to(self, *args: Any, **kwargs: Any) -> Self: ...

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        num_classes: int = 1000,
        hidden_sizes: tuple[int, ...] = (312, 416, 520, 416, 312),
        num_attention_heads: tuple[int, ...] = (6, 8, 10, 8, 6),
        depths: tuple[int, ...] = (2, 2, 2, 3, 3),
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        amm_blocks: tuple[int, ...] = (),
        amm_form: str = "exp_cos",
        amm_radius: float | None = None,
        mask_ratios: tuple[tuple[float, float], ...] = ((0.4, 0.5), (0.1, 0.2)),
        mid_mask: tuple[int, tuple[float, float]] | None = None,
        task_routing: tuple[float, float] | None = None,
    ):
        super().__init__()
        self._step_cache: StepCache | None = None
        self._context_caches: dict[str, StepCache] = {}
        check_config(self.config)
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.latent_size = (height, width)
        H, W = height // patch_size, width // patch_size
        grids = [(H, W), (H // 2, W // 2), (H // 4, W // 4), (H // 2, W // 2), (H, W)]  # per stage
        cond_channels = hidden_sizes[0]

        self.patch_embedding = PatchEmbedding(in_channels, hidden_sizes[0], patch_size)
        self.position = PositionEmbedding(hidden_sizes[0], grids[0])
        self.timestep_embedding = TimestepEmbedding(cond_channels)
        self.label_embedding = nn.Embedding(num_classes + 1, cond_channels) if num_classes > 0 else None
        self.stages = nn.ModuleList(
            Stage(
                hidden_sizes[i],
                cond_channels,
                num_attention_heads[i],
                mlp_ratio,
                grids[i],
                depths[i],
                amm_form,
                amm_radius,
                mid_block=mid_mask[0] if mid_mask is not None and i == 0 else None,
            )
            for i in range(NUM_STAGES)
        )
        self.merges = nn.ModuleList(
            TokenMerge(hidden_sizes[i], hidden_sizes[i + 1], cond_channels, grids[i]) for i in (0, 1)
        )
        self.splits = nn.ModuleList(
            TokenSplitConcat(hidden_sizes[i], hidden_sizes[i + 1], cond_channels, grids[i]) for i in (2, 3)
        )
        self.final_layer = FinalLayer(hidden_sizes[-1], cond_channels, out_channels, patch_size, grids[-1])
        self.set_amm_blocks(amm_blocks)
        self.initialize_weights()

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """With the file by which `AutoModel.from_pretrained(…, trust_remote_code=True)` finds this class."""
        super().save_config(save_directory)
        Path(save_directory, f"{AUTO_MODULE}.py").write_text(import_code("EDTTransformer2DModel"))
        if push_to_hub:  # what is there by then
            super().save_config(save_directory, push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config["auto_map"] = {"AutoModel": f"{AUTO_MODULE}.EDTTransformer2DModel"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """A folder's config.json without `auto_map`, which is no argument of the model."""
        loaded = super().load_config(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).pop("auto_map", None)
        return loaded

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As any diffusers model's; weights that `ignore_mismatched_sizes` leaves out get initial values."""
        if not kwargs.get("ignore_mismatched_sizes"):
            return super().from_pretrained(*args, **kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        if kwargs.get("device_map") is None:
            kwargs.setdefault("low_cpu_mem_usage", False)  # which would leave them on meta
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # pyright: ignore[reportGeneralTypeIssues] - a pair
        if info["mismatched_keys"]:  # diffusers says "newly initialized", of uninitialised memory
            initial = cls.from_config(model.config)
            with torch.no_grad():
                for name, *_ in info["mismatched_keys"]:
                    model.get_parameter(name).copy_(initial.get_parameter(name))  # pyright: ignore[reportAttributeAccessIssue] - no pair
        return (model, info) if with_info else model  # pyright: ignore[reportReturnType] - as diffusers does

    def set_amm_blocks(self, blocks: tuple[int, ...]) -> None:
        """Places AMM in these blocks, 0-based over all stages; () switches it off. Kept by `save_pretrained`."""
        depths = self.config.depths
        if not isinstance(blocks, (tuple, list, range, set, frozenset)):
            raise TypeError(f"blocks is {shown(blocks)}; it must be a tuple of block numbers")
        check_block_numbers("blocks", blocks, sum(depths))
        first = 0
        for stage, depth in zip(self.stages, depths, strict=True):
            for number, block in enumerate(stage.blocks, start=first):
                block.attn.attention.amm = "inference" if number in blocks else "never"
            first += depth
        self.register_to_config(amm_blocks=tuple(blocks))

    def initialize_weights(self) -> None:
        """Linear and patch embedding xavier-uniform with zero bias; class table and timestep Linears N(0, 0.02);
        bias tables truncated normal 0.02; the blocks' and the final modulations and the final Linear zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.timestep_embedding.fc1.weight, std=0.02)
        nn.init.normal_(self.timestep_embedding.fc2.weight, std=0.02)
        if self.label_embedding is not None:
            nn.init.normal_(self.label_embedding.weight, std=0.02)
        zero = [self.final_layer.modulation.linear, self.final_layer.linear]
        for stage in self.stages:
            for block in stage.blocks:
                block.attn.attention.reset_parameters()
            zero.append(stage.modulation.linear)
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def draw_keep_masks(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> list[Tensor]:
        """The masks of one masked pass, in order of use: (batch_size, N) bool, True keeps the token.

        With `mid_mask` the first is of stage 0's tokens; then one for each merge, of the tokens it gathers.
        `device` defaults to the generator's, else to the model's.

        Raises:
            TypeError, ValueError: for a batch size, generator or device that does not fit.
        """
        device = check_draw(batch_size, generator, device) or self.device
        draws = [(self.merges[i].grid, ratios) for i, ratios in enumerate(self.config.mask_ratios)]
        if self.config.mid_mask is not None:
            draws.insert(0, (self.merges[0].grid, self.config.mid_mask[1]))
        return [draw_keep_mask(batch_size, math.prod(grid), ratios, generator, device) for grid, ratios in draws]

    def draw_label_drops(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor | None:
        """u[b] < class_dropout_prob: (batch_size,) bool, True where the label becomes the null class.

        None for an unconditional model, which has no labels. `device` defaults to the generator's, else to the
        model's.

        Raises:
            TypeError, ValueError: for a batch size, generator or device that does not fit.
        """
        device = check_draw(batch_size, generator, device) or self.device
        if self.label_embedding is None:
            return None
        return torch.rand(batch_size, generator=generator, device=device) < self.config.class_dropout_prob

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        keep_masks: list[Tensor] | None = None,
        return_dict: bool = True,
        label_drops: Tensor | None = None,
        return_hidden: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor, ...]:
        """Predicts noise and, where out_channels is twice in_channels, the variance's interpolation.

        Args:
            hidden_states: noised latents (B, in_channels, height, width).
            timestep: (B,) or a scalar, 0 to 999, any finite real numbers.
            class_labels: (B,) integers, 0 to num_classes, the last of them null; None for unconditional models.
            keep_masks: the masked pass: (B, N) bools in order of use, as `draw_keep_masks` returns them.
            return_dict: False for a plain tuple.
            label_drops: (B,) bool, in either mode: which labels become the null class. None: in training mode
                drawn from the global generator, as `draw_label_drops` draws them; none in evaluation mode.
            return_hidden: also the output of the middle stage, to align it with features of the images.

        Returns:
            `Transformer2DModelOutput` whose `sample` is (B, out_channels, height, width); with `return_hidden`
            `EDTOutput`, whose `hidden` is (B, N/16, C2), C2 the channels of stage 2. As a tuple: (sample,) or
            (sample, hidden).

        Raises:
            ValueError, TypeError: for an argument that does not fit the configuration; class labels out of range
                and timesteps that are not finite are only found on a CPU, outside of graphs and transforms.
        """
        check_inputs(self, hidden_states, timestep, class_labels, keep_masks, label_drops)
        middle, skip, expanded = self._reused_features(hidden_states, keep_masks, return_hidden)
        masks = [None] * NUM_MERGES if keep_masks is None else list(keep_masks)
        mid_keep = masks.pop(0) if len(masks) > NUM_MERGES else None

        stream_dtype = hidden_states.dtype
        if enabled_autocast_dtype(hidden_states) is not None:  # which is for products; sums of blocks stay exact
            stream_dtype = torch.promote_types(stream_dtype, torch.float32)
        tokens = x = self.position(self.patch_embedding(hidden_states), stream_dtype)  # (B, N, C0)
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(hidden_states.shape[0])
        cond = self._embed_conditioning(timestep, class_labels, hidden_states.dtype, label_drops)
        cond = F.silu(cond)  # (B, C0), once for all modulations
        routing = self._routing_masks(timestep)  # a stage: (B, 1, C) or None

        if middle is None and expanded is None:
            positions = None if mid_keep is None else self.position.constant_on("table", x.device)
            x = self.stages[0](x, cond, mid_keep, replacement=positions, routing=routing[0])
            skip = x = self.merges[0](x, cond, masks[0])  # (B, N/4, C1)
            x = self.stages[1](x, cond, routing=routing[1])
            x = self.merges[1](x, cond, masks[1])  # (B, N/16, C2)
            middle = self.stages[2](x, cond, routing=routing[2])
        if expanded is None:
            x, _ = self.splits[0](middle, skip, cond)  # (B, N/4, C3)
            x = self.stages[3](x, cond, routing=routing[3])
        x, expanded = self.splits[1](x, tokens, cond, expanded)  # (B, N, C4)
        if self._step_cache is not None:
            self._step_cache.store(middle, skip, expanded)
        del tokens, skip, expanded  # not to be held through the last stage, which takes the most memory
        x = self.stages[4](x, cond, routing=routing[4])

        sample = self.final_layer(x, cond)
        if return_hidden:
            return EDTOutput(sample=sample, hidden=middle) if return_dict else (sample, middle)  # pyright: ignore[reportReturnType] - computed: no cache
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def enable_cache(self, config: StepCacheConfig) -> None:
        """Faster sampling: from now on calls are the denoising steps of a sampling, and only some are full.

        One call is one step: guidance runs both passes as one batch. `reset_cache` begins a new sampling, as
        `edt.sample` does. A step whose batch size, dtype or device is another than that of the stored features is
        computed in full, and the schedule goes on. The features live until the next full step, `reset_cache` or
        `disable_cache`; they are part of no checkpoint.

        Only sampling can be cached: until `disable_cache`, the model raises ValueError in training mode, with
        gradients enabled, with keep_masks and with return_hidden. `torch.compile` compiles a graph for full steps
        and one for the others, so fullgraph=True, and mode="reduce-overhead", which reuses its outputs' memory,
        need the cache disabled; for CUDA graphs of cached steps there is `edt.GraphedStep`.

        Raises:
            TypeError: for a config of another class.
            ValueError: if a cache is enabled already.
        """
        if not isinstance(config, StepCacheConfig):
            raise TypeError(
                f"config is a {type(config).__name__}; it must be an edt.StepCacheConfig: diffusers' caches skip "
                "blocks of one shape in a row, and a U has none"
            )
        if self._step_cache is not None:
            raise ValueError(f"a cache is enabled, {self._step_cache.config}; call disable_cache() first")
        self._step_cache = StepCache(config)

    def disable_cache(self) -> None:
        """Computes every call in full again, and lets go of stored features; nothing where none is enabled."""
        self._step_cache, self._context_caches = None, {}

    @property
    def is_cache_enabled(self) -> bool:
        return self._step_cache is not None

    def reset_cache(self) -> None:
        """Begins a new sampling: the next call is step 0, and stored features are let go."""
        self._context_caches = {}
        if self._step_cache is not None:
            self._step_cache.reset()

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """By this name diffusers' pipelines reset a model's cache when they are done."""
        self.reset_cache()

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any):
        """Within it, calls are the steps of the sampling `name`: passes of one step that are calls of their own,
        such as "cond" and "uncond", count steps and keep features apart. Nothing where no cache is enabled."""
        outer = self._step_cache
        if outer is not None:
            self._step_cache = self._context_caches.setdefault(name, StepCache(outer.config))
        try:
            yield
        finally:
            if self._step_cache is not None:  # else it was disabled within
                self._step_cache = outer

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As any diffusers model's. A stage's shapes, AMM, a block's place in its stage and the mode make 10 to 24
        variants of a block, more than torch compiles of one function by default: `recompile_limit` allows four for
        each block where it is not given."""
        limit = 4 * sum(self.config.depths)
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            kwargs.setdefault("recompile_limit", limit)
        else:  # torch 2.11 and 2.12 have it for the whole process only, and read it when a variant is compiled
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        super().compile_repeated_blocks(*args, **kwargs)

    def set_attention_backend(self, backend: str) -> None:
        """Raises ValueError: `edt_kernels.amm_attention` has no other backends than its own two."""
        raise ValueError(
            f"backend is {shown(backend)}; EDT's attention has a bias and a modulation that diffusers' backends "
            "do not know. On a GPU it runs on its Triton kernels; the environment variable EDT_KERNELS_BACKEND "
            "chooses (triton or reference)"
        )

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Raises ValueError where `valid`: as `set_attention_backend`."""
        if valid:
            self.set_attention_backend("xformers")

    def _reused_features(self, hidden_states: Tensor, keep_masks, return_hidden: bool) -> Features:
        """Begins a step of the cache, where one is enabled."""
        if self._step_cache is None:
            return NOTHING
        for fault, name in (
            (self.training, "training mode"),
            (torch.is_grad_enabled(), "gradients enabled"),
            (keep_masks is not None, "keep_masks"),
            (return_hidden, "return_hidden"),
        ):
            if fault:
                raise ValueError(
                    f"a step cache is enabled, and the model is called with {name}; only sampling can be cached, "
                    "call disable_cache() first"
                )
        return self._step_cache.begin_step((hidden_states.shape, hidden_states.dtype, hidden_states.device))

    def _embed_conditioning(self, timestep: Tensor, class_labels, dtype: torch.dtype, label_drops) -> Tensor:
        cond = self.timestep_embedding(timestep, dtype)
        if self.label_embedding is None:
            return cond
        if label_drops is None and self.training and self.config.class_dropout_prob > 0:
            label_drops = self.draw_label_drops(timestep.shape[0], device=timestep.device)
        if label_drops is not None:
            class_labels = torch.where(label_drops, self.config.num_classes, class_labels)
        return cond + self.label_embedding(class_labels)

    def _routing_masks(self, timestep: Tensor) -> list[Tensor | None]:
        if self.config.task_routing is None:
            return [None] * NUM_STAGES
        return [
            routing_mask(timestep, channels, *self.config.task_routing) for channels in self.config.hidden_sizes
        ]


def load_preset(name: str, **overrides: Any) -> EDTTransformer2DModel:
    """A freshly initialised model of a preset (`edt.PRESETS`), with any of its arguments replaced.

    Raises:
        ValueError: for a name that is no preset.
        TypeError: for an override that is no argument of the model; both as the model itself.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"name is {shown(name)}; it must be one of {', '.join(PRESETS)}")
    return EDTTransformer2DModel(**{**PRESETS[name], **overrides})
