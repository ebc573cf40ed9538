"""The grids of samples that a training run draws."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data import pictures
from ..data.digits import to_uint8
from ..data.vae import decode
from ..diffusion.sampler import NotFiniteError, sample
from ..model.transformer import EDTTransformer2DModel
from .config import TrainConfig


def draw_grid(
    model: EDTTransformer2DModel, config: TrainConfig, generator: torch.Generator
) -> tuple[Tensor, np.ndarray]:
    """Latents (sample_count, C, H, W) of classes spread evenly, and their labels; the model is as it is.

    Latents that are not finite are returned as well.
    """
    num_classes, count = model.config.num_classes, config.sample_count
    labels = np.arange(count) * max(num_classes, 1) // count
    try:
        latents = sample(
            model,
            torch.from_numpy(labels) if num_classes else None,
            batch_size=count,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale if num_classes else 1.0,
            generator=generator,
            progress=False,
        )
    except NotFiniteError as error:  # no reason to end a training
        latents = error.latents
    return latents, labels


def save_grid(
    path: Path,
    latents: Tensor,
    labels: np.ndarray,
    title: str,
    vae: nn.Module | None,
    class_names: Sequence[str] = (),
) -> None:
    """A picture of pixels, of latents decoded with `vae`, or else of three of their channels, and says which.

    Raises:
        NotFiniteError: for pictures that are not finite, as of a VAE that overflows.
    """
    if vae is not None:
        pixels = _decode(latents, vae)
    elif latents.shape[1] in (1, 3):
        pixels = latents
    else:
        pixels = latents[:, :3] / (2 * latents.std())
        title += "\nlatents; --vae decodes"
    if not pixels.isfinite().all():
        raise NotFiniteError("vae makes pictures that are not finite", pixels)
    images = to_uint8(pixels.float().cpu().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.save_samples(path, images, labels, title, dict(enumerate(class_names)))


@torch.no_grad()
def _decode(latents: Tensor, vae: nn.Module) -> Tensor:
    """One at a time, and the VAE is on the latents' device for the time of it: its activations are large, and
    training has left little memory."""
    vae.to(latents.device)
    pictures = torch.cat([decode(one[None], vae).cpu() for one in latents])
    vae.to("cpu")
    return pictures
