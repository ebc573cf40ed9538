"""The diffusion process of EDT: training losses, the timestep sampler, the sampling scheduler, guidance."""

import math
from numbers import Real
from typing import TYPE_CHECKING

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from edt_kernels._checks import shown

from ..model.presets import NUM_TRAIN_TIMESTEPS, is_number
from ..options import check_count

if TYPE_CHECKING:
    from ..model.transformer import EDTTransformer2DModel

BETA_START, BETA_END = 1e-4, 2e-2
MAX_SNR_WEIGHT = 5.0


def _schedule() -> dict[str, Tensor]:
    """Per-timestep coefficients of the linear schedule, float64, (1000,)."""
    betas = torch.linspace(BETA_START, BETA_END, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    variance[0] = variance[1]  # the last step's is 0, whose logarithm is not finite
    return {
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
        "snr": alphas_cumprod / (1 - alphas_cumprod),
        "log_beta": betas.log(),
        "posterior_log_variance": variance.log(),
        "posterior_mean_x0": betas * previous.sqrt() / (1 - alphas_cumprod),
        "posterior_mean_xt": (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
    }


_SCHEDULES = {torch.device("cpu"): {name: values.float() for name, values in _schedule().items()}}


def keep_schedule(device: torch.device) -> dict[str, Tensor]:
    """The coefficients on a device, float32, copied once: a copy in each step would wait for all before it."""
    if device not in _SCHEDULES:
        with torch.inference_mode(False):  # later calls may need gradients
            _SCHEDULES[device] = {name: v.to(device) for name, v in _SCHEDULES[torch.device("cpu")].items()}
    return _SCHEDULES[device]


def _coefficients(name: str, device: torch.device) -> Tensor:
    """(1000,) float32. A graph that is compiled before any eager call on the device has the copy within."""
    if torch.compiler.is_compiling() and device not in _SCHEDULES:
        return _SCHEDULES[torch.device("cpu")][name].to(device)
    return keep_schedule(device)[name]


def _at(name: str, timestep: Tensor, like: Tensor) -> Tensor:
    """A coefficient at each sample's timestep, shaped to broadcast over `like` (B, …)."""
    return _coefficients(name, like.device)[timestep].view(-1, *[1] * (like.ndim - 1))


def _check_timestep(timestep: Tensor, batch_size: int, device: torch.device) -> None:
    if not isinstance(timestep, Tensor) or timestep.dtype not in (torch.int64, torch.int32):
        given = timestep.dtype if isinstance(timestep, Tensor) else type(timestep).__name__
        raise TypeError(f"timestep is {given}; it must be an int64 or int32 tensor")
    if tuple(timestep.shape) != (batch_size,):
        raise ValueError(f"timestep has shape {tuple(timestep.shape)}; it must be ({batch_size},)")
    if timestep.device.type not in ("cpu", device.type):
        raise ValueError(f"timestep is on {timestep.device}; it must be on {device}, or the CPU")
    # Reading values off a GPU would stall it, and a compiled graph cannot branch on them.
    if timestep.device.type == "cpu" and not torch.compiler.is_compiling() and batch_size > 0:
        low, high = timestep.min().item(), timestep.max().item()
        if low < 0 or high >= NUM_TRAIN_TIMESTEPS:
            raise ValueError(
                f"timestep has values from {low} to {high}; they must be 0 to {NUM_TRAIN_TIMESTEPS - 1}"
            )


def check_floating(**tensors: Tensor) -> None:
    """Raises TypeError for an argument that is no floating-point tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise TypeError(f"{name} is {given}; it must be a floating-point tensor")


def _check_same_shape(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} on {tensor.device}; it must be {like_name}'s, "
            f"{tuple(like.shape)} on {like.device}"
        )


def add_noise(x_start: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·noise; x_start and noise (B, …), timestep (B,) integers 0 to 999.

    Raises:
        ValueError, TypeError: as `training_losses`.
    """
    check_floating(x_start=x_start, noise=noise)
    if x_start.ndim == 0:
        raise ValueError("x_start has shape (); it must be (B, …)")
    _check_same_shape("noise", noise, "x_start", x_start)
    _check_timestep(timestep, len(x_start), x_start.device)
    return (
        _at("sqrt_alphas_cumprod", timestep, x_start) * x_start
        + _at("sqrt_one_minus_alphas_cumprod", timestep, x_start) * noise
    )


def training_losses(model_output: Tensor, x_start: Tensor, noise: Tensor, timestep: Tensor) -> dict[str, Tensor]:
    """loss = mse + vb per sample: mse = min(SNR, 5)/SNR · mean (ε − ε̂)²; vb the variational term in bits.

    The variational term is KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)), at t = 0 the negative log-likelihood
    of x_0 in bins of 2/255; it trains only the variance, its mean is detached.

    Args:
        model_output: (B, 2C, …): predicted noise, then v in [−1, 1] that interpolates the log-variance
            between the posterior's (−1) and β (1).
        x_start, noise: (B, C, …); the model was given `add_noise(x_start, noise, timestep)`.
        timestep: (B,) integers, 0 to 999.

    Returns:
        "loss", "mse" and "vb", each (B,) float32.

    Raises:
        ValueError: for shapes that do not fit, or timesteps out of range (checked on a CPU only).
        TypeError: for timesteps that are not integers, or other tensors that are.

    Source: improved diffusion (arXiv 2102.09672), min-SNR weights (arXiv 2303.09556).
    """
    check_floating(model_output=model_output, x_start=x_start, noise=noise)
    if x_start.ndim < 2:
        raise ValueError(f"x_start has shape {tuple(x_start.shape)}; it must be (B, C, …)")
    batch_size, channels = x_start.shape[:2]
    expected = (batch_size, 2 * channels, *x_start.shape[2:])
    if tuple(model_output.shape) != expected:
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)}; x_start {tuple(x_start.shape)} needs "
            f"{expected} (noise and variance)"
        )
    if model_output.device != x_start.device:
        raise ValueError(f"model_output is on {model_output.device}; it must be on x_start's, {x_start.device}")
    _check_same_shape("noise", noise, "x_start", x_start)
    _check_timestep(timestep, batch_size, x_start.device)

    model_output, x_start, noise = model_output.float(), x_start.float(), noise.float()
    predicted_noise, variance_fraction = model_output.chunk(2, dim=1)
    snr = _coefficients("snr", x_start.device)[timestep]
    mse = (noise - predicted_noise).square().flatten(1).mean(1) * (snr.clamp(max=MAX_SNR_WEIGHT) / snr)
    vb = _variational_bound(predicted_noise.detach(), variance_fraction, x_start, noise, timestep)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def _variational_bound(predicted_noise, variance_fraction, x_start, noise, timestep) -> Tensor:
    x_t = add_noise(x_start, noise, timestep)
    predicted_x_start = (x_t - _at("sqrt_one_minus_alphas_cumprod", timestep, x_t) * predicted_noise) / _at(
        "sqrt_alphas_cumprod", timestep, x_t
    )

    def posterior_mean(x_0: Tensor) -> Tensor:
        return _at("posterior_mean_x0", timestep, x_t) * x_0 + _at("posterior_mean_xt", timestep, x_t) * x_t

    low, high = _at("posterior_log_variance", timestep, x_t), _at("log_beta", timestep, x_t)
    log_variance = torch.lerp(low, high, (variance_fraction + 1) / 2)
    true_mean, mean = posterior_mean(x_start), posterior_mean(predicted_x_start)

    kl = 0.5 * (
        log_variance - low - 1 + torch.exp(low - log_variance) + (true_mean - mean).square() / log_variance.exp()
    )
    nll = -_discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance)
    first = (timestep == 0).view(-1, *[1] * (x_t.ndim - 1))
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation: the published losses use it, and it stays smooth in float32."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log of a Gaussian's mass in x ± 1/255, the outermost bins open: x is on the scale −1 to 1."""
    centered, inverse_std = x - mean, torch.exp(-log_std)
    cdf_above = _normal_cdf(inverse_std * (centered + 1 / 255))
    cdf_below = _normal_cdf(inverse_std * (centered - 1 / 255))
    mass = torch.where(x < -0.999, cdf_above, torch.where(x > 0.999, 1 - cdf_below, cdf_above - cdf_below))
    return mass.clamp(min=1e-12).log()


class LossSecondMomentSampler:
    """p(t) ∝ √(mean of the last `history` squared losses at t), mixed with a `uniform_share` of 1/1000.

    Uniform until every timestep has `history` losses. Source: improved diffusion (arXiv 2102.09672).
    """

    def __init__(self, history: int = 10, uniform_share: float = 0.001, device: torch.device | str | None = None):
        check_count("history", history)
        if not (is_number(uniform_share) and 0 < uniform_share <= 1):
            raise ValueError(f"uniform_share is {shown(uniform_share)}; it must be in (0, 1]")
        self.uniform_share = uniform_share
        self.losses = torch.zeros(NUM_TRAIN_TIMESTEPS, history, dtype=torch.float64, device=device)
        self.counts = torch.zeros(NUM_TRAIN_TIMESTEPS, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """(1000,) float64, sums to 1."""
        uniform = torch.full_like(self.losses[:, 0], 1 / NUM_TRAIN_TIMESTEPS)
        second_moment = self.losses.square().mean(1).sqrt()
        learned = (1 - self.uniform_share) * second_moment / second_moment.sum() + self.uniform_share * uniform
        warmed_up = (self.counts >= self.losses.shape[1]).all()
        return torch.where(warmed_up, learned, uniform)

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Timesteps (batch_size,) int64 and the weights 1/(1000·p(t)) float32 that keep the loss unbiased."""
        check_count("batch_size", batch_size)
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise TypeError(f"generator is a {type(generator).__name__}; it must be a torch.Generator")
        probabilities = self.probabilities()
        timestep = torch.multinomial(probabilities, batch_size, replacement=True, generator=generator)
        return timestep, (1 / (NUM_TRAIN_TIMESTEPS * probabilities[timestep])).float()

    def update(self, timestep: Tensor, losses: Tensor) -> None:
        """Records each sample's loss (B,), unweighted, at its timestep (B,); the newest replace the oldest."""
        check_floating(losses=losses)
        if not isinstance(timestep, Tensor):
            raise TypeError(f"timestep is a {type(timestep).__name__}; it must be an int64 or int32 tensor")
        if timestep.ndim != 1 or timestep.shape != losses.shape:
            raise ValueError(
                f"losses has shape {tuple(losses.shape)} for a timestep of shape {tuple(timestep.shape)}; both "
                "must be (B,)"
            )
        _check_timestep(timestep, len(timestep), self.losses.device)
        if losses.is_meta:
            raise ValueError("losses is on meta, which has no values")
        timestep = timestep.long()
        history = self.losses.shape[1]
        order = torch.argsort(timestep, stable=True)
        timestep, losses = timestep[order], losses.detach()[order].to(self.losses)
        first = torch.searchsorted(timestep, timestep)
        repeats = torch.searchsorted(timestep, timestep, right=True) - first
        rank = torch.arange(len(timestep), device=timestep.device) - first  # among the batch's equal timesteps
        slot = (self.counts[timestep] + rank) % history
        newest = rank >= repeats - history
        # Older ones go to a row that is dropped: leaving them out, and bincount, would make a GPU's host wait.
        rows = torch.where(newest, timestep, NUM_TRAIN_TIMESTEPS)
        extended = torch.cat([self.losses, torch.zeros_like(self.losses[:1])])
        extended[rows, slot] = losses
        self.losses.copy_(extended[:-1])
        self.counts.index_add_(0, timestep, torch.ones_like(timestep))

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if not isinstance(state, dict):
            raise TypeError(f"state is a {type(state).__name__}; it must be a dict as state_dict returns it")
        for name, own in self.state_dict().items():
            if not isinstance(state.get(name), Tensor) or state[name].shape != own.shape:
                given = tuple(state[name].shape) if isinstance(state.get(name), Tensor) else "nothing"
                raise ValueError(f"state has {given} for {name!r}; this sampler needs {tuple(own.shape)}")
        for name, own in self.state_dict().items():
            own.copy_(state[name])


def make_scheduler(num_inference_steps: int = 250) -> DDPMScheduler:
    """The released ancestral sampler as a diffusers scheduler: evenly respaced steps, learned variance.

    They go from timestep 999 to 0; the released single step is at 0, which leaves the noise as it is.

    Raises:
        ValueError: for a number of steps outside 1 to 1000.
    """
    check_steps(num_inference_steps)
    scheduler = DDPMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="linear",
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def check_steps(num_inference_steps: int) -> None:
    """Raises ValueError for what is no number of steps."""
    if type(num_inference_steps) is not int or not 1 <= num_inference_steps <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"num_inference_steps is {shown(num_inference_steps)}; it must be an integer, 1 to "
            f"{NUM_TRAIN_TIMESTEPS}"
        )


def check_guidance_scale(guidance_scale: float) -> None:
    """Raises TypeError or ValueError for a scale that suits no model."""
    if not isinstance(guidance_scale, Real) or isinstance(guidance_scale, bool):
        raise TypeError(f"guidance_scale is {shown(guidance_scale)}; it must be a number, 1 is no guidance")
    if not _fits_float32(guidance_scale) or guidance_scale < 0:
        raise ValueError(
            f"guidance_scale is {shown(guidance_scale)}; it must be finite in float32 and not negative, 1 is none"
        )


def _fits_float32(value) -> bool:
    return is_number(value) and abs(value) <= torch.finfo(torch.float32).max


def check_guidance(config, guidance_scale: float, guidance_channels: int | None) -> int:
    """The number of guided channels, by default 3 or all where there are fewer.

    Raises:
        TypeError, ValueError: for a scale or channels that do not fit the model of this configuration, which for
            any scale but 1 needs a null class that training has seen.
    """
    check_guidance_scale(guidance_scale)
    if guidance_scale != 1:
        if config.num_classes == 0:
            raise ValueError(
                f"guidance_scale is {shown(guidance_scale)}; an unconditional model has no guidance, use 1"
            )
        if config.class_dropout_prob == 0:
            raise ValueError(
                f"guidance_scale is {shown(guidance_scale)}; this model's class_dropout_prob is 0, so that its "
                "null class was never trained; use 1, or train with a class_dropout_prob such as 0.1"
            )
    if guidance_channels is None:
        return min(3, config.in_channels)
    if type(guidance_channels) is not int or not 0 < guidance_channels <= config.in_channels:
        raise ValueError(
            f"guidance_channels is {shown(guidance_channels)}; this model needs 1 to {config.in_channels}"
        )
    return guidance_channels


def guide(conditional: Tensor, unconditional: Tensor, scale: float, guidance_channels: int = 3) -> Tensor:
    """unconditional + scale·(conditional − unconditional) on the first channels; the rest stay conditional.

    Args:
        conditional, unconditional: model outputs (B, C, …), noise first.
        scale: 1 is no guidance, and at 0 the guided channels are the unconditional ones.
        guidance_channels: how many channels are guided; the released sampler guides 3 of the 4 latent channels.

    Raises:
        TypeError, ValueError: for what are no outputs of one shape, a scale that is not finite, or more channels
            than there are.
    """
    check_floating(conditional=conditional, unconditional=unconditional)
    _check_same_shape("unconditional", unconditional, "conditional", conditional)
    if unconditional.dtype != conditional.dtype:
        raise TypeError(f"unconditional is {unconditional.dtype}; it must be conditional's, {conditional.dtype}")
    if not _fits_float32(scale):
        raise ValueError(f"scale is {shown(scale)}; it must be a number, finite in float32")
    if conditional.ndim < 2:
        raise ValueError(f"conditional has shape {tuple(conditional.shape)}; it must be (B, C, …)")
    if type(guidance_channels) is not int or not 0 < guidance_channels <= conditional.shape[1]:
        raise ValueError(
            f"guidance_channels is {shown(guidance_channels)}; it must be 1 to {conditional.shape[1]}"
        )
    guided = torch.lerp(unconditional[:, :guidance_channels], conditional[:, :guidance_channels], float(scale))
    return torch.cat([guided, conditional[:, guidance_channels:]], dim=1)


def predict(
    model: "EDTTransformer2DModel",
    latents: Tensor,
    timestep: Tensor | float,
    class_labels: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
) -> Tensor:
    """The model's output (B, out_channels, H, W) for latents (B, in_channels, H, W), guided.

    With guidance both passes are one batch of 2B, for which the timestep must be a scalar; a scale of 1 runs no
    unconditional pass.

    Args:
        guidance_scale: see `guide`; not negative.
        guidance_channels: by default 3, or all where there are fewer.

    Raises:
        ValueError, TypeError: as `check_guidance` and the model.
    """
    if not (callable(model) and hasattr(model, "config")):
        raise TypeError(f"model is a {type(model).__name__}; it must be an EDTTransformer2DModel")
    guidance_channels = check_guidance(model.config, guidance_scale, guidance_channels)
    check_floating(latents=latents)
    if latents.ndim != 4 or (latents.is_meta and model.device.type != "meta"):
        raise ValueError(f"latents has shape {tuple(latents.shape)} on {latents.device}; it must be (B, C, H, W)")
    if not isinstance(timestep, Tensor) and not (is_number(timestep) and 0 <= timestep < NUM_TRAIN_TIMESTEPS):
        raise ValueError(f"timestep is {shown(timestep)}; it must be a tensor or 0 to {NUM_TRAIN_TIMESTEPS - 1}")
    latents = latents.to(model.dtype)
    if guidance_scale == 1:
        return model(latents, timestep, class_labels).sample
    if not isinstance(class_labels, Tensor) or class_labels.ndim != 1:
        given = tuple(class_labels.shape) if isinstance(class_labels, Tensor) else type(class_labels).__name__
        raise TypeError(f"class_labels is {given}; it must be a tensor of shape (B,)")
    labels = torch.cat([class_labels, torch.full_like(class_labels, model.config.num_classes)])
    conditional, unconditional = model(latents.repeat(2, 1, 1, 1), timestep, labels).sample.chunk(2)
    return guide(conditional, unconditional, guidance_scale, guidance_channels)
