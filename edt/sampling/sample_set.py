"""A set of drawn images in a folder: `edt sample`, resumable and spread over processes."""

import json
import math
import os
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from ..data import pictures
from ..devices import torch_device
from ..diffusion.cuda_graph import GraphedStep
from ..diffusion.process import check_guidance, check_guidance_scale
from ..evaluation.image_sets import IMAGES, SETTINGS, read_settings
from ..files.lock import open_folder
from ..files.outputs import half_files, new_file, sha256, write_json
from ..files.text import printable
from ..interrupt import StopRequest
from ..model.presets import NUM_TRAIN_TIMESTEPS, amm_placement
from ..model.step_cache import StepCacheConfig
from ..model.transformer import EDTTransformer2DModel
from ..options import check_types, renamed
from ..runs.weights import few
from ..train.randomness import keyed_generator
from .pipeline import EDTPipeline, load_pipeline

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
_GRID_ROWS = _GRID_COLUMNS = 20
_TOKENS_PER_CALL = 512  # on a CPU; more are little faster, and one image takes as long as so many
_IMAGE_NAME = re.compile(r"([0-9]{6,8})\.png")
_MAX_IMAGES = 10_000_000  # hours before the first is drawn, on looking which are there


@renamed(steps="num_inference_steps")
@dataclass(frozen=True)
class SampleOptions:
    """Draws images from a checkpoint: a folder of PNGs, all of them in samples.npz (arr_0, labels), a grid.

    The same command goes on where it was stopped. Started by accelerate launch or torchrun (-m edt sample …),
    several processes share the work. Every image has its own noise, whatever the batch size and the number of
    processes.
    """

    checkpoint: Path
    """The folder of a pipeline, a run of edt train or one of its checkpoints, or what save_pretrained wrote."""
    labels: tuple[str, ...] = ()
    """The classes to draw: names that the pipeline knows, numbers, or ranges such as 0-9. Where classes are named
    by numbers, these are taken for names."""
    classes: Literal["all"] | None = None
    """Instead of --labels, draw every class of the model."""
    num_per_class: int = 10
    """The number of images of each class, or of an unconditional model."""
    num_images: int | None = None
    """Instead of --num-per-class, the number of images in all, of the classes in turn."""
    num_inference_steps: int = 250
    """Denoising steps, spread over the 1000 of training."""
    scheduler: Literal["ddpm", "ddim", "dpm++", "unipc", "euler"] = "ddpm"
    """The sampler. ddpm is the released one; the others need fewer steps."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""
    guidance_channels: int | None = None
    """The number of channels that guidance acts on. By default it is 3, or all where there are fewer."""
    guidance_interval: tuple[float, float] | None = None
    """The noise levels, low and high, between which guidance acts. By default it acts at all, 0.01 to 157."""
    cache_interval: int | None = None
    """For speed: one of so many steps is computed in full, the others reuse features of it. By default all are."""
    cache_schedule: Literal["uniform", "non-uniform"] = "uniform"
    """Full steps are every so many-th (uniform), or as many in all, closer early on (non-uniform)."""
    cache_reuse: Literal["deep", "encoder"] = "deep"
    """What the other steps reuse: deep is all before the last stage, encoder is the encoder."""
    amm: bool = True
    """Modulate attention (AMM)."""
    amm_blocks: tuple[int, ...] | None = None
    """The blocks with AMM. By default those published for model and guidance scale, else the checkpoint's own."""
    vae: str | None = None
    """The AutoencoderKL, by name or folder, for latents of a checkpoint that has none. By default a run's is that
    of its grids, or else of its data."""
    seed: int = 0
    """The seed of the noise."""
    output: Path = Path("outputs/samples")
    """The folder for images, samples.npz and samples.png."""
    overwrite: bool = False
    """Remove what another edt sample drew into --output, by its samples.json, and nothing else."""
    batch_size: int = 250
    """The number of images drawn at a time."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """The dtype of the transformer's weights. The VAE is in float32."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """The device, cuda or cpu. By default it is the GPU if there is one."""
    cuda_graph: bool = False
    """On a GPU, replay the network's launches from CUDA graphs."""

    def check(self) -> None:
        """Raises ValueError for an option that cannot work with any model."""
        check_types(self)
        for name in ("num_per_class", "num_images", "batch_size", "cache_interval"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 1 <= self.num_inference_steps <= NUM_TRAIN_TIMESTEPS:
            raise ValueError(
                f"num_inference_steps is {self.num_inference_steps}; it must be 1 to {NUM_TRAIN_TIMESTEPS}"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
        check_guidance_scale(self.guidance_scale)
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError(
                f"guidance_interval is {self.guidance_interval}; it must be (low, high), 0 ≤ low < high"
            )
        if self.amm_blocks is not None and not self.amm:
            raise ValueError("amm_blocks was given with --no-amm; leave out one of them")
        if self.cuda_graph and torch_device(self.device).type == "cpu":
            raise ValueError("cuda_graph is for a GPU; leave it out, or take --device cuda")
        torch_device(self.device)


def draw_samples(options: SampleOptions, stop: StopRequest) -> int:
    """Draws the images that are not there yet, then writes samples.npz and samples.png.

    Returns:
        The number of images; less than asked for where `stop` came first.

    Raises:
        ValueError: for options that do not fit the checkpoint, or an output that has another command's images.
        FileNotFoundError, OSError: where the checkpoint cannot be read or the output not be written.
    """
    options.check()
    device = torch_device(options.device)
    # Of several processes one may finish hours before the others.
    processes = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=2))
    rank, num_processes = processes.process_index, processes.num_processes
    if device.type == "cuda" and num_processes > 1:
        device = torch.device("cuda", processes.local_process_index)

    pipe = prepare_pipeline(options)
    classes = chosen_classes(options, pipe)
    num_images = options.num_images or options.num_per_class * len(classes)
    if num_images > _MAX_IMAGES:
        asked = "num_images" if options.num_images else f"num_per_class for {len(classes)} classes"
        raise ValueError(f"{asked} makes more images than a set has at most, {_MAX_IMAGES}")
    if rank == 0 and pipe.labels:
        _say_classes(pipe, classes)
    labels = np.resize(classes, num_images)
    settings = _settings(options, pipe, classes, num_images)
    lock = open_folder(options.output) if rank == 0 else nullcontext()
    with lock:
        if rank == 0:
            _begin_or_go_on(options, settings)
        processes.wait_for_everyone()
        begun = read_settings(options.output)
        if _differences(begun, settings):  # a run of training that goes on meanwhile
            raise ValueError(f"checkpoint {options.checkpoint} is not the same for all processes")
        size = begun.get("images_per_call", options.batch_size)
        drawn = _draw_missing(options, pipe, classes, labels, size, processes, device, stop)
    if num_processes > 1:
        processes.destroy_process_group()
    return drawn


def _draw_missing(options, pipe, classes, labels: np.ndarray, size: int, processes, device, stop) -> int:
    """This process' share of the images, `size` at once, and on the first the files of all of them."""
    rank, num_processes, num_images = processes.process_index, processes.num_processes, len(labels)

    pipe.to(device)
    own = [i for i in range(rank, num_images, num_processes) if not _image_file(options.output, i).is_file()]
    calls = [part for batch in _split(own, options.batch_size) for part in _split(batch, size)]
    graph = GraphedStep(pipe.transformer) if options.cuda_graph else False

    def save(number: int, image: Image.Image) -> None:
        with new_file(_image_file(options.output, number)) as file:
            image.save(file, format="PNG")

    with (
        tqdm(
            total=len(calls) * options.num_inference_steps, desc="sampling", unit="step", disable=rank > 0
        ) as bar,
        ThreadPoolExecutor() as savers,  # compression runs without Python's lock
    ):
        for call in calls:
            if stop:
                break
            # On a CPU all calls are of one size; the last image stands in for what is missing.
            filled = call + call[-1:] * (size - len(call)) if device.type == "cpu" else call
            images = _draw(pipe, options, filled, labels[filled], device, graph, stop, bar)
            list(savers.map(save, call, images))

    processes.wait_for_everyone()
    drawn = sum(_image_file(options.output, i).is_file() for i in range(num_images))
    if rank == 0 and drawn == num_images:
        _write_npz(options.output, labels)
        _write_grid(options, pipe, classes, num_images)
    processes.wait_for_everyone()
    return drawn


def prepare_pipeline(options: SampleOptions) -> EDTPipeline:
    """The checkpoint's pipeline with the scheduler and the AMM blocks of the options."""
    pipe = load_pipeline(options.checkpoint, options.vae, getattr(torch, options.dtype))
    config = pipe.transformer.config
    check_guidance(config, options.guidance_scale, options.guidance_channels)
    if pipe.vae is not None:
        pipe.vae.enable_slicing()  # the activations of one image are large
    elif config.in_channels not in (1, 3):
        raise ValueError(
            f"vae is None; the checkpoint draws latents of {config.in_channels} channels, which need the "
            "AutoencoderKL that they were made with, such as --vae stabilityai/sd-vae-ft-ema"
        )
    scheduler = getattr(diffusers, SCHEDULERS[options.scheduler])
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)  # one bar for all
    if options.amm_blocks is not None or not options.amm:
        blocks = options.amm_blocks or ()
    else:
        blocks = amm_placement(config, options.guidance_scale)
    try:
        pipe.transformer.set_amm_blocks(blocks)
    except ValueError as error:  # which calls them blocks
        raise ValueError(f"amm_{error}") from error
    if options.cache_interval is not None:
        config = {"interval": options.cache_interval, "reuse": options.cache_reuse}
        try:
            if options.cache_schedule == "uniform":
                cache = StepCacheConfig(**config)
            else:
                cache = StepCacheConfig.non_uniform(options.num_inference_steps, **config)
        except ValueError as error:  # which calls it interval
            raise ValueError(f"cache_{error}") from error
        pipe.transformer.enable_cache(cache)
    return pipe


def chosen_classes(options: SampleOptions, pipe: EDTPipeline) -> list[int]:
    """The classes of --labels or --classes, in their order; [0] for an unconditional model."""
    num_classes = pipe.transformer.config.num_classes
    if num_classes == 0:
        if options.labels or options.classes:
            raise ValueError("labels were given for an unconditional model; leave out --labels and --classes")
        return [0]
    if bool(options.labels) == bool(options.classes):
        raise ValueError("labels: give either --labels, such as --labels 3 7 or 0-9, or --classes all")
    if options.classes:
        return list(range(num_classes))
    return [number for label in options.labels for number in _classes_of(label, pipe.labels, num_classes)]


def _classes_of(label: str, names: dict[str, int], num_classes: int) -> list[int]:
    """A name's class; else those of a number or a range, which are names where all classes are named by numbers,
    or all in the range."""
    if label in names:
        return [names[label]]
    span = re.fullmatch(r"(-?[0-9]{1,18})(?:-([0-9]{1,18}))?", label)
    if span is None:
        needed = "this model's classes have no names, so it must be a number, or a range such as 0-9"
        if names:
            needed = (
                f"it must be a number, a range such as 0-9, or a name of one class, such as {next(iter(names))!r}"
            )
        raise ValueError(f"labels has {label[:80]!r}; {needed}")
    first, last = int(span[1]), int(span[2] or span[1])
    numbered = {int(name): number for name, number in names.items() if re.fullmatch("[0-9]{1,18}", name)}
    all_named = len(set(numbered.values())) == num_classes
    if not all_named and not 0 <= first <= last < num_classes:
        raise ValueError(f"labels has {label}; this model has classes 0 to {num_classes - 1}")
    if not first <= last < first + max(num_classes, 1):
        raise ValueError(f"labels has {label}; this model has {num_classes} classes")
    asked = range(first, last + 1)
    named = [number for number in asked if number in numbered]
    if len(named) == len(asked):
        return [numbered[number] for number in asked]
    if all_named:
        missing = next(number for number in asked if number not in numbered)
        raise ValueError(
            f"labels has {label}; this model's classes are named by numbers, {min(numbered)} to {max(numbered)}, "
            f"and {missing} is none of them"
        )
    if named:
        raise ValueError(
            f"labels has {label}, of which {few(named)} are names of classes and others are not; give each alone"
        )
    return list(asked)


def _say_classes(pipe: EDTPipeline, classes: list[int]) -> None:
    """On stderr, where a class's name is not its number."""
    names = {number: pipe.id2label.get(number, str(number)) for number in classes}
    if any(name != str(number) for number, name in names.items()):
        drawn = [f"{printable(name)} (number {number})" for number, name in names.items()]
        print(f"edt: draws {'class' if len(drawn) == 1 else 'classes'} {few(drawn, 10)}", file=sys.stderr)


# What the images do not depend on, or what is recorded as what came of it.
_NOT_SETTINGS = ("checkpoint", "labels", "classes", "num_per_class", "num_images", "amm", "amm_blocks", "vae",
                 "output", "overwrite", "batch_size", "device", "cuda_graph", "num_inference_steps")  # fmt: skip


def _settings(options: SampleOptions, pipe: EDTPipeline, classes: list[int], num_images: int) -> dict:
    """All that the images depend on; what was drawn with other settings does not belong to the set."""
    device = torch_device(options.device)
    settings = {
        "checkpoint": str(options.checkpoint),
        "weights": _source(pipe.transformer),
        "vae": None if pipe.vae is None else _source(pipe.vae),
        "classes": classes,
        "num_images": num_images,
        "steps": options.num_inference_steps,  # under this name since the first version
        **{name: value for name, value in asdict(options).items() if name not in _NOT_SETTINGS},
        "amm_blocks": pipe.transformer.config.amm_blocks,
        "device": device.type,
    }
    if device.type == "cpu":
        settings["images_per_call"] = _images_per_call(pipe.transformer)
    return json.loads(json.dumps(settings))  # as it will be read again


def _source(model) -> dict[str, str] | str:
    """What a loaded model is known by: the checksums of its files, or its name on a Hub."""
    name = model.config._name_or_path
    return {file.name: sha256(file) for file in sorted(Path(name).glob("*.safetensors"))} or str(name)


def _begin_or_go_on(options: SampleOptions, settings: dict) -> None:
    """Writes the settings, and where that was asked for removes what was drawn with others.

    What is there is ours where a samples.json says so: the first num_images names that such a set has.

    Raises:
        ValueError: for images of other settings, a samples.json of another program, or what is no set's under a
            name that this set needs.
    """
    folder, numbers = options.output, _numbers_of_files(options.output)
    drawn_with = read_settings(folder) if os.path.lexists(folder / SETTINGS) else None
    written = drawn_with["num_images"] if drawn_with else 0
    others = [name for name, number in numbers.items() if written <= number < settings["num_images"]]
    if not drawn_with:
        others += [f"{IMAGES}/{file.name}" for file in folder.glob(f"{IMAGES}/*.png")]
    if others:
        raise ValueError(
            f"output {folder} has {few(sorted({*others}))}, drawn with other settings (unknown): by no {SETTINGS} "
            "did edt sample write that; move it, or give another output"
        )
    ours = [name for name, number in numbers.items() if number < written]
    changed = _differences(drawn_with, settings) if drawn_with else []
    replaced = changed and any(name.endswith(".png") for name in ours)
    # A set goes on as it began: earlier versions drew small ones fewer at once.
    if not changed and drawn_with and drawn_with.get("images_per_call") in range(1, 1025):
        settings["images_per_call"] = drawn_with["images_per_call"]
    if replaced and not options.overwrite:
        raise ValueError(
            f"output {folder} has images drawn with other settings ({', '.join(changed)}); give another "
            "output, or --overwrite"
        )
    for file in [*half_files(folder), *half_files(folder / IMAGES)]:  # of a drawing that was killed
        file.unlink()
    for name in ours if replaced else ():
        (folder / name).unlink()
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, settings)


def _numbers_of_files(folder: Path) -> dict[str, int]:
    """Of the names there that a set has, the number of the image; of those beside the images, 0."""
    numbers = {name: 0 for name in ("samples.npz", "samples.png") if os.path.lexists(folder / name)}
    for file in folder.glob(f"{IMAGES}/*"):
        if (match := _IMAGE_NAME.fullmatch(file.name)) and file.name == _image_file(folder, int(match[1])).name:
            numbers[f"{IMAGES}/{file.name}"] = int(match[1])
    return numbers


def _differences(drawn_with: dict, settings: dict) -> list[str]:
    """Names of the settings with which images were not drawn.

    A checkpoint may have moved, and a set may grow: its first images stay what they are.
    """
    names = settings.keys() - {"checkpoint", "images_per_call"}
    if drawn_with["num_images"] <= settings["num_images"]:
        names -= {"num_images"}
    return sorted(name for name in names if drawn_with.get(name) != settings[name])


def _split(items: list[int], size: int) -> list[list[int]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def _images_per_call(model: EDTTransformer2DModel) -> int:
    """How many images the network gets at once on a CPU, whatever the batch and however many are asked for: the
    rounding of its matrix products depends on how many rows they have."""
    num_tokens = math.prod(model.latent_size) // model.config.patch_size**2
    return max(1, _TOKENS_PER_CALL // num_tokens)


def _draw(pipe, options, numbers: list[int], labels: np.ndarray, device, graph, stop: StopRequest, bar) -> list:
    """The images of these numbers, as PIL has them; none where `stop` came first."""
    conditional = pipe.transformer.config.num_classes > 0

    def on_step(pipe, step, timestep, tensors):
        pipe._interrupt = bool(stop)
        bar.update()
        return tensors

    images = pipe(
        torch.from_numpy(labels) if conditional else None,
        guidance_scale=options.guidance_scale,
        num_inference_steps=options.num_inference_steps,
        num_images_per_prompt=1 if conditional else len(numbers),
        generator=[keyed_generator(device, options.seed, i) for i in numbers],
        guidance_channels=options.guidance_channels,
        guidance_interval=options.guidance_interval,
        callback_on_step_end=on_step,
        cuda_graph=graph,
    ).images
    return [] if pipe.interrupt else images


def _image_file(folder: Path, number: int) -> Path:
    return folder / IMAGES / f"{number:06}.png"


def _read(folder: Path, number: int) -> np.ndarray:
    """(H, W, C) uint8."""
    with Image.open(_image_file(folder, number)) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _write_npz(folder: Path, labels: np.ndarray) -> None:
    """arr_0 (N, H, W, C) uint8 and labels (N,), as np.savez would; only one image is in memory."""
    shape = (len(labels), *_read(folder, 0).shape)
    with new_file(folder / "samples.npz") as new, zipfile.ZipFile(new, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for i in tqdm(range(len(labels)), desc="samples.npz", unit="image", disable=len(labels) < 1000):
                pixels = _read(folder, i)
                if (pixels.dtype, pixels.shape) != (np.uint8, shape[1:]):
                    raise ValueError(
                        f"{_image_file(folder, i)} is {pixels.dtype} {pixels.shape}, the first image is "
                        f"{shape[1:]}; remove it, and the same command draws it anew"
                    )
                file.write(pixels.tobytes())
        with archive.open("labels.npy", "w") as file:
            np.lib.format.write_array(file, labels)


def _write_grid(options: SampleOptions, pipe: EDTPipeline, classes: list[int], num_images: int) -> None:
    """The first images of the first classes."""
    numbers = [i for i in range(min(num_images, len(classes) * _GRID_COLUMNS)) if i % len(classes) < _GRID_ROWS]
    images = np.stack([_read(options.output, i) for i in numbers])
    labels = np.array([classes[i % len(classes)] for i in numbers])
    title = f"AMM {'on' if pipe.transformer.config.amm_blocks else 'off'}, guidance {options.guidance_scale:g}, "
    steps, scheduler = options.num_inference_steps, options.scheduler
    title += f"{steps} step{'s' * (steps > 1)}" + ("" if scheduler == "ddpm" else f" of {scheduler}")
    if (count := len(set(classes))) > len(set(labels)):
        title += f"\n{len(set(labels))} of {count} classes"
    conditional = pipe.transformer.config.num_classes > 0
    names = {i: pipe.id2label.get(i, str(i)) for i in classes} if conditional else None
    with new_file(options.output / "samples.png") as file:
        pictures.save_samples(file, images, labels, title, names)
