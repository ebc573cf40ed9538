"""Training on a CUDA device: what only a GPU can show of it."""

import warnings

import numpy as np
import pytest
import torch
from training_runs import assert_same_run, small_config, write_moments

from edt.data.dataset import write_dataset
from edt.model.complexity import estimate_memory
from edt.model.presets import PRESETS
from edt.runs.log import peak_memory, read_metrics
from edt.train.trainer import Trainer, train

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_tiny_training")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_moments(tmp_path_factory.mktemp("data") / "moments")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"precision": "float32"},
        {"precision": "tf32", "optimizer": "adamw"},
        {"gradient_accumulation_steps": 2, "num_workers": 2},
        {"gradient_checkpointing": True},
        {"compile": True},
    ],
    ids=str,
)
def test_resume_is_bitwise(data, tmp_path, fields):
    for output, parts in (("whole", (6,)), ("parts", (3, 6))):
        for steps in parts:
            train(small_config(data, tmp_path / output, steps=steps, device="cuda", **fields))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_grids_change_nothing(data, tmp_path):
    for name, every in (("without", 0), ("with", 2)):
        train(small_config(data, tmp_path / name, device="cuda", sample_every=every, num_inference_steps=3))
    assert_same_run(tmp_path / "with", tmp_path / "without")
    assert len(list((tmp_path / "with" / "samples").glob("*.png"))) == 3


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_memory_is_what_was_estimated(tmp_path, monkeypatch, gradient_checkpointing):
    """EDT-S/2, 64 images in both passes; beside what is counted, backward has temporary tensors."""
    monkeypatch.delenv("EDT_KERNELS_BACKEND", raising=False)
    latents = np.random.default_rng(0).normal(size=(64, 4, 32, 32)).astype(np.float32)
    write_dataset(tmp_path / "data", latents, np.zeros(64, np.int64))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fields = {"model": "EDT-S/2", "batch_size": 64, "steps": 2, "device": "cuda"}
    train(
        small_config(tmp_path / "data", tmp_path / "run", gradient_checkpointing=gradient_checkpointing, **fields)
    )
    measured = peak_memory(torch.device("cuda")) - before
    model = {**PRESETS["EDT-S/2"], "num_classes": 1}
    estimate = estimate_memory(model, 64, precision="bfloat16", gradient_checkpointing=gradient_checkpointing,
                               two_pass=True).training  # fmt: skip
    assert 0.8 * estimate < measured < 1.35 * estimate


def test_a_step_waits_for_the_device_once(data, tmp_path, monkeypatch):
    """For the figures that the host must know; copies and indexing by masks would wait too."""
    step, waits = Trainer.step, []

    def watched(trainer, batch):
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            figures = step(trainer, batch)
        torch.cuda.set_sync_debug_mode("default")
        waits.append([str(warning.message) for warning in caught if "synchroniz" in str(warning.message)])
        return figures

    monkeypatch.setattr(Trainer, "step", watched)
    train(small_config(data, tmp_path / "run", device="cuda", steps=5, num_workers=1))
    assert [len(messages) for messages in waits[2:]] == [1, 1, 1], waits


def test_utilisation_is_of_the_device(data, tmp_path):
    train(small_config(data, tmp_path / "run", device="cuda", log_every=3, peak_tflops=1.0))
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert line["model_flop_utilisation"] == pytest.approx(line["tflops"])
    assert line["peak_memory_gib"] < 8
