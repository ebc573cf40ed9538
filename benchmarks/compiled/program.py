"""A compiled kernel, and runs of it on the memory of tensors.

program = Program(parse(text))
run = program.run((2, 1, 1), [tensor, 3, 0.5], shared_bytes=0)
"""

import ctypes
import math
import struct
from dataclasses import dataclass

import numpy as np
import torch

from . import build
from .lowering import INSTRUCTION, RUN_REGISTERS, SHARED_BASE, Lowered
from .ptx import Instruction, Kernel


class FaultError(RuntimeError):
    """The program cannot go on: an access out of bounds or misaligned, a barrier that some warps never reach."""


@dataclass(frozen=True)
class Finding:
    """What is wrong although the program went on."""

    kind: str
    where: str  # the instruction
    count: int
    place: str  # "at byte 4 of argument 0", "at byte 16 of shared memory", or nothing
    program: int
    warp: int

    def __str__(self) -> str:
        first = f"first {self.place} by warp {self.warp} of program {self.program}".replace("  ", " ")
        return f"{self.kind}, {self.count} times, {first}: {self.where}"


# In the order of machine/memory.hpp's kinds.
KINDS = (
    "reads what another thread wrote, with no barrier between",
    "writes what another thread read, with no barrier between",
    "writes what another warp wrote, with no barrier between",
    "lanes of a warp write different values to one place",
    "two programs touch one place in global memory, one of them writing",
    "reads shared memory that nobody wrote",
    "touches shared memory while an asynchronous copy is on its way there",
    "overwrites shared memory that a matrix product may still read",
    "a matrix product reads shared memory that no fence.proxy.async has shown it",
    "registers of A changed before the wait for their product",
    "touches the accumulators of a product before the wait for it",
    "wgmma without wgmma.fence before it",
    "asynchronous copies or products are pending at the end",
)


@dataclass(frozen=True)
class Schedule:
    """How what is open is decided. The results must not depend on it."""

    backwards: bool = False  # the last program and the last warp first
    adverse: bool = (
        False  # asynchronous copies write at once and products read as late as they may, or the reverse
    )


AS_WRITTEN = Schedule()


@dataclass
class Run:
    findings: list[Finding]
    counts: np.ndarray  # of `_COUNT`, one for each instruction
    executed: int  # warp instructions
    touched: list[torch.Tensor]  # the array arguments that were read or written at all


_COUNT = np.dtype([(name, "u8") for name in ["executed", "requests", "units", "ideal", "bytes"]])


def _structure(name: str, **fields) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_INT, _PTR, _U64 = ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64
# Those of machine/machine.cpp and memory.hpp.
_Region = _structure("_Region", base=_U64, data=_PTR, bytes=_U64, first=_U64, last=_U64, allowed=_PTR, cells=_PTR,
                     touched=_PTR, cell_shift=_INT, index=_INT)  # fmt: skip
_Settings = _structure(
    "_Settings",
    **dict.fromkeys(["instructions", "operands", "regions", "initial_registers"], _PTR),
    **dict.fromkeys(["num_instructions", "num_regions", "register_bytes", "threads"], _INT),
    **dict.fromkeys(["shared_bytes", "shared_base", "shared_shift"], _INT),
    grid=_INT * 3,
    **dict.fromkeys(["thread_index", "lane_index", "warp_index", "program_index"], _INT),
    **dict.fromkeys(["check", "backwards", "adverse"], _INT),
    programs=_PTR,
    num_programs=_INT,
)
_Found = _structure("_Found", kind=_INT, instruction=_INT, count=_INT, argument=_INT, where=_U64, program=_INT,
                    warp=_INT)  # fmt: skip
_Result = _structure("_Result", error=ctypes.c_char * 512, error_at=_INT, num_findings=_INT,
                     findings=_Found * 64, executed=_U64)  # fmt: skip
_GLOBAL_CELL_BYTES = 24


class Program:
    """Of `kernel`; `sources` are the PTX instructions of the machine's, in order: of some there are two."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self._lowered = Lowered(kernel)
        self.sources: list[Instruction] = self._lowered.sources

    def run(
        self,
        grid: tuple[int, ...],
        arguments: list,
        shared_bytes: int,
        threads: int | None = None,
        schedule: Schedule = AS_WRITTEN,
        programs: list[int] | None = None,
        check: bool = True,
    ) -> Run:
        """Runs the grid, or `programs` of it, on the memory of the arguments.

        Args:
            grid: one to three numbers of programs.
            arguments: a tensor on the CPU or a number for each parameter; parameters after them get 0.
            shared_bytes: of a program.
            threads: of a program, where the text does not say: whole warps.
            schedule: how what is open is decided.
            programs: their numbers; all of the grid if not given.
            check: whether to look for races, and for gaps of views; the ends of views are checked always.

        Raises:
            FaultError: with the instruction and its place in the Triton source.
            ValueError, TypeError: of arguments that cannot be.
        """
        lowered, grid = self._lowered, (*grid, 1, 1)[:3]
        threads, total = self.kernel.threads or threads, math.prod(grid)
        if threads not in range(32, 1025, 32):
            raise ValueError(f"threads is {threads}; it must be a multiple of 32, from 32 to 1024")
        chosen = np.arange(total) if programs is None else np.asarray(programs)
        if ((chosen < 0) | (chosen >= total)).any():
            raise ValueError(f"programs is {programs}; they must be from 0 to {total - 1}")
        chosen = chosen.astype(np.int32)
        memory = _Memory(arguments, check)
        registers = np.full(lowered.register_bytes, 0xFF, np.uint8)

        def put(place: int, size: int, value: int) -> None:
            data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            registers[place : place + 32 * size] = np.frombuffer(data * 32, np.uint8)

        for (value, size), place in lowered.constants.items():
            put(place, size, value)
        for name, value in zip(RUN_REGISTERS, (*grid, threads)):
            put(lowered.places[name], 4, value)
        for (name, size, kind), place in lowered.parameters.items():
            put(place, size, self._argument(memory.values, name, kind))
        counts, result = np.zeros(len(lowered.code), _COUNT), _Result()
        regions = (_Region * max(len(memory.regions), 1))(*memory.regions)
        settings = _Settings(
            *(array.ctypes.data for array in (lowered.code, lowered.operands)), ctypes.addressof(regions),
            registers.ctypes.data, len(lowered.code), len(memory.regions), lowered.register_bytes, threads,
            shared_bytes, SHARED_BASE, lowered.shared_cell_bytes - 1, (_INT * 3)(*grid),
            *(lowered.places[name] for name in ("%tid.x", "%laneid", "%warpid", "%ctaid.x")),
            int(check), int(schedule.backwards), int(schedule.adverse), chosen.ctypes.data, len(chosen),
        )  # fmt: skip
        machine = build.library()
        structures = (_Region, _Settings, _Result, _Found)
        sizes = (INSTRUCTION.itemsize, *map(ctypes.sizeof, structures), _COUNT.itemsize)
        assert sizes == tuple(machine.size_of(i) for i in range(len(sizes))), "Python and C++ disagree on layouts"
        machine.run_grid(ctypes.byref(settings), ctypes.byref(result), ctypes.c_void_p(counts.ctypes.data))
        if result.error:
            raise FaultError(f"{result.error.decode()}: {self.kernel.where(self.sources[result.error_at])}")
        findings = [
            Finding(
                KINDS[f.kind],
                self.kernel.where(self.sources[f.instruction]),
                f.count,
                _place(f),
                f.program,
                f.warp,
            )
            for f in result.findings[: result.num_findings]
        ]
        return Run(findings, counts, result.executed, memory.touched())

    def _argument(self, values: list, name: str, kind: str) -> int:
        """The bits of a parameter as an instruction of that type loads it; extended by its sign if it has one."""
        number = [parameter for parameter, _ in self.kernel.parameters].index(name)
        value = values[number] if number < len(values) else 0
        if isinstance(value, float):
            wide = self.kernel.parameters[number][1] == "f64"
            return int.from_bytes(struct.pack("<d" if wide else "<f", value), "little")
        bits = int(kind[1:])
        value = int(value) & (1 << bits) - 1
        return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def _place(found) -> str:
    if found.argument == -2:  # no memory, but a register or the whole program
        return ""
    what = "shared memory" if found.argument == -1 else f"argument {found.argument}"
    return f"at byte {found.where} of {what}"


class _Memory:
    """The arguments as the machine takes them: an address of its own for each array argument, so that what is read
    through a view of a storage is checked against that view, and races against the storage."""

    def __init__(self, arguments: list, check: bool):
        self.regions, self.values = [], []
        self._kept = []  # what the regions point to
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise TypeError(
                    f"an argument is on {tensor.device}; the machine runs on the memory of CPU tensors"
                )
        # Cells as small as the smallest element by which a storage is accessed, up to two bytes.
        shifts: dict[int, int] = {}
        for tensor in tensors:
            start = tensor.untyped_storage().data_ptr()
            shifts[start] = min(shifts.get(start, 1), int(tensor.element_size() > 1))
        storages: dict[int, np.ndarray | None] = {}
        for number, argument in enumerate(arguments):
            if not isinstance(argument, torch.Tensor):
                self.values.append(argument)
                continue
            storage = argument.untyped_storage()
            size, start = storage.nbytes(), storage.data_ptr()
            shift = shifts[start]
            if start not in storages:
                count = ((size >> shift) + 1) * _GLOBAL_CELL_BYTES
                storages[start] = np.zeros(count, np.uint8) if check else None
            cells, touched = storages[start], np.zeros(1, np.uint8)
            first, last, allowed = _extent(argument, size, check)
            base = ((len(self.regions) + 1) << 36) + 4096 + start % 256  # aligned as on the host
            self.regions.append(
                _Region(base, start, size, first, last, None if allowed is None else allowed.ctypes.data,
                        None if cells is None else cells.ctypes.data, touched.ctypes.data, shift, number)
            )  # fmt: skip
            self._kept.append((argument, touched, cells, allowed))
            # Not `data_ptr`, which is 0 for views without elements.
            self.values.append(base + argument.storage_offset() * argument.element_size())

    def touched(self) -> list[torch.Tensor]:
        return [argument for argument, touched, *_ in self._kept if touched[0]]


def _extent(view: torch.Tensor, storage_bytes: int, gaps: bool) -> tuple[int, int, np.ndarray | None]:
    """First byte and end of a view in its storage, and, where it has gaps and they matter, which bytes it has."""
    size, first = view.element_size(), view.storage_offset() * view.element_size()
    if view.numel() == 0:
        return 0, 0, None
    last = first + size * (1 + sum((n - 1) * stride for n, stride in zip(view.shape, view.stride())))
    if not gaps or view.is_contiguous():
        return first, last, None
    allowed = torch.zeros(storage_bytes, dtype=torch.uint8)
    elements = allowed[: storage_bytes // size * size].view(-1, size)
    elements.as_strided((*view.shape, size), (*(s * size for s in view.stride()), 1), first).fill_(1)
    return first, last, allowed.numpy()
