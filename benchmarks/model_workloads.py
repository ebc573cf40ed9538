"""What the model suites run: EDT or the released operations on one batch, forward, in training, in sampling.

`edt` is imported where it is used: without diffusers the suites report what is missing, and the ops' suites run.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edt.model.presets import PRESETS

from .plain import PlainEDT

GUIDANCE_SCALE = 2.0
# At the released decay; the learning rate is small, so that the weights stay near those that were verified.
_EMA_DECAY, _LEARNING_RATE = 0.9999, 1e-5
_PIXELS = 8  # along a side, for one of the latents


@dataclass(frozen=True)
class ModelCase:
    """A size of EDT on a batch. Multiply-adds of a forward pass (`edt.model.cost_table`) are two operations each:

    model   2·B·multiply-adds: a forward pass in evaluation mode, with AMM
    train   12·B·multiply-adds: two passes, full and masked, each forward and backward (twice a forward)
    sample  4·steps·B·multiply-adds: each step with and without the label, for guidance

    What autograd computes again, and what is no product, is not counted.
    """

    suite: str
    preset: str
    resolution: int  # of the images; the latents' side is an eighth of it
    batch_size: int
    dtype: str  # autocast's, or float32 without it
    steps: int = 0  # of sampling
    compiled: bool = True  # also what takes minutes to compile

    @property
    def name(self) -> str:
        return f"{self.preset} {self.resolution}² B{self.batch_size}"

    @property
    def work(self) -> str:
        if self.suite == "sample":
            return f"{self.steps} steps, guidance {GUIDANCE_SCALE:g}"
        return {"model": "forward", "train": "training step"}[self.suite]

    @property
    def shape(self) -> dict[str, object]:
        shape = {"model": self.preset, "resolution": self.resolution, "batch_size": self.batch_size}
        return shape | ({"steps": self.steps, "guidance_scale": GUIDANCE_SCALE} if self.steps else {})

    @property
    def config(self) -> dict[str, object]:
        """Of our model. In training labels are not dropped: every implementation would draw others."""
        config = PRESETS.get(f"{self.preset}-{self.resolution}", PRESETS[self.preset])
        form = {"amm_form": "cos"} if self.resolution >= 512 else {}
        dropout = 0.1 if self.steps else 0.0  # guidance needs a null class that was trained
        return {**config, **form, "sample_size": self.resolution // _PIXELS, "class_dropout_prob": dropout}

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.dtype == "float32" else getattr(torch, self.dtype)

    def operations(self, multiply_adds: int) -> int:
        passes = {"model": 1, "train": 2 * 3, "sample": 2 * self.steps}[self.suite]
        return 2 * multiply_adds * passes * self.batch_size


class _Wrapper(nn.Module):
    """What `edt.sample` asks of a model, around another network."""

    def __init__(self, network: nn.Module, like: nn.Module):
        super().__init__()
        self.network = network
        self.config, self.latent_size = like.config, like.latent_size
        self.train(like.training)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def reset_cache(self) -> None:
        """What `edt.sample` asks; nothing is cached."""


class Released(_Wrapper):
    """`PlainEDT` under the interface of our model."""

    def forward(self, hidden_states, timestep, class_labels, keep_masks=None):
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(len(hidden_states))
        sample = self.network(hidden_states, timestep, class_labels, keep_masks or (None, None))
        return SimpleNamespace(sample=sample)


class InParts(_Wrapper):
    """A model on a few samples at a time, in backward too: the N×N matrices of all would not fit."""

    def __init__(self, network: nn.Module, samples: int):
        super().__init__(network, network)
        self.samples = samples

    def forward(self, hidden_states, timestep, class_labels, keep_masks=None):
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(len(hidden_states))
        arguments = [hidden_states, timestep, class_labels, *(keep_masks or ())]
        parts = [
            checkpoint(self._part, *part, use_reentrant=False)
            for part in zip(*(tensor.split(self.samples) for tensor in arguments), strict=True)
        ]
        return SimpleNamespace(sample=torch.cat(parts))

    def _part(self, hidden_states, timestep, class_labels, *keep_masks):
        return self.network(hidden_states, timestep, class_labels, list(keep_masks) or None).sample


def build_ours(case: ModelCase) -> nn.Module:
    """Our model on the CPU with random weights as if trained: fresh ones hardly let the blocks act. In EDT-S/2 a
    block without its bias or its AMM then moves the prediction by 4 to 5 %, autocast to bfloat16 by 0.7 %.
    Shared: copy it before use."""
    return _build_ours(tuple(case.config.items()))


@lru_cache(maxsize=1)
def _build_ours(config: tuple[tuple[str, object], ...]) -> nn.Module:
    from edt.model.transformer import EDTTransformer2DModel

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = EDTTransformer2DModel(**dict(config))
        for name, parameter in model.named_parameters():
            if name.endswith("rel_pos_bias"):
                parameter.normal_(std=3.0)
            elif name.startswith("final_layer.linear."):
                parameter.normal_(std=0.02)  # a prediction about as large as the noise
            elif not parameter.any():
                parameter.normal_(std=0.4 if ".modulation." in name else 0.1)
    return model


def plain_of(config) -> PlainEDT:
    """The released operations for the configuration of a model of ours."""
    names = ("sample_size", "patch_size", "in_channels", "out_channels", "num_classes", "hidden_sizes",
             "num_attention_heads", "depths", "class_dropout_prob", "amm_blocks", "amm_form")  # fmt: skip
    mid_block = None if config["mid_mask"] is None else config["mid_mask"][0]
    return PlainEDT(**{name: config[name] for name in names}, mid_block=mid_block)


def build_released(case: ModelCase) -> Released:
    """The released operations on the CPU, with the weights of `build_ours`. Shared: copy it before use."""
    return _build_released(tuple(case.config.items()))


@lru_cache(maxsize=1)
def _build_released(config: tuple[tuple[str, object], ...]) -> Released:
    from edt.runs.weights import to_released_state_dict

    ours = _build_ours(config)
    plain = plain_of(ours.config)
    missing, unexpected = plain.load_state_dict(to_released_state_dict(ours), strict=False)
    if unexpected or not all(name.endswith("pos_embed") for name in missing):
        raise RuntimeError(f"the two networks differ in parameters: {missing}, {unexpected}")
    return Released(plain, ours)


def released_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of each parameter under its released name, zero where there is none."""
    from edt.runs.weights import to_released_state_dict

    while isinstance(model, InParts):
        model = model.network
    network = model.network if isinstance(model, Released) else model
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in network.named_parameters()
    }
    return gradients if isinstance(model, Released) else to_released_state_dict(model, gradients)


@dataclass(frozen=True)
class Batch:
    """What every implementation of a case is given."""

    x_start: Tensor
    noise: tuple[Tensor, Tensor]  # of the full and of the masked pass
    timestep: Tensor
    labels: Tensor
    keep_masks: list[Tensor]


def draw_batch(case: ModelCase, device: torch.device) -> Batch:
    ours = build_ours(case)
    generator = torch.Generator(device).manual_seed(1)
    B, shape = case.batch_size, (ours.config.in_channels, *ours.latent_size)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (B,), device=device, generator=generator)

    x_start, *noise = torch.randn(3, B, *shape, device=device, generator=generator)
    return Batch(
        x_start,
        tuple(noise),
        integers(1, 1000),  # the likelihood at 0 is a difference that float32 cancels
        integers(0, ours.config.num_classes),
        ours.draw_keep_masks(B, generator=generator),
    )


@dataclass(frozen=True)
class Workload:
    """A model, in evaluation or training mode, on a batch."""

    model: nn.Module
    batch: Batch
    autocast_dtype: torch.dtype | None
    cuda_graph: bool = False  # of each step of sampling, captured once for all calls

    @cached_property
    def _graph(self):
        from edt.diffusion.cuda_graph import GraphedStep

        return GraphedStep(self.model) if self.cuda_graph else False

    def _autocast(self) -> torch.autocast:
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.model.device.type, self.autocast_dtype or torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def predict(self) -> Tensor:
        batch = self.batch
        with self._autocast():
            return self.model(batch.x_start.to(self.model.dtype), batch.timestep, batch.labels).sample

    def losses(self) -> Tensor:
        """Of each sample in the full and the masked pass, (2, B). Their gradients are added to the parameters':
        of the sum of both passes, the mean over the batch; both on the same images, labels and timesteps."""
        from edt.diffusion.process import add_noise, training_losses

        batch, losses = self.batch, []
        with self._autocast():
            for noise, keep_masks in zip(batch.noise, (None, batch.keep_masks), strict=True):
                noised = add_noise(batch.x_start, noise, batch.timestep).to(self.model.dtype)
                output = self.model(noised, batch.timestep, batch.labels, keep_masks).sample
                losses.append(training_losses(output, batch.x_start, noise, batch.timestep)["loss"])
        losses = torch.stack(losses)
        losses.sum(0).mean().backward()
        return losses.detach()

    def training_step(self) -> Callable[[], None]:
        """The released recipe: both losses, one backward, Adan, EMA. The optimiser is the same for all."""
        from diffusers.training_utils import EMAModel
        from pytorch_optimizer import Adan

        parameters = list(self.model.parameters())
        optimizer = Adan(parameters, lr=_LEARNING_RATE, weight_decay=0.0, weight_decouple=False)
        ema = EMAModel(parameters, decay=_EMA_DECAY, foreach=True)

        def step() -> None:
            self.losses()
            optimizer.step()
            ema.step(parameters)
            optimizer.zero_grad()

        return step

    def sample(self, steps: int) -> Tensor:
        """Latents; the same noise in each call, and on each model."""
        from edt.diffusion.sampler import sample

        generator = torch.Generator(self.model.device).manual_seed(2)
        with self._autocast():
            return sample(
                self.model,
                self.batch.labels,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE_SCALE,
                generator=generator,
                progress=False,
                cuda_graph=self._graph,
            )


def on_device(model: nn.Module, case: ModelCase, device: torch.device) -> nn.Module:
    """A copy of the model, in the mode of the suite."""
    return copy.deepcopy(model).to(device).train(case.suite == "train")


def cast_weights(model: nn.Module, dtype: torch.dtype | None) -> None:
    """What autocast to `dtype` would do to the weights of products in each call, in place and once."""
    for module in model.modules():
        if dtype is not None and isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
