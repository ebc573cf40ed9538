"""Denoising Task Routing: the mask, and what the blocks see of it."""

import json

import pytest
import torch
from released import TINY, relative_error, tiny_model

import edt
from edt.model.task_routing import check_task_routing, routing_mask

ROUTING = (0.8, 4.0)
SIZES = TINY["hidden_sizes"]


def mask_by_loops(timesteps, channels, beta, alpha):
    rows = []
    for t in timesteps:
        width = int(beta * channels)
        start = round((t / 999) ** alpha * (channels - width))  # halves to even
        rows.append([[start <= c < start + width for c in range(channels)]])
    return torch.tensor(rows)


@pytest.mark.parametrize(("beta", "alpha"), [(0.8, 4.0), (0.8, 1.0), (0.5, 0.5), (1.0, 4.0), (0.3, 0.0)])
@pytest.mark.parametrize("channels", [312, 520, 13])
def test_mask_by_loops(channels, beta, alpha):
    timesteps = [0, 1, 250, 499, 500, 731, 998, 999]
    actual = routing_mask(torch.tensor(timesteps), channels, beta, alpha)
    assert (actual.shape, actual.dtype) == ((8, 1, channels), torch.bool)
    assert torch.equal(actual, mask_by_loops(timesteps, channels, beta, alpha))


def test_the_window_moves_from_the_first_channels_at_0_to_the_last_at_999():
    first, last = routing_mask(torch.tensor([0, 999]), 10, 0.8, 4.0)[:, 0]
    assert first.tolist() == [True] * 8 + [False] * 2
    assert last.tolist() == [False] * 2 + [True] * 8
    starts = routing_mask(torch.arange(1000), 520, 0.8, 4.0)[:, 0].int().argmax(dim=1)
    assert (starts.diff() >= 0).all()
    assert starts[499] < 520 * 0.2 / 10  # α above 1: most of the way at high t


def test_timesteps_of_other_kinds():
    expected = routing_mask(torch.tensor([0, 500, 999]), 52, *ROUTING)
    assert torch.equal(routing_mask(torch.tensor([0.0, 500.0, 999.0]), 52, *ROUTING), expected)
    assert torch.equal(routing_mask(torch.tensor([-3.0, 500.4, 2000.0]), 52, *ROUTING)[::2], expected[::2])


def test_a_narrow_window_has_a_channel():
    assert (routing_mask(torch.arange(1000), 16, 0.01, 1.0).sum(dim=-1) == 1).all()


@pytest.mark.parametrize(
    ("task_routing", "error", "message"),
    [
        ((0.0, 4.0), ValueError, r"task_routing has beta 0\.0; it must be above 0"),
        ((1.1, 4.0), ValueError, r"task_routing has beta 1\.1"),
        ((float("nan"), 4.0), ValueError, "task_routing has beta nan"),
        ((0.8, -1.0), ValueError, r"task_routing has alpha -1\.0; it must be finite and not negative"),
        ((0.8, float("inf")), ValueError, "task_routing has alpha inf"),
        ((0.8, float("nan")), ValueError, "task_routing has alpha nan"),
        ((0.8,), ValueError, r"task_routing is \(0\.8,\); it must be None or two numbers"),
        (0.8, TypeError, r"task_routing is 0\.8; it must be None or two numbers"),
        (("0.8", 4.0), TypeError, "task_routing is"),
        ((True, 4.0), TypeError, "task_routing is"),
    ],
)
def test_bad_configurations(task_routing, error, message):
    with pytest.raises(error, match=message):
        check_task_routing(task_routing)
    with pytest.raises(error, match=message):
        edt.EDTTransformer2DModel(**TINY, task_routing=task_routing)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 16, 16, generator=generator), torch.tensor([0, 600, 999]), torch.tensor([1, 4, 10])


@pytest.mark.parametrize("training", [False, True])
def test_blocks_see_their_window_and_the_rest_passes(inputs, training):
    model = tiny_model(task_routing=ROUTING).train(training)
    seen = []

    def note_block(module, args, output):
        x, _, normed, next_modulation = args
        assert normed is None  # the norm of another window
        assert next_modulation is None
        seen.append((x, output[0]))

    streams = {}
    for number, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda m, args, out, number=number: streams.update({number: (args[0], out)}))
        for block in stage.blocks:
            block.register_forward_hook(note_block)
    with torch.no_grad():
        model(*inputs)
    blocks = iter(seen)
    for number, (x, output) in streams.items():
        mask = mask_by_loops(inputs[1].tolist(), SIZES[number], *ROUTING).expand_as(x)
        for _ in range(TINY["depths"][number]):
            into_block, out_of_block = next(blocks)
            assert torch.equal(into_block[mask], x[mask])
            assert not into_block[~mask].any()
            x = out_of_block + torch.where(mask, 0, x)
        assert torch.equal(output, x)
    assert next(blocks, None) is None


def test_routing_all_channels_is_no_routing(inputs):
    with torch.no_grad():
        expected = tiny_model().eval()(*inputs).sample
        assert relative_error(tiny_model(task_routing=(1.0, 4.0)).eval()(*inputs).sample, expected) <= 1e-5
        assert relative_error(tiny_model(task_routing=ROUTING).eval()(*inputs).sample, expected) > 1e-2


def test_a_scalar_timestep_routes_every_sample(inputs):
    model = tiny_model(task_routing=ROUTING).eval()
    latents, _, labels = inputs
    with torch.no_grad():
        expected = model(latents, torch.full((3,), 600), labels).sample
        assert torch.equal(model(latents, 600, labels).sample, expected)


def test_masked_pass_with_gradient_checkpointing(inputs):
    model = tiny_model(task_routing=ROUTING, mid_mask=(1, (0.15, 0.25))).train()
    keep_masks = model.draw_keep_masks(3, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(*inputs, keep_masks=keep_masks).sample.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.isfinite().all() for gradient in gradients[0])


def test_saved_and_loaded(tmp_path, inputs):
    model = tiny_model(task_routing=ROUTING).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["task_routing"] == list(ROUTING)
    loaded = edt.load_checkpoint(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs).sample, model(*inputs).sample)
    assert edt.EDTTransformer2DModel(**TINY).config.task_routing is None


def test_compiles_without_graph_breaks():
    model = tiny_model(
        sample_size=(8, 16),
        hidden_sizes=(16, 16, 24, 16, 16),
        num_attention_heads=(2, 2, 2, 2, 2),
        depths=(1, 1, 1, 1, 1),
        amm_blocks=(),
        task_routing=ROUTING,
    ).train()
    inputs = torch.randn(2, 4, 8, 16), torch.tensor([1, 900]), torch.tensor([3, 4])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (model, compiled):
        model.zero_grad()
        output = function(*inputs, return_dict=False)[0]
        output.square().sum().backward()
        gradients.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
    for expected, actual in zip(*gradients, strict=True):
        assert relative_error(actual, expected) <= 1e-5
