"""Attention modulated by token distance, by attention processors."""

import inspect
import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from ..._checks import check_grid
from ..._tracing import in_func_transform
from ...amm_attention import amm_attention, amm_table
from ...nn import HasConstants
from ._models import blocks_of, supported

_PRESETS = {"dit-xl": (15, 17, 19, 22, 24), "dit-s": (8, 10)}


def apply_amm(
    model: nn.Module,
    blocks: Iterable[int] | str,
    grid: tuple[int, int] | None = None,
    form: str = "exp_cos",
    radius: float | None = None,
) -> None:
    """softmax(q·kᵀ·D^−½) ⊙ m[Δ] · v by `edt_kernels.amm_attention` in the chosen blocks' attention, in place.

    m is `amm_table`'s for pairs of image tokens, 1 for pairs with a text token. It applies in training and in
    evaluation mode. Projections, norms and rotary embeddings are the model's own, whatever they were replaced by.

    - DiT, PixArt: `attn1`, the attention among image tokens.
    - Stable Diffusion 3: `attn`, joint with text. In 3.5's dual blocks `attn2` too, which image tokens have alone.
    - Flux: `attn`, joint with text.

    ```python
    apply_amm(transformer, "dit-xl")
    apply_amm(flux, [19, 23, 27], grid=(64, 64))  # of 1024×1024 pixels
    ```

    Args:
        model: a `DiTTransformer2DModel`, `PixArtTransformer2DModel`, `SD3Transformer2DModel` or
            `FluxTransformer2DModel`, also as `torch.compile` returned it. Projections that
            `model.fuse_qkv_projections` is to fuse must be fused before.
        blocks: numbers counted from 0, in Flux through the double and then the single blocks; or the published
            placement "dit-xl" (15, 17, 19, 22, 24) or "dit-s" (8, 10).
        grid: (H, W) of the image tokens. None: square, by the model's sample_size and patch_size, which Flux does
            not have.
        form, radius: see `amm_table`.

    Raises:
        TypeError: for another model, or a block number that is no integer.
        ValueError: for blocks that the model has not, that repeat, or whose attention processor is not diffusers'
            default; for a grid, form or radius that `amm_table` refuses; when AMM is in place already. Nothing is
            changed then. At run time: for images of another grid, also one of as many tokens (of Flux's only in
            eager mode, which can read `img_ids`); when AMM's processors have been replaced since, as an IP adapter
            and `fuse_qkv_projections` do; for an attention mask; by the Triton kernels, for head dims above 128.

    Source: EDT (arXiv 2410.23788), section 3.2 and its plug-in experiments. Has not run on a GPU.
    """
    model = supported(model)
    if _guard(model) is not None:
        raise ValueError("model has AMM in place already; call remove_amm first")
    chosen = _choose(blocks, blocks_of(model))
    grid = _default_grid(model) if grid is None else check_grid(grid)
    with torch.inference_mode(False):  # later calls may need gradients
        table = amm_table(grid, form=form, radius=radius, device="cpu")
    replacements = [
        (number, attn, _make_processor(number, attn, grid, table))
        for number, block in chosen.items()
        for attn in _image_attentions(block)
    ]
    for _, attn, processor in replacements:
        attn.set_processor(processor)
    _Guard(grid, replacements).install(model)


def remove_amm(model: nn.Module) -> None:
    """Puts back the attention processors that `apply_amm` replaced: the model is what it was, bit for bit.

    Processors that were set over AMM since stay.

    Raises:
        TypeError: for a model that `apply_amm` does not take.
        ValueError: if there is no AMM in place.
    """
    guard = _guard(supported(model))
    if guard is None:
        raise ValueError("model has no AMM in place")
    for _, attn, processor in guard.replacements:
        if attn.processor is processor:
            attn.set_processor(processor.replaced)
    guard.hook.remove()


def _guard(model) -> "_Guard | None":
    hooks = model._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, _Guard)), None)


class _Guard:
    """A pre-hook of the model, which is the one that sees images: its attentions see how many tokens, not of what
    grid, and a processor that was replaced sees nothing."""

    def __init__(self, grid, replacements):
        self.grid = grid
        self.replacements = replacements  # (block's number, attention, AMM's processor)
        self.hook: Any = None  # what install gets
        self.img_ids_place = None  # among the model's positional arguments
        self.last_img_ids = None

    def install(self, model) -> None:
        self.hook = model.register_forward_pre_hook(self, with_kwargs=True)
        names = list(inspect.signature(model.forward).parameters)
        self.img_ids_place = names.index("img_ids") if "img_ids" in names else None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "last_img_ids": None}  # a weak reference

    def __call__(self, model, args, kwargs) -> None:
        for number, attn, processor in self.replacements:
            if attn.processor is not processor:
                raise ValueError(
                    f"the attention processor of block {number} is {type(attn.processor).__name__}, set over AMM "
                    "since apply_amm; call remove_amm to go on without AMM. Adapters and fused projections come "
                    "before apply_amm, which takes the blocks that they leave a default processor"
                )
        hidden_states = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden_states, Tensor):
            return  # the model says what is missing
        if hidden_states.ndim == 4:  # (B, C, height, width) of latents
            patch = model.config.patch_size
            grid = tuple(side // patch for side in hidden_states.shape[2:])
            if grid != self.grid:
                self.refuse(f"{grid[0] * grid[1]} image tokens of a grid {grid}")
            return
        if hidden_states.shape[1] != self.grid[0] * self.grid[1]:  # Flux packs patches: (B, H·W, C)
            self.refuse(f"{hidden_states.shape[1]} image tokens")
        place = self.img_ids_place
        img_ids = args[place] if place is not None and place < len(args) else kwargs.get("img_ids")
        if isinstance(img_ids, Tensor) and not self._positions_fit(img_ids):
            self.refuse(f"{hidden_states.shape[1]} image tokens whose img_ids are not of this grid")

    def refuse(self, given) -> None:
        raise ValueError(
            f"the sequence has {given}, but AMM was applied with grid {self.grid}, {math.prod(self.grid)} tokens; "
            "call remove_amm, then apply_amm with the grid of these images"
        )

    def _positions_fit(self, img_ids) -> bool:
        """Whether img_ids (N, 3), of (_, row, column), are row-major on H×W; True where they cannot be read."""
        if torch.compiler.is_compiling() or img_ids.is_meta or in_func_transform():
            return True
        if (
            img_ids.is_cuda
        ):  # reading waits for the GPU: once for a tensor, of which a pipeline has one for all steps
            if self.last_img_ids is not None and self.last_img_ids() is img_ids:
                return True
            if torch.cuda.is_current_stream_capturing():
                return True
        rows, columns = img_ids.flatten(0, -2)[: math.prod(self.grid), -2:].unflatten(0, self.grid).unbind(-1)
        fit = bool(((rows == rows[:, :1]) & (columns == columns[:1])).all())
        if fit:
            self.last_img_ids = weakref.ref(img_ids)
        return fit


def _choose(blocks, available) -> dict[int, nn.Module]:
    """The chosen blocks by number."""
    if isinstance(blocks, str):
        if blocks not in _PRESETS:
            raise ValueError(f"blocks is {blocks!r}; presets are {', '.join(map(repr, _PRESETS))}")
        numbers, name = _PRESETS[blocks], f"blocks {blocks!r} is {_PRESETS[blocks]}"
    else:
        try:
            numbers = tuple(blocks)
        except TypeError:
            numbers = ()
        name = f"blocks is {blocks!r}"
        if not numbers or any(type(number) is not int for number in numbers):
            raise TypeError(f"{name}; it must be one or more block numbers, or the name of a preset")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}; no block may be given twice")
    if min(numbers) < 0 or max(numbers) >= len(available):
        raise ValueError(f"{name}; the model has the blocks 0 to {len(available) - 1}")
    return {number: available[number] for number in numbers}


def _default_grid(model) -> tuple[int, int]:
    if "sample_size" not in model.config:
        raise ValueError(f"grid is None; a {type(model).__name__} has no sample_size to take it from")
    side = model.config.sample_size // model.config.patch_size
    return side, side


def _image_attentions(block) -> list[Any]:
    """DiT's and PixArt's block has attn1, whose attn2 is to the text; the others' attn and, in SD3.5, attn2."""
    if hasattr(block, "attn1"):
        return [block.attn1]
    dual = getattr(block, "attn2", None)
    return [block.attn] if dual is None else [block.attn, dual]


def _make_processor(number, attn, grid, table) -> "_AMMProcessor":
    replaced = attn.processor
    if type(replaced) not in _STAND_INS:
        raise ValueError(
            f"block {number} has the attention processor {type(replaced).__name__}, which AMM would silently "
            f"replace; it must be diffusers' default ({', '.join(each.__name__ for each in _STAND_INS)})"
        )
    if type(replaced) is FusedJointAttnProcessor2_0 and attn.norm_q is not None:
        raise ValueError(
            f"block {number} has the attention processor FusedJointAttnProcessor2_0, which leaves out the block's "
            "norms of queries and keys; call unfuse_qkv_projections first"
        )
    tensor = next((tensor for tensors in (attn.parameters(), attn.buffers()) for tensor in tensors), table)
    device = table.device if tensor.is_meta else tensor.device
    return _STAND_INS[type(replaced)](replaced, grid, table.to(device, copy=True))


class _AMMProcessor(HasConstants):
    """Holds the table, so that it moves with the model, and the processor that this one stands in for.

    No hooks that load weights are called for a processor, as it is called itself and not as a module: the table is
    no buffer.
    """

    grid: tuple[int, int]

    def __init__(self, replaced=None, grid: Any = None, table: Any = None):
        if replaced is None:
            raise ValueError(
                "AMM is in place, whose attention processors cannot be made anew, as loading an IP adapter does: "
                "call remove_amm, load it, then apply_amm for blocks that it leaves a default processor"
            )
        super().__init__()
        self.replaced = replaced
        self.grid = grid
        self.register_constant("modulation", table)

    def extra_repr(self) -> str:
        return f"grid={self.grid}"

    def check(self, num_image_tokens, attention_mask=None) -> None:
        H, W = self.grid
        if num_image_tokens != H * W:
            raise ValueError(
                f"the sequence has {num_image_tokens} image tokens, but AMM was applied with grid {self.grid}, "
                f"{H * W} tokens; call remove_amm, then apply_amm with the grid of these images"
            )
        if attention_mask is not None:
            raise ValueError("attention_mask was given to a block with AMM; amm_attention takes no mask")

    def attend(self, q, k, v, num_extra_tokens=(0, 0)) -> Tensor:
        """(B, N, heads, D) each → (B, N, heads·D)."""
        table = self.constant_on("modulation", q.device)
        out = amm_attention(q, k, v, grid=self.grid, modulation=table, num_extra_tokens=num_extra_tokens)
        return out.flatten(2)


class AMMAttnProcessor(_AMMProcessor):
    """Of DiT and PixArt: image tokens alone."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        self.check(hidden_states.shape[1], attention_mask)
        packed = isinstance(self.replaced, FusedAttnProcessor2_0)
        out = self.attend(*_image_projections(attn, hidden_states, packed))
        return attn.to_out[1](attn.to_out[0](out))


class AMMJointAttnProcessor(_AMMProcessor):
    """Of Stable Diffusion 3: image tokens, then text; in `attn2` image tokens alone."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        self.check(num_image := hidden_states.shape[1], attention_mask)
        packed = isinstance(self.replaced, FusedJointAttnProcessor2_0)
        image = _image_projections(attn, hidden_states, packed)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](self.attend(*image)))
        text = _text_projections(attn, encoder_hidden_states, packed)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(image, text, strict=True))
        out = self.attend(q, k, v, (0, encoder_hidden_states.shape[1]))
        image, text = out[:, :num_image], out[:, num_image:]
        text = text if attn.context_pre_only else attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text


class AMMFluxAttnProcessor(_AMMProcessor):
    """Of Flux: text, then image tokens. A double block passes them apart, a single block as one sequence."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        single = encoder_hidden_states is None
        num_image = self.grid[0] * self.grid[1] if single else hidden_states.shape[1]  # the guard has checked it
        self.check(num_image, attention_mask)
        q, k, v = _image_projections(attn, hidden_states, attn.fused_projections)
        if not single:
            text = _text_projections(attn, encoder_hidden_states, attn.fused_projections)
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, (q, k, v), strict=True))
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(each, image_rotary_emb, sequence_dim=1) for each in (q, k))
        num_text = v.shape[1] - num_image
        out = self.attend(q, k, v, (num_text, 0))
        if single:
            return out
        text, image = out[:, :num_text].contiguous(), out[:, num_text:].contiguous()
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


_STAND_INS = {
    AttnProcessor2_0: AMMAttnProcessor,
    FusedAttnProcessor2_0: AMMAttnProcessor,
    JointAttnProcessor2_0: AMMJointAttnProcessor,
    FusedJointAttnProcessor2_0: AMMJointAttnProcessor,
    FluxAttnProcessor: AMMFluxAttnProcessor,
}


def _image_projections(attn, x, packed) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of image tokens, (B, N, heads, D)."""
    projected = attn.to_qkv(x).chunk(3, dim=-1) if packed else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
    return _split_heads(attn, projected, attn.norm_q, attn.norm_k)


def _text_projections(attn, x, packed) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of text tokens, (B, N, heads, D)."""
    if packed:
        projected = attn.to_added_qkv(x).chunk(3, dim=-1)
    else:
        projected = attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x)
    return _split_heads(attn, projected, attn.norm_added_q, attn.norm_added_k)


def _split_heads(attn, projected, norm_q, norm_k) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = attn.inner_dim // attn.heads
    q, k, v = (each.unflatten(-1, (-1, head_dim)) for each in projected)  # heads: fewer under tensor parallelism
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v
