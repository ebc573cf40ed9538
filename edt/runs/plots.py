"""`edt plot`: pictures of what training runs wrote into metrics.jsonl, of one or of several over each other."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter
from numpy import ndarray

from ..data import pictures
from ..files.text import printable
from .log import METRICS_FILE, read_metrics

PLOTS = "plots"  # in the run's folder
SEVERAL = Path("outputs/plots")  # of several runs
_COLOURS = matplotlib.color_sequences["tab10"]
_DASHES = ("-", "--", ":", "-.")  # so that equal lines, as of learning rates, are all seen


@dataclass(frozen=True)
class Run:
    """The lines of a run's metrics.jsonl; `name` is for legends."""

    name: str
    lines: list[dict]

    @property
    def steps(self) -> ndarray:
        return np.array([line["step"] for line in self.lines])

    def values(self, metric: str) -> ndarray:
        """NaN where a line is without it, as of a loss that was never finite."""
        return np.array([line.get(metric, math.nan) for line in self.lines], dtype=float)

    def has(self, metric: str) -> bool:
        return any(metric in line for line in self.lines)

    def skipped(self) -> tuple[ndarray, int]:
        """The steps of lines within which steps were skipped, and how many were in all; by lines that say."""
        counts = self.values("skipped_steps")
        known = np.isfinite(counts)
        counts = np.append(0, counts[known])
        return self.steps[known][np.diff(counts) > 0], int(counts[-1])


@dataclass(frozen=True, eq=False)
class Picture:
    """Some metrics of all runs: a panel for each, or for all of one run where they share a scale."""

    name: str
    metrics: dict[str, str]  # and what its axis, or its line, says
    together: str = ""  # what the axis of all of them says
    log: bool = False
    noisy: bool = False  # each line faintly, running means on top
    marks_skipped: bool = False


PICTURES = (
    Picture(
        "losses",
        {"full_loss": "full loss", "masked_loss": "masked loss"},
        together="loss",
        log=True,
        noisy=True,
        marks_skipped=True,
    ),
    Picture("alignment_loss", {"alignment_loss": "alignment loss"}, noisy=True),  # below 0 where it works
    Picture("learning_rate", {"learning_rate": "learning rate"}),
    Picture("gradient_norm", {"gradient_norm": "gradient norm"}, log=True, noisy=True, marks_skipped=True),
    Picture("throughput", {"images_per_second": "images/s", "model_flop_utilisation": "model FLOP utilisation"}),
    Picture("memory", {"peak_memory_gib": "peak memory, GiB"}),
)


class _PlainLogFormatter(LogFormatter):
    """Labels where LogFormatter has some, written 0.06."""

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


def plot_runs(folders: list[Path] | tuple[Path, ...], output: Path | None = None) -> list[Path]:
    """Draws `PICTURES` of the runs in these folders; returns the files.

    Args:
        output: by default the folder `plots` of the run, or `SEVERAL`.

    Raises:
        FileNotFoundError: where a folder, or its metrics.jsonl, is missing.
        ValueError: without a run, where the metrics are empty or none of a run's, where the output is for another
            run's pictures, or has pictures of these names that it did not draw.
    """
    if not folders:
        raise ValueError("runs is empty; it needs at least one run's folder")
    own = folders[0] / PLOTS if len(folders) == 1 else SEVERAL
    place = own if output is None else output
    resolved = place.resolve()
    is_a_runs = resolved.name == PLOTS and (resolved.parent / METRICS_FILE).is_file()
    if is_a_runs and (len(folders) > 1 or resolved != own.resolve()):
        raise ValueError(f"output {place} is for the pictures of the run {resolved.parent} alone; give another")
    runs = [Run(name, _read(folder)) for name, folder in zip(_names(folders), folders)]
    drawn = {
        picture: [metric for metric in picture.metrics if any(run.has(metric) for run in runs)]
        for picture in PICTURES
    }
    # As what earlier versions drew for a run says.
    others = ("Matplotlib",) if output is None and len(folders) == 1 else ()
    files = {picture: place / f"{picture.name}.png" for picture, metrics in drawn.items() if metrics}
    for file in files.values():
        if os.path.lexists(file) and not pictures.is_ours(file, *others):
            raise ValueError(f"output has {file}, which edt plot did not draw; move it, or give another output")
    place.mkdir(parents=True, exist_ok=True)
    for picture, file in files.items():
        pictures.save(_draw(picture, drawn[picture], runs), file)
    return list(files.values())


def _names(folders) -> list[str]:
    """The folders' own names where these differ, else their paths, as Matplotlib shows them as they are: between
    two $ it reads formulas, and what begins with _ it leaves out of legends."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [" " * name.startswith("_") + printable(name).replace("$", r"\$") for name in names]


def _read(folder: Path) -> list[dict]:
    if not folder.is_dir():
        raise FileNotFoundError(f"run {folder}: there is no such folder; it needs one that edt train wrote")
    file = folder / METRICS_FILE
    lines = read_metrics(file)
    if not lines:
        raise ValueError(f"{file} is empty; edt train writes its first line after log_every steps")
    return lines


def _draw(picture: Picture, metrics: list[str], runs: list[Run]) -> Figure:
    shared = bool(picture.together) and len(runs) == 1
    panels = [metrics] if shared else [[metric] for metric in metrics]
    figure = Figure(figsize=(8, 0.8 + 3.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, shown in zip(axes, panels):
        lines = [(run, metric) for run in runs for metric in shown if run.has(metric)]
        for run, metric in lines:
            # One colour a run in every panel, but of one run a colour a metric.
            number = metrics.index(metric) if shared else runs.index(run)
            label = picture.metrics[metric] if shared else run.name
            _line(ax, run.steps, run.values(metric), number, label, picture.noisy, solid=picture.noisy and shared)
        if picture.marks_skipped:
            for run in runs:
                _mark_skipped(ax, run, runs)
        _dress(ax, picture, picture.together if shared else picture.metrics[shown[0]], shown[0])
    axes[-1].set_xlabel("step")
    if len(axes[0].get_legend_handles_labels()[1]) > 1:
        axes[0].legend()
    figure.suptitle(runs[0].name if len(runs) == 1 else picture.name.replace("_", " "))
    return figure


def _line(ax: Axes, steps: ndarray, values: ndarray, number: int, label: str, noisy: bool, solid: bool) -> None:
    colour, width = _COLOURS[number % len(_COLOURS)], max(1, len(values) // 40) if noisy else 1
    if width > 1:
        ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
        label += f", mean of {width} lines"
    style: dict[str, Any] = {"marker": "." if len(values) < 30 else None}
    style["linestyle"] = "-" if solid else _DASHES[number % len(_DASHES)]
    ax.plot(steps, running_mean(values, width), color=colour, linewidth=1.6, label=label, **style)


def running_mean(values: ndarray, width: int) -> ndarray:
    """Of each value and up to width − 1 before it; what is not finite is left out."""
    finite, window = np.isfinite(values), np.ones(width)
    sums = np.convolve(np.where(finite, values, 0), window)[: len(values)]
    counts = np.convolve(finite, window)[: len(values)]
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def _mark_skipped(ax: Axes, run: Run, runs: list[Run]) -> None:
    """Crosses along the bottom, where steps of a loss or gradient that was not finite changed nothing."""
    steps, total = run.skipped()
    if total:
        one = len(runs) == 1
        ax.plot(steps, np.full(len(steps), 0.03), "x", transform=ax.get_xaxis_transform(), markersize=7,
                markeredgewidth=2, color="red" if one else _COLOURS[runs.index(run) % len(_COLOURS)],
                label=f"{total} skipped" if one else f"{run.name}: {total} skipped")  # fmt: skip


def _dress(ax: Axes, picture: Picture, label: str, metric: str) -> None:
    ax.set(ylabel=label, yscale="log" if picture.log else "linear")
    if picture.log:
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(_PlainLogFormatter(minor_thresholds=(2, 0.5)))
    elif ax.dataLim.ymin >= 0:
        ax.set_ylim(bottom=0)
    if metric == "model_flop_utilisation":
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3, which="both" if picture.log else "major")
