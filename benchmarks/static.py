"""What the compiler makes of every kernel at the tiles that dispatch chooses, for GPUs that need not be there.

    python -m benchmarks.static [--targets sm_90 gfx942] [--out table.json]

The launchers run on CPU tensors with their kernels replaced by recorders, so that what is compiled is what a call
would launch: the same arguments, specialisations and tiles. Prints, per kernel, shape and target: registers,
spilled bytes, shared memory, tensor-core instructions.
"""

import argparse
import contextlib
import importlib
import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# `gated_residual` has no kernels of its own.
OPS = ("amm_attention", "adaln", "gated_residual_adaln", "token_merge_adaln", "token_split_concat_adaln")
_LAUNCHERS = {op: importlib.import_module(f"edt_kernels.{op}.autograd") for op in OPS}
_KERNELS = {op: importlib.import_module(f"edt_kernels.{op}.kernels") for op in OPS}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_UNITS = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "wgmma", "gfx942": "mfma"}
# Shared memory that one program may use, in bytes (CUDA programming guide, table of compute capabilities; LDS).
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
_TENSOR_CORE = {
    "sm_80": r"\bHMMA\b",
    "sm_90": r"\bHGMMA\b",
    "sm_100": r"\bUTCHMMA\b",
    "gfx942": r"\bv_mfma_",
}
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}

# Kernels that multiply matrices; the others only move and add.
MATRIX_KERNELS = ("forward", "backward_q", "backward_kv", "backward_tables")

# (name, grid, heads): the attention of every stage of EDT-S at 256² and 512²; more heads, as in B and
# XL, are more programs of the same code.
EDT_ATTENTION = (
    ("4x4", (4, 4), 10),
    ("8x8", (8, 8), 8),
    ("16x16", (16, 16), 6),
    ("32x32", (32, 32), 6),
)


# (name, grid, channels): every stage of EDT-S, B and XL at 256²; 512² has the same channels.
EDT_NORMS = tuple(
    (f"{side}x{side}", (side, side), channels)
    for side, widths in ((16, (312, 624, 936)), (8, (416, 832, 1248)), (4, (520, 1040, 1560)))
    for channels in widths
)


@dataclass
class Launch:
    """One recorded launch: a kernel, the types of its run-time arguments, its compile-time arguments."""

    op: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, object]
    divisible: list[int]
    options: dict[str, int]


@dataclass
class Report:
    op: str
    shape: str
    dtype: str
    kernel: str
    target: str
    registers: int
    spilled_bytes: int
    shared_memory: int
    tensor_core_instructions: int


@contextlib.contextmanager
def record_launches(launches: list[Launch], target: str):
    """Replaces the kernels by recorders of their arguments, and the device by the target."""

    class Recorder:
        def __init__(self, op):
            self.op = op

        def __getattr__(self, kernel):
            return Kernel(self.op, kernel)

    class Kernel:
        def __init__(self, op, kernel):
            self.op, self.kernel = op, kernel

        def __getitem__(self, grid):
            return lambda *args, **constants: launches.append(_describe(self.op, self.kernel, args, constants))

    attention = _LAUNCHERS["amm_attention"]
    matrix_unit = attention.matrix_unit
    attention.matrix_unit = lambda _device: MATRIX_UNITS[target]
    for op, launcher in _LAUNCHERS.items():
        launcher.kernels = Recorder(op)
    try:
        yield
    finally:
        attention.matrix_unit = matrix_unit
        for op, launcher in _LAUNCHERS.items():
            launcher.kernels = _KERNELS[op]


def _describe(op: str, kernel: str, args: tuple, constants: dict) -> Launch:
    """Types and specialisations as Triton's own launcher would derive them."""
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    parameters = [p.name for p in getattr(_KERNELS[op], kernel).params]
    signature, values, divisible = {}, dict(constants), []
    for place, (parameter, value) in enumerate(zip(parameters, args)):
        if isinstance(value, Tensor):
            signature[parameter] = _POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter], aligned = "fp32", False
        else:
            signature[parameter], aligned = ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0
            if value == 1:
                values[parameter] = value
                aligned = False
        if aligned:
            divisible.append(place)
    signature |= dict.fromkeys(values, "constexpr")
    return Launch(op, kernel, {p: signature[p] for p in parameters}, values, divisible, options)


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
    with record_launches(launches, target):
        out, logsumexp = attention._forward(q, k, v, *arguments)
        attention._backward(out, q, k, v, *arguments[:2], out, logsumexp, *arguments[2:], True, True)
        # Inference without AMM and training as EDT does it: the bias alone is learned.
        attention._forward(q, k, v, None, *arguments[1:])
        attention._backward(out, q, k, v, None, bias, out, logsumexp, *arguments[2:], False, True)
    return _unique(launches)


def norm_launches(grid: tuple[int, int], channels: int, target: str, batch_size: int = 8) -> list[Launch]:
    """Every launch of the norm-type ops for tokens of this grid, in the dtypes of bfloat16 autocast: a float32
    residual stream, branches and modulation in bfloat16. The merge goes from this grid, the split to it."""
    B, (H, W), C = batch_size, grid, channels
    bf16 = {"dtype": torch.bfloat16}
    stream, branch = torch.empty(B, H * W, C), torch.empty(B, H * W, C, **bf16)
    modulation = [torch.empty(B, 6 * C, **bf16)[:, i * C : (i + 1) * C] for i in range(3)]
    statistics = torch.empty(B, H * W)
    launches: list[Launch] = []
    with record_launches(launches, target):
        op = _LAUNCHERS["adaln"]
        op._forward(stream, *modulation[:2], 1e-6, torch.bfloat16)
        op._backward(branch, stream, modulation[0], statistics, statistics)
        op = _LAUNCHERS["gated_residual_adaln"]
        op._forward(stream, branch, *modulation, 1e-6, torch.bfloat16)
        op._backward(stream, branch, stream, branch, *modulation[:2], statistics, statistics)
        op._residual_forward(stream, branch, modulation[0])
        op._residual_backward(stream, branch, modulation[0])
        if H % 2 == 0 and W % 2 == 0 and min(H, W) > 4:  # EDT neither merges nor splits to its coarsest grid
            op, merged = _LAUNCHERS["token_merge_adaln"], torch.empty(B, H * W // 4, 4 * C, **bf16)
            modulation = [torch.empty(B, 8 * C, **bf16)[:, i * 4 * C : (i + 1) * 4 * C] for i in range(2)]
            keep, statistics = torch.ones(B, H * W, dtype=torch.bool), torch.empty(B, H * W // 4)
            for mask in (None, keep):
                op._forward(stream, *modulation, mask, H, W, 1e-6, torch.bfloat16)
                op._backward(merged, stream, modulation[0], mask, statistics, statistics, H, W)
            op, joined = _LAUNCHERS["token_split_concat_adaln"], torch.empty(B, H * W, 2 * C, **bf16)
            modulation = [torch.empty(B, 4 * C, **bf16)[:, i * 2 * C : (i + 1) * 2 * C] for i in range(2)]
            statistics = torch.empty(B, H * W)
            op._forward(merged, stream, *modulation, H // 2, W // 2, 1e-6, torch.bfloat16)
            op._backward(joined, merged, stream, modulation[0], statistics, statistics, H // 2, W // 2)
    return _unique(launches)


def _unique(launches: list[Launch]) -> list[Launch]:
    return [launch for i, launch in enumerate(launches) if launch not in launches[:i]]


def compile_launch(launch: Launch, target: str) -> dict:
    """Registers, spills, shared memory and the tensor-core instructions of one launch for one target."""
    source = ASTSource(
        fn=getattr(_KERNELS[launch.op], launch.kernel),
        signature=launch.signature,
        constexprs=launch.constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in launch.divisible},
    )
    compiled = triton.compile(source, target=TARGETS[target], options=launch.options)
    resources = _amd_resources if target.startswith("gfx") else _nvidia_resources
    return {"shared_memory": compiled.metadata.shared, **resources(compiled, target)}


def _nvidia_resources(compiled, target: str) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(_NVIDIA_TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _run(_NVIDIA_TOOLS / "nvdisasm", "-c", cubin.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spilled_bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "tensor_core_instructions": len(re.findall(_TENSOR_CORE[target], sass)),
        "asm": sass,
    }


def _amd_resources(compiled, target: str) -> dict:
    gcn = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", gcn).group(1))

    return {
        "registers": field("vgpr_count"),
        "spilled_bytes": 4 * (field("vgpr_spill_count") + field("sgpr_spill_count")),
        "tensor_core_instructions": len(re.findall(_TENSOR_CORE[target], gcn)),
        "asm": gcn,
    }


def _run(*command) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def report_attention(name: str, grid: tuple[int, int], heads: int, head_dim: int, dtype: torch.dtype, target: str):
    """Compiles every launch of one attention shape for one target; a list of reports."""
    launches = attention_launches(grid, heads, head_dim, dtype, target)
    return _report(launches, f"{name} D{head_dim}", str(dtype).removeprefix("torch."), target)


def report_norms(name: str, grid: tuple[int, int], channels: int, target: str):
    """Compiles every launch of the norm-type ops at one shape for one target; a list of reports."""
    return _report(norm_launches(grid, channels, target), f"{name} C{channels}", "bfloat16", target)


_FLAGS = {"HAS_BIAS": "b", "HAS_MODULATION": "m", "NORM": "n", "MASKED": "k"}


def _report(launches: list[Launch], shape: str, dtype: str, target: str) -> list[Report]:
    rows = []
    for launch in launches:
        compiled = compile_launch(launch, target)
        compiled.pop("asm")
        flags = "".join(letter for flag, letter in _FLAGS.items() if launch.constants.get(flag) is True)
        name = f"{launch.kernel}[{flags}]" if flags else launch.kernel
        rows.append(Report(launch.op, shape, dtype, name, target, **compiled))
    return rows


def _run_job(job: tuple) -> list[Report]:
    function, *arguments = job
    return function(*arguments)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[52])
    parser.add_argument("--out", type=Path, help="write the table as JSON here")
    options = parser.parse_args(arguments)
    jobs = [
        (report_attention, name, grid, heads, head_dim, getattr(torch, dtype), target)
        for target in options.targets
        for dtype in options.dtypes
        for head_dim in options.head_dims
        for name, grid, heads in EDT_ATTENTION
    ]
    jobs += [(report_norms, *shape, target) for target in options.targets for shape in EDT_NORMS]
    print(f"{'target':7} {'op':24} {'shape':12} {'dtype':9} {'kernel':22} regs  spill  shared  tensor-core")
    rows: list[Report] = []
    with ProcessPoolExecutor() as pool:
        parts = pool.map(_run_job, jobs)
        for part in tqdm(parts, total=len(jobs), desc="compiling", disable=None):
            for row in part:
                tqdm.write(
                    f"{row.target:7} {row.op:24} {row.shape:12} {row.dtype:9} {row.kernel:22} {row.registers:4} "
                    f"{row.spilled_bytes:6} {row.shared_memory:7} {row.tensor_core_instructions:5}"
                )
            rows += part
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
