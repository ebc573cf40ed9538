"""`edt convert`: the released code's files to pipelines and back."""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
from diffusers import AutoencoderKL
from released import TINY, fixture, relative_error, released_shapes, tiny_model, under
from safetensors.torch import save_file

import edt
from edt.cli import main
from edt.files.outputs import NEW, new_output
from edt.model.layers import sincos_position_embedding
from edt.runs.checkpoint import write_checkpoint
from edt.runs.weights import to_released_state_dict, weights_folder
from edt.sampling import conversion
from edt.sampling.conversion import ConvertOptions, convert, recognize_config

PRESETS = edt.PRESETS


@pytest.fixture
def state():
    return under("param", fixture("edt_tiny_s"))


@pytest.fixture
def file(tmp_path, state):
    torch.save(state, tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


@pytest.fixture
def pipeline(tmp_path, file):
    convert(ConvertOptions(file, tmp_path / "pipeline"))
    return tmp_path / "pipeline"


def saved(tmp_path, content):
    torch.save(content, tmp_path / "saved.pt")
    return tmp_path / "saved.pt"


def converted(file, **options):
    """The model of the pipeline that `file` is converted to."""
    output = file.parent / "converted"
    convert(ConvertOptions(file, output, **options))
    return edt.load_checkpoint(output)


def assert_same(actual, expected):
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def load_as_released(file):
    """What the released code's loader makes of a file."""
    content = torch.load(file, map_location=lambda storage, location: storage)
    return content.get("ema", content)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_of_a_file_is_bitwise(tmp_path, state, dtype):
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    file = saved(tmp_path, state)
    assert str(dtype).removeprefix("torch.") in convert(ConvertOptions(file, tmp_path / "pipeline"))
    convert(ConvertOptions(tmp_path / "pipeline", tmp_path / "back.pt"))
    assert_same(load_as_released(tmp_path / "back.pt"), state)
    assert (tmp_path / "back.pt").stat().st_size < 1.1 * file.stat().st_size


@pytest.mark.parametrize("overrides", [{}, {"sample_size": (16, 32)}, {"sample_size": (32, 16), "num_classes": 0}])
def test_round_trip_of_a_folder_is_bitwise(tmp_path, overrides):
    model = tiny_model(**overrides)
    model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    summary = convert(ConvertOptions(tmp_path / "model", tmp_path / "model.pt"))
    assert ("has no model for them" in summary) == bool(overrides)
    back = converted(tmp_path / "model.pt")
    assert_same(back.state_dict(), model.state_dict())
    assert back.latent_size == model.latent_size
    for name in ("patch_size", "in_channels", "out_channels", "num_classes", "mlp_ratio"):
        assert back.config[name] == model.config[name], name


def test_a_run_gives_its_averages(tmp_path):
    averaged = tiny_model()
    raw = edt.EDTTransformer2DModel(**TINY)
    run = tmp_path / "run"

    def write(folder):
        averaged.save_pretrained(folder / "ema")
        raw.save_pretrained(folder / "model")

    write_checkpoint(run / "checkpoints", 1, write, keep=1)
    convert(ConvertOptions(run, tmp_path / "run.pt"))
    assert_same(edt.load_checkpoint(run).state_dict(), averaged.state_dict())
    written = load_as_released(tmp_path / "run.pt")
    for name, tensor in to_released_state_dict(averaged).items():
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize(("blocks", "output"), [((7, 10), "out.amm"), ((), "out.no_amm")])
def test_a_converted_model_computes_what_the_released_one_does(pipeline, blocks, output):
    released = fixture("edt_tiny_s")
    assert weights_folder(pipeline) == pipeline / "transformer"
    model = edt.load_checkpoint(pipeline)
    model.set_amm_blocks(blocks)
    with torch.no_grad():
        actual = model(released["in.x"], released["in.t"], released["in.y"]).sample
    assert relative_error(actual, released[output]) <= 1e-5


def test_the_pipeline_loads_by_its_class(tmp_path, file):
    vae = AutoencoderKL(latent_channels=4, norm_num_groups=2, block_out_channels=(4,))
    vae.save_pretrained(tmp_path / "vae")
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"number {i}" for i in range(10)) + "\n\n")
    convert(ConvertOptions(file, tmp_path / "pipeline", vae=str(tmp_path / "vae"), labels=labels))
    loaded = edt.EDTPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(loaded.transformer, edt.EDTTransformer2DModel)
    assert_same(loaded.vae.state_dict(), vae.state_dict())
    schedulers = [json.loads(each.to_json_string()) for each in (loaded.scheduler, edt.make_scheduler())]
    assert schedulers[0] == schedulers[1]
    assert loaded.id2label == {i: f"number {i}" for i in range(10)}
    loaded.set_progress_bar_config(disable=True)
    assert loaded("number 3", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_averaged_or_raw_weights(tmp_path, state):
    raw = {name: tensor if name.endswith("pos_embed") else -tensor for name, tensor in state.items()}
    arguments = argparse.Namespace(model="EDT-S/2", image_size=256, ckpt=None)
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
    content = {"model": raw, "ema": state, "opt": optimizer, "args": arguments}
    file = saved(tmp_path, content)
    first = "blocks.0.attn.qkv.weight"
    for weights, expected in ((None, state), ("ema", state), ("model", raw)):
        model = converted(file, weights=weights, overwrite=True)
        assert torch.equal(to_released_state_dict(model)[first], expected[first])
    del content["ema"]
    model = converted(saved(tmp_path, content), overwrite=True)
    assert torch.equal(to_released_state_dict(model)[first], raw[first])
    with pytest.raises(ValueError, match=r"saved\.pt has no ema weights; it has model, opt, args"):
        convert(ConvertOptions(file, tmp_path / "other", weights="ema"))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace(".attn.", "._orig_mod.attn."),
    ],
)
def test_prefixes(tmp_path, state, rename):
    model = converted(saved(tmp_path, {"model": {rename(name): tensor for name, tensor in state.items()}}))
    written = to_released_state_dict(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())


def test_dtype(tmp_path, state, file):
    convert(ConvertOptions(file, tmp_path / "half", dtype="float16"))
    convert(ConvertOptions(tmp_path / "half", tmp_path / "half.pt"))
    half = {name: tensor.half() for name, tensor in state.items()}
    assert_same(load_as_released(tmp_path / "half.pt"), half)
    convert(ConvertOptions(tmp_path / "half", tmp_path / "wide.pt", dtype="float32"))
    wide = {name: state[name] if name.endswith("pos_embed") else half[name].float() for name in state}
    assert_same(load_as_released(tmp_path / "wide.pt"), wide)

    mixed = saved(tmp_path, {**state, "x_embedder.proj.bias": half["x_embedder.proj.bias"]})
    convert(ConvertOptions(mixed, tmp_path / "mixed"))
    convert(ConvertOptions(tmp_path / "mixed", tmp_path / "mixed.pt"))
    assert_same(
        load_as_released(tmp_path / "mixed.pt"), {**state, "x_embedder.proj.bias": wide["x_embedder.proj.bias"]}
    )


def meta_state(preset, size=16, **kwargs):
    """A state dict under the released names that is shapes alone."""
    config = PRESETS[preset]
    shapes = released_shapes(
        config["hidden_sizes"], config["depths"], config["num_attention_heads"], size=size, **kwargs
    )
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("preset", "size", "amm_blocks", "amm_form"),
    [
        ("EDT-S/2", 16, (7, 10), "exp_cos"),
        ("EDT-B/2", 16, (7, 10), "exp_cos"),
        ("EDT-XL/2", 16, (23, 25), "exp_cos"),
        ("EDT-XL/2-paper", 16, (23, 25), "exp_cos"),
        ("EDT-S/2", 32, (10,), "cos"),
        ("EDT-B/2", 32, (10,), "cos"),
        ("EDT-XL/2", 32, (23, 25), "cos"),
        ("EDT-S/2", 8, (), "exp_cos"),
        ("EDT-XL/2", 64, (), "exp_cos"),
    ],
)
def test_released_sizes_are_recognized(preset, size, amm_blocks, amm_form):
    state = meta_state(preset, size)
    config = recognize_config(state)
    assert (config["amm_blocks"], config["amm_form"]) == (amm_blocks, amm_form)
    assert config["sample_size"] == 2 * size
    assert config["mid_mask"] == PRESETS[preset].get("mid_mask")
    if size == 16:
        assert config.items() >= PRESETS[preset].items()
    if (preset, size) == ("EDT-S/2", 32):
        assert config.items() >= PRESETS["EDT-S/2-512"].items()
    with torch.device("meta"):
        weights = to_released_state_dict(edt.EDTTransformer2DModel(**config))
    shapes = {name: tensor.shape for name, tensor in state.items() if not name.endswith("pos_embed")}
    assert {name: tensor.shape for name, tensor in weights.items()} == shapes


def test_other_classes_channels_and_patches_are_recognized():
    digits = PRESETS["EDT-digits"]
    config = recognize_config(meta_state("EDT-digits", size=4, num_classes=10, channels=1))
    assert config.items() >= digits.items()
    config = recognize_config(meta_state("EDT-S/2", num_classes=3))
    assert (config["num_classes"], config["amm_blocks"]) == (3, (7, 10))
    config = recognize_config(meta_state("EDT-S/2", channels=16, patch=1))
    assert (config["in_channels"], config["out_channels"], config["patch_size"]) == (16, 32, 1)
    assert (config["sample_size"], config["amm_blocks"]) == (16, ())
    equal = released_shapes((32,) * 5, (1, 2, 3, 2, 1), (2,) * 5, size=8)
    config = recognize_config({name: torch.empty(shape, device="meta") for name, shape in equal.items()})
    assert (config["depths"], config["hidden_sizes"]) == ((1, 2, 3, 2, 1), (32,) * 5)


@pytest.mark.parametrize("mlp_ratio", [2.0, 8 / 3, 3.3])
def test_mlp_ratio_is_recognized(mlp_ratio):
    with torch.device("meta"):
        model = edt.load_preset("EDT-S/2", mlp_ratio=mlp_ratio)
    state = {**to_released_state_dict(model), "pos_embed": torch.empty(1, 256, 312, device="meta")}
    config = recognize_config(state)
    with torch.device("meta"):
        weights = to_released_state_dict(edt.EDTTransformer2DModel(**config))
    assert all(weights[name].shape == state[name].shape for name in weights)


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "pos_embed"), "pos_embed, a tensor of 3 dimensions in EDT, is missing among"),
        (lambda s: without(s, "blocks.3.mlp.fc1.weight"), r"blocks\.3\.mlp\.fc1\.weight, .* is missing"),
        (
            lambda s: {n: t for n, t in s.items() if not n.startswith("blocks")},
            "its 0 blocks are 0 runs of one shape, not 5 stages",
        ),
        (lambda s: {**s, "blocks.5.mlp.fc1.weight": torch.empty(1, 2)}, "its 12 blocks are 6 runs"),
        (lambda s: {**s, "pos_embed": torch.empty(1, 255, 312)}, "no grid has the 255 tokens .* 961 rows"),
        (
            lambda s: {**s, "x_embedder.proj.weight": torch.empty(312, 16)},
            r"4 dimensions in EDT, is of shape \(312,",
        ),
        (lambda s: {**s, "pos_embed": torch.empty(1, 0, 312)}, r"3 dimensions in EDT, is of shape \(1, 0, 312\)"),
        (
            lambda s: {**s, "x_embedder.proj.weight": torch.empty(312, 4, 0, 0)},
            r"4 dimensions in EDT, is of shape \(312, 4, 0, 0\)",
        ),
    ],
)
def test_shapes_that_are_not_edt(change, message):
    with pytest.raises(ValueError, match=message):
        recognize_config(change(meta_state("EDT-S/2")))


def test_the_command_line(tmp_path, file, capsys):
    assert main(["convert", "--checkpoint", str(file), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "tiny.pt: weights, of no published size, latents 4×16×16, 10 classes, AMM off" in out
    assert main(["convert", "--checkpoint", str(tmp_path / "out"), "--output", str(tmp_path / "out.pt")]) == 0
    assert "164 tensors in float32 under the released names" in capsys.readouterr().out
    AutoencoderKL(latent_channels=4, norm_num_groups=2, block_out_channels=(4,)).save_pretrained(tmp_path / "vae")
    args = ["--labels", "3", "--num-per-class", "1", "--steps", "2", "--output", str(tmp_path / "samples")]
    args += ["--vae", str(tmp_path / "vae")]
    assert main(["sample", "--checkpoint", str(tmp_path / "out"), *args]) == 0
    assert main(["info", str(tmp_path / "out")]) == 0


def write(name, content):
    def make(folder, state):
        path = folder / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content(state), path)
        return path

    return make


def truncated(share):
    def make(folder, state):
        torch.save(state, folder / "cut.pt")
        content = (folder / "cut.pt").read_bytes()
        (folder / "cut.pt").write_bytes(content[: int(share * len(content))])
        return folder / "cut.pt"

    return make


def flipped(folder, state):
    torch.save(state, folder / "flipped.pt")
    content = bytearray((folder / "flipped.pt").read_bytes())
    content[content.index(state["final_layer.linear.weight"].numpy().tobytes())] ^= 1
    (folder / "flipped.pt").write_bytes(content)
    return folder / "flipped.pt"


def deflated(folder, state):
    """As a zip program packs a .pt anew."""
    torch.save(state, folder / "plain.pt")
    with zipfile.ZipFile(folder / "plain.pt") as old, zipfile.ZipFile(folder / "t.pt", "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member), zipfile.ZIP_DEFLATED)
    (folder / "plain.pt").unlink()
    return folder / "t.pt"


def safetensors(folder, state):
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


BIAS = "x_embedder.proj.bias"
TABLE = "concat_blocks.1.pos_embed"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            write("t.pt", b"hello world"),
            "t.pt is another file of 11 bytes that begin with b'hello world'; it must be",
        ),
        (write("t.pt", b""), "t.pt is another file of 0 bytes"),
        (write("t.pt", b"\x80\x02}q\x00."), "t.pt is another file of 6 bytes"),
        (safetensors, "weights.safetensors is a .safetensors of"),
        (truncated(0.999), "cut.pt is a truncated .pt of"),
        (truncated(0.5), "cut.pt is a truncated .pt of"),
        (flipped, "flipped.pt is damaged: "),
        (deflated, "t.pt has compressed members; it must be a .pt that torch.save wrote"),
        (write("t.pt", lambda s: {**s, BIAS: s[BIAS][:1].expand(10**12)}), "has no state dict"),
        (write("t.pt", lambda s: {**s, BIAS: torch.empty(10**12, device="meta")}), "has no state dict"),
        (write("t.pt", lambda s: {**s, BIAS: torch.eye(2).to_sparse()}), "has no state dict"),
        (
            write(
                "t.pt",
                lambda s: {
                    n: torch.zeros(10**6, 1) if n.endswith("attn.proj.weight") else t for n, t in s.items()
                },
            ),
            "t.pt is not one of the released EDT: ",
        ),
        (write("t.pt", lambda s: {"model": s, "args": pathlib.Path("x")}), "pickled objects that are not loaded"),
        (write("t.pt", lambda s: {"model": s, "run": os.system}), "could run code: posix.system"),
        (write("t.pt", lambda s: [1]), "t.pt has no state dict; it has a list"),
        (
            write("t.pt", lambda s: {}),
            "t.pt has no state dict; it needs floating-point tensors by name, .* has none",
        ),
        (write("t.pt", lambda s: {"ema": {}, "model": s}), "has no state dict"),
        (write("t.pt", lambda s: {"state_dict": s}), "has no state dict; .* and has state_dict"),
        (write("t.pt", lambda s: {**s, "step": 3}), "has no state dict"),
        (write("t.pt", lambda s: {**s, BIAS: s[BIAS].int()}), "has no state dict"),
        (
            write("t.pt", lambda s: {**s, f"module.{BIAS}": s[BIAS]}),
            "has weights twice, with and without a prefix",
        ),
        (
            write("t.pt", lambda s: {n: t.double() for n, t in s.items()}),
            "has weights of float64; choose one of .* by",
        ),
        (write("t.pt", lambda s: {**s, BIAS: s[BIAS] / 0}), "in patch_embedding.proj.bias that are not finite"),
        (write("t.pt", lambda s: without(s, TABLE)), f"is not one of the released EDT: .* missing {TABLE}"),
        (write("t.pt", lambda s: {**s, TABLE: s[TABLE].flip(1)}), f"the released EDT: .* position table {TABLE}"),
        (write("t.pt", lambda s: {**s, "extra": s[BIAS]}), "the released EDT: .* unexpected extra"),
        (
            write("DiT.pt", lambda s: {n: t for n, t in s.items() if "rel_pos" not in n and "down" not in n}),
            r"DiT.pt is not one of the released EDT: blocks\.0\.\S+bias_table, .* is missing among",
        ),
        (lambda folder, state: folder / "nowhere.pt", "nowhere.pt: there is no such file or folder"),
        (lambda folder, state: folder, r"needs a config\.json written by save_pretrained"),
    ],
)
def test_other_files_are_one_line_of_error(tmp_path, state, capsys, make, message):
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    checkpoint = make(source, state)
    assert main(["convert", "--checkpoint", str(checkpoint), "--output", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("edt: error: checkpoint ")
    with pytest.raises((ValueError, OSError), match=message):
        convert(ConvertOptions(checkpoint, output))
    assert list(tmp_path.iterdir()) == [source]


def test_pickled_code_does_not_run(tmp_path, state):
    class Malicious:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "ran",)

    with pytest.raises(ValueError, match=r"pickled objects .*pathlib"):
        convert(ConvertOptions(saved(tmp_path, {"ema": state, "args": Malicious()}), tmp_path / "out"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "ema"}, "tiny.pt has one set of weights, not ema; leave out --weights"),
        ({"vae": "vae"}, "vae is .*vae.* cannot be loaded"),
        (
            {"labels": "labels"},
            "labels .*labels has 2 names, for 0, 1; the model needs one for each class, 0 to 9",
        ),
        ({"labels": "broken"}, "labels .*broken is no JSON, or torn"),
        ({"labels": "list"}, r"labels .*list has for class 0 \['n01440764', 'tench'\]; it must be a name"),
        ({"labels": "gap"}, "labels .*gap has for class 3 ''; it must be a name"),
        ({"labels": "others"}, "labels .*others has 10 names, for 1, 2, 3 and 7 more; the model needs"),
    ],
)
def test_options_of_a_pipeline_that_do_not_fit(tmp_path, file, options, message):
    (tmp_path / "vae").mkdir()
    (tmp_path / "labels").write_text("tench\ngoldfish\n")
    (tmp_path / "broken").write_text('{"0": "tench"')
    (tmp_path / "list").write_text(json.dumps({str(i): ["n01440764", "tench"] for i in range(10)}))
    (tmp_path / "gap").write_text("\n".join("abc efghij"))
    (tmp_path / "others").write_text(json.dumps({str(i): "tench" for i in range(1, 11)}))
    paths = {"vae": str(tmp_path / "vae"), "weights": "ema"}
    options = {name: paths.get(name, tmp_path / value) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        convert(ConvertOptions(file, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_labels_of_json(tmp_path):
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({"1": "goldfish", "0": "tench"}), encoding="utf-8")
    assert conversion.read_labels(file, 2) == {0: "tench", 1: "goldfish"}
    with pytest.raises(ValueError, match="unconditional"):
        conversion.read_labels(file, 0)


NAMES = ["tench", "goldfish", "white shark, man-eater"]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(NAMES).encode(),
        json.dumps(NAMES, indent=1).encode("utf-8-sig"),
        json.dumps(dict(enumerate(NAMES))).encode("utf-16"),
        "\n".join(NAMES).encode("utf-8-sig"),
        "\r\n".join([*NAMES, ""]).encode("utf-16"),
        "\r".join(NAMES).encode("utf-32"),
        json.dumps(NAMES, indent=1)[:-2].replace("\n ", "").encode() + b"\n\n]",  # in as many lines
    ],
)
def test_labels_as_editors_write_them(tmp_path, content):
    (tmp_path / "labels").write_bytes(content)
    assert conversion.read_labels(tmp_path / "labels", 3) == dict(enumerate(NAMES))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.txt", "tänch\nb\nc".encode("latin-1"), "labels .*labels.txt is not UTF-8"),
        ("labels.txt", "a\nb\nc".encode("utf-16-le"), "labels .*labels.txt has a NUL"),
        ("labels.txt", b"[tench\nb", "labels .*labels.txt is no JSON, or torn"),
        ("labels.json", b"tench\nb\nc", "labels .*labels.json is no JSON, or torn"),
        ("labels.json", b'"tench"', "labels .*labels.json is JSON of a str; it must be an object or a list"),
        ("labels.json", b'["a", "b"]', "labels .*labels.json has 2 names, for 0, 1; the model needs"),
        ("labels.json", b'["a", "b", " "]', "labels .*labels.json has for class 2 ' '; it must be a name"),
        ("labels.json", b'["a", ["b"], "c"]', "labels .*labels.json has for class 1"),
        ("labels.txt", b"\na\nb", "labels .*labels.txt has for class 0 ''; it must be a name"),
    ],
)
def test_labels_that_are_none(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        conversion.read_labels(tmp_path / name, 3)


def test_names_that_begin_as_json_does(tmp_path):
    for first in ("[unused]", "{none}", "7", "null", '"a"', "[tench"):
        (tmp_path / "labels.txt").write_text(f"{first}\nb\nc\n")
        assert conversion.read_labels(tmp_path / "labels.txt", 3) == {0: first, 1: "b", 2: "c"}
    (tmp_path / "labels.txt").write_text("7\n")
    assert conversion.read_labels(tmp_path / "labels.txt", 1) == {0: "7"}


def test_labels_of_a_pipe(tmp_path):
    """Such as a shell's <(head -3 names), which can be read once."""
    os.mkfifo(tmp_path / "labels")
    writer = threading.Thread(target=(tmp_path / "labels").write_text, args=(json.dumps(NAMES),))
    writer.start()
    assert conversion.read_labels(tmp_path / "labels", 3) == dict(enumerate(NAMES))
    writer.join()


def test_a_name_may_have_any_space_within(tmp_path):
    (tmp_path / "labels").write_text("a\u2028b\nc\x0cd\ne", encoding="utf-8")
    assert conversion.read_labels(tmp_path / "labels", 3) == {0: "a\u2028b", 1: "c\x0cd", 2: "e"}


def test_options_that_are_for_a_file(tmp_path, pipeline):
    for name, value in (("vae", "some"), ("labels", tmp_path / "labels"), ("weights", "ema")):
        with pytest.raises(ValueError, match=rf"{name} is for a \.pt; checkpoint \S+pipeline is a folder"):
            convert(ConvertOptions(pipeline, tmp_path / "out.pt", **{name: value}))
    tiny_model(task_routing=(0.8, 4.0)).save_pretrained(tmp_path / "routed")
    with pytest.raises(ValueError, match="task_routing, which the released code has not"):
        convert(ConvertOptions(tmp_path / "routed", tmp_path / "out.pt"))
    assert not (tmp_path / "out.pt").exists()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_output_is_replaced_only_when_told(tmp_path, state, file, pipeline):
    before = contents(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    inside = pipeline / "tiny.pt"
    inside.write_bytes(file.read_bytes())
    written = tmp_path / "written.pt"
    for checkpoint, output, overwrite, message in (
        (file, pipeline, False, "is there already; --overwrite replaces it"),
        (file, tmp_path / "notes", True, "is not a pipeline's folder, so --overwrite does not replace it"),
        (file, file, True, r"is a file; of a \.pt comes a folder"),
        (inside, pipeline, True, "has the checkpoint in it"),
        (pipeline, file, False, "is there already; --overwrite replaces it"),
        (pipeline, file, True, r"tiny\.pt is no \.pt that edt convert wrote, so --overwrite does not replace it"),
        (pipeline, tmp_path / "notes", True, "is a folder; of a folder comes a file"),
        (pipeline, tmp_path / "new.safetensors", False, "would be no safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(ConvertOptions(checkpoint, output, overwrite=overwrite))
    inside.unlink()
    (tmp_path / "notes" / "a.txt").unlink()
    assert contents(tmp_path) == before

    convert(ConvertOptions(file, tmp_path / "notes"))  # which is empty
    half = saved(tmp_path, {name: tensor.half() for name, tensor in state.items()})
    convert(ConvertOptions(half, pipeline, overwrite=True))
    convert(ConvertOptions(tmp_path / "notes", written))
    convert(ConvertOptions(pipeline, written, overwrite=True))
    assert load_as_released(written)["x_embedder.proj.bias"].dtype == torch.float16
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "pipeline", "saved.pt", "tiny.pt", "written.pt"}


@pytest.mark.parametrize(
    "stranger", ["README.md", "transformer/notes.txt", "vae/.git/config", "checkpoints/last.pt"]
)
def test_a_pipeline_with_other_files_is_not_replaced(tmp_path, file, pipeline, stranger):
    (pipeline / stranger).parent.mkdir(parents=True, exist_ok=True)
    (pipeline / stranger).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"has {stranger} beside a pipeline's files, so --overwrite does not"):
        convert(ConvertOptions(file, pipeline, overwrite=True))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"_class_name": "StableDiffusionPipeline"}', "is the folder of another pipeline"),
        ("{}", "is the folder of another pipeline"),
        ("[1]", "model_index.json is JSON, but list"),
        ('{"_class', "model_index.json is no JSON, or torn"),
    ],
)
def test_a_pipeline_of_others_is_not_replaced(tmp_path, file, pipeline, index, message):
    (pipeline / "model_index.json").write_text(index)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(ConvertOptions(file, pipeline, overwrite=True))
    assert contents(tmp_path) == before


def test_a_link_as_output_is_followed(tmp_path, file, pipeline):
    (tmp_path / "link").symlink_to(pipeline)
    convert(ConvertOptions(file, tmp_path / "link", overwrite=True, dtype="float16"))
    assert (tmp_path / "link").is_symlink()
    assert conversion._stored_dtypes(pipeline / "transformer") == {torch.float16}


KILLED = """
import os, signal, sys
import torch
from edt.sampling import conversion as convert
if sys.argv[1] == "writing":
    save = torch.save
    def save_and_die(*args):
        save(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save_and_die
else:
    replace = os.replace
    def die_at_the_new(source, target):
        if os.path.basename(source) == "edt-convert":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = die_at_the_new
convert.convert(convert.ConvertOptions(*map(convert.Path, sys.argv[2:]), overwrite=True))
"""


def left_by(folder):
    return sorted(path.name for path in folder.glob(".*.partial-*"))


def killed(what, checkpoint, output):
    process = subprocess.run(
        [sys.executable, "-c", KILLED, what, str(checkpoint), str(output)],
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert process.returncode == -signal.SIGKILL


def test_an_output_that_is_filled_meanwhile_stays(tmp_path, file, pipeline, monkeypatch):
    """Saving takes minutes."""
    save_transformer, save_tensors = edt.EDTTransformer2DModel.save_pretrained, torch.save
    folder, other = tmp_path / "new", tmp_path / "other.pt"

    def save_meanwhile(save):
        def wrapped(*args, **kwargs):
            save(*args, **kwargs)
            folder.mkdir(exist_ok=True)
            (folder / "notes.txt").write_text("mine")
            (pipeline / "notes.txt").write_text("mine")
            other.write_text("mine")

        return wrapped

    monkeypatch.setattr(edt.EDTTransformer2DModel, "save_pretrained", save_meanwhile(save_transformer))
    monkeypatch.setattr(torch, "save", save_meanwhile(save_tensors))
    for checkpoint, output, overwrite, message in (
        (file, folder, False, "is there already"),
        (file, pipeline, True, r"has notes\.txt beside a pipeline's files"),
        (pipeline, other, False, "is there already"),
        (pipeline, other, True, r"is no \.pt that edt convert wrote"),
    ):
        for path in (folder / "notes.txt", pipeline / "notes.txt", other):
            path.unlink(missing_ok=True)
        with pytest.raises(ValueError, match=message):
            convert(ConvertOptions(checkpoint, output, overwrite=overwrite))
        kept = output if output.is_file() else output / "notes.txt"
        assert kept.read_text() == "mine"
    assert left_by(tmp_path) == []


def test_a_pt_of_others_is_not_replaced(tmp_path, pipeline):
    for number, members in enumerate(
        ([], ["new/data.pkl"], ["edt-convert/notes.txt"], ["edt-convert/data.pkl", "a"])
    ):
        with zipfile.ZipFile(tmp_path / f"{number}.pt", "w") as archive:
            for member in members:
                archive.writestr(member, "mine")
    convert(ConvertOptions(pipeline, tmp_path / "broken.pt"))
    content = bytearray((tmp_path / "broken.pt").read_bytes())
    content[content.rindex(b"PK\x01\x02")] = 0  # the last entry of its listing
    (tmp_path / "broken.pt").write_bytes(content)
    (tmp_path / "short.pt").write_bytes(content[len(content) // 2 :])
    for output in sorted(tmp_path.glob("*.pt")):
        before = output.read_bytes()
        with pytest.raises(ValueError, match=rf"{output.name} is no \.pt that edt convert wrote, so --overwrite"):
            convert(ConvertOptions(pipeline, output, overwrite=True))
        assert output.read_bytes() == before


def test_options_are_checked_before_anything_is_removed(tmp_path, pipeline):
    left = tmp_path / ".out.pt.partial-abcd1234"
    left.mkdir()
    (left / "lock").touch()
    for options in ({"checkpoint": tmp_path / "none"}, {"vae": "some"}, {"overwrite": "yes"}):
        with pytest.raises((ValueError, FileNotFoundError)):
            convert(ConvertOptions(**{"checkpoint": pipeline, "output": tmp_path / "out.pt", **options}))
        assert left.exists()


def test_what_a_killed_one_left_is_removed(tmp_path, pipeline):
    killed("writing", pipeline, tmp_path / "out.pt")
    foreign = tmp_path / ".out.pt.partial-mine"
    foreign.mkdir()
    (foreign / "new").write_text("of an earlier version, or of a user: nothing says that its process is dead")
    assert len(left_by(tmp_path)) == 2
    with new_output(tmp_path / "running.pt") as temporary:  # as another process
        temporary.write_text("half")
        convert(ConvertOptions(pipeline, tmp_path / "out.pt"))
        assert len(left_by(tmp_path)) == 2
    assert left_by(tmp_path) == [foreign.name]
    assert (tmp_path / "running.pt").read_text() == "half"


def test_a_kill_between_two_renames_loses_nothing(tmp_path, file, pipeline):
    """The former folder is out of its place, the new one not there yet."""
    before = contents(pipeline)
    killed("renaming", file, pipeline)
    assert not pipeline.exists()
    with pytest.raises(ValueError, match="is there already"):
        convert(ConvertOptions(file, pipeline))
    assert contents(pipeline) == before
    assert left_by(tmp_path) == []


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("what", ["writing", "renaming"])
def test_an_interruption_leaves_what_was_there(tmp_path, file, pipeline, monkeypatch, what, exists):
    folder, other = tmp_path / "pipeline" if exists else tmp_path / "new", tmp_path / "other.pt"
    if exists:
        convert(ConvertOptions(pipeline, other))
    before = contents(tmp_path)

    def interrupt(*args):
        raise KeyboardInterrupt

    if what == "writing":
        save_transformer, save_tensors = edt.EDTTransformer2DModel.save_pretrained, torch.save

        def save_and_interrupt(save):
            def wrapped(*args, **kwargs):
                save(*args, **kwargs)
                raise KeyboardInterrupt

            return wrapped

        monkeypatch.setattr(edt.EDTTransformer2DModel, "save_pretrained", save_and_interrupt(save_transformer))
        monkeypatch.setattr(torch, "save", save_and_interrupt(save_tensors))
    else:
        replace = os.replace

        def replace_all_but_the_new(source, target):
            if pathlib.Path(source).name == NEW:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_all_but_the_new)
    for checkpoint, output in ((file, folder), (pipeline, other)):
        with pytest.raises(KeyboardInterrupt):
            convert(ConvertOptions(checkpoint, output, overwrite=True))
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"pipeline", "tiny.pt"} | (
        {"other.pt"} if exists else set()
    )


def test_averaged_position_tables_are_the_fixed_ones(tmp_path, state):
    """The released EMA goes over the fixed tables too, and rounding moves them: by 1.6e-4, where it stays."""
    tables = {name: tensor for name, tensor in state.items() if name.endswith("pos_embed")}
    averages = {name: tensor.clone() for name, tensor in tables.items()}
    for name, average in averages.items():
        for _ in range(10_000):
            average.mul_(0.9999).add_(tables[name], alpha=1 - 0.9999)
    drift = max((averages[name] - tables[name]).abs().max().item() for name in tables)
    assert drift > 1e-4
    model = converted(saved(tmp_path, {"ema": {**state, **averages}}))
    assert torch.equal(model.position.table, sincos_position_embedding(32, (8, 8)))
