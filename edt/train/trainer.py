"""Training: from a folder of latents to averaged weights, on one device or, under `accelerate launch`, on many.

`edt train …` and `accelerate launch -m edt.train …` take the same options (`TrainConfig`). A run that was killed
and is started again gives, on one device, the same weights bit for bit as one that was not.
"""

import hashlib
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import LoggerType
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from edt_kernels._backend import select_backend

from ..data.dataset import LatentDataset, make_loader, open_dataset, to_latents
from ..data.shards import MANIFEST
from ..data.vae import load_decoder
from ..devices import tf32, torch_device
from ..diffusion.process import keep_schedule
from ..diffusion.sampler import NotFiniteError
from ..files.lock import open_folder, own_folder
from ..files.text import say
from ..interrupt import StopRequest
from ..model.complexity import OPTIMIZER_BUFFERS, block_grid, cost_table, estimate_memory
from ..model.presets import PRESETS
from ..model.transformer import EDTTransformer2DModel
from ..runs.checkpoint import CHECKPOINTS, latest_checkpoint, list_checkpoints, verify_checkpoint, write_checkpoint
from ..runs.folder import remember_verified, tracebacks, verify_once
from ..runs.log import METRICS_FILE, RunLog, peak_memory, peak_operations
from ..runs.weights import few, initialize_from
from .alignment import AlignmentLoss, encode, feature_grid, load_image_encoder
from .config import CONFIG_FILE, TrainConfig, plain
from .objective import Draws, TrainingObjective, draw
from .preview import draw_grid, save_grid
from .randomness import keyed_generator, keyed_seed
from .state import TrainState, names_not_finite, steps_of

# Fields that change nothing in the weights of a step.
_WITHOUT_EFFECT = {
    "data", "output", "recipe", "config", "resume", "init_from", "replace_head", "steps", "num_workers", "device",
    "verify_data", "checkpoint_every", "keep_checkpoints", "keep_every", "log_every", "trackers", "sample_every",
    "sample_count", "sample_steps", "sample_guidance", "vae", "max_skipped_steps", "peak_tflops",
}  # fmt: skip
# What a generator is for, the second number of its key (seed, purpose, …).
_INITIAL_WEIGHTS, _ALIGNMENT_HEAD, _STEP, _SAMPLES = 1, 2, 3, 4
_UNREAD = 2.0  # what a process tells the others whose data cannot be read, in place of whether it is to stop
# Around 1 they are in order, and a scaling that is far off shows as a loss that is not finite.
_LARGEST_LATENT = 1e6

T = TypeVar("T")


def train(
    config: TrainConfig, stop: StopRequest | None = None, *, config_again: Callable[[], TrainConfig] | None = None
) -> Path:
    """Trains until `config.steps`, or until `stop`, and returns the newest checkpoint's folder.

    Args:
        config_again: makes `config` anew; for one whose defaults are of a run in its output, which another process
            may have changed before this one had the folder.

    Raises:
        ValueError, FileNotFoundError: for a config or data that do not fit, before anything is spent.
        FloatingPointError: after `max_skipped_steps` steps in a row with a loss or gradient that is not finite.
        OSError: where data cannot be read any more, after a checkpoint of the steps done; or where a checkpoint
            cannot be written; earlier ones are as they were.
    """
    config.check()
    given = config
    if config.device != "auto":
        torch_device(config.device)
    if unknown := set(config.trackers) - set(map(str, LoggerType)):
        raise ValueError(
            f"trackers has {few(sorted(unknown))}; Accelerate knows {', '.join(map(str, LoggerType))}"
        )
    with _accelerated(config) as accelerator:
        device = accelerator.device.type
        if config.device not in ("auto", device):
            raise ValueError(
                f"device is {config.device!r}; Accelerate was told {device}, here or by its environment"
            )
        if config.precision == "auto":
            config = replace(config, precision="bf16" if device == "cuda" else "fp32")
        main, is_new = accelerator.is_main_process, not config.output.exists()
        with tf32(config.precision == "tf32"), _repeatable_convolutions():
            # Nothing of the folder is read before it is this run's own; the other processes wait for the main one.
            lock = _together(accelerator, lambda: open_folder(config.output) if main else None)
            with own_folder(lock, config.output, is_new) if main else nullcontext():
                if config_again is not None:
                    _together(accelerator, lambda: _check_unchanged(given, config_again()))
                return Trainer(config, accelerator, StopRequest() if stop is None else stop).run()


def _check_unchanged(given: TrainConfig, again: TrainConfig) -> None:
    if given != again:
        raise ValueError(
            f"output {given.output} has another {CONFIG_FILE} than when this command began: another run there has "
            "ended meanwhile; start it again"
        )


def _together(accelerator: Accelerator, work: Callable[[], T]) -> T:
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
    return result


@contextmanager
def _accelerated(config: TrainConfig) -> Iterator[Accelerator]:
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


class Trainer:
    """A run on one of its processes: what it trains, and the step that moves it on."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, stop: StopRequest):
        self.config, self.accelerator, self.stop = config, accelerator, stop
        self.stopping = False  # as all processes agreed in the last step; `stop` may change at any moment
        self.device, self.processes = accelerator.device, accelerator.num_processes
        if config.batch_size % (self.processes * config.gradient_accumulation_steps):
            raise ValueError(
                f"batch_size is {config.batch_size}; it must be a multiple of {self.processes} processes times "
                f"{config.gradient_accumulation_steps} gradient_accumulation_steps"
            )
        self.local_batch_size = config.batch_size // self.processes
        self.checkpoints = config.output / CHECKPOINTS
        self.resumed_from = self._find_checkpoint()
        self.dataset = open_training_data(config)
        # Of the data that are opened: what has their name later, if anything, is not what was trained on.
        self.data_digest = hashlib.sha256((self.dataset.folder / MANIFEST).read_bytes()).hexdigest()
        self.model = build_model(config, self.dataset)
        if config.init_from is not None and self.resumed_from is None:
            fresh = initialize_from(self.model, config.init_from, replace_head=config.replace_head)
            accelerator.print(f"weights of {config.init_from}; new are {', '.join(fresh) or 'none'}")
        alignment, self.encoder = self._build_alignment()
        autocast_dtype = torch.bfloat16 if config.precision == "bf16" else None
        self.objective = TrainingObjective(self.model, alignment, autocast_dtype).to(self.device).train()
        keep_schedule(self.model.device)
        self.vae = None
        if config.vae is not None and config.sample_every and accelerator.is_main_process:
            self.vae = load_decoder(config.vae, self.dataset.latent_shape[0])
        self.sharded = _asked_for("ACCELERATE_USE_FSDP")
        self.step_module = self._distribute()
        self.state = TrainState(self.objective, config, self.device, accelerator.is_main_process)
        self.differences = {}
        if self.resumed_from is not None:
            then, now = self.state.load(self.resumed_from), self._identity()
            self.differences = {k: (then.get(k), now[k]) for k in now if then.get(k) != now[k]}
        self.saved_steps = self.state.steps
        self.intact = True  # whether the state is that of a step, and no save of it has failed
        self.unread: Exception | None = None  # why this process could not read its next batch
        self.log: RunLog | None = None
        self.verified = None
        if config.verify_data:  # last, as it may take minutes
            self.verified = _together(accelerator, self._verify)

    def _verify(self) -> dict | None:
        if self.accelerator.is_local_main_process:
            progress = self.accelerator.is_main_process and sys.stderr is not None
            return verify_once(self.dataset, self.config.output, progress=progress)

    # Building

    def _find_checkpoint(self) -> Path | None:
        """What to go on from; one process looks, so that all take the same."""
        config = self.config
        if config.resume == "never":
            if list_checkpoints(self.checkpoints):
                raise ValueError(f"output {config.output} has a run, and resume is never; give another output")
            return None
        if config.resume != "latest":
            folder = Path(config.resume)
            if not folder.is_dir():
                raise FileNotFoundError(f"resume is {folder}; it must be latest, never, or a checkpoint's folder")
            verify_checkpoint(folder)
            last = latest_checkpoint(self.checkpoints, on_damage=lambda text: None)
            if last is not None and steps_of(last) > steps_of(folder):
                raise ValueError(
                    f"resume is {folder}; output {config.output} has gone on to {last.name}: give resume latest "
                    "to go on from there, or another output"
                )
            return folder
        main = self.accelerator.is_main_process
        look = partial(latest_checkpoint, self.checkpoints, on_damage=lambda text: say(f"edt: {text}"))
        found = [_together(self.accelerator, lambda: look() if main else None)]
        if self.processes > 1:
            torch.distributed.broadcast_object_list(found)
        if found[0] is None and list_checkpoints(self.checkpoints):
            raise ValueError(
                f"output {config.output} has checkpoints, but every one of them is damaged; restore one, or give "
                "another output"
            )
        return found[0]

    def _build_alignment(self) -> tuple[AlignmentLoss | None, nn.Module | None]:
        config, middle = self.config, self.model.stages[2]
        if config.alignment_encoder is None:
            return None, None
        encoder = load_image_encoder(config.alignment_encoder).to(self.device)
        first = np.zeros(1, dtype=np.int64)
        images = _images(self.dataset.read(first, first)).to(self.device)
        features = encode(encoder, images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(config.seed, _ALIGNMENT_HEAD))
            head = AlignmentLoss(
                self.model.config.hidden_sizes[2],
                block_grid(middle),
                features.shape[2],
                feature_grid(features.shape[1], images.shape[2:]),
                weight=config.alignment_weight,
                manifold_weight=config.manifold_weight,
            )
        return head, encoder

    def _distribute(self) -> nn.Module:
        """The objective as steps call it: itself, compiled, within DDP, or its parts sharded by FSDP2."""
        config = self.config
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if not self.sharded:
            if config.compile:
                self.objective.compile(dynamic=False)
            return self.accelerator.prepare_model(self.objective)
        for name, instead in (
            ("FSDP_OFFLOAD_PARAMS", "more processes"),
            ("FSDP_ACTIVATION_CHECKPOINTING", "--gradient-checkpointing"),
        ):
            if _asked_for(name):
                raise ValueError(f"{name} is set, which edt train does not do; give {instead} instead")
        if self.processes == 1:
            raise ValueError(
                "FSDP shards over processes, and there is one; give --num_processes, or no --use_fsdp"
            )
        blocks = [block for stage in self.model.stages for block in stage.blocks]
        if config.compile:
            # Blocks of several shapes share one code object, and each shape counts towards dynamo's limit.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(blocks))
            for block in blocks:
                block.compile(dynamic=False)
        # Not `Accelerator.prepare`: that shards on GPUs only, and wants an optimiser before there are shards.
        mesh = torch.distributed.init_device_mesh(self.device.type, (self.processes,))
        for module in (*blocks, self.model, self.objective.alignment):
            if module is not None:
                fully_shard(module, mesh=mesh)
        return self.objective

    # Training

    def run(self) -> Path | None:
        self._check_disk()
        with tracebacks(self.config.output) if self.accelerator.is_main_process else nullcontext():
            try:
                return self._run()
            finally:
                if self.log is not None:
                    self.log.close()

    def _begin(self, multiply_adds: int) -> RunLog:
        """Writes what a run leaves before its first step; so a folder that cannot be written is found here."""
        config, output = self.config, self.config.output
        if self.accelerator.is_main_process:
            try:
                config.save(output / CONFIG_FILE)
                if self.verified is not None:
                    remember_verified(self.verified, output)
                self.checkpoints.mkdir(exist_ok=True)
            except OSError as error:
                raise OSError(f"output {output} cannot be written: {error}") from error
            if not os.access(self.checkpoints, os.W_OK):
                raise OSError(f"output {output} cannot be written: its {CHECKPOINTS} are not writable")
        peak = config.peak_tflops * 1e12 if config.peak_tflops else peak_operations(self.device, config.precision)
        return RunLog(
            self.accelerator,
            output,
            first_step=self.state.steps,
            steps=config.steps,
            batch_size=config.batch_size,
            log_every=config.log_every,
            operations_per_image=6 * (2 if config.masking else 1) * multiply_adds,
            peak_operations=peak,
        )

    def _run(self) -> Path | None:
        config, accelerator, state = self.config, self.accelerator, self.state
        multiply_adds = sum(part.multiply_adds for part in cost_table(self.model))
        self.log = _together(accelerator, lambda: self._begin(multiply_adds))
        self._introduce(multiply_adds)
        if state.steps >= config.steps:
            self.log.say(f"{config.output} has its {state.steps} steps; give more --steps to go on")
            return self.resumed_from
        if config.trackers:
            self._start_trackers()
        if self.resumed_from is not None and self.resumed_from.parent.resolve() != self.checkpoints.resolve():
            self.save()  # of another run: from here on this one has its own

        loader = make_loader(
            self.dataset,
            seed=config.seed,
            start=state.samples_seen + accelerator.process_index * self.local_batch_size,
            stride=config.batch_size,
            batch_size=self.local_batch_size,
            num_workers=config.num_workers,
            pin_memory=self.device.type == "cuda",
            flip=config.flip,
        )
        self.order = loader.dataset.order
        try:
            return self._steps(iter(loader))
        except FloatingPointError:
            raise  # the weights may be what is wrong: earlier ones must not make room for them
        except Exception:
            self._save_what_is_done()
            raise

    def _start_trackers(self) -> None:
        config = self.config
        try:
            self.accelerator.init_trackers(
                "edt", config=_flat(config), init_kwargs={"wandb": {"name": config.output.name}}
            )
        except Exception as error:  # of a library of its own each
            self.accelerator.trackers = []  # there are some that never began, which to end would be another error
            raise RuntimeError(
                f"trackers {', '.join(config.trackers)} cannot be started: {error}; --trackers without any does "
                f"without, and {METRICS_FILE} has the same figures"
            ) from error

    def _steps(self, batches: Iterator[dict[str, Tensor]]) -> Path:
        config, state = self.config, self.state
        first_step, saved = state.steps, self.resumed_from
        batch = _together(self.accelerator, lambda: self._read(batches, None))  # no step could tell the others
        while True:
            figures = self.step(batch)
            if figures is None:
                self._stop_unread()
            self.log.step(state.steps, figures)
            self._say_memory(state.steps - first_step)
            last = state.steps >= config.steps or self.stopping
            with self.log.pause():
                # Not amid skipped steps: the weights may be what makes them fail, and would replace good ones.
                due = state.steps % config.checkpoint_every == 0 and not state.skipped_in_a_row
                if last or due:
                    self.log.flush(state.steps)
                    saved = self.save()
                if config.sample_every and not self.stopping and (last or state.steps % config.sample_every == 0):
                    self.draw_samples()
            if last:
                return saved
            batch = self._read(batches, batch)

    def _read(self, batches: Iterator[dict[str, Tensor]], before: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """The next batch. Where it cannot be read the one before stands in for it, in a step that changes nothing
        and tells the other processes (`unread`)."""
        try:
            return next(batches)
        except Exception as error:
            self.unread = error
            if before is None:
                self._stop_unread()
            return before

    def _stop_unread(self) -> NoReturn:
        """Ends the run of a process that could not read its data, or of another that could not."""
        step = self.state.steps + 1
        saved = self._save_what_is_done(self.processes)
        left = f"; the steps before it are in {saved}" if saved is not None else ""
        if self.unread is None:
            raise RuntimeError(f"another process could not read its data for step {step}{left}")
        raise OSError(
            f"data {self.config.data}: the {self.local_batch_size} images of step {step} cannot be read: "
            f"{_reason(self.unread)}{left}"
        ) from self.unread

    def _save_what_is_done(self, agreed: int = 1) -> Path | None:
        """After an error: a checkpoint of the steps that are in none yet, if they are good and so many processes
        as come here are all. Its folder, or None."""
        state = self.state
        if (
            self.processes != agreed
            or not self.intact
            or state.skipped_in_a_row
            or state.steps == self.saved_steps
        ):
            return None
        try:
            saved = self.save()
        except Exception as error:  # the first error is what ends the run, and is raised
            say(f"edt: the steps since {self.saved_steps} are lost: {error}")
            return None
        with suppress(OSError):  # it may be what failed
            self.log.flush(state.steps)
        self.log.say(f"all {state.steps} steps are saved in {saved}")
        return saved

    def step(self, batch: dict[str, Tensor]) -> dict[str, float] | None:
        """A step of the optimiser on this process's samples; the figures are of all processes.

        One whose loss or gradient is not finite changes nothing but the position and the count of such steps. One
        whose samples a process could not read changes nothing, and has no figures.
        """
        config, accelerator, state = self.config, self.accelerator, self.state
        generator = keyed_generator(self.device, config.seed, _STEP, state.steps, accelerator.process_index)
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        latents = to_latents(batch["latents"], self.dataset, generator)
        labels = batch["labels"] if self.model.config.num_classes > 0 else None
        images = None if self.encoder is None else _images(batch)
        draws = draw(self.model, state.timestep_sampler, latents, generator, config.masking)

        losses, alignment = self._backward(latents, labels, draws, images)
        gradients = state.take_gradients()
        # What the host and the other processes must know of a step goes into one exchange and one read.
        stop = torch.full_like(draws.weight, bool(self.stop) if self.unread is None else _UNREAD)
        rows = torch.stack([draws.timestep, draws.weight, stop, *losses]).double().T.contiguous()
        rows = accelerator.gather(rows)  # (samples of all processes, 3 + passes)
        timestep, weight, stop, losses = rows[:, 0].long(), rows[:, 1], rows[:, 2], rows[:, 3:].T
        means = [*(weight * losses).mean(1), accelerator.reduce(alignment.double(), "mean")]
        *means, alignment, norm, stop = torch.stack([*means, self._norm(gradients), stop.max()]).tolist()
        if stop == _UNREAD:
            state.clear_gradients()
            return None
        self.stopping = bool(stop)
        self.stop.requested |= self.stopping

        self.intact = False
        learning_rate = config.learning_rate_at(state.steps)
        if all(map(math.isfinite, (*means, alignment, norm))):
            if config.max_grad_norm is not None and norm > config.max_grad_norm:
                torch._foreach_mul_(gradients, config.max_grad_norm / norm)
            state.timestep_sampler.update(timestep, losses.sum(0))
            state.apply_gradients(learning_rate)
            state.skipped_in_a_row = 0
        else:
            state.skipped_steps += 1
            state.skipped_in_a_row += 1
            if state.skipped_in_a_row >= config.max_skipped_steps:
                raise FloatingPointError(self._what_is_not_finite(timestep, losses, latents, images))
        state.clear_gradients()
        state.steps += 1
        state.samples_seen += config.batch_size
        self.intact = True
        figures = dict(zip(("full_loss", "masked_loss"), means))
        if self.encoder is not None:
            figures["alignment_loss"] = alignment
        return {**figures, "gradient_norm": norm, "learning_rate": learning_rate,
                "skipped_steps": state.skipped_steps}  # fmt: skip

    def _backward(self, latents, labels, draws: Draws, images) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss; returns the per-sample losses (P, B) and the alignment's loss."""
        parts = self.config.gradient_accumulation_steps
        size = self.local_batch_size // parts
        losses, alignments = [], []
        for i in range(parts):
            part = slice(i * size, (i + 1) * size)
            with self._gradient_exchange(now=i + 1 == parts):
                part_losses, alignment = self.step_module(
                    latents[part],
                    None if labels is None else labels[part],
                    draws.part(part.start, part.stop),
                    None if images is None else self._encode(images[part]),
                )
                weighted = (draws.weight[part] * part_losses.sum(0)).sum() / self.local_batch_size
                (weighted + alignment / parts).backward()
            losses.append(part_losses.detach())
            alignments.append(alignment.detach())
        return torch.cat(losses, dim=1), torch.stack(alignments).mean()

    def _encode(self, images: Tensor) -> Tensor:
        """Features (B, N', F) of the frozen encoder, in the precision of training."""
        dtype = self.objective.autocast_dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return encode(self.encoder, images)

    @contextmanager
    def _gradient_exchange(self, now: bool) -> Iterator[None]:
        """Processes add up their gradients in the last part of a step only."""
        if now or self.processes == 1:
            yield
        elif self.sharded:
            self.model.set_requires_gradient_sync(False)
            yield
            self.model.set_requires_gradient_sync(True)
        else:
            with self.step_module.no_sync():
                yield

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        norm = nn.utils.get_total_norm(gradients).double()
        return self.accelerator.reduce(norm.square(), "sum").sqrt() if self.sharded else norm

    def _what_is_not_finite(self, timestep: Tensor, losses: Tensor, latents: Tensor, images: Tensor | None) -> str:
        """What, where, why, and what is left."""
        wrong, names = ~losses.isfinite(), names_not_finite(self.state)
        if wrong.any():
            passes = [name for name, row in zip(("full", "masked"), wrong) if row.any()]
            at = sorted(set(timestep[wrong.any(0)].tolist()))
            what = f"the loss of the {' and the '.join(passes)} pass is not finite at timesteps {few(at, 5)}"
        else:
            what = f"the gradient is not finite in {few(names, 5) or 'what other processes hold'}"
        causes = [self._cause(latents, images)]
        if self.processes > 1:
            causes *= self.processes
            torch.distributed.all_gather_object(causes, causes[0])
        unknown = f"learning_rate {self.config.learning_rate:g} may be too high"
        cause = next((cause for cause in causes if cause is not None), unknown)
        checkpoints = list_checkpoints(self.checkpoints)
        left = f"the last good checkpoint is {checkpoints[-1][1]}" if checkpoints else "there is no checkpoint yet"
        return (
            f"{what}, in step {self.state.steps + 1} and {self.state.skipped_in_a_row - 1} before it; "
            f"{cause}; {left}"
        )

    def _cause(self, latents: Tensor, images: Tensor | None) -> str | None:
        """What of this process was not finite before anything was computed: its data or its weights."""
        fine = latents.flatten(1).abs() <= _LARGEST_LATENT  # not of NaN
        wrong = (~fine.all(1)).nonzero()[:, 0].cpu().numpy()
        if len(wrong):
            first = self.state.samples_seen + self.accelerator.process_index * self.local_batch_size
            items = sorted(set(self.order(first + wrong)[0].tolist()))
            return (
                f"the latents of items {few(items, 5)} in {self.config.data} are not finite, "
                f"or beyond {_LARGEST_LATENT:g}: make these data anew"
            )
        weights = [name for name, shard in self.state.shards.items() if not shard.isfinite().all()]
        if weights:
            return f"the weights {few(weights)} are not finite: go on from an earlier checkpoint, or other weights"
        if images is not None and not self._encode(images).isfinite().all():
            return f"alignment_encoder {self.config.alignment_encoder} returns features that are not finite"
        return None

    # What it leaves behind

    def save(self) -> Path:
        """Writes a checkpoint; every process takes part."""
        steps, identity = self.state.steps, self._identity()
        self.intact = False  # until it is written
        saved = self.checkpoints / f"step-{steps:08d}"
        if not self.accelerator.is_main_process:
            self.state.save(None, identity)
        else:
            try:
                write_checkpoint(
                    self.checkpoints,
                    steps,
                    lambda folder: self.state.save(folder, identity),
                    self.config.keep_checkpoints,
                    self.config.keep_every,
                )
            except Exception as error:  # for a full disk safetensors has an error of its own
                good = list_checkpoints(self.checkpoints)
                left = f"the last good one is {good[-1][1]}" if good else "there is none before it"
                raise OSError(f"checkpoint of step {steps} could not be written: {error}; {left}") from error
        self.accelerator.wait_for_everyone()
        self.saved_steps, self.intact = steps, True
        return saved

    def _identity(self) -> dict:
        """What must be equal for a resumed run to be exactly the one that was not interrupted."""
        names = (field.name for field in fields(TrainConfig) if field.name not in _WITHOUT_EFFECT)
        gpu = self.device.type == "cuda"
        return {
            **{name: plain(getattr(self.config, name)) for name in names},
            "processes": self.processes,
            "device": torch.cuda.get_device_name(self.device)
            if gpu
            else f"cpu, {torch.get_num_threads()} threads",
            "kernels": select_backend(q=torch.empty(0, device=self.device)),
            "data": self.data_digest,
            "torch": torch.__version__,
        }

    def draw_samples(self) -> None:
        """A grid by the averaged weights in samples/, from the same noise each time."""
        config, steps = self.config, self.state.steps
        generator = keyed_generator("cpu", config.seed, _SAMPLES)
        dtype = self.objective.autocast_dtype
        with self.state.averaged_weights(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            latents, labels = draw_grid(self.model, config, generator)
        if not latents.isfinite().all():
            self.log.say(f"step {steps}: the averaged weights draw numbers that are not finite; no grid is drawn")
        elif self.accelerator.is_main_process:
            file = config.output / "samples" / f"step-{steps:08d}.png"
            try:
                save_grid(file, latents, labels, f"step {steps}", self.vae, self.dataset.class_names)
            except NotFiniteError as error:  # no reason to end a training
                self.log.say(f"step {steps}: {error}; no grid is drawn")

    def _introduce(self, multiply_adds: int) -> None:
        """Says what is trained, on what, and in how much memory."""
        config, model, say = self.config, self.model, self.log.say
        parameters = sum(p.numel() for p in model.parameters())
        backend = select_backend(q=torch.empty(0, device=self.device))
        kernels = {"triton": "Triton kernels", "reference": "reference path (plain torch)"}[backend]
        wrapping = "FSDP2" if self.sharded else "DDP" if self.processes > 1 else "one process"
        say(f"{config.model}: {parameters:,} parameters, {multiply_adds / 1e9:.3f} G multiply-adds for an image")
        say(f"{len(self.dataset):,} images {self.dataset.latent_shape}, {model.config.num_classes} classes")
        say(f"{self.processes} × {self.device.type}, {wrapping}, {config.precision}, {kernels}")
        size = self.local_batch_size // config.gradient_accumulation_steps
        estimate = estimate_memory(
            dict(model.config),
            size,
            precision="bfloat16" if config.precision == "bf16" else "float32",
            gradient_checkpointing=config.gradient_checkpointing,
            two_pass=config.masking,
            optimizer=config.optimizer,
        )
        activations = estimate.training_activations
        rest = (estimate.training - activations) / (self.processes if self.sharded else 1)
        encoder = ", without the image encoder's" if self.encoder is not None else ""
        say(f"memory, estimated: {(rest + activations) / 2**30:.2f} GiB for a process, "
            f"{activations / 2**30:.2f} of it activations of {size} images{encoder}")  # fmt: skip
        if missing := set(config.trackers) - {"all", *map(str, self.accelerator.log_with)}:
            say(f"not installed, so not written: {', '.join(sorted(missing))}; metrics.jsonl has the same figures")
        if self.resumed_from is not None:
            say(f"goes on from {self.resumed_from}, step {self.state.steps}")
            for name, (then, now) in self.differences.items():
                say(f"  {name} was {then}, is {now}: this is no longer exactly the run that began")

    def _say_memory(self, steps: int) -> None:
        """After the first step, and the second, whose activations have the optimiser's state beside them."""
        if steps <= 2:
            of = "tensors" if self.device.type == "cuda" else "the whole process"
            peak = peak_memory(self.device) / 2**30
            self.log.say(f"memory, measured until step {self.state.steps}: {peak:.2f} GiB at most, of {of}")

    def _check_disk(self) -> None:
        """A disk too small for a checkpoint is found before the steps are spent."""
        copies = 2 + OPTIMIZER_BUFFERS[self.config.optimizer]
        needed = 4 * copies * sum(p.numel() for p in self.state.parameters.values())
        place = self.config.output.absolute()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < needed:
            raise OSError(
                f"output {self.config.output} has {free / 1e9:.2f} GB free; a checkpoint of this run takes "
                f"{needed / 1e9:.2f} GB, and {self.config.keep_checkpoints} are kept"
            )


def open_training_data(config: TrainConfig) -> LatentDataset:
    """With its images where the alignment needs them; those of pixel data are the data."""
    if not config.data.is_dir():
        raise FileNotFoundError(
            f"data folder {config.data}: there is no such folder; edt extract makes one. It was looked for at "
            f"{config.data.absolute()}; --data says where it is now"
        )
    dataset = open_dataset(config.data)
    if config.alignment_encoder is not None and dataset.manifest.kind == "latents":
        dataset = open_dataset(config.data, with_images=True)
    return dataset


def build_model(config: TrainConfig, dataset: LatentDataset) -> EDTTransformer2DModel:
    """The preset, for the data's latents and classes, with weights from the seed."""
    channels, height, width = dataset.latent_shape
    arguments = {
        **PRESETS[config.model],
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": 2 * channels,
        "num_classes": 0 if config.unconditional else dataset.num_classes,
        "class_dropout_prob": config.class_dropout,
        "task_routing": config.task_routing,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(config.seed, _INITIAL_WEIGHTS))
        return EDTTransformer2DModel(**arguments)


@contextmanager
def _repeatable_convolutions() -> Iterator[None]:
    """Convolutions whose gradients repeat, for exact resume."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic
    cudnn.deterministic = True
    try:
        yield
    finally:
        cudnn.deterministic = before


def _images(batch: dict[str, Tensor]) -> Tensor:
    """(B, 3, h, w) on the scale −1 to 1; grey ones in three equal channels."""
    images = batch.get("images", batch["latents"]).float() / 127.5 - 1
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _reason(error: Exception) -> str:
    """Its message; of what a worker raised, whose traceback is the message, what follows the last frame."""
    text = re.split(r'^  File ".*\n(?:    .*\n)*', str(error), flags=re.MULTILINE)
    if len(text) > 1:
        return re.sub(r"^[\w.]+: ", "", text[-1].strip())
    return text[0] or type(error).__name__


def _asked_for(variable: str) -> bool:
    """In the environment that `accelerate launch` makes of its options."""
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _flat(config: TrainConfig) -> dict:
    """For trackers, which take numbers and text."""
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(config).items()}
