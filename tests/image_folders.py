"""Small image folders and a small VAE for the tests of extraction."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edt.data.extraction import ExtractOptions, extract

SIZES = ((40, 33), (33, 40), (70, 35), (16, 16), (21, 90))  # width, height


def random_image(seed: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Smooth enough to survive JPEG, nowhere symmetric."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def save_images(folder: Path, count: int, first_seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        suffix = ("png", "jpg", "JPEG")[i % 3]
        random_image(first_seed + i, SIZES[i % len(SIZES)]).save(folder / f"{i:03d}.{suffix}")


def save_vae(folder: Path, **config) -> Path:
    """A random AutoencoderKL that halves each side, with a scaling and a shift."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
        **{"scaling_factor": 0.75, "shift_factor": 0.125, **config},
    )
    vae.save_pretrained(folder)
    return folder


def run(source: Path, output: Path, **options):
    """`extract` with settings for small images."""
    options = {"image_size": (16,), "batch_size": 4, "num_workers": 0, "device": "cpu", **options}
    return extract(ExtractOptions(source=source, output=output, **options))
