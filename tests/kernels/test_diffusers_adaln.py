"""`fuse_adaln` and `unfuse_adaln` on small random diffusers models, against the same models unfused."""

import collections
import copy
import inspect
import shutil

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module, remove_hook_from_submodules
from diffusers import FirstBlockCacheConfig
from diffusers.models.normalization import RMSNorm
from diffusers_models import (
    GRID,
    NAMES,
    LoRALinear,
    QuantizedLinear,
    assert_same,
    blocks_of,
    cast,
    gradients,
    inputs,
    make,
    relative_error,
    replace_linears,
    run,
)
from torch import nn

import edt_kernels
from benchmarks.budget import assert_within_budget
from edt_kernels.integrations.diffusers import adaln, apply_amm, fuse_adaln, remove_amm, unfuse_adaln

PARITY = 1e-5


def peft_adapter():
    """Also on the modulations' projections, and scaled by the call."""
    peft = pytest.importorskip("peft")
    model, arguments = make("flux"), inputs("flux")
    targets = ["to_q", "to_out.0", "linear", "proj_mlp", "net.2"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return model, {**arguments, "joint_attention_kwargs": {"scale": 0.5}}


def additional_conditions():
    arguments = inputs("pixart")
    conditions = {
        "resolution": torch.tensor([[64.0, 32.0], [48.0, 48.0]]),
        "aspect_ratio": torch.tensor([[2.0], [1.0]]),
    }
    return make("pixart", use_additional_conditions=True), {**arguments, "added_cond_kwargs": conditions}


def no_cross_attention():
    return make("pixart", cross_attention_dim=None, caption_channels=None), inputs("pixart")


def one_timestep_for_all_samples():
    """Of which diffusers broadcasts the modulation."""
    arguments = inputs("sd3")
    for name in ("timestep", "pooled_projections"):
        arguments[name] = arguments[name][:1]
    return make("sd3"), arguments


def skipped_layers():
    return make("sd3"), {**inputs("sd3"), "skip_layers": [1]}


def controlnet_in_sd3():
    residuals = [torch.randn(2, 16, 16), torch.randn(2, 16, 16)]
    return make("sd3"), {**inputs("sd3"), "block_controlnet_hidden_states": residuals}


def controlnet_in_flux():
    residuals = {
        "controlnet_block_samples": [torch.randn(2, 16, 24)],
        "controlnet_single_block_samples": [torch.randn(2, 16, 24)],
    }
    return make("flux"), {**inputs("flux"), **residuals}


class IPAdapterProcessor:
    """Gives a third output, which a double block adds to its stream, as an IP adapter's processor does."""

    def __init__(self, replaced):
        self.replaced = replaced

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        image, text = self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return image, text, hidden_states.square()


def ip_adapter_in_flux():
    model = make("flux")
    attn = model.transformer_blocks[0].attn
    attn.set_processor(IPAdapterProcessor(attn.processor))
    return model, inputs("flux")


def replaced_linears(replacement):
    def case():
        model = make("sd35")
        replace_linears(model, replacement)
        return model, inputs("sd35")

    return case


VARIANTS = {
    **{name: lambda name=name: (make(name), inputs(name)) for name in NAMES},
    "additional conditions": additional_conditions,
    "no cross-attention": no_cross_attention,
    "one timestep": one_timestep_for_all_samples,
    "skipped layers": skipped_layers,
    "ControlNet in SD3": controlnet_in_sd3,
    "ControlNet in Flux": controlnet_in_flux,
    "IP adapter in Flux": ip_adapter_in_flux,
    "LoRA": replaced_linears(LoRALinear),
    "quantized": replaced_linears(QuantizedLinear),
    "peft": peft_adapter,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_outputs_and_gradients_are_the_unfused_models(variant, checkpointing):
    model, arguments = VARIANTS[variant]()
    if checkpointing:
        model.enable_gradient_checkpointing()
    expected, types = gradients(model, arguments), list(map(type, model.modules()))
    fuse_adaln(model)
    assert_same(gradients(model, arguments), expected)
    unfuse_adaln(model)
    assert list(map(type, model.modules())) == types
    assert torch.equal(run(model, arguments), expected["output"])


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_chunked_feed_forwards(name):
    model, lengths = make(name), []
    block = model.transformer_blocks[0]
    block.set_chunk_feed_forward(8, dim=1)
    block.ff.register_forward_hook(lambda _module, args, _out: lengths.append(args[0].shape[1]))
    arguments = inputs(name)
    if name == "sd3":
        arguments["encoder_hidden_states"] = torch.randn(2, 8, 12)
    expected = gradients(model, arguments)
    fuse_adaln(model)
    assert_same(gradients(model, arguments), expected)
    assert lengths == [8] * 4


# Of each block, image and text: (adaln, gated_residual, gated_residual_adaln).
DIT, JOINT, LAST_JOINT, DUAL_JOINT, SINGLE = (1, 1, 1), (2, 2, 2), (2, 1, 1), (3, 3, 2), (1, 1, 0)
CALLS = {
    "dit": [DIT] * 3,
    "pixart": [(1, 2, 1)] * 3,  # the second residual is that of the cross-attention
    "sd3": [JOINT, JOINT, LAST_JOINT, (1, 0, 0)],  # and the final norm
    "sd35": [DUAL_JOINT, DUAL_JOINT, LAST_JOINT, (1, 0, 0)],
    "flux": [JOINT, JOINT, SINGLE, SINGLE, (1, 0, 0)],
}
OPS = ("adaln", "gated_residual", "gated_residual_adaln")


@pytest.mark.parametrize("name", NAMES)
def test_which_ops_are_called(name, monkeypatch):
    """And that of the LayerNorms without weights only the final one of DiT and PixArt is left."""
    calls = collections.Counter()
    for op in OPS:

        def count(*args, op=op, **kwargs):
            calls[op] += 1
            return getattr(edt_kernels, op)(*args, **kwargs)

        monkeypatch.setattr(adaln, op, count)
    model = make(name)
    fuse_adaln(model)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda *_: calls.update(["LayerNorm"]))
    run(model, inputs(name))
    assert tuple(calls[op] for op in OPS) == tuple(map(sum, zip(*CALLS[name], strict=True)))
    assert calls["LayerNorm"] == (1 if name in ("dit", "pixart") else 0)


def stream_dtypes(model, arguments, **autocast) -> list[torch.dtype]:
    """Of every tensor that a block returns, and of the stream that goes into a cross-attention."""
    dtypes = []

    def record(_module, _args, out):
        dtypes.extend(t.dtype for t in (out if type(out) is tuple else (out,)) if t is not None)

    for block in blocks_of(model):
        block.register_forward_hook(record)
        if hasattr(block, "attn1") and block.attn2 is not None:
            block.attn2.register_forward_pre_hook(lambda _module, args: dtypes.append(args[0].dtype))
    with torch.autocast("cpu", **autocast), torch.no_grad():
        run(model, arguments)
    return dtypes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_are_the_unfused_models(name, weights, autocast):
    """PixArt's float32 tables make its stream float32 under autocast."""
    model, arguments = make(name).to(weights), cast(inputs(name), weights)
    expected = stream_dtypes(copy.deepcopy(model), arguments, dtype=torch.bfloat16, enabled=autocast)
    fuse_adaln(model)
    assert stream_dtypes(model, arguments, dtype=torch.bfloat16, enabled=autocast) == expected


def test_norms_come_in_the_dtype_of_autocast():
    """Although the stream is float32; the Linear after them would cast, by a kernel of its own."""
    model, dtypes = make("pixart"), []
    fuse_adaln(model)
    for block in model.transformer_blocks:
        for module in (block.attn1, block.ff):
            module.register_forward_pre_hook(lambda _module, args: dtypes.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(model, inputs("pixart"))
    assert dtypes == [torch.bfloat16] * 6


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_exact_as_unfused(name):
    def outcome(fused, dtype):
        model = make(name).bfloat16().to(dtype)
        if fused:
            fuse_adaln(model)
        return run(model, cast(cast(inputs(name), torch.bfloat16), dtype)).detach()

    exact = outcome(False, torch.float64)
    assert_within_budget("output", outcome(True, torch.bfloat16), exact, outcome(False, torch.bfloat16))


def test_flux_clips_float16():
    model = make("flux").half()
    generator = torch.Generator().manual_seed(0)
    x, text = (63000 + 1000 * torch.rand(1, n, 24, generator=generator).half() for n in (16, 5))
    temb = torch.full((1, 24), 20.0).half()
    for parameter in model.transformer_blocks[0].attn.to_add_out.parameters():
        parameter.data.zero_()  # the stream inside the block is not clipped

    def streams():
        """Of a double block only that of text is clipped."""
        return model.transformer_blocks[0](x, text, temb)[0], *model.single_transformer_blocks[1](x, text, temb)

    expected = streams()
    fuse_adaln(model)
    for ours, theirs in zip(streams(), expected, strict=True):
        assert theirs.max() == 65504 > theirs.min()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=64)  # numbers there are 32 apart


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("amm_first", [True, False])
def test_together_with_amm(name, amm_first):
    model, arguments = make(name), inputs(name)
    plain = run(model, arguments)
    apply_amm(model, [1], grid=GRID)
    expected = gradients(model, arguments)
    if not amm_first:
        remove_amm(model)
    fuse_adaln(model)
    if not amm_first:
        apply_amm(model, [1], grid=GRID)
    assert_same(gradients(model, arguments), expected, floor=1e-6)
    remove_amm(model)
    assert relative_error(run(model, arguments), plain) <= PARITY
    unfuse_adaln(model)
    assert torch.equal(run(model, arguments), plain)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_weights_stay(name, tmp_path):
    plain, model = make(name), make(name)
    fuse_adaln(model)
    assert list(map(str, model.state_dict())) == list(plain.state_dict())
    assert repr(model) == repr(plain)
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours).__name__ == type(theirs).__name__
        assert (
            inspect.signature(ours.forward).parameters.keys()
            == inspect.signature(theirs.forward).parameters.keys()
        )
    model.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded, inputs(name)), run(plain, inputs(name)))
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(run(other, inputs(name)), run(model, inputs(name)))
        unfuse_adaln(other)
        assert torch.equal(run(other, inputs(name)), run(plain, inputs(name)))


def test_hooks_of_blocks_and_modulations_are_called():
    model, called = make("sd3"), []
    block = model.transformer_blocks[0]
    for module in (block, block.norm1, block.norm1.linear, block.ff, block.attn, model.norm_out):
        module.register_forward_hook(lambda module, *_: called.append(module))
    run(model, inputs("sd3"))
    expected = list(called)
    called.clear()
    fuse_adaln(model)
    run(model, inputs("sd3"))
    assert called == expected


def test_caching_hooks_after_fusing():
    model = make("flux")
    expected = run(model, inputs("flux"))
    fuse_adaln(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("test"), torch.no_grad():
        for _ in range(2):
            assert relative_error(run(model, inputs("flux")), expected) <= PARITY
    with pytest.raises(ValueError, match=r"transformer_blocks\.0 has hooks in place of its forward"):
        unfuse_adaln(model)
    model.disable_cache()
    unfuse_adaln(model)
    assert torch.equal(run(model, inputs("flux")), expected)


@pytest.mark.parametrize("name", NAMES)
def test_sequential_offloading_after_fusing(name):
    model = make(name)
    expected = run(model, inputs(name))
    fuse_adaln(model)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        assert relative_error(run(model, inputs(name)), expected) <= PARITY
    remove_hook_from_submodules(model)
    unfuse_adaln(model)


def test_hooks_in_place_of_a_forward_are_refused():
    model, types = make("pixart"), list(map(type, make("pixart").modules()))
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"transformer_blocks\.0 has hooks in place of its forward"):
        fuse_adaln(model)
    assert list(map(type, model.modules())) == types

    model = make("dit")
    norm = model.transformer_blocks[1].norm1
    add_hook_to_module(norm, ModelHook())
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.norm1 has hooks in place of its forward"):
        fuse_adaln(model)
    remove_hook_from_module(norm)  # which leaves the class's own forward on the module
    assert "forward" in vars(norm)
    fuse_adaln(model)
    assert "forward" not in vars(norm)


def test_a_class_that_was_changed_since_is_left_alone():
    model = make("dit")
    fuse_adaln(model)
    block = model.transformer_blocks[1]
    block.__class__ = type("FSDPBasicTransformerBlock", (type(block),), {})  # as fully_shard does
    types = list(map(type, model.modules()))
    with pytest.raises(ValueError, match="block 1 was made a FSDPBasicTransformerBlock since"):
        unfuse_adaln(model)
    assert list(map(type, model.modules())) == types


def with_block_of_another_class(model):
    model.transformer_blocks[1] = nn.Identity()


def with_weights(model):
    model.transformer_blocks[1].norm3 = nn.LayerNorm(24)


def with_weights_in_a_modulation(model):
    model.transformer_blocks[0].norm1.norm = nn.LayerNorm(24)


def with_rms_norm(model):
    model.transformer_blocks[1].norm3 = RMSNorm(24, 1e-6)


def with_hook_on_a_norm(model):
    model.transformer_blocks[2].norm3.register_forward_hook(lambda *_: None)


def with_backward_hook_on_a_norm(model):
    model.transformer_blocks[2].norm1.norm.register_full_backward_hook(lambda *_: None)


def with_accelerate_hook_on_a_norm(model):
    add_hook_to_module(model.transformer_blocks[2].norm3, ModelHook())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_block_of_another_class, r"block 1 is a torch\..*Identity; it must be diffusers' own"),
        (with_weights, "block 1's norm3 has weights of its own; fuse_adaln needs elementwise_affine=False"),
        (with_weights_in_a_modulation, r"transformer_blocks\.0\.norm1\.norm has weights of its own"),
        (with_rms_norm, "block 1's norm3 is a RMSNorm; it must be a LayerNorm"),
        (with_hook_on_a_norm, "block 2's norm3 has a hook, which would no longer be called"),
        (with_backward_hook_on_a_norm, r"transformer_blocks\.2\.norm1\.norm has a hook"),
        (with_accelerate_hook_on_a_norm, "block 2's norm3 has a hook"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_and_nothing_changes(change, message):
    model = make("dit")
    change(model)
    types = list(map(type, model.modules()))
    with pytest.raises(ValueError, match=message):
        fuse_adaln(model)
    assert list(map(type, model.modules())) == types


def test_configurations_that_cannot_be_reproduced_are_refused():
    with pytest.raises(ValueError, match="block 0's norm3 has weights of its own"):
        fuse_adaln(make("dit", norm_elementwise_affine=True))
    with pytest.raises(ValueError, match="block 0 has a fuser, as attention_type 'gated' makes"):
        fuse_adaln(make("pixart", attention_type="gated"))


def test_order_of_calls():
    model = make("dit")
    with pytest.raises(ValueError, match="model is not fused"):
        unfuse_adaln(model)
    fuse_adaln(model)
    with pytest.raises(ValueError, match="model is fused already"):
        fuse_adaln(model)
    unfuse_adaln(model)
    with pytest.raises(ValueError, match="model is not fused"):
        unfuse_adaln(model)
    for function in (fuse_adaln, unfuse_adaln):
        with pytest.raises(
            TypeError, match="model is a Linear; it must be one of diffusers' DiTTransformer2DModel, "
        ):
            function(nn.Linear(2, 2))


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_block_compiles_once(name):
    model = make(name)
    fuse_adaln(model)
    eager = [gradients(model, inputs(name, seed)) for seed in (1, 2)]
    torch._dynamo.reset()
    for block in {type(block): block for block in blocks_of(model)}.values():  # the last of each kind
        block.compile(fullgraph=True, backend="eager")
    blocks_of(model)[0].compile(fullgraph=True, backend="eager")
    assert_same(gradients(model, inputs(name, 1)), eager[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(gradients(model, inputs(name, 2)), eager[1])


def test_repeated_blocks_of_a_fused_model_compile():
    torch._dynamo.reset()
    model = make("flux")
    fuse_adaln(model)
    expected = run(model, inputs("flux"))
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert relative_error(run(model, inputs("flux")), expected) <= PARITY


def test_a_compiled_model_sees_the_change():
    torch._dynamo.reset()
    model = make("dit")
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        expected = run(compiled, inputs("dit"))
        fuse_adaln(compiled)
        assert relative_error(run(compiled, inputs("dit")), expected) <= PARITY
        unfuse_adaln(compiled)
        assert torch.equal(run(compiled, inputs("dit")), expected)
    assert len(graphs) == 2


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler on the CPU")
def test_a_fused_and_modulated_dit_on_inductor():
    """Held to float64 as eager is. At the first timesteps: diffusers takes sines of t·frequency in float32, of
    which late ones have lost 1e-5 by the rounding of the frequencies, eager's and Inductor's in other directions,
    and nothing of that comes from what is fused."""
    torch._dynamo.reset()
    model, arguments = make("dit", num_layers=1), inputs("dit") | {"timestep": torch.tensor([0, 1])}
    apply_amm(model, [0])
    exact = gradients(copy.deepcopy(model).double(), cast(arguments, torch.float64))
    eager = gradients(model, arguments)
    fuse_adaln(model)
    model.compile(fullgraph=True)
    compiled = gradients(model, arguments)
    # Of a bias of keys the gradient is zero, and what is computed the rounding of terms that cancel.
    terms = 1e-2 * max(gradient.norm().item() for gradient in exact.values())
    assert compiled.keys() == exact.keys()
    for name in exact:
        slack = torch.finfo(torch.float32).eps * terms
        assert_within_budget(name, compiled[name], exact[name], eager[name], slack)


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("name", ["dit", "sd35", "flux"])
def test_fused_models_on_interpreted_kernels(name, monkeypatch):
    model, arguments = make(name), inputs(name)
    expected = gradients(model, arguments)
    fuse_adaln(model)
    with torch.profiler.profile() as profile:
        actual = gradients(model, arguments)
    calls = {event.key: event.count for event in profile.key_averages()}
    for op, count in zip(OPS, map(sum, zip(*CALLS[name], strict=True)), strict=True):
        assert calls[f"edt_kernels::{op}"] == calls[f"edt_kernels::{op}_backward"] == count
    assert_same(actual, expected, floor=1e-2)
