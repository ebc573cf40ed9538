"""The training objective: the full and the masked pass of masking training, from latents to losses."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..diffusion.process import LossSecondMomentSampler, add_noise, training_losses
from ..model.transformer import EDTTransformer2DModel
from .alignment import AlignmentLoss


@dataclass(frozen=True)
class Draws:
    """What is random in a training step, for B samples that each take part in P passes.

    Drawn at once for all samples of a process: gradient accumulation splits it, and computes what one batch would.
    """

    noise: Tensor
    """(P, B, C, H, W), its own for each pass."""
    timestep: Tensor
    """(B,) int64; the passes share it."""
    weight: Tensor
    """(B,) float32: 1 over 1000·p(timestep)."""
    label_drops: Tensor | None
    """(P, B) bool: labels that become the null class; None for an unconditional model."""
    keep_masks: list[Tensor] | None
    """(B, N) bools of the masked pass; None without one."""

    def part(self, start: int, stop: int) -> "Draws":
        """Of samples `start` to `stop`."""
        return Draws(
            self.noise[:, start:stop],
            self.timestep[start:stop],
            self.weight[start:stop],
            None if self.label_drops is None else self.label_drops[:, start:stop],
            None if self.keep_masks is None else [mask[start:stop] for mask in self.keep_masks],
        )


def draw(
    model: EDTTransformer2DModel,
    timestep_sampler: LossSecondMomentSampler,
    latents: Tensor,
    generator: torch.Generator,
    masking: bool = True,
) -> Draws:
    """Draws for latents (B, C, H, W) from `generator`, on its device."""
    batch_size, passes = len(latents), 2 if masking else 1
    timestep, weight = timestep_sampler.sample(batch_size, generator)
    noise = torch.randn(passes, *latents.shape, generator=generator, device=generator.device)
    label_drops = model.draw_label_drops(passes * batch_size, generator)
    if label_drops is not None:
        label_drops = label_drops.unflatten(0, (passes, -1))
    keep_masks = model.draw_keep_masks(batch_size, generator) if masking else None
    return Draws(noise, timestep, weight, label_drops, keep_masks)


class TrainingObjective(nn.Module):
    """Losses of the passes, and of an alignment; a module, so that DDP and torch.compile see all of it.

    Both passes run as one batch of 2·B, where the full half keeps every token: weights are read once and kernels
    launched once. Where that is too large for the memory, more accumulation steps cost nothing else.
    """

    def __init__(
        self,
        model: EDTTransformer2DModel,
        alignment: AlignmentLoss | None = None,
        autocast_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.model = model
        self.alignment = alignment
        self.autocast_dtype = autocast_dtype

    def forward(
        self, latents: Tensor, labels: Tensor | None, draws: Draws, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            latents: (B, C, H, W), without noise.
            labels: (B,), None for an unconditional model.
            features: (B, N', F) of the image encoder, for the alignment.

        Returns:
            Per-sample losses (P, B), the full pass first, unweighted; and the alignment's loss, 0 without it.
        """
        passes, batch_size = draws.noise.shape[:2]
        latents, timestep = latents.repeat(passes, 1, 1, 1), draws.timestep.repeat(passes)
        noise = draws.noise.flatten(0, 1)
        keep_masks = draws.keep_masks
        if keep_masks is not None:
            keep_masks = [torch.cat([torch.ones_like(mask), mask]) for mask in keep_masks]
        labels = None if labels is None else labels.repeat(passes)
        label_drops = None if draws.label_drops is None else draws.label_drops.flatten()
        noised = add_noise(latents, noise, timestep)
        with torch.autocast(latents.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            prediction = self.model(noised, timestep, labels, keep_masks, label_drops=label_drops,
                                    return_hidden=self.alignment is not None)  # fmt: skip
        losses = training_losses(prediction.sample, latents, noise, timestep)["loss"].unflatten(0, (passes, -1))
        if self.alignment is None:
            return losses, losses.new_zeros(())
        return losses, self.alignment(prediction.hidden[:batch_size], features)
