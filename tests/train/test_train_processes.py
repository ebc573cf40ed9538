"""Two CPU processes, by DDP and by FSDP2. They are forks with the environment that `accelerate launch` sets; one
test launches them as users do."""

import functools
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import (
    assert_same_run,
    differing,
    forked,
    fresh,
    kill_all_below,
    newest,
    run_to_end,
    small_arguments,
    small_config,
    state_of,
    tensors,
    write_moments,
)

from edt.data.dataset import write_dataset
from edt.files.lock import open_folder
from edt.runs.log import read_metrics
from edt.train import start
from edt.train import state as train_state
from edt.train import trainer as train_module
from edt.train.trainer import Trainer, train

pytestmark = pytest.mark.usefixtures("_tiny_training")

BOTH = pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
RUN = {"steps": 8, "checkpoint_every": 2, "log_every": 1, "num_workers": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_moments(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def started(_tiny_training, data, tmp_path_factory) -> Path:
    """A checkpoint of one process after three steps, when no gradient is zero any more."""
    return train(small_config(data, tmp_path_factory.mktemp("started") / "run", steps=3))


@pytest.fixture(scope="module")
def three_steps(data, started, tmp_path_factory) -> Callable[[int, bool], Path]:
    """The folder of a run of three steps by so many processes; each is made once."""

    @functools.cache
    def run_of(processes: int, fsdp: bool) -> Path:
        if processes == 1:
            return started.parents[1]
        folder = tmp_path_factory.mktemp("three")
        arguments = small_arguments(data, folder / "run", steps=3)
        run_to_end(arguments, folder / "log", processes=processes, fsdp=fsdp)
        return folder / "run"

    return run_of


@pytest.fixture(scope="module")
def whole_runs(_tiny_training, data, tmp_path_factory):
    """Uninterrupted, by whether it is sharded."""
    folder = tmp_path_factory.mktemp("whole")
    for fsdp in (False, True):
        said = run_to_end(small_arguments(data, folder / str(fsdp), **RUN), folder / "log", processes=2, fsdp=fsdp)
        assert f"2 × cpu, {'FSDP2' if fsdp else 'DDP'}, float32" in said
    return {fsdp: folder / str(fsdp) for fsdp in (False, True)}


@BOTH
def test_killed_and_resumed(data, whole_runs, tmp_path, fsdp):
    output, log = tmp_path / "run", tmp_path / "log"
    arguments = small_arguments(data, output, **RUN)
    for line in (3, 5):
        with forked(arguments, log, processes=2, fsdp=fsdp) as run:
            run.wait_for(lambda line=line: _lines(output) >= line)
            run.kill()
            assert state_of(newest(output))["steps"] < RUN["steps"]
    said = run_to_end(arguments, log, processes=2, fsdp=fsdp)
    assert "goes on from" in said
    assert "no longer exactly" not in said
    assert_same_run(output, whole_runs[fsdp])


def _lines(output: Path) -> int:
    file = output / "metrics.jsonl"
    return len(read_metrics(file)) if file.is_file() else 0


def test_killed_and_resumed_as_launched_by_users(data, tmp_path):
    """python -m torch.distributed.run … -m edt.train, whose workers are in process groups of their own; it goes on
    as the forks of the other tests do."""
    output, log = tmp_path / "run", tmp_path / "log"
    fields = {**RUN, "model": "EDT-digits", "batch_size": 4, "steps": 6}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "edt.train"]
    command += small_arguments(data, output, **fields)[1:]
    with fresh(command, log) as run:
        run.wait_for(lambda: _lines(output) >= 3)
        kill_all_below(run)
    assert state_of(newest(output))["steps"] < 6
    assert "2 × cpu, DDP" in run.text()
    said = run_to_end(small_arguments(data, output, **fields), log, processes=2)
    assert "goes on from" in said
    run_to_end(small_arguments(data, tmp_path / "whole", **fields), log, processes=2)
    assert_same_run(output, tmp_path / "whole")


@BOTH
def test_a_signal_to_one_process_stops_both(data, whole_runs, tmp_path, fsdp):
    output, log = tmp_path / "run", tmp_path / "log"
    arguments = small_arguments(data, output, **{**RUN, "steps": 1000})
    with forked(arguments, log, processes=2, fsdp=fsdp) as run:
        run.wait_for(lambda: _lines(output) >= 3)
        os.kill(run.processes[1].pid, signal.SIGTERM)
        assert run.wait() == [130, 130]
    assert state_of(newest(output))["steps"] == read_metrics(output / "metrics.jsonl")[-1]["step"] < 1000


def record(folder: Path) -> None:
    """Each batch, and the timestep sampler at the end."""
    to_latents, save = train_module.to_latents, train_state.TrainState.save

    def record_batch(raw, dataset, generator):
        rank = os.environ.get("RANK", "0")
        place = folder / f"batches of {os.environ.get('WORLD_SIZE', '1')}"
        place.mkdir(exist_ok=True)
        torch.save(raw, place / f"{len(list(place.glob(f'*-{rank}')))}-{rank}")  # by step and rank
        return to_latents(raw, dataset, generator)

    def record_sampler(state, checkpoint, run):
        torch.save(state.timestep_sampler.state_dict(), folder / f"sampler {os.environ.get('RANK', '0')}")
        save(state, checkpoint, run)

    train_module.to_latents, train_state.TrainState.save = record_batch, record_sampler


def test_the_processes_together_take_what_one_would(data, tmp_path):
    """The same samples of the same views in each step; and both keep the same record of losses by timestep."""
    steps, batch_size = 6, 8
    for processes in (1, 2):
        arguments = small_arguments(data, tmp_path / f"run of {processes}", steps=steps, batch_size=batch_size)
        run_to_end(arguments, tmp_path / "log", processes=processes, patch=partial(record, tmp_path))
    for step in range(steps):
        whole = torch.load(tmp_path / "batches of 1" / f"{step}-0")
        parts = [torch.load(tmp_path / "batches of 2" / f"{step}-{rank}") for rank in (0, 1)]
        assert torch.equal(torch.cat(parts), whole)
    samplers = [torch.load(tmp_path / f"sampler {rank}") for rank in (0, 1)]
    for name in ("losses", "counts"):
        assert torch.equal(samplers[0][name], samplers[1][name])
    assert samplers[0]["counts"].sum() == steps * batch_size
    assert samplers[0]["losses"].count_nonzero() == steps * batch_size


@BOTH
@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_are_the_mean_of_what_each_process_computes(data, started, tmp_path, monkeypatch, fsdp, parts):
    """With the samples and draws of both ranks, computed in one process, one after the other: norm and losses.

    float32 sums of 4 samples in another order: relative 1e-5.
    """
    shared = {"batch_size": 8, "gradient_accumulation_steps": parts, "resume": str(started), "steps": 4,
              "log_every": 1}  # fmt: skip
    run_to_end(small_arguments(data, tmp_path / "run", **shared), tmp_path / "log", processes=2, fsdp=fsdp)
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")

    config = small_config(data, tmp_path / "expected", **{**shared, "batch_size": 4})
    gradients, losses = [], []
    for rank in (0, 1):
        trainer = make_trainer(config)
        model, state, device = trainer.model, trainer.state, trainer.device
        start = state.samples_seen + 4 * rank
        batch = next(iter(train_module.make_loader(trainer.dataset, seed=0, start=start, stride=8, batch_size=4,
                                                   num_workers=0)))  # fmt: skip
        generator = train_module.keyed_generator(device, 0, train_module.STEP, state.steps, rank)
        latents = train_module.to_latents(batch["latents"], trainer.dataset, generator)
        draws = train_module.draw(model, state.timestep_sampler, latents, generator, True)
        sample_losses, _ = trainer._backward(latents, batch["labels"], draws, None)
        losses.append((draws.weight * sample_losses).mean(1))
        gradients.append(torch.cat([gradient.flatten() for gradient in state.take_gradients()]))
    assert line["gradient_norm"] == pytest.approx(torch.stack(gradients).mean(0).norm().item(), rel=1e-5)
    assert line["full_loss"] == pytest.approx(torch.stack(losses).mean(0)[0].item(), rel=1e-5)
    assert line["masked_loss"] == pytest.approx(torch.stack(losses).mean(0)[1].item(), rel=1e-5)


def make_trainer(config) -> Trainer:
    accelerator = train_module.Accelerator(cpu=True, project_dir=config.output)
    return Trainer(config, accelerator, train_module.StopRequest())


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("optimizer", ["adan", "adamw"])
def test_sharded_and_replicated_agree(data, started, tmp_path, optimizer, parts):
    """After two steps, to rounding.

    Compared are the optimiser's means of gradients, by the largest of a tensor: updates divide gradients by their
    size, and where that is rounding itself they may differ by all of it.
    """
    fields = {"steps": 2, "optimizer": optimizer, "gradient_accumulation_steps": parts}
    for fsdp in (False, True):
        arguments = small_arguments(data, tmp_path / str(fsdp), **fields, init_from=started / "model",
                                    replace_head=False)  # fmt: skip
        run_to_end(arguments, tmp_path / "log", processes=2, fsdp=fsdp)
    first, second = (tensors(newest(tmp_path / str(fsdp))) for fsdp in (False, True))
    assert first.keys() == second.keys()
    compared = 0
    for name, tensor in first.items():
        assert tensor.shape == second[name].shape
        if name.startswith("optimizer") and tensor.ndim > 0:
            error = (tensor - second[name]).abs().max()
            assert error <= 1e-5 * tensor.abs().max(), name
            compared += tensor.abs().max() > 0
    assert compared > 100


def stop_one_after_the_exchange() -> None:
    apply = train_state.TrainState.apply_gradients

    def terminate(state, learning_rate):
        apply(state, learning_rate)
        if os.environ.get("RANK") == "1" and state.steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    train_state.TrainState.apply_gradients = terminate


@BOTH
def test_a_signal_after_the_exchange_of_a_step(data, tmp_path, fsdp):
    """One process stopped there, while the other waited for it in the next step."""
    options = {"processes": 2, "fsdp": fsdp, "patch": stop_one_after_the_exchange}
    with forked(small_arguments(data, tmp_path / "run"), tmp_path / "log", **options) as run:
        assert run.wait(60) == [130, 130], run.text()
    assert state_of(newest(tmp_path / "run"))["steps"] == 4


def encode_by_one_convolution() -> None:
    torch.manual_seed(0)
    start.load_image_encoder = lambda spec: torch.nn.Conv2d(3, 6, 4, stride=4)
    # The 2048 channels that it has else are 4 million weights more to exchange and save, and show nothing more.
    start.AlignmentLoss = partial(start.AlignmentLoss, mlp_channels=32)


def test_alignment_sharded_and_replicated(tmp_path):
    """Its head too, and its loss is the mean of both processes'."""
    random = np.random.default_rng(0)
    write_dataset(tmp_path / "data", random.integers(0, 256, (12, 3, 8, 8), dtype=np.uint8), np.arange(12) % 3)
    for fsdp in (False, True):
        arguments = small_arguments(tmp_path / "data", tmp_path / str(fsdp), steps=2, alignment_encoder="any:one",
                                    log_every=1)  # fmt: skip
        options = {"processes": 2, "fsdp": fsdp, "patch": encode_by_one_convolution}
        run_to_end(arguments, tmp_path / "log", **options)
    first, second = (tensors(newest(tmp_path / str(fsdp))) for fsdp in (False, True))
    heads = [name for name in first if name.startswith("optimizer alignment.mlp")]
    assert len(heads) == 24
    for name in heads:
        assert (first[name] - second[name]).abs().max() <= 1e-5 * first[name].abs().max(), name
    losses = [[line["alignment_loss"] for line in read_metrics(tmp_path / str(fsdp) / "metrics.jsonl")]
              for fsdp in (False, True)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def spoil_the_latents_of_one() -> None:
    to_latents, calls = train_module.to_latents, []

    def poisoned(raw, dataset, generator):
        calls.append(None)
        latents = to_latents(raw, dataset, generator)
        return latents * float("nan") if os.environ.get("RANK") == "1" and len(calls) >= 3 else latents

    train_module.to_latents = poisoned


@BOTH
def test_a_loss_that_is_not_finite_in_one_process(data, tmp_path, fsdp):
    """Both skip the step, or both stop."""
    arguments = small_arguments(data, tmp_path / "run", steps=9, checkpoint_every=1, max_skipped_steps=2)
    options = {"processes": 2, "fsdp": fsdp, "patch": spoil_the_latents_of_one}
    with forked(arguments, tmp_path / "log", **options) as run:
        assert run.wait() == [1, 1], run.text()
    assert "pass is not finite at timesteps" in run.text()
    assert "in step 4 and 1 before it" in run.text()
    assert newest(tmp_path / "run").name == "step-00000002"
    assert all(torch.isfinite(tensor).all() for tensor in tensors(newest(tmp_path / "run")).values())


@BOTH
def test_sampling_and_saving_do_not_disturb(data, whole_runs, tmp_path, fsdp):
    """FSDP's root module kept the averaged weights of a grid for the step after it."""
    fields = {**RUN, "num_workers": 0, "checkpoint_every": 3, "sample_every": 2, "sample_count": 3,
              "num_inference_steps": 2, "log_every": 3}  # fmt: skip
    run_to_end(small_arguments(data, tmp_path / "run", **fields), tmp_path / "log", processes=2, fsdp=fsdp)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 4
    assert differing(newest(tmp_path / "run"), newest(whole_runs[fsdp])) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, False), (1, False)), ((2, True), (1, False)), ((1, False), (2, False)), ((1, False), (2, True)),
     ((2, False), (2, True))],
    ids=str,
)  # fmt: skip
def test_another_number_of_processes_goes_on(data, three_steps, tmp_path, before, after):
    """From the same state, sample and position, with other random numbers, and says so."""
    shutil.copytree(three_steps(*before), tmp_path / "run")
    arguments = small_arguments(data, tmp_path / "run", steps=4)
    said = run_to_end(arguments, tmp_path / "log", processes=after[0], fsdp=after[1])
    differ = f"processes was {before[0]}, is {after[0]}: this is no longer exactly the run that began"
    assert (differ in said) == (before[0] != after[0])
    third, fourth = (tmp_path / "run" / "checkpoints" / f"step-{n:08d}" for n in (3, 4))
    assert (state_of(fourth)["steps"], state_of(fourth)["samples_seen"]) == (4, 32)
    old, new = tensors(third), tensors(fourth)
    key = "training timestep_sampler/counts"
    assert (new[key].sum(), (new[key] - old[key]).sum()) == (32, 8)
    # The averages took one step of 0.1 from where they were.
    name = next(key for key in old if key.startswith("ema") and key.endswith("weight"))
    weights = name.replace("ema", "model", 1)
    torch.testing.assert_close(new[name], old[name] + 0.1 * (new[weights] - old[name]))


@BOTH
def test_a_loaded_checkpoint_is_what_was_saved(data, whole_runs, tmp_path, fsdp):
    """Loaded by one process and written again: all tensors bitwise, whatever the shards were."""
    state = make_trainer(small_config(data, tmp_path / "run", resume=str(newest(whole_runs[fsdp])))).state
    (tmp_path / "again").mkdir()
    state.save(tmp_path / "again", {})
    assert differing(tmp_path / "again", newest(whole_runs[fsdp])) == []


def test_sharding_needs_processes(data, tmp_path):
    with forked(small_arguments(data, tmp_path / "run"), tmp_path / "log", fsdp=True) as run:
        assert run.wait() == [2]
    assert "FSDP shards over processes, and there is one" in run.text()


def test_a_batch_that_does_not_divide(data, tmp_path):
    with forked(small_arguments(data, tmp_path / "run", batch_size=7), tmp_path / "log", processes=2) as run:
        assert run.wait() == [2, 2]
    assert (
        "batch_size is 7; it must be a multiple of 2 processes times 1 gradient_accumulation_steps" in run.text()
    )


def test_a_folder_that_another_run_holds(data, tmp_path):
    """The main process finds it so; the other does not wait for it for ever."""
    arguments = small_arguments(data, tmp_path / "run")
    with open_folder(tmp_path / "run"), forked(arguments, tmp_path / "log", processes=2) as run:
        assert run.wait() == [2, 2], run.text()
    assert "another process of the run has failed: output" in run.text()
    assert f"is in use by process {os.getpid()}" in run.text()
