"""The commands that train, draw and measure: what each prints, and its exit code."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..files.text import command, printable
from ..interrupt import stop_on_interrupt
from ..options import parse
from . import INTERRUPTED


@dataclass(frozen=True)
class Plot:
    """Draws losses, learning rate, gradient norm, throughput and memory of runs; several over each other.

    The command needs pip install 'edt-kernels[train]'.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs of edt train."""
    output: Path | None = None
    """The folder for the pictures. By default it is plots in the run's, and of several runs outputs/plots."""


def run_plot(args: list[str]) -> None:
    from ..runs.plots import plot_runs

    options = parse(Plot, args, "edt plot")
    print("\n".join(map(printable, plot_runs(options.runs, options.output))))


def run_sample(args: list[str]) -> int:
    from ..sampling.sample_set import SampleOptions, draw_samples

    options = parse(SampleOptions, args, "edt sample")
    with stop_on_interrupt() as stop:
        drawn = draw_samples(options, stop)
    if stop:
        if _speaks():
            print(f"\ninterrupted after {drawn} images; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    if _speaks():
        output = printable(options.output)
        print(f"{drawn} images in {output}: images/, samples.npz (arr_0, labels), a grid in samples.png")
    return 0


def run_convert(args: list[str]) -> None:
    from ..sampling.conversion import ConvertOptions, convert

    print(convert(parse(ConvertOptions, args, "edt convert")))


def run_demo(args: list[str]) -> int:
    from ..demo import run as demo

    options = parse(demo.DemoOptions, args, "edt demo")
    report = demo.run_demo(options)
    output = printable(options.output)
    draw_more = command("sample", "--checkpoint", options.output, "--classes", "all")
    if report["interrupted"]:
        print(f"\ninterrupted in {report['interrupted']}. What was trained is kept in {output}; draw from "
              f"it with\n  {draw_more}", file=sys.stderr)  # fmt: skip
        return INTERRUPTED
    print(demo.format_report(report))
    print(f"pictures, samples, checkpoint and report are in {output}; draw more with\n  {draw_more}")
    return 0


def run_extract(args: list[str]) -> int:
    from ..data.extraction import ExtractOptions, extract, summary

    options = parse(ExtractOptions, args, "edt extract")
    try:
        with stop_on_interrupt() as stop:
            manifest, worked = extract(options, stop)
    except KeyboardInterrupt:
        print("\nedt: interrupted; the same command goes on from the last complete shard", file=sys.stderr)
        return INTERRUPTED
    print(("" if worked else "finished before, nothing to do: ") + summary(manifest, options.output))
    return 0


def run_evaluate(args: list[str]) -> int:
    from ..evaluation.evaluator import EvaluateOptions, evaluate, format_report

    options = parse(EvaluateOptions, args, "edt evaluate")
    try:
        report = evaluate(options)
    except KeyboardInterrupt:
        print("\nedt: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    print(format_report(report))
    return 0


def run_train(args: list[str]) -> int:
    from ..train import config

    options = config.parse(args)  # its defaults depend on its arguments

    from ..model.transformer import EDTTransformer2DModel
    from ..train.trainer import train

    with stop_on_interrupt() as stop:
        saved = train(options, stop, config_again=lambda: config.parse(args))
    if stop:
        if _speaks():
            print(f"\ninterrupted. The run is kept in {printable(saved)}; the same command goes on from there",
                  file=sys.stderr)  # fmt: skip
        return INTERRUPTED
    if _speaks():
        trained = EDTTransformer2DModel.load_config(saved / "ema")
        more = ("--classes", "all") if trained["num_classes"] else ()
        draw = command("sample", "--checkpoint", options.output, *more)
        print(f"the run is in {printable(options.output)}; draw from it with\n  {draw}")
    return 0


def run_ablate(args: list[str]) -> int:
    from ..demo import ablation

    options = parse(ablation.AblateOptions, args, "edt ablate")
    with stop_on_interrupt() as stop:
        report = ablation.ablate(options, stop)
    print(f"\n{ablation.format_table(report)}\n\nin {printable(options.output)}")
    if stop:
        print("interrupted; the same command goes on from what was done", file=sys.stderr)
        return INTERRUPTED
    return 0


def _speaks() -> bool:
    """Of several processes one does."""
    return os.environ.get("RANK", "0") == "0"
