"""What the compiled kernels of a training step do, counted while they run, and the least time that it can take.

    python -m benchmarks executed [--models EDT-S/2] [--out executed.md]

The ops of one training step (a full and a masked pass, forward and backward, in autocast to bfloat16) at batch 256
and 256² pixels are found by running the model on fake tensors. Each different call is then made with real
arguments of those shapes, and of each launch some programs, spread over the grid, are executed on the CPU: what
they did, times the programs of the launch, is what it does. Instructions are PTX's: the assembler drops some moves
and joins others.
"""

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import edt_kernels._backend as backend
from edt.model.presets import PRESETS

from .. import tables
from . import build
from .launch import Executed, executing

BATCH_SIZE = 256
MODELS = ("EDT-S/2", "EDT-B/2", "EDT-XL/2")
# Of each launch, spread evenly by the golden ratio: programs that differ in what they do come in short cycles.
_SAMPLED = 48


@dataclass(frozen=True)
class Device:
    """Rates that cannot be exceeded. Clock: the highest, which no device keeps under load."""

    name: str
    memory: float  # bytes a second
    cache: float = 50e6  # bytes of L2, which a launch may find filled with what it reads
    multiprocessors: int = 132
    clock: float = 1.98e9

    def seconds(self, per_clock: float) -> float:
        """That a multiprocessor takes for one, all of them working, where it does so many a clock."""
        return 1 / (per_clock * self.clock * self.multiprocessors)


# Data sheets of H100 SXM and H200 SXM: memory bandwidth, L2 cache, and of tensor cores without sparsity 4096
# operations in bfloat16 a clock and multiprocessor. CUDA C++ programming guide, of compute capability 9.0: 128
# float32 results and 16 special functions ("Arithmetic Instructions"), 128 bytes of shared memory ("Shared
# Memory"), here taken as those of L1 too, which is the same memory.
DEVICES = (Device("H100", 3.35e12), Device("H200", 4.8e12))
_MATRIX, _FLOATS, _SPECIALS = 4096, 128, 16

# By opcode, in the order in which they are tried.
_CLASSES = {
    "matrix": r"mma\.|wgmma\.mma_async",
    "synchronise": r"bar\.|barrier\.|fence\.|wgmma\.|cp\.async\.(wait|commit)|membar",
    "global": r"(ld|st)\.global|cp\.async|atom|red\.",
    "shared": r"(ld|st)\.shared|ldmatrix|stmatrix",
    "shuffle": r"shfl|vote|redux|elect",
    "special": r"(ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh)\.|div\.\S*f32",
    "conversion": r"cvt\.",
    "float": r"\w+\.(\w+\.)*(f32|bf16x2|f16x2|bf16|f16)$",
    "move": r"mov|selp|ld\.param|cvta|prmt",
    "control": r"bra|ret|exit|setp|trap",
    "integer": r"",
}
_CLASS_PATTERNS = {name: re.compile(pattern) for name, pattern in _CLASSES.items()}


def classify(opcode: str) -> str:
    return next(name for name, pattern in _CLASS_PATTERNS.items() if pattern.match(opcode))


@dataclass
class Work:
    """Of programs, launches or a whole step; the sum of two is what both do."""

    instructions: Counter = field(default_factory=Counter)  # of warps, by class
    matrix_operations: float = 0  # a multiply-add is two
    fused: float = 0  # float32 results, of lanes: fma, and products and sums that the assembler may still join
    products: float = 0
    sums: float = 0
    specials: float = 0
    global_bytes: float = 0  # asked for by lanes
    sectors: float = 0  # of 32 bytes, asked for by warps
    least_sectors: float = 0
    wavefronts: float = 0  # of shared memory
    least_wavefronts: float = 0
    barriers: float = 0  # waited at by warps
    array_bytes: float = 0  # of the arrays that are read or written, each once

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> "Work":
        instructions = Counter({name: factor * count for name, count in self.instructions.items()})
        return Work(instructions, *(factor * getattr(self, f.name) for f in fields(self)[1:]))

    def floors(self, device: Device) -> dict[str, float]:
        """Seconds that one launch of these instructions takes at least, by what limits it."""
        results = self.fused + max(self.products, self.sums)
        return {
            "matrix": self.matrix_operations * device.seconds(_MATRIX),
            "memory": max(0.0, self.array_bytes - device.cache) / device.memory,
            "L1+shared": (self.wavefronts + self.sectors / 4) * device.seconds(1),
            "special": self.specials * device.seconds(_SPECIALS),
            "float": results * device.seconds(_FLOATS),
        }


def count(launch: Executed) -> Work:
    """What the programs that ran did, on the mean, times the programs of the launch."""
    work = Work()
    for source, counts in zip(launch.program.sources, launch.run.counts):
        executed = int(counts["executed"])
        if not executed:
            continue
        opcode, kind = source.opcode, classify(source.opcode)
        work.instructions[kind] += executed
        if kind == "matrix":
            m, n, k = map(int, re.search(r"\.m(\d+)n(\d+)k(\d+)", opcode).groups())
            work.matrix_operations += 2 * min(m, 16) * n * k * executed  # of wgmma a warp has 16 rows
        elif kind == "special" and not opcode.startswith("div"):  # of which the assembler may make products
            work.specials += 32 * executed
        elif kind == "float" and opcode.endswith("f32"):
            name = opcode.partition(".")[0]
            where = {"fma": "fused", "mul": "products", "add": "sums", "sub": "sums"}.get(name)
            if where:
                setattr(work, where, getattr(work, where) + 32 * executed)
        elif kind == "global":
            work.global_bytes += int(counts["bytes"])
            work.sectors += int(counts["units"])
            work.least_sectors += int(counts["ideal"])
        elif kind == "shared":
            work.wavefronts += int(counts["units"])
            work.least_wavefronts += int(counts["ideal"])
        elif opcode.startswith("bar."):
            work.barriers += executed
    work *= math.prod(launch.grid) / launch.programs
    work.array_bytes = _bytes_once(launch.run.touched)
    return work


def _bytes_once(arrays: list[torch.Tensor]) -> int:
    """Of views, those of one storage no more than it has."""
    storages: dict[int, list[torch.Tensor]] = {}
    for array in arrays:
        storages.setdefault(array.untyped_storage().data_ptr(), []).append(array)
    return sum(
        min(sum(view.numel() * view.element_size() for view in views), views[0].untyped_storage().nbytes())
        for views in storages.values()
    )


Call = tuple[str, tuple]  # an op, and its arguments: (shape, stride, dtype) of tensors


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "edt_kernels":
            self.calls[func._opname, tuple(map(_describe, args))] += 1
        return func(*args, **(kwargs or {}))


def _describe(argument):
    if not isinstance(argument, torch.Tensor):
        return argument
    return tuple(argument.shape), argument.stride(), argument.dtype


def calls_of_training_step(model: str, batch_size: int = BATCH_SIZE) -> Counter[Call]:
    """Every op that a training step calls, and how often: as EDT trains, without AMM."""
    from edt.model.transformer import EDTTransformer2DModel

    recorder = _Recorder()
    on_cpu = mock.patch.object(backend, "_INTERPRETED", True)
    kernels = mock.patch.dict("os.environ", EDT_KERNELS_BACKEND="triton")
    no_values = mock.patch("torch.nn.init.trunc_normal_")  # fake tensors have none to look at
    with FakeTensorMode(), no_values, on_cpu, kernels:
        network = EDTTransformer2DModel(**PRESETS[model]).train()
        latents = torch.empty(batch_size, network.config.in_channels, *network.latent_size)
        timestep, labels = (torch.zeros(batch_size, dtype=torch.int64) for _ in range(2))
        masks = network.draw_keep_masks(batch_size)
        with recorder, torch.autocast("cpu", torch.bfloat16):
            for keep_masks in (None, masks):
                network(latents, timestep, labels, keep_masks).sample.float().sum().backward()
    return recorder.calls


def execute(call: Call, target: str, every_program: bool = False) -> list[Executed]:
    """The launches of one call; of each some of the programs run, or all."""
    op, arguments = call
    tensors = [_zeros(*a) if isinstance(a, tuple) and len(a) == 3 else a for a in arguments]
    with executing(target, programs=None if every_program else _sample, check=False) as launches:
        getattr(torch.ops.edt_kernels, op)(*tensors)
    return launches


def _zeros(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """At those strides; masks are true. Memory that is only read stays unallocated."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    zeros = torch.zeros(size, dtype=dtype).as_strided(shape, strides)
    return zeros.fill_(True) if dtype == torch.bool else zeros


def _sample(total: int) -> list[int]:
    if total <= _SAMPLED:
        return list(range(total))
    step = next(n for n in range(round(total * 0.618), total) if math.gcd(n, total) == 1)
    return [i * step % total for i in range(_SAMPLED)]


@dataclass
class Row:
    """A kernel at one shape in a model's training step."""

    model: str
    kernel: str
    shape: str
    launches: int  # a step
    programs: int
    warps: int  # of a program
    work: Work  # of one launch
    wide: list[tuple[float, str]]  # ratio of sectors or wavefronts to the fewest possible, and where


def rows(model: str, target: str = "sm_90", batch_size: int = BATCH_SIZE) -> Iterator[Row]:
    calls = calls_of_training_step(model, batch_size)
    for call, times in tqdm(calls.items(), desc=f"executing {model}", disable=None):
        for launch in execute(call, target):
            op = call[0].removesuffix("_backward")
            tensor = next(a for a in call[1] if isinstance(a, tuple))
            name = launch.kernel if op == "amm_attention" else f"{op}.{launch.kernel}"
            shape = "×".join(map(str, tensor[0][1:]))
            warps = launch.program.kernel.threads // 32
            yield Row(model, name, shape, times, math.prod(launch.grid), warps, count(launch), _wide(launch))


def _wide(launch: Executed) -> list[tuple[float, str]]:
    """The instructions that ask for the most sectors or wavefronts beyond the fewest possible."""
    found: Counter[tuple[str, str]] = Counter()
    least: Counter[tuple[str, str]] = Counter()
    for source, counts in zip(launch.program.sources, launch.run.counts):
        place = launch.program.kernel.places.get(source.line, "").partition(" @")[0]
        key = (source.opcode, place)
        found[key] += int(counts["units"])
        least[key] += int(counts["ideal"])
    total = sum(found.values())
    return sorted(
        ((found[key] / least[key], f"`{key[0]}` at {key[1]}") for key in found
         if least[key] and found[key] > 1.5 * least[key] and found[key] > 0.1 * total),
        reverse=True,
    )  # fmt: skip


def report(measured: list[Row], target: str) -> str:
    """In Markdown."""
    versions = f"PyTorch {torch.__version__.partition('+')[0]}, Triton {triton.__version__}"
    sections = [
        "# What the compiled kernels do, counted while they ran on the CPU",
        f"Written by `python -m benchmarks executed` ({versions}, {target}). The ops of a training step (a full "
        "and a masked pass, forward and backward) at 256² pixels and batch "
        f"{BATCH_SIZE}. Of each launch {_SAMPLED} programs ran, spread over the grid; numbers are of a whole "
        "launch or step. Instructions are those of PTX: the assembler drops and joins some.",
        "**Floors are bounds, not timings**: at published rates these instructions take no less. How far above "
        "them a device is, latency, occupancy and the order of instructions decide, of which nothing is known "
        "here. Rates: "
        + "; ".join(_rates(device) for device in DEVICES)
        + ". Memory: every array that a launch touches once, less what the L2 cache may hold. L1+shared: a "
        "wavefront of shared memory or four sectors of global memory a clock; what matrix instructions read there "
        "is not counted. Special functions without divisions, of which the assembler may make products.",
        "## A training step",
        _steps(measured),
        "## Floors of each kernel, milliseconds a launch",
        _floors(measured),
        "## Warp instructions of each kernel, thousands a program, by class",
        _instructions(measured),
        "## Memory",
        "Bytes that lanes ask for, in MB a launch; sectors of 32 bytes over as many as those bytes fill (fewer, "
        "where lanes ask for the same ones); wavefronts of shared memory over those without conflicts of banks; "
        "barriers that a warp waits at in a program.",
        _memory(measured),
        "## Accesses that take more than 1.5 times the fewest sectors or wavefronts",
        "At most three a kernel, of those that are a tenth of all its sectors and wavefronts.",
        _worst(measured),
    ]
    return "\n\n".join(sections) + "\n"


def _markdown(titles: list[str], table: list[tuple]) -> str:
    return tables.markdown(titles, [list(map(str, cells)) for cells in table])


def _rates(device: Device) -> str:
    return (
        f"{device.name} {device.memory / 1e12:g} TB/s, {device.cache / 1e6:g} MB of L2, {device.multiprocessors} "
        f"multiprocessors at {device.clock / 1e9:g} GHz"
    )


def _steps(measured: list[Row]) -> str:
    table = []
    for model in dict.fromkeys(row.model for row in measured):
        own = [row for row in measured if row.model == model]
        for part, chosen in (
            ("attention", [row for row in own if "." not in row.kernel]),
            ("norms", [row for row in own if "." in row.kernel]),
            ("all", own),
        ):
            work = sum((row.work * row.launches for row in chosen), Work())
            floors = [
                f"{1e3 * sum(row.launches * max(row.work.floors(device).values()) for row in chosen):.2f}"
                for device in DEVICES
            ]
            counts = {
                "launches": sum(row.launches for row in chosen),
                "10⁹ warp instructions": f"{sum(work.instructions.values()) / 1e9:.2f}",
                "10¹² matrix operations": f"{work.matrix_operations / 1e12:.2f}",
                "10⁹ special functions": f"{work.specials / 1e9:.1f}",
                "GB of arrays": f"{work.array_bytes / 1e9:.1f}",
                "GB of sectors": f"{32 * work.sectors / 1e9:.1f}",
                "10⁹ wavefronts": f"{work.wavefronts / 1e9:.2f}",
            }
            table.append((model, part, *counts.values(), *floors))
    return _markdown(["model", "ops", *counts, *(f"floor on {d.name}, ms" for d in DEVICES)], table)


def _kernels(measured: list[Row]) -> Iterator[tuple[tuple[str, str], Row]]:
    """One row for each kernel and shape, whichever models have it."""
    seen: dict[tuple[str, str], Row] = {}
    for row in sorted(measured, key=lambda row: row.kernel):
        seen.setdefault((row.kernel, row.shape), row)
    yield from seen.items()


def _floors(measured: list[Row]) -> str:
    limits = list(Work().floors(DEVICES[0]))
    table = []
    for key, row in _kernels(measured):
        first, second = (row.work.floors(device) for device in DEVICES)
        cells = [f"{1e3 * seconds:.4f}" for seconds in first.values()]
        memory = f"{1e3 * second['memory']:.4f}"
        table.append((*key, *cells, memory, max(first, key=first.get), max(second, key=second.get)))
    titles = [
        "kernel",
        "shape",
        *(f"{limit}" for limit in limits),
        "memory, H200",
        "limit on H100",
        "limit on H200",
    ]
    return _markdown(titles, table)


def _instructions(measured: list[Row]) -> str:
    table = [
        (*key, row.programs, *(f"{row.work.instructions[kind] / row.programs / 1e3:.2f}" for kind in _CLASSES))
        for key, row in _kernels(measured)
    ]
    return _markdown(["kernel", "shape", "programs", *_CLASSES], table)


def _memory(measured: list[Row]) -> str:
    table = []
    for key, row in _kernels(measured):
        work = row.work
        sectors = f"{work.sectors / work.least_sectors:.2f}" if work.least_sectors else ""
        wavefronts = f"{work.wavefronts / work.least_wavefronts:.2f}" if work.least_wavefronts else ""
        table.append(
            (*key, f"{work.global_bytes / 1e6:.1f}", f"{work.array_bytes / 1e6:.1f}", sectors, wavefronts,
             f"{work.barriers / row.programs / row.warps:.0f}")
        )  # fmt: skip
    return _markdown(
        ["kernel", "shape", "MB asked for", "MB of arrays", "sectors", "wavefronts", "barriers"], table
    )


def _worst(measured: list[Row]) -> str:
    table = [(*key, f"{ratio:.1f}×", where) for key, row in _kernels(measured) for ratio, where in row.wide[:3]]
    return _markdown(["kernel", "shape", "ratio", "instruction and place"], table)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks executed", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--target", default="sm_90", choices=["sm_80", "sm_86", "sm_90"])
    parser.add_argument("--out", type=Path, help="write the tables here, as Markdown, instead of printing them")
    options = parser.parse_args(arguments)
    if missing := build.needs():
        parser.error(missing)
    if options.out is not None:  # before the minutes of work
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.touch()
    measured = [row for model in options.models for row in rows(model, options.target)]
    text = report(measured, options.target)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0
