"""How long a call of an op keeps the CPU: `python -m benchmarks host [--quick] [--out FILE.json]`.

A small model at a small batch waits for its host: what a GPU computes in 5 µs should not take 50 µs to ask for.
All of a call runs, checks, torch's dispatcher, autograd, Triton's own launcher, but NVIDIA's driver, for which
a stub stands in that counts launches and does nothing else (host_stub.c, made by the C compiler that Triton needs
anyway); tensors are on the CPU. A real launch adds about 2 µs for each kernel, and CUDA's allocator is slower than
the CPU's. Times are CPU time of one thread, the least of many samples; `torch.add` of one number tells machines
apart. A busy machine makes all of them longer, so they are shown beside their bounds and nothing fails by them.
"""

import argparse
import atexit
import ctypes
import functools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from .gpu_suite import c_compiler, compiler_fault
from .harness import selected

WORKS = ("no gradient", "forward", "forward+backward")
# µs, by the beginning of the op's name, of a machine on which torch.add takes as long as it says here. There a
# prototype of attention that did what is needed alone took 9.8 and, differentiable, 15.3.
BOUNDS = {"torch.add": (0.9, None, 12), "amm_attention": (15, 25, 90), "": (12, 20, 90)}


def use_stub_driver() -> ctypes.CDLL:
    """Makes Triton launch through the stub, for this process; `launches()` of what it returns counts them. Before
    anything is launched.

    Raises:
        ValueError: without a C compiler and Python's headers.
    """
    if fault := compiler_fault():
        raise ValueError(fault)
    folder = Path(tempfile.mkdtemp(prefix="edt-kernels-stub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = folder / "libcuda.so.1"
    command = [c_compiler(), "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library,
               Path(__file__).with_name("host_stub.c")]  # fmt: skip
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["EDT_KERNELS_BACKEND"] = "triton"

    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    from edt_kernels import _backend

    class StubDriver(CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: (9, 0)

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(StubDriver())
    _backend._INTERPRETED = True  # kernels take CPU tensors
    return stub


def count_launches(functions: dict, stub: ctypes.CDLL) -> dict[str, int]:
    """Kernels that a call of each launches, once what happens at the first call is over.

    Raises:
        ValueError: if an op launches none through the stub, so that its time would be of something else.
    """
    counts = {}
    for name, function in functions.items():
        with torch.set_grad_enabled(not name.endswith(WORKS[0])):
            function()
            before = stub.launches()
            function()
        counts[name] = stub.launches() - before
        if not counts[name] and not name.startswith("torch."):
            raise ValueError(f"{name} launched nothing through the stub of the driver; is another one loaded?")
    return counts


def time_calls(functions: dict, calls: int, samples: int) -> dict[str, float]:
    """Microseconds of CPU time of one call, the least of `samples` of so many calls; the functions take turns, so
    that whatever slows the machine slows all of them."""
    from tqdm import tqdm

    least = dict.fromkeys(functions, float("inf"))
    for _ in tqdm(range(samples), desc="host", unit="round", disable=None):
        for name, function in functions.items():
            with torch.set_grad_enabled(not name.endswith(WORKS[0])):
                function()  # the one before it left other things in the caches
                start = time.thread_time_ns()
                for _ in range(calls):
                    function()
                least[name] = min(least[name], (time.thread_time_ns() - start) / calls / 1000)
    return least


def calls_of_ops(patterns: list[str] | None = None) -> dict:
    """By op and work: calls of EDT-S's first stage with one sample, in the dtypes of autocast; torch.add's, and
    those of ops whose name contains a pattern."""
    import edt_kernels

    B, N, heads, D, C = 1, 256, 6, 52, 312
    narrow = {"dtype": torch.bfloat16}
    table, one = edt_kernels.amm_table((16, 16)), torch.empty(1)
    stream, coarse = torch.empty(B, N, C), torch.empty(B, N // 4, 4 * C, **narrow)
    branch = torch.empty(B, N, C, **narrow)
    gate, shift, scale = torch.empty(B, 3 * C, **narrow).chunk(3, dim=1)
    merge, split = torch.empty(2, B, 4 * C, **narrow), torch.empty(2, B, 2 * C, **narrow)
    qkv = torch.empty(B, N, 3, heads, D, **narrow).unbind(2)
    grid = {"grid": (16, 16)}
    arguments = {
        "torch.add": (torch.add, (one, one), {}),
        "amm_attention": (edt_kernels.amm_attention, qkv, grid),
        "amm_attention, bias": (edt_kernels.amm_attention, qkv, grid | {"rel_pos_bias": torch.zeros(961, heads)}),
        "amm_attention, AMM": (edt_kernels.amm_attention, qkv, grid | {"modulation": table}),
        "adaln": (edt_kernels.adaln, (stream, shift, scale), {}),
        "gated_residual": (edt_kernels.gated_residual, (stream, branch, gate), {}),
        "gated_residual_adaln": (edt_kernels.gated_residual_adaln, (stream, branch, gate, shift, scale), {}),
        "token_merge_adaln": (edt_kernels.token_merge_adaln, (stream, *merge), grid),
        "token_split_concat_adaln": (
            edt_kernels.token_split_concat_adaln, (coarse, stream, *split), {"grid": (8, 8)},
        ),
    }  # fmt: skip
    chosen = selected(list(arguments), patterns and ["torch.add", *patterns], str, "ops")
    found = {}
    for op in chosen:
        function, tensors, options = arguments[op]
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        learned = {
            name: value.clone().requires_grad_() if name == "rel_pos_bias" else value
            for name, value in options.items()
        }
        forward = functools.partial(function, *leaves, **learned)
        outputs = forward()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.empty_like(out) for out in outputs]
        leaves += [value for name, value in learned.items() if name == "rel_pos_bias"]
        found[f"{op}: no gradient"] = functools.partial(function, *tensors, **options)
        found[f"{op}: forward"] = forward
        found[f"{op}: forward+backward"] = functools.partial(_differentiate, forward, leaves, upstream)
    return found


def _differentiate(forward, leaves, upstream) -> None:
    outputs = forward()
    torch.autograd.grad(outputs if isinstance(outputs, tuple) else (outputs,), leaves, upstream)


def bound(name: str) -> float | None:
    """Of "op: work"."""
    op, _, work = name.partition(": ")
    return next(bounds for start, bounds in BOUNDS.items() if op.startswith(start))[WORKS.index(work)]


def table(microseconds: dict[str, float], launches: dict[str, int]) -> str:
    """In brackets the bound, and how many kernels a call launches."""
    yardstick = "torch.add: forward+backward"
    slower = microseconds[yardstick] / bound(yardstick)
    lines = [f"{'µs of a call (bound), launches':30}" + "".join(f"{work:>22}" for work in WORKS)]
    for op in dict.fromkeys(name.partition(": ")[0] for name in microseconds):
        lines.append(f"{op:30}")
        for name in (f"{op}: {work}" for work in WORKS):
            taken, limit = microseconds[name], bound(name)
            over = "*" if limit and taken > limit * slower else ""
            brackets = f"({limit:g}){over:1}" if limit else ""
            lines[-1] += f"{taken:12.1f} {brackets:>6}{launches[name]:>2}×"
    return "\n".join([
        *lines,
        f"Bounds are those of a machine on which {yardstick} takes {bound(yardstick)} µs, {slower:.2f} times as "
        "fast as this one. *: over its bound all the same.",
    ])  # fmt: skip


def summary(content: dict) -> str:
    return table(content["microseconds"], content["launches"])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__.partition(":")[0])
    parser.add_argument("--quick", action="store_true", help="few samples, in seconds")
    parser.add_argument("--ops", nargs="+", metavar="TEXT", help="ops whose name contains it")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to store the figures")
    options = parser.parse_args(arguments)
    if options.out and not options.out.parent.is_dir():
        raise ValueError(f"--out is {options.out}; its folder does not exist")
    stub = use_stub_driver()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # sums of memory that no kernel wrote should take no longer than others
    calls = calls_of_ops(options.ops)
    launches = count_launches(calls, stub)
    microseconds = time_calls(calls, 50, 10 if options.quick else 100)
    print(table(microseconds, launches))
    if options.out:
        from . import results

        content = {"microseconds": microseconds, "launches": launches}
        content["environment"] = results.environment(torch.device("cpu"))
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0
