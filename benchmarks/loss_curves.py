"""Does training on the kernels go as training without them does: `python -m benchmarks loss_curves`.

Three runs of `edt train` from one seed, hence of the same weights, data, noise, timesteps and masks; the loss of a
step is that of its full and its masked pass together:

    ours        the Triton kernels, bfloat16 autocast
    reference   the reference path, bfloat16 autocast
    float32     the reference path without autocast: how far from `reference` rounding to bfloat16 alone leads

The verdict "within bf16 noise", over the last 100 steps (`WINDOW`; of a shorter run, over all):

    mean |ours − reference| ≤ 2 · mean |reference − float32|

The data are latents of smooth random patterns, a pattern for each class, so that there is something to learn in a
few hundred steps. With `--device cpu` ours is the reference path too, which tests this file and no kernel.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from edt.model.presets import PRESETS
from edt.options import check_count

from .results import add_output, environment, output_folder

NAME = "loss_curves"  # of the JSON and the PNG
WINDOW = 100
ALLOWED = 2.0  # times the noise
CLASSES, IMAGES = 8, 1024
_STYLES = {"ours": ("#d62728", "-"), "reference": ("#1f77b4", "--"), "float32": ("#7f7f7f", ":")}


def synthetic_latents(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(IMAGES, C, H, W) of about unit variance, and their classes: 4×4 Gaussian numbers made large, half of them
    the class's, and a little noise on every number."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = shape
    labels = torch.arange(IMAGES) % CLASSES
    patterns = torch.randn(CLASSES, channels, 4, 4, generator=generator)[labels]
    patterns = 0.9 * patterns + 0.9 * torch.randn(patterns.shape, generator=generator)
    smooth = F.interpolate(patterns, (height, width), mode="bicubic", align_corners=False)
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator), labels


def verdict(ours: list[float], reference: list[float], float32: list[float]) -> dict[str, float | bool | str]:
    """The two mean differences over the last `WINDOW` steps; whether ours is within the noise, in words too."""
    difference, noise = (
        sum(abs(a - b) for a, b in zip(one[-WINDOW:], other[-WINDOW:], strict=True)) / min(WINDOW, len(reference))
        for one, other in ((ours, reference), (reference, float32))
    )
    within = difference <= ALLOWED * noise
    reason = (
        f"{'' if within else 'NOT '}within bf16 noise: {difference:.2g}, where {ALLOWED * noise:.2g} is allowed"
    )
    return {"difference": difference, "noise": noise, "within_bf16_noise": within, "reason": reason}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks loss_curves", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", default="EDT-S/2", help="a preset")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64, help="images a step")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: without kernels, as a test"
    )
    add_output(parser)
    return parser


def main(arguments: list[str]) -> int:
    """Trains, stores after each run, and returns the exit status: 1 for ours outside of the noise, or where a loss
    or gradient of any run is not finite.

    Raises:
        ValueError: without a GPU or what training needs, or for arguments that it cannot take.
    """
    options = build_parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "loss_curves needs a GPU, and torch sees none here; --device cpu tests it without kernels"
        )
    if options.model not in PRESETS:
        raise ValueError(f"model is {options.model!r}; it must be one of {', '.join(PRESETS)}")
    for name in ("steps", "batch_size"):
        check_count(name, getattr(options, name))
    try:
        import edt.train.trainer  # noqa: F401
    except ImportError as error:
        raise ValueError(f"loss_curves needs pip install 'edt-kernels[train]': {error}") from error
    where = environment(torch.device(options.device))
    folder = output_folder(options, where["device"])
    folder.mkdir(parents=True, exist_ok=True)
    found = {"environment": where, "model": options.model, "steps": options.steps,
             "batch_size": options.batch_size, "seconds": {}, "losses": {}}  # fmt: skip
    (folder / f"{NAME}.png").unlink(missing_ok=True)
    runs = {
        "ours": ("triton" if options.device == "cuda" else "reference", "bfloat16"),
        "reference": ("reference", "bfloat16"),
        "float32": ("reference", "float32"),
    }
    with tempfile.TemporaryDirectory() as temporary:
        data = _write_data(Path(temporary) / "data", options.model)
        for name, (backend, precision) in runs.items():
            begin = time.monotonic()
            try:
                with patch.dict(os.environ, {"EDT_KERNELS_BACKEND": backend}):  # asked at each call
                    found["losses"][name] = _losses(options, data, Path(temporary) / name, precision)
            except FloatingPointError as error:
                found |= {"within_bf16_noise": False, "reason": f"{name}: {error}"}
                _store(found, folder)
                print(summary(found))
                return 1
            found["seconds"][name] = round(time.monotonic() - begin, 1)
            _store(found, folder)
    found |= verdict(**found["losses"])
    _store(found, folder)
    draw(found).savefig(folder / f"{NAME}.png", dpi=120)
    print(f"{summary(found)}\n{folder / NAME}.json and .png")
    return int(not found["within_bf16_noise"])


def summary(found: dict) -> str:
    """Of the content of loss_curves.json, in a few lines."""
    losses, steps = found["losses"], found["steps"]
    text = f"loss curves, {found['model']}, {steps} steps of {found['batch_size']} images:"
    for name, curve in losses.items():
        last = sum(curve[-WINDOW:]) / len(curve[-WINDOW:])
        text += f"\n  {name:9} {curve[0]:.4f} falls to {last:.4f}, {found['seconds'][name]:.0f} s"
    if "difference" not in found:
        return f"{text}\n  {found.get('reason', 'not finished: no verdict')}"
    return (
        f"{text}\n  over the last {min(WINDOW, steps)} steps: mean |ours - reference| {found['difference']:.2e}, "
        f"mean |reference - float32| {found['noise']:.2e}\n  {found['reason']}"
    )


def _write_data(folder: Path, model: str) -> Path:
    """For the preset's size."""
    from edt.data.dataset import write_dataset

    side, channels = PRESETS[model].get("sample_size", 32), PRESETS[model].get("in_channels", 4)
    latents, labels = synthetic_latents((channels, side, side))
    write_dataset(folder, latents, labels)
    return folder


def _losses(options: argparse.Namespace, data: Path, output: Path, precision: str) -> list[float]:
    """Of every step of a run, whose folder is then removed. Raises FloatingPointError where one is not finite."""
    from edt.runs.log import METRICS_FILE, read_metrics
    from edt.train.config import RECIPES, TrainConfig
    from edt.train.trainer import train

    published = RECIPES.get(options.model, {})
    config = TrainConfig(
        data=data,
        output=output,
        model=options.model,
        steps=options.steps,
        batch_size=options.batch_size,
        precision=precision,
        device=options.device,
        num_workers=0,
        verify_data=False,
        checkpoint_every=options.steps,
        keep_checkpoints=1,
        resume="never",
        log_every=1,
        trackers=(),
        sample_every=0,
        **{name: published[name] for name in ("learning_rate",) if name in published},
    )
    train(config)
    lines = read_metrics(output / METRICS_FILE)
    losses = [line.get("full_loss", math.nan) + line.get("masked_loss", math.nan) for line in lines]
    shutil.rmtree(output)
    if lines[-1]["skipped_steps"] or not all(map(math.isfinite, losses)):
        raise FloatingPointError(
            f"the loss or gradient of {lines[-1]['skipped_steps']:.0f} of {options.steps} steps is not finite"
        )
    return losses


def _store(found: dict, folder: Path) -> None:
    part = folder / f"{NAME}.json.part"
    part.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(part, folder / f"{NAME}.json")


def draw(found: dict):
    """The curves; and below them their differences, each faintly and its running mean."""
    import numpy as np
    from matplotlib.figure import Figure

    from edt.runs.plots import running_mean

    curves = {name: np.array(curve) for name, curve in found["losses"].items()}
    steps = np.arange(1, found["steps"] + 1)
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for name, curve in curves.items():
        colour, dashes = _STYLES[name]
        above.plot(steps, curve, color=colour, linestyle=dashes, linewidth=1.3, label=name)
    above.set(yscale="log", ylabel="loss of both passes")
    width = max(1, len(steps) // 20)
    for label, one, other in (
        ("|ours − reference|", "ours", "reference"),
        ("|reference − float32|: bf16 noise", "reference", "float32"),
    ):
        colour, difference = _STYLES[one][0], abs(curves[one] - curves[other])
        below.plot(steps, difference, color=colour, alpha=0.25, linewidth=0.7)
        below.plot(steps, running_mean(difference, width), color=colour, label=label)
    if all((curves[one] != curves["reference"]).any() for one in ("ours", "float32")):
        below.set_yscale("log", nonpositive="mask")
    below.axvspan(max(1, len(steps) - WINDOW + 1), len(steps), color="black", alpha=0.06, linewidth=0)
    below.set(xlabel="step; the verdict is over the shaded ones",
              ylabel=f"difference, and mean of {width} steps")  # fmt: skip
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend()
    device = found["environment"]["device"]
    device = "CPU: ours is the reference path" if device == "cpu" else device
    figure.suptitle(f"{found['model']}, batch {found['batch_size']}, {device}\n{found['reason']}", fontsize=11)
    return figure


if __name__ == "__main__":
    from .__main__ import main as command

    sys.exit(command(["loss_curves", *sys.argv[1:]]))
