"""What the compiler makes of every kernel at the tiles that dispatch chooses, for GPUs that need not be there.

    python -m benchmarks static [--targets sm_90 gfx942] [--models EDT-S/2] [--faults | --out table.json]

The launchers run on CPU tensors with every launch recorded instead of run, so that what is compiled is what a call
would launch: the same arguments, specialisations and tiles (of a measured table, if EDT_BENCHMARK_TILES names
one).
Prints, for each kernel, target and set of shapes that share its code: registers, spilled bytes, shared memory,
matrix instructions, the programs that fit on a multiprocessor, and the instructions of the inner loop by class.
--out also stores how wide each argument is loaded, and a summary in Markdown beside it. With --faults only what is
wrong is printed, and only what the stored table has not is compiled (`fingerprint`). The exit status is 1 if a
kernel has a fault (`static_report.faults`).
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from edt_kernels import _launch
from edt_kernels.amm_attention import autograd as attention
from edt_kernels.norms import autograd as norms

from .assembly import MULTIPROCESSORS, global_loads, instruction_mix, resident_programs
from .hopper import product_faults
from .shapes import EDT_ATTENTION, EDT_NORMS, OTHER_ATTENTION, OTHER_NORMS, AttentionShape, NormShape
from .static_report import FLAGS, HEADER, NARROW_LOADS, Report, faults, line, summary

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_UNITS = {
    "sm_80": "mma",
    "sm_86": "mma",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "sm_120": "mma",
    "gfx942": "mfma",
}
# The instructions of those units, in PTX or GCN.
_MATRIX_INSTRUCTION = {
    "mma": r"\bmma\.sync\b",
    "wgmma": r"\bwgmma\.mma_async\b",
    "tcgen05": r"\btcgen05\.mma\b",
    "mfma": r"\bv_mfma_",
}
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
}
_BYTES = {"*fp32": 4, "*bf16": 2, "*fp16": 2, "*u8": 1}


STORED = Path(__file__).parent / "results" / "static" / "table.json"
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


@contextlib.contextmanager
def record_launches(launches: list[Launch], op: str, target: str):
    """Records every launch of a kernel instead of running it, with the device's matrix unit that of the target."""

    def record(kernel: JITFunction, *args, grid, warmup, **kwargs):
        launches.append(describe(op, kernel, args, kwargs))

    unit = mock.patch.object(attention, "matrix_unit", return_value=MATRIX_UNITS[target])
    with unit, mock.patch.object(JITFunction, "run", record), planning_anew():
        yield


@contextlib.contextmanager
def planning_anew():
    """Launches inside are not those of before and after."""
    _launch.forget_plans()
    try:
        yield
    finally:
        _launch.forget_plans()


def describe(op: str, kernel: JITFunction, args: tuple, kwargs: dict) -> Launch:
    """Types and specialisations as Triton's own launcher would derive them."""
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args)) | {name: value for name, value in kwargs.items() if name in names}
    options = {name: value for name, value in kwargs.items() if name not in names}
    signature, constants, divisible = {}, {}, []
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        aligned = False
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            kind, constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            kind, aligned = f"*{_TYPES[value.dtype]}", value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if abs(value) < 2**31 else "i64"
            free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            aligned = value % 16 == 0 and not free
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
    batch_sizes: tuple[int, ...] = (16, 64),  # of which dispatch takes other kernels
    num_extra_tokens: tuple[int, int] = (0, 0),
) -> list[Launch]:
    """Every launch of training steps of `amm_attention` on a packed projection: with a bias and a learned, a fixed
    and no modulation, the last as EDT trains; and without a bias, as AMM is added to other models."""
    (H, W), (before, after) = grid, num_extra_tokens
    table, bias = torch.empty(2 * H - 1, 2 * W - 1), torch.empty((2 * H - 1) * (2 * W - 1), heads)
    arguments = (H, W, before, head_dim**-0.5)
    launches: list[Launch] = []
    with record_launches(launches, "amm_attention", target):
        for batch_size in batch_sizes:
            qkv = torch.empty(batch_size, before + H * W + after, 3, heads, head_dim, dtype=dtype).unbind(2)
            for modulation, learned, rel_pos_bias in (
                (table, True, bias),
                (table, False, bias),
                (None, False, bias),
                (table, True, None),
                (table, False, None),
                (None, False, None),
            ):
                tables = modulation, rel_pos_bias
                out, logsumexp = attention._forward(*qkv, *tables, *arguments)
                needed = learned, rel_pos_bias is not None
                attention._backward(out, *qkv, *tables, out, logsumexp, *arguments, *needed)
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
    stream, branches and modulation in `dtype`. With `resizes`, the merge from this grid and the split to it, too.
    """
    B, (H, W), C = batch_size, grid, channels
    narrow = {"dtype": dtype}

    def modulation(width: int) -> list[Tensor]:
        return [torch.empty(B, 6 * width, **narrow)[:, i * width : (i + 1) * width] for i in range(3)]

    stream, branch, keep = torch.empty(B, H * W, C), torch.empty(B, H * W, C, **narrow), None
    gate, shift, scale = modulation(C)
    calls = [  # x, y, gate, shift, scale, keep, the width of the grid; the norm's rows and their width
        ("adaln", stream, None, None, shift, scale, None, 0, (H * W, C)),
        ("gated_residual", stream, branch, gate, None, None, None, 0, None),
        ("gated_residual_adaln", stream, branch, gate, shift, scale, None, 0, (H * W, C)),
    ]
    if resizes:
        merged = torch.empty(B, H * W // 4, 4 * C, **narrow)
        for keep in (None, torch.ones(B, H * W, dtype=torch.bool)):
            calls += [("token_merge_adaln", stream, None, None, *modulation(4 * C)[1:], keep, W, merged.shape[1:])]
        split = (H * W, 2 * C)
        calls += [("token_split_concat_adaln", merged, stream, None, *modulation(2 * C)[1:], None, W // 2, split)]
    launches: list[Launch] = []
    for op, x, y, gate, shift, scale, keep, grid_w, normed in calls:
        with record_launches(launches, op, target):
            norms._forward(op, x, y, gate, shift, scale, keep, grid_w, 1e-6, dtype)
            grads = None if gate is None else stream, None if normed is None else torch.empty(B, *normed, **narrow)
            saved = (None, None) if normed is None else (x, torch.empty(B, normed[0], 2))
            norms._backward(op, *grads, saved[0], y, gate, scale, keep, saved[1], grid_w)
    return unique(launches)


def launches_of(
    shape: AttentionShape | NormShape, target: str, dtype: torch.dtype = torch.bfloat16
) -> list[Launch]:
    """Every launch of a training step at a shape."""
    if isinstance(shape, NormShape):
        return norm_launches(shape.grid, shape.channels, target, resizes=shape.resizes, dtype=dtype)
    _, grid, heads, head_dim, extra = shape
    return attention_launches(grid, heads, head_dim, dtype, target, num_extra_tokens=extra)


def unique(launches: list[Launch]) -> list[Launch]:
    """One of each set of launches that compile to the same code, in the order of the sets' first."""
    return list({launch.identity: launch for launch in launches}.values())


def switches(launch: Launch) -> dict[str, bool]:
    """Which of `FLAGS` hold."""
    tables = "SIDE" in launch.constants or launch.kernel == "backward_tables"
    b, m = (tables and launch.signature.get(name, "constexpr") != "constexpr" for name in ("bias", "modulation"))
    masked, extra = (launch.constants.get(name) is True for name in ("MASKED", "HAS_EXTRA"))
    return {"b": b, "m": m, "s": (b or m) and launch.constants.get("SIDE", 0) > 0, "k": masked, "x": extra}


def possible_load_bytes(launch: Launch) -> dict[str, int]:
    """For each argument that is read as rows: the bytes that one load may take.

    A row starts at a multiple of ALIGN elements, and its channels (D or C) end at a mask; a thread loads the
    largest power of two of elements that divides both, up to 16 bytes. Heads of 52 in bfloat16 are 104 bytes
    apart: 8 bytes. The threads of a norm share its rows out by 16 bytes of the widest array, so that each load
    asks for whole sectors of memory: of a branch in bfloat16 beside a float32 stream that is 8 bytes.
    """
    if "ALIGN" not in launch.constants:
        return {}
    channels = launch.constants["D" if "D" in launch.constants else "C"]
    elements = math.gcd(launch.constants["ALIGN"], channels)
    rows = {
        argument: _BYTES[kind]
        for argument, kind in launch.signature.items()
        if kind.startswith("*") and argument not in NARROW_LOADS
    }
    if "LANES" in launch.constants:
        elements = min(elements, 16 // max(rows.values()))
    return {argument: min(16, elements * size) for argument, size in rows.items()}


def compile_launch(launch: Launch, target: str):
    """Triton's compiled kernel of one launch for one target."""
    source = ASTSource(
        fn=getattr(importlib.import_module(launch.module), launch.kernel),
        signature=launch.signature,
        constexprs=launch.constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in launch.divisible},
    )
    return triton.compile(source, target=TARGETS[target], options=launch.options)


def fingerprint(launch: Launch, target: str) -> str:
    """Of all that a report depends on: the sources of the op's kernels, types, constants, options, the target, the
    releases of Triton and its assembler, and the code that reports."""
    # Not the kernel's `cache_key`, which differs between processes where kernels call each other's functions.
    parts = (launch.op, launch.identity, _sources(launch.module), _tools(target))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def _sources(module: str) -> list[str]:
    """Of the kernels in the module's folder, and of what all ops share."""
    folder = Path(importlib.import_module(module).__file__).parent
    files = [*sorted(folder.glob("*.py")), *sorted(folder.parent.glob("_*.py"))]
    return [_digest(path) for path in files if "triton.language" in path.read_text(encoding="utf-8")]


@functools.cache
def _tools(target: str) -> tuple[str, ...]:
    code = ("static.py", "static_report.py", "assembly.py", "hopper.py")
    reporting = [_digest(Path(__file__).with_name(name)) for name in code]
    return (target, triton.__version__, make_backend(TARGETS[target]).hash(), *reporting)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stored_reports() -> dict[str, Report]:
    """The rows of the stored table by the fingerprints of what was compiled for them."""
    rows = [Report(**row) for row in json.loads(STORED.read_text())]
    for row in rows:  # JSON has no numbers as keys
        row.bytes_per_load = {
            name: {int(width): count for width, count in loads.items()}
            for name, loads in row.bytes_per_load.items()
        }
    return {name: row for row in rows for name in row.fingerprints}


def report(launch: Launch, target: str, shapes: list[str] = (), disassemble: bool = True) -> Report:
    """Compiles a launch for a target. Without `disassemble`, which is a third of the time, the instructions of the
    inner loop are not counted, but for those of kernels with Hopper's asynchronous products."""
    compiled = compile_launch(launch, target)
    tables = ("bias", "modulation", "matrix", "table")  # whose dtype is not what is computed in
    pointers = {kind for name, kind in launch.signature.items() if kind.startswith("*") and name not in tables}
    dtype = " ".join(sorted(kind[1:] for kind in pointers & {"*bf16", "*fp16"})) or "fp32"
    exact = dtype == "fp32" and launch.constants.get("PRECISION") == "ieee"  # only FMA units multiply so
    multiplies = "tt.dot" in compiled.asm["ttir"] and not exact
    num_warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    unit, wrong_products = MATRIX_UNITS[target], []
    rows = [launch.constants.get(size, 0) for size in ("BLOCK_M", "BLOCK_N")]
    rows.append(math.prod(launch.constants.get(size, 0) for size in ("ITEMS", "ROWS", "COLUMNS")))
    if unit in ("wgmma", "tcgen05") and 0 < max(rows) < 64:
        unit = "mma"  # the others take 64 rows at least
    if target.startswith("gfx"):
        virtual = assembly = compiled.asm["amdgcn"]
        registers, spilled = _amd_registers(assembly)
    else:
        virtual, assembly = compiled.asm["ptx"], ""
        asynchronous = unit == "wgmma" and "wgmma.mma_async" in virtual
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            registers, spilled = _nvidia_registers(cubin.name)
            if disassemble or asynchronous:
                assembly = _run(_NVIDIA_TOOLS / "nvdisasm", "-ndf", "-c", cubin.name)
        if asynchronous:
            wrong_products = product_faults(assembly, virtual, num_warps)
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    programs, limited_by = resident_programs(target, num_warps, registers, shared, tensor_memory)
    mix, has_loop = instruction_mix(assembly)
    arguments = [name for name, kind in launch.signature.items() if kind != "constexpr"]
    loads = global_loads(compiled.asm["llir"], arguments)
    integers = {name: n for name, n in launch.constants.items() if type(n) is int and name.isupper()}
    flags = "".join(filter(switches(launch).get, FLAGS))
    return Report(
        target=target,
        op=launch.op,
        kernel=f"{launch.kernel}[{flags}]" if flags else launch.kernel,
        dtype=dtype,
        shapes=list(shapes),
        tile=integers | {"num_warps": num_warps, "num_stages": compiled.metadata.num_stages},
        registers=registers,
        spilled_bytes=spilled,
        shared_memory=shared,
        multiplies=multiplies,
        matrix_instructions=len(re.findall(_MATRIX_INSTRUCTION[unit], virtual)),
        wrong_products=wrong_products,
        programs_per_multiprocessor=programs,
        occupancy=programs * num_warps / MULTIPROCESSORS[target].warps,
        limited_by=limited_by,
        inner_loop=has_loop,
        instructions=mix,
        bytes_per_load=loads,
        possible_bytes_per_load={name: n for name, n in possible_load_bytes(launch).items() if name in loads},
        fingerprints=[fingerprint(launch, target)],
    )


def _nvidia_registers(cubin: str) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack: Triton's kernels have nothing there but spilled registers."""
    usage = _run(_NVIDIA_TOOLS / "cuobjdump", "--dump-resource-usage", cubin)
    return int(re.search(r"REG:(\d+)", usage).group(1)), int(re.search(r"STACK:(\d+)", usage).group(1))


def _amd_registers(gcn: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch memory of a lane. Scalar registers are spilled to lanes of vectors."""

    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", gcn).group(1))

    return value("vgpr_count"), value("private_segment_fixed_size")


def _run(*command) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def store(rows: list[Report], path: Path) -> None:
    """Writes JSON, a line for each row, and its summary; where the path is that of Markdown, the summary alone.
    Rows that differ in their shapes only become one."""
    merged: dict[str, Report] = {}
    for row in rows:
        one = merged.setdefault(
            repr(replace(row, shapes=[], fingerprints=[])), replace(row, shapes=[], fingerprints=[])
        )
        one.shapes += row.shapes
        one.fingerprints += row.fingerprints
    lines = [json.dumps(asdict(row), separators=(",", ":")) for row in merged.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".md":
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    path.with_suffix(".md").write_text(summary(list(merged.values())))


def _report(job: tuple) -> Report:
    return report(*job)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks static", description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--faults",
        action="store_true",
        help="print the faults alone, and compile only what the stored table has not",
    )
    output.add_argument(
        "--out",
        type=Path,
        help="store the table here as JSON, and a summary beside it as Markdown; with FILE.md, the summary alone",
    )
    options = parser.parse_args(arguments)
    # One job for each code, whichever shapes launch it.
    jobs: dict[str, tuple[Launch, str, list[str], bool]] = {}
    shapes = [shape for shape in SHAPES if shape.model in options.models]
    for target, dtype, shape in itertools.product(options.targets, options.dtypes, shapes):
        for launch in launches_of(shape, target, getattr(torch, dtype)):
            code = f"{target} {launch.op} {launch.identity}"
            jobs.setdefault(code, (launch, target, [], not options.faults))[2].append(str(shape))
    rows: list[Report] = []
    if options.faults:
        stored = stored_reports()
        for code, (launch, target, names, _) in list(jobs.items()):
            if (row := stored.get(fingerprint(launch, target))) is not None:
                rows.append(replace(row, shapes=names))
                del jobs[code]
        print(f"{len(rows)} kernels are those of {STORED.name}; to compile: {len(jobs)}")
    else:
        print(HEADER)
    with ProcessPoolExecutor() as pool:
        for row in tqdm(pool.map(_report, jobs.values()), total=len(jobs), desc="compiling", disable=None):
            if not options.faults:
                tqdm.write(line(row))
            rows.append(row)
    if options.out:
        store(rows, options.out)
    faulty = [
        f"{row.target} {row.op} {row.kernel} {row.shapes[0]}: {fault}" for row in rows for fault in faults(row)
    ]
    print(f"{len(rows)} kernels, {len(faulty)} faults", *faulty, sep="\n")
    return bool(faulty)


if __name__ == "__main__":
    from .__main__ import main as command

    sys.exit(command(["static", *sys.argv[1:]]))
