"""What goes wrong in a training run: it is said, and nothing that was good is lost."""

import contextlib
import ctypes
import errno
import os
import shutil

import numpy as np
import pytest
import torch
from disks import small_disk
from safetensors.torch import save_file
from training_runs import (
    assert_same_run,
    differing,
    newest,
    small_arguments,
    small_config,
    state_of,
    tensors,
    write_moments,
)

from edt import train as train_module
from edt import train_state
from edt.cli import main
from edt.data import SampleOrder, to_latents, write_dataset
from edt.run_checkpoint import list_checkpoints, verify_checkpoint
from edt.run_log import read_metrics
from edt.train import train

pytestmark = pytest.mark.usefixtures("_tiny_training")

NAN = float("nan")


@pytest.fixture
def data(tmp_path):
    return write_moments(tmp_path / "data")


def error_of(arguments: list[str], capsys, code: int = 2) -> str:
    """The last line on stderr, after that exit code and without a traceback."""
    capsys.readouterr()
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


# Checkpoints and disks


def test_a_damaged_checkpoint_is_passed_over(data, tmp_path, capsys):
    fields = {"steps": 6, "checkpoint_every": 2}
    train(small_config(data, tmp_path / "run", **fields))
    train(small_config(data, tmp_path / "whole", **fields))
    weights = newest(tmp_path / "run") / "ema" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    train(small_config(data, tmp_path / "run", **fields))
    said = capsys.readouterr()
    assert "step-00000006 has " in said.err
    assert "bytes of ema/diffusion_pytorch_model.safetensors" in said.err
    assert "; the one before is used" in said.err
    assert "goes on from" in said.out
    verify_checkpoint(newest(tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_all_checkpoints_damaged(data, tmp_path, capsys):
    arguments = small_arguments(data, tmp_path / "run", steps=4, checkpoint_every=2)
    assert main(arguments) == 0
    for _, folder in list_checkpoints(tmp_path / "run" / "checkpoints"):
        (folder / "state.json").unlink()
    error = error_of(arguments, capsys)
    assert error.startswith(f"edt: error: output {tmp_path / 'run'} has checkpoints, but every one of them is ")
    with pytest.raises(ValueError, match=r"step-00000004 lacks state\.json"):
        train(small_config(data, tmp_path / "other", resume=str(newest(tmp_path / "run"))))


@contextlib.contextmanager
def checkpoints_on_a_small_disk(folder, room, monkeypatch):
    """A file system with so much room; where mounting is not allowed, files that cannot be written on it."""
    written = []

    def save_if_room(tensors, path, metadata):
        size = sum(tensor.nbytes for tensor in tensors.values())
        if sum(file.stat().st_size for file in folder.rglob("*.safetensors")) + size > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, metadata=metadata)
        written.append(path)

    with small_disk(folder, room, monkeypatch):
        if not os.path.ismount(folder):
            monkeypatch.setattr(train_state, "save_file", save_if_room)
        yield


@pytest.mark.parametrize("mountable", [True, False])
def test_full_disk(data, tmp_path, monkeypatch, capsys, mountable):
    """At the third checkpoint: the second stays, and after there is room the run is as if nothing had been."""
    if not mountable:
        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: type("Libc", (), {"mount": lambda *_: -1}))
    fields = {"steps": 8, "checkpoint_every": 2}
    assert main(small_arguments(data, tmp_path / "whole", **fields)) == 0
    size = sum(file.stat().st_size for file in newest(tmp_path / "whole").rglob("*") if file.is_file())
    run = tmp_path / "disk" / "run"
    with checkpoints_on_a_small_disk(tmp_path / "disk", int(2.5 * size), monkeypatch):
        error = error_of(small_arguments(data, run, **fields), capsys)
        assert error.startswith("edt: error: checkpoint of step 6 could not be written: ")
        assert "No space left on device" in error
        good = run / "checkpoints" / "step-00000004"
        assert error.endswith(f"; the last good one is {good}")
        assert sorted(path.name for path in good.parent.iterdir()) == ["step-00000002", "step-00000004"]
        for _, folder in list_checkpoints(good.parent):
            verify_checkpoint(folder)
        shutil.copytree(run, tmp_path / "run")
    assert main(small_arguments(data, tmp_path / "run", **fields)) == 0
    assert "goes on from" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_disk_without_room_is_found_before_the_first_step(data, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    error = error_of(small_arguments(data, tmp_path / "run"), capsys)
    assert "has 0.00 GB free; a checkpoint of this run takes 0.00 GB, and 100 are kept" in error
    assert not (tmp_path / "run").exists()


# Numbers that are not finite


def poison_latents(monkeypatch, steps: range, run_state: list) -> None:
    """One sample's latents are NaN in these steps (counted from 1)."""
    made = train_state.TrainState.__init__

    def keep(state, *args):
        made(state, *args)
        run_state[:] = [state]

    def poisoned(raw, dataset, generator):
        latents = to_latents(raw, dataset, generator)
        if run_state[0].steps + 1 in steps:
            latents[3, 0, 0, 0] = NAN
        return latents

    monkeypatch.setattr(train_state.TrainState, "__init__", keep)
    monkeypatch.setattr(train_module, "to_latents", poisoned)


def test_a_step_that_is_not_finite_changes_nothing(data, tmp_path, monkeypatch):
    """But the position and the count."""
    for steps in (3, 4):  # the last step is saved even then
        with monkeypatch.context() as patch:
            poison_latents(patch, range(3, 4) if steps == 3 else [], [])
            train(small_config(data, tmp_path / "run", steps=steps, checkpoint_every=1, log_every=4))
    second, third, fourth = (folder for _, folder in list_checkpoints(tmp_path / "run" / "checkpoints")[1:])
    assert differing(second, third) == []
    before, after = state_of(second), state_of(third)
    assert (after["steps"], after["samples_seen"], after["skipped_steps"]) == (3, 24, 1)
    assert (after["skipped_in_a_row"], state_of(fourth)["skipped_in_a_row"]) == (1, 0)
    for name in ("ema_steps", "optimizer"):
        assert without_learning_rate(after[name]) == without_learning_rate(before[name])
    assert len(differing(third, fourth)) > 300
    assert tensors(fourth)["training timestep_sampler/counts"].sum() == 3 * 8
    assert [line["skipped_steps"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 0, 1, 1]
    assert "full_loss" not in read_metrics(tmp_path / "run" / "metrics.jsonl")[2]
    assert all(torch.isfinite(tensor).all() for tensor in tensors(fourth).values())


def test_no_checkpoint_amid_skipped_steps(data, tmp_path, monkeypatch):
    """The weights may be what makes them fail, and must not take the place of good ones."""
    poison_latents(monkeypatch, range(3, 5), [])
    train(small_config(data, tmp_path / "run", steps=6, checkpoint_every=1))
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [1, 2, 5, 6]


def without_learning_rate(saved):
    return saved if isinstance(saved, int) else [{**group, "lr": 0} for group in saved["groups"]]


def test_a_skipped_step_leaves_no_trace_in_later_gradients(data, tmp_path, monkeypatch):
    """The run is the one that has no such step: with the same samples, noise and learning rate from there on."""
    poison_latents(monkeypatch, range(3, 4), [])
    train(small_config(data, tmp_path / "skipped", steps=4, checkpoint_every=2))
    monkeypatch.undo()
    monkeypatch.setitem(train_module.PRESETS, "tiny", dict(train_module.PRESETS["tiny"]))
    train(small_config(data, tmp_path / "other", steps=2))
    load = train_state.TrainState.load

    def load_a_step_later(state, folder):
        run = load(state, folder)
        state.steps, state.samples_seen = 3, 24
        return run

    monkeypatch.setattr(train_state.TrainState, "load", load_a_step_later)
    train(small_config(data, tmp_path / "other", steps=4))
    assert differing(newest(tmp_path / "other"), newest(tmp_path / "skipped")) == []


def test_too_many_in_a_row(data, tmp_path, monkeypatch, capsys):
    """Of data that are not finite: they are named, by the numbers of the items, and not the learning rate."""
    poison_latents(monkeypatch, range(5, 100), [])
    arguments = small_arguments(data, tmp_path / "run", steps=20, checkpoint_every=4, max_skipped_steps=3)
    error = error_of(arguments, capsys, code=1)
    good = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert error.startswith("edt: training stopped: the loss of the full and the masked pass is not finite at ")
    item = SampleOrder(20, 0)(np.array([6 * 8 + 3]))[0][0]  # the fourth sample of step 7
    assert error.endswith(
        f", in step 7 and 2 before it; the latents of items {item} in {data} are not finite: make these data "
        f"anew; the last good checkpoint is {good}"
    )
    assert newest(tmp_path / "run") == good


def test_data_that_are_not_finite(tmp_path, capsys):
    """As stored, or as their scaling makes them."""
    latents = np.zeros((10, 4, 8, 8), np.float32)
    for name, factor, items in (("nan", 1.0, "4"), ("scaled", 3e38, "0, 1, 2, 3, 4 and 5 more")):
        data = tmp_path / name
        latents[:] = 9
        write_dataset(data, latents, np.arange(10) % 3, scaling_factor=factor)
        if name == "nan":
            stored = np.load(data / "data-00000.npy")
            stored[4] = NAN
            np.save(data / "data-00000.npy", stored)
        fields = {"batch_size": 10, "max_skipped_steps": 1, "verify_data": False}
        error = error_of(small_arguments(data, tmp_path / f"run {name}", **fields), capsys, code=1)
        assert f"; the latents of items {items}" in error
        assert "learning_rate" not in error


def test_weights_that_are_not_finite_are_named(data, tmp_path, monkeypatch):
    """They stay so whatever the learning rate is; checkpoints before them are what helps."""

    def spoil(state):
        state.shards["model.final_layer.linear.weight"].data[0, 0] = NAN

    made = train_state.TrainState.__init__
    monkeypatch.setattr(
        train_state.TrainState, "__init__", lambda state, *args: (made(state, *args), spoil(state))[0]
    )
    with pytest.raises(
        FloatingPointError,
        match=r"in step 1 and 0 before it; the weights model\.final_layer\.linear\.weight are not finite: go on from "
        "an earlier checkpoint, or other weights; there is no checkpoint yet",
    ):
        train(small_config(data, tmp_path / "run", max_skipped_steps=1))


def test_the_count_in_a_row_survives_a_restart(data, tmp_path, monkeypatch):
    """Or a run that is restarted often would skip for ever."""
    poison_latents(monkeypatch, range(1, 100), [])
    for steps in (2, 3):
        train(small_config(data, tmp_path / "run", steps=steps, max_skipped_steps=4))
    with pytest.raises(FloatingPointError, match="in step 4 and 3 before it"):
        train(small_config(data, tmp_path / "run", steps=5, max_skipped_steps=4))


def test_gradients_alone_that_are_not_finite_are_named(data, tmp_path, monkeypatch):
    """As of a backward that overflows where forward does not; before there is any checkpoint."""
    take = train_state.TrainState.take_gradients

    def overflow(state):
        state.parameters["model.final_layer.linear.weight"].grad[0, 0] = float("inf")
        return take(state)

    monkeypatch.setattr(train_state.TrainState, "take_gradients", overflow)
    with pytest.raises(
        FloatingPointError,
        match=r"the gradient is not finite in model\.final_layer\.linear\.weight, in step 1 and 0 before it; "
        "learning_rate 0.001 may be too high; there is no checkpoint yet",
    ):
        train(small_config(data, tmp_path / "run", max_skipped_steps=1))


def test_only_the_masked_pass(data, tmp_path, monkeypatch):
    losses = train_module.TrainingObjective.forward

    def masked_alone(objective, *args):
        values, alignment = losses(objective, *args)
        return values * torch.tensor([[1.0], [NAN]]), alignment

    monkeypatch.setattr(train_module.TrainingObjective, "forward", masked_alone)
    with pytest.raises(FloatingPointError, match=r"the loss of the masked pass is not finite at .* and 3 more"):
        train(small_config(data, tmp_path / "run", max_skipped_steps=1))


# What does not fit


def test_corrupt_data(data, tmp_path, capsys):
    shard = data / "data-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    arguments = small_arguments(data, tmp_path / "run", steps=1)
    error = error_of(arguments, capsys)
    assert error.startswith(f"edt: error: corrupt: {shard} (SHA-256 differs from the manifest)")
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--no-verify-data"]) == 0


def test_labels_outside_of_the_classes(tmp_path, capsys):
    data = write_moments(tmp_path / "data")
    manifest = data / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"num_classes": 3', '"num_classes": 2').replace(' "a",', "", 1)
    )
    error = error_of(small_arguments(data, tmp_path / "run"), capsys)
    assert "has the label 2; it must have 0 to 1" in error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "nowhere"}, "data folder nowhere: there is no such folder; edt extract makes one"),
        ({"batch_size": 6, "gradient_accumulation_steps": 4},
         "batch_size is 6; it must be a multiple of 1 processes times 4 gradient_accumulation_steps"),
        ({"model": "EDT-S/3"}, "model is 'EDT-S/3'; it must be one of EDT-S/2, "),
        ({"device": "cuda"}, "device is 'cuda'; torch sees no GPU here, use cpu"),
        ({"resume": "nowhere"}, "resume is nowhere; it must be latest, never, or a checkpoint's folder"),
        ({"init_from": "nowhere"}, "checkpoint nowhere needs a config.json"),
        ({"learning_rate": NAN}, "learning_rate is nan; it must be positive and finite"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"sample_steps": 1001}, "sample_steps is 1001; it must be at most 1000"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be finite and not negative"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; it must be at least 0 and below 1"),
        ({"class_dropout": 1.5}, "class_dropout is 1.5; it must be 0 to 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0; it must be positive and finite"),
        ({"alignment_encoder": "encoders:tiny"}, "has no images beside its latents; extract with --store-images"),
        ({"task_routing": (2.0, 4.0)}, "task_routing"),
        ({"vae": ".", "sample_every": 5}, "vae is '.', which cannot be loaded"),  # a folder, so no hub is asked
        ({"class_dropout": 0.0, "sample_every": 5, "sample_guidance": 2.0}, "no null class is learned"),
        ({"keep_every": 0}, "keep_every is 0; it must be at least 1"),
        ({"alignment_encoder": "torch:zeros"}, "has no images"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_wrong_options(data, tmp_path, capsys, fields, message):
    if fields.get("device") == "cuda" and torch.cuda.is_available():
        fields, message = {"precision": "fp64"}, "invalid choice"
    error = error_of(small_arguments(**{"data": data, "output": tmp_path / "run", **fields}), capsys)
    assert error.startswith("edt: error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_never_resume(data, tmp_path):
    train(small_config(data, tmp_path / "run", steps=1, resume="never"))
    with pytest.raises(ValueError, match="run has a run, and resume is never; give another output"):
        train(small_config(data, tmp_path / "run", steps=2, resume="never"))
    # What starts a process is not part of the run: the folder alone goes on.
    assert main(["train", "--output", str(tmp_path / "run"), "--steps", "2"]) == 0
    assert state_of(newest(tmp_path / "run"))["steps"] == 2


def test_checkpoints_of_something_else(data, tmp_path):
    train(small_config(data, tmp_path / "run", steps=1))
    before = tensors(newest(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"optimizer is 'adamw'; checkpoint .*-00000001 was trained with 'adan'"):
        train(small_config(data, tmp_path / "run", steps=2, optimizer="adamw"))
    with pytest.raises(ValueError, match=r"has task_routing None; this run's model has .0\.8, 4\.0."):
        train(small_config(data, tmp_path / "run", steps=2, task_routing=(0.8, 4.0)))
    with pytest.raises(ValueError, match=r"it was of another model, or of other data"):
        train(small_config(data, tmp_path / "run", steps=2, model="EDT-digits"))
    with pytest.raises(ValueError, match=r"has \(4, 16\) for .*label_embedding\.weight; this run needs \(6, 16\)"):
        train(small_config(write_moments(tmp_path / "five", classes=5), tmp_path / "run", steps=2))
    with pytest.raises(ValueError, match=r"has model\.label_embedding\.weight, which this run's model has not"):
        train(small_config(data, tmp_path / "run", steps=2, unconditional=True))
    after = tensors(newest(tmp_path / "run"))
    assert state_of(newest(tmp_path / "run"))["steps"] == 1
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_images_smaller_than_the_model_takes(tmp_path, capsys):
    torch.manual_seed(0)
    write_dataset(tmp_path / "data", torch.randint(256, (4, 3, 3, 3), dtype=torch.uint8))
    error = error_of(small_arguments(tmp_path / "data", tmp_path / "run"), capsys)
    assert "sample_size" in error
