"""A run that was killed and started again is, bit for bit, the run that was not."""

import contextlib
import random
import signal
import time

import pytest
import torch
from image_folders import save_images, save_vae
from training_runs import (
    Processes,
    as_arguments,
    assert_same_run,
    differing,
    forked,
    fresh,
    newest,
    run_to_end,
    small_arguments,
    small_config,
    state_of,
    tensors,
    write_moments,
)

from edt.cli import main
from edt.diffusion.process import LossSecondMomentSampler
from edt.runs import checkpoint as run_checkpoint
from edt.runs import folder as run_folder
from edt.runs.checkpoint import list_checkpoints
from edt.runs.log import read_metrics
from edt.train import state as train_state
from edt.train.config import CONFIG_FILE
from edt.train.trainer import Trainer, train

pytestmark = pytest.mark.usefixtures("_tiny_training")

STEPS = 30
KILLED_RUN = {"steps": STEPS, "checkpoint_every": 5, "log_every": 2, "batch_size": 8, "ema_warmup": True,
              "warmup_steps": 4, "decay_steps": 20, "num_workers": 1}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Moments of both views of images of two classes, by `edt extract` with a random VAE."""
    folder = tmp_path_factory.mktemp("extracted")
    for number, name in enumerate(("ant", "zebra")):
        save_images(folder / "images" / name, 7, first_seed=10 * number)
    vae = save_vae(folder / "vae")
    options = {"source": folder / "images", "output": folder / "data", "vae": vae, "image_size": 16,
               "shard_size": 5, "num_workers": 0, "device": "cpu"}  # fmt: skip
    assert main(["extract", *as_arguments(options)]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def whole_run(_tiny_training, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_to_end(small_arguments(data, folder / "run", **KILLED_RUN), folder / "log")
    return folder / "run"


def kill_during_a_checkpoint(run: Processes, output) -> None:
    """One that this process writes: another may have been left by a kill before."""
    begun = time.time_ns()

    def is_writing() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return any(f.stat().st_mtime_ns > begun for f in (output / "checkpoints").glob(".writing-*"))
        return False

    run.wait_for(is_writing)
    run.signal(signal.SIGSTOP)
    while not is_writing():  # on a busy machine it was complete before it stopped: the next one
        run.signal(signal.SIGCONT)
        run.wait_for(is_writing)
        run.signal(signal.SIGSTOP)
    run.kill()
    assert is_writing()  # still: it was killed before the checkpoint was complete


def kill_between_checkpoints(run: Processes, output, randomness: random.Random) -> None:
    """At a moment of a step that is not known beforehand, some steps after where the run went on."""
    lines = logged(output)
    target = (lines[-1] if lines else 0) + randomness.choice([4, 6])
    run.wait_for(lambda: any(step >= target for step in logged(output)))
    time.sleep(randomness.uniform(0, 0.05))  # a step takes 0.04 s
    run.kill()


def logged(output) -> list[int]:
    file = output / "metrics.jsonl"
    return [line["step"] for line in read_metrics(file)] if file.is_file() else []


RUNNER = """
import sys, time
sys.path.insert(0, "tests")
from training_runs import TINY, cli
from edt.runs import checkpoint as run_checkpoint
from edt.model.presets import PRESETS
PRESETS["tiny"] = TINY
flush = run_checkpoint._flush
def slow_flush(path):
    time.sleep(0.02)
    flush(path)
run_checkpoint._flush = slow_flush
sys.exit(cli.main(sys.argv[1:]))
"""


def test_killed_three_times(data, whole_run, tmp_path):
    """In interpreters of their own; between checkpoints, within one, and between them again."""
    seed = 20260717
    print(f"moments of the kills by random.Random({seed})")
    randomness = random.Random(seed)
    output, log = tmp_path / "run", tmp_path / "log"
    command = ["-c", RUNNER, *small_arguments(data, output, **KILLED_RUN)]
    with fresh(command, log) as run:
        kill_between_checkpoints(run, output, randomness)
    with fresh(command, log) as run:
        run.wait_for(lambda: logged(output) and logged(output)[-1] >= 12)
        kill_during_a_checkpoint(run, output)
    with fresh(command, log) as run:
        kill_between_checkpoints(run, output, randomness)
    with fresh(command, log) as run:
        assert run.wait() == [0], run.text()
    assert run.text().count("goes on from") >= 2
    assert "this is no longer exactly the run" not in run.text()
    assert_same_run(output, whole_run)


def flush_slowly() -> None:
    flush = run_checkpoint._flush

    def slow_flush(path):
        time.sleep(0.01)
        flush(path)

    run_checkpoint._flush = slow_flush


def test_killed_at_many_moments_with_gradient_accumulation(data, tmp_path):
    seed = 4
    print(f"moments of the kills by random.Random({seed})")
    randomness = random.Random(seed)
    fields = {**KILLED_RUN, "gradient_accumulation_steps": 2, "checkpoint_every": 3, "num_workers": 2,
              "keep_checkpoints": 2}  # fmt: skip
    output = tmp_path / "run"
    for kill in (kill_between_checkpoints, kill_during_a_checkpoint) * 2:
        with forked(small_arguments(data, output, **fields), tmp_path / "log", patch=flush_slowly) as run:
            kill(run, output, *([randomness] if kill is kill_between_checkpoints else []))
    run_to_end(small_arguments(data, output, **fields), tmp_path / "log")
    run_to_end(small_arguments(data, tmp_path / "whole", **fields), tmp_path / "log")
    assert_same_run(output, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(data, whole_run, tmp_path, number):
    arguments = small_arguments(data, tmp_path / "run", **{**KILLED_RUN, "checkpoint_every": 100})
    with forked(arguments, tmp_path / "log") as run:
        run.wait_for(lambda: len(logged(tmp_path / "run")) >= 3)
        run.signal(number)
        assert run.wait() == [130]
    stopped = newest(tmp_path / "run")
    assert "Traceback" not in run.text()
    assert f"interrupted. The run is kept in {stopped}; the same command goes on from there" in run.text()
    assert 6 <= state_of(stopped)["steps"] < STEPS
    assert logged(tmp_path / "run")[-1] == state_of(stopped)["steps"]
    run_to_end(arguments, tmp_path / "log")
    assert differing(newest(tmp_path / "run"), newest(whole_run)) == []
    assert logged(tmp_path / "run")[-1] == STEPS


def hang_in_the_first_step() -> None:
    Trainer.step = lambda trainer, batch: time.sleep(1000)


def test_a_second_signal_acts_at_once(data, tmp_path):
    arguments = small_arguments(data, tmp_path / "run")
    with forked(arguments, tmp_path / "log", patch=hang_in_the_first_step) as run:
        run.wait_for(lambda: "memory, estimated" in run.text())
        run.signal(signal.SIGINT)
        run.wait_for(lambda: "stopping after this step" in run.text())
        run.signal(signal.SIGINT)
        assert run.wait() == [130]
    assert "interrupted at once; only what was already saved is kept" in run.text()
    assert "Traceback" not in run.text()


def verify_slowly() -> None:
    def verify(*args, **kwargs):
        print("verifying")
        time.sleep(0.5)

    run_folder.verify_dataset = verify


def test_a_signal_during_what_is_slow_before_the_first_step(data, tmp_path):
    """It is not lost: one step is made, and saved."""
    with forked(small_arguments(data, tmp_path / "run"), tmp_path / "log", patch=verify_slowly) as run:
        run.wait_for(lambda: "verifying" in run.text())
        run.signal(signal.SIGTERM)
        assert run.wait() == [130]
    assert state_of(newest(tmp_path / "run"))["steps"] == 1


def interrupted_and_whole(data, folder, **fields):
    """Outputs of a run in two parts and of one in one go."""
    for output, parts in (("whole", (6,)), ("parts", (3, 6))):
        for steps in parts:
            train(small_config(data, folder / output, steps=steps, checkpoint_every=3, **fields))
    return folder / "parts", folder / "whole"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"gradient_accumulation_steps": 4},
        {"masking": False, "num_workers": 1},
        {"precision": "bf16"},
        {"gradient_checkpointing": True},
        {"task_routing": (0.8, 4.0)},
        {"unconditional": True},
        {"max_grad_norm": 0.1, "seed": 3, "flips": False},
    ],
    ids=str,
)
def test_in_two_parts(data, tmp_path, fields):
    assert_same_run(*interrupted_and_whole(data, tmp_path, **fields))


def test_in_two_parts_with_learned_timesteps(data, tmp_path, monkeypatch):
    """The sampler is uniform until all 1000 timesteps have losses; here they have from the start."""

    class WarmedUp(LossSecondMomentSampler):
        def __init__(self, device=None):
            super().__init__(device=device)
            self.losses.copy_(torch.rand(self.losses.shape, generator=torch.Generator().manual_seed(0)))
            self.counts.fill_(self.losses.shape[1])

    monkeypatch.setattr(train_state, "LossSecondMomentSampler", WarmedUp)
    parts, whole = interrupted_and_whole(data, tmp_path)
    assert_same_run(parts, whole)
    counts = tensors(newest(whole))["training timestep_sampler/counts"]
    assert counts.sum() == 10 * 1000 + 6 * 8


def test_dropped_state_would_show(data, tmp_path, monkeypatch):
    """Each part of the state matters to what comes after it, or the tests above would prove nothing of it."""
    parts = {
        "optimizer": lambda state: state.optimizer.state[state.shards["model.final_layer.linear.bias"]].update(
            exp_avg=torch.zeros(32)
        ),
        "count of the optimizer": lambda state: state.optimizer.param_groups[0].update(step=0),
        "ema": lambda state: state.ema.shadow_params[0].add_(1),
        "samples_seen": lambda state: setattr(state, "samples_seen", 0),
        "count of the averages": lambda state: setattr(state.ema, "optimization_step", 0),
        "timestep_sampler": lambda state: state.timestep_sampler.counts.zero_(),
    }
    fields = {"steps": 4, "ema_warmup": True}
    train(small_config(data, tmp_path / "run", **{**fields, "steps": 3}))
    train(small_config(data, tmp_path / "whole", **fields))
    load = train_state.TrainState.load
    for name, forget in parts.items():

        def forgetful_load(state, folder, forget=forget):
            run = load(state, folder)
            forget(state)
            return run

        with monkeypatch.context() as patch:
            patch.setattr(train_state.TrainState, "load", forgetful_load)
            train(small_config(data, tmp_path / name, **fields, resume=str(newest(tmp_path / "run"))))
        assert differing(newest(tmp_path / name), newest(tmp_path / "whole")), name


def test_more_steps_and_no_more(data, tmp_path, capsys):
    config = small_config(data, tmp_path / "run", steps=3)
    saved = train(config)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train(config) == saved
    assert "has its 3 steps; give more --steps to go on" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    # The folder knows the rest.
    assert main(["train", "--output", str(tmp_path / "run"), "--steps", "4"]) == 0
    assert state_of(newest(tmp_path / "run"))["steps"] == 4
    assert (tmp_path / "run" / CONFIG_FILE).read_text().count("steps: 4\n") == 1


def test_from_a_named_checkpoint_into_another_folder(data, whole_run, tmp_path):
    third = whole_run / "checkpoints" / "step-00000015"
    fields = {**KILLED_RUN, "num_workers": 0, "resume": str(third)}
    train(small_config(data, tmp_path / "run", **{**fields, "steps": 20}))
    # Its own first checkpoint is what it went on from; then it goes on by itself, not from the named one.
    first = list_checkpoints(tmp_path / "run" / "checkpoints")[0][1]
    assert (first.name, differing(first, third)) == ("step-00000015", [])
    with pytest.raises(ValueError, match="has gone on to step-00000020: give resume latest to go on from there"):
        train(small_config(data, tmp_path / "run", **fields))
    assert main(["train", "--output", str(tmp_path / "run"), "--steps", str(STEPS)]) == 0
    assert differing(newest(tmp_path / "run"), newest(whole_run)) == []
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [15, 20, 25, 30]


def test_what_differs_is_said(data, tmp_path, capsys):
    train(small_config(data, tmp_path / "run", steps=2))
    other = write_moments(tmp_path / "other", size=(8, 8), classes=2)
    train(small_config(other, tmp_path / "run", steps=3, batch_size=4, learning_rate=1e-4, seed=1, log_every=1))
    said = capsys.readouterr().out
    assert f"goes on from {tmp_path / 'run' / 'checkpoints' / 'step-00000002'}, step 2" in said
    for name, then, now in (("batch_size", 8, 4), ("learning_rate", 0.001, 0.0001), ("seed", 0, 1)):
        assert f"{name} was {then}, is {now}: this is no longer exactly the run that began" in said
    assert "  data was " in said
    assert "log_every" not in said
    saved = state_of(newest(tmp_path / "run"))
    assert (saved["steps"], saved["samples_seen"]) == (3, 20)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["learning_rate"] < 1e-4


def test_the_position_survives_another_batch_size(data, tmp_path, monkeypatch):
    """Samples are counted, not steps: none is left out, none taken twice."""
    starts = []
    from edt.train import trainer as train_module

    make_loader = train_module.make_loader
    monkeypatch.setattr(
        train_module,
        "make_loader",
        lambda *a, **k: starts.append((k["start"], k["stride"])) or make_loader(*a, **k),
    )
    train(small_config(data, tmp_path / "run", steps=2, batch_size=8))
    train(small_config(data, tmp_path / "run", steps=3, batch_size=6))
    train(small_config(data, tmp_path / "run", steps=4, batch_size=6))
    assert starts == [(0, 8), (16, 6), (22, 6)]
