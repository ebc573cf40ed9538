import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

import edt.demo.run
from edt import load_checkpoint
from edt.data.dataset import write_dataset
from edt.data.digits import from_uint8, load_split_digits, to_uint8
from edt.demo.judge import Judge
from edt.demo.run import DemoOptions, run_demo
from edt.files.lock import open_folder
from edt.train.trainer import train

VARIANTS = ["AMM off", "AMM on", "AMM on, guidance 1.5"]


@pytest.fixture(scope="module")
def judge():
    return Judge(load_split_digits())


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    return output, run_demo(DemoOptions(output=output, quick=True, device="cpu"))


def test_writes_everything(quick_run):
    output, report = quick_run
    pictures = ["run/plots/losses", "denoising", "samples_amm_off", "samples_amm_on", "samples_guided"]
    pictures += [f"digit_{digit}" for digit in range(10)]
    for picture in pictures:
        assert (output / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
    saved = np.load(output / "samples.npz")
    assert saved["arr_0"].shape == (40, 8, 8, 1)
    assert saved["arr_0"].dtype == np.uint8
    assert saved["arr_0"].max() > 200 > 50 > saved["arr_0"].min()
    assert np.bincount(saved["labels"]).tolist() == [4] * 10
    assert str(saved["variant"]) == "AMM on"
    assert json.loads((output / "report.json").read_text())["variants"] == report["variants"]


def test_report(quick_run):
    _, report = quick_run
    assert list(report["variants"]) == VARIANTS
    assert report["interrupted"] is None
    assert (report["device"], report["attention"]) == ("cpu", "reference")
    assert report["real_held_out"]["class_accuracy"] > 0.97
    said = edt.demo.run.format_report(report)
    assert "too few steps for digits; leave out --quick" in said
    assert "--quick" not in edt.demo.run.format_report({**report, "options": {"quick": False}})
    for variant in report["variants"].values():
        assert 0 <= variant["class_accuracy"] <= 1
        assert variant["spread_over_real"] > 0


@pytest.mark.parametrize(
    "name", ["config.json", "diffusion_pytorch_model.safetensors", "samples.npz", "digit_3.png", "report.json"]
)
@pytest.mark.parametrize("report", [None, '{"year": 2026}', "[", ""])
def test_files_of_others_stay(tmp_path, name, report):
    """As of a model of one's own, where no report.json says that a demo wrote them."""
    if report is not None:
        (tmp_path / "report.json").write_text(report)
    if name != "report.json" or report is None:
        (tmp_path / name).write_text("mine")
    before = {file: file.read_text() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"report\.json"):
        run_demo(DemoOptions(output=tmp_path, quick=True, device="cpu"))
    assert {file: file.read_text() for file in before} == before
    assert {file.name for file in tmp_path.iterdir()} <= {file.name for file in before} | {".lock"}


def test_a_run_of_edt_train_stays(tmp_path):
    """Though it is where the demo trains, and of the same recipe."""
    demo = DemoOptions(output=tmp_path, quick=True, device="cpu", steps=2)
    config = replace(edt.demo.run.train_config(demo, tmp_path / "run"), log_every=20)
    edt.demo.run.digits_folder(config.data)
    train(config)
    with pytest.raises(ValueError, match=r"has in run a run of edt train that is no demo's; give another output"):
        run_demo(demo)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_what_lies_beside_the_demos_files_stays(quick_run, tmp_path):
    shutil.copytree(quick_run[0], tmp_path / "demo")
    mine = [tmp_path / "demo" / name for name in ("samples_mine.png", "digit_x.png", "run/notes.txt",
                                                  "run/checkpoints/notes.txt")]  # fmt: skip
    for file in mine:
        file.write_text("mine")
    run_demo(DemoOptions(output=tmp_path / "demo", quick=True, device="cpu", seed=1, steps=2))
    assert all(file.read_text() == "mine" for file in mine)


def test_other_data_in_its_place(tmp_path):
    write_dataset(tmp_path / "data", np.zeros((3, 1, 8, 8), np.uint8), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="has other data than the digits"):
        run_demo(DemoOptions(output=tmp_path, quick=True, device="cpu"))


def test_two_demos_in_one_folder(tmp_path):
    with open_folder(tmp_path), open(tmp_path / ".lock") as lock:
        command = [sys.executable, "-m", "edt", "demo", "--quick", "--output", str(tmp_path), "--device", "cpu"]
        second = subprocess.run(command, env=_environment(), capture_output=True, text=True)
        assert lock.read().strip() == str(os.getpid())
    assert second.returncode == 2
    assert "is in use by process" in second.stderr


def test_repeats_exactly(quick_run, tmp_path):
    output, _ = quick_run
    run_demo(DemoOptions(output=tmp_path, quick=True, device="cpu"))
    first, second = (np.load(folder / "samples.npz") for folder in (output, tmp_path))
    for name in ("arr_0", "amm_off", "guided"):
        np.testing.assert_array_equal(first[name], second[name])


def test_trains_anew_unless_the_run_was_left_unfinished(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(edt.demo.run, "train", lambda config, stop: begun.append(config) or train(config, stop))
    options = DemoOptions(output=tmp_path, quick=True, device="cpu")
    first = run_demo(options)["training"]
    again = run_demo(options)["training"]
    assert (first["steps"], again["full_loss"]) == (20, first["full_loss"])
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    config = replace(begun[0], steps=7)  # as if it had been stopped there
    shutil.rmtree(tmp_path / "run")
    train(config)
    replace(config, steps=20).save(tmp_path / "run" / "config.yaml")
    resumed = run_demo(options)["training"]
    assert resumed["full_loss"] == first["full_loss"]
    assert checkpoint.is_dir()
    assert run_demo(replace(options, seed=1))["training"]["full_loss"] != first["full_loss"]


@pytest.mark.parametrize("phase", ["training", "sampling"])
def test_interrupt_keeps_what_was_trained(tmp_path, phase):
    steps = {
        "training": ["--steps", "100000", "--batch-size", "8"],
        "sampling": ["--steps", "2", "--batch-size", "8"],
    }
    command = [sys.executable, "-m", "edt", "demo", "--output", str(tmp_path), "--sampling-steps", "1000",
               "--device", "cpu", *steps[phase]]  # fmt: skip
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=_environment())
        try:
            _wait_for(lambda: _progress(log.read_text(), phase), process)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
    assert "Traceback" not in log.read_text()
    assert f"edt sample --checkpoint {tmp_path}" in log.read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["interrupted"].startswith(phase)
    assert report["training"]["steps"] >= 1
    assert (tmp_path / "run" / "plots" / "losses.png").exists()
    model = load_checkpoint(tmp_path)
    # The released initialisation of the last Linear is zero: anything else was trained.
    assert model.final_layer.linear.weight.abs().max() > 0


def test_loss_that_is_not_finite_stops(tmp_path):
    with pytest.raises(FloatingPointError, match="learning_rate 1e"):
        run_demo(DemoOptions(output=tmp_path, quick=True, device="cpu", learning_rate=1e6))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("steps", 10**400),
        ("num_inference_steps", 0),
        ("num_inference_steps", 1001),
        ("num_per_class", 1),
        ("num_per_class", 10**9),
        ("seed", -1),
        ("seed", 10**400),
        ("learning_rate", float("nan")),
        ("guidance_scale", float("inf")),
        ("device", "abacus"),
    ],
)
def test_options_are_checked(argument, value):
    with pytest.raises(ValueError, match=argument):
        DemoOptions(**{argument: value}).check()


def test_split_is_stratified_and_disjoint(judge):
    digits = judge.digits
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.held_out_images.shape == (360, 1, 8, 8)
    assert (digits.train_images.min(), digits.train_images.max()) == (-1, 1)
    assert np.bincount(digits.held_out_labels).min() >= 34
    assert judge.judge(digits.held_out_images, digits.held_out_labels)["exact_copies"] == 0


def test_judge_takes_real_digits_for_real(judge):
    figures = judge.judge(judge.digits.held_out_images, judge.digits.held_out_labels)
    assert figures["class_accuracy"] > 0.97
    assert figures["spread_over_real"] == pytest.approx(1)
    assert figures["near_copies"] == 0
    assert figures["share_nearer_than_real_1st_percentile"] == pytest.approx(0.01, abs=0.005)


def test_judge_finds_copies(judge):
    images, labels = judge.digits.train_images[:50], judge.digits.train_labels[:50]
    exact = judge.judge(images, labels)
    assert (exact["exact_copies"], exact["near_copies"]) == (50, 50)
    noise = np.random.default_rng(0).normal(scale=0.04, size=images.shape).astype(np.float32)
    assert judge.judge(images + noise, labels)["near_copies"] == 50
    # Through the 8 bits of samples.npz a copy is still exact.
    assert judge.judge(from_uint8(to_uint8(images)), labels)["exact_copies"] == 50


def test_judge_finds_wrong_classes(judge):
    digits = judge.digits
    shuffled = np.random.default_rng(0).permutation(digits.held_out_labels)
    assert judge.judge(digits.held_out_images, shuffled)["class_accuracy"] < 0.2


def test_judge_finds_collapse(judge):
    one_each = np.stack([judge.digits.held_out_images[judge.digits.held_out_labels == c][0] for c in range(10)])
    figures = judge.judge(one_each.repeat(5, axis=0), np.arange(10).repeat(5))
    assert figures["spread_over_real"] == pytest.approx(0, abs=1e-6)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def _progress(log: str, phase: str) -> bool:
    """True once the phase's bar has moved."""
    return any(line.startswith(phase) and " 0/" not in line for line in log.replace("\r", "\n").splitlines())


def _wait_for(condition, process, timeout=120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the demo ended by itself"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.1)
