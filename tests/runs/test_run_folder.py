"""The folder of a training run, looked at: `edt plot`, and `edt sample` and `edt info` of it."""

import errno
import json
import math
import os
import shutil
import zlib

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import edt
from edt.cli import main
from edt.data import pictures
from edt.data.dataset import write_dataset
from edt.runs import plots as run_plots
from edt.runs.plots import Run, plot_runs, running_mean
from edt.train.config import TrainConfig
from edt.train.trainer import train

STEPS = 4
ALWAYS = ["losses", "learning_rate", "gradient_norm", "throughput", "memory"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    items = random.integers(256, size=(32, 1, 8, 8), dtype=np.uint8)
    write_dataset(folder / "data", items, np.arange(32) % 10)
    run = folder / "short"
    train(TrainConfig(data=folder / "data", output=run, model="EDT-digits", steps=STEPS, batch_size=4, log_every=1,
                      checkpoint_every=2, sample_every=0, trackers=(), num_workers=0, device="cpu"))  # fmt: skip
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "short")


def fake_run(folder, steps=60, **changes):
    """A run's metrics; `changes` are functions of the step, or None to leave a figure out."""
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(10, 10 * steps + 1, 10):
            line = {"step": step, "full_loss": 1 / step, "masked_loss": 2 / step, "gradient_norm": 1.0,
                    "learning_rate": 1e-3, "skipped_steps": 0, "images_per_second": 100.0,
                    "peak_memory_gib": 1.5}  # fmt: skip
            line |= {name: change and change(step) for name, change in changes.items()}
            file.write(json.dumps({name: value for name, value in line.items() if value is not None}) + "\n")
    return folder


def drawn(picture, folders):
    """The figure of a picture, instead of a file."""
    runs = [Run(name, run_plots._read(folder)) for name, folder in zip(run_plots._names(folders), folders)]
    found = next(each for each in run_plots.PICTURES if each.name == picture)
    return run_plots._draw(found, [m for m in found.metrics if any(run.has(m) for run in runs)], runs)


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_plot_of_a_real_run(run, capsys):
    assert main(["plot", str(run)]) == 0
    files = [run / "plots" / f"{name}.png" for name in ALWAYS]
    assert capsys.readouterr().out.split() == list(map(str, files))
    for file in files:
        image = np.asarray(Image.open(file).convert("L"))
        assert image.shape[0] >= 400
        assert image.std() > 5  # not blank


def test_what_a_picture_shows(tmp_path):
    skipped = lambda step: (step >= 200) + 2 * (step >= 400)  # noqa: E731
    one = fake_run(tmp_path / "one", alignment_loss=lambda step: 3 / step, skipped_steps=skipped)
    (axes,) = drawn("alignment_loss", [one]).axes
    assert axes.get_yscale() == "linear"  # it is below 0 where it works
    (axes,) = drawn("losses", [one]).axes
    assert axes.get_yscale() == "log"
    assert [label.split(",")[0] for label in labels(axes)] == [
        "full loss", "masked loss", "3 skipped",
    ]  # fmt: skip
    crosses = next(line for line in axes.lines if line.get_marker() == "x")
    assert crosses.get_xdata().tolist() == [200, 400]
    assert len(drawn("throughput", [one]).axes) == 1
    with_utilisation = fake_run(tmp_path / "two", model_flop_utilisation=lambda step: 0.4)
    assert [axes.get_ylabel() for axes in drawn("throughput", [with_utilisation]).axes] == [
        "images/s", "model FLOP utilisation",
    ]  # fmt: skip


def test_several_runs_are_drawn_over_each_other(tmp_path, monkeypatch, capsys):
    """Into a folder of their own: no run's own pictures become an overlay."""
    monkeypatch.chdir(tmp_path)
    runs = [fake_run(tmp_path / "one", steps=8), fake_run(tmp_path / "two", masked_loss=None)]
    full, masked = drawn("losses", runs).axes
    assert [label.split(",")[0] for label in labels(full)] == ["one", "two"]
    assert (len(full.lines), len(masked.lines)) == (2, 1)
    assert full.lines[0].get_linestyle() != full.lines[1].get_linestyle()  # equal losses are both seen
    before = {file: file.read_bytes() for file in plot_runs(runs[:1])}
    assert {file.parent for file in before} == {runs[0] / "plots"}
    for _ in range(2):
        assert main(["plot", *map(str, runs)]) == 0
    assert capsys.readouterr().out.split() == 2 * [f"outputs/plots/{name}.png" for name in ALWAYS]
    assert sorted(file.stem for file in (tmp_path / "outputs" / "plots").iterdir()) == sorted(ALWAYS)
    (tmp_path / "link").symlink_to(runs[0])
    for several, output in ((runs, runs[0] / "plots"), (runs[1:], tmp_path / "link" / "plots")):
        assert main(["plot", *map(str, several), "--output", str(output)]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert f"output {output} is for the pictures of the run {runs[0]} alone; give another" in error
    assert {file: file.read_bytes() for file in before} == before
    shutil.copy(
        runs[0] / "metrics.jsonl", tmp_path / "outputs"
    )  # a run whose own pictures have the place of overlays
    assert main(["plot", *map(str, runs)]) == 2
    assert "output outputs/plots is for the pictures of the run" in capsys.readouterr().err
    assert main(["plot", *map(str, runs), "--output", str(tmp_path / "both" / "plots")]) == 0
    assert len(list((tmp_path / "both" / "plots").iterdir())) == len(ALWAYS)
    assert not (runs[1] / "plots").exists()
    same_name = fake_run(tmp_path / "other" / "one")
    assert labels(drawn("memory", [runs[0], same_name]).axes[0]) == [str(runs[0]), str(same_name)]


def test_losses_that_were_never_finite_are_gaps(tmp_path):
    run = fake_run(tmp_path / "run", full_loss=lambda step: None if step == 30 else 1.0, steps=5)
    line = drawn("losses", [run]).axes[0].lines[0]
    assert np.isnan(line.get_ydata()).tolist() == [False, False, True, False, False]
    assert plot_runs([run])


def test_a_line_that_a_kill_tore_is_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "full_l')
    assert len(run_plots._read(run)) == STEPS
    assert plot_runs([run])


def test_running_mean():
    values = np.array([1.0, 3.0, math.nan, 5.0, math.inf, math.nan])
    np.testing.assert_array_equal(running_mean(values, 2), [1, 2, 3, 5, 5, math.nan])
    np.testing.assert_array_equal(running_mean(values[:4], 1), values[:4])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.jsonl does not exist; edt train writes it"),
        ("", "metrics.jsonl is empty; edt train writes its first line after log_every steps"),
        ('{"step": 1', "metrics.jsonl is empty"),
        ("{}\n", "metrics.jsonl has a line 1 that edt train did not write: it has no step"),
        ("[1]\n", "metrics.jsonl has a line 1 that edt train did not write: it is list, not an object"),
        ("no\n{}\n", "metrics.jsonl has a line 1 that is no JSON"),
    ],
)
def test_metrics_that_cannot_be_drawn(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["plot", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(tmp_path) in error
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [(["nowhere"], "run nowhere: there is no such folder"), ([], "runs is empty; it needs at least one")],
)
def test_no_run(capsys, args, message):
    assert main(["plot", *args]) == 2
    assert message in capsys.readouterr().err


def test_sample_from_a_run_and_from_its_checkpoints(run, tmp_path):
    newest = run / "checkpoints" / f"step-{STEPS:08d}"
    older = run / "checkpoints" / f"step-{STEPS // 2:08d}"
    draws = []
    for name, checkpoint in (("run", run), ("newest", newest), ("folder", newest / "ema"), ("older", older)):
        args = ["--labels", "3", "--steps", "2", "--num-per-class", "2", "--output", str(tmp_path / name)]
        assert main(["sample", "--checkpoint", str(checkpoint), "--device", "cpu", *args]) == 0
        draws.append(np.load(tmp_path / name / "samples.npz")["arr_0"])
    assert (draws[0] == draws[1]).all()
    assert (draws[0] == draws[2]).all()
    averages, trained = (edt.load_checkpoint(newest / part).state_dict() for part in ("ema", "model"))
    assert not all(torch.equal(averages[name], trained[name]) for name in averages)


def test_a_damaged_checkpoint_is_passed_over_and_named(run, tmp_path, capsys):
    damaged = run / "checkpoints" / f"step-{STEPS:08d}"
    weights = damaged / "ema" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    args = ["--labels", "3", "--steps", "2", "--num-per-class", "1", "--output", str(tmp_path / "out")]
    assert main(["sample", "--checkpoint", str(run), *args]) == 0
    assert f"edt: checkpoint {damaged} has 1000 bytes of ema/" in capsys.readouterr().err
    assert main(["sample", "--checkpoint", str(damaged), *args]) == 2
    assert f"edt: error: checkpoint {damaged} has 1000 bytes of ema/" in capsys.readouterr().err


def test_info_of_a_run(run, capsys):
    outputs = []
    for model in (run, run / "checkpoints" / f"step-{STEPS:08d}", "EDT-digits"):
        assert main(["info", str(model), "--batch-size", "2"]) == 0
        outputs.append(capsys.readouterr().out.split("\n", 1)[1])
    assert outputs[0] == outputs[1] == outputs[2]


def test_fine_tuning_starts_from_a_run(trained, run, tmp_path):
    saved = train(
        TrainConfig(
            data=trained.parent / "data",
            output=tmp_path / "tuned",
            model="EDT-digits",
            init_from=run,
            steps=1,
            batch_size=4,
            learning_rate=1e-12,
            final_learning_rate=0.0,
            sample_every=0,
            trackers=(),
            num_workers=0,
            device="cpu",
        )
    )
    averages = edt.load_checkpoint(run).state_dict()
    tuned = edt.load_checkpoint(saved / "model").state_dict()
    for name in (name for name in averages if not name.startswith("final_layer.")):
        torch.testing.assert_close(tuned[name], averages[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("place", ["pictures", "plots"])
def test_pictures_of_others_stay(tmp_path, place):
    """In a folder of one's own and in the run's; those that edt plot drew there are drawn anew."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "full_loss": 1.0, "learning_rate": 0.1}\n')
    output = tmp_path / place
    given = None if place == run_plots.PLOTS else output
    assert len(plot_runs([tmp_path], given)) == len(plot_runs([tmp_path], given)) == 2
    Image.new("RGB", (9, 9)).save(output / "learning_rate.png")
    (output / "losses.png").unlink()
    before = (output / "learning_rate.png").read_bytes()
    with pytest.raises(ValueError, match=r"output has .*learning_rate\.png, which edt plot did not draw"):
        plot_runs([tmp_path], given)
    assert (output / "learning_rate.png").read_bytes() == before
    assert not (output / "losses.png").exists()


def test_matplotlibs_own_pictures_are_ours_among_a_runs_plots(tmp_path):
    """Earlier versions drew them there without a name of their own."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "learning_rate": 0.1}\n')
    (file,) = plot_runs([tmp_path])
    Figure().savefig(file)
    assert plot_runs([tmp_path]) == [file]
    assert pictures.is_ours(file)
    Figure().savefig(file)
    with pytest.raises(ValueError, match="which edt plot did not draw"):
        plot_runs([tmp_path], file.parent)


def test_what_is_no_picture_of_ours(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    pictures.save(Figure(figsize=(1, 1)), tmp_path / "ours")
    content = bytearray((tmp_path / "ours").read_bytes())
    (tmp_path / "torn").write_bytes(content[:30])
    content[16:24] = (100_000).to_bytes(4, "big") * 2  # 10¹⁰ pixels, as its header has it
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb").write_bytes(content)
    (tmp_path / "text").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    found = {path.name for path in tmp_path.iterdir() if pictures.is_ours(path)}
    assert found == {"ours"}

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match=r"ours cannot be read: Input/output error"):
        pictures.is_ours(tmp_path / "ours")


def test_names_are_shown_as_they_are(tmp_path):
    """Those that are not UTF-8, that Matplotlib would read as formulas, or leave out of a legend."""
    names = ["gar\udce7on", r"$\no$", "_hidden", r"a\$b", "plain"]
    runs = [fake_run(tmp_path / name, steps=3, skipped_steps=lambda step: int(step > 10)) for name in names]
    figure = drawn("gradient_norm", runs)
    shown = [r"gar\udce7on", r"\$\no\$", " _hidden", r"a\\$b", "plain"]
    assert labels(figure.axes[0]) == shown + [f"{name}: 1 skipped" for name in shown]
    text = Text(0, 0, "")
    assert [text._preprocess_math(name) for name in shown] == [
        (r"gar\udce7on", False), (r"$\no$", False), (" _hidden", False), (r"a\$b", False), ("plain", False)
    ]  # fmt: skip
    assert plot_runs(runs)
    assert plot_runs(runs[:1])


def test_counts_of_skipped_steps_that_are_none(tmp_path):
    counts = {10: 0, 20: math.nan, 30: 2, 40: None, 50: 2, 60: math.inf}
    one = fake_run(tmp_path / "one", steps=6, skipped_steps=counts.get)
    (run,) = (Run("one", run_plots._read(one)),)
    steps, total = run.skipped()
    assert (steps.tolist(), total) == ([30], 2)
    assert plot_runs([one])
    assert plot_runs([fake_run(tmp_path / "two", skipped_steps=lambda step: math.nan)])


def test_values_below_zero_are_in_the_picture(tmp_path):
    (axes,) = drawn("alignment_loss", [fake_run(tmp_path / "run", alignment_loss=lambda step: -step / 600)]).axes
    assert axes.get_ylim()[0] <= -1
    (axes,) = drawn("memory", [tmp_path / "run"]).axes
    assert axes.get_ylim()[0] == 0


@pytest.mark.parametrize(
    "line", ['{"step": 2, "full_loss": "low"}', '{"step": true}', '{"step": 1%s}' % ("0" * 400), "[1]", "3"]
)
def test_figures_that_are_no_numbers(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "full_loss": 1.0}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl has a line 2 that edt train did not write"):
        plot_runs([tmp_path])
