"""The processes of a run: their devices by Accelerate, what they do together, how the objective is spread."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, is_initialized
from torch.distributed.fsdp import fully_shard

from .config import TrainConfig
from .objective import TrainingObjective

T = TypeVar("T")


@contextmanager
def accelerated(config: TrainConfig) -> Iterator[Accelerator]:
    """The processes and their devices; ends trackers and the process group, also after an error."""
    ours = not is_initialized()
    # Precision is the objective's own: autocast of the network alone, losses in float32.
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=config.device == "cpu" or not torch.cuda.is_available(),
        log_with=list(config.trackers) or None,
        project_dir=config.output,
        # Gradients need no second copy in DDP's buckets.
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            # One process of a machine verifies the data while the others wait.
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
        ],
    )
    try:
        yield accelerator
    finally:
        if torch.distributed.is_initialized():
            _ENDED_GROUPS.append(torch.distributed.group.WORLD)
        accelerator.end_training()
        if ours:  # or the next run of this process would be on this one's device, whatever it is told
            AcceleratorState._reset_state(reset_partial_state=True)


# Whoever holds a process group last waits for its threads. DDP's reducer does so without releasing Python's lock,
# which these threads may want: a run that stopped at an error would hang. So the reducer must not be the last.
_ENDED_GROUPS: list = []


def together(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work`, without communication of its own, returns on this process; an error where it fails on any."""
    result, error = None, None
    try:
        result = work()
    except Exception as failed:
        error = failed
    if accelerator.num_processes > 1:
        faults = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(faults, None if error is None else str(error))
        fault = next((text for text in faults if text is not None), None)
        if error is None and fault is not None:
            raise RuntimeError(f"another process of the run has failed: {fault}")
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType] - None where there is an error


def distribute(objective: TrainingObjective, config: TrainConfig, accelerator: Accelerator, sharded: bool) -> Any:
    """The objective as steps call it: itself, compiled, within DDP, or its parts sharded by FSDP2."""
    model, processes = objective.model, accelerator.num_processes
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if not sharded:
        if config.compile:
            objective.compile(dynamic=False)
        return accelerator.prepare_model(objective)
    for name, instead in (
        ("FSDP_OFFLOAD_PARAMS", "more processes"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "--gradient-checkpointing"),
    ):
        if asked_for(name):
            raise ValueError(f"{name} is set, which edt train does not do; give {instead} instead")
    if processes == 1:
        raise ValueError("FSDP shards over processes, and there is one; give --num_processes, or no --use_fsdp")
    blocks = [block for stage in model.stages for block in stage.blocks]
    if config.compile:
        # Blocks of several shapes share one code object, and each shape counts towards dynamo's limit.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(blocks))
        for block in blocks:
            block.compile(dynamic=False)
    # Not `Accelerator.prepare`: that shards on GPUs only, and wants an optimiser before there are shards.
    mesh = torch.distributed.init_device_mesh(accelerator.device.type, (processes,))
    for module in (*blocks, model, objective.alignment):
        if module is not None:
            fully_shard(module, mesh=mesh)
    return objective


def asked_for(variable: str) -> bool:
    """In the environment that `accelerate launch` makes of its options."""
    return os.environ.get(variable, "false").lower() in ("true", "1")


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Convolutions whose gradients repeat, for exact resume."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic
    cudnn.deterministic = True
    try:
        yield
    finally:
        cudnn.deterministic = before
