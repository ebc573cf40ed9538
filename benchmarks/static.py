"""What the compiler makes of every kernel at the tiles that dispatch chooses, for GPUs that need not be there.

    python -m benchmarks.static [--targets sm_90 gfx942] [--out table.json]

The launchers run on CPU tensors with their kernels replaced by recorders, so that what is compiled is what a call
would launch: the same arguments, specialisations and tiles. Prints, per kernel, shape and target: registers,
spilled bytes, shared memory, tensor-core instructions.
"""

import argparse
import contextlib
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

from edt_kernels.amm_attention import autograd

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
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}

# (name, grid, heads): the attention of every stage of EDT-S at 256² and 512²; more heads, as in B and
# XL, are more programs of the same code.
EDT_ATTENTION = (
    ("4×4", (4, 4), 10),
    ("8×8", (8, 8), 8),
    ("16×16", (16, 16), 6),
    ("32×32", (32, 32), 6),
)


@dataclass
class Launch:
    """One recorded launch: a kernel, the types of its run-time arguments, its compile-time arguments."""

    kernel: str
    signature: dict[str, str]
    constants: dict[str, object]
    divisible: list[int]
    options: dict[str, int]


@dataclass
class Report:
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
        def __getattr__(self, name):
            return Kernel(name)

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **constants: launches.append(_describe(self.name, args, constants))

    originals = autograd.kernels, autograd.matrix_unit
    autograd.kernels, autograd.matrix_unit = Recorder(), lambda _device: MATRIX_UNITS[target]
    try:
        yield
    finally:
        autograd.kernels, autograd.matrix_unit = originals


def _describe(name: str, args: tuple, constants: dict) -> Launch:
    """Types and specialisations as Triton's own launcher would derive them."""
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    parameters = [p.name for p in getattr(_kernels(), name).params]
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
    return Launch(name, {p: signature[p] for p in parameters}, values, divisible, options)


def _kernels():
    from edt_kernels.amm_attention import kernels

    return kernels


def attention_launches(
    grid: tuple[int, int], heads: int, head_dim: int, dtype: torch.dtype, target: str, batch_size: int = 8
) -> list[Launch]:
    """Every launch of one training step of `amm_attention` on a packed projection, both tables learned."""
    H, W = grid
    q, k, v = torch.empty(batch_size, H * W, 3, heads, head_dim, dtype=dtype).unbind(2)
    modulation, bias = torch.empty(2 * H - 1, 2 * W - 1), torch.empty((2 * H - 1) * (2 * W - 1), heads)
    arguments = (modulation, bias, H, W, 0, head_dim**-0.5)
    launches: list[Launch] = []
    with record_launches(launches, target):
        out, logsumexp = autograd._forward(q, k, v, *arguments)
        autograd._backward(out, q, k, v, *arguments[:2], out, logsumexp, *arguments[2:], True, True)
        # Inference without AMM and training as EDT does it: the bias alone is learned.
        autograd._forward(q, k, v, None, *arguments[1:])
        autograd._backward(out, q, k, v, None, bias, out, logsumexp, *arguments[2:], False, True)
    unique: list[Launch] = []
    for launch in launches:
        if launch not in unique:
            unique.append(launch)
    return unique


def compile_launch(launch: Launch, target: str) -> dict:
    """Registers, spills, shared memory and the tensor-core instructions of one launch for one target."""
    source = ASTSource(
        fn=getattr(_kernels(), launch.kernel),
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


def report(job: tuple[str, tuple[int, int], int, int, torch.dtype, str]) -> list[Report]:
    """Compiles every launch of one attention shape for one target."""
    shape, grid, heads, head_dim, dtype, target = job
    rows = []
    for launch in attention_launches(grid, heads, head_dim, dtype, target):
        compiled = compile_launch(launch, target)
        compiled.pop("asm")
        tables = "".join(
            letter for letter, flag in (("b", "HAS_BIAS"), ("m", "HAS_MODULATION")) if launch.constants.get(flag)
        )
        name = f"{launch.kernel}[{tables}]" if tables else launch.kernel
        rows.append(Report(f"{shape} D{head_dim}", str(dtype).removeprefix("torch."), name, target, **compiled))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[52])
    parser.add_argument("--out", type=Path, help="write the table as JSON here")
    options = parser.parse_args(arguments)
    jobs = [
        (name, grid, heads, head_dim, getattr(torch, dtype), target)
        for target in options.targets
        for dtype in options.dtypes
        for head_dim in options.head_dims
        for name, grid, heads in EDT_ATTENTION
    ]
    print(f"{'target':7} {'shape':11} {'dtype':9} {'kernel':24} regs  spill  shared  tensor-core")
    rows: list[Report] = []
    with ProcessPoolExecutor(2) as pool:
        for part in tqdm(pool.map(report, jobs), total=len(jobs), desc="compiling", disable=None):
            for row in part:
                tqdm.write(
                    f"{row.target:7} {row.shape:11} {row.dtype:9} {row.kernel:24} {row.registers:4} "
                    f"{row.spilled_bytes:6} {row.shared_memory:7} {row.tensor_core_instructions:5}"
                )
            rows += part
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
