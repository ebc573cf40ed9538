"""What the compiler makes of every kernel at the tiles that dispatch chooses, for GPUs that need not be there.

    python -m benchmarks.static [--targets sm_90 gfx942] [--models EDT-S/2 SD3-medium] [--out table.json]

The launchers run on CPU tensors with every launch recorded instead of run, so that what is compiled is what a call
would launch: the same arguments, specialisations and tiles. Prints, for each kernel, target and set of shapes that
share its code: registers, spilled bytes, shared memory, matrix instructions, the programs that fit on a
multiprocessor, and the instructions of the inner loop by class. --out also stores how wide each argument is loaded,
and a summary in Markdown beside it. The exit status is 1 if a kernel has a fault (see `faults`).
"""

import argparse
import contextlib
import importlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from edt.config import PRESETS

from .assembly import MULTIPROCESSORS, global_loads, instruction_mix, resident_programs

# `gated_residual` is launched by `gated_residual_adaln`.
OPS = ("amm_attention", "adaln", "gated_residual_adaln", "token_merge_adaln", "token_split_concat_adaln")
_LAUNCHERS = {op: importlib.import_module(f"edt_kernels.{op}.autograd") for op in OPS}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_UNITS = {"sm_80": "mma", "sm_86": "mma", "sm_90": "wgmma", "sm_100": "wgmma", "sm_120": "mma", "gfx942": "mfma"}
# The instructions of those units: sm_120 has the warp's mma of sm_80, not sm_100's tcgen05.
_MATRIX_INSTRUCTION = {
    "sm_80": r"\bHMMA\b",
    "sm_86": r"\bHMMA\b",
    "sm_90": r"\bHGMMA\b",
    "sm_100": r"\bUTCHMMA\b",
    "sm_120": r"\bHMMA\b",
    "gfx942": r"\bv_mfma_",
}
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}
_BYTES = {"*fp32": 4, "*bf16": 2, "*fp16": 2, "*u8": 1}

# Arguments that are rightly loaded in pieces smaller than their alignment allows.
NARROW_LOADS = {
    "bias": "gathered from the table at the offset of each pair of tokens",
    "modulation": "gathered from the table at the offset of each pair of tokens",
    "logsumexp": "one number a row",
    "delta": "one number a row",
    "mean": "one number a row",
    "rstd": "one number a row",
    "keep": "one byte a token",
    "shift": "one row a program, shared out among all its threads",
    "scale": "one row a program, shared out among all its threads",
    "gate": "one row a program, shared out among all its threads",
    "partials": "gathered: neighbouring offsets of a table come from different tiles",
}


class AttentionShape(NamedTuple):
    model: str
    grid: tuple[int, int]
    heads: int
    head_dim: int
    num_extra_tokens: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        before, after = self.num_extra_tokens
        extra = f" {before}+{after} extra" if before or after else ""
        return f"{self.model} {self.grid[0]}x{self.grid[1]} {self.heads}x{self.head_dim}{extra}"


class NormShape(NamedTuple):
    model: str
    grid: tuple[int, int]
    channels: int
    resizes: bool = False  # the stage is merged into the next one and, later, split back to

    def __str__(self) -> str:
        return f"{self.model} {self.grid[0]}x{self.grid[1]} C{self.channels}"


def _edt_shapes() -> tuple[list[AttentionShape], list[NormShape]]:
    """Every stage of EDT-S, B and XL for images of 256² and 512² pixels."""
    attention, norms = [], []
    for model in ("EDT-S/2", "EDT-B/2", "EDT-XL/2"):
        preset = PRESETS[model]
        for first in (16, 32):
            for stage in range(3):
                grid, channels = (first >> stage, first >> stage), preset["hidden_sizes"][stage]
                heads = preset["num_attention_heads"][stage]
                attention.append(AttentionShape(model, grid, heads, channels // heads))
                norms.append(NormShape(model, grid, channels, resizes=stage < 2))
    return attention, norms


EDT_ATTENTION, EDT_NORMS = _edt_shapes()
# Other transformers that the ops are meant for. SD3's joint attention has 333 text tokens beside the image's.
OTHER_ATTENTION = [
    AttentionShape("DiT-XL/2", (16, 16), 16, 72),
    AttentionShape("DiT-XL/2", (32, 32), 16, 72),
    AttentionShape("PixArt-alpha", (64, 64), 16, 72),
    AttentionShape("SD3-medium", (64, 64), 24, 64, (0, 333)),
    AttentionShape("SD3-medium", (64, 64), 24, 64, (333, 0)),
]
OTHER_NORMS = [
    NormShape("DiT-XL/2", (16, 16), 1152),
    NormShape("DiT-XL/2", (32, 32), 1152),
    NormShape("PixArt-alpha", (64, 64), 1152),
    NormShape("SD3-medium", (64, 64), 1536),
]
SHAPES = [*EDT_ATTENTION, *EDT_NORMS, *OTHER_ATTENTION, *OTHER_NORMS]
MODELS = sorted({shape.model for shape in SHAPES})


@dataclass
class Launch:
    """One recorded launch: a kernel, the types of its run-time arguments, its compile-time arguments."""

    op: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, object]
    divisible: list[int]
    options: dict[str, int]
    module: str  # of the kernel

    @property
    def identity(self) -> str:
        """The same for launches that compile to the same code."""
        return repr((self.module, self.kernel, self.signature, self.constants, self.divisible, self.options))


@dataclass
class Report:
    """One kernel, compiled for one target."""

    target: str
    op: str
    kernel: str  # with a letter for each flag, see `_FLAGS`
    dtype: str
    shapes: list[str]  # that launch this code
    tile: dict[str, int]  # its integer constants, num_warps and num_stages
    registers: int
    spilled_bytes: int
    shared_memory: int
    multiplies: bool  # the kernel has a matrix product
    matrix_instructions: int
    programs_per_multiprocessor: int
    occupancy: float  # resident warps, as a share of the most there can be
    limited_by: str
    inner_loop: bool  # what `instructions` counts; without a loop, the whole kernel
    instructions: dict[str, int]  # by class
    # Of each argument: how many loads of how many bytes; what the alignment of rows allows.
    bytes_per_load: dict[str, dict[int, int]] = field(default_factory=dict)
    possible_bytes_per_load: dict[str, int] = field(default_factory=dict)


def faults(report: Report) -> list[str]:
    """What a kernel must not have at a production shape."""
    found = []
    if report.spilled_bytes:
        found.append(f"spills {report.spilled_bytes} bytes")
    if report.multiplies and not report.matrix_instructions:
        found.append("multiplies matrices without the matrix unit")
    limit = MULTIPROCESSORS[report.target].shared_memory_of_program
    if report.shared_memory > limit:
        found.append(f"needs {report.shared_memory} bytes of shared memory of {limit}")
    for argument, possible in report.possible_bytes_per_load.items():
        narrowest = min(report.bytes_per_load[argument])
        if narrowest < possible:
            found.append(f"loads {argument} by {narrowest} bytes where {possible} are possible")
    if "unknown" in report.bytes_per_load:
        found.append("loads from an address that could not be traced to an argument")
    return found


@contextlib.contextmanager
def record_launches(launches: list[Launch], op: str, target: str):
    """Records every launch of a kernel instead of running it, with the device's matrix unit that of the target."""

    def record(kernel: JITFunction, *args, grid, warmup, **kwargs):
        launches.append(_describe(op, kernel, args, kwargs))

    unit = mock.patch.object(_LAUNCHERS["amm_attention"], "matrix_unit", lambda _device: MATRIX_UNITS[target])
    with unit, mock.patch.object(JITFunction, "run", record):
        yield


def _describe(op: str, kernel: JITFunction, args: tuple, kwargs: dict) -> Launch:
    """Types and specialisations as Triton's own launcher would derive them."""
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args)) | {name: value for name, value in kwargs.items() if name in names}
    options = {name: value for name, value in kwargs.items() if name not in names}
    signature, constants, divisible = {}, {}, []
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        aligned = False
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            kind, constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            kind, aligned = f"*{_TYPES[value.dtype]}", value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind, aligned = ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0
        signature[parameter.name] = kind
        if aligned:
            divisible.append(place)
    return Launch(op, kernel.fn.__name__, signature, constants, divisible, options, kernel.fn.__module__)


def attention_launches(
    grid: tuple[int, int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    target: str,
    batch_size: int = 8,
    num_extra_tokens: tuple[int, int] = (0, 0),
) -> list[Launch]:
    """Every launch of one training step of `amm_attention` on a packed projection, both tables learned."""
    (H, W), (before, after) = grid, num_extra_tokens
    q, k, v = torch.empty(batch_size, before + H * W + after, 3, heads, head_dim, dtype=dtype).unbind(2)
    modulation, bias = torch.empty(2 * H - 1, 2 * W - 1), torch.empty((2 * H - 1) * (2 * W - 1), heads)
    arguments = (modulation, bias, H, W, before, head_dim**-0.5)
    attention = _LAUNCHERS["amm_attention"]
    launches: list[Launch] = []
    with record_launches(launches, "amm_attention", target):
        out, logsumexp = attention._forward(q, k, v, *arguments)
        attention._backward(out, q, k, v, *arguments[:2], out, logsumexp, *arguments[2:], True, True)
        # Inference without AMM and training as EDT does it: the bias alone is learned.
        attention._forward(q, k, v, None, *arguments[1:])
        attention._backward(out, q, k, v, None, bias, out, logsumexp, *arguments[2:], False, True)
    return unique(launches)


def norm_launches(
    grid: tuple[int, int],
    channels: int,
    target: str,
    batch_size: int = 8,
    resizes: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Launch]:
    """Every launch of the norm-type ops for tokens of this grid, in the dtypes of autocast: a float32 residual
    stream, branches and modulation in `dtype`. With `resizes`, the merge from this grid and the split to it too."""
    B, (H, W), C = batch_size, grid, channels
    narrow = {"dtype": dtype}
    stream, branch = torch.empty(B, H * W, C), torch.empty(B, H * W, C, **narrow)
    modulation = [torch.empty(B, 6 * C, **narrow)[:, i * C : (i + 1) * C] for i in range(3)]
    statistics = torch.empty(B, H * W)
    launches: list[Launch] = []
    op = _LAUNCHERS["adaln"]
    with record_launches(launches, "adaln", target):
        op._forward(stream, *modulation[:2], 1e-6, dtype)
        op._backward(branch, stream, modulation[0], statistics, statistics)
    op = _LAUNCHERS["gated_residual_adaln"]
    with record_launches(launches, "gated_residual_adaln", target):
        op._forward(stream, branch, *modulation, 1e-6, dtype)
        op._backward(stream, branch, stream, branch, *modulation[:2], statistics, statistics)
        op._residual_forward(stream, branch, modulation[0])
        op._residual_backward(stream, branch, modulation[0])
    if not resizes:
        return unique(launches)
    op, merged = _LAUNCHERS["token_merge_adaln"], torch.empty(B, H * W // 4, 4 * C, **narrow)
    modulation = [torch.empty(B, 8 * C, **narrow)[:, i * 4 * C : (i + 1) * 4 * C] for i in range(2)]
    keep, statistics = torch.ones(B, H * W, dtype=torch.bool), torch.empty(B, H * W // 4)
    with record_launches(launches, "token_merge_adaln", target):
        for mask in (None, keep):
            op._forward(stream, *modulation, mask, H, W, 1e-6, dtype)
            op._backward(merged, stream, modulation[0], mask, statistics, statistics, H, W)
    op, joined = _LAUNCHERS["token_split_concat_adaln"], torch.empty(B, H * W, 2 * C, **narrow)
    modulation = [torch.empty(B, 4 * C, **narrow)[:, i * 2 * C : (i + 1) * 2 * C] for i in range(2)]
    statistics = torch.empty(B, H * W)
    with record_launches(launches, "token_split_concat_adaln", target):
        op._forward(merged, stream, *modulation, H // 2, W // 2, 1e-6, dtype)
        op._backward(joined, merged, stream, modulation[0], statistics, statistics, H // 2, W // 2)
    return unique(launches)


def launches_of(shape: AttentionShape | NormShape, target: str, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Every launch of a training step at a shape."""
    if isinstance(shape, NormShape):
        return norm_launches(shape.grid, shape.channels, target, resizes=shape.resizes, dtype=dtype)
    _, grid, heads, head_dim, extra = shape
    return attention_launches(grid, heads, head_dim, dtype, target, num_extra_tokens=extra)


def unique(launches: list[Launch]) -> list[Launch]:
    """The first of each set of launches that compile to the same code, in order."""
    return list({launch.identity: launch for launch in reversed(launches)}.values())[::-1]


def possible_load_bytes(launch: Launch) -> dict[str, int]:
    """For each argument that is read as rows: the bytes that one load may take.

    A row starts at a multiple of ALIGN elements, and its channels (D or C) end at a mask; a thread loads the largest
    power of two of elements that divides both, up to 16 bytes. D = 52 in bfloat16 has rows of 104 bytes: 8.
    """
    if "ALIGN" not in launch.constants:
        return {}
    channels = launch.constants["D" if "D" in launch.constants else "C"]
    elements = math.gcd(launch.constants["ALIGN"], channels)
    return {
        argument: min(16, elements * _BYTES[kind])
        for argument, kind in launch.signature.items()
        if kind.startswith("*") and argument not in NARROW_LOADS
    }


def compile_launch(launch: Launch, target: str):
    """Triton's compiled kernel of one launch for one target."""
    source = ASTSource(
        fn=getattr(importlib.import_module(launch.module), launch.kernel),
        signature=launch.signature,
        constexprs=launch.constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in launch.divisible},
    )
    return triton.compile(source, target=TARGETS[target], options=launch.options)


_FLAGS = {"HAS_BIAS": "b", "HAS_MODULATION": "m", "NORM": "n", "MASKED": "k", "HAS_EXTRA": "x"}


def report(launch: Launch, target: str, shapes: list[str] = (), disassemble: bool = True) -> Report:
    """Compiles a launch for a target. Without `disassemble`, which is a third of the time, the instructions of
    kernels without a matrix product are not counted."""
    compiled = compile_launch(launch, target)
    multiplies = "tt.dot" in compiled.asm["ttir"]
    assembly = ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        if target.startswith("gfx"):
            assembly = compiled.asm["amdgcn"]
            registers, spilled = _amd_registers(assembly)
        else:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            registers, spilled = _nvidia_registers(cubin.name)
            if multiplies or disassemble:
                assembly = _run(_NVIDIA_TOOLS / "nvdisasm", "-c", cubin.name)
    num_warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    programs, limited_by = resident_programs(target, num_warps, registers, shared, tensor_memory)
    mix, has_loop = instruction_mix(assembly)
    arguments = [name for name, kind in launch.signature.items() if kind != "constexpr"]
    loads = global_loads(compiled.asm["llir"], arguments)
    integers = {name: n for name, n in launch.constants.items() if type(n) is int and name.isupper()}
    flags = "".join(letter for flag, letter in _FLAGS.items() if launch.constants.get(flag) is True)
    return Report(
        target=target,
        op=launch.op,
        kernel=f"{launch.kernel}[{flags}]" if flags else launch.kernel,
        dtype=" ".join(sorted({kind[1:] for kind in launch.signature.values() if kind in ("*bf16", "*fp16")})) or "fp32",
        shapes=list(shapes),
        tile=integers | {"num_warps": num_warps, "num_stages": compiled.metadata.num_stages},
        registers=registers,
        spilled_bytes=spilled,
        shared_memory=shared,
        multiplies=multiplies,
        matrix_instructions=len(re.findall(_MATRIX_INSTRUCTION[target], assembly)),
        programs_per_multiprocessor=programs,
        occupancy=programs * num_warps / MULTIPROCESSORS[target].warps,
        limited_by=limited_by,
        inner_loop=has_loop,
        instructions=mix,
        bytes_per_load=loads,
        possible_bytes_per_load={name: n for name, n in possible_load_bytes(launch).items() if name in loads},
    )


def _nvidia_registers(cubin: str) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack: Triton's kernels have nothing there but spilled registers."""
    usage = _run(_NVIDIA_TOOLS / "cuobjdump", "--dump-resource-usage", cubin)
    return int(re.search(r"REG:(\d+)", usage).group(1)), int(re.search(r"STACK:(\d+)", usage).group(1))


def _amd_registers(gcn: str) -> tuple[int, int]:
    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", gcn).group(1))

    return value("vgpr_count"), 4 * (value("vgpr_spill_count") + value("sgpr_spill_count"))


def _run(*command) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def line(row: Report) -> str:
    """A report on one line of text."""
    mix = " ".join(f"{kind} {count}" for kind, count in row.instructions.items())
    shapes = row.shapes[0] + (f" +{len(row.shapes) - 1}" if len(row.shapes) > 1 else "")
    return (
        f"{row.target:6} {row.op:24} {row.kernel:20} {row.dtype:4} {shapes:38} {row.registers:4} "
        f"{row.spilled_bytes:5} {row.shared_memory:7} {row.matrix_instructions:6} {row.programs_per_multiprocessor:5}"
        f" {row.occupancy:5.0%}  {mix}"
    )


HEADER = (
    f"{'target':6} {'op':24} {'kernel':20} {'type':4} {'shapes':38} regs spill  shared matrix programs occ  inner loop"
)


def summary(rows: list[Report]) -> str:
    """The table in Markdown: what a kernel takes over all its shapes, and what its inner loop is made of."""
    text = [
        "# What the compiler makes of every kernel",
        "",
        "Written by `python -m benchmarks.static` "
        f"(PyTorch {torch.__version__.split('+')[0]}, Triton {triton.__version__}); [table.json](table.json) has every "
        "row. Ranges are over shapes and flags. Programs: how many fit on a multiprocessor at once, and what limits the "
        "fewest. Limits: CUDA C++ programming guide, CDNA3 instruction set architecture (`benchmarks/assembly.py`).",
        "",
        "| target | op | kernel | rows | registers | spilled bytes | shared memory, KB | programs | limit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, str, str], list[Report]] = {}
    for row in rows:
        groups.setdefault((row.target, row.op, row.kernel.partition("[")[0]), []).append(row)
    for key, group in groups.items():
        fewest = min(group, key=lambda row: row.programs_per_multiprocessor)
        values = (
            _span(row.registers for row in group),
            _span(row.spilled_bytes for row in group),
            _span(round(row.shared_memory / 1024) for row in group),
            _span(row.programs_per_multiprocessor for row in group),
        )
        text.append(f"| {' | '.join(key)} | {len(group)} | {' | '.join(values)} | {fewest.limited_by} |")
    kinds = [kind for kind, _ in Counter(kind for row in rows for kind in row.instructions).most_common()]
    text += [
        "",
        "Instructions of the inner loop by class (of the whole kernel where it has no loop), at each op's first shape "
        "with every flag. A compiler may have unrolled the loop.",
        "",
        f"| target | op | kernel | {' | '.join(kinds)} |",
        f"| --- | --- | --- |{' --- |' * len(kinds)}",
    ]
    for (target, op, _), group in groups.items():
        row = max(group, key=lambda row: row.kernel.count("") if row.shapes[0] == group[0].shapes[0] else 0)
        counts = " | ".join(str(row.instructions.get(kind, 0)) for kind in kinds)
        text.append(f"| {target} | {op} | {row.kernel}{'' if row.inner_loop else ' (no loop)'} | {counts} |")
    text += ["", "Bytes per load of rows, over all shapes: what the alignment allows is what is loaded, unless named.", ""]
    text += ["| op | kernel | argument | bytes per load | possible |", "| --- | --- | --- | --- | --- |"]
    widths: dict[tuple[str, str, str], tuple[set, set]] = {}
    for row in rows:
        for argument, counts in row.bytes_per_load.items():
            key = (row.op, row.kernel.partition("[")[0], argument)
            actual, possible = widths.setdefault(key, (set(), set()))
            actual |= set(counts)
            possible |= {row.possible_bytes_per_load.get(argument, NARROW_LOADS.get(argument, ""))}
    for key, sets in widths.items():
        text.append(f"| {' | '.join(key)} | {' | '.join(', '.join(map(str, sorted(s, key=str))) for s in sets)} |")
    return "\n".join(text) + "\n"


def _span(numbers) -> str:
    numbers = sorted(set(numbers))
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def _report(job: tuple) -> Report:
    return report(*job)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out", type=Path, help="store the table here as JSON, and a summary beside it as Markdown")
    options = parser.parse_args(arguments)
    jobs: dict[str, tuple[Launch, str, list[str]]] = {}
    for target in options.targets:
        for dtype in options.dtypes:
            for shape in SHAPES:
                if shape.model in options.models:
                    for launch in launches_of(shape, target, getattr(torch, dtype)):
                        jobs.setdefault(f"{target} {launch.op} {launch.identity}", (launch, target, []))[2].append(str(shape))
    print(HEADER)
    rows: list[Report] = []
    with ProcessPoolExecutor() as pool:
        for row in tqdm(pool.map(_report, jobs.values()), total=len(jobs), desc="compiling", disable=None):
            tqdm.write(line(row))
            rows.append(row)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")
        options.out.with_suffix(".md").write_text(summary(rows))
    faulty = [f"{row.target} {row.op} {row.kernel} {row.shapes[0]}: {fault}" for row in rows for fault in faults(row)]
    print(f"{len(rows)} kernels, {len(faulty)} faults", *faulty, sep="\n")
    sys.exit(bool(faulty))


if __name__ == "__main__":
    main()
