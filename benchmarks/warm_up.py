"""Compiles what the GPU's tests and the quick benchmarks of ops launch, on all cores, into Triton's cache.

    python -m benchmarks warm_up [--capability 90]

Otherwise each process compiles what it launches, one kernel after the other: most of the tests' time. Calls are
made on CPU tensors with their launches recorded instead of run, and compiled in processes that are told of the
device and use none. A kernel that fails to compile is left to the test that launches it. Tests draw other cases
too.
"""

import argparse
import contextlib
import importlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

import edt_kernels
from edt_kernels import _backend
from edt_kernels.amm_attention import autograd as attention_launchers

from . import attention, norms
from .harness import build_call

_TESTS = Path(__file__).parents[1] / "tests"


class _Driver:
    """What compiling asks of a driver."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class _Pointer(MockTensor):
    """Where a tensor lies and of what dtype it is: all of it that decides how a kernel is compiled."""

    def __init__(self, tensor: Tensor):
        super().__init__(tensor.dtype)
        self.address = tensor.data_ptr() % 16

    def data_ptr(self) -> int:
        return self.address


def calls_of_tests() -> Iterator[Callable]:
    """The cases that are listed in the files of tests, the most important first."""
    sys.path[:0] = [str(_TESTS), str(_TESTS / "kernels")]
    attention_cases, norm_cases = (importlib.import_module(f"{name}_cases") for name in ("attention", "norm"))
    ops, rows, properties = map(
        importlib.import_module, ("test_amm_attention", "test_norm_ops", "test_properties")
    )
    others = itertools.product(properties.SHORT_AND_LONG, properties.HEAD_DIMS, properties.GPU_DTYPES)
    others = ((properties.dataclasses.replace(case, head_dim=head_dim), dtype) for case, head_dim, dtype in others)
    for case, dtype in itertools.chain((parameters for parameters in ops.GPU_CASES), others):
        inputs = attention_cases.make_inputs(case, dtype, "cpu")
        yield partial(attention_cases.run, edt_kernels.amm_attention, case, inputs)
    grids, dtypes = ((2, 2), (32, 32)), (torch.bfloat16, torch.float32)
    wide = itertools.product(norm_cases.OPS, grids, properties.WIDTHS, dtypes)
    wide = (norm_cases.Case(op, grid, channels, batch_size=3, branch=dtype, modulation=dtype)
            for op, grid, channels, dtype in wide)  # fmt: skip
    for case in itertools.chain(rows.SMALL_CASES, rows.EDT_CASES, wide):
        yield partial(norm_cases.run, edt_kernels, case, norm_cases.make_inputs(case, "cpu"))


def calls_of_benchmarks() -> Iterator[Callable]:
    """Ours in the quick cases."""
    suites = {"attention": attention, **dict.fromkeys(norms.SUITE_OPS, norms)}
    for suite, module in suites.items():
        for case in module.cases(suite, torch.device("cuda"), [], quick=True):
            yield build_call(module.Ours(), case, case.make_inputs(torch.device("cpu"), 0))


@contextlib.contextmanager
def recorded(capability: int, launch: Callable[[JITFunction, list, dict], None]) -> Iterator[None]:
    """Calls of ops on CPU tensors choose as on a device of this capability, and `launch` gets what they launch."""

    def run(kernel: JITFunction, *args, grid, warmup, **kwargs):
        launch(kernel, [_Pointer(arg) if isinstance(arg, Tensor) else arg for arg in args], kwargs)

    unit = {9: "wgmma", 10: "tcgen05"}.get(capability // 10, "mma")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"EDT_KERNELS_BACKEND": "triton"}))
        for owner, name, value in (
            (_backend, "_INTERPRETED", True),  # so that CPU tensors may pass
            (attention_launchers, "matrix_unit", lambda device: unit),
            (JITFunction, "run", run),
            (torch, "randn", lambda *shape, generator=None, **options: torch.empty(*shape, **options)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def start_worker(capability: int) -> None:
    driver.set_active(_Driver(capability))


def compile_kernel(module: str, name: str, args: list, kwargs: dict) -> None:
    """As the launcher would for these arguments, into the cache on disk."""
    getattr(importlib.import_module(module), name).warmup(*args, grid=(1,), **kwargs)


def warm_up(capability: int, calls: Iterable[Callable], workers: int) -> tuple[int, int]:
    """Returns how many kernels were compiled, and how many failed to."""
    jobs: dict[str, Future] = {}
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(capability,)) as pool:
        pool.submit(int).result()  # the workers start, before anything here is replaced by what records

        def launch(kernel, args, kwargs):
            kinds = [(type(arg), arg.dtype, arg.address) if isinstance(arg, _Pointer) else
                     (arg == 1, arg % 16 == 0, abs(arg) < 2**31) if type(arg) is int else type(arg)
                     for arg in args]  # fmt: skip
            module, name = kernel.fn.__module__, kernel.fn.__name__
            code = repr((module, name, kinds, kwargs))  # the same for launches that compile to the same
            if code not in jobs:
                jobs[code] = pool.submit(compile_kernel, module, name, args, kwargs)

        try:
            with recorded(capability, launch):
                for call in calls:
                    call()
            failed = sum(job.exception() is not None for job in jobs.values())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(jobs) - failed, failed


def device_capability() -> int | None:
    """Of the first GPU, by its driver's own tool: CUDA is not to start here, before the workers do."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        return int(said.replace(".", ""))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return None


def main(arguments: list[str]) -> int:
    """Returns 0: what is not compiled here is compiled where it is needed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks warm_up", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--capability", type=int, default=device_capability(), help="such as 90; default: the GPU's"
    )
    options = parser.parse_args(arguments)
    if options.capability is None:
        raise ValueError("capability is not given, and nvidia-smi names no GPU")
    begin = time.monotonic()
    calls = itertools.chain(calls_of_benchmarks(), calls_of_tests())
    compiled, failed = warm_up(options.capability, calls, len(os.sched_getaffinity(0)))
    print(f"{compiled} kernels compiled in {time.monotonic() - begin:.0f} s, {failed} failed")
    return 0


if __name__ == "__main__":
    from .__main__ import main as command

    sys.exit(command(["warm_up", *sys.argv[1:]]))
