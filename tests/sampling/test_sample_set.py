"""`edt sample`: which images, and that they are the same in any batches, on any processes, after a kill."""

import errno
import io
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from image_folders import run, save_images, save_vae
from matplotlib.image import imread
from PIL import Image, ImageDraw
from released import tiny_model
from training_runs import forked, fresh, kill_all_below, run_to_end

from edt import EDTPipeline, EDTTransformer2DModel, load_preset, make_scheduler
from edt.cli import main
from edt.interrupt import StopRequest
from edt.model.presets import amm_placement
from edt.sampling import sample_set
from edt.sampling.sample_set import SampleOptions, draw_samples


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Models of random weights, by name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    grey = {"in_channels": 1, "out_channels": 2, "depths": (1, 1, 1, 1, 1), "amm_blocks": (3,)}
    grey["class_dropout_prob"] = 0.1  # a null class to guide by
    tiny_model(**grey).save_pretrained(folder / "grey")
    tiny_model(in_channels=3, out_channels=6, num_classes=2, sample_size=(8, 16)).save_pretrained(
        folder / "colour"
    )
    tiny_model(**grey, num_classes=0).save_pretrained(folder / "unconditional")
    tiny_model().save_pretrained(folder / "latent")
    names = {i: f"digit {i}, {word}" for i, word in enumerate(("nought", "ace", "deuce"))}
    EDTPipeline(tiny_model(**grey), make_scheduler(), id2label=names).save_pretrained(folder / "named")
    vae = AutoencoderKL.from_pretrained(save_vae(folder / "vae"))
    EDTPipeline(tiny_model(), make_scheduler(), vae).save_pretrained(folder / "decoded")
    return folder


def arguments(checkpoint, output, *more) -> list[str]:
    """On the CPU, and with few steps, unless `more` says otherwise."""
    defaults = {"--steps": "3", "--device": "cpu"}
    given = [word for name in defaults.keys() - set(more) for word in (name, defaults[name])]
    return ["sample", "--checkpoint", str(checkpoint), "--output", str(output), *given, *map(str, more)]


def draw(checkpoint, output, *more) -> dict[str, np.ndarray]:
    assert main(arguments(checkpoint, output, *more)) == 0
    return dict(np.load(output / "samples.npz"))


def pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "images").glob("*.png"))}


SET = ("--classes", "all", "--num-images", 64, "--guidance-scale", 1.5, "--steps", 4)


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory) -> Path:
    """The 64 images of SET, drawn as one batch."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    draw(checkpoints / "grey", folder, *SET, "--batch-size", 64)
    assert len(set(pictures(folder).values())) == 64
    return folder


@pytest.mark.parametrize("batch_size", [7, 33])
def test_the_same_images_in_other_batches(checkpoints, whole, tmp_path, batch_size):
    draw(checkpoints / "grey", tmp_path, *SET, "--batch-size", batch_size)
    assert pictures(tmp_path) == pictures(whole)
    assert (tmp_path / "samples.npz").read_bytes()[:4] == b"PK\x03\x04"
    for name, array in np.load(whole / "samples.npz").items():
        assert np.array_equal(np.load(tmp_path / "samples.npz")[name], array)


def test_the_same_images_on_two_processes(checkpoints, whole, tmp_path):
    said = run_to_end(arguments(checkpoints / "grey", tmp_path / "set", *SET), tmp_path / "log", processes=2)
    assert said.count("64 images in") == 1
    assert pictures(tmp_path / "set") == pictures(whole)


def test_the_same_images_as_launched_by_users(checkpoints, whole, tmp_path):
    """On two processes, killed, and on one."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "edt"]
    set_of_small_batches = arguments(checkpoints / "grey", tmp_path / "set", *SET, "--batch-size", 4)
    with fresh([*command, *set_of_small_batches], tmp_path / "log") as run:
        run.wait_for(lambda: len(pictures(tmp_path / "set")) >= 8)
        kill_all_below(run)
    assert 8 <= len(pictures(tmp_path / "set")) < 64
    draw(checkpoints / "grey", tmp_path / "set", *SET)
    assert pictures(tmp_path / "set") == pictures(whole)


def test_killed_and_resumed(checkpoints, whole, tmp_path):
    """By SIGKILL, twice; what lies there half written is no image."""
    output, log = tmp_path / "set", tmp_path / "log"
    small_batches = arguments(checkpoints / "grey", output, *SET, "--batch-size", 3)
    for count in (6, 30):
        with forked(small_batches, log) as run:
            run.wait_for(lambda count=count: len(pictures(output)) >= count)
            run.kill()
        assert count <= len(pictures(output)) < 64
    half = [folder / ".0123456789abcdef.edt-half" for folder in (output, output / "images")]
    for file in half:
        file.write_bytes(b"half")
    kept = {file: file.stat().st_mtime_ns for file in (output / "images").glob("*.png")}
    assert not (output / "samples.npz").exists()
    run_to_end(small_batches, log)
    assert pictures(output) == pictures(whole)
    assert not any(file.exists() for file in half)
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())


def test_interrupted_and_resumed(checkpoints, whole, tmp_path):
    output, log = tmp_path / "set", tmp_path / "log"
    small_batches = arguments(checkpoints / "grey", output, *SET, "--batch-size", 3)
    with forked(small_batches, log) as run:
        run.wait_for(lambda: len(pictures(output)) >= 6)
        run.signal(signal.SIGINT)
        assert run.wait() == [130]
        drawn = len(pictures(output))
        assert f"interrupted after {drawn} images; the same command goes on" in run.text()
    draw(checkpoints / "grey", output, *SET)
    assert pictures(output) == pictures(whole)


def test_a_request_to_stop_ends_the_call_it_comes_in(checkpoints, tmp_path):
    stop = StopRequest()
    stop.requested = True
    options = SampleOptions(checkpoints / "grey", labels=("1",), output=tmp_path, device="cpu")
    assert draw_samples(options, stop) == 0
    assert pictures(tmp_path) == {}


def test_a_missing_image_is_drawn_again(checkpoints, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "set")
    (tmp_path / "set" / "images" / "000017.png").unlink()
    draw(checkpoints / "grey", tmp_path / "set", *SET)
    assert pictures(tmp_path / "set") == pictures(whole)


def test_a_set_grows(checkpoints, whole, tmp_path, capsys):
    """Its first images stay; it does not shrink, which would leave images that are not its own."""
    shutil.copytree(whole, tmp_path / "set")
    longer = draw(checkpoints / "grey", tmp_path / "set", *SET[:2], "--num-images", 80, *SET[4:])
    assert len(pictures(tmp_path / "set")) == 80
    assert pictures(tmp_path / "set").items() >= pictures(whole).items()
    at_once = draw(checkpoints / "grey", tmp_path / "longer", *SET[:2], "--num-images", 80, *SET[4:])
    assert np.array_equal(longer["arr_0"], at_once["arr_0"])
    assert main(arguments(checkpoints / "grey", tmp_path / "set", *SET)) == 2
    assert "other settings (num_images)" in capsys.readouterr().err


def test_a_small_set_grows(checkpoints, whole, tmp_path):
    """Its images are those that a large set has under the same numbers, to the last bit."""
    for count in (1, 3, 64):
        draw(checkpoints / "grey", tmp_path, *SET[:2], "--num-images", count, *SET[4:])
        assert len(pictures(tmp_path)) == count
        assert pictures(tmp_path).items() <= pictures(whole).items()


def test_a_set_of_an_earlier_version_goes_on(checkpoints, tmp_path, monkeypatch):
    """Such drew fewer images at once where it had fewer, and what is drawn with others is rounded differently."""
    draw(checkpoints / "grey", tmp_path, *FEW)
    settings = json.loads((tmp_path / "samples.json").read_text())
    (tmp_path / "samples.json").write_text(json.dumps({**settings, "images_per_call": 2}))
    calls, draw_call = [], sample_set._draw
    monkeypatch.setattr(sample_set, "_draw", lambda *args: calls.append(len(args[2])) or draw_call(*args))
    draw(checkpoints / "grey", tmp_path, *FEW[:2], "--num-images", 7, *FEW[4:])
    assert calls == [2, 2, 2]
    draw(checkpoints / "grey", tmp_path, *FEW, "--seed", 1, "--overwrite")
    assert calls == [2, 2, 2, settings["images_per_call"]]


def test_its_folder_is_evaluated_without_its_grid(checkpoints, whole, tmp_path, capsys):
    arguments = ["--reference", str(whole / "samples.npz"), "--feature-model", "pixels", "--device", "cpu"]
    assert main(["evaluate", "--samples", str(whole), *arguments, "--output", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["frechet_distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert report["metrics"]["precision"]["value"] == 1


def test_a_pipeline_of_a_variant(checkpoints, tmp_path):
    pipe = EDTPipeline.from_pretrained(checkpoints / "decoded")
    pipe.save_pretrained(tmp_path / "fp16", variant="fp16")
    drawn = [
        draw(folder, tmp_path / f"of {folder.name}", "--labels", 1, "--num-images", 1)["arr_0"]
        for folder in (checkpoints / "decoded", tmp_path / "fp16")
    ]
    assert np.array_equal(*drawn)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("--labels", 3, 7), [3, 7]),
        (("--labels", "2-4", 9), [2, 3, 4, 9]),
        (("--labels", "ace", "0"), [1, 0]),
        (("--labels", "digit 2, deuce"), [2]),
        (("--classes", "all"), list(range(10))),
    ],
)
def test_labels(checkpoints, tmp_path, labels, expected):
    saved = draw(checkpoints / "named", tmp_path, *labels, "--num-per-class", 2, "--steps", 1)
    assert saved["labels"].tolist() == 2 * expected  # in turn
    assert saved["arr_0"].shape == (2 * len(expected), 16, 16, 1)


def test_files(checkpoints, tmp_path, capsys):
    saved = draw(checkpoints / "colour", tmp_path, "--labels", 1, "--num-images", 3)
    assert sorted(saved) == ["arr_0", "labels"]
    assert (saved["arr_0"].shape, saved["arr_0"].dtype) == ((3, 8, 16, 3), np.uint8)
    read = [np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures(tmp_path).values()]
    assert np.array_equal(np.stack(read), saved["arr_0"])
    assert imread(tmp_path / "samples.png").std() > 0.05
    assert str(tmp_path) in capsys.readouterr().out
    assert list(pictures(tmp_path)) == ["000000.png", "000001.png", "000002.png"]


@pytest.mark.parametrize(
    ("checkpoint", "labels", "written"),
    [
        ("named", ("ace", "0", 7), ["7", "digit 0, nought", "digit 1, ace"]),
        ("named", ("deuce",), ["digit 2, deuce"]),
        ("grey", (3,), ["class 3"]),
        ("grey", ("0-4",), ["0", "1", "2", "3 of 5 classes"]),
        ("unconditional", (), []),
    ],
)
def test_its_grid_names_the_classes(checkpoints, tmp_path, monkeypatch, checkpoint, labels, written):
    texts, write = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *a, **k: texts.append(a[2]) or write(*a, **k))
    monkeypatch.setattr(sample_set, "_GRID_ROWS", 3)
    labels = ("--labels", *labels) if labels else ()
    draw(checkpoints / checkpoint, tmp_path, *labels, "--num-per-class", 2, "--steps", 1)
    assert sorted(texts) == sorted(["AMM on, guidance 1, 1 step", *written])


def test_the_images_are_the_pipelines(checkpoints, tmp_path):
    saved = draw(checkpoints / "named", tmp_path, "--labels", 5, "--num-images", 2, "--guidance-scale", 3)
    pipe = EDTPipeline.from_pretrained(checkpoints / "named")
    generators = [sample_set.keyed_generator("cpu", 0, i) for i in range(2)]
    images = pipe([5, 5], 3.0, num_inference_steps=3, generator=generators).images
    assert np.array_equal(np.stack([np.asarray(image) for image in images])[..., None], saved["arr_0"])


def test_decoded_latents(checkpoints, tmp_path):
    """By the pipeline's VAE, or one that is given."""
    own = draw(checkpoints / "decoded", tmp_path / "own", "--labels", 1, "--num-images", 2)
    given = draw(checkpoints / "latent", tmp_path / "given", "--labels", 1, "--num-images", 2, "--vae",
                 checkpoints / "vae")  # fmt: skip
    assert own["arr_0"].shape == (2, 32, 32, 3)
    assert np.array_equal(own["arr_0"], given["arr_0"])


def test_a_run_has_the_vae_and_the_names_of_its_data(checkpoints, tmp_path):
    """Or the VAE that its configuration names for its grids."""
    for name in ("cat", "dog"):
        save_images(tmp_path / "photos" / name, 2)
    run(tmp_path / "photos", tmp_path / "data", vae=str(checkpoints / "vae"))
    tiny_model(num_classes=2, sample_size=8).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(f"data: {tmp_path / 'data'}\n")
    by_name = draw(tmp_path / "run", tmp_path / "1", "--labels", "dog", "cat", "--num-per-class", 1)
    assert by_name["labels"].tolist() == [1, 0]
    assert by_name["arr_0"].shape == (2, 16, 16, 3)
    save_vae(tmp_path / "brighter", scaling_factor=0.25)
    (tmp_path / "run" / "config.yaml").write_text(f"data: {tmp_path / 'data'}\nvae: {tmp_path / 'brighter'}\n")
    brighter = draw(tmp_path / "run", tmp_path / "2", "--labels", "dog", "cat", "--num-per-class", 1)
    assert not np.array_equal(brighter["arr_0"], by_name["arr_0"])
    shutil.rmtree(tmp_path / "data")
    draw(tmp_path / "run", tmp_path / "3", "--labels", 1, "--num-per-class", 1)


def test_other_options_draw_other_images(checkpoints, tmp_path):
    variants = {
        "plain": (),
        "again": (),
        "seed": ("--seed", 1),
        "guided": ("--guidance-scale", 3),
        "guided in an interval": ("--guidance-scale", 3, "--guidance-interval", 0.5, 5),
        "without AMM": ("--no-amm",),
        "other AMM": ("--amm-blocks", 4),
        **{scheduler: ("--scheduler", scheduler) for scheduler in sample_set.SCHEDULERS if scheduler != "ddpm"},
        "bfloat16": ("--dtype", "bfloat16"),
        "cached": ("--cache-interval", 2),
        "cached encoder": ("--cache-interval", 2, "--cache-reuse", "encoder"),
        "cached otherwise": ("--cache-interval", 3, "--cache-schedule", "non-uniform", "--steps", 9),
        "cached as often": ("--cache-interval", 3, "--steps", 9),
    }
    drawn = {
        name: draw(checkpoints / "grey", tmp_path / name, "--labels", 3, "--num-images", 2, *more)[
            "arr_0"
        ].tobytes()
        for name, more in variants.items()
    }
    assert drawn["plain"] == drawn["again"]
    assert len(set(drawn.values())) == len(drawn) - 1


def test_without_classes(checkpoints, tmp_path):
    saved = draw(checkpoints / "unconditional", tmp_path, "--num-per-class", 3)
    assert saved["arr_0"].shape == (3, 16, 16, 1)
    assert saved["labels"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("preset", "guidance_scale", "expected"),
    [
        ("EDT-S/2", 1.0, (7, 10)),
        ("EDT-S/2", 1.5, (7, 10)),
        ("EDT-B/2", 2.0, (8,)),
        ("EDT-B/2", 4.0, (8,)),
        ("EDT-S/2-512", 4.0, (10,)),
        ("EDT-XL/2", 1.0, (23, 25)),
        ("EDT-XL/2", 4.0, (23, 25)),
        ("EDT-digits", 4.0, (3, 5)),
    ],
)
def test_published_placement(preset, guidance_scale, expected):
    with torch.device("meta"):
        config = load_preset(preset).config
    assert amm_placement(config, guidance_scale) == expected


def test_placements_that_are_not_published_stay():
    with torch.device("meta"):
        for blocks in ((), (3, 4)):
            assert amm_placement(load_preset("EDT-S/2", amm_blocks=blocks).config, 4.0) == blocks
        assert amm_placement(load_preset("EDT-S/2", amm_blocks=(8,)).config, 1.0) == (7, 10)
        assert amm_placement(EDTTransformer2DModel(amm_blocks=(1,), depths=(1, 1, 1, 1, 1)).config, 4.0) == (1,)


def test_a_set_takes_no_images_of_another(checkpoints, tmp_path, capsys):
    draw(checkpoints / "grey", tmp_path, "--labels", 3, "--num-images", 3)
    before = pictures(tmp_path)
    assert main(arguments(checkpoints / "grey", tmp_path, "--labels", 4, "--num-images", 2, "--seed", 1)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "drawn with other settings (classes, num_images, seed); give another output" in message
    assert pictures(tmp_path) == before
    draw(checkpoints / "grey", tmp_path, "--labels", 4, "--num-images", 2, "--overwrite")
    assert len(pictures(tmp_path)) == 2
    shutil.copytree(checkpoints / "grey", tmp_path / "other")
    assert json.loads((tmp_path / "samples.json").read_text())["weights"]
    tiny_model(in_channels=1, out_channels=2, amm_blocks=()).save_pretrained(tmp_path / "other")
    assert main(arguments(tmp_path / "other", tmp_path, "--labels", 4, "--num-images", 2)) == 2
    assert "(amm_blocks, weights)" in capsys.readouterr().err


def test_caching_belongs_to_the_settings(checkpoints, tmp_path, capsys):
    some = ("--labels", 4, "--num-images", 2)
    draw(checkpoints / "grey", tmp_path, *some)
    assert main(arguments(checkpoints / "grey", tmp_path, *some, "--cache-interval", 2)) == 2
    assert "(cache_interval)" in capsys.readouterr().err


def test_a_checkpoint_may_move_and_its_vae_not_change(checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "decoded", tmp_path / "pipe")
    some = ("--labels", 3, "--num-images", 2)
    drawn = draw(tmp_path / "pipe", tmp_path / "set", *some)
    (tmp_path / "set" / "images" / "000001.png").unlink()
    (tmp_path / "pipe").rename(tmp_path / "moved")
    assert np.array_equal(draw(tmp_path / "moved", tmp_path / "set", *some)["arr_0"], drawn["arr_0"])
    vae = AutoencoderKL.from_pretrained(tmp_path / "moved" / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(tmp_path / "moved" / "vae")
    assert main(arguments(tmp_path / "moved", tmp_path / "set", *some)) == 2
    assert "other settings (vae)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("checkpoint", "args", "message"),
    [
        ("nowhere", ["--labels", "3"], "there is no such folder"),
        ("grey", ["--labels", "3", "10"], "labels has 10; this model has classes 0 to 9"),
        ("grey", ["--labels", "7-12"], "labels has 7-12; this model has classes 0 to 9"),
        ("grey", ["--labels", "4-2"], "labels has 4-2"),
        ("grey", ["--labels", "0-999999999999"], "labels has 0-999999999999"),
        ("grey", ["--labels", "-1"], "labels has -1"),
        (
            "grey",
            ["--labels", "cat"],
            "labels has 'cat'; this model's classes have no names, so it must be a number, or a range such as 0-9",
        ),
        ("named", ["--labels", "cat"], "or a name of one class, such as 'digit 0, nought'"),
        ("grey", [], "--labels"),
        ("grey", ["--labels", "3", "--classes", "all"], "--labels"),
        ("grey", ["--labels", "3", "--guidance-scale", "nan"], "guidance_scale is nan"),
        ("grey", ["--labels", "3", "--guidance-scale", "-2"], "guidance_scale is -2"),
        ("grey", ["--labels", "3", "--guidance-channels", "2"], "guidance_channels is 2"),
        ("grey", ["--labels", "3", "--guidance-interval", "5", "1"], "guidance_interval is (5.0, 1.0)"),
        ("grey", ["--labels", "3", "--num-per-class", "0"], "num_per_class is 0"),
        ("grey", ["--labels", "3", "--num-images", "0"], "num_images is 0"),
        ("grey", ["--labels", "3", "--batch-size", "0"], "batch_size is 0"),
        ("grey", ["--labels", "3", "--steps", "1001"], "steps is 1001"),
        ("grey", ["--labels", "3", "--seed", "-1"], "seed is -1"),
        ("grey", ["--labels", "3", "--amm-blocks", "99"], "amm_blocks is (99,)"),
        ("grey", ["--labels", "3", "--no-amm", "--amm-blocks", "9"], "amm_blocks was given with --no-amm"),
        ("grey", ["--labels", "3", "--device", "abacus"], "device is 'abacus'"),
        ("grey", ["--labels", "3", "--cache-interval", "0"], "interval is 0"),
        ("grey", ["--labels", "3", "--cuda-graph", "--device", "cpu"], "cuda_graph is for a GPU"),
        ("grey", ["--labels", "3", "--vae", "nowhere/at/all"], "vae is 'nowhere/at/all'"),
        ("latent", ["--labels", "3"], "vae is None; the checkpoint draws latents of 4 channels"),
        ("unconditional", ["--labels", "3"], "unconditional"),
        ("unconditional", ["--guidance-scale", "2"], "unconditional"),
    ],
)
def test_errors_are_one_line(checkpoints, tmp_path, capsys, checkpoint, args, message):
    assert main(arguments(checkpoints / checkpoint, tmp_path / "out", *args)) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert error[-1].startswith("edt: error: ")
    assert not any("Traceback" in line for line in error)
    assert not (tmp_path / "out").exists()


def test_an_incomplete_pipeline(checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "decoded", tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "vae")
    assert main(arguments(tmp_path / "pipe", tmp_path / "out", "--labels", "3")) == 2
    assert "is no complete pipeline" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("model_index.json", "{}"),
        ("model_index.json", {"scheduler": ["edt", 7]}),
        ("model_index.json", {"id2label": []}),
        ("model_index.json", {"id2label": "x"}),
        ("model_index.json", {"id2label": {"0": 7}}),
        ("scheduler/scheduler_config.json", '"runwayml/some-model"'),
        ("scheduler/scheduler_config.json", "7"),
        ("scheduler/scheduler_config.json", "["),
    ],
)
def test_a_pipeline_of_wrong_json(checkpoints, tmp_path, capsys, file, values):
    shutil.copytree(checkpoints / "named", tmp_path / "pipe")
    path = tmp_path / "pipe" / file
    path.write_text(values if isinstance(values, str) else json.dumps({**json.loads(path.read_text()), **values}))
    assert main(arguments(tmp_path / "pipe", tmp_path / "out", "--labels", "3")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"edt: error: checkpoint {tmp_path / 'pipe'}")


def test_a_vae_without_its_weights(checkpoints, tmp_path, capsys):
    """As a transformer's folder, of which diffusers would make an autoencoder of random weights."""
    args = arguments(checkpoints / "latent", tmp_path / "out", "--labels", "3", "--vae", checkpoints / "latent")
    assert main(args) == 2
    assert "weights of an AutoencoderKL, such as" in capsys.readouterr().err.splitlines()[-1]


def test_images_of_unknown_settings(checkpoints, tmp_path, capsys):
    draw(checkpoints / "grey", tmp_path, "--labels", 3, "--num-images", 1)
    (tmp_path / "samples.json").unlink()
    assert main(arguments(checkpoints / "grey", tmp_path, "--labels", 3, "--num-images", 1)) == 2
    assert "drawn with other settings (unknown)" in capsys.readouterr().err


def test_two_commands_in_one_folder(checkpoints, tmp_path, capsys):
    with forked(
        arguments(checkpoints / "grey", tmp_path / "set", *SET, "--batch-size", 3), tmp_path / "log"
    ) as run:
        run.wait_for(lambda: len(pictures(tmp_path / "set")) >= 3)
        assert main(arguments(checkpoints / "grey", tmp_path / "set", *SET)) == 2
        run.kill()
    assert "is in use by process" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [(), ("--cuda-graph",)])
def test_on_a_gpu(checkpoints, tmp_path, graph):
    """The same images again, and in other batches but for rounding; the noise is not the CPU's."""
    options = (*SET, "--device", "cuda", *graph)
    first, again, other = (
        draw(checkpoints / "grey", tmp_path / name, *options, "--batch-size", size)["arr_0"]
        for name, size in (("first", 64), ("again", 64), ("other", 7))
    )
    assert np.array_equal(first, again)
    assert len({image.tobytes() for image in first}) == 64
    assert np.abs(first.astype(int) - other).mean() < 1


def test_an_output_that_is_a_file(checkpoints, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert main(arguments(checkpoints / "grey", tmp_path / "out", "--labels", "3")) == 2
    assert "is a file; it must be a folder" in capsys.readouterr().err


def save_picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), "red").save(file, format="PNG")


FEW = ("--labels", 3, "--num-images", 2, "--steps", 1)


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    "name",
    ["images/holiday.png", "images/000000.png", "samples.npz", "samples.png"],
)
def test_pictures_of_others_stay(checkpoints, tmp_path, capsys, name, overwrite):
    """No samples.json says that they are of edt sample, whatever they are called."""
    save_picture(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    assert main(arguments(checkpoints / "grey", tmp_path, *FEW, *overwrite)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"output {tmp_path} has {name}, drawn with other settings (unknown)" in error
    assert (tmp_path / name).read_bytes() == before
    assert not (tmp_path / "samples.json").exists()


def test_overwriting_removes_a_sets_own_images_alone(checkpoints, tmp_path, capsys):
    draw(checkpoints / "grey", tmp_path, *FEW[:2], "--num-images", 4, *FEW[4:])
    for name in ("holiday.png", "000004.png", "0000003.png", "3.png", "notes.tmp"):
        save_picture(tmp_path / "images" / name)
    (tmp_path / "samples_of_mine.png").write_text("mine")
    draw(checkpoints / "grey", tmp_path, *FEW, "--seed", 1, "--overwrite")
    left = {file.name for file in (tmp_path / "images").iterdir()}
    assert left == {"000000.png", "000001.png", "000004.png", "0000003.png", "3.png", "holiday.png", "notes.tmp"}
    assert (tmp_path / "samples_of_mine.png").exists()
    # A set that grows would need the name of a picture that none of its own is.
    assert main(arguments(checkpoints / "grey", tmp_path, *FEW[:2], "--num-images", 9, "--steps", 1, "--seed", 1,
                          "--overwrite")) == 2  # fmt: skip
    assert "has images/000004.png, drawn with other settings" in capsys.readouterr().err.splitlines()[-1]


def test_a_half_written_picture_of_a_user_stays(checkpoints, tmp_path):
    draw(checkpoints / "grey", tmp_path, *FEW)
    names = (
        "images/000001.tmp",
        "images/.000001.png",
        "images/.a.edt-half",
        "samples.tmp",
        "samples.json.partial",
    )
    for name in names:
        (tmp_path / name).write_text("half")
    (tmp_path / "images" / "000001.png").unlink()
    draw(checkpoints / "grey", tmp_path, *FEW)
    draw(checkpoints / "grey", tmp_path, *FEW, "--seed", 1, "--overwrite")
    assert all((tmp_path / name).read_text() == "half" for name in names)


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "samples.json is no JSON, or torn"),
        ('{"seed": 0, "st', "samples.json is no JSON, or torn"),
        ("[1, 2]", "samples.json is JSON, but list"),
        ("{}", "samples.json are not those of edt sample"),
        ('{"weights": 1, "classes": 1, "steps": 1, "seed": 1, "num_images": "2"}', "are not those of edt sample"),
        ('{"weights": 1, "classes": 1, "steps": 1, "seed": 1, "num_images": -1}', "are not those of edt sample"),
    ],
)
def test_a_samples_json_of_others(checkpoints, tmp_path, capsys, text, message, overwrite):
    (tmp_path / "samples.json").write_text(text)
    save_picture(tmp_path / "images" / "000000.png")
    assert main(arguments(checkpoints / "grey", tmp_path, *FEW, *overwrite)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "samples.json") in error
    assert message in error
    assert (tmp_path / "samples.json").read_text() == text
    assert (tmp_path / "images" / "000000.png").exists()


def test_a_picture_that_was_changed_is_no_part_of_the_set(checkpoints, tmp_path, capsys):
    """In samples.npz its bytes would shift all that follow."""
    draw(checkpoints / "grey", tmp_path, *FEW)
    save_picture(tmp_path / "images" / "000001.png")
    (tmp_path / "samples.npz").unlink()
    assert main(arguments(checkpoints / "grey", tmp_path, *FEW)) == 2
    assert "000001.png is uint8 (9, 9, 3), the first image is (16, 16, 1); remove it" in capsys.readouterr().err
    (tmp_path / "images" / "000001.png").unlink()
    draw(checkpoints / "grey", tmp_path, *FEW)


def test_a_full_disk_names_the_file(checkpoints, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", fail)
    assert main(arguments(checkpoints / "grey", tmp_path, *FEW)) == 2
    assert "images/000000.png cannot be written: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("size", [10**12, 10**400], ids=["large", "beyond floats"])
@pytest.mark.parametrize("option", ["--num-images", "--num-per-class"])
def test_a_set_has_an_end(checkpoints, tmp_path, capsys, option, size):
    assert main(arguments(checkpoints / "grey", tmp_path / "out", "--labels", 3, option, size)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "makes more images than a set has at most, 10000000" in error
    assert option[2:].replace("-", "_") in error
    assert not (tmp_path / "out").exists()


def pipe_of(names) -> SimpleNamespace:
    config = SimpleNamespace(num_classes=len(names))
    labels = {name: i for i, name in enumerate(names) if name}
    return SimpleNamespace(transformer=SimpleNamespace(config=config), labels=labels)


AS_TEXT = ["0", "1", "10", "11", *map(str, range(2, 10))]  # as folders are sorted


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (AS_TEXT, ("10",), ["10"]),
        (AS_TEXT, ("2", "9-11"), ["2", "9", "10", "11"]),
        (["1", "2", "5"], ("1-2", "5"), ["1", "2", "5"]),
        (["007", "042", "100"], ("42", "7", "007"), ["042", "007", "007"]),
        (["cat", "1", "dog", "2"], ("1-2", "cat"), ["1", "2", "cat"]),  # both are names
        (["cat", "dog", "7"], ("0-1", "7"), ["cat", "dog", "7"]),  # neither is
        (["3-4", "cat"], ("3-4",), ["3-4"]),
        (["", "", ""], ("0-1",), ["", ""]),
    ],
)
def test_numbers_that_are_names(names, labels, expected):
    drawn = sample_set.chosen_classes(SampleOptions(Path(), labels=labels), pipe_of(names))
    assert [names[number] for number in drawn] == expected


@pytest.mark.parametrize(
    ("names", "label", "message"),
    [
        (["1", "2", "5"], "0", "labels has 0; this model's classes are named by numbers, 1 to 5, and 0 is none"),
        (["1", "2", "5"], "2-4", "named by numbers, 1 to 5"),
        (["cat", "dog", "2"], "1-2", "labels has 1-2, of which 2 are names of classes and others are not"),
        (["cat", "dog"], "2", "this model has classes 0 to 1"),
        (["cat", "dog"], "-1", "this model has classes 0 to 1"),
        (["1", "2"], "0-999999999999999", "this model has 2 classes"),
        (["cat", "dog"], "9" * 5000, "it must be a number, a range such as 0-9, or a name"),
    ],
)
def test_numbers_that_are_no_class(names, label, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sample_set.chosen_classes(SampleOptions(Path(), labels=(label,)), pipe_of(names))


def test_says_which_classes_are_drawn(checkpoints, tmp_path, capsys):
    draw(checkpoints / "named", tmp_path / "1", "--labels", "ace", "0", 7, "--num-per-class", 1, "--steps", 1)
    said = "edt: draws classes digit 1, ace (number 1), digit 0, nought (number 0), 7 (number 7)"
    assert said in capsys.readouterr().err.splitlines()
    draw(checkpoints / "grey", tmp_path / "2", *FEW)
    assert "edt: draws" not in capsys.readouterr().err
