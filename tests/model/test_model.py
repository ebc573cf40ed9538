"""The model: parity with the released implementation, and what its arguments promise."""

import itertools
import math
from collections import Counter

import accelerate
import diffusers
import pytest
import torch
from released import (
    BLOCK_STAGE_AND_INDEX,
    TINY,
    fixture,
    relative_error,
    released_model,
    released_shapes,
    tiny_model,
    under,
)
from torch.utils.flop_counter import FlopCounterMode

import edt
import edt_kernels
from edt.diffusion.process import guide
from edt.model.layers import MLP, TimestepEmbedding
from edt.runs.weights import to_released_state_dict

PARITY = 1e-5


@pytest.fixture(scope="module")
def released():
    return fixture("edt_tiny_s")


@pytest.fixture
def inputs(released):
    return released["in.x"], released["in.t"], released["in.y"]


@pytest.mark.parametrize(("blocks", "output"), [((7, 10), "out.amm"), ((), "out.no_amm")])
def test_evaluation_forward(released, inputs, blocks, output):
    model = released_model().eval()
    model.set_amm_blocks(blocks)
    with torch.no_grad():
        assert relative_error(model(*inputs).sample, released[output]) <= PARITY


def test_evaluation_forward_with_gradients_enabled(released, inputs):
    """The attention takes another path on a CPU where gradients may be asked for."""
    assert relative_error(released_model().eval()(*inputs).sample.detach(), released["out.amm"]) <= PARITY


def test_guidance(released, inputs):
    latents, timestep, labels = (tensor[:2] for tensor in inputs)
    labels = torch.cat([labels, torch.full_like(labels, TINY["num_classes"])])
    with torch.no_grad():
        both = released_model().eval()(latents.repeat(2, 1, 1, 1), timestep.repeat(2), labels).sample
    conditional, unconditional = both.chunk(2)
    expected, expected_unconditional = released["out.cfg_4.0_amm"].chunk(2)
    guided = guide(conditional, unconditional, 4.0)
    assert relative_error(guided, expected) <= PARITY
    # The released forward returns the guided channels in the null half too, the others as they were.
    null_half = torch.cat([guided[:, :3], unconditional[:, 3:]], dim=1)
    assert relative_error(null_half, expected_unconditional) <= PARITY


def shuffle_up(expanded):
    """(B, N, 4C') → (B, 4N, C'): channel (2·p1+p2)·C'+c of token (y, x) → channel c of token (2y+p1, 2x+p2)."""
    B, N, C = expanded.shape
    n = math.isqrt(N)
    up = expanded.new_empty(B, 2 * n, 2 * n, C // 4)
    for y, x, p1, p2 in itertools.product(range(n), range(n), (0, 1), (0, 1)):
        part = 2 * p1 + p2
        up[:, 2 * y + p1, 2 * x + p2] = expanded[:, y * n + x, part * C // 4 : (part + 1) * C // 4]
    return up.flatten(1, 2)


def released_module(model, name):
    """The module of ours whose output is that of the released module `name`."""
    kind, number = name.rsplit(".", 1)
    number = int(number)
    if kind == "blocks":
        stage, block = BLOCK_STAGE_AND_INDEX[number]
        return model.stages[stage].blocks[block]
    if kind == "up_blocks":
        return model.splits[number].expand
    return {"down_blocks": model.merges, "concat_blocks": model.splits}[kind][number]


def stream(output):
    """The residual stream: a block returns the next block's first norm beside it."""
    return output[0] if isinstance(output, tuple) else output


def test_activations(released, inputs):
    expected = under("act.amm", released)
    assert len(expected) == 9
    model, actual = released_model().eval(), {}
    for name in expected:
        hook = lambda module, args, output, name=name: actual.__setitem__(name, stream(output))  # noqa: E731
        released_module(model, name).register_forward_hook(hook)
    with torch.no_grad():
        model(*inputs)
    errors = {}
    for name, activation in actual.items():
        activation = shuffle_up(activation) if name.startswith("up_blocks") else activation
        errors[name] = relative_error(activation, expected[name])
    assert set(errors) == set(expected)
    assert max(errors.values()) <= PARITY, errors


def test_masked_training_forward_and_gradients(released, inputs):
    model = released_model().train()
    keep_masks = [released[f"mask.{i}.keep"].bool() for i in (0, 1)]
    output = model(*inputs, keep_masks=keep_masks).sample
    assert relative_error(output.detach(), released["out.masked_train"]) <= PARITY

    expected = under("grad", released)
    (output * expected.pop("weight")).sum().backward()
    gradients = to_released_state_dict(model, {name: p.grad for name, p in model.named_parameters()})
    assert len(expected) == 14
    errors = {name: relative_error(gradients[name], grad) for name, grad in expected.items()}
    assert max(errors.values()) <= PARITY, errors


def test_timestep_frequencies_are_correctly_rounded():
    """Whatever the CPU: the vectorised exponentials of float32 are not."""
    exponents = -math.log(10000) * torch.arange(128, dtype=torch.float32) / 128
    expected = torch.tensor([math.exp(exponent) for exponent in exponents.tolist()])
    assert torch.equal(TimestepEmbedding(8).constant_on("omega", torch.device("cpu")), expected)


@pytest.mark.parametrize("training", [False, True])
def test_agrees_with_the_plain_transcription_at_full_size(training):
    from benchmarks.plain import PlainEDT

    torch.manual_seed(0)
    ours = edt.load_preset("EDT-S/2", class_dropout_prob=0.0).train(training)
    with torch.no_grad():
        for parameter in ours.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    plain = PlainEDT(amm_blocks=(7, 10), class_dropout_prob=0.0).train(training)
    loaded = plain.load_state_dict(to_released_state_dict(ours), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.endswith("pos_embed") for name in loaded.missing_keys)
    latents, timestep, labels = torch.randn(1, 4, 32, 32), torch.tensor([321]), torch.tensor([7])
    keep_masks = ours.draw_keep_masks(1) if training else None
    with torch.no_grad():
        actual = ours(latents, timestep, labels, keep_masks=keep_masks).sample
        expected = plain(latents, timestep, labels, keep_masks or (None, None))
    assert relative_error(actual, expected) <= PARITY


PARAMETER_COUNTS = {
    "EDT-S/2": 38_329_146,
    "EDT-B/2": 152_262_100,
    "EDT-XL/2": 698_523_098,
}


def on_meta(preset):
    with torch.device("meta"):
        return edt.load_preset(preset)


@pytest.mark.parametrize(("preset", "count"), PARAMETER_COUNTS.items())
def test_parameter_counts(preset, count):
    assert sum(p.numel() for p in on_meta(preset).parameters()) == count


def test_parameter_count_of_the_paper_xl():
    assert round(sum(p.numel() for p in on_meta("EDT-XL/2-paper").parameters()) / 1e6, 1) == 708.4


@pytest.mark.parametrize("preset", PARAMETER_COUNTS)
def test_parameter_shapes_are_the_released_ones(preset):
    config = edt.PRESETS[preset]
    expected = released_shapes(config["hidden_sizes"], config["depths"], config["num_attention_heads"])
    model = on_meta(preset)
    actual = {name: tuple(tensor.shape) for name, tensor in to_released_state_dict(model).items()}
    assert actual == {name: shape for name, shape in expected.items() if not name.endswith("pos_embed")}


def test_a_fresh_model_predicts_zero(inputs):
    model = edt.EDTTransformer2DModel(**TINY).eval()
    assert not model(*inputs).sample.any()


def test_initial_values():
    torch.manual_seed(0)
    model = edt.EDTTransformer2DModel(**{**TINY, "num_classes": 100, "hidden_sizes": (96, 144, 192, 144, 96)})

    def std(parameter):
        return parameter.std().item()

    block = model.stages[0].blocks[0]
    for weight in (block.attn.qkv.weight, block.mlp.fc1.weight, model.merges[0].modulation.linear.weight):
        bound = math.sqrt(6 / sum(weight.shape))  # xavier-uniform
        assert 0.98 * bound < weight.abs().max().item() <= bound
        assert std(weight) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    patches = model.patch_embedding.proj.weight  # as a Linear from a patch to channels
    bound = math.sqrt(6 / (patches[0].numel() + len(patches)))
    assert 0.98 * bound < patches.abs().max().item() <= bound
    for normal in (
        model.label_embedding.weight,
        model.timestep_embedding.fc1.weight,
        model.timestep_embedding.fc2.weight,
        block.attn.attention.rel_pos_bias,
    ):
        assert std(normal) == pytest.approx(0.02, rel=0.15)
    zero = [
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".bias")
        or name.startswith("final_layer")
        or (name.startswith("stages") and ".modulation." in name)
    ]
    assert not any(parameter.any() for parameter in zero)
    for layer in (*model.merges, *model.splits):
        assert std(layer.modulation.linear.weight) > 0.01


def test_amm_acts_in_evaluation_mode_only(inputs):
    model = tiny_model()
    without = tiny_model(amm_blocks=())
    with torch.no_grad():
        assert not torch.equal(model.eval()(*inputs).sample, without.eval()(*inputs).sample)
        assert torch.equal(model.train()(*inputs).sample, without.train()(*inputs).sample)


@pytest.mark.parametrize("blocks", [(0,), (7, 10), (2, 4, 11)])
def test_amm_acts_in_its_blocks_only(inputs, blocks):
    model = tiny_model(amm_blocks=()).eval()
    model.set_amm_blocks(blocks)
    modulated, changed = [], []
    for number, (stage, block) in enumerate(BLOCK_STAGE_AND_INDEX):
        attention = model.stages[stage].blocks[block].attn.attention
        if attention.amm != "never":
            assert attention.amm == "inference"
            modulated.append(number)
        attention.register_forward_hook(
            lambda module, args, output, number=number: (
                changed.append(number)
                if not torch.equal(
                    output, edt_kernels.amm_attention(*args, grid=module.grid, rel_pos_bias=module.rel_pos_bias)
                )
                else None
            )
        )
    with torch.no_grad():
        model(*inputs)
    assert tuple(modulated) == tuple(changed) == blocks
    assert model.config.amm_blocks == blocks


def test_amm_form_and_radius_change_the_table():
    tables = [
        tiny_model(**overrides).stages[4].blocks[2].attn.attention.modulation
        for overrides in ({}, {"amm_form": "cos"}, {"amm_radius": 2.0})
    ]
    assert tables[0].shape == (15, 15)
    assert tables[0][7, 7] == pytest.approx(0.5 * math.e)
    assert tables[1][7, 7] == pytest.approx(1.3)
    assert (tables[2] > 0).sum() == 13  # d² ≤ 4


@pytest.mark.parametrize("sample_size", [(16, 32), (32, 16), 8, (8, 24)])
def test_rectangular_latents_run_and_train(sample_size):
    model = tiny_model(sample_size=sample_size)
    shape = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    latents, timestep, labels = torch.randn(2, 4, *shape), torch.tensor([3, 999]), torch.tensor([0, 10])
    output = model.train()(latents, timestep, labels, keep_masks=model.draw_keep_masks(2)).sample
    assert output.shape == (2, 8, *shape)
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model.eval()(latents, timestep, labels).sample.shape == (2, 8, *shape)


def test_rows_and_columns_are_not_confused():
    """Transposed weights on transposed latents give the transposed prediction, position tables apart."""
    wide, tall = tiny_model(sample_size=(8, 16)).eval(), tiny_model(sample_size=(16, 8)).eval()
    for model in (wide, tall):
        for module in model.modules():
            if isinstance(module, edt.model.layers.PositionEmbedding):
                module.table.zero_()
    state = wide.state_dict()
    grids = [stage.blocks[0].attn.attention.grid for stage in wide.stages]
    for name, tensor in state.items():
        if name.endswith("rel_pos_bias"):
            H, W = grids[int(name.split(".")[1])]
            state[name] = tensor.view(2 * H - 1, 2 * W - 1, -1).transpose(0, 1).reshape(tensor.shape)
        elif name == "patch_embedding.proj.weight":
            state[name] = tensor.transpose(2, 3)
        elif name.startswith("merges") and ".modulation." in name:
            state[name] = swap_middle_parts(tensor, 8)
        elif name.startswith("merges"):
            state[name] = swap_middle_parts(tensor.T, 4).T
        elif name.endswith("expand.weight") or name.startswith("final_layer.linear"):
            state[name] = swap_middle_parts(tensor, 4)
    tall.load_state_dict(state)
    latents, timestep, labels = torch.randn(2, 4, 8, 16), torch.tensor([5, 500]), torch.tensor([1, 2])
    with torch.no_grad():
        expected = wide(latents, timestep, labels).sample
        actual = tall(latents.transpose(2, 3), timestep, labels).sample.transpose(2, 3)
    assert relative_error(actual, expected) <= PARITY


def swap_middle_parts(tensor, parts):
    """Exchanges the 2×2 neighbours (0,1) and (1,0) in each group of four of the `parts` parts of dimension 0."""
    chunks = list(tensor.chunk(parts))
    for i in range(0, parts, 4):
        chunks[i + 1], chunks[i + 2] = chunks[i + 2], chunks[i + 1]
    return torch.cat(chunks)


@pytest.mark.parametrize("num_classes", [0, 1, 3, 1000])
def test_num_classes(num_classes, inputs):
    latents, timestep, _ = inputs
    model = tiny_model(num_classes=num_classes)
    labels = torch.tensor([0, num_classes, num_classes]) if num_classes else None
    assert model(latents, timestep, labels).sample.shape == (3, 8, 16, 16)
    if num_classes:
        assert model.label_embedding.weight.shape == (num_classes + 1, 32)
    else:
        assert model.label_embedding is None
        assert torch.equal(model(latents, timestep).sample, model(latents, timestep, None).sample)


def test_patch_size_one_and_other_channels():
    model = tiny_model(sample_size=8, patch_size=1, in_channels=1, out_channels=2)
    output = model(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), torch.tensor([0, 1])).sample
    assert output.shape == (2, 2, 8, 8)


def test_keeping_every_token_changes_nothing(inputs):
    model = tiny_model().train()
    keep_masks = [torch.ones_like(mask) for mask in model.draw_keep_masks(3)]
    with torch.no_grad():
        assert torch.equal(model(*inputs, keep_masks=keep_masks).sample, model(*inputs).sample)


def test_dropped_tokens_do_not_reach_the_merge(inputs):
    """Their value changes the decoder through the skip, but nothing between the first merge and the splits."""
    model = tiny_model().train()
    keep = torch.ones(3, 64, dtype=torch.bool)
    keep[:, [0, 1, 8, 9]] = False  # all of the first merged token
    merged = []
    model.merges[0].register_forward_hook(lambda module, args, output: merged.append(output))
    with torch.no_grad():
        model(*inputs, keep_masks=[keep, torch.ones(3, 16, dtype=torch.bool)])
    only_position = model.merges[0].position.table[0].expand(3, -1)
    assert torch.equal(merged[0][:, 0], only_position)
    assert not torch.equal(merged[0][:, 1], model.merges[0].position.table[1].expand(3, -1))


def test_mid_mask_replaces_dropped_tokens_by_their_position(inputs):
    model = tiny_model(mid_mask=(1, (0.15, 0.25))).train()
    mid_keep, *keep_masks = model.draw_keep_masks(3, generator=torch.Generator().manual_seed(1))
    assert (~mid_keep).any(dim=1).all()
    into_block = []

    def note(module, args):
        x, _, normed, _ = args
        assert normed is None  # the norm of the tokens as they were
        into_block.append(x)

    model.stages[0].blocks[1].register_forward_pre_hook(note)
    with torch.no_grad():
        model(*inputs, keep_masks=[torch.ones_like(mid_keep), *keep_masks])
        model(*inputs, keep_masks=[mid_keep, *keep_masks])
    unmasked, masked = into_block
    position = model.position.table.expand(3, -1, -1)
    assert torch.equal(masked[mid_keep], unmasked[mid_keep])
    assert torch.equal(masked[~mid_keep], position[~mid_keep])


def test_xl_keep_masks_come_in_order_of_use():
    model = tiny_model(sample_size=(16, 32), mid_mask=(1, (0.15, 0.25)))
    shapes = [tuple(mask.shape) for mask in model.draw_keep_masks(3)]
    assert shapes == [(3, 128), (3, 128), (3, 32)]  # before block 1, first merge, second merge
    assert [tuple(mask.shape) for mask in tiny_model().draw_keep_masks(2)] == [(2, 64), (2, 16)]


def test_drop_ratios_are_drawn_once_per_mask_within_their_ranges():
    model = tiny_model(sample_size=64, mid_mask=(1, (0.15, 0.25)))
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(40):
        masks = model.draw_keep_masks(64, generator=generator)
        assert all(mask.dtype == torch.bool for mask in masks)
        ratios.append([(~mask).float().mean().item() for mask in masks])
    for observed, (low, high), tokens in zip(
        zip(*ratios), [(0.15, 0.25), (0.4, 0.5), (0.1, 0.2)], (1024, 1024, 256), strict=True
    ):
        noise = 4 * math.sqrt(0.25 / (64 * tokens))
        assert low - noise <= min(observed) < low + 0.02
        assert high - 0.02 < max(observed) <= high + noise


def test_keep_masks_follow_the_generator():
    model = tiny_model()
    first, second, other = (
        model.draw_keep_masks(2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(mask.device.type == "meta" for mask in model.draw_keep_masks(2, device="meta"))


def test_labels_are_dropped_in_training_mode_only(inputs):
    model = tiny_model(class_dropout_prob=1.0)
    latents, timestep, labels = inputs
    null = torch.full_like(labels, TINY["num_classes"])
    with torch.no_grad():
        assert torch.equal(model.train()(*inputs).sample, model.eval()(latents, timestep, null).sample) is False
        model.set_amm_blocks(())
        dropped = model.train()(*inputs).sample
        assert torch.equal(dropped, model.eval()(latents, timestep, null).sample)
        assert not torch.equal(dropped, model.eval()(*inputs).sample)


def test_share_of_dropped_labels():
    model = tiny_model(class_dropout_prob=0.1).train()
    seen = []
    model.label_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    labels = torch.arange(20_000) % 10
    torch.manual_seed(0)
    model._embed_conditioning(torch.full_like(labels, 5), labels, torch.float32, None)
    dropped = seen[0] == 10
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(seen[0][~dropped], labels[~dropped])


@pytest.mark.parametrize("training", [False, True])
def test_given_label_drops_are_those_applied(inputs, training):
    model = tiny_model(class_dropout_prob=1.0, amm_blocks=()).train(training)
    latents, timestep, labels = inputs
    drops = torch.tensor([True, False, True])
    state = torch.get_rng_state()
    with torch.no_grad():
        actual = model(*inputs, label_drops=drops).sample
        assert torch.equal(torch.get_rng_state(), state)  # nothing drawn beside them
        expected = model.eval()(latents, timestep, torch.where(drops, TINY["num_classes"], labels)).sample
    assert torch.equal(actual, expected)


def test_drawn_label_drops():
    model = tiny_model(class_dropout_prob=0.1)
    first, second, other = (
        model.draw_label_drops(20_000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert (first.shape, first.dtype) == ((20_000,), torch.bool)
    assert first.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert model.draw_label_drops(2, device="meta").device.type == "meta"
    assert not tiny_model(class_dropout_prob=0.0).draw_label_drops(100).any()
    assert tiny_model(num_classes=0).draw_label_drops(2) is None


def test_labels_are_dropped_as_drawn_from_the_global_generator(inputs):
    model = tiny_model(class_dropout_prob=0.5).train()
    torch.manual_seed(3)
    drops = model.draw_label_drops(3)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(model(*inputs).sample, model(*inputs, label_drops=drops).sample)


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0)])
def test_scalar_timestep(inputs, timestep):
    model = tiny_model().eval()
    latents, _, labels = inputs
    with torch.no_grad():
        expected = model(latents, torch.full((3,), 7), labels).sample
        assert torch.equal(model(latents, timestep, labels).sample, expected)


def test_return_dict(inputs):
    model = tiny_model().eval()
    with torch.no_grad():
        as_tuple = model(*inputs, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[0], model(*inputs).sample)


def test_hidden_states_of_the_middle_stage(inputs):
    model = tiny_model(sample_size=16).eval()
    seen = []
    model.stages[2].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        expected = model(*inputs).sample
        output = model(*inputs, return_hidden=True)
        sample, hidden = model(*inputs, return_dict=False, return_hidden=True)
    assert output.hidden.shape == (3, 4, 64)
    assert torch.equal(output.hidden, seen[1])
    assert torch.equal(hidden, seen[2])
    assert torch.equal(output.sample, expected)
    assert torch.equal(sample, expected)


def test_bfloat16(inputs):
    latents, timestep, labels = inputs
    model = tiny_model().eval()
    with torch.no_grad():
        expected = model(*inputs).sample
        actual = model.to(torch.bfloat16)(latents.bfloat16(), timestep, labels).sample
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual.float(), expected) < 0.03


def test_autocast_forward_and_gradients(inputs):
    model = tiny_model().train()
    weight = torch.randn(3, 8, 16, 16, generator=torch.Generator().manual_seed(0))

    def gradients(enabled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(*inputs).sample
        (output.float() * weight).sum().backward()
        return output.float(), torch.cat([p.grad.flatten() for p in model.parameters()])

    expected, expected_gradient = gradients(False)
    actual, gradient = gradients(True)
    assert relative_error(actual, expected) < 0.03
    cosine = torch.nn.functional.cosine_similarity(gradient, expected_gradient, dim=0)
    assert 0.999 < cosine < 1 - 1e-7  # close, and yet another precision


@pytest.mark.parametrize("wide", ["latents", "weights"])
def test_autocast_leaves_float64_as_it_is(inputs, wide):
    latents, model = inputs[0], tiny_model()
    latents, model = (latents.double(), model) if wide == "latents" else (latents, model.double())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"hidden_states is .*float64"):
        model(latents, *inputs[1:])


def test_gradient_checkpointing(inputs):
    model = tiny_model(mid_mask=(1, (0.15, 0.25))).train()
    keep_masks = model.draw_keep_masks(3, generator=torch.Generator().manual_seed(0))
    calls = []
    model.stages[0].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        calls.clear()
        model.zero_grad()
        model(*inputs, keep_masks=keep_masks).sample.square().sum().backward()
        assert len(calls) == 1 + checkpointing  # forward again in the backward pass
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_residuals_and_norms_are_fused_across_blocks(inputs, monkeypatch, masked):
    calls = Counter()

    def counted(function):
        def count(*args, **kwargs):
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        return count

    for module, op in (
        (edt_kernels.nn, edt_kernels.adaln),
        (edt_kernels.nn, edt_kernels.gated_residual_adaln),
        (edt_kernels, edt_kernels.gated_residual),
    ):
        monkeypatch.setattr(module, op.__name__, counted(op))
    model = tiny_model(mid_mask=(1, (0.1, 0.2))).train()
    model(*inputs, keep_masks=model.draw_keep_masks(3) if masked else None)
    stages, blocks, replacements = 5, 12, int(masked)
    assert calls == {
        "adaln": stages + replacements + 1,  # the final layer
        "gated_residual": stages + replacements,
        "gated_residual_adaln": 2 * blocks - stages - replacements,
    }


def test_mlp_recomputes_gelu_but_no_product():
    torch.manual_seed(0)
    mlp, x = MLP(24, 40), torch.randn(2, 5, 24, requires_grad=True)
    mlp.fc2.register_forward_hook(lambda module, args, output: 3 * output)  # as an adapter might

    def gradients(function):
        with FlopCounterMode(display=False) as counter:
            output = function(x)
            output.square().sum().backward()
        leaves = (x, *mlp.parameters())
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return [output.detach(), *found], counter.get_total_flops()

    expected, flops = gradients(lambda x: mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x), approximate="tanh")))
    actual, actual_flops = gradients(mlp)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert actual_flops == flops == 3 * 2 * 2 * 10 * 24 * 40


def test_repeated_blocks_compile(inputs):
    """Nine variants, more than torch compiles of one function by default."""
    model = tiny_model(depths=(2, 2, 2, 2, 1), amm_blocks=()).eval()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(*inputs).sample
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert relative_error(model(*inputs).sample, expected) <= PARITY


def test_compiles_without_graph_breaks():
    model = tiny_model(
        sample_size=(8, 16),
        hidden_sizes=(16, 16, 24, 16, 16),
        num_attention_heads=(2, 2, 2, 2, 2),
        depths=(1, 1, 1, 1, 1),
        amm_blocks=(3,),
    ).train()
    inputs = torch.randn(2, 4, 8, 16), torch.tensor([1, 2]), torch.tensor([3, 4])
    keep_masks = model.draw_keep_masks(2)

    def gradients(function):
        model.zero_grad()
        output = function(*inputs, keep_masks=keep_masks, return_dict=False)[0]
        output.square().sum().backward()
        return output.detach(), [p.grad.clone() for p in model.parameters()]

    expected, expected_gradients = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual, actual_gradients = gradients(compiled)
    assert relative_error(actual, expected) <= PARITY
    for a, e in zip(actual_gradients, expected_gradients, strict=True):
        assert relative_error(a, e) <= PARITY
    with torch.no_grad():
        expected = model.eval()(*inputs, return_dict=False)[0]
        assert relative_error(compiled(*inputs, return_dict=False)[0], expected) <= PARITY


LATENTS, TIMESTEP, LABELS = torch.zeros(2, 4, 16, 16), torch.tensor([0, 1]), torch.tensor([0, 10])
KEEP = [torch.ones(2, 64, dtype=torch.bool), torch.ones(2, 16, dtype=torch.bool)]

BAD_CALLS = {
    "height": ((torch.zeros(2, 4, 8, 16), TIMESTEP, LABELS), {}, ValueError, r"hidden_states has shape"),
    "odd size": ((torch.zeros(2, 4, 17, 17), TIMESTEP, LABELS), {}, ValueError, r"hidden_states has shape"),
    "channels": ((torch.zeros(2, 3, 16, 16), TIMESTEP, LABELS), {}, ValueError, r"hidden_states .*\(B, 4, 16"),
    "no batch": ((torch.zeros(4, 16, 16), TIMESTEP, LABELS), {}, ValueError, r"hidden_states has shape"),
    "integers": ((LATENTS.long(), TIMESTEP, LABELS), {}, TypeError, r"hidden_states is torch.int64"),
    "other dtype": (
        (LATENTS.bfloat16(), TIMESTEP, LABELS),
        {},
        TypeError,
        r"hidden_states is .*16, but the weights",
    ),
    "no tensor": (([[0.0]], TIMESTEP, LABELS), {}, TypeError, r"hidden_states is list"),
    "timesteps": ((LATENTS, torch.zeros(3), LABELS), {}, ValueError, r"timestep has shape \(3,\)"),
    "timestep 2-d": ((LATENTS, torch.zeros(2, 1), LABELS), {}, ValueError, r"timestep has shape \(2, 1\)"),
    "label high": ((LATENTS, TIMESTEP, torch.tensor([0, 11])), {}, ValueError, r"class_labels has values .* 11"),
    "label low": ((LATENTS, TIMESTEP, torch.tensor([-1, 0])), {}, ValueError, r"class_labels has values from -1"),
    "labels": ((LATENTS, TIMESTEP, torch.zeros(3).long()), {}, ValueError, r"class_labels has shape \(3,\)"),
    "label dtype": ((LATENTS, TIMESTEP, torch.zeros(2)), {}, TypeError, r"class_labels is torch.float32"),
    "label bool": ((LATENTS, TIMESTEP, torch.zeros(2) > 0), {}, TypeError, r"class_labels is torch.bool"),
    "label list": ((LATENTS, TIMESTEP, [0, 1]), {}, TypeError, r"class_labels is list"),
    "timestep bool": ((LATENTS, True, LABELS), {}, TypeError, r"timestep is a bool"),
    "timestep text": ((LATENTS, "1", LABELS), {}, TypeError, r"timestep is a str"),
    "timestep bools": ((LATENTS, TIMESTEP > 0, LABELS), {}, TypeError, r"timestep is torch.bool"),
    "timestep nan": ((LATENTS, math.nan, LABELS), {}, ValueError, r"timestep is nan; it must be finite"),
    "timestep huge": (
        (LATENTS, 10**400, LABELS),
        {},
        ValueError,
        r"timestep is an integer of 1329 bits; it must be finite",
    ),
    "timestep beyond float32": ((LATENTS, 1e39, LABELS), {}, ValueError, r"timestep is 1e\+39; it must be finite"),
    "timestep beyond int64": (
        (LATENTS, 2**63, LABELS),
        {},
        ValueError,
        "timestep is 9223372036854775808; it must",
    ),
    "timesteps beyond float32": (
        (LATENTS, torch.tensor(1e39, dtype=torch.float64), LABELS),
        {},
        ValueError,
        "timestep has values that are not finite in float32",
    ),
    "timesteps inf": ((LATENTS, TIMESTEP / 0, LABELS), {}, ValueError, r"timestep has values that are not finite"),
    "timestep meta": (
        (LATENTS, TIMESTEP.to("meta"), LABELS),
        {},
        ValueError,
        r"timestep is on meta; it must have",
    ),
    "label device": ((LATENTS, TIMESTEP, LABELS.to("meta")), {}, ValueError, r"class_labels is on meta; it must"),
    "masks as one": ((LATENTS, TIMESTEP, LABELS), {"keep_masks": KEEP[0]}, TypeError, r"keep_masks is Tensor"),
    "masks of int": ((LATENTS, TIMESTEP, LABELS), {"keep_masks": 3}, TypeError, r"keep_masks is int; it must be"),
    "mask device": (
        (LATENTS, TIMESTEP, LABELS),
        {"keep_masks": [KEEP[0], KEEP[1].to("meta")]},
        ValueError,
        r"keep_masks is on meta; it must be on hidden_states' device, cpu",
    ),
    "no label": ((LATENTS, TIMESTEP), {}, TypeError, r"class_labels is NoneType"),
    "one mask": ((LATENTS, TIMESTEP, LABELS), {"keep_masks": KEEP[:1]}, ValueError, r"keep_masks has shapes"),
    "mask order": (
        (LATENTS, TIMESTEP, LABELS),
        {"keep_masks": KEEP[::-1]},
        ValueError,
        r"keep_masks .*\[64, 16\]",
    ),
    "mid mask": ((LATENTS, TIMESTEP, LABELS), {"keep_masks": [KEEP[0], *KEEP]}, ValueError, r"keep_masks has"),
    "mask dtype": (
        (LATENTS, TIMESTEP, LABELS),
        {"keep_masks": [mask.float() for mask in KEEP]},
        TypeError,
        r"keep_masks has dtypes",
    ),
    "drops": (
        (LATENTS, TIMESTEP, LABELS),
        {"label_drops": torch.zeros(3) > 0},
        ValueError,
        r"label_drops has shape \(3,\); it must be \(2,\)",
    ),
    "drop dtype": (
        (LATENTS, TIMESTEP, LABELS),
        {"label_drops": torch.zeros(2)},
        TypeError,
        r"label_drops is torch.float32",
    ),
    "drop list": (
        (LATENTS, TIMESTEP, LABELS),
        {"label_drops": [True, False]},
        TypeError,
        r"label_drops is list; it must be a bool tensor",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name):
    args, kwargs, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        tiny_model()(*args, **kwargs)


BAD_DRAWS = [
    ((None,), {}, TypeError, "batch_size is None; it must be an integer"),
    ((True,), {}, TypeError, "batch_size is True; it must be an integer"),
    ((-1,), {}, ValueError, "batch_size is -1; it must be 0 to "),
    ((10**400,), {}, ValueError, "batch_size is an integer of 1329 bits; it must be 0 to "),
    ((2, 7), {}, TypeError, "generator is a int; it must be a torch.Generator or None"),
    ((2,), {"device": "gpu"}, ValueError, "device is 'gpu'; it must be a torch.device"),
    ((2,), {"device": []}, TypeError, r"device is \[\]; it must be a torch.device"),
    (
        (2, torch.Generator()),
        {"device": "meta"},
        ValueError,
        "generator is on cpu; to draw on meta it must be there",
    ),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_DRAWS)
def test_bad_draws(args, kwargs, error, message):
    model = tiny_model()
    for draw in (model.draw_keep_masks, model.draw_label_drops):
        with pytest.raises(error, match=message):
            draw(*args, **kwargs)


@pytest.mark.parametrize("blocks", [None, 7, "7", 1.0, {}])
def test_amm_blocks_that_are_no_collection(blocks):
    with pytest.raises(TypeError, match=f"blocks is {blocks!r}; it must be a tuple of block numbers"):
        tiny_model().set_amm_blocks(blocks)


def test_labels_for_an_unconditional_model():
    with pytest.raises(ValueError, match="class_labels was given to an unconditional model"):
        tiny_model(num_classes=0)(LATENTS, TIMESTEP, LABELS)


def test_label_drops_for_an_unconditional_model():
    with pytest.raises(ValueError, match="label_drops was given to an unconditional model"):
        tiny_model(num_classes=0)(LATENTS, TIMESTEP, label_drops=torch.zeros(2) > 0)


def test_masks_without_the_mid_mask_for_a_model_that_has_one():
    with pytest.raises(ValueError, match=r"keep_masks has shapes .*\[64, 64, 16\]"):
        tiny_model(mid_mask=(1, (0.1, 0.2)))(LATENTS, TIMESTEP, LABELS, keep_masks=KEEP)


@pytest.mark.parametrize("blocks", [(12,), (-1,), (1.5,), ("7",)])
def test_bad_amm_blocks(blocks):
    with pytest.raises(ValueError, match=r"blocks is .*blocks 0 to 11"):
        tiny_model().set_amm_blocks(blocks)


def constants(model):
    return {
        f"{name}.{each}": getattr(module, each)
        for name, module in model.named_modules()
        for each in getattr(module, "_constants", ())
    }


def test_constants_keep_dtype_and_values_in_low_precision():
    """Frequencies rounded to bfloat16 would move the angle of t = 999 by radians."""
    expected, actual = constants(tiny_model()), constants(tiny_model().to(torch.bfloat16))
    assert len(expected) == 1 + 5 + 12  # frequencies, positions, AMM tables
    assert all(actual[name].dtype == torch.float32 for name in expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def spoilt(model):
    """What is in uninitialised memory, made certain."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
    return model


def from_meta_by_copying():
    with torch.device("meta"):
        model = edt.EDTTransformer2DModel(**TINY)
    spoilt(model.to_empty(device="cpu")).load_state_dict(tiny_model().state_dict())
    return model


def from_meta_by_assigning():
    with torch.device("meta"):
        model = edt.EDTTransformer2DModel(**TINY)
    model.load_state_dict(tiny_model().state_dict(), assign=True)
    return model


def from_meta_without_buffers(tmp_path):
    with accelerate.init_empty_weights(include_buffers=True):
        model = edt.EDTTransformer2DModel(**TINY)
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    return accelerate.load_checkpoint_and_dispatch(model, str(weights), device_map={"": "cpu"})


def emptied_and_loaded():
    model = tiny_model()
    spoilt(model.to("meta").to_empty(device="cpu")).load_state_dict(tiny_model().state_dict())
    return model


def functional():
    empty = edt.EDTTransformer2DModel(**TINY).to("meta").eval()
    state = tiny_model().state_dict()
    return lambda *inputs: torch.func.functional_call(empty, state, inputs)


@pytest.mark.parametrize(
    "load",
    [from_meta_by_copying, from_meta_by_assigning, from_meta_without_buffers, emptied_and_loaded, functional],
)
def test_nothing_is_lost_that_no_state_dict_brings_back(load, inputs, tmp_path):
    loaded = load(tmp_path) if load is from_meta_without_buffers else load()
    if isinstance(loaded, torch.nn.Module):
        loaded.eval()
    with torch.no_grad():
        assert torch.equal(loaded(*inputs).sample, tiny_model().eval()(*inputs).sample)


def test_initial_weights_after_the_meta_device(inputs):
    with torch.device("meta"):
        model = edt.EDTTransformer2DModel(**TINY)
    spoilt(model.to_empty(device="cpu")).initialize_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not model.eval()(*inputs).sample.any()


@pytest.mark.parametrize("training", [False, True])
def test_export_with_a_dynamic_batch(training, inputs):
    batch = torch.export.Dim("batch", min=1, max=64)
    model = tiny_model(class_dropout_prob=0.0, depths=(1,) * 5, amm_blocks=(3,)).train(training)
    arguments = dict(zip(("hidden_states", "timestep", "class_labels"), inputs, strict=True))
    with torch.no_grad():
        program = torch.export.export(
            model, (), arguments, dynamic_shapes={name: {0: batch} for name in arguments}
        )
        for size in (1, 3, 5):
            more = {name: tensor[[i % 3 for i in range(size)]] for name, tensor in arguments.items()}
            assert relative_error(program.module()(**more).sample, model(**more).sample) <= PARITY


def test_gradients_of_each_sample_by_vmap(inputs):
    """Of samples, timesteps and labels; no check may read what a transform has no value for."""
    model = tiny_model().eval()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, x, t, y):
        return torch.func.functional_call(model, parameters, (x[None], t[None], y[None])).sample.square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, *inputs)
    for i in range(3):
        model.zero_grad()
        model(*(tensor[i : i + 1] for tensor in inputs)).sample.square().mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each[name][i], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 2}]
)
def test_group_offloading_to_a_disk(options, inputs, tmp_path):
    model = tiny_model(mid_mask=(1, (0.15, 0.25))).eval()
    keep_masks = model.draw_keep_masks(3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(*inputs, keep_masks=keep_masks).sample
        model.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path), **options)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.fill_(torch.nan)
        assert torch.equal(model(*inputs, keep_masks=keep_masks).sample, expected)


def test_block_level_offloading_moves_blocks():
    from diffusers.hooks.group_offloading import _GROUP_OFFLOADING

    model = tiny_model(depths=(3, 3, 3, 3, 3))
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    groups = {}
    for module in model.modules():
        if hasattr(module, "_diffusers_hook"):
            group = module._diffusers_hook.get_hook(_GROUP_OFFLOADING).group
            groups[id(group)] = [*group.parameters, *(p for m in group.modules for p in m.parameters())]
    assert {parameter for group in groups.values() for parameter in group} == set(model.parameters())
    blocks = [block for stage in model.stages for block in stage.blocks]
    for group in groups.values():
        assert sum(block.attn.qkv.weight in set(group) for block in blocks) <= 1


@pytest.mark.parametrize("path", [[], ["save_pretrained"]])
def test_auto_model_loads_a_saved_folder(path, tmp_path, inputs):
    """From the class that the folder names, which is the installed one."""
    model = tiny_model(num_classes=10).eval()
    model.save_pretrained(tmp_path)
    if path:  # a folder that was loaded and saved again
        edt.EDTTransformer2DModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
        tmp_path = tmp_path / "again"
    loaded = diffusers.AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert type(loaded) is edt.EDTTransformer2DModel
    assert "auto_map" not in loaded.config
    with torch.no_grad():
        assert torch.equal(loaded(*inputs).sample, model(*inputs).sample)


def test_mismatched_sizes_are_left_out(tmp_path, inputs):
    tiny_model().save_pretrained(tmp_path)
    model = edt.EDTTransformer2DModel.from_pretrained(tmp_path, num_classes=4, ignore_mismatched_sizes=True)
    assert model.label_embedding.weight.shape[0] == 5
    assert torch.equal(model.stages[2].blocks[0].mlp.fc1.weight, tiny_model().stages[2].blocks[0].mlp.fc1.weight)
    assert 0 < model.label_embedding.weight.std() < 0.04  # initial values
    assert model(inputs[0], inputs[1], torch.tensor([0, 4, 2])).sample.isfinite().all()


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.set_attention_backend("flash"),
        lambda model: model.enable_xformers_memory_efficient_attention(),
    ],
)
def test_other_attentions_are_refused(call):
    with pytest.raises(ValueError, match="EDT_KERNELS_BACKEND"):
        call(tiny_model())
    tiny_model().disable_xformers_memory_efficient_attention()


@pytest.mark.parametrize(
    "name", ["FirstBlockCacheConfig", "PyramidAttentionBroadcastConfig", "TaylorSeerCacheConfig"]
)
def test_caches_of_diffusers_are_refused(name):
    with pytest.raises(TypeError, match=rf"config is a {name}; it must be an edt.StepCacheConfig"):
        tiny_model().enable_cache(getattr(diffusers, name)())


def test_passes_of_one_step_are_cached_apart(inputs):
    """Counted as one, "uncond" would reuse what "cond" left."""
    null = torch.full_like(inputs[2], TINY["num_classes"])
    model = tiny_model().eval()
    steps = [(torch.randn_like(inputs[0]), torch.full((3,), t)) for t in (900, 600, 300)]

    def run(*which):
        outputs = {name: [] for name in which}
        model.enable_cache(edt.StepCacheConfig(interval=2))
        for latents, t in steps:
            for name in which:
                with model.cache_context(name):
                    labels = inputs[2] if name == "cond" else null
                    outputs[name].append(model(latents, t, labels).sample)
        model.disable_cache()
        return outputs

    with torch.no_grad(), model.cache_context("none is enabled"):
        both = run("cond", "uncond")
        for name in both:
            alone = run(name)[name]
            assert all(torch.equal(a, b) for a, b in zip(both[name], alone, strict=True))
        assert not torch.equal(both["cond"][1], model(*steps[1], inputs[2]).sample)
    assert not model.is_cache_enabled


def test_low_rank_adapters_are_saved_and_loaded(inputs, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model().eval()
    with torch.no_grad():
        plain = model(*inputs).sample
        targets = ["qkv", "fc1", "fc2", "proj", "expand"]
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        adapted = model(*inputs).sample
        assert relative_error(adapted, plain) > 1e-3
        model.save_lora_adapter(tmp_path)
        other = tiny_model().eval()
        other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        assert relative_error(other(*inputs).sample, adapted) <= PARITY
        other.fuse_lora()
        assert relative_error(other(*inputs).sample, adapted) <= 10 * PARITY
        other.unfuse_lora()
        other.unload_lora()
        assert relative_error(other(*inputs).sample, plain) <= 10 * PARITY


def test_loading_in_16_bits_is_loading_and_casting(inputs, tmp_path):
    latents, timestep, labels = inputs
    tiny_model().save_pretrained(tmp_path)
    loaded = edt.EDTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    cast = tiny_model().eval().to(torch.bfloat16)
    assert not list(loaded.buffers())
    with torch.no_grad():
        outputs = [model(latents.bfloat16(), timestep, labels).sample for model in (loaded, cast)]
    assert torch.equal(*outputs)
