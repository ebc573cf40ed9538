"""What goes wrong in a training run: it is said, and nothing that was good is lost."""

import contextlib
import ctypes
import errno
import io
import json
import os
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from disks import small_disk
from safetensors.torch import save_file
from training_runs import (
    TINY,
    assert_same_run,
    differing,
    forked,
    newest,
    small_arguments,
    small_config,
    state_of,
    tensors,
    write_moments,
)

from edt.cli import main
from edt.data.dataset import LatentDataset, SampleOrder, to_latents, write_dataset
from edt.devices import torch_device
from edt.files.outputs import sha256
from edt.model.presets import PRESETS
from edt.runs.checkpoint import CHECKSUMS, list_checkpoints, verify_checkpoint
from edt.runs.log import read_metrics
from edt.train import state as train_state
from edt.train import trainer as train_module
from edt.train.config import CONFIG_FILE, load_config
from edt.train.trainer import train

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
    monkeypatch.setitem(PRESETS, "tiny", dict(PRESETS["tiny"]))
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
        f", in step 7 and 2 before it; the latents of items {item} in {data} are not finite, or beyond "
        f"1e+06: make these data anew; the last good checkpoint is {good}"
    )
    assert newest(tmp_path / "run") == good


def test_data_that_are_not_finite(tmp_path, capsys):
    """As stored, or as their scaling makes them."""
    latents = np.zeros((10, 4, 8, 8), np.float32)
    for name, factor, items in (("nan", 1.0, "4"), ("scaled", 1e30, "0, 1, 2, 3, 4 and 5 more")):
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
        match=r"in step 1 and 0 before it; the weights model\.final_layer\.linear\.weight are not finite: go on "
        "from an earlier checkpoint, or other weights; there is no checkpoint yet",
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


# What goes away during training


def break_reading(monkeypatch, after: int, rank: str = "0"):
    """The data cannot be read any more after so many batches, by the process of that rank."""
    read, calls = LatentDataset.read, []

    def fail(dataset, indices, views):
        calls.append(None)
        if len(calls) > after and os.environ.get("RANK", "0") == rank:
            raise ValueError(f"shard {dataset.folder / 'data-00000.npy'} has 128 bytes; its header says 5248")
        return read(dataset, indices, views)

    monkeypatch.setattr(LatentDataset, "read", fail)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_cannot_be_read_any_more(data, tmp_path, monkeypatch, capsys, workers):
    """The steps done are saved, and the run goes on from them once the data are back."""
    with monkeypatch.context() as patch:
        break_reading(patch, 2 if workers else 3)  # each of two workers reads two batches
        arguments = small_arguments(data, tmp_path / "run", num_workers=workers, log_every=100)
        error = error_of(arguments, capsys)
    done = 4 if workers else 3
    saved = tmp_path / "run" / "checkpoints" / f"step-{done:08d}"
    assert error == (
        f"edt: error: data {data}: the 8 images of step {done + 1} cannot be read: shard "
        f"{data / 'data-00000.npy'} has 128 bytes; its header says 5248; the steps before it are in {saved}"
    )
    log = (tmp_path / "run" / "error.log").read_text()
    assert "ValueError: shard" in log
    assert newest(tmp_path / "run") == saved
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == done
    train(small_config(data, tmp_path / "run", log_every=100))
    train(small_config(data, tmp_path / "whole", log_every=100))
    assert differing(newest(tmp_path / "run"), newest(tmp_path / "whole")) == []


def test_what_a_worker_raises_is_said_whole(data, tmp_path, monkeypatch, capsys):
    """As in the process itself: its traceback was the message, of which the last line alone was said."""
    for error, said in (
        (RuntimeError("disk 7 is broken\n  ask somebody\n"), "disk 7 is broken ask somebody"),
        (torch.OutOfMemoryError("all is taken"), "all is taken"),
        (MemoryError(), "MemoryError"),
    ):
        for workers in (0, 1):
            with monkeypatch.context() as patch:
                patch.setattr(LatentDataset, "read", partial(raising, error))
                error_line = error_of(small_arguments(data, tmp_path / "run", num_workers=workers), capsys)
            assert error_line.rstrip().endswith(f"the 8 images of step 1 cannot be read: {said}")


def raising(error, *args):
    raise error


def test_data_that_cannot_be_read_at_all(data, tmp_path, monkeypatch, capsys):
    break_reading(monkeypatch, 0)
    error = error_of(small_arguments(data, tmp_path / "run"), capsys)
    assert error.endswith("has 128 bytes; its header says 5248")
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def break_reading_by_the_second(after: int = 3) -> None:
    break_reading(pytest.MonkeyPatch(), after, rank="1")


@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_data_that_one_of_two_processes_cannot_read(data, tmp_path, fsdp):
    """Both save the steps before it together, and say so."""
    arguments = small_arguments(data, tmp_path / "run", steps=1000)
    options = {"processes": 2, "fsdp": fsdp, "patch": break_reading_by_the_second}
    with forked(arguments, tmp_path / "log", **options) as run:
        assert run.wait() == [2, 2], run.text()
    saved = newest(tmp_path / "run")
    assert state_of(saved)["steps"] == 3
    verify_checkpoint(saved)
    assert f"another process could not read its data for step 4; the steps before it are in {saved}" in run.text()
    assert "the 4 images of step 4 cannot be read: shard " in run.text()


def test_data_that_one_of_two_processes_cannot_read_at_all(data, tmp_path):
    """The other was waiting for it in its first step, and said that a connection was closed."""
    options = {"processes": 2, "patch": partial(break_reading_by_the_second, 0)}
    with forked(small_arguments(data, tmp_path / "run"), tmp_path / "log", **options) as run:
        assert run.wait() == [2, 2], run.text()
    assert f"another process of the run has failed: data {data}: the 4 images of step 1 cannot" in run.text()
    assert run.text().count("edt: error: ") == 2


def test_any_other_error_leaves_the_steps_before_it(data, tmp_path, monkeypatch, capsys):
    """In forward or backward, which change no weight; what it interrupts is made again by the next start."""
    backward, calls = train_module.Trainer._backward, []

    def fail(trainer, *args):
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("out of something")
        return backward(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_module.Trainer, "_backward", fail)
        assert error_of(small_arguments(data, tmp_path / "run"), capsys) == "edt: error: out of something"
    assert newest(tmp_path / "run").name == "step-00000003"
    train(small_config(data, tmp_path / "run"))
    train(small_config(data, tmp_path / "whole"))
    assert differing(newest(tmp_path / "run"), newest(tmp_path / "whole")) == []


def test_an_error_amid_the_update_leaves_none(data, tmp_path, monkeypatch):
    """Some weights are of this step, some of the one before."""
    apply, calls = train_state.TrainState.apply_gradients, []

    def fail(state, learning_rate):
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("amid it")
        apply(state, learning_rate)

    monkeypatch.setattr(train_state.TrainState, "apply_gradients", fail)
    with pytest.raises(RuntimeError, match="amid it"):
        train(small_config(data, tmp_path / "run", checkpoint_every=2))
    assert newest(tmp_path / "run").name == "step-00000002"


def test_the_data_folder_moves_during_a_run(data, tmp_path, monkeypatch, capsys):
    """What is open stays open; a checkpoint looks for nothing there. What lies there later is other data."""
    at_step(monkeypatch, 2, lambda: data.rename(tmp_path / "moved"))
    train(small_config(data, tmp_path / "run", steps=4, checkpoint_every=3))
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [3, 4]
    monkeypatch.undo()
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    shutil.copytree(tmp_path / "moved", data)
    manifest = data / "manifest.json"
    rename = lambda: manifest.write_text(manifest.read_text().replace('"a"', '"z"', 1))  # noqa: E731
    at_step(monkeypatch, 5, rename)
    train(small_config(data, tmp_path / "run", steps=6))
    capsys.readouterr()
    train(small_config(data, tmp_path / "run", steps=7))
    assert "  data was " in capsys.readouterr().out


def test_the_runs_folder_is_removed_during_it(data, tmp_path, monkeypatch):
    """What ended the run is said, and not that there is no folder to tidy."""

    def remove():
        shutil.rmtree(tmp_path / "run")
        raise FloatingPointError("the weights")

    at_step(monkeypatch, 2, remove)
    with pytest.raises(FloatingPointError, match="the weights"):
        train(small_config(data, tmp_path / "run"))


def at_step(monkeypatch, number: int, action):
    step = train_module.Trainer.step

    def acting(trainer, batch):
        if trainer.state.steps + 1 == number:
            action()
        return step(trainer, batch)

    monkeypatch.setattr(train_module.Trainer, "step", acting)


@pytest.mark.parametrize("stream", ["pipe", "terminal", None])
def test_a_terminal_that_is_gone(data, tmp_path, monkeypatch, stream):
    """Of stderr and stdout; the run goes on without them."""

    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    read, write = os.pipe()
    os.close(read)
    gone = {"pipe": os.fdopen(write, "w", buffering=1), "terminal": Gone(), None: None}[stream]
    close = lambda: [monkeypatch.setattr(sys, name, gone) for name in ("stdout", "stderr")]  # noqa: E731
    monkeypatch.setattr(train_module.RunLog, "step", shown_always(train_module.RunLog.step))
    if stream is None:  # closed from the start
        close()
    else:
        at_step(monkeypatch, 2, close)
    train(small_config(data, tmp_path / "run", steps=4))
    monkeypatch.undo()
    assert newest(tmp_path / "run").name == "step-00000004"
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [2, 4]


def shown_always(step):
    def refreshed(log, *args):
        log.bar.mininterval = 0
        step(log, *args)

    return refreshed


def test_a_grid_that_is_not_finite_ends_nothing(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_module, "draw_grid", lambda *args: (torch.full((1, 4, 8, 8), NAN), np.zeros(1)))
    train(small_config(data, tmp_path / "run", steps=2, sample_every=1, num_inference_steps=1))
    assert "step 1: the averaged weights draw numbers that are not finite; no grid" in capsys.readouterr().out
    assert newest(tmp_path / "run").name == "step-00000002"


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
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001; it must be at most 1000"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be finite and not negative"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; it must be at least 0 and below 1"),
        ({"class_dropout": 1.5}, "class_dropout is 1.5; it must be 0 to 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0; it must be positive and finite"),
        ({"alignment_encoder": "encoders:tiny"}, "has no images beside its latents; extract with --store-images"),
        ({"task_routing": (2.0, 4.0)}, "task_routing"),
        ({"vae": ".", "sample_every": 5}, "vae is '.', which cannot be loaded"),  # a folder, so no hub is asked
        ({"class_dropout": 0.0, "sample_every": 5, "guidance_scale": 2.0}, "no null class is learned"),
        ({"keep_every": 0}, "keep_every is 0; it must be at least 1"),
        ({"alignment_encoder": "torch:zeros"}, "has no images"),
        ({"trackers": ("tensorboard", "tensorbord")}, "trackers has tensorbord; Accelerate knows all, aim, "),
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


def test_a_name_that_is_not_utf_8(data, tmp_path, capsys):
    """TensorBoard takes none; all else does, and says it so that a terminal can show it."""
    output = os.fsdecode(os.fsencode(tmp_path) + b"/r\xe4\n")
    error = error_of(small_arguments(data, output, trackers=("tensorboard",)), capsys)
    assert error.startswith("edt: error: trackers tensorboard cannot be started: 'utf-8' codec can't encode ")
    assert main(small_arguments(data, output, steps=1)) == 0
    assert capsys.readouterr().out.endswith(
        f"the run is in {tmp_path}/r\\udce4\\n; draw from it with\n"
        f"  edt sample --checkpoint '{tmp_path}/r\\udce4\\n' --classes all\n"
    )


def test_the_device_is_the_one_of_this_run(data, tmp_path, monkeypatch):
    """Accelerate keeps one for a process: a run on a CPU took the GPU from those after it, without a word."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests
    train(small_config(data, tmp_path / "run", steps=1))
    assert not is_initialized()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    Accelerator(cpu=True)  # as a program of its own may have
    try:
        with pytest.raises(ValueError, match="device is 'cuda'; Accelerate was told cpu, here or by its environ"):
            train(small_config(data, tmp_path / "run", device="cuda"))
        with pytest.raises(ValueError, match="device is 'cuda:2'; torch sees GPUs here up to cuda:1"):
            torch_device("cuda:2")
        train(small_config(data, tmp_path / "auto", steps=1, device="auto"))
        assert load_config(tmp_path / "auto" / CONFIG_FILE).precision == "float32"
        assert is_initialized()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


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


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", "[]", "is JSON, but list; it must be an object"),
        ("state.json", '{"steps": 1', "is no JSON, or torn"),
        ("state.json", "{}", "has no steps as edt train writes it, which is a count"),
        ("state.json", {"steps": True}, "has no steps as edt train writes it"),
        ("state.json", {"samples_seen": 10**30}, "has no samples_seen as edt train writes it"),
        ("state.json", {"run": None}, "has no run as edt train writes it, which is an object"),
        ("state.json", {"format": 2}, "is of format 2; this code reads 1"),
        ("state.json", {"optimizer": {"name": "adan"}}, "has no groups of the optimizer"),
        ("state.json", {"optimizer": {"name": "adan", "groups": [{}, {}]}}, "has a state of the optimizer or"),
        ("model/config.json", "[]", "is JSON, but list; it must be an object"),
        ("optimizer.safetensors", "torn", "is truncated or no safetensors file"),
        ("training.safetensors", None, "has model.x/y, which this run's model has not"),
        ("training.safetensors", {}, "has a state of the optimizer or the timestep sampler that does not fit"),
        ("optimizer.safetensors", None, "has a state of the optimizer or the timestep sampler that does not fit"),
        ("ema/diffusion_pytorch_model.safetensors", None, "has nothing for model."),
    ],
    ids=str,
)
def test_files_of_a_checkpoint_that_another_program_wrote(data, tmp_path, capsys, file, content, message):
    """Their checksums are right. None: tensors of other names; {}: of none."""
    arguments = small_arguments(data, tmp_path / "run", steps=1)
    assert main(arguments) == 0
    folder = newest(tmp_path / "run")
    path = folder / file
    if content is None:
        save_file({"model.x/y": torch.zeros(2)}, path)
    elif content == {}:
        save_file({}, path)
    elif isinstance(content, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    else:
        path.write_text(content)
    listed = json.loads((folder / CHECKSUMS).read_text())
    listed[file] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (folder / CHECKSUMS).write_text(json.dumps(listed))
    error = error_of(arguments, capsys)
    assert message in error
    assert str(folder) in error


def test_a_list_of_no_files_is_damage(data, tmp_path, capsys):
    assert main(small_arguments(data, tmp_path / "run", steps=1)) == 0
    (newest(tmp_path / "run") / CHECKSUMS).write_text("{}")
    error = error_of(small_arguments(data, tmp_path / "run", steps=1), capsys)
    assert "has checkpoints, but every one of them is damaged" in error


def test_data_of_an_old_config_that_are_not_found(data, tmp_path, monkeypatch, capsys):
    """Its path was kept as it was typed, and the run is started again from another folder."""
    monkeypatch.chdir(tmp_path)
    assert main(small_arguments("data", "run", steps=1)) == 0
    config = tmp_path / "run" / "config.yaml"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--output", "../run", "--steps", "2"]) == 0
    config.write_text(config.read_text().replace(f"data: {data}", "data: data"))
    error = error_of(["train", "--output", "../run", "--steps", "3"], capsys)
    assert error == (
        "edt: error: data folder data: there is no such folder; edt extract makes one. It was looked for at "
        f"{tmp_path / 'elsewhere' / 'data'}; --data says where it is now"
    )
    assert main(["train", "--output", "../run", "--steps", "3", "--data", "../data"]) == 0
    assert f"data: {tmp_path}" in config.read_text()


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "config.yaml"])
def test_a_folder_that_cannot_be_written_costs_no_step(data, tmp_path, monkeypatch, capsys, name):
    """Something else has the name of what a run writes."""
    (tmp_path / "run").mkdir()
    if name == "checkpoints":
        (tmp_path / "run" / name).write_text("")
    elif name == "metrics.jsonl":
        (tmp_path / "run" / name).write_text('{"loss": 1}\n')
    else:
        (tmp_path / "run" / name).mkdir()
    monkeypatch.setattr(train_module.Trainer, "step", lambda *args: pytest.fail("a step"))
    error = error_of(small_arguments(data, tmp_path / "run"), capsys)
    assert str(tmp_path / "run") in error
    assert "edt train did not write" in error if name == "metrics.jsonl" else "cannot be written" in error


def test_images_smaller_than_the_model_takes(tmp_path, capsys):
    torch.manual_seed(0)
    write_dataset(tmp_path / "data", torch.randint(256, (4, 3, 3, 3), dtype=torch.uint8))
    error = error_of(small_arguments(tmp_path / "data", tmp_path / "run"), capsys)
    assert "sample_size" in error
