"""`apply_amm` and `remove_amm` on small random diffusers models, against softmax·M written out here."""

import contextlib
import copy
import math
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers_models import (
    GRID,
    NAMES,
    LoRALinear,
    QuantizedLinear,
    assert_same,
    blocks_of,
    cast,
    gradients,
    image_attentions,
    inputs,
    make,
    relative_error,
    replace_linears,
    run,
)
from torch import nn
from torch.nn import functional as F

from edt_kernels import amm_table
from edt_kernels.integrations.diffusers import apply_amm, remove_amm

PARITY = 1e-5
GRIDS = {"grid": GRID}  # Flux has no grid of its own
# In SD3.5 a dual block and the last; in Flux a double and a single block.
BLOCKS = {"dit": [1, 2], "pixart": [1], "sd3": [0, 2], "sd35": [1, 2], "flux": [0, 3]}


def processors(model) -> list:
    return [attn.processor for block in blocks_of(model) for attn in image_attentions(block)]


def gains(grid, form="exp_cos", radius=None) -> torch.Tensor:
    """m of every pair of tokens, (N, N), from their coordinates."""
    H, W = grid
    radius = math.sqrt((max(H, W) - 1) ** 2 + 4) if radius is None else radius

    def gain(distance):
        cosine = math.cos(math.pi * distance / (2 * math.hypot(H - 1, W - 1)))
        return 0.0 if distance > radius + 1e-9 else 0.5 * math.exp(cosine) if form == "exp_cos" else 1.3 * cosine

    places = [(y, x) for y in range(H) for x in range(W)]
    return torch.tensor([[gain(math.dist(a, b)) for b in places] for a in places])


@contextlib.contextmanager
def written_out(model, blocks, gain, *, text_first):
    """The model with diffusers' own processors, over an attention that multiplies by M in the chosen blocks."""
    chosen, plain = [], F.scaled_dot_product_attention

    def attention(query, key, value, **kwargs):
        if not chosen:
            return plain(query, key, value, **kwargs)
        N, n = query.shape[2], len(gain)
        image = slice(N - n, N) if text_first else slice(0, n)
        M = torch.ones(N, N, dtype=query.dtype)
        M[image, image] = gain
        probabilities = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, dim=-1)
        return (probabilities * M) @ value

    hooks = []
    for number in blocks:
        for attn in image_attentions(blocks_of(model)[number]):
            hooks.append(attn.register_forward_pre_hook(lambda *_: chosen.append(True)))
            hooks.append(attn.register_forward_hook(lambda *_: chosen.pop() and None))
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
        for hook in hooks:
            hook.remove()


def assert_equals_written_out(name, model, arguments, *, grid=GRID, form="exp_cos", radius=None):
    """In float64. Also that AMM changes the output, and that without it output and processors are as before."""
    model, arguments = model.double(), cast(arguments, torch.float64)
    before, plain = processors(model), run(model, arguments)
    with written_out(model, BLOCKS[name], gains(grid, form, radius), text_first=name == "flux"):
        expected = gradients(model, arguments)
    apply_amm(model, BLOCKS[name], grid=grid, form=form, radius=radius)
    actual = gradients(model, arguments)
    assert_same(actual, expected, floor=1e-6)
    assert relative_error(actual["output"], plain) > 1e-3
    remove_amm(model)
    assert all(a is b for a, b in zip(processors(model), before, strict=True))
    assert torch.equal(run(model, arguments), plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", [{}, {"form": "cos", "radius": 2.5}], ids=["published", "cos"])
def test_outputs_and_gradients_are_those_of_the_formula(name, table):
    assert_equals_written_out(name, make(name), inputs(name), **table)


@pytest.mark.parametrize("name", ["pixart", "sd3", "sd35", "flux"])  # DiT's forward takes squares only
def test_rectangular_grids(name):
    assert_equals_written_out(name, make(name), inputs(name, grid=(2, 3)), grid=(2, 3))


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "sd35"])
def test_the_grid_is_taken_from_the_configuration(name):
    model, other = make(name), make(name)
    apply_amm(model, BLOCKS[name])
    apply_amm(other, BLOCKS[name], grid=GRID)
    assert torch.equal(run(model, inputs(name)), run(other, inputs(name)))


def test_only_image_attentions_of_chosen_blocks_change():
    model = make("pixart")
    cross = [block.attn2.processor for block in model.transformer_blocks]
    before = processors(model)
    apply_amm(model, (1,))
    assert [block.attn2.processor for block in model.transformer_blocks] == cross
    assert [a is b for a, b in zip(processors(model), before, strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    ("preset", "blocks", "num_layers"), [("dit-xl", (15, 17, 19, 22, 24), 28), ("dit-s", (8, 10), 12)]
)
def test_presets_are_the_published_placements(preset, blocks, num_layers):
    model = make("dit", num_layers=num_layers, attention_head_dim=4)
    apply_amm(model, preset)
    modulated = [i for i, p in enumerate(processors(model)) if type(p) is not AttnProcessor2_0]
    assert tuple(modulated) == blocks


@pytest.mark.parametrize("replacement", [LoRALinear, QuantizedLinear])
@pytest.mark.parametrize("name", NAMES)
def test_replaced_linears_are_called(name, replacement):
    model = make(name)
    replace_linears(model, replacement)
    assert_equals_written_out(name, model, inputs(name))


def test_peft_adapters_are_called():
    peft = pytest.importorskip("peft")
    model, targets = make("flux"), ["to_q", "to_v", "add_k_proj", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert_equals_written_out("flux", model, inputs("flux"))


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_fused_projections_are_called(name):
    model = make(name)
    model.fuse_qkv_projections()
    for block in blocks_of(model):
        for attn in image_attentions(block):
            attn.to_q = None
    assert_equals_written_out(name, model, inputs(name))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name):
    model = make(name)
    apply_amm(model, BLOCKS[name], grid=GRID)
    expected = gradients(model, inputs(name))
    model.enable_gradient_checkpointing()
    actual = gradients(model, inputs(name))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def tables(model) -> list[torch.Tensor]:
    return [p.modulation for p in processors(model) if hasattr(p, "modulation")]


def test_the_table_stays_float32_when_the_model_is_cast():
    expected = amm_table(GRID)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = make("dit")
        apply_amm(model, [0, 2])
        model.to(dtype)
        assert len(tables(model)) == 2
        assert all(table.dtype == torch.float32 and torch.equal(table, expected) for table in tables(model))
        assert run(model, cast(inputs("dit"), dtype)).dtype == dtype


def test_the_table_follows_the_model_through_meta():
    model = make("dit")
    apply_amm(model, [1])
    model.to("meta").to_empty(device="cpu")
    assert torch.equal(tables(model)[0], amm_table(GRID))

    with torch.device("meta"):
        model = make("dit")
        apply_amm(model, [1])
    model.to_empty(device="cpu").load_state_dict(make("dit").state_dict())
    expected = make("dit")
    apply_amm(expected, [1])
    # What is not in the state dict is lost on meta, save the table.
    model.pos_embed.pos_embed = expected.pos_embed.pos_embed
    for ours, theirs in zip(model.transformer_blocks, expected.transformer_blocks, strict=True):
        ours.norm1.emb = theirs.norm1.emb
    assert torch.equal(run(model, inputs("dit")), run(expected, inputs("dit")))


def test_the_table_goes_where_weights_are_brought():
    model = make("dit")
    apply_amm(model, [1])
    arguments = {key: tensor.to("meta") for key, tensor in inputs("dit").items()}
    assert run(model.to("meta"), arguments).shape == (2, 4, 8, 8)
    assert tables(model)[0].device.type == "cpu"


@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_sequential_offloading(name):
    expected = make(name)
    apply_amm(expected, BLOCKS[name], grid=GRID)
    for apply_first in (True, False):
        model = make(name)
        if apply_first:
            apply_amm(model, BLOCKS[name], grid=GRID)
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        if not apply_first:
            apply_amm(model, BLOCKS[name], grid=GRID)
        assert all(parameter.is_meta for parameter in blocks_of(model)[0].parameters())
        with torch.no_grad():
            assert torch.equal(run(model, inputs(name)), run(expected, inputs(name)))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_saved(name, tmp_path):
    model = make(name)
    keys, names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    apply_amm(model, BLOCKS[name], grid=GRID)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == names
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    remove_amm(model)
    assert torch.equal(run(loaded, inputs(name)), run(model, inputs(name)))


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_independent(name, tmp_path):
    model = make(name)
    plain = run(model, inputs(name))
    apply_amm(model, BLOCKS[name], grid=GRID)
    modulated = run(model, inputs(name))
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(run(other, inputs(name)), modulated)
        remove_amm(other)
        assert torch.equal(run(other, inputs(name)), plain)
        assert not any(block._forward_pre_hooks for block in blocks_of(other))
    assert torch.equal(run(model, inputs(name)), modulated)


@pytest.mark.parametrize("name", NAMES)
def test_a_modulated_block_compiles_once(name):
    model = make(name)
    apply_amm(model, BLOCKS[name], grid=GRID)
    expected = [run(model, inputs(name, seed)) for seed in (1, 2)]
    torch._dynamo.reset()
    for number in BLOCKS[name]:
        blocks_of(model)[number].compile(fullgraph=True, backend="eager")
    assert relative_error(run(model, inputs(name, 1)), expected[0]) <= PARITY
    with torch.compiler.set_stance("fail_on_recompile"):
        assert relative_error(run(model, inputs(name, 2)), expected[1]) <= PARITY


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_a_compiled_model_sees_the_change(name):
    torch._dynamo.reset()
    model = make(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain = run(compiled, inputs(name))
        apply_amm(compiled, BLOCKS[name], grid=GRID)
        modulated = run(compiled, inputs(name))
        assert relative_error(modulated, plain) > 1e-3
        assert relative_error(modulated, run(model, inputs(name))) <= PARITY
        remove_amm(compiled)
        assert relative_error(run(compiled, inputs(name)), plain) <= PARITY


@pytest.mark.parametrize(
    ("name", "block", "tokens"),
    [*((name, 0, 9) for name in NAMES), ("flux", 2, 9), ("flux", 2, 18)],
)
def test_images_of_another_grid_are_refused(name, block, tokens):
    """In Flux's single blocks too, where text tokens could take the place of image tokens without a word."""
    model = make(name)
    apply_amm(model, [block], grid=GRID)
    with pytest.raises(ValueError, match=rf"{tokens} image tokens.*, but .* grid \(4, 4\), 16 tokens"):
        run(model, inputs(name, grid=(3, tokens // 3)))
    remove_amm(model)
    run(model, inputs(name, grid=(3, tokens // 3)))


@pytest.mark.parametrize("grid", [(2, 8), (8, 2)])
@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])  # DiT's forward takes squares only
def test_images_of_another_grid_of_as_many_tokens_are_refused(name, grid):
    """Every distance would be wrong without a word."""
    model = make(name)
    apply_amm(model, [0], grid=GRID)
    run(model, inputs(name))
    with pytest.raises(ValueError, match=r"16 image tokens .*, but AMM was applied with grid \(4, 4\), 16 tokens"):
        run(model, inputs(name, grid=grid))
    run(model, inputs(name))
    remove_amm(model)
    apply_amm(model, [0], grid=grid)
    run(model, inputs(name, grid=grid))
    with pytest.raises(ValueError, match="16 image tokens"):
        run(model, inputs(name))


def test_flux_positions_given_by_place_are_seen():
    model, arguments = make("flux"), inputs("flux", grid=(2, 8))
    apply_amm(model, [0], grid=GRID)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    with pytest.raises(ValueError, match="16 image tokens whose img_ids are not of this grid"):
        model(*(arguments.pop(name) for name in names), **arguments)


def test_processors_set_over_amm_are_not_taken_for_it():
    model = make("flux")
    apply_amm(model, [0, 2], grid=GRID)
    model.set_attn_processor(FluxAttnProcessor())
    with pytest.raises(
        ValueError, match=r"processor of block 0 is FluxAttnProcessor, .*; call remove_amm to go on"
    ):
        run(model, inputs("flux"))
    remove_amm(model)
    assert torch.equal(run(model, inputs("flux", grid=(3, 3))), run(make("flux"), inputs("flux", grid=(3, 3))))
    with pytest.raises(ValueError, match="model has no AMM in place"):
        remove_amm(model)


def test_a_processor_set_over_one_block_stays():
    model = make("flux")
    apply_amm(model, [0, 2], grid=GRID)
    own = FluxAttnProcessor()
    model.single_transformer_blocks[0].attn.set_processor(own)
    with pytest.raises(ValueError, match="processor of block 2 is FluxAttnProcessor"):
        run(model, inputs("flux"))
    remove_amm(model)
    assert model.single_transformer_blocks[0].attn.processor is own
    assert torch.equal(run(model, inputs("flux")), run(make("flux"), inputs("flux")))


@pytest.mark.parametrize("blocks", [[0], [2], [0, 2]])
def test_an_ip_adapter_over_amm_is_refused(blocks):
    model = make("flux")
    weights = {
        "image_proj": {"proj.weight": torch.randn(4 * 12, 8), "proj.bias": torch.randn(48),
                       "norm.weight": torch.ones(12), "norm.bias": torch.zeros(12)},
        "ip_adapter": {f"{i}.to_{which}_ip.{part}": torch.randn(*((24, 12) if part == "weight" else (24,)))
                       for i in range(2) for which in "kv" for part in ("weight", "bias")},
    }  # fmt: skip
    apply_amm(model, blocks, grid=GRID)
    arguments = {**inputs("flux"), "joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.randn(2, 1, 8)]}}

    def load_and_run():  # a single block's processor refuses to be made anew, a double block's was replaced
        model._load_ip_adapter_weights([weights])
        run(model, arguments)

    with pytest.raises(ValueError, match="call remove_amm"):
        load_and_run()
    remove_amm(model)
    model._load_ip_adapter_weights([weights])
    plain = run(model, arguments)
    with pytest.raises(ValueError, match="block 0 has the attention processor FluxIPAdapterAttnProcessor"):
        apply_amm(model, [0], grid=GRID)
    apply_amm(model, [2], grid=GRID)
    assert relative_error(run(model, arguments), plain) > 1e-4


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_group_offloading_to_a_disk(name, tmp_path):
    """No hook brings back what hangs on a processor."""
    model = make(name)
    apply_amm(model, BLOCKS[name], grid=GRID)
    with torch.no_grad():
        expected = run(model, inputs(name))
        model.enable_group_offload(
            torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
        )
        for tensor in model.buffers():  # what memory that was given back may hold
            tensor.data.fill_(torch.nan)
        assert torch.equal(run(model, inputs(name)), expected)


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_attention_masks_are_refused(name):
    model = make(name)
    apply_amm(model, [0], grid=GRID)
    mask = {"attention_mask": torch.ones(2, 16)}
    masked = mask if name == "pixart" else {"joint_attention_kwargs": mask}
    with pytest.raises(ValueError, match="attention_mask was given to a block with AMM"):
        run(model, {**inputs(name), **masked})


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("dit", {"blocks": [0, 3]}, ValueError, r"blocks is \[0, 3\]; the model has the blocks 0 to 2"),
        ("flux", {"blocks": [4], **GRIDS}, ValueError, r"blocks is \[4\]; the model has the blocks 0 to 3"),
        ("dit", {"blocks": [-1]}, ValueError, r"blocks is \[-1\]; the model has the blocks 0 to 2"),
        ("dit", {"blocks": [1, 1]}, ValueError, r"blocks is \[1, 1\]; no block may be given twice"),
        ("dit", {"blocks": [1.0]}, TypeError, r"blocks is \[1\.0\]; it must be one or more block numbers"),
        ("dit", {"blocks": [True]}, TypeError, r"blocks is \[True\]; it must be one or more"),
        ("dit", {"blocks": 1}, TypeError, "blocks is 1; it must be one or more"),
        ("dit", {"blocks": []}, TypeError, r"blocks is \[\]; it must be one or more"),
        ("dit", {"blocks": "dit-b"}, ValueError, "blocks is 'dit-b'; presets are 'dit-xl', 'dit-s'"),
        ("dit", {"blocks": "dit-s"}, ValueError, r"blocks 'dit-s' is \(8, 10\); the model has the blocks 0 to 2"),
        ("flux", {"blocks": [0]}, ValueError, "grid is None; a FluxTransformer2DModel has no sample_size"),
        ("dit", {"blocks": [0], "grid": 16}, TypeError, "grid is 16; it must be a pair"),
        ("dit", {"blocks": [0], "grid": (4, 0)}, ValueError, r"grid is \(4, 0\)"),
        ("dit", {"blocks": [0], "form": "sin"}, ValueError, "form is 'sin'"),
        ("dit", {"blocks": [0], "radius": -1}, ValueError, "radius is -1"),
    ],
)  # fmt: skip
def test_wrong_arguments_change_nothing(name, arguments, error, message):
    model = make(name)
    before = processors(model)
    with pytest.raises(error, match=message):
        apply_amm(model, **arguments)
    assert all(a is b for a, b in zip(processors(model), before, strict=True))


def test_other_models_are_refused():
    for function in (lambda m: apply_amm(m, [0]), remove_amm):
        with pytest.raises(
            TypeError, match="model is a Linear; it must be one of diffusers' DiTTransformer2DModel, "
        ):
            function(nn.Linear(2, 2))


def test_order_of_calls():
    model = make("dit")
    with pytest.raises(ValueError, match="model has no AMM in place"):
        remove_amm(model)
    apply_amm(model, [0])
    with pytest.raises(ValueError, match="model has AMM in place already"):
        apply_amm(model, [1])
    remove_amm(model)
    with pytest.raises(ValueError, match="model has no AMM in place"):
        remove_amm(model)


def test_other_processors_are_not_replaced():
    model = make("dit")
    model.transformer_blocks[2].attn1.set_processor(custom := AttnProcessor())
    before = processors(model)
    with pytest.raises(ValueError, match="block 2 has the attention processor AttnProcessor, which"):
        apply_amm(model, [0, 1, 2])
    assert all(a is b for a, b in zip(processors(model), before, strict=True))
    apply_amm(model, [0, 1])
    assert model.transformer_blocks[2].attn1.processor is custom

    model = make("sd35")
    model.fuse_qkv_projections()  # whose processor forgets the norms of q and k
    with pytest.raises(ValueError, match="leaves out the block's norms of queries and keys"):
        apply_amm(model, [2])


def test_edt_kernels_needs_no_diffusers():
    code = (
        "import sys; sys.modules['diffusers'] = None; import edt_kernels\n"
        "try: import edt_kernels.integrations.diffusers\n"
        "except ImportError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "needs the package diffusers, which is not installed: pip install 'diffusers" in out.stdout


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("name", ["dit", "sd35", "flux"])
def test_modulated_models_on_interpreted_kernels(name, monkeypatch):
    model, arguments = make(name), inputs(name)
    apply_amm(model, BLOCKS[name], grid=GRID)
    with monkeypatch.context() as patch:
        patch.setenv("EDT_KERNELS_BACKEND", "reference")
        expected = gradients(model, arguments)
    with torch.profiler.profile() as profile:
        actual = gradients(model, arguments)
    calls = {event.key: event.count for event in profile.key_averages()}
    num_modulated = sum(len(image_attentions(blocks_of(model)[number])) for number in BLOCKS[name])
    assert calls["edt_kernels::amm_attention"] == calls["edt_kernels::amm_attention_backward"] == num_modulated
    assert_same(actual, expected, floor=1e-2)
