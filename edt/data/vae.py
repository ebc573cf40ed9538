"""The autoencoder between pictures and latents: loading it, and decoding."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edt_kernels._checks import shown

from ..files.errors import named_errors
from ..files.text import read_json
from ..model.presets import is_number

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def load_autoencoder(
    vae: str, subfolder: str | None = None, dtype: torch.dtype = torch.float32
) -> "AutoencoderKL":
    """The AutoencoderKL of a name or a folder, or of a folder within, on the CPU.

    Raises:
        ValueError: where there is none, or one that lacks weights, which would be random.
    """
    from diffusers import AutoencoderKL  # takes seconds, which other commands need not wait for

    config = Path(vae, subfolder or "", "config.json")
    if config.is_file():
        read_json(config, "vae", dict)  # diffusers says of a list that it cannot connect to the Hub
    named = f"vae is {vae!r}" + (f" (subfolder {subfolder!r})" if subfolder else "")
    with named_errors(f"{named}, which", "cannot be loaded"):
        autoencoder, loading = AutoencoderKL.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues] - a pair
            vae, subfolder=subfolder, torch_dtype=dtype, output_loading_info=True
        )
    if missing := loading["missing_keys"]:
        raise ValueError(
            f"{named}, which lacks {len(missing)} weights of an AutoencoderKL, such as {sorted(missing)[0]}"
        )
    _check_scaling(autoencoder, named)
    return autoencoder.eval().requires_grad_(False)


def load_decoder(vae: str, channels: int, subfolder: str | None = None) -> "AutoencoderKL":
    """`load_autoencoder`, for latents of so many channels; ValueError where it has others."""
    decoder = load_autoencoder(vae, subfolder)
    check_latent_channels(decoder, vae, channels)
    return decoder


def _check_scaling(vae: Any, named: str) -> None:
    scaling, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None)
    if not is_number(scaling) or not scaling:
        raise ValueError(f"{named}, with a scaling_factor of {shown(scaling)}; it must be finite and not 0")
    if shift is not None and not is_number(shift):
        raise ValueError(f"{named}, with a shift_factor of {shown(shift)}; it must be finite, or None")


def weights_digest(vae: Any) -> str:
    """SHA-256 of the weights as they are in memory, and of the scaling: what latents are, whatever its name."""
    digest = hashlib.sha256(repr((vae.config.scaling_factor, vae.config.shift_factor or 0.0)).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_latent_channels(vae: Any, name: str, channels: int) -> None:
    _check_scaling(vae, f"vae is {name!r}")
    if vae.config.latent_channels != channels:
        raise ValueError(
            f"vae {name!r} has latents of {vae.config.latent_channels} channels; {channels} are needed here"
        )


def decode(latents: Tensor, vae: Any) -> Tensor:
    """decoder(latents / scaling_factor + shift_factor): latents (B, C, H, W) as the diffusion has them → pictures
    (B, 3, f·H, f·W) on the scale −1 to 1, in the VAE's dtype."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample
