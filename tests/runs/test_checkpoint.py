"""Weights on disk and under the released names."""

import errno
import json
import os

import pytest
import torch
from released import TINY, fixture, released_shapes, tiny_model, under
from safetensors.torch import load_file, save_file

import edt
from edt.model.layers import PositionEmbedding, sincos_position_embedding
from edt.runs.checkpoint import write_checkpoint
from edt.runs.weights import to_released_state_dict, weights_folder


def released_state(preset, fill):
    """A state dict under the released names, in the released shapes, without memory for its values."""
    config = edt.PRESETS[preset]
    shapes = released_shapes(config["hidden_sizes"], config["depths"], config["num_attention_heads"])
    state = {name: torch.full((), fill(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items())}
    for name, shape in shapes.items():
        if name.endswith("pos_embed"):
            side = round(shape[1] ** 0.5)
            state[name] = position_table(shape[2], side)[None]
    return state


def position_table(channels, side):
    """The formula token by token: the column's [sin, cos], then the row's."""
    quarter = channels // 4
    frequencies = [10000 ** (-k / quarter) for k in range(quarter)]
    tables = torch.tensor([[p * f for f in frequencies] for p in range(side)], dtype=torch.float64)
    tokens = [
        torch.cat([tables[x].sin(), tables[x].cos(), tables[y].sin(), tables[y].cos()])
        for y in range(side)
        for x in range(side)
    ]
    return torch.stack(tokens).float()


@pytest.mark.parametrize("preset", ["EDT-S/2", "EDT-B/2"])
def test_released_names_load_strictly(preset):
    model = edt.EDTTransformer2DModel(**edt.PRESETS[preset])
    state = released_state(preset, fill=lambda i: 1 + i / 1024)
    edt.load_released_state_dict(model, state)
    loaded = to_released_state_dict(model)
    assert sorted([*loaded, *(name for name in state if name.endswith("pos_embed"))]) == sorted(state)
    for name, parameter in loaded.items():
        assert (parameter == state[name].flatten()[0]).all(), name
    assert sum(p.numel() for p in loaded.values()) == sum(p.numel() for p in model.parameters())


def test_released_names_load_strictly_into_xl():
    """On the meta device, to spare 3 GB: names, shapes and position tables are checked, no values are kept."""
    with torch.device("meta"):
        model = edt.load_preset("EDT-XL/2")
    for module in model.modules():
        if isinstance(module, PositionEmbedding):
            tokens, channels = module.table.shape
            module.table = sincos_position_embedding(channels, (round(tokens**0.5),) * 2)
    state = released_state("EDT-XL/2", fill=lambda i: 1.0)
    edt.load_released_state_dict(model, state)
    del state["blocks.27.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"missing blocks\.27\.mlp\.fc2\.bias"):
        edt.load_released_state_dict(model, state)


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


@pytest.fixture
def tiny_state():
    return under("param", fixture("edt_tiny_s"))


BLOCK = "blocks.6.attn.proj.weight"
TABLE = "concat_blocks.1.pos_embed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, BLOCK), rf"missing {BLOCK}; unexpected none"),
        (lambda state: without(state, TABLE), rf"missing {TABLE}; unexpected none"),
        (
            lambda state: {**state, "blocks.12.mlp.fc1.bias": torch.zeros(1)},
            r"missing none; unexpected blocks\.12",
        ),
        (lambda state: {f"module.{name}": t for name, t in state.items()}, r"and \d+ more; unexpected module\.bl"),
        (lambda state: {**state, BLOCK: state[BLOCK][:, 1:]}, rf"{BLOCK} of shape \(48, 47\).* \(48, 48\)"),
        (lambda state: {**state, TABLE: state[TABLE][:, :16]}, rf"position table {TABLE}"),
        (lambda state: {**state, TABLE: state[TABLE].flip(1)}, rf"position table {TABLE}"),
        (lambda state: {**state, "pos_embed": state["pos_embed"] + 1e-3}, "position table pos_embed"),
        (lambda state: {}, "missing blocks"),
    ],
)
def test_released_state_that_does_not_fit(tiny_state, change, message):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        edt.load_released_state_dict(model, change(tiny_state))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


INPUTS = torch.randn(2, 4, 16, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 999])


@pytest.mark.parametrize("max_shard_size", ["10GB", "300KB"])
def test_round_trip(tmp_path, max_shard_size):
    model = tiny_model(sample_size=(16, 32), mid_mask=(1, (0.1, 0.2)), amm_radius=5.0).eval()
    model.set_amm_blocks((3, 8, 11))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    sharded = len(list(tmp_path.glob("*.safetensors"))) > 1
    assert sharded == (max_shard_size != "10GB")

    loaded = edt.load_checkpoint(tmp_path)
    assert not loaded.training
    assert loaded.latent_size == (16, 32)
    assert loaded.config.amm_blocks == (3, 8, 11)
    configs = [json.loads(each.to_json_string()) for each in (model, loaded)]
    assert configs[0] == without(configs[1], "_name_or_path")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for (name, ours), (_, theirs) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name  # not in the file: rebuilt from the configuration
    labels = torch.tensor([0, 10])
    with torch.no_grad():
        assert torch.equal(loaded(*INPUTS, labels).sample, model(*INPUTS, labels).sample)
    masks = [m.draw_keep_masks(2, generator=torch.Generator().manual_seed(0)) for m in (model, loaded)]
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_half_precision_variant(tmp_path):
    model = tiny_model()
    model.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    loaded = edt.load_checkpoint(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert loaded.dtype == torch.float16
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("max_shard_size", [None, "300KB"])
def test_the_only_variant_need_not_be_named(tmp_path, max_shard_size):
    model = tiny_model()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=max_shard_size or "10GB")
    loaded = edt.load_checkpoint(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path, variant="bf16", max_shard_size="10GB")
    with pytest.raises(ValueError, match="has weights of the variants bf16, fp16; keep one"):
        edt.load_checkpoint(tmp_path)


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


WEIGHTS = "diffusion_pytorch_model.safetensors"


def truncate(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def drop_tensor(path):
    tensors = load_file(path)
    del tensors["merges.1.reduction.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def add_tensor(path):
    save_file({**load_file(path), "stages.5.weight": torch.zeros(1)}, path, metadata={"format": "pt"})


def edit_config(folder, values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"needs a config\.json .*the folder has none"),
        (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, r"no \.safetensors weights"),
        (
            lambda f: truncate(f / WEIGHTS, 0.5),
            ValueError,
            "is damaged, or .*: Unable to load weights from checkpoint file",
        ),
        (
            lambda f: truncate(f / WEIGHTS, 0.999),
            ValueError,
            "is damaged, or .*: Unable to load weights from checkpoint file",
        ),
        (
            lambda f: truncate(f / WEIGHTS, 0),
            ValueError,
            "is damaged, or .*: Unable to load weights from checkpoint file",
        ),
        (
            lambda f: (f / WEIGHTS).write_bytes(b"\x80\x04" * 500),
            ValueError,
            "is damaged, or .*: Unable to load weights from checkpoint file",
        ),
        (
            lambda f: (f / "config.json").write_text("{"),
            ValueError,
            r"checkpoint .*config\.json is no JSON, or torn",
        ),
        (
            lambda f: (f / "config.json").write_text("[]"),
            ValueError,
            r"config\.json is JSON, but list; it must be",
        ),
        (
            lambda f: (f / "config.json").write_text('{"_class_name": "DiT", "sample_size": 8}'),
            ValueError,
            "checkpoint .* is of a DiT; it must be of an EDTTransformer2DModel",
        ),
        *(
            (
                lambda f, value=value: edit_config(f, value),
                ValueError,
                f"checkpoint .* config that do not fit: {message}",
            )
            for value, message in (
                ({"out_channels": None}, "out_channels is None"),
                ({"mlp_ratio": 1e308}, ""),
                ({"depths": {"a": 1}}, ""),
                ({"hidden_sizes": "wide"}, ""),
                ({"num_classes": [7]}, ""),
            )
        ),
        (lambda f: drop_tensor(f / WEIGHTS), ValueError, r"missing merges\.1\.reduction\.weight"),
        (lambda f: add_tensor(f / WEIGHTS), ValueError, r"unexpected stages\.5\.weight"),
    ],
)
def test_damaged_checkpoint(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        edt.load_checkpoint(folder)


def test_checkpoint_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_sizes": [32, 48, 128, 48, 32]}))
    with pytest.raises(ValueError, match=r"checkpoint .* do not fit: .*merges\.1\.reduction\.weight"):
        edt.load_checkpoint(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        edt.load_checkpoint(tmp_path / "nowhere")


def test_missing_shard(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="300KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match="checkpoint"):
        edt.load_checkpoint(tmp_path)


def test_pickled_weights_are_not_loaded(folder):
    """diffusers would fall back to a .bin, whose unpickling can run code; other safetensors do not stand in."""
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "diffusion_pytorch_model.bin")
    weights.rename(folder / "ema.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint .*diffusion_pytorch_model\.safetensors"):
        edt.load_checkpoint(folder)


@torch.no_grad()
def constant_model(value):
    model = tiny_model()
    for parameter in model.parameters():
        parameter.fill_(value)
    return model


def values(model):
    return {value.item() for parameter in model.parameters() for value in parameter.unique()}


def save_step(run, step):
    """A training run's checkpoint: its weights are −step, their averages step."""

    def write(folder):
        constant_model(-float(step)).save_pretrained(folder / "model")
        constant_model(float(step)).save_pretrained(folder / "ema")
        (folder / "optimizer.safetensors").write_bytes(b"state")

    return write_checkpoint(run / "checkpoints", step, write, keep=3)


def test_a_run_is_its_newest_averaged_weights(tmp_path):
    steps = [save_step(tmp_path, step) for step in (1, 2)]
    for given, value in ((tmp_path, 2), (steps[0], 1), (steps[0] / "ema", 1), (steps[0] / "model", -1)):
        loaded = edt.load_checkpoint(str(given))
        assert not loaded.training
        assert values(loaded) == {value}
    model = tiny_model()
    edt.initialize_from(model, tmp_path, replace_head=False)
    assert values(model) == {2}


def test_a_folder_of_save_pretrained_goes_before_its_checkpoints(tmp_path):
    save_step(tmp_path, 1)
    tiny_model().save_pretrained(tmp_path)
    assert weights_folder(tmp_path) == tmp_path


def test_damaged_averages_of_a_run_are_passed_over(tmp_path, capsys):
    steps = [save_step(tmp_path, step) for step in (1, 2, 3)]
    truncate(steps[2] / "ema" / WEIGHTS, 0.5)
    (steps[1] / "optimizer.safetensors").write_bytes(b"other")  # of which no sample is drawn
    assert weights_folder(tmp_path) == steps[1] / "ema"
    error = capsys.readouterr().err
    assert f"checkpoint {steps[2]} has" in error
    assert str(steps[1]) not in error
    with pytest.raises(ValueError, match=rf"checkpoint {steps[2]} has .* bytes of ema/"):
        edt.load_checkpoint(steps[2])
    for step in steps[:2]:
        (step / "ema" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="is a run whose checkpoints are all damaged"):
        edt.load_checkpoint(tmp_path)


def test_a_run_without_a_checkpoint_yet(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"needs a config\.json .* or a run's checkpoints"):
        edt.load_checkpoint(tmp_path)


HEAD = [f"final_layer.{part}.{kind}" for part in ("modulation.linear", "linear") for kind in ("weight", "bias")]
TABLE_OF_CLASSES = "label_embedding.weight"


def untrained(**overrides):
    torch.manual_seed(1)
    return edt.EDTTransformer2DModel(**{**TINY, **overrides})


@pytest.mark.parametrize(
    ("overrides", "replace_head", "fresh"),
    [
        ({}, True, HEAD),
        ({}, False, []),
        ({"num_classes": 3}, True, [TABLE_OF_CLASSES, *HEAD]),
        ({"num_classes": 12}, False, [TABLE_OF_CLASSES]),
        ({"num_classes": 0}, True, HEAD),
        ({"out_channels": 4}, False, HEAD[2:]),
    ],
)
def test_initialize_from(folder, overrides, replace_head, fresh):
    source, model, untouched = tiny_model(), untrained(**overrides), untrained(**overrides)
    assert sorted(edt.initialize_from(model, folder, replace_head=replace_head)) == sorted(fresh)
    for name, parameter in model.named_parameters():
        expected = untouched if name in fresh else source
        expected = dict(expected.named_parameters())[name]
        if name == TABLE_OF_CLASSES and name in fresh:
            assert torch.equal(parameter[-1], source.label_embedding.weight[-1])
            parameter, expected = parameter[:-1], expected[:-1]
        assert torch.equal(parameter, expected), name
    assert all(p.requires_grad for p in model.parameters())


def test_initialize_from_an_unconditional_model():
    source, model, untouched = tiny_model(num_classes=0), untrained(), untrained()
    assert edt.initialize_from(model, source) == [TABLE_OF_CLASSES, *HEAD]
    assert torch.equal(model.label_embedding.weight, untouched.label_embedding.weight)
    assert torch.equal(model.stages[4].modulation.linear.bias, source.stages[4].modulation.linear.bias)
    with torch.no_grad():
        assert not model.eval()(torch.randn(2, 4, 16, 16), INPUTS[1], torch.tensor([0, 10])).sample.any()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"in_channels": 3},
            r"patch_embedding.proj.weight is \(32, 4, 2, 2\) there and \(32, 3, 2, 2\) in the model",
        ),
        ({"sample_size": 32}, r"rel_pos_bias is \(225, 2\) there and \(961, 2\) in the model.* and 8 more"),
        ({"depths": (2, 2, 1, 3, 3)}, r"stages\.2\.blocks\.1\.\S+ is \(\S+ 4\) there and missing in the model"),
        ({"depths": (2, 2, 3, 3, 3)}, r"stages\.2\.blocks\.2\.\S+ is missing there and \(\S+ 4\) in the model"),
        ({"task_routing": (0.8, 4.0)}, r"task_routing is \(\) there and \(0\.8, 4\.0\) in the model"),
        ({"hidden_sizes": (24, 48, 64, 48, 24)}, r"patch_embedding.proj.weight is \(32, .* and \d+ more"),
    ],
)
def test_initialize_from_weights_that_do_not_fit(overrides, message):
    model = untrained(**overrides)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"the trained weights do not fit the model: .*{message}"):
        edt.initialize_from(model, tiny_model())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_initialize_from_a_grid_turned_over():
    """All of whose shapes are the same."""
    model = untrained(sample_size=(8, 16))
    with pytest.raises(ValueError, match=r"sample_size is \(16, 8\) there and \(8, 16\) in the model$"):
        edt.initialize_from(model, untrained(sample_size=(16, 8)))


def test_initialize_from_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        edt.initialize_from(untrained(), tmp_path / "nowhere")


def test_a_disk_that_fails_is_no_damaged_checkpoint(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(edt.EDTTransformer2DModel, "from_pretrained", fail)
    with pytest.raises(OSError, match=r"checkpoint .* cannot be read: Input/output error") as caught:
        edt.load_checkpoint(folder)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("text", ["", "[1]", '{"_class_name"'])
def test_a_torn_index_of_a_pipeline(folder, text):
    (folder / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match=r"checkpoint .*model_index\.json is"):
        edt.load_checkpoint(folder)
