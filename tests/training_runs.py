"""Small training runs for the tests: a tiny preset, data for it, and runs in processes that can be killed."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from edt import cli
from edt.data.dataset import write_dataset
from edt.model.presets import PRESETS
from edt.runs.checkpoint import list_checkpoints
from edt.runs.log import read_metrics
from edt.train.config import TrainConfig

ROOT = Path(__file__).parents[1]
TINY = {
    "hidden_sizes": (16, 16, 16, 16, 16),
    "num_attention_heads": (2, 2, 2, 2, 2),
    "depths": (1, 1, 1, 1, 1),
    "amm_blocks": (3,),
}
# A run of the tiny preset takes 40 ms a step; nothing is drawn or tracked unless a test wants it.
SMALL_RUN = {
    "model": "tiny",
    "steps": 6,
    "batch_size": 8,
    "num_workers": 0,
    "checkpoint_every": 100,
    "keep_checkpoints": 100,
    "log_every": 2,
    "sample_every": 0,
    "trackers": (),
    "class_dropout": 0.3,
    "ema_decay": 0.9,
    "device": "cpu",
}


def small_config(data: Path, output: Path, **fields) -> TrainConfig:
    return TrainConfig(data=data, output=output, **{**SMALL_RUN, **fields})


def small_arguments(data: Path, output: Path, **fields) -> list[str]:
    """The same for the command line."""
    return ["train", *as_arguments({"data": data, "output": output, **SMALL_RUN, **fields})]


def as_arguments(fields: dict) -> list[str]:
    arguments = []
    for name, value in fields.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    return arguments


def write_moments(folder: Path, count: int = 20, size: tuple[int, int] = (8, 8), classes: int = 3) -> Path:
    """Means and deviations of latents in both views, so that the latents of each step are random."""
    random = np.random.default_rng(0)
    moments = random.normal(size=(count, 2, 8, *size)).astype(np.float32)
    moments[:, :, 4:] = np.abs(moments[:, :, 4:]) / 4
    write_dataset(folder, moments, random.integers(classes, size=count), moments=True,
                  class_names=tuple("abcdefgh"[:classes]))  # fmt: skip
    return folder


# What a run left


def newest(output: Path) -> Path:
    return list_checkpoints(output / "checkpoints")[-1][1]


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds of weights, averages, optimiser and the rest, by file and name."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    assert [file.relative_to(checkpoint).as_posix() for file in files] == [
        "ema/diffusion_pytorch_model.safetensors",
        "model/diffusion_pytorch_model.safetensors",
        "optimizer.safetensors",
        "training.safetensors",
    ]
    loaded = {file.relative_to(checkpoint).parts[0].partition(".")[0]: load_file(file) for file in files}
    return {f"{part} {name}": tensor for part, named in loaded.items() for name, tensor in named.items()}


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors that are not bitwise the same."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def assert_same_run(one: Path, other: Path) -> None:
    """The newest checkpoints bitwise, position and counts, and each logged step once, with the same losses."""
    assert newest(one).name == newest(other).name
    assert differing(newest(one), newest(other)) == []
    assert state_of(newest(one)) == state_of(newest(other))
    first, second = (read_metrics(output / "metrics.jsonl") for output in (one, other))
    names = ("step", "full_loss", "masked_loss", "gradient_norm", "learning_rate", "skipped_steps")
    assert [[line.get(name) for name in names] for line in first] == [
        [line.get(name) for name in names] for line in second
    ]


# Runs in processes of their own


class Processes:
    """The processes of a run and what they wrote to stdout and stderr."""

    def __init__(self, processes: list, log: Path):
        self.processes, self.log = processes, log

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert any(map(_is_alive, self.processes)), f"the run ended by itself:\n{self.text()}"
            assert time.monotonic() < deadline, f"it did not come to it:\n{self.text()}"
            time.sleep(0.001)

    def wait(self, timeout: float = 120) -> list[int]:
        """The exit codes, negative for a signal."""
        deadline = time.monotonic() + timeout
        while any(map(_is_alive, self.processes)):
            assert time.monotonic() < deadline, f"it did not end:\n{self.text()}"
            time.sleep(0.005)
        return [p.returncode if isinstance(p, subprocess.Popen) else p.exitcode for p in self.processes]

    def signal(self, number: int) -> None:
        """To every process, and to what reads data for them."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()


def _is_alive(process) -> bool:
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


@contextlib.contextmanager
def forked(
    arguments: list[str],
    log: Path,
    *,
    processes: int = 1,
    fsdp: bool = False,
    patch: Callable[[], None] | None = None,
) -> Iterator[Processes]:
    """`edt …` in forks of a process that has all imported already, after `patch`, a function of a test's module.

    Not of this process: once autograd has threads, as with a GPU, or with a CUDA build of PyTorch that has traced
    anything before its first backward, no fork of it can differentiate.

    Several have the environment that `accelerate launch` gives its processes, with `fsdp` that of --use_fsdp.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log.touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["edt.sampling.sample_set", "edt.train.trainer"])
    started, ready = [], context.Barrier(processes + 1)
    for rank in range(processes):
        environment = dict(os.environ)
        if processes > 1:
            environment |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": port}  # fmt: skip
        if fsdp:
            environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": 2}
        environment = {name: str(value) for name, value in environment.items()}
        started.append(context.Process(target=_run_forked, args=(arguments, log, environment, patch, ready)))
    for process in started:
        process.start()
    run = Processes(started, log)
    try:
        ready.wait(60)  # in groups of their own, which signals go to
        yield run
    finally:
        run.kill()


def _run_forked(arguments: list[str], log: Path, environment: dict[str, str], patch, ready) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # that of data workers, as in a run that a user starts
    PRESETS["tiny"] = TINY
    if patch is not None:
        patch()
    with log.open("a", buffering=1) as stream:
        sys.stdout = sys.stderr = stream
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        ready.wait(60)
        sys.exit(cli.main(arguments))


@contextlib.contextmanager
def fresh(command: list[str], log: Path) -> Iterator[Processes]:
    """A command in an interpreter of its own and a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as stream:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=stream,
                                   stderr=stream, start_new_session=True)  # fmt: skip
    run = Processes([process], log)
    try:
        yield run
    finally:
        run.kill()


def kill_all_below(run: Processes) -> None:
    """A launcher, and the processes that it put into groups of their own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family = [run.processes[0].pid]
    for one in family:
        family += [child for child, parent in parents.items() if parent == one]
    assert len(family) >= 3
    for one in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    run.wait()
    while any(map(_is_running, family)):  # what they hold, such as a lock, is free a moment after the signal
        time.sleep(0.005)


def _is_running(pid: int) -> bool:
    """Or holds its files yet: as long as one of its threads is there, also where the first is gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def run_to_end(arguments: list[str], log: Path, timeout: float = 120, **options) -> str:
    """Exit code 0 on every process; returns what was said."""
    with forked(arguments, log, **options) as run:
        codes = run.wait(timeout)
        assert set(codes) == {0}, run.text()
        return run.text()
