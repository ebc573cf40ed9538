"""What a trainer says of its run: what is trained in how much memory, and what of a step is not finite."""

import torch
from torch import Tensor

from edt_kernels._backend import select_backend

from ..model.complexity import estimate_memory
from ..runs.checkpoint import list_checkpoints
from ..runs.weights import few
from .state import names_not_finite

# Around 1 they are in order, and a scaling that is far off shows as a loss that is not finite.
_LARGEST_LATENT = 1e6


def introduce(trainer, multiply_adds: int) -> None:
    """Says what is trained, on what, and in how much memory."""
    config, model, say = trainer.config, trainer.model, trainer.log.say
    parameters = sum(p.numel() for p in model.parameters())
    backend = select_backend(q=torch.empty(0, device=trainer.device))
    kernels = {"triton": "Triton kernels", "reference": "reference path (plain torch)"}[backend]
    wrapping = "FSDP2" if trainer.sharded else "DDP" if trainer.processes > 1 else "one process"
    say(f"{config.model}: {parameters:,} parameters, {multiply_adds / 1e9:.3f} G multiply-adds for an image")
    say(f"{len(trainer.dataset):,} images {trainer.dataset.latent_shape}, {model.config.num_classes} classes")
    say(f"{trainer.processes} × {trainer.device.type}, {wrapping}, {config.precision}, {kernels}")
    size = trainer.local_batch_size // config.gradient_accumulation_steps
    estimate = estimate_memory(
        dict(model.config),
        size,
        precision="bfloat16" if config.precision == "bfloat16" else "float32",
        gradient_checkpointing=config.gradient_checkpointing,
        two_pass=config.masking,
        optimizer=config.optimizer,
    )
    activations = estimate.training_activations
    rest = (estimate.training - activations) / (trainer.processes if trainer.sharded else 1)
    if backend == "reference":
        activations += estimate.attention_matrices
    encoder = ", without the image encoder's" if trainer.encoder is not None else ""
    say(f"memory, estimated: {(rest + activations) / 2**30:.2f} GiB for a process, "
        f"{activations / 2**30:.2f} of it activations of {size} images{encoder}")  # fmt: skip
    if missing := set(config.trackers) - {"all", *map(str, trainer.accelerator.log_with)}:
        say(f"not installed, so not written: {', '.join(sorted(missing))}; metrics.jsonl has the same figures")
    if trainer.resumed_from is not None:
        say(f"goes on from {trainer.resumed_from}, step {trainer.state.steps}")
        for name, (then, now) in trainer.differences.items():
            say(f"  {name} was {then}, is {now}: this is no longer exactly the run that began")


def what_is_not_finite(trainer, timestep: Tensor, losses: Tensor, latents: Tensor, images: Tensor | None) -> str:
    """What, where, why, and what is left."""
    wrong, names = ~losses.isfinite(), names_not_finite(trainer.state)
    if wrong.any():
        passes = [name for name, row in zip(("full", "masked"), wrong) if row.any()]
        at = sorted(set(timestep[wrong.any(0)].tolist()))
        what = f"the loss of the {' and the '.join(passes)} pass is not finite at timesteps {few(at, 5)}"
    else:
        what = f"the gradient is not finite in {few(names, 5) or 'what other processes hold'}"
    causes = [_cause(trainer, latents, images)]
    if trainer.processes > 1:
        causes *= trainer.processes
        torch.distributed.all_gather_object(causes, causes[0])
    unknown = f"learning_rate {trainer.config.learning_rate:g} may be too high"
    cause = next((cause for cause in causes if cause is not None), unknown)
    checkpoints = list_checkpoints(trainer.checkpoints)
    left = f"the last good checkpoint is {checkpoints[-1][1]}" if checkpoints else "there is no checkpoint yet"
    return (
        f"{what}, in step {trainer.state.steps + 1} and {trainer.state.skipped_in_a_row - 1} before it; "
        f"{cause}; {left}"
    )


def _cause(trainer, latents: Tensor, images: Tensor | None) -> str | None:
    """What of this process was not finite before anything was computed: its data or its weights."""
    fine = latents.flatten(1).abs() <= _LARGEST_LATENT  # not of NaN
    wrong = (~fine.all(1)).nonzero()[:, 0].cpu().numpy()
    if len(wrong):
        first = trainer.state.samples_seen + trainer.accelerator.process_index * trainer.local_batch_size
        items = sorted(set(trainer.order(first + wrong)[0].tolist()))
        return (
            f"the latents of items {few(items, 5)} in {trainer.config.data} are not finite, "
            f"or beyond {_LARGEST_LATENT:g}: make these data anew"
        )
    weights = [name for name, shard in trainer.state.shards.items() if not shard.isfinite().all()]
    if weights:
        return f"the weights {few(weights)} are not finite: go on from an earlier checkpoint, or other weights"
    if images is not None and not trainer.encode(images).isfinite().all():
        return f"alignment_encoder {trainer.config.alignment_encoder} returns features that are not finite"
    return None
