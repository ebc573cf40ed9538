"""Drawing latents from a model."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from numbers import Real

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, SchedulerMixin
from torch import Tensor
from tqdm import tqdm

from .cuda_graph import GraphedStep
from .diffusion import make_scheduler, predict
from .model import EDTTransformer2DModel

ANCESTRAL = (DDPMScheduler, DDPMParallelScheduler)  # the schedulers that take a learned variance


def scheduler_step(
    scheduler: SchedulerMixin,
    output: Tensor,
    timestep: Tensor,
    latents: Tensor,
    generator: torch.Generator | list[torch.Generator] | None,
) -> Tensor:
    """x_t → x_{t−1} by any diffusers scheduler, in float32; one that takes no learned variance gets the noise."""
    output = output.float()
    if not takes_learned_variance(scheduler):
        output = output[:, : latents.shape[1]]
    randomness = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    variance_type = scheduler.config.get("variance_type")
    if isinstance(scheduler, ANCESTRAL) or variance_type not in ("learned", "learned_range"):
        return scheduler.step(output, timestep, latents, **randomness).prev_sample
    # DPM-Solver would split the variance off again, after 3 channels; who switches back to DDPM needs it.
    scheduler.register_to_config(variance_type=None)
    try:
        return scheduler.step(output, timestep, latents, **randomness).prev_sample
    finally:
        scheduler.register_to_config(variance_type=variance_type)


def takes_learned_variance(scheduler: SchedulerMixin) -> bool:
    return isinstance(scheduler, ANCESTRAL) and scheduler.variance_type == "learned_range"


def noise_level(scheduler: SchedulerMixin, timestep: Tensor) -> float:
    """σ = √((1 − ᾱ_t)/ᾱ_t): 0.01 at the first of EDT's 1000 timesteps, 157 at the last."""
    alpha = scheduler.alphas_cumprod[round(float(timestep))].item()
    return math.sqrt((1 - alpha) / alpha)


def check_guidance_scale(guidance_scale: float) -> None:
    """Raises ValueError for a scale that suits no model."""
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance_scale is {guidance_scale}; it must be finite and not negative, 1 is none")


def check_guidance(config, guidance_scale: float, guidance_channels: int | None) -> int:
    """The number of guided channels, by default 3 or all where there are fewer.

    Raises:
        TypeError, ValueError: for a scale or channels that do not fit the model of this configuration.
    """
    if not isinstance(guidance_scale, Real):
        raise TypeError(f"guidance_scale is {guidance_scale!r}; it must be a number, 1 is no guidance")
    if guidance_scale != 1 and config.num_classes == 0:
        raise ValueError(f"guidance_scale is {guidance_scale}; an unconditional model has no guidance, use 1")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale is {guidance_scale}; it must be finite")
    if guidance_channels is None:
        return min(3, config.in_channels)
    if type(guidance_channels) is not int or not 0 < guidance_channels <= config.in_channels:
        raise ValueError(f"guidance_channels is {guidance_channels}; this model needs 1 to {config.in_channels}")
    return guidance_channels


def check_labels(class_labels: Tensor, num_classes: int) -> None:
    """Raises ValueError for labels that are no class of the model; the null class is none to draw."""
    if len(class_labels) and not 0 <= int(class_labels.min()) <= int(class_labels.max()) < num_classes:
        raise ValueError(
            f"class_labels has values from {int(class_labels.min())} to {int(class_labels.max())}; they must "
            f"be 0 to {num_classes - 1}"
        )


@torch.no_grad()
def sample(
    model: EDTTransformer2DModel,
    class_labels: Tensor | None = None,
    *,
    batch_size: int | None = None,
    num_inference_steps: int = 250,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
    on_step: Callable[[int, Tensor], None] | None = None,
    cuda_graph: bool = False,
) -> Tensor:
    """Ancestral sampling with the learned variance, from noise to latents (B, in_channels, height, width).

    Args:
        model: in evaluation mode; AMM acts in its `amm_blocks`. An enabled step cache begins anew here, and its
            features are let go at the end.
        class_labels: (B,) integers 0 to num_classes−1; None, with `batch_size`, for unconditional models.
        num_inference_steps: evenly respaced over the 1000 training steps.
        guidance_scale: 1 is no guidance and runs no unconditional pass.
        guidance_channels: see `edt.diffusion.guide`; by default 3, or all where there are fewer.
        generator: for the noise, on the model's device or the CPU.
        on_step: called after each step with its number and the latents.
        cuda_graph: replays the model's launches from CUDA graphs, captured in this call: see `GraphedStep`.

    Raises:
        ValueError: for labels, guidance or a number of steps that do not fit the model; for `cuda_graph` without
            a GPU.
    """
    config = model.config
    if class_labels is not None and not (isinstance(class_labels, Tensor) and class_labels.ndim == 1):
        given = tuple(class_labels.shape) if isinstance(class_labels, Tensor) else type(class_labels).__name__
        raise TypeError(f"class_labels is {given}; it must be a tensor of shape (B,)")
    if class_labels is not None and config.num_classes == 0:
        raise ValueError("class_labels was given to an unconditional model; give batch_size instead")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size is {batch_size!r}; it must be a positive integer")
    if class_labels is None and (config.num_classes > 0 or batch_size is None):
        raise ValueError("class_labels is None; that needs an unconditional model and a batch_size")
    if model.training:
        raise ValueError("model is in training mode; call model.eval() first")
    if config.out_channels != 2 * config.in_channels:
        raise ValueError(
            f"model has {config.out_channels} out_channels for {config.in_channels} in_channels; sampling needs "
            "twice as many, for the learned variance"
        )
    guidance_channels = check_guidance(config, guidance_scale, guidance_channels)
    device = model.device
    if class_labels is not None:
        check_labels(class_labels, config.num_classes)
        class_labels = class_labels.to(device)
        if batch_size not in (None, len(class_labels)):
            raise ValueError(f"batch_size is {batch_size} for {len(class_labels)} class_labels; leave it out")
        batch_size = len(class_labels)
    noise_device = generator.device if generator is not None else device
    shape = (batch_size, config.in_channels, *model.latent_size)
    latents = torch.randn(shape, generator=generator, device=noise_device).to(device)
    scheduler = make_scheduler(num_inference_steps)
    step = GraphedStep(model) if cuda_graph else partial(predict, model)
    model.reset_cache()
    try:
        for i, timestep in enumerate(tqdm(scheduler.timesteps, desc="sampling", disable=not progress)):
            output = step(latents, timestep, class_labels, guidance_scale, guidance_channels)
            latents = scheduler_step(scheduler, output, timestep, latents, generator)
            if on_step is not None:
                on_step(i, latents)
    finally:
        model.reset_cache()
    return latents
