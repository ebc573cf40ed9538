"""A small EDT from nothing to pictures: trains on real handwritten digits, samples, judges, reports."""

import os
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from edt_kernels._backend import select_backend

from ..data import pictures
from ..data.dataset import write_dataset
from ..data.digits import NUM_CLASSES, from_uint8, load_split_digits, to_uint8
from ..data.shards import MANIFEST, read_manifest
from ..devices import torch_device
from ..diffusion.process import check_guidance_scale, make_scheduler
from ..diffusion.sampler import sample
from ..files.lock import open_folder
from ..files.outputs import write_json
from ..files.text import read_json
from ..interrupt import StopRequest, stop_on_interrupt
from ..model.presets import NUM_TRAIN_TIMESTEPS, PRESETS
from ..model.transformer import EDTTransformer2DModel
from ..options import check_types, renamed
from ..runs.checkpoint import CHECKPOINTS, list_checkpoints
from ..runs.log import METRICS_FILE, read_metrics
from ..runs.plots import plot_runs
from ..runs.weights import few, load_checkpoint
from ..train.config import CONFIG_FILE, TrainConfig, load_config, recipe
from ..train.trainer import train
from .judge import Judge

PRESET = "EDT-digits"
_STRIP_FRAMES = 12
_MAX_PER_CLASS = 10_000  # drawn at once
_REPORT = "report.json"
_PICTURES = ("samples_amm_off.png", "samples_amm_on.png", "samples_guided.png", "denoising.png", "samples.npz",
             *(f"digit_{digit}.png" for digit in range(NUM_CLASSES)))  # fmt: skip
_MODEL = ("config.json", "diffusion_pytorch_model.safetensors")
# Of the run's configuration, what a demo's options decide.
_OPTIONS_OF_RUN = ("data", "output", "steps", "decay_steps", "batch_size", "learning_rate", "seed", "device",
                   "checkpoint_every", "precision")  # fmt: skip


@renamed(sampling_steps="num_inference_steps")
@dataclass(frozen=True)
class DemoOptions:
    """Trains a small EDT on real handwritten digits, draws digits with it and judges them.

    The command needs pip install 'edt-kernels[train]'.
    """

    output: Path = Path("outputs/demo")
    """The folder for pictures, samples, checkpoint and report."""
    steps: int = 1800
    """The number of training steps."""
    batch_size: int = 64
    """Images in a training step. Each takes part in the full and in the masked pass."""
    learning_rate: float = 2e-3
    """Adan's learning rate after a short warm-up. It falls linearly to 0."""
    num_per_class: int = 50
    """The number of images to draw of each digit, for each variant."""
    num_inference_steps: int = 100
    """Denoising steps, evenly spaced over the 1000 noise levels of training."""
    guidance_scale: float = 1.5
    """Classifier-free guidance of the third variant; 1 is none."""
    seed: int = 0
    """The seed of everything random. A run on the CPU repeats exactly on the same machine."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """The device, cuda or cpu. By default it is the GPU if there is one."""
    quick: bool = False
    """Take few steps and images, to see in seconds that everything runs. The digits will be noise."""

    def check(self) -> None:
        """Raises ValueError for an option that cannot work; called before anything is spent."""
        check_types(self)
        for name in ("steps", "batch_size"):
            if not 1 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1 and below 2**63")
        if not 2 <= self.num_per_class <= _MAX_PER_CLASS:
            raise ValueError(
                f"num_per_class is {self.num_per_class}; it must be at least 2, for a spread, and at most "
                f"{_MAX_PER_CLASS}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be 0 to 2**63 - 1")
        if not 1 <= self.num_inference_steps <= NUM_TRAIN_TIMESTEPS:
            raise ValueError(
                f"num_inference_steps is {self.num_inference_steps}; it must be 1 to {NUM_TRAIN_TIMESTEPS}"
            )
        if not 0 < self.learning_rate <= 1e6:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be positive, and at most 1e6")
        check_guidance_scale(self.guidance_scale)
        torch_device(self.device)


class SamplingInterruptedError(Exception):
    """Ends sampling between two steps."""


def digits_folder(folder: Path) -> Path:
    """The training digits as a data folder for `edt train`, written where it is not there yet.

    Raises:
        ValueError, FileExistsError: where the folder has other data, or other files.
    """
    digits = load_split_digits()
    if not (folder / MANIFEST).is_file():
        write_dataset(folder, to_uint8(digits.train_images).transpose(0, 3, 1, 2), digits.train_labels)
    manifest = read_manifest(folder / MANIFEST)
    if (manifest.kind, tuple(manifest.shape), manifest.count) != ("pixels", (1, 8, 8), len(digits.train_labels)):
        raise ValueError(f"data {folder} has other data than the digits; give another output")
    return folder


def train_config(options: DemoOptions, output: Path) -> TrainConfig:
    """The recipe of the digits with the demo's options."""
    return recipe(
        "digits",
        data=options.output / "data",
        output=output,
        steps=options.steps,
        decay_steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        device=options.device,
        checkpoint_every=max(1, options.steps // 3),
        keep_checkpoints=1,
        log_every=1,
        trackers=(),
        sample_every=0,
    )


def train_digits(config: TrainConfig, stop: StopRequest) -> tuple[EDTTransformer2DModel, dict[str, list[float]]]:
    """Trains, or goes on with the same run; the model with averaged weights, and the losses of each step."""
    _make_room(config)
    digits_folder(config.data)
    checkpoint = train(config, stop)
    metrics = read_metrics(config.output / METRICS_FILE)
    losses = {name: [line[f"{name}_loss"] for line in metrics if f"{name}_loss" in line]
              for name in ("full", "masked")}  # fmt: skip
    return load_checkpoint(checkpoint / "ema").to(torch_device(config.device)), losses


def _make_room(config: TrainConfig) -> None:
    """Removes a demo's run of other options, or a finished one, so that this one begins anew.

    Raises:
        ValueError: for another run than a demo's, which is kept.
    """
    if not (config.output / CONFIG_FILE).is_file():
        return
    with open_folder(config.output):  # no other process trains there
        saved = load_config(config.output / CONFIG_FILE)
        asked = replace(config, recipe=None, precision=saved.precision).absolute()
        if replace(saved, **{name: getattr(asked, name) for name in _OPTIONS_OF_RUN}) != asked:
            raise ValueError(
                f"output {config.output.parent} has in {config.output.name} a run of edt train that is no demo's; "
                "give another output"
            )
        checkpoints = list_checkpoints(config.output / CHECKPOINTS)
        if saved == asked and all(step < config.steps for step, _ in checkpoints[-1:]):
            return
        for _, folder in checkpoints:
            shutil.rmtree(folder)
        for name in (METRICS_FILE, CONFIG_FILE):
            (config.output / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Variant:
    """A way of sampling the trained model."""

    name: str
    amm: bool
    guidance_scale: float = 1.0


def draw(
    model: EDTTransformer2DModel, variant: Variant, labels: np.ndarray, options: DemoOptions, stop: StopRequest
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Images (N, H, W, C) uint8, and (timestep, the first image of each class) at points on the way there.

    Every variant starts from the same noise, so that their pictures compare one to one.
    """
    model.set_amm_blocks(PRESETS[PRESET]["amm_blocks"] if variant.amm else ())
    firsts = np.unique(labels, return_index=True)[1]
    shown = set(np.linspace(0, options.num_inference_steps - 1, _STRIP_FRAMES).round().astype(int))
    timesteps = make_scheduler(options.num_inference_steps).timesteps.tolist()
    strip = []
    with tqdm(total=options.num_inference_steps, desc=f"sampling, {variant.name}", unit="step") as bar:

        def on_step(step: int, latents: Tensor) -> None:
            if stop:
                raise SamplingInterruptedError
            bar.update()
            if step in shown:
                strip.append((timesteps[step], to_uint8(latents[firsts].cpu().numpy())))

        latents = sample(
            model,
            torch.from_numpy(labels),
            num_inference_steps=options.num_inference_steps,
            guidance_scale=variant.guidance_scale,
            guidance_channels=1,
            generator=torch.Generator().manual_seed(options.seed),
            progress=False,
            on_step=on_step,
        )
    return to_uint8(latents.cpu().numpy()), strip


def run_demo(options: DemoOptions) -> dict:
    """Trains, samples with AMM off, on, and on with guidance, judges, writes everything to `options.output`.

    Returns:
        The report. Its "interrupted" is None, or what Ctrl-C interrupted; what was trained is saved either way.
    """
    options.check()
    if options.quick:
        options = replace(options, steps=min(options.steps, 20), batch_size=min(options.batch_size, 32),
                          num_per_class=min(options.num_per_class, 4),
                          num_inference_steps=min(options.num_inference_steps, 4))  # fmt: skip
    with open_folder(options.output):
        _check_is_ours(options.output)
        return _run(options)


def _check_is_ours(folder: Path) -> None:
    """Raises ValueError where what the demo would replace is none of an earlier one's by its report.json."""
    there = [name for name in (_REPORT, *_MODEL, *_PICTURES) if os.path.lexists(folder / name)]
    if there and not (
        _REPORT in there
        and {"options", "model", "real_held_out", "variants"} <= read_json(folder / _REPORT, "report", dict).keys()
    ):
        raise ValueError(
            f"output {folder} has {few(there)}, and by no {_REPORT} did edt demo write that; give another output"
        )


def _run(options: DemoOptions) -> dict:
    start, start_cpu = time.perf_counter(), time.process_time()
    judge = Judge(load_split_digits())
    device = torch_device(options.device)
    variants = [
        Variant("AMM off", amm=False),
        Variant("AMM on", amm=True),
        Variant(f"AMM on, guidance {options.guidance_scale:g}", amm=True, guidance_scale=options.guidance_scale),
    ]
    report = {
        "interrupted": "training",
        "options": {name: value for name, value in asdict(options).items() if name != "output"},
        "model": {"preset": PRESET, **PRESETS[PRESET]},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "attention": select_backend(q=torch.empty(0, device=device)),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "real_held_out": judge.judge_real(),
        "variants": {},
    }

    write_json(options.output / _REPORT, report)  # from now on the folder is a demo's
    with stop_on_interrupt() as stop:
        model, losses = train_digits(train_config(options, options.output / "run"), stop)
        report["training"] = {
            "steps": len(losses["full"]),
            "parameters": sum(p.numel() for p in model.parameters()),
            **{f"{name}_loss": float(np.mean(values[-100:])) for name, values in losses.items()},
            "seconds": time.perf_counter() - start,
        }
        for name in _PICTURES:  # of an earlier model
            (options.output / name).unlink(missing_ok=True)
        model.save_pretrained(options.output)
        plot_runs([options.output / "run"])
        report["interrupted"] = None
        if stop:
            report["interrupted"] = f"training, after step {len(losses['full'])} of {options.steps}"
        else:
            try:
                _sample_and_judge(model, variants, judge, options, stop, report)
            except SamplingInterruptedError:
                report["interrupted"] = "sampling"
        report["seconds"] = time.perf_counter() - start
        report["cpu_seconds"] = time.process_time() - start_cpu
        write_json(options.output / _REPORT, report)
    return report


def _sample_and_judge(
    model, variants, judge: Judge, options: DemoOptions, stop: StopRequest, report: dict
) -> None:
    labels = np.repeat(np.arange(NUM_CLASSES), options.num_per_class)
    drawn = {}
    for variant in variants:
        start = time.perf_counter()
        images, strip = draw(model, variant, labels, options, stop)
        report["variants"][variant.name] = {
            "amm": variant.amm,
            "guidance_scale": variant.guidance_scale,
            **judge.judge(from_uint8(images), labels),
            "seconds": time.perf_counter() - start,
        }
        drawn[variant.name] = images
        if variant.amm and variant.guidance_scale == 1:
            pictures.save_denoising_strip(
                options.output / "denoising.png",
                [t for t, _ in strip],
                [frame for _, frame in strip],
                np.unique(labels),
            )

    off, on, guided = (drawn[variant.name] for variant in variants)
    np.savez_compressed(
        options.output / "samples.npz",
        arr_0=on, labels=labels, variant=variants[1].name, amm_off=off, guided=guided,
    )  # fmt: skip
    for file, variant in zip(("amm_off", "amm_on", "guided"), variants):
        pictures.save_label_grid(options.output / f"samples_{file}.png", drawn[variant.name], labels, variant.name)
    held_out, held_out_labels = to_uint8(judge.digits.held_out_images), judge.digits.held_out_labels
    for digit in range(NUM_CLASSES):
        panels = {name: images[labels == digit] for name, images in drawn.items()}
        panels["real, held out"] = held_out[held_out_labels == digit]
        pictures.save_class_page(options.output / f"digit_{digit}.png", digit, panels)


def format_report(report: dict) -> str:
    """The report as a short table."""
    real, training = report["real_held_out"], report["training"]
    header = ("", "images", "accuracy", "spread", "worst class", "copies", "distance")
    rows = [
        ("real, held out", real["images"], real["class_accuracy"], 1, 1, 0, real["median_distance_to_training"])
    ]
    for name, v in report["variants"].items():
        rows.append((name, v["images"], v["class_accuracy"], v["spread_over_real"],
                     v["smallest_class_spread_over_real"], v["exact_copies"] + v["near_copies"],
                     v["median_distance_to_training"]))  # fmt: skip
    width = max(len(row[0]) for row in rows)
    lines = [f"{header[0]:<{width}}  {header[1]:>6}  {header[2]:>8}  {header[3]:>6}  {header[4]:>11}  "
             f"{header[5]:>6}  {header[6]:>8}"]  # fmt: skip
    for name, images, accuracy, spread, worst, copies, distance in rows:
        lines.append(f"{name:<{width}}  {images:>6}  {accuracy:>8.1%}  {spread:>6.2f}  {worst:>11.2f}  "
                     f"{copies:>6}  {distance:>8.3f}")  # fmt: skip
    quick = ["", "quick: trained and sampled in too few steps for digits; leave out --quick to see some"]
    return "\n".join([
        "",
        *lines,
        *(quick if report["options"]["quick"] else []),
        "",
        "accuracy: under a classifier fitted to real training digits · spread: per-class pixel deviation over the",
        "real one · copies: of training images · distance: median, to the nearest training image",
        f"loss {training['full_loss']:.4f} full pass, {training['masked_loss']:.4f} masked pass, after "
        f"{training['steps']} steps · {report['seconds']:.0f} s on {report['device']} · attention: "
        + {"triton": "Triton kernels", "reference": "reference path (plain torch)"}[report["attention"]],
    ])  # fmt: skip
