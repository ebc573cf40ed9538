"""What masking training and AMM do, measured on real digits: the small counterpart of the paper's ablations."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ..data.digits import NUM_CLASSES, from_uint8, load_split_digits
from ..devices import torch_device
from ..files.lock import open_folder
from ..files.outputs import write_json
from ..files.text import read_json
from ..interrupt import StopRequest
from ..options import check_types, renamed
from ..runs.log import METRICS_FILE, read_metrics
from ..runs.weights import load_checkpoint
from ..train.trainer import train
from .judge import Judge
from .run import DemoOptions, SamplingInterruptedError, Variant, digits_folder, draw, train_config

_REPORT, _TABLE = "ablation.json", "table.md"
_CASE = ("seed", "masking", "amm", "class_accuracy", "spread_over_real", "frechet_distance", "full_loss")


@renamed(sampling_steps="num_inference_steps")
@dataclass(frozen=True)
class AblateOptions:
    """Trains on digits with masking on and off, samples each with AMM on and off, over seeds; prints a table.

    The command needs pip install 'edt-kernels[train]'.
    """

    output: Path = Path("outputs/ablation")
    """The folder for the runs, ablation.json and table.md. What is done there is not done again."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds, each of weights, data order and noise."""
    steps: int = 1800
    """The number of training steps."""
    num_per_class: int = 50
    """The number of images to draw of each digit, in each case."""
    num_inference_steps: int = 100
    """The number of denoising steps."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """The device, cuda or cpu. By default it is the GPU if there is one."""

    def check(self) -> None:
        """Raises ValueError for an option that cannot work."""
        check_types(self)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds is {self.seeds}; it must be different numbers, not negative")
        for seed in self.seeds:
            self.demo(seed).check()

    def demo(self, seed: int) -> DemoOptions:
        return DemoOptions(
            output=self.output,
            steps=self.steps,
            num_per_class=self.num_per_class,
            num_inference_steps=self.num_inference_steps,
            seed=seed,
            device=self.device,
        )


def ablate(options: AblateOptions, stop: StopRequest) -> dict:
    """Runs the cases that are missing in ablation.json, saves each as it is done; returns all of it.

    Raises:
        ValueError: for options that do not fit, or an output that has cases of other options.
    """
    options.check()
    with open_folder(options.output):
        return _ablate(options, stop)


def _ablate(options: AblateOptions, stop: StopRequest) -> dict:
    file = options.output / _REPORT
    settings = {  # under these names since the first version
        "steps": options.steps,
        "num_per_class": options.num_per_class,
        "sampling_steps": options.num_inference_steps,
    }
    report = _read_report(options.output) or {"settings": settings, "cases": []}
    if report["settings"] != settings:
        raise ValueError(f"output {options.output} has cases of {report['settings']}; these are {settings}")
    judge = Judge(load_split_digits())
    report["real"] = judge.judge_real()
    digits_folder(options.output / "data")
    for seed in options.seeds:
        for masking in (False, True):
            done = {case["amm"] for case in report["cases"] if (case["seed"], case["masking"]) == (seed, masking)}
            if done == {False, True}:
                continue
            demo = options.demo(seed)
            folder = options.output / f"seed-{seed}-masking-{'on' if masking else 'off'}"
            checkpoint = train(replace(train_config(demo, folder), masking=masking), stop)
            if stop:
                return report
            losses = [line["full_loss"] for line in read_metrics(folder / METRICS_FILE) if "full_loss" in line]
            model = load_checkpoint(checkpoint / "ema").to(torch_device(options.device))
            for amm in (False, True):
                if amm in done:
                    continue
                variant = Variant(f"seed {seed}, masking {_on(masking)}, AMM {_on(amm)}", amm=amm)
                labels = np.repeat(np.arange(NUM_CLASSES), options.num_per_class)
                try:
                    images, _ = draw(model, variant, labels, demo, stop)
                except SamplingInterruptedError:
                    return report
                figures = judge.judge(from_uint8(images), labels)
                case = {"seed": seed, "masking": masking, "amm": amm, **figures}
                report["cases"].append({**case, "full_loss": float(np.mean(losses[-100:]))})
                write_json(file, report)
                (options.output / _TABLE).write_text(format_table(report) + "\n")
    return report


def _read_report(folder: Path) -> dict | None:
    """Of an earlier call, or None. Raises ValueError for files that none wrote."""
    file = folder / _REPORT
    if not os.path.lexists(file):
        if os.path.lexists(folder / _TABLE):
            raise ValueError(
                f"output {folder} has a {_TABLE}, but no {_REPORT} of edt ablate; give another output"
            )
        return None
    report = read_json(file, "report", dict)
    cases = report.get("cases")
    if not (isinstance(report.get("settings"), dict) and isinstance(cases, list) and all(map(_is_case, cases))):
        raise ValueError(f"report {file} is none of edt ablate; remove it to begin anew, or give another output")
    return report


def _is_case(case) -> bool:
    return isinstance(case, dict) and all(isinstance(case.get(name), (int, float)) for name in _CASE)


def format_table(report: dict) -> str:
    """Mean ± standard deviation over seeds of each case, as markdown."""
    real, cases, settings = report["real"], report["cases"], report["settings"]
    lines = [
        "| masking training | AMM at sampling | class accuracy, % | spread | Fréchet distance | full loss |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    seeds = set()
    for masking in (False, True):
        for amm in (False, True):
            rows = [case for case in cases if (case["masking"], case["amm"]) == (masking, amm)]
            if not rows:
                continue
            seeds |= {row["seed"] for row in rows}
            accuracy = _mean([100 * row["class_accuracy"] for row in rows], 1)
            spread = _mean([row["spread_over_real"] for row in rows], 3)
            distance = _mean([row["frechet_distance"] for row in rows], 3)
            loss = _mean([row["full_loss"] for row in rows], 4)
            lines.append(f"| {_on(masking)} | {_on(amm)} | {accuracy} | {spread} | {distance} | {loss} |")
    lines.append(f"| real digits | | {100 * real['class_accuracy']:.1f} | 1 | {real['frechet_distance']:.3f} | |")
    lines += [
        "",
        f"{len(seeds)} seeds, mean ± standard deviation; EDT-digits, {settings['steps']} steps, "
        f"{10 * settings['num_per_class']} images of {settings['sampling_steps']} denoising steps, no guidance.",
        "Accuracy by a classifier of real digits; spread of a class over the real one; Fréchet distance of pixels "
        "to held-out digits; loss of the full pass over the last 100 steps. Masking doubles the work of a step.",
    ]
    return "\n".join(lines)


def _on(value: bool) -> str:
    return "on" if value else "off"


def _mean(values: list[float], digits: int) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"
