"""`EDTPipeline`: class labels → images, as a diffusers pipeline."""

import json
import math
import operator
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from edt_kernels._checks import shown

from ..data.vae import check_latent_channels, decode, load_decoder
from ..diffusion.cuda_graph import GraphedStep
from ..diffusion.process import check_guidance, check_steps, make_scheduler, predict
from ..diffusion.sampler import check_finite, check_scheduler, noise_level, scheduler_step, set_timesteps
from ..files.errors import named_errors
from ..files.text import printable, read_json
from ..model.presets import is_number
from ..model.transformer import AUTO_MODULE, EDTTransformer2DModel, import_code
from ..options import check_count
from ..runs.weights import PIPELINE_INDEX, few, load_checkpoint, weights_folder, weights_variant

# `DiffusionPipeline.from_pretrained(…, trust_remote_code=True)` loads a folder that brings its classes.
_CODE = {
    "pipeline.py": import_code("EDTPipeline"),
    f"transformer/{AUTO_MODULE}.py": import_code("EDTTransformer2DModel"),
}
_CLASS_IN_FOLDER = ["pipeline", "EDTPipeline"]
_TRANSFORMER_IN_FOLDER = [AUTO_MODULE, "EDTTransformer2DModel"]
_TRANSFORMER = ["edt.model", "EDTTransformer2DModel"]  # diffusers looks for ModelMixin in the same module

Label = int | str
Generators = torch.Generator | list[torch.Generator]


class EDTPipeline(DiffusionPipeline):
    """Class labels → images by an `EDTTransformer2DModel`.

    Args:
        transformer: predicts noise and, where out_channels is twice in_channels, the variance; AMM acts in its
            `amm_blocks`.
        scheduler: as released, `edt.make_scheduler()`. Others fit by
            `DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`, such as DDIM, UniPC and Euler, all of
            `edt.diffusion.SOLVERS`; the learned variance, which only DDPM's takes, is split off for them, and
            their timesteps are those of `edt.diffusion.set_timesteps`.
        vae: the autoencoder of the latents; None for models that draw pixels (1 or 3 channels).
        id2label: names of the classes, saved with the pipeline; of "a, b" either name will do, unless another
            class has it too.

    `save_pretrained` writes a folder that `EDTPipeline.from_pretrained` loads, and that
    `DiffusionPipeline.from_pretrained(…, trust_remote_code=True)` loads, from a Hub too, where this package is
    installed.

    Raises:
        ValueError: for a VAE or names that do not fit the transformer.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 (diffusers' own type)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012
    progress_bar: Callable  # what diffusers' is, is not known to a checker

    def __init__(
        self,
        transformer: EDTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        if not isinstance(getattr(transformer, "_orig_mod", transformer), EDTTransformer2DModel):  # or compiled
            raise TypeError(f"transformer is a {type(transformer).__name__}; it must be an EDTTransformer2DModel")
        if not isinstance(scheduler, SchedulerMixin):
            raise TypeError(f"scheduler is a {type(scheduler).__name__}; it must be a scheduler of diffusers")
        if not (vae is None or isinstance(vae, torch.nn.Module)):
            raise TypeError(f"vae is a {type(vae).__name__}; it must be an AutoencoderKL or None")
        config = transformer.config
        if vae is not None:
            check_latent_channels(vae, type(vae).__name__, config.in_channels)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.id2label = _check_names(id2label, config.num_classes)
        self.register_to_config(id2label=self.id2label)
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

    @property
    def labels(self) -> dict[str, int]:
        """Name → class: whole names, then those of them that are separated by commas. A name that several classes
        have, as ImageNet's "crane", is none here."""
        whole = [(names, i) for i, names in self.id2label.items()]
        parts = [(name.strip(), i) for names, i in whole for name in names.split(",")]
        return _of_one_class(whole) | _of_one_class(parts)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to skip the steps that are left."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 250,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_channels: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        callback_on_step_end: Callable[["EDTPipeline", int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cuda_graph: bool | GraphedStep = False,
    ) -> ImagePipelineOutput | tuple:
        """Draws `num_images_per_prompt` images of each label.

        Args:
            class_labels: class numbers (integers), names of `id2label` (strings, "10" too), or a tensor (B,) of
                numbers; None for unconditional models.
            guidance_scale: s of unconditional + s·(conditional − unconditional); 1 is no guidance and runs no
                unconditional pass, at 0 the guided channels are unconditional.
            num_inference_steps: denoising steps; 250 as released.
            generator: of the noise, on any device; a list has one for each image, which then does not depend on
                the others of its batch.
            latents: the noise to begin with, N(0, 1), (B, in_channels, height, width).
            output_type: "pil", "np" (B, height, width, channels), "pt" (B, channels, height, width), both 0 to 1,
                or "latent".
            return_dict: False for a plain tuple.
            guidance_channels: how many of the first channels are guided; by default 3, or all where there are
                fewer, as the released sampler does.
            guidance_interval: (low, high): guidance acts only at noise levels low < σ ≤ high, σ = √((1−ᾱ)/ᾱ), 0.01
                to 157; elsewhere one pass is run instead of two. Source: arXiv 2404.07724.
            callback_on_step_end: called with the pipeline, the step's number, the timestep and a dict of
                `callback_on_step_end_tensor_inputs`; what it returns under "latents" takes their place. It may set
                `pipe._guidance_scale`, to any scale that is an argument here, for the steps that follow.
            cuda_graph: replays the transformer's launches from CUDA graphs, captured in this call; or those of an
                `edt.GraphedStep` of the transformer, which keeps them from call to call.

        After `pipe.transformer.enable_cache(edt.StepCacheConfig(interval=3))` only every third step is full.

        Returns:
            `ImagePipelineOutput` with `images`, or (images,).

        Raises:
            ValueError, TypeError: for an argument that does not fit the model, the scheduler or the VAE; for
                latents or pictures that are not finite, at the end, naming the step.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        config = self.transformer.config
        device = self._execution_device
        labels = self._class_numbers(class_labels, num_images_per_prompt, device)
        guidance_channels = check_guidance(config, guidance_scale, guidance_channels)
        self._check_call(output_type, return_dict, guidance_interval, cuda_graph)
        _check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        pixels = self.vae is None and config.in_channels in (1, 3)
        check_scheduler(self.scheduler, config, clipping=pixels)
        check_steps(num_inference_steps)
        set_timesteps(self.scheduler, num_inference_steps)
        timesteps = self.scheduler.timesteps  # on the CPU, where the schedulers' arithmetic is
        batch_size = num_images_per_prompt if labels is None else len(labels)
        latents = self._noise(latents, generator, batch_size, device)
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, len(timesteps), False
        step = self._stepper(cuda_graph)
        finite = []
        self.transformer.reset_cache()
        try:
            for i, timestep in enumerate(self.progress_bar(timesteps)):
                if self.interrupt:
                    continue
                scale = self._guidance_scale
                if guidance_interval is not None:
                    low, high = guidance_interval
                    scale = scale if low < noise_level(self.scheduler, timestep) <= high else 1.0
                scaled = self.scheduler.scale_model_input(latents, timestep)
                output = step(scaled, timestep, labels, scale, guidance_channels)
                latents = scheduler_step(self.scheduler, output, timestep, latents, generator)
                if callback_on_step_end is not None:
                    known = {"latents": latents}
                    given = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    latents = _from_callback(callback_on_step_end(self, i, timestep, given), latents)
                finite.append(latents.isfinite().all())
            check_finite(latents, finite, timesteps, self.transformer.dtype, self._guidance_scale)
            if output_type == "latent":
                images = latents
            else:
                images = self.image_processor.postprocess(self._pictures(latents), output_type=output_type)
        finally:  # after an exception too: features and offloaded models are let go
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # pyright: ignore[reportArgumentType] - or latents

    def _stepper(self, cuda_graph: bool | GraphedStep) -> Callable[..., Tensor]:
        if isinstance(cuda_graph, GraphedStep):
            if cuda_graph.model is not self.transformer:
                raise ValueError("cuda_graph is a GraphedStep of another model than this pipeline's transformer")
            return cuda_graph
        return GraphedStep(self.transformer) if cuda_graph else partial(predict, self.transformer)

    def _pictures(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return latents
        pictures = decode(latents, self.vae)
        if not pictures.isfinite().all():
            raise ValueError(
                f"vae makes pictures that are not finite, in {str(self.vae.dtype).removeprefix('torch.')}, of "
                "latents that are; decode in float32 or bfloat16: pipe.vae.to(torch.float32)"
            )
        return pictures

    def _class_numbers(self, class_labels, num_images_per_prompt: int, device: torch.device) -> Tensor | None:
        """(B,) int64 on the device; None for an unconditional model."""
        check_count("num_images_per_prompt", num_images_per_prompt)
        num_classes = self.transformer.config.num_classes
        if num_classes == 0:
            if class_labels is not None:
                raise ValueError("class_labels was given to an unconditional model; it must be None")
            return None
        if class_labels is None:
            raise ValueError(f"class_labels is None; a model of {num_classes} classes needs labels or names")
        if isinstance(class_labels, Tensor):
            if class_labels.ndim != 1 or class_labels.is_floating_point() or class_labels.is_complex():
                raise TypeError(
                    f"class_labels is {class_labels.dtype} of shape {tuple(class_labels.shape)}; it must be "
                    "integers (B,)"
                )
            if class_labels.is_meta:
                raise ValueError("class_labels is on meta, which has no values")
            class_labels = class_labels.tolist()  # of bools, which are none, too
        elif not isinstance(class_labels, Sequence | np.ndarray) or isinstance(class_labels, str):
            class_labels = [class_labels]
        elif isinstance(class_labels, bytes | bytearray):
            raise TypeError(f"class_labels is a {type(class_labels).__name__}; names are str")
        elif isinstance(class_labels, np.ndarray) and class_labels.ndim == 0:
            class_labels = class_labels[None]
        numbers = [self._class_number(label) for label in class_labels]
        if not numbers:
            raise ValueError("class_labels is empty; it needs a label for each image")
        if wrong := [number for number in numbers if not 0 <= number < num_classes]:
            found = few([shown(number) for number in wrong])
            raise ValueError(f"class_labels has {found}; they must be 0 to {num_classes - 1}")
        return torch.tensor(numbers, device=device).repeat_interleave(num_images_per_prompt)

    def _class_number(self, label: Label) -> int:
        if isinstance(label, str):
            if label in self.labels:
                return self.labels[label]
            named = [i for i, names in self.id2label.items() if label in map(str.strip, names.split(","))]
            if named:
                raise ValueError(f"class_labels has {shown(label)}, a name of classes {named}; give the number")
            close = get_close_matches(label, self.labels, n=5) or list(self.labels)
            known = few([printable(name) for name in close], 5) or "none: it has no id2label"
            number = f", and for class number {label} give the integer" if label.isdecimal() else ""
            raise ValueError(f"class_labels has {shown(label)}; this pipeline knows the names {known}{number}")
        try:
            if isinstance(label, bool | np.bool_):
                raise TypeError
            return operator.index(label)  # of NumPy's and torch's integers too
        except (TypeError, RuntimeError):  # RuntimeError: a tensor without values
            raise TypeError(f"class_labels has {shown(label)}; it must have integers or names") from None

    def _check_call(self, output_type, return_dict, guidance_interval, cuda_graph) -> None:
        config = self.transformer.config
        if self.transformer.training:
            raise ValueError("transformer is in training mode; call pipe.transformer.eval() first")
        if not isinstance(output_type, str) or output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {shown(output_type)}; it must be 'pil', 'np', 'pt' or 'latent'")
        if self.vae is None and config.in_channels not in (1, 3) and output_type != "latent":
            raise ValueError(
                f"output_type is {shown(output_type)}, but this pipeline has no vae for its latents of "
                f"{config.in_channels} channels; give it one or take 'latent'"
            )
        if type(return_dict) is not bool:
            raise TypeError(f"return_dict is {shown(return_dict)}; it must be True or False")
        if not isinstance(cuda_graph, bool | GraphedStep):
            raise TypeError(f"cuda_graph is {shown(cuda_graph)}; it must be True, False or an edt.GraphedStep")
        if guidance_interval is not None and not (
            isinstance(guidance_interval, tuple | list)
            and len(guidance_interval) == 2
            and is_number(guidance_interval[0])
            and (is_number(guidance_interval[1]) or guidance_interval[1] == math.inf)
            and 0 <= guidance_interval[0] < guidance_interval[1]
        ):
            raise ValueError(
                f"guidance_interval is {shown(guidance_interval)}; it must be None or noise levels (low, high), "
                "0 ≤ low < high"
            )

    def _noise(self, latents, generator, batch_size: int, device: torch.device) -> Tensor:
        shape = (batch_size, self.transformer.config.in_channels, *self.transformer.latent_size)
        each = generator if isinstance(generator, list) else [generator]
        if not (generator is None or all(isinstance(one, torch.Generator) for one in each)):
            raise TypeError(f"generator is {shown(generator)}; it must be a torch.Generator, or a list of them")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator has {len(generator)} generators for {batch_size} images")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif not isinstance(latents, Tensor):
            raise TypeError(f"latents is a {type(latents).__name__}; it must be a tensor {shape}")
        elif not latents.is_floating_point():
            raise TypeError(f"latents is {latents.dtype}; it must be floating-point")
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; it must be {shape}")
        elif latents.is_meta or not latents.isfinite().all():
            raise ValueError("latents has values that are not finite, or none; it must be noise, N(0, 1)")
        return latents.to(device, torch.float32) * self.scheduler.init_noise_sigma

    def load_lora_weights(self, source: str | Path | dict[str, Tensor], **options: Any) -> None:
        """Loads a LoRA adapter into the transformer; needs peft.

        Args:
            source: a folder, a name on a Hub or a state dict.
            options: of `pipe.transformer.load_lora_adapter`, such as adapter_name, or prefix: what the weights'
                names begin with, by default "transformer"; None for those that `save_lora_adapter` wrote.

        Raises:
            ValueError: where there are no weights under the prefix, or peft is missing.
        """
        before = set(getattr(self.transformer, "peft_config", {}))
        self.transformer.load_lora_adapter(source, **{"use_safetensors": True, **options})  # no pickles unasked
        if set(getattr(self.transformer, "peft_config", {})) == before and not options.get("hotswap"):
            prefix = options.get("prefix", "transformer")
            raise ValueError(
                f"source has no LoRA weights with the prefix {prefix!r}; those of save_lora_adapter have none, "
                "take prefix=None"
            )

    def unload_lora_weights(self) -> None:
        """Takes all LoRA adapters out of the transformer."""
        self.transformer.unload_lora()

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The folder's model_index.json, with the installed classes for those that the folder brings."""
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if index.get("_class_name") == _CLASS_IN_FOLDER:
            index["_class_name"] = cls.__name__
            index["transformer"] = _TRANSFORMER
        return loaded

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        super().save_config(save_directory)
        for name, code in _CODE.items():
            file = Path(save_directory, name)
            file.parent.mkdir(exist_ok=True)  # the transformer's is not there yet without its weights
            file.write_text(code)
        if push_to_hub:  # what is there by then
            super().save_config(save_directory, push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        index = json.loads(super().to_json_string())
        index["_class_name"], index["transformer"] = _CLASS_IN_FOLDER, _TRANSFORMER_IN_FOLDER
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


def load_pipeline(
    folder: str | Path, vae: str | None = None, torch_dtype: torch.dtype = torch.float32
) -> EDTPipeline:
    """The pipeline of a folder that `EDTPipeline.save_pretrained` wrote; of other checkpoints, the model that
    `load_checkpoint` finds with the released scheduler.

    Args:
        vae: AutoencoderKL by name or folder, in place of the folder's. A run of training has that of its grids, or
            else that of its data, which name its classes too; if they are still where they were.
        torch_dtype: of the transformer; the VAE is in float32.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`, or for a VAE that does not fit.
    """
    from ..data.shards import MANIFEST, read_manifest  # what training needs, drawing with a pipeline does not
    from ..train.config import CONFIG_FILE, load_config

    folder = Path(folder)
    model = load_checkpoint(folder, torch_dtype=torch_dtype)
    parts, subfolder = {}, None
    if (folder / CONFIG_FILE).is_file():
        config = load_config(folder / CONFIG_FILE)
        vae = vae or config.vae
        if (config.data / MANIFEST).is_file():
            manifest = read_manifest(config.data / MANIFEST)
            if len(manifest.class_names) == model.config.num_classes:
                parts["id2label"] = dict(enumerate(manifest.class_names))
            if vae is None and manifest.extraction is not None:
                vae, subfolder = (manifest.extraction.get(name) for name in ("vae", "vae_subfolder"))
    if vae is not None:
        parts["vae"] = load_decoder(vae, model.config.in_channels, subfolder)
    if not (folder / PIPELINE_INDEX).is_file():
        return EDTPipeline(model, make_scheduler(), **parts)
    for part in ("scheduler/scheduler_config.json", "vae/config.json"):
        if (folder / part).is_file():  # of other JSON than an object diffusers takes a string for a Hub's name
            read_json(folder / part, "checkpoint", dict)
    with named_errors(f"checkpoint {folder}", "is no complete pipeline"):
        variant = weights_variant(weights_folder(folder))
        return EDTPipeline.from_pretrained(
            folder, transformer=model, local_files_only=True, variant=variant, **parts
        )


def _check_callback(callback, tensor_inputs, known: list[str]) -> None:
    if not (callback is None or callable(callback)):
        raise TypeError(f"callback_on_step_end is a {type(callback).__name__}; it must be callable")
    if (
        isinstance(tensor_inputs, str)
        or not isinstance(tensor_inputs, Sequence)
        or not all(isinstance(name, str) for name in tensor_inputs)
    ):
        raise TypeError(
            f"callback_on_step_end_tensor_inputs is {shown(tensor_inputs)}; it must be a list of names"
        )
    if unknown := set(tensor_inputs) - set(known):
        raise ValueError(f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; it takes {known}")


def _from_callback(returned: object, latents: Tensor) -> Tensor:
    """The latents that a callback returned, or else those that it was given."""
    if returned is None:
        return latents
    if not isinstance(returned, dict):
        raise TypeError(f"callback_on_step_end returned a {type(returned).__name__}; it must be a dict or None")
    new = returned.get("latents", latents)
    if not isinstance(new, Tensor) or not new.is_floating_point() or new.shape != latents.shape or new.is_meta:
        given = f"{new.dtype} {tuple(new.shape)}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
        raise ValueError(
            f"callback_on_step_end returned latents that are {given}; they must be floating-point "
            f"{tuple(latents.shape)}"
        )
    return new.to(latents)


def _of_one_class(names: list[tuple[str, int]]) -> dict[str, int]:
    classes = defaultdict(set)
    for name, i in names:
        classes[name].add(i)
    return {name: min(numbers) for name, numbers in classes.items() if len(numbers) == 1}


def _check_names(id2label, num_classes: int) -> dict[int, str]:
    """With integer keys, which JSON turns into strings."""
    if id2label is None:
        return {}
    try:
        names = {int(key) if isinstance(key, str) else operator.index(key): name for key, name in id2label.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise TypeError(f"id2label is {shown(id2label)}; it must be a dict of class numbers and names") from None
    if len(names) < len(id2label):
        raise ValueError(f"id2label is {shown(id2label)}; it must have one name for a class")
    wrong = [(key, name) for key, name in names.items() if not 0 <= key < num_classes or not isinstance(name, str)]
    if wrong:
        raise ValueError(f"id2label has {shown(wrong[:3])}; it must have names of classes 0 to {num_classes - 1}")
    return names
