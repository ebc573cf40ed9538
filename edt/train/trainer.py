"""Training: from a folder of latents to averaged weights, on one device or, under `accelerate launch`, on many.

`edt train …` and `accelerate launch -m edt.train …` take the same options (`TrainConfig`). A run that was killed
and is started again gives, on one device, the same weights bit for bit as one that was not.
"""

import hashlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from torch import Tensor, nn

from ..data.dataset import make_loader, to_latents
from ..data.shards import MANIFEST
from ..data.vae import load_decoder
from ..devices import tf32, torch_device
from ..diffusion.process import keep_schedule
from ..diffusion.sampler import NotFiniteError
from ..files.lock import open_folder, own_folder
from ..files.text import say
from ..interrupt import StopRequest
from ..model.complexity import cost_table
from ..options import today
from ..runs.checkpoint import CHECKPOINTS, list_checkpoints, write_checkpoint
from ..runs.folder import remember_verified, tracebacks, verify_once
from ..runs.log import METRICS_FILE, RunLog, peak_memory, peak_operations
from ..runs.weights import few, initialize_from
from .alignment import encode
from .config import CONFIG_FILE, TrainConfig
from .objective import Draws, TrainingObjective, draw
from .preview import draw_grid, save_grid
from .processes import accelerated, asked_for, distribute, repeatable_convolutions, together
from .randomness import SAMPLES, STEP, keyed_generator
from .reports import introduce, what_is_not_finite
from .start import (
    build_alignment,
    build_model,
    check_disk,
    find_checkpoint,
    identity,
    open_training_data,
    to_images,
)
from .state import TrainState

_UNREAD = 2.0  # what a process tells the others whose data cannot be read, in place of whether it is to stop


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
    with accelerated(config) as accelerator:
        device = accelerator.device.type
        if config.device not in ("auto", device):
            raise ValueError(
                f"device is {config.device!r}; Accelerate was told {device}, here or by its environment"
            )
        if config.precision == "auto":
            config = replace(config, precision="bfloat16" if device == "cuda" else "float32")
        main, is_new = accelerator.is_main_process, not config.output.exists()
        with tf32(config.precision == "tf32"), repeatable_convolutions():
            # Nothing of the folder is read before it is this run's own; the other processes wait for the main one.
            lock = together(accelerator, lambda: open_folder(config.output) if main else None)
            with own_folder(lock, config.output, is_new) if lock is not None else nullcontext():
                if config_again is not None:
                    together(accelerator, lambda: _check_unchanged(given, config_again()))
                return Trainer(config, accelerator, StopRequest() if stop is None else stop).run()  # pyright: ignore[reportReturnType] - each run ends with one


def _check_unchanged(given: TrainConfig, again: TrainConfig) -> None:
    if given != again:
        raise ValueError(
            f"output {given.output} has another {CONFIG_FILE} than when this command began: another run there has "
            "ended meanwhile; start it again"
        )


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
        self.resumed_from = find_checkpoint(config, accelerator)
        self.dataset = open_training_data(config)
        # Of the data that are opened: what has their name later, if anything, is not what was trained on.
        self.data_digest = hashlib.sha256((self.dataset.folder / MANIFEST).read_bytes()).hexdigest()
        self.model = build_model(config, self.dataset)
        if config.init_from is not None and self.resumed_from is None:
            fresh = initialize_from(self.model, config.init_from, replace_head=config.replace_head)
            accelerator.print(f"weights of {config.init_from}; new are {', '.join(fresh) or 'none'}")
        alignment, self.encoder = build_alignment(config, self.model, self.dataset, self.device)
        autocast_dtype = torch.bfloat16 if config.precision == "bfloat16" else None
        self.objective = TrainingObjective(self.model, alignment, autocast_dtype).to(self.device).train()
        keep_schedule(self.model.device)
        self.vae = None
        if config.vae is not None and config.sample_every and accelerator.is_main_process:
            self.vae = load_decoder(config.vae, self.dataset.latent_shape[0])
        self.sharded = asked_for("ACCELERATE_USE_FSDP")
        self.step_module = distribute(self.objective, config, accelerator, self.sharded)
        self.state = TrainState(self.objective, config, self.device, accelerator.is_main_process)
        self.differences = {}
        if self.resumed_from is not None:
            then = today(TrainConfig, self.state.load(self.resumed_from))
            now = identity(config, accelerator, self.data_digest)
            self.differences = {k: (then.get(k), now[k]) for k in now if then.get(k) != now[k]}
        self.saved_steps = self.state.steps
        self.intact = True  # whether the state is that of a step, and no save of it has failed
        self.unread: Exception | None = None  # why this process could not read its next batch
        self.log: Any = None  # a RunLog, from `run` on
        self.verified = None
        if config.verify_data:  # last, as it may take minutes
            self.verified = together(accelerator, self._verify)

    def _verify(self) -> dict | None:
        if self.accelerator.is_local_main_process:
            progress = self.accelerator.is_main_process and sys.stderr is not None
            return verify_once(self.dataset, self.config.output, progress=progress)

    # Training

    def run(self) -> Path | None:
        check_disk(self.config, self.state.parameters.values())
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
        self.log = together(accelerator, lambda: self._begin(multiply_adds))
        introduce(self, multiply_adds)
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
            flip=config.flips,
        )
        self.order = loader.dataset.order  # pyright: ignore[reportAttributeAccessIssue] - of make_loader
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

    def _steps(self, batches: Iterator[dict[str, Tensor]]) -> Path | None:
        config, state = self.config, self.state
        first_step, saved = state.steps, self.resumed_from
        batch = together(self.accelerator, lambda: self._read(batches, None))  # no step could tell the others
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
        generator = keyed_generator(self.device, config.seed, STEP, state.steps, accelerator.process_index)
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        latents = to_latents(batch["latents"], self.dataset, generator)
        labels = batch["labels"] if self.model.config.num_classes > 0 else None
        images = None if self.encoder is None else to_images(batch)
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
                raise FloatingPointError(what_is_not_finite(self, timestep, losses, latents, images))
        state.clear_gradients()
        state.steps += 1
        state.samples_seen += config.batch_size
        self.intact = True
        figures: dict = dict(zip(("full_loss", "masked_loss"), means))
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
                    None if images is None else self.encode(images[part]),
                )
                weighted = (draws.weight[part] * part_losses.sum(0)).sum() / self.local_batch_size
                (weighted + alignment / parts).backward()
            losses.append(part_losses.detach())
            alignments.append(alignment.detach())
        return torch.cat(losses, dim=1), torch.stack(alignments).mean()

    def encode(self, images: Tensor) -> Tensor:
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

    # What it leaves behind

    def save(self) -> Path:
        """Writes a checkpoint; every process takes part."""
        steps, of = self.state.steps, identity(self.config, self.accelerator, self.data_digest)
        self.intact = False  # until it is written
        saved = self.checkpoints / f"step-{steps:08d}"
        if not self.accelerator.is_main_process:
            self.state.save(None, of)
        else:
            try:
                write_checkpoint(
                    self.checkpoints,
                    steps,
                    lambda folder: self.state.save(folder, of),
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

    def draw_samples(self) -> None:
        """A grid by the averaged weights in samples/, from the same noise each time."""
        config, steps = self.config, self.state.steps
        generator = keyed_generator("cpu", config.seed, SAMPLES)
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

    def _say_memory(self, steps: int) -> None:
        """After the first step, and the second, whose activations have the optimiser's state beside them."""
        if steps <= 2:
            of = "tensors" if self.device.type == "cuda" else "the whole process"
            peak = peak_memory(self.device) / 2**30
            self.log.say(f"memory, measured until step {self.state.steps}: {peak:.2f} GiB at most, of {of}")


def _reason(error: Exception) -> str:
    """Its message; of what a worker raised, whose traceback is the message, what follows the last frame."""
    text = re.split(r'^  File ".*\n(?:    .*\n)*', str(error), flags=re.MULTILINE)
    if len(text) > 1:
        return re.sub(r"^[\w.]+: ", "", text[-1].strip())
    return text[0] or type(error).__name__


def _flat(config: TrainConfig) -> dict:
    """For trackers, which take numbers and text."""
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(config).items()}
