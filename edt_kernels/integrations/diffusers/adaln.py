"""LayerNorm, modulation, gate and residual by the fused ops, by blocks and norms of another class.

Each class here is diffusers' class of the same name with another `forward`; a module gets it by its `__class__`.
So parameters, hooks and submodules stay, and what goes by a class's name, such as `_no_split_modules` and
`compile_repeated_blocks`, still finds it. Projections are called as modules, whatever they were replaced with.
"""

import dataclasses
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models import attention, normalization
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from ..._checks import enabled_autocast_dtype
from ...norms import adaln, gated_residual, gated_residual_adaln
from ._models import blocks_of, supported


def fuse_adaln(model: nn.Module) -> None:
    """LN(x)·(1+scale)+shift by `adaln`, x + gate·y by `gated_residual`, both by `gated_residual_adaln`, in place.

    Outputs and gradients are the model's up to rounding: the ops compute in float32 and round once. Fused are the
    norms and residuals of all blocks, text's too, and the final norm of Stable Diffusion 3 and Flux. The end of a
    block and the start of the next stay two kernels: the model may add to the stream in between. The final norm of
    DiT and PixArt stays what it is: it is written out in the model's own `forward`.

    Gradients, gradient checkpointing, `torch.compile`, LoRA, quantised Linears, chunked feed-forwards, ControlNet
    residuals and IP adapters work as before.

    Args:
        model: a `DiTTransformer2DModel`, `PixArtTransformer2DModel`, `SD3Transformer2DModel` or
            `FluxTransformer2DModel`, also as `torch.compile` returned it.

    Raises:
        TypeError: for another model.
        ValueError: if it is fused already, or for what this cannot reproduce: blocks of another class, GLIGEN's
            fusers, a norm with weights, hooks on a norm that the ops replace; or for offloading and caching hooks,
            which must be installed after. Nothing is changed then.

    Source: adaLN-Zero of DiT (arXiv 2212.09748). Has not run on a GPU.
    """
    model = supported(model)
    if _modules_of(model, _PLAIN):
        raise ValueError("model is fused already")
    for number, block in enumerate(blocks_of(model)):
        _check_block(f"block {number}", block)
    modules = _modules_of(model, _FUSED)
    for name, module in modules.items():
        _check_forward(name, module)
        if type(module) in _NORMS:
            _check_norm(f"{name}.norm", module.norm)
    for module in modules.values():
        _change_class(module, _FUSED[type(module)])


def unfuse_adaln(model: nn.Module) -> None:
    """Undoes `fuse_adaln`: the model is what it was, bit for bit.

    Raises:
        TypeError: for a model that `fuse_adaln` does not take.
        ValueError: if it is not fused; or if since then offloading or caching hooks were installed, which must be
            removed first, or blocks were given another class, as FSDP2 does. Nothing is changed then.
    """
    model = supported(model)
    modules = _modules_of(model, _PLAIN)
    if not modules:
        raise ValueError("model is not fused")
    for number, block in enumerate(blocks_of(model)):
        if type(block) not in _PLAIN:
            raise ValueError(
                f"block {number} was made a {type(block).__name__} since; unfuse_adaln cannot undo that"
            )
    for name, module in modules.items():
        _check_forward(name, module)
    for module in modules.values():
        _change_class(module, _PLAIN[type(module)])


def _modules_of(model, classes) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module) in classes}


def _change_class(module, new_class) -> None:
    module.__dict__.pop("forward", None)  # the class's own, which removed hooks leave behind
    module.__class__ = new_class


def _check_block(name, block) -> None:
    if type(block) not in _BLOCKS:
        raise ValueError(f"{name} is a {type(block).__module__}.{type(block).__name__}; it must be diffusers' own")
    if hasattr(block, "fuser"):
        raise ValueError(f"{name} has a fuser, as attention_type 'gated' makes; fuse_adaln does not support it")
    for norm in ("norm1", "norm2", "norm3", "norm2_context"):
        module = getattr(block, norm, None)
        if module is not None and type(module) not in _NORMS:
            _check_norm(f"{name}'s {norm}", module)


def _check_norm(name, norm) -> None:
    if type(norm) not in (nn.LayerNorm, normalization.FP32LayerNorm):
        raise ValueError(f"{name} is a {type(norm).__name__}; it must be a LayerNorm")
    if norm.weight is not None or norm.bias is not None:
        raise ValueError(f"{name} has weights of its own; fuse_adaln needs elementwise_affine=False")
    hooks = norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks
    if any(hooks) or _has_own_forward(norm):
        raise ValueError(f"{name} has a hook, which would no longer be called; remove it before fuse_adaln")


def _has_own_forward(module) -> bool:
    """One that hides its class's, as accelerate's and diffusers' hooks do."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _check_forward(name, module) -> None:
    if _has_own_forward(module):
        raise ValueError(
            f"{name} has hooks in place of its forward, as offloading and caching install them; remove them first "
            "and install them again after"
        )


def _norm(x, shift, scale, norm) -> Tensor:
    """LN(x)·(1+scale)+shift: x (B, N, C), shift and scale (B, C) or (1, C)."""
    shift, scale = _for_each_sample(x, shift, scale)
    return adaln(x, shift, scale, eps=norm.eps, out_dtype=_out_dtype(x, shift, scale))


def _residual(x, y, gate) -> Tensor:
    """x + gate·y in the dtype that torch would promote to."""
    x = x.to(_promoted(x, y, gate))
    return gated_residual(x, y, *_for_each_sample(x, gate))


def _residual_norm(x, y, gate, shift, scale, norm) -> tuple[Tensor, Tensor]:
    """x' = x + gate·y as `_residual`, and LN(x')·(1+scale)+shift as `_norm`."""
    x = x.to(_promoted(x, y, gate))
    gate, shift, scale = _for_each_sample(x, gate, shift, scale)
    return gated_residual_adaln(x, y, gate, shift, scale, eps=norm.eps, out_dtype=_out_dtype(x, shift, scale))


def _for_each_sample(x, *vectors) -> tuple[Tensor, ...]:
    return tuple(vector.expand(x.shape[0], -1) for vector in vectors)


def _promoted(*tensors) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _out_dtype(*tensors) -> torch.dtype:
    """Of a norm, which goes into a Linear: what autocast would cast it to there, else what torch promotes to."""
    return enabled_autocast_dtype(tensors[0]) or _promoted(*tensors)


def _feed_forward(block, feed_forward, x) -> Tensor:
    if block._chunk_size is None:
        return feed_forward(x)
    return attention._chunked_feed_forward(feed_forward, x, block._chunk_dim, block._chunk_size)


class AdaLayerNormZero(normalization.AdaLayerNormZero):
    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return _norm(x, shift, scale, self.norm), *rest


class AdaLayerNormZeroSingle(normalization.AdaLayerNormZeroSingle):
    def forward(self, x, emb=None):
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return _norm(x, shift, scale, self.norm), gate


class SD35AdaLayerNormZeroX(normalization.SD35AdaLayerNormZeroX):
    def forward(self, hidden_states, emb=None):
        shift, scale, *rest, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
        normed = _norm(hidden_states, shift, scale, self.norm)
        return normed, *rest, _norm(hidden_states, shift2, scale2, self.norm), gate2


class AdaLayerNormContinuous(normalization.AdaLayerNormContinuous):
    def forward(self, x, conditioning_embedding):
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return _norm(x, shift, scale, self.norm)


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """DiT's (norm_type "ada_norm_zero") and PixArt's ("ada_norm_single")."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        timestep: Any = None,
        cross_attention_kwargs=None,
        class_labels=None,
        added_cond_kwargs=None,
    ):
        x, kwargs = hidden_states, cross_attention_kwargs or {}
        if self.norm_type == "ada_norm_zero":
            normed, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(
                x, timestep, class_labels, hidden_dtype=x.dtype
            )
            norm_mlp = self.norm3
        else:
            modulation = self.scale_shift_table + timestep.unflatten(1, (6, -1))  # (B, 6, C)
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(1)
            normed = _norm(x, shift, scale, self.norm1)
            norm_mlp = self.norm2

        y = self.attn1(normed, attention_mask=attention_mask, **kwargs)
        if self.attn2 is not None:  # to the text: neither normed nor gated
            x = _residual(x, y, gate)
            y = self.attn2(
                x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **kwargs
            )
            gate = torch.ones_like(gate)
        x, normed = _residual_norm(x, y, gate, shift_mlp, scale_mlp, norm_mlp)
        return _residual(x, _feed_forward(self, self.ff, normed), gate_mlp)


class JointTransformerBlock(attention.JointTransformerBlock):
    """Stable Diffusion 3's; 3.5's dual blocks have a second attention, among image tokens only."""

    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        x, context, kwargs = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
        normed, gate, shift_mlp, scale_mlp, gate_mlp, *dual = self.norm1(x, emb=temb)
        if self.context_pre_only:
            normed_context = self.norm1_context(context, temb)
        else:
            normed_context, *context_modulation = self.norm1_context(context, emb=temb)

        y, context_y = self.attn(hidden_states=normed, encoder_hidden_states=normed_context, **kwargs)
        if self.use_dual_attention:
            normed_dual, gate_dual = dual
            x = _residual(x, y, gate)
            y, gate = self.attn2(hidden_states=normed_dual, **kwargs), gate_dual  # pyright: ignore[reportOptionalCall] - dual
        x, normed = _residual_norm(x, y, gate, shift_mlp, scale_mlp, self.norm2)
        x = _residual(x, _feed_forward(self, self.ff, normed), gate_mlp)

        if self.context_pre_only:
            return None, x
        gate, shift_mlp, scale_mlp, gate_mlp = context_modulation
        context, normed = _residual_norm(context, context_y, gate, shift_mlp, scale_mlp, self.norm2_context)
        return _residual(context, _feed_forward(self, self.ff_context, normed), gate_mlp), x


class FluxTransformerBlock(transformer_flux.FluxTransformerBlock):
    """Flux's double block."""

    def forward(
        self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
    ):
        x, context = hidden_states, encoder_hidden_states
        normed, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(x, emb=temb)
        normed_context, *context_modulation = self.norm1_context(context, emb=temb)

        y, context_y, *ip_adapter = self.attn(
            hidden_states=normed,
            encoder_hidden_states=normed_context,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        x, normed = _residual_norm(x, y, gate, shift_mlp, scale_mlp, self.norm2)
        x = _residual(x, self.ff(normed), gate_mlp)
        for y in ip_adapter:  # one or none
            x = x + y

        gate, shift_mlp, scale_mlp, gate_mlp = context_modulation
        context, normed = _residual_norm(context, context_y, gate, shift_mlp, scale_mlp, self.norm2_context)
        context = _residual(context, self.ff_context(normed), gate_mlp)
        return _clip_float16(context), x


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    """Flux's single block: attention and MLP beside each other, on text and image as one sequence."""

    def forward(
        self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
    ):
        num_text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(x, emb=temb)
        hidden = self.act_mlp(self.proj_mlp(normed))
        y = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        y = self.proj_out(torch.cat([y, hidden], dim=2))
        x = _clip_float16(_residual(x, y, gate))
        return x[:, :num_text], x[:, num_text:]


def _clip_float16(x) -> Tensor:
    """Text tokens of Flux exceed float16's range."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


_BLOCKS = {
    cls.__mro__[1]: cls
    for cls in (BasicTransformerBlock, JointTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock)
}
_NORMS = {
    cls.__mro__[1]: cls
    for cls in (AdaLayerNormZero, AdaLayerNormZeroSingle, SD35AdaLayerNormZeroX, AdaLayerNormContinuous)
}
_FUSED = _BLOCKS | _NORMS
_PLAIN: dict[type, type] = {fused: plain for plain, fused in _FUSED.items()}

for _plain, _fused in _BLOCKS.items():  # diffusers' caching hooks look blocks up by class
    TransformerBlockRegistry.register(_fused, dataclasses.replace(TransformerBlockRegistry.get(_plain)))
