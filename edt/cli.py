"""The command line: `edt demo`, `extract`, `train`, …. Wrong input is one line on stderr and exit code 2."""

import io
import itertools
import json
import os
import re
import select
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

try:
    import tyro
except ImportError as error:
    raise SystemExit("edt: error: the command line needs pip install 'edt-kernels[train]'") from error

from edt_kernels._tiles import OPS

from .data.extraction import ExtractOptions, extract, summary
from .demo import ablation
from .demo import run as demo
from .demo.ablation import AblateOptions
from .demo.run import DemoOptions
from .evaluation.evaluator import EvaluateOptions, evaluate, format_report
from .files.text import command, printable
from .interrupt import stop_on_interrupt
from .model.complexity import OPTIMIZER_BUFFERS, cost_table, estimate_memory, meta_model, sampling_multiply_adds
from .model.presets import PRESETS
from .model.step_cache import REUSES, StepCacheConfig
from .model.transformer import EDTTransformer2DModel
from .runs.plots import plot_runs
from .runs.weights import weights_folder
from .sampling.conversion import ConvertOptions, convert
from .sampling.sample_set import SampleOptions, draw_samples
from .train import config as train_config
from .train.config import TrainConfig

_INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
_BROKEN_PIPE = 141  # and for one whose reader has gone
_CACHED_STEPS, _CACHE_INTERVALS = 250, (2, 3, 5)  # what edt info counts


@dataclass(frozen=True)
class Plot:
    """Draws losses, learning rate, gradient norm, throughput and memory of runs; several over each other."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of edt train."""
    output: Path | None = None
    """Folder for the pictures; by default plots in the run's, of several runs outputs/plots."""


@dataclass(frozen=True)
class Info:
    """Prints parameters, multiply-adds stage by stage, and a memory estimate."""

    model: Annotated[str, tyro.conf.Positional]
    """A preset, such as EDT-XL/2, or a checkpoint's or a run's folder."""
    batch_size: int = 32
    """For the activations."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast: weights, their gradients and the residual stream stay float32."""
    gradient_checkpointing: bool = False
    """In training, compute each block again in the backward pass instead of keeping its activations."""


@dataclass(frozen=True)
class Tune:
    """Measures the kernels' tiles on this GPU, checks their gradients, writes the table that dispatch reads."""

    output: Path | None = None
    """The table; by default that of this device, which needs no further setting. One that exists is continued."""
    ops: tuple[str, ...] = OPS
    """Ops to measure."""
    models: tuple[str, ...] = ("EDT-XL/2", "EDT-B/2", "EDT-S/2")
    """Presets whose shapes to measure, the most important first; all at 256² come before any at 512²."""
    batch_size: int = 64
    """Images."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Autocast's, or float32."""
    seconds: float | None = None
    """After so many, no further measurement is begun; each takes up to a minute or two."""
    quick: bool = False
    """Only candidates that differ from the static choice in one number."""


def run_sample(options: SampleOptions) -> int:
    with stop_on_interrupt() as stop:
        drawn = draw_samples(options, stop)
    first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    if stop:
        if first:
            print(f"\ninterrupted after {drawn} images; the same command goes on from there", file=sys.stderr)
        return _INTERRUPTED
    if first:
        output = printable(options.output)
        print(f"{drawn} images in {output}: images/, samples.npz (arr_0, labels), a grid in samples.png")
    return 0


def run_convert(options: ConvertOptions) -> None:
    print(convert(options))


def run_plot(options: Plot) -> None:
    print("\n".join(map(printable, plot_runs(options.runs, options.output))))


def run_info(options: Info) -> None:
    if options.model in PRESETS:
        config = PRESETS[options.model]
    elif Path(options.model).is_dir():
        config = dict(EDTTransformer2DModel.load_config(weights_folder(options.model), local_files_only=True))
    else:
        raise ValueError(
            f"model is {options.model!r}; it must be a checkpoint folder or one of {', '.join(PRESETS)}"
        )
    model = meta_model(config)
    parts = cost_table(model)
    memory = estimate_memory(
        config,
        options.batch_size,
        precision=options.precision,
        gradient_checkpointing=options.gradient_checkpointing,
    )

    print(f"{options.model}\n")
    print(f"{'':16} {'grid':>8} {'channels':>9} {'blocks':>7} {'parameters':>13} {'multiply-adds':>15}")
    for part in parts:
        grid = "×".join(map(str, part.grid)) if part.grid else ""
        print(f"{part.name:16} {grid:>8} {part.channels:>9} {part.blocks or '':>7} {_spaced(part.parameters):>13} "
              f"{_giga(part.multiply_adds):>15}".rstrip())  # fmt: skip
    total = sum(part.parameters for part in parts), sum(part.multiply_adds for part in parts)
    print(f"{'total':16} {'':26} {_spaced(total[0]):>13} {_giga(total[1]):>15}")

    batch = f"batch {options.batch_size}"
    rows = [
        ("weights", memory.weights),
        *([("their 16-bit copies", memory.weight_copies)] if memory.weight_copies else []),
        ("gradients", memory.gradients),
        (f"Adan's state ({OPTIMIZER_BUFFERS['adan']} buffers)", memory.optimizer_state),
        ("EMA", memory.ema),
        (f"activations, {batch}", memory.training_activations),
        (f"training, {batch}", memory.training),
        (f"inference, {batch}", memory.inference),
    ]
    checkpointing = ", gradient checkpointing" if options.gradient_checkpointing else ""
    print(f"\nmemory, {options.precision}{checkpointing}, estimated for the Triton kernels")
    for name, size in rows:
        print(f"{name:28} {size / 2**30:>10.2f} GiB")
    print(
        "In training, attention without its kernel keeps matrices of "
        f"{memory.attention_matrices / 2**30:.2f} GiB more."
    )

    full = sampling_multiply_adds(model, _CACHED_STEPS)
    print(f"\nstep caching, every n-th of {_CACHED_STEPS} steps in full: times fewer multiply-adds")
    print(f"{'':28}" + "".join(f"{f'n = {n}':>8}" for n in _CACHE_INTERVALS))
    for reuse in REUSES:
        cached = (
            sampling_multiply_adds(model, _CACHED_STEPS, StepCacheConfig(n, reuse=reuse)) for n in _CACHE_INTERVALS
        )
        print(f"{f'{reuse} features reused':28}" + "".join(f"{full / cost:>7.2f}×" for cost in cached))


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _giga(multiply_adds: int) -> str:
    if multiply_adds == 0:
        return ""
    return f"{multiply_adds / 1e9:.3f} G" if multiply_adds >= 1e7 else f"{multiply_adds / 1e6:.3f} M"


def run_demo(options: DemoOptions) -> int:
    report = demo.run_demo(options)
    output = printable(options.output)
    draw_more = command("sample", "--checkpoint", options.output, "--classes", "all")
    if report["interrupted"]:
        print(f"\ninterrupted in {report['interrupted']}. What was trained is kept in {output}; draw from "
              f"it with\n  {draw_more}", file=sys.stderr)  # fmt: skip
        return _INTERRUPTED
    print(demo.format_report(report))
    print(f"pictures, samples, checkpoint and report are in {output}; draw more with\n  {draw_more}")
    return 0


def run_extract(options: ExtractOptions) -> int:
    try:
        with stop_on_interrupt() as stop:
            manifest, worked = extract(options, stop)
    except KeyboardInterrupt:
        print("\nedt: interrupted; the same command goes on from the last complete shard", file=sys.stderr)
        return _INTERRUPTED
    print(("" if worked else "finished before, nothing to do: ") + summary(manifest, options.output))
    return 0


def run_evaluate(options: EvaluateOptions) -> int:
    try:
        report = evaluate(options)
    except KeyboardInterrupt:
        print("\nedt: interrupted; nothing was written", file=sys.stderr)
        return _INTERRUPTED
    print(format_report(report))
    return 0


def run_tune(options: Tune) -> int:
    if options.batch_size < 1:
        raise ValueError(f"batch_size is {options.batch_size}; it must be at least 1")
    if options.seconds is not None and not options.seconds >= 0:
        raise ValueError(f"seconds is {options.seconds}; it must not be negative")
    for name, known in (("ops", OPS), ("models", tuple(PRESETS))):
        if wrong := set(getattr(options, name)) - set(known):
            raise ValueError(f"{name} has {', '.join(sorted(wrong))}; it takes {', '.join(known)}")
    if not torch.cuda.is_available():  # before the import of Triton, which may be missing
        raise RuntimeError("tune needs a CUDA or ROCm GPU; torch finds none here")
    from edt_kernels import tuning

    path = options.output or tuning.default_output()
    try:
        tuning.tune(tune_shapes(options), path, seconds=options.seconds, quick=options.quick)
    except KeyboardInterrupt:
        print("\nedt: interrupted; the same command goes on from what was measured", file=sys.stderr)
        return _INTERRUPTED
    finally:
        if path.is_file():
            print(f"{tuning_report(json.loads(path.read_text()))}\nThe table is {path}.")
    return 0


def tune_shapes(options: Tune) -> list:
    """What the models launch, the most important first: at 256² before 512², attention before norms, without AMM
    (in training and most of sampling) before with it, early stages before late ones."""
    from edt_kernels.tuning import Shape

    common = {"batch_size": options.batch_size, "dtype": getattr(torch, options.dtype)}
    presets = [PRESETS[model] for model in options.models]
    sizes = [(preset["sample_size"] // 2,) if "sample_size" in preset else (16, 32) for preset in presets]
    shapes = []
    for side in sorted(set(itertools.chain(*sizes))):
        attention, norms = [], []
        for stage, (preset, sides) in itertools.product(range(3), zip(presets, sizes)):
            if side not in sides:
                continue
            grid, channels = (side >> stage, side >> stage), preset["hidden_sizes"][stage]
            attention.append(
                Shape("amm_attention", grid, channels, heads=preset["num_attention_heads"][stage], **common)
            )
            norms += [Shape(op, grid, channels, **common) for op in OPS[1:] if stage < 2 or "token" not in op]
        shapes += [*attention, *norms, *(replace(shape, modulation=True) for shape in attention)]
    return [shape for shape in shapes if shape.op in options.ops]


def tuning_report(table: dict) -> str:
    """A line for each measurement: the static choice's time, the chosen tiles' time, and these tiles."""
    lines = [f"{'pass':33} {'shape':26} {'static µs':>10} {'chosen µs':>10} {'ratio':>6}  tiles"]
    for entry in table["entries"]:
        static, chosen = entry["static_microseconds"], entry["microseconds"]
        ratio = f"{chosen / static:.3f}" if static else "wrong"
        tiles = "the same"
        if entry["tiles"] != entry["static_tiles"]:
            sizes = {kernel: ", ".join(f"{n} {v}" for n, v in t.items()) for kernel, t in entry["tiles"].items()}
            tiles = "; ".join(f"{kernel}: {text}" for kernel, text in sizes.items())
        lines.append(f"{entry['pass']:33} {entry['shape']:26} {static or '':>10} {chosen:>10} {ratio:>6}  {tiles}")
    faults = [
        f"WRONG, never chosen: {fault['pass']} {fault['tiles']}: {fault['reason']}" for fault in table["faults"]
    ]
    return "\n".join([*lines, *faults])


def run_train(args: list[str]) -> int:
    from .train.trainer import train

    options = train_config.parse(args)  # its defaults depend on its arguments
    with stop_on_interrupt() as stop:
        saved = train(options, stop, config_again=lambda: train_config.parse(args))
    first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    if stop:
        if first:
            print(f"\ninterrupted. The run is kept in {printable(saved)}; the same command goes on from there",
                  file=sys.stderr)  # fmt: skip
        return _INTERRUPTED
    if first:
        config = EDTTransformer2DModel.load_config(saved / "ema")
        more = ("--classes", "all") if config["num_classes"] else ()
        draw = command("sample", "--checkpoint", options.output, *more)
        print(f"the run is in {printable(options.output)}; draw from it with\n  {draw}")
    return 0


def run_ablate(options: AblateOptions) -> int:
    with stop_on_interrupt() as stop:
        report = ablation.ablate(options, stop)
    print(f"\n{ablation.format_table(report)}\n\nin {printable(options.output)}")
    if stop:
        print("interrupted; the same command goes on from what was done", file=sys.stderr)
        return _INTERRUPTED
    return 0


_COMMANDS = {
    "demo": (DemoOptions, run_demo),
    "extract": (ExtractOptions, run_extract),
    "train": (TrainConfig, run_train),
    "plot": (Plot, run_plot),
    "convert": (ConvertOptions, run_convert),
    "sample": (SampleOptions, run_sample),
    "evaluate": (EvaluateOptions, run_evaluate),
    "ablate": (AblateOptions, run_ablate),
    "info": (Info, run_info),
    "tune": (Tune, run_tune),
}


def main(args: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    args = sys.argv[1:] if args is None else args
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with it closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that are not UTF-8; terminals that are not
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # of `edt … | head`, which has seen enough
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return _BROKEN_PIPE


def _run(args: list[str]) -> int:
    try:
        _check_none_is_empty(args)
        if args[:1] == ["train"]:
            return run_train(args[1:])
        options = tyro.extras.subcommand_cli_from_dict(
            {name: options for name, (options, _) in _COMMANDS.items()},
            args=args,
            prog="edt",
            description="EDT, the Efficient Diffusion Transformer: demo, data, training, sampling, costs, tiles.",
        )
        run = next(run for kind, run in _COMMANDS.values() if type(options) is kind)
        return run(options) or 0
    except FloatingPointError as error:
        print(f"edt: training stopped: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nedt: interrupted at once; only what was already saved is kept", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if os.environ.get("EDT_TRACEBACK") == "1" or (isinstance(error, BrokenPipeError) and _reader_has_gone()):
            raise
        print(f"edt: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _check_none_is_empty(args: list[str]) -> None:
    """As a path it would be the current folder, where nobody wants a run's files."""
    for before, given in zip(["edt", *args], args):
        name, equals, value = given.partition("=")
        if not given or (name.startswith("--") and equals and not value):
            raise ValueError(f"{name or before} has an empty argument after it; is a variable of the shell unset?")


def _reader_has_gone() -> bool:
    """Of stdout or stderr; any other pipe that breaks, such as a worker's, is an error like others."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


_LONGEST_MESSAGE = 2000
# Of bad input, whose message says what is wrong. Any other has to say what it is, and where.
_EXPLAINED = (ValueError, TypeError, OSError, RuntimeError, ImportError, OverflowError, FloatingPointError)


def _one_line(error: BaseException) -> str:
    """The error's message in one line that a terminal can show, also of a name of thousands of letters."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror is not None and error.filename2 is None:  # not [Errno 13]
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    message = printable(re.sub(r"\s+", " ", message).strip())
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE // 2]} … {message[-_LONGEST_MESSAGE // 2 :]}"
    if isinstance(error, MemoryError):
        return f"out of memory{f': {message}' if message else ''}"
    if isinstance(error, _EXPLAINED) and message:
        return message
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    return f"{type(error).__name__}: {message} ({where}; EDT_TRACEBACK=1 shows more)"
