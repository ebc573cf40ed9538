"""Denoising steps as replays of CUDA graphs: one launch for the host where the model needs hundreds."""

from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from ..model.step_cache import NOTHING, Features, StepCache, StepCacheConfig
from ..model.transformer import EDTTransformer2DModel
from .process import check_floating, check_guidance, predict


@dataclass(eq=False)
class _Captured:
    """Graphs of one shape: what they read, what they write, and the features that the full one leaves."""

    latents: Tensor
    timestep: Tensor
    class_labels: Tensor | None
    full: torch.cuda.CUDAGraph = field(init=False)
    full_output: Tensor = field(init=False)
    features: Features = NOTHING
    cached: torch.cuda.CUDAGraph = field(init=False)  # with a step cache
    cached_output: Tensor = field(init=False)


class GraphedStep:
    """step(latents, timestep, class_labels) → `edt.diffusion.predict` of the model and them, replayed.

    Model and guidance are captured at the first call of each shape, guidance and autocast dtype, after a warm-up;
    with a step cache enabled as two graphs, of a full step and of one that reuses the features which the full one
    leaves in place. Each call copies latents, timestep and labels to where the graphs read them, so that none of
    them is baked in, and none is checked. Each graph keeps its own memory for as long as this object lives.

    A graph is what the model was: weights may change in place, but after another `set_amm_blocks`, `.to()` or
    load of weights make a new object. It counts the model's step cache on as a call of the model does, and
    `reset_cache` begins a new sampling here too.

        step = GraphedStep(model)
        for timestep in scheduler.timesteps:
            output = step(latents, timestep, class_labels, guidance_scale=2.0)

    Raises:
        TypeError: for what is no `EDTTransformer2DModel`; of compiled ones, those of `model.compile()` are.
        ValueError: for a model that is not on a GPU, or in training mode.
    """

    def __init__(self, model: EDTTransformer2DModel):
        if not isinstance(model, EDTTransformer2DModel):
            raise TypeError(f"model is a {type(model).__name__}; it must be an EDTTransformer2DModel")
        if model.device.type != "cuda":
            raise ValueError(f"model is on {model.device}; CUDA graphs need it on a GPU")
        self.model = model
        self._captured: dict[tuple, _Captured] = {}

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_channels: int | None = None,
    ) -> Tensor:
        """Arguments as of `edt.diffusion.predict`; the timestep is one number or a tensor of one, on any device.

        Raises:
            ValueError: in training mode; for a timestep of several numbers; and, at a first call, as the model.
            TypeError, ValueError: for guidance that does not fit the model, or latents that are none.
        """
        guidance = (guidance_scale, check_guidance(self.model.config, guidance_scale, guidance_channels))
        check_floating(latents=latents)
        if not (class_labels is None or isinstance(class_labels, Tensor)):
            raise TypeError(f"class_labels is a {type(class_labels).__name__}; it must be a tensor (B,)")
        if not isinstance(timestep, (Tensor, Real)):
            raise TypeError(f"timestep is a {type(timestep).__name__}; it must be a tensor or a number")
        if self.model.training:
            raise ValueError("model is in training mode; call model.eval() first")
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}; a graph takes one for all samples")
        cache = self.model._step_cache
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        labels_kind = None if class_labels is None else (class_labels.shape, class_labels.dtype)
        reuse = None if cache is None else cache.config.reuse
        key = (latents.shape, latents.dtype, labels_kind, guidance, autocast, reuse)
        if key not in self._captured:
            self._captured[key] = self._capture(latents, class_labels, guidance, autocast, reuse)
        captured = self._captured[key]
        captured.latents.copy_(latents)
        # A copy from the host would wait for the GPU.
        captured.timestep.fill_(timestep.reshape(()) if isinstance(timestep, Tensor) else timestep)
        if captured.class_labels is not None and class_labels is not None:
            captured.class_labels.copy_(class_labels)
        if cache is not None and cache.begin_step(captured) is not NOTHING:
            captured.cached.replay()
            return captured.cached_output.clone()  # a scheduler may keep it beyond the next replay
        captured.full.replay()
        if cache is not None:
            cache.store(*captured.features)
        return captured.full_output.clone()

    def _capture(self, latents, class_labels, guidance, autocast, reuse) -> _Captured:
        device = self.model.device
        captured = _Captured(
            latents=latents.to(device, copy=True),
            timestep=torch.zeros((), device=device),
            class_labels=None if class_labels is None else class_labels.to(device, copy=True),
        )

        def step() -> Tensor:
            return predict(self.model, captured.latents, captured.timestep, captured.class_labels, *guidance)

        def capture() -> tuple[torch.cuda.CUDAGraph, Tensor]:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = step()
            return graph, output

        # A cache of its own, whose first step is full and all others reuse it, for the model to run both kinds.
        cache = None if reuse is None else StepCache(StepCacheConfig(full_steps=(0,), reuse=reuse))
        models_cache, self.model._step_cache = self.model._step_cache, cache
        try:
            # Copies of weights in autocast's own cache would be freed while the graph needs them.
            no_copies = torch.autocast("cuda", dtype=autocast, enabled=autocast is not None, cache_enabled=False)
            with torch.cuda.device(device), no_copies:
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):  # compiles kernels and allocates workspaces outside of the capture
                    for _ in range(2):  # a full step, and one that reuses it
                        step()
                torch.cuda.current_stream().wait_stream(stream)
                if cache is not None:
                    cache.reset()
                captured.full, captured.full_output = capture()
                if cache is not None:
                    captured.features = cache.features
                    captured.cached, captured.cached_output = capture()
        finally:
            self.model._step_cache = models_cache
        return captured
