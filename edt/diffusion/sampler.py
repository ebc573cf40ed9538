"""Drawing latents from a model. A scheduler is any `SchedulerMixin`, which declares nothing of what all have."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import DDIMParallelScheduler, DDIMScheduler, DDPMParallelScheduler, DDPMScheduler, SchedulerMixin
from torch import Tensor
from tqdm import tqdm

from ..model.presets import NUM_TRAIN_TIMESTEPS
from ..model.transformer import EDTTransformer2DModel
from ..options import check_count
from .cuda_graph import GraphedStep
from .process import check_guidance, check_steps, make_scheduler, predict

ANCESTRAL = (DDPMScheduler, DDPMParallelScheduler)  # the schedulers that take a learned variance
_DDIM = (DDIMScheduler, DDIMParallelScheduler)
SOLVERS = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("LMSDiscreteScheduler", "SASolverScheduler", "UniPCMultistepScheduler"),
)
_UNFIT = {
    "DDIMInverseScheduler": "goes from images to noise",
    "DPMSolverMultistepInverseScheduler": "goes from images to noise",
    "RePaintScheduler": "is for filling in a part of an image",
    "LCMScheduler": "is for models distilled into consistency models, and gives others too little variance",
    "TCDScheduler": "is for models distilled into consistency models, and ends before the noise does",
    "PNDMScheduler": "takes steps of 1000 // num_inference_steps timesteps, whatever its list of them is",
    "DPMSolverSDEScheduler": "draws noise that does not follow the generator",
}
_BEGINNING = 500  # the noise of a timestep from here on is as good as pure
_ROUNDING = 1.01  # of a timestep, which schedulers that begin with noise levels round or cut off


def check_scheduler(scheduler: Any, config, clipping: bool = False) -> None:
    """Raises ValueError or TypeError for a scheduler that does not fit the model of this configuration.

    Args:
        clipping: whether samples may be clipped to ±1, as pixels are.
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, SchedulerMixin):
        raise TypeError(f"scheduler is a {name}; it must be a scheduler of diffusers")
    settings = scheduler.config  # pyright: ignore[reportAttributeAccessIssue] - declared by none, but had by all
    fits = f"take {name}.from_config(edt.make_scheduler().config)"
    if name in _UNFIT:
        raise ValueError(f"scheduler is {name}, which {_UNFIT[name]}; take DPMSolverMultistepScheduler, or DDPM's")
    if settings.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(f"scheduler has prediction_type {settings['prediction_type']!r}; EDT predicts epsilon")
    if (steps := settings.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)) != NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"scheduler has num_train_timesteps {steps}; EDT has {NUM_TRAIN_TIMESTEPS}")
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)  # schedulers of flow matching have none
    released = make_scheduler().alphas_cumprod
    if alphas_cumprod is None or not torch.allclose(alphas_cumprod.cpu(), released, rtol=1e-3):
        raise ValueError(f"scheduler is {name} with other noise levels than EDT's; where it fits, {fits}")
    known = [each.__name__ for each in ANCESTRAL] + list(SOLVERS)
    if not {each.__name__ for each in type(scheduler).__mro__} & set(known):
        raise ValueError(f"scheduler is {name}; it must be one of {', '.join(known)}")
    for setting in ("clip_sample", "thresholding"):
        if settings.get(setting) and not clipping:
            raise ValueError(f"scheduler has {setting}, which cuts latents off at ±1 or nearby; {fits}")
    if isinstance(scheduler, ANCESTRAL):
        if settings["variance_type"] == "learned":
            raise ValueError("scheduler has variance_type 'learned'; EDT's variance is 'learned_range'")
        if takes_learned_variance(scheduler) and config.out_channels != 2 * config.in_channels:
            raise ValueError(
                f"scheduler has variance_type 'learned_range', but the transformer's {config.out_channels} "
                f"out_channels for {config.in_channels} in_channels have no variance; take 'fixed_small'"
            )


def set_timesteps(scheduler: Any, num_inference_steps: int) -> None:
    """A scheduler's list of timesteps, which must lead from pure noise to none.

    The spacing "linspace", which a configuration made from the released scheduler's has, is kept for that one:
    999, …, 0. All others are spaced "trailing", 999, …, 1000/n − 1, so that their last step, like all others,
    takes 1/n of the noise away. At some numbers of steps above 60 diffusers' list of that has one timestep too
    many, -1; there it is "linspace" again, which then hardly differs.

    Raises:
        ValueError: for a number of steps outside 1 to 1000, or settings whose list does not lead there.
    """
    check_steps(num_inference_steps)
    own = scheduler.config.get("timestep_spacing", "linspace")
    ancestral = isinstance(scheduler, ANCESTRAL)
    spacings = [own, "linspace"] if ancestral or own == "leading" else []
    for spacing in (*spacings, "trailing", "linspace"):
        with _settings(scheduler, timestep_spacing=spacing):
            scheduler.set_timesteps(num_inference_steps)
        released = ancestral and spacing == "linspace"
        if released or _leads_to_the_image(scheduler, num_inference_steps):
            return
    name, timesteps = type(scheduler).__name__, scheduler.timesteps
    raise ValueError(
        f"scheduler is {name}, whose settings give {num_inference_steps} steps the timesteps {timesteps[0]:g} to "
        f"{timesteps[-1]:g}, or noise levels that are not theirs; take "
        f"{name}.from_config(edt.make_scheduler().config)"
    )


def _leads_to_the_image(scheduler: Any, num_inference_steps: int) -> bool:
    """Whether the list begins in noise, falls to 0 or above, and its noise levels are those of its timesteps."""
    timesteps = scheduler.timesteps.double()
    whole = len(timesteps) == (num_inference_steps if scheduler.order == 1 else 2 * num_inference_steps - 1)
    timesteps = timesteps[:: scheduler.order]  # a scheduler of second order asks at points between, too
    falls = bool((timesteps.diff() <= 0).all()) and timesteps[0] >= _BEGINNING and timesteps[-1] >= 0
    if not (whole and falls) or getattr(scheduler, "sigmas", None) is None:
        return whole and falls
    sigmas = scheduler.sigmas.double()[:: scheduler.order][: len(timesteps)].contiguous()
    alphas_cumprod = scheduler.alphas_cumprod.double()
    levels = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    above = torch.searchsorted(levels, sigmas).clamp(1, len(levels) - 1)
    at = above - 1 + (sigmas - levels[above - 1]) / (levels[above] - levels[above - 1])
    return bool(((at - timesteps).abs() <= _ROUNDING).all())


@contextmanager
def _settings(scheduler: Any, **settings) -> Iterator[None]:
    """These settings for a while; who makes another scheduler of the configuration needs its own."""
    before = {name: scheduler.config[name] for name in settings if name in scheduler.config}
    scheduler.register_to_config(**{name: settings[name] for name in before})
    try:
        yield
    finally:
        scheduler.register_to_config(**before)


def scheduler_step(
    scheduler: Any,
    output: Tensor,
    timestep: Tensor,
    latents: Tensor,
    generator: torch.Generator | list[torch.Generator] | None,
) -> Tensor:
    """x_t → x_s, s the next timestep of the scheduler's list, in float32; a scheduler that takes no learned
    variance gets the noise alone."""
    output = output.float()
    if not takes_learned_variance(scheduler):
        output = output[:, : latents.shape[1]]
    move = scheduler.step
    randomness = {"generator": generator} if "generator" in inspect.signature(move).parameters else {}
    settings = {}
    if not isinstance(scheduler, ANCESTRAL):
        # DPM-Solver would split the variance off again, after 3 channels.
        settings["variance_type"] = None
    if isinstance(scheduler, _DDIM):
        # It steps to timestep − num_train_timesteps // num_inference_steps, which is not the next one of its list.
        following = scheduler.timesteps[scheduler.timesteps < timestep]
        step = timestep - (following[0] if len(following) else -1)
        settings["num_train_timesteps"] = int(step) * scheduler.num_inference_steps  # pyright: ignore[reportOperatorIssue] - set
    with _settings(scheduler, **settings):
        return move(output, timestep, latents, **randomness).prev_sample


def takes_learned_variance(scheduler: Any) -> bool:
    return isinstance(scheduler, ANCESTRAL) and scheduler.variance_type == "learned_range"


def noise_level(scheduler: Any, timestep: Tensor) -> float:
    """σ = √((1 − ᾱ_t)/ᾱ_t): 0.01 at the first of EDT's 1000 timesteps, 157 at the last."""
    alpha = scheduler.alphas_cumprod[round(float(timestep))].item()
    return math.sqrt((1 - alpha) / alpha)


class NotFiniteError(ValueError):
    """Sampling made infinities or NaNs; `latents` has what it ended with."""

    def __init__(self, message: str, latents: Tensor):
        super().__init__(message)
        self.latents = latents


def check_finite(
    latents: Tensor, finite: list[Tensor], timesteps: Tensor, dtype: torch.dtype, guidance_scale: float
) -> None:
    """Raises NotFiniteError where the latents of a step were not finite.

    Args:
        finite: of each step, a bool on the latents' device; only here is it waited for.
        dtype, guidance_scale: of the model and of its last step, what else may be at fault.
    """
    if not finite or (flags := torch.stack(finite).cpu()).all():
        return
    step = int(flags.logical_not().nonzero()[0])
    given = "or the latents given" if guidance_scale == 1 else f"latents or guidance_scale {guidance_scale:g}"
    cure = "take bfloat16 or float32" if dtype == torch.float16 else f"are its weights, {given}, sound?"
    raise NotFiniteError(
        f"latents are not finite from step {step + 1} of {len(timesteps)} (timestep {timesteps[step]:g}) on; the "
        f"model is in {str(dtype).removeprefix('torch.')}: {cure}",
        latents,
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
    cuda_graph: bool | GraphedStep = False,
) -> Tensor:
    """Ancestral sampling with the learned variance, from noise to latents (B, in_channels, height, width).

    Args:
        model: in evaluation mode; AMM acts in its `amm_blocks`. An enabled step cache begins anew here, and its
            features are let go at the end.
        class_labels: (B,) integers 0 to num_classes−1; None, with `batch_size`, for unconditional models.
        num_inference_steps: evenly respaced over the 1000 training steps.
        guidance_scale: 1 is no guidance and runs no unconditional pass; 0 makes the guided channels unconditional.
        guidance_channels: see `edt.diffusion.guide`; by default 3, or all where there are fewer.
        generator: for the noise, on the model's device or the CPU.
        on_step: called after each step with its number and the latents.
        cuda_graph: replays the model's launches from CUDA graphs, captured in this call; or those of a
            `GraphedStep` of the model, captured at its first call.

    Raises:
        ValueError, TypeError: for labels, guidance or a number of steps that do not fit the model; for
            `cuda_graph` without a GPU.
        NotFiniteError: a ValueError, at the end, for latents that are not finite, naming the first step of such.
    """
    if not (callable(model) and hasattr(model, "config")):  # a compiled or wrapped one has it, too
        raise TypeError(f"model is a {type(model).__name__}; it must be an EDTTransformer2DModel")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator is a {type(generator).__name__}; it must be a torch.Generator")
    if not (on_step is None or callable(on_step)):
        raise TypeError(f"on_step is a {type(on_step).__name__}; it must be callable")
    if type(progress) is not bool:
        raise TypeError(f"progress is {progress!r}; it must be True or False")
    if not isinstance(cuda_graph, bool | GraphedStep):
        raise TypeError(f"cuda_graph is {cuda_graph!r}; it must be True, False or an edt.GraphedStep")
    if isinstance(cuda_graph, GraphedStep) and cuda_graph.model is not model:
        raise ValueError("cuda_graph is a GraphedStep of another model")
    config = model.config
    if class_labels is not None and not (isinstance(class_labels, Tensor) and class_labels.ndim == 1):
        given = tuple(class_labels.shape) if isinstance(class_labels, Tensor) else type(class_labels).__name__
        raise TypeError(f"class_labels is {given}; it must be a tensor of shape (B,)")
    if class_labels is not None and class_labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"class_labels is {class_labels.dtype}; it must be an int64 or int32 tensor")
    if class_labels is not None and class_labels.is_meta:
        raise ValueError("class_labels is on meta, which has no values")
    if class_labels is not None and config.num_classes == 0:
        raise ValueError("class_labels was given to an unconditional model; give batch_size instead")
    if batch_size is not None:
        check_count("batch_size", batch_size)
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
        low, high = (int(class_labels.min()), int(class_labels.max())) if len(class_labels) else (0, 0)
        if low < 0 or high >= config.num_classes:  # the null class is none to draw
            raise ValueError(
                f"class_labels has values from {low} to {high}; they must be 0 to {config.num_classes - 1}"
            )
        class_labels = class_labels.to(device)
        if batch_size not in (None, len(class_labels)):
            raise ValueError(f"batch_size is {batch_size} for {len(class_labels)} class_labels; leave it out")
        batch_size = len(class_labels)
    noise_device = generator.device if generator is not None else device
    assert batch_size is not None  # one of the two was given
    shape = (batch_size, config.in_channels, *model.latent_size)
    latents = torch.randn(shape, generator=generator, device=noise_device).to(device)
    scheduler = make_scheduler(num_inference_steps)
    if isinstance(cuda_graph, GraphedStep):
        step = cuda_graph
    else:
        step = GraphedStep(model) if cuda_graph else partial(predict, model)
    finite = []
    model.reset_cache()
    try:
        for i, timestep in enumerate(tqdm(scheduler.timesteps, desc="sampling", disable=not progress)):
            output = step(latents, timestep, class_labels, guidance_scale, guidance_channels)
            latents = scheduler_step(scheduler, output, timestep, latents, generator)
            finite.append(latents.isfinite().all())
            if on_step is not None:
                on_step(i, latents)
    finally:
        model.reset_cache()
    check_finite(latents, finite, scheduler.timesteps, model.dtype, guidance_scale)
    return latents
