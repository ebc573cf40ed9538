"""How long a call of an op keeps the CPU: `python -m benchmarks host [--quick] [--results FOLDER]`.

A small model at a small batch waits for its host: what a GPU computes in 5 µs should not take 50 µs to ask for.
All of a call runs, checks, torch's dispatcher, autograd, Triton's own launcher, but NVIDIA's driver, for which
a stub stands in that does nothing (host_stub.c, made by the C compiler that Triton needs anyway); tensors are
on the CPU. A real launch adds about 2 µs for each kernel, and CUDA's allocator is slower than the CPU's. Times
are CPU time of one thread, the least of many samples; `torch.add` of one number tells machines apart.
"""

import argparse
import ctypes
import functools
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm


def use_stub_driver() -> None:
    """Makes Triton launch through the stub, for this process. Before anything is launched."""
    folder = Path(tempfile.mkdtemp(prefix="edt-kernels-stub-"))
    library = folder / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library,
               Path(__file__).with_name("host_stub.c")]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"host needs a C compiler, which Triton needs too; there is no {compiler}") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{compiler} could not compile host_stub.c: {error.stderr[-500:]}") from None
    (folder / "libcuda.so").symlink_to(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["EDT_KERNELS_BACKEND"] = "triton"

    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

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


def time_calls(functions: dict, calls: int, samples: int) -> dict[str, float]:
    """Microseconds of CPU time of one call, the least of `samples` of so many calls; the functions take turns, so
    that whatever slows the machine slows all of them."""
    least = dict.fromkeys(functions, float("inf"))
    for _ in tqdm(range(samples), desc="host", unit="round", disable=None):
        for name, function in functions.items():
            with torch.set_grad_enabled(not name.endswith("no gradient")):
                start = time.thread_time_ns()
                for _ in range(calls):
                    function()
                least[name] = min(least[name], (time.thread_time_ns() - start) / calls / 1000)
    return least


def calls_of_ops() -> dict:
    """By op and work: calls of EDT-S's first stage with one sample, in the dtypes of autocast."""
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
    found = {}
    for op, (function, tensors, options) in arguments.items():
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


def table(microseconds: dict[str, float]) -> str:
    works = ("no gradient", "forward", "forward+backward")
    lines = [f"{'µs of a call':28}" + "".join(f"{work:>18}" for work in works)]
    for op in dict.fromkeys(name.partition(": ")[0] for name in microseconds):
        lines.append(f"{op:28}" + "".join(f"{microseconds[f'{op}: {work}']:18.1f}" for work in works))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__.partition(":")[0])
    parser.add_argument("--quick", action="store_true", help="few samples, in seconds")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to store the figures")
    options = parser.parse_args(arguments)
    if options.out and not options.out.parent.is_dir():
        raise ValueError(f"--out is {options.out}; its folder does not exist")
    use_stub_driver()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # sums of memory that no kernel wrote should take no longer than others
    microseconds = time_calls(calls_of_ops(), 10, 20 if options.quick else 300)
    print(table(microseconds))
    if options.out:
        from . import results

        content = {"environment": results.environment(torch.device("cpu")), "microseconds": microseconds}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0
