"""`edt tune`: the kernels' tiles, measured on this GPU."""

import itertools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from edt_kernels._tiles import OPS

from ..model.presets import PRESETS
from ..options import check_count, parse
from . import INTERRUPTED


@dataclass(frozen=True)
class Tune:
    """Measures the kernels' tiles on this GPU, checks their gradients, writes the table that dispatch reads."""

    output: Path | None = None
    """The table. By default it is this device's in your cache folder, where dispatch finds it without further
    setting; any other is used where EDT_KERNELS_TILES names it. One that exists is continued."""
    ops: tuple[str, ...] = OPS
    """The ops to measure."""
    models: tuple[str, ...] = ("EDT-XL/2", "EDT-B/2", "EDT-S/2")
    """The presets whose shapes to measure, the most important first. All at 256² come before any at 512²."""
    batch_size: int = 64
    """The number of images."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype of autocast, or float32."""
    seconds: float | None = None
    """After so many seconds no further measurement is begun. Each takes up to a minute or two."""
    quick: bool = False
    """Try only candidates that differ from the static choice in one number."""


def run_tune(args: list[str]) -> int:
    options = parse(Tune, args, "edt tune")
    check_count("batch_size", options.batch_size)
    if options.seconds is not None and not options.seconds >= 0:
        raise ValueError(f"seconds is {options.seconds}; it must be a number of at least 0")
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
        return INTERRUPTED
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
