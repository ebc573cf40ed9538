"""Triton launches on CPU tensors, by what the compiler makes of them for a GPU that need not be there.

with executing("sm_90") as launches:
    out = edt_kernels.amm_attention(q, k, v, grid=(16, 16))
launches[0].findings
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

import edt_kernels._backend as backend

from .. import static
from .program import AS_WRITTEN, Finding, Program, Run, Schedule
from .ptx import parse


@dataclass
class Executed:
    """One launch that ran."""

    launch: static.Launch
    target: str
    grid: tuple[int, ...]
    programs: int  # that ran: all, or some of the grid's
    program: Program
    run: Run

    @property
    def kernel(self) -> str:
        return self.launch.kernel

    @property
    def findings(self) -> list[Finding]:
        return self.run.findings


def _cache() -> str:
    """A folder for Triton's cache of this process and user: entries made here have no machine code."""
    return os.path.join(tempfile.gettempdir(), f"edt-kernels-ptx-{os.getuid()}")


@dataclass
class Compiled:
    program: Program
    shared_bytes: int
    threads: int
    scratch_bytes: int  # of global memory, for each program


_COMPILED: dict[str, Compiled] = {}


def compile_program(launch: static.Launch, target: str) -> Compiled:
    """Without ptxas, which is half of the time of a compilation."""
    key = f"{target} {launch.identity}"
    if key not in _COMPILED:
        no_machine_code = mock.patch.object(CUDABackend, "make_cubin", return_value=b"none")
        with no_machine_code, knobs.cache.scope():
            knobs.cache.dir = _cache()
            compiled = static.compile_launch(launch, target)
        metadata = compiled.metadata
        program = Program(parse(compiled.asm["ptx"]))
        scratch = getattr(metadata, "global_scratch_size", 0) or 0
        _COMPILED[key] = Compiled(program, metadata.shared, 32 * metadata.num_warps, scratch)
    return _COMPILED[key]


@contextlib.contextmanager
def executing(
    target: str,
    schedule: Schedule = AS_WRITTEN,
    *,
    replace: Callable[[str, Program], Program] | None = None,
    programs: Callable[[int], list[int]] | None = None,
    check: bool = True,
) -> Iterator[list[Executed]]:
    """Every launch inside runs at once, on CPU tensors, by the program compiled for `target`.

    Args:
        target: one of `benchmarks.static`'s whose instructions the machine knows: sm_80, sm_86, sm_90.
        schedule: see `Schedule`.
        replace: given a kernel's name and program, the program to run instead.
        programs: of a launch, which of so many programs run; all if not given.
        check: whether to look for races, and to fill new memory with NaN.
    """
    launches: list[Executed] = []

    def run(kernel: JITFunction, *args, grid, warmup=False, **kwargs) -> None:
        launch = static.describe("", kernel, args, kwargs)
        names = [parameter.name for parameter in kernel.params]
        values = dict(zip(names, args)) | {name: value for name, value in kwargs.items() if name in names}
        grid = tuple(grid(values) if callable(grid) else grid)
        compiled = compile_program(launch, target)
        program = compiled.program if replace is None else replace(launch.kernel, compiled.program)
        arguments = [values[name] for name in names if launch.signature[name] != "constexpr"]
        if compiled.scratch_bytes:
            arguments.append(torch.empty(compiled.scratch_bytes * math.prod(grid), dtype=torch.uint8))
        chosen = None if programs is None else programs(math.prod(grid))
        result = program.run(grid, arguments, compiled.shared_bytes, compiled.threads, schedule, chosen, check)
        count = math.prod(grid) if chosen is None else len(chosen)
        launches.append(Executed(launch, target, grid, count, program, result))

    unit = mock.patch.object(static.attention, "matrix_unit", return_value=static.MATRIX_UNITS[target])
    on_cpu = mock.patch.object(backend, "_INTERPRETED", True)  # lets CPU tensors through to the launchers
    triton = mock.patch.dict(os.environ, EDT_KERNELS_BACKEND="triton")
    ran = mock.patch.object(JITFunction, "run", run)
    with unit, on_cpu, triton, ran, static.planning_anew(), _nan_in_new_memory(check):
        yield launches


@contextlib.contextmanager
def _nan_in_new_memory(enabled: bool) -> Iterator[None]:
    """`torch.empty` gives NaN, so that results show what a kernel reads and nobody wrote."""
    if not enabled:
        yield
        return
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
