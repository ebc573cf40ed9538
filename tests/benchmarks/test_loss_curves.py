"""`python -m benchmarks loss_curves`, with two runs of the reference path in place of the kernels."""

import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import loss_curves
from benchmarks.__main__ import main
from benchmarks.loss_curves import WINDOW, synthetic_latents, verdict

TINY = ["loss_curves", "--device", "cpu", "--model", "EDT-digits", "--steps", "6", "--batch-size", "4"]
# As a GPU's: reference differs from float32 by about 1e-3, ours from reference by less.
LOSSES = {
    "ours": [1 / step + 5e-4 * math.cos(step) for step in range(1, 151)],
    "reference": [1 / step for step in range(1, 151)],
    "float32": [1 / step + 1e-3 * math.sin(step) for step in range(1, 151)],
}
FOUND = {"environment": {"device": "Sample GPU"}, "model": "EDT-S/2", "steps": 150, "batch_size": 16,
         "seconds": dict.fromkeys(LOSSES, 20.0), "losses": LOSSES}  # fmt: skip


def test_it_needs_a_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["loss_curves", "--out", str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "loss_curves needs a GPU" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--model", "EDT-XXL/2"], "model is 'EDT-XXL/2'"), (["--steps", "0"], "steps is 0"),
     (["--batch-size", "0"], "batch_size is 0")],
)  # fmt: skip
def test_wrong_arguments(capsys, tmp_path, args, message):
    assert main([*TINY, *args, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_what_training_needs_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "edt.train.trainer", None)
    assert main([*TINY, "--out", str(tmp_path)]) == 2
    assert "loss_curves needs pip install 'edt-kernels[train]'" in capsys.readouterr().err


def test_the_whole_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("EDT_KERNELS_BACKEND", raising=False)
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    assert "EDT_KERNELS_BACKEND" not in os.environ
    found = json.loads((tmp_path / "loss_curves.json").read_text())
    losses = found["losses"]
    assert [len(losses[name]) for name in ("ours", "reference", "float32")] == [6, 6, 6]
    assert losses["ours"] == losses["reference"]  # so a run repeats: what differs comes from the implementation
    assert losses["reference"] != losses["float32"]
    assert losses["reference"] == pytest.approx(losses["float32"], rel=0.02)
    assert (found["difference"], found["within_bf16_noise"]) == (0, True)
    assert found["noise"] == pytest.approx(np.abs(np.subtract(losses["reference"], losses["float32"])).mean())
    assert found["environment"]["device"] == "cpu"
    assert {file.name for file in tmp_path.iterdir()} == {"loss_curves.json", "loss_curves.png"}
    assert "within bf16 noise: 0, where" in capsys.readouterr().out


def test_each_run_has_its_backend_and_precision(tmp_path, monkeypatch):
    seen = []

    def losses(options, data, output, precision):
        seen.append((output.name, os.environ["EDT_KERNELS_BACKEND"], precision))
        return LOSSES[output.name]

    monkeypatch.setenv("EDT_KERNELS_BACKEND", "reference")
    monkeypatch.setattr(loss_curves, "_losses", losses)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loss_curves, "environment", lambda device: {"device": "Sample GPU"})
    args = ["loss_curves", "--model", "EDT-digits", "--steps", "150", "--out", str(tmp_path)]
    assert main(args) == 0
    assert seen == [
        ("ours", "triton", "bfloat16"),
        ("reference", "reference", "bfloat16"),
        ("float32", "reference", "float32"),
    ]
    assert os.environ["EDT_KERNELS_BACKEND"] == "reference"
    monkeypatch.setitem(LOSSES, "ours", [loss + 0.1 for loss in LOSSES["reference"]])
    assert main(args) == 1


def test_the_verdict_is_of_the_last_steps():
    steps = WINDOW + 50
    reference = [1.0] * steps
    float32 = [9.0] * 50 + [1.1] * WINDOW
    within = verdict([5.0] * 50 + [1.19] * WINDOW, reference, float32)
    assert (within["difference"], within["noise"]) == (pytest.approx(0.19), pytest.approx(0.1))
    assert within["within_bf16_noise"]
    outside = verdict([1.0] * 50 + [0.79] * WINDOW, reference, float32)
    assert not outside["within_bf16_noise"]
    assert outside["reason"] == "NOT within bf16 noise: 0.21, where 0.2 is allowed"
    assert verdict([1.0], [1.0], [1.0])["within_bf16_noise"]
    assert not verdict([math.nan], [1.0], [1.1])["within_bf16_noise"]


def test_a_loss_that_is_not_finite_is_outside_of_the_noise(tmp_path, capsys, monkeypatch):
    def losses(options, data, output, precision):
        if output.name == "reference":
            raise FloatingPointError("the gradient is not finite in x")
        return LOSSES["ours"]

    monkeypatch.setattr(loss_curves, "_losses", losses)
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "loss_curves.json").read_text())
    assert (found["within_bf16_noise"], found["reason"]) == (False, "reference: the gradient is not finite in x")
    assert "reference: the gradient is not finite in x" in capsys.readouterr().out


def test_an_interrupted_run_keeps_the_curves_it_has(tmp_path, capsys, monkeypatch):
    def losses(options, data, output, precision):
        if output.name == "float32":
            raise KeyboardInterrupt
        return LOSSES[output.name]

    (tmp_path / "loss_curves.png").write_bytes(b"of an earlier run")
    monkeypatch.setattr(loss_curves, "_losses", losses)
    assert main([*TINY, "--out", str(tmp_path)]) == 130
    found = json.loads((tmp_path / "loss_curves.json").read_text())
    assert (list(found["losses"]), "within_bf16_noise" in found) == (["ours", "reference"], False)
    assert "not finished: no verdict" in loss_curves.summary(found)
    assert not (tmp_path / "loss_curves.png").exists()


def test_latents_have_unit_variance_and_repeat():
    latents, labels = synthetic_latents((4, 32, 32))
    assert (latents.shape, set(labels.tolist())) == ((1024, 4, 32, 32), set(range(8)))
    assert latents.std().item() == pytest.approx(1, abs=0.15)
    assert torch.equal(latents, synthetic_latents((4, 32, 32))[0])
    smooth = torch.nn.functional.avg_pool2d(latents, 4)
    assert smooth.var() > 0.7 * latents.var()  # of white noise a sixteenth would be left


def test_the_picture(tmp_path):
    found = FOUND | verdict(**LOSSES)
    figure = loss_curves.draw(found)
    above, below = figure.axes
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["ours", "reference", "float32"]
    assert (above.get_yscale(), below.get_yscale()) == ("log", "log")
    assert "Sample GPU" in figure.get_suptitle()
    figure.savefig(tmp_path / "picture.png")
    assert np.asarray(Image.open(tmp_path / "picture.png").convert("L")).std() > 5
