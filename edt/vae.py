"""The autoencoder between pictures and latents: loading it, and decoding."""

from torch import Tensor, nn


def load_decoder(vae: str, channels: int, subfolder: str | None = None) -> nn.Module:
    """The AutoencoderKL of a name or a folder, or of a folder within, on the CPU.

    Raises:
        ValueError: where there is none, or its latents have another number of channels.
    """
    from diffusers import AutoencoderKL

    try:
        decoder, loading = AutoencoderKL.from_pretrained(vae, subfolder=subfolder, output_loading_info=True)
    except MemoryError:
        raise
    except Exception as error:  # of a config's values of wrong types almost any
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"vae is {vae!r}, which cannot be loaded: {reason}") from error
    if missing := sorted(loading["missing_keys"]):  # diffusers only warns, and leaves them at random
        raise ValueError(
            f"vae is {vae!r}, which is no AutoencoderKL: it lacks {len(missing)} weights, as {missing[0]}"
        )
    check_latent_channels(decoder, vae, channels)
    return decoder.eval().requires_grad_(False)


def check_latent_channels(vae: nn.Module, name: str, channels: int) -> None:
    if vae.config.latent_channels != channels:
        raise ValueError(
            f"vae {name!r} has latents of {vae.config.latent_channels} channels; {channels} are needed here"
        )


def decode(latents: Tensor, vae: nn.Module) -> Tensor:
    """decoder(latents / scaling_factor + shift_factor): latents (B, C, H, W) as the diffusion has them → pictures
    (B, 3, f·H, f·W) on the scale −1 to 1, in the VAE's dtype."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample
