"""A kernel's instructions with places instead of names, and runs of it on host memory.

program = Program(parse(text))
run = program.run((2, 1, 1), [tensor, 3, 0.5], shared_bytes=0)
"""

import ctypes
import re
import struct
from dataclasses import dataclass

import numpy as np
import torch

from . import build
from .ptx import Instruction, Kernel, UnsupportedError, address, elements
from .semantics import ELEMENTWISE, FUNCTIONS, MATRIX_TYPES, OPERATIONS, SHUFFLES, VOTES, WHOLE_WARP, canonical

_SHARED_BASE = 1024  # of the address window of shared memory: nothing real is at 0
# Written by the machine for each thread or run.
_THREAD_REGISTERS = ("%tid.x", "%laneid", "%warpid", "%ctaid.x", "%ctaid.y", "%ctaid.z")
_RUN_REGISTERS = ("%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.x")
_FIXED_REGISTERS = {"%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1}
# Nothing here depends on where data is cached, on how far memory is fenced (one instruction at a time is executed in
# order), or on how many registers warps have. griddepcontrol: launches here do not overlap.
_NOTHING = re.compile(
    r"membar\.|fence\.(acq_rel|sc)|griddepcontrol\.|discard\.|prefetch\.|setmaxnreg\.|nanosleep\.|applypriority\."
)
_CACHE_HINTS = re.compile(r"\.(L1::\w+|L2::\w+|nc|weak|relaxed|acquire|release|acq_rel|gpu|cta|volatile|ca|cg|cs|lu|cv|wb|wt)(?=\.)")  # fmt: skip
# A space that instructions name is shared or global memory; shared::cta is the program's own.
_OWN_SHARED = re.compile(r"::cta(?=\.|$)")


class Fault(RuntimeError):
    """The program cannot go on: an access out of bounds or misaligned, a barrier that some warps never reach."""


@dataclass(frozen=True)
class Finding:
    """What is wrong although the program went on."""

    kind: str
    where: str  # the instruction
    count: int
    place: int  # byte of shared memory or of the argument
    program: int
    warp: int
    other: int  # the other warp, or the argument

    def __str__(self) -> str:
        return f"{self.kind}, {self.count} times, first at byte {self.place} by warp {self.warp} of program {self.program}: {self.where}"  # fmt: skip


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
    late: bool = False  # asynchronous copies write at once and products read as late as they may, or the reverse


@dataclass
class Run:
    findings: list[Finding]
    counts: np.ndarray  # of `_COUNT`, one for each instruction
    executed: int  # warp instructions
    touched: list[torch.Tensor]  # the array arguments that were read or written at all


_INSTRUCTION = np.dtype([(name, "i4") for name in
                         ["operation", "whole_warp", "guard", "guard_negated", "line", "operands", "registers", "num_registers"]])  # fmt: skip
_COUNT = np.dtype([(name, "u8") for name in ["executed", "requests", "units", "ideal", "bytes"]])


def _structure(name: str, **fields) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_INT, _PTR, _U64 = ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64
_Region = _structure("_Region", base=_U64, data=_PTR, bytes=_U64, first=_U64, last=_U64, allowed=_PTR, cells=_PTR,
                     touched=_PTR, cell_shift=_INT, index=_INT)  # fmt: skip
_Settings = _structure(
    "_Settings",
    **dict.fromkeys(["instructions", "operands", "regions", "initial_registers"], _PTR),
    **dict.fromkeys(["num_instructions", "num_regions", "register_bytes", "threads", "shared_bytes", "shared_base"], _INT),
    shared_shift=_INT, grid=_INT * 3,
    **dict.fromkeys(["thread_index", "lane_index", "warp_index", "program_index", "check", "backwards", "late"], _INT),
    programs=_PTR, num_programs=_INT,
)  # fmt: skip
_Found = _structure("_Found", kind=_INT, line=_INT, count=_INT, other=_INT, where=_U64, program=_INT, warp=_INT)
_Result = _structure("_Result", error=ctypes.c_char * 512, error_line=_INT, num_findings=_INT,
                     findings=_Found * 64, executed=_U64)  # fmt: skip
_GLOBAL_CELL_BYTES = 24


class Program:
    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self._places: dict[
            str, int
        ] = {}  # of registers, in bytes of a warp's register file: 32 lanes side by side
        self._constants: dict[tuple[int, int], int] = {}  # (value, bytes) → place
        self._parameters: dict[tuple[str, int, str], int] = {}  # (name, register's bytes, type) → place
        self._top = 0
        self._instructions: list[tuple[int, ...]] = []
        self.sources: list[Instruction] = []  # of each of the machine's instructions
        self._operands: list[int] = []
        for name in (*_THREAD_REGISTERS, *_RUN_REGISTERS):
            self._places[name] = self._allocate(4)
        starts: list[int] = []  # of each parsed instruction, the machine's: one may become two
        self._branches: list[int] = []  # operands that hold the number of a parsed instruction
        for instruction in kernel.instructions:
            starts.append(len(self._instructions))
            try:
                self._lower(instruction)
            except (UnsupportedError, KeyError, ValueError) as error:
                reason = str(error) or type(error).__name__
                raise UnsupportedError(f"{kernel.where(instruction.line)}: {reason}") from None
        self._top = -(-self._top // 64) * 64
        starts.append(len(self._instructions))
        for at in self._branches:
            self._operands[at] = starts[self._operands[at]]
        self._code = np.array(self._instructions, dtype=_INSTRUCTION)
        self._numbers = np.array([*self._operands, 0], dtype=np.int32)
        self._has_bytes = re.search(r"\.shared\S*\.[bsu]8\b", kernel.text) is not None

    # Registers and constants.

    def _allocate(self, size: int) -> int:
        self._top += 32 * size
        return self._top - 32 * size

    def _size(self, name: str) -> int:
        if name in _THREAD_REGISTERS or name in _RUN_REGISTERS or name in _FIXED_REGISTERS:
            return 4
        if name not in self.kernel.register_bytes:
            raise UnsupportedError(f"unknown register {name}")
        return self.kernel.register_bytes[name]

    def _register(self, name: str) -> int:
        if name in _FIXED_REGISTERS:
            return self._constant(_FIXED_REGISTERS[name], 4)
        if name not in self._places:
            self._places[name] = self._allocate(self._size(name))
        return self._places[name]

    def _constant(self, value: int, size: int) -> int:
        key = (value & (1 << 8 * size) - 1, size)
        if key not in self._constants:
            self._constants[key] = self._allocate(size)
        return self._constants[key]

    def _operand(self, text: str, size: int) -> int:
        """The place of a register, which must have so many bytes, or of a constant."""
        if text.startswith("!"):
            raise UnsupportedError("a negated operand")
        if text == "global_smem":
            return self._constant(_SHARED_BASE, size)
        value = _immediate(text, size)
        if value is not None:
            return self._constant(value & 1 if size == 1 else value, size)
        if self._size(text) != size:
            raise UnsupportedError(f"{text} has {self._size(text)} bytes, not {size}")
        return self._register(text)

    def _address(self, operand: str, size: int) -> tuple[int, int]:
        base, offset = address(operand)
        return self._operand(base, size), offset

    # Instructions.

    def _emit(self, instruction: Instruction, name, operands: list[int], untouched: tuple[str, ...] = ()) -> None:
        """`untouched`: operands whose registers may be accumulators in flight."""
        guard = instruction.guard.lstrip("!")
        text = " ".join(operand for operand in instruction.operands if operand not in untouched)
        registers = [self._places[r] for r in re.findall(r"%?[\w$]+", text) if r in self._places]
        at = len(self._operands)
        self.sources.append(instruction)
        self._operands += [*operands, *registers]
        self._instructions.append(
            (build.NUMBERS[name], int(name in WHOLE_WARP), self._register(guard) if guard else -1, int(instruction.guard.startswith("!")),
             instruction.line, at, at + len(operands), len(registers))
        )  # fmt: skip

    def _operate(
        self, instruction: Instruction, name: str, *, untouched: tuple[str, ...] = (), **operands
    ) -> None:
        """An operation of the machine, with its operands by the names of `OPERATIONS`."""
        values = []
        for field in OPERATIONS[name].split():
            value = operands.pop(field.lstrip("*"))
            values += [len(value), *value] if field.startswith("*") else [int(value)]
        assert not operands, operands
        self._emit(instruction, name, values, untouched)

    def _lower(self, instruction: Instruction) -> None:
        opcode = _OWN_SHARED.sub("", instruction.opcode)
        plain = _CACHE_HINTS.sub("", opcode)
        for pattern, method in _LOWERINGS:
            if re.match(pattern, plain):
                method(self, instruction, plain, instruction.operands)
                return
        self._elementwise(instruction, plain)

    def _elementwise(self, instruction: Instruction, opcode: str) -> None:
        name, flush = canonical(opcode)
        operands = list(instruction.operands)
        combine = re.match(r"(setp\.\w+)\.(and|or|xor)\.(\w+)$", name)
        if combine:  # two instructions: the comparison, and its result with the predicate
            name, extra = f"{combine.group(1)}.{combine.group(3)}", operands.pop()
        if name not in ELEMENTWISE:
            raise UnsupportedError(f"the machine does not know {instruction.opcode}")
        sizes = ELEMENTWISE[name].register_bytes
        if len(operands) != len(sizes):
            raise UnsupportedError(f"{len(operands)} operands instead of {len(sizes)}")
        places = [self._operand(text, size) for text, size in zip(operands, sizes)]
        if combine:
            compared = self._allocate(1)
            self._emit(instruction, (name, flush), [compared, *places[1:]])
            self._emit(instruction, (f"{combine.group(2)}.pred", False),
                       [places[0], compared, self._operand(extra, 1)])  # fmt: skip
        else:
            self._emit(instruction, (name, flush), places)

    def _plain(self, instruction, opcode, operands) -> None:
        name = {"ret": "exit", "exit": "exit", "trap": "trap", "bar.warp.sync": "warp_barrier"}.get(
            opcode, "nothing"
        )
        self._operate(instruction, name)

    def _branch(self, instruction, opcode, operands) -> None:
        self._branches.append(len(self._operands))
        self._operate(instruction, "branch", target=self.kernel.labels[operands[0]])

    def _barrier(self, instruction, opcode, operands) -> None:
        if operands[0] != "0" or (len(operands) > 1 and operands[1] != str(self.kernel.threads)):
            raise UnsupportedError("a barrier of some of the warps")
        self._operate(instruction, "barrier")

    def _parameter(self, instruction, opcode, operands) -> None:
        target, (name, offset) = operands[0], address(operands[1])
        if offset or name not in dict(self.kernel.parameters):
            raise UnsupportedError("a part of a parameter")
        size = self._size(target)
        key = (name, size, opcode.rpartition(".")[2])
        if key not in self._parameters:
            self._parameters[key] = self._allocate(size)
        self._emit(instruction, (f"mov.b{8 * size}", False), [self._register(target), self._parameters[key]])

    def _access(self, instruction, opcode, operands) -> None:
        words = opcode.split(".")
        kind, space = ("load" if words[0] == "ld" else "store"), words[1]
        if space not in ("global", "shared"):
            raise UnsupportedError(f"memory of {space}")
        values, place = (operands[0], operands[1]) if kind == "load" else (operands[1], operands[0])
        names = elements(values)
        element = int(words[-1][1:]) // 8
        (size,) = {self._size(name) for name in names if name in self.kernel.register_bytes} or {max(element, 2)}
        base, offset = self._address(place, 8 if space == "global" else 4)
        fields = {"is_signed": words[-1][0] == "s"} if kind == "load" else {}
        self._operate(
            instruction, f"{kind}_{space}", address=base, offset=offset, element_bytes=element, register_bytes=size,
            values=[self._operand(name, size) for name in names], **fields,
        )  # fmt: skip

    def _atomic(self, instruction, opcode, operands) -> None:
        words = opcode.split(".")
        space, function, kind = words[1], words[2], words[-1]
        if space not in ("global", "shared") or f"{function}.{kind}" not in FUNCTIONS:
            raise UnsupportedError(f"the machine does not know {instruction.opcode}")
        operands = list(operands)
        old = operands.pop(0) if words[0] == "atom" else "_"
        size = int(kind[1:]) // 8
        base, offset = self._address(operands[0], 8 if space == "global" else 4)
        third = self._operand(operands[2], size) if function == "cas" else -1
        self._operate(
            instruction, "atomic", is_shared=space == "shared", address=base, offset=offset, bytes=size,
            function=FUNCTIONS[f"{function}.{kind}"], old=-1 if old == "_" else self._register(old),
            value=self._operand(operands[1], size), third=third,
        )  # fmt: skip

    def _copy(self, instruction, opcode, operands) -> None:
        if opcode.startswith("cp.async.commit"):
            self._operate(instruction, "commit_copies")
        elif opcode.startswith("cp.async.wait_group"):
            self._operate(instruction, "wait_copies", groups_left=int(operands[0], 0))
        elif opcode.startswith("cp.async.wait_all"):
            self._operate(instruction, "commit_copies")
            self._operate(instruction, "wait_copies", groups_left=0)
        elif re.match(r"cp\.async(\.shared)?\.global|cp\.async\.shared\.global", opcode):
            target, source = self._address(operands[0], 4), self._address(operands[1], 8)
            size = int(operands[2], 0)
            given = self._operand(operands[3], 4) if len(operands) > 3 else self._constant(size, 4)
            self._operate(
                instruction, "copy_async", target=target[0], target_offset=target[1], source=source[0],
                source_offset=source[1], bytes=size, source_bytes=given,
            )  # fmt: skip
        else:
            raise UnsupportedError(f"the machine does not know {instruction.opcode}")

    def _matrices(self, instruction, opcode, operands) -> None:
        form = re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x\d(\.trans)?\.shared\.b16", opcode)
        if form is None:
            raise UnsupportedError(f"the machine does not know {instruction.opcode}")
        load = form.group(1) == "ld"
        values, place = (operands[0], operands[1]) if load else (operands[1], operands[0])
        base, offset = self._address(place, 4)
        self._operate(
            instruction, "load_matrices" if load else "store_matrices", address=base, offset=offset,
            transposed=form.group(2) is not None, values=[self._operand(name, 4) for name in elements(values)],
        )  # fmt: skip

    def _mma(self, instruction, opcode, operands) -> None:
        form = re.fullmatch(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(f16|bf16|tf32)\.\2\.f32", opcode)
        if form is None:
            raise UnsupportedError(f"the machine does not know {instruction.opcode}")
        d, *a_b_c = ([self._operand(name, 4) for name in elements(text)] for text in operands)
        self._operate(
            instruction, "mma", type=MATRIX_TYPES[form.group(2)], k=int(form.group(1)),
            d0=d[0], d1=d[1], d2=d[2], d3=d[3], a_b_c=sum(a_b_c, []),
        )  # fmt: skip

    def _wgmma(self, instruction, opcode, operands) -> None:
        simple = {"fence": "fence_wgmma", "commit_group": "commit_wgmma"}
        what = opcode.split(".")[1]
        if what in simple:
            self._operate(instruction, simple[what])
            return
        if what == "wait_group":
            self._operate(instruction, "wait_wgmma", groups_left=int(operands[0], 0))
            return
        form = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(f16|bf16|tf32)\.\3", opcode)
        if form is None:
            raise UnsupportedError(f"the machine does not know {instruction.opcode}")
        d, a, b, accumulate, *flags = operands
        in_registers = a.startswith("{")
        a_places = [self._operand(name, 4 if in_registers else 8) for name in elements(a)]
        negate_a, negate_b, *transposed = map(int, flags)
        transposed = ([0, *transposed] if in_registers else transposed) + [0, 0]
        constant = {"0": 0, "false": 0, "1": 1, "true": 1}.get(accumulate)
        self._operate(
            instruction, "wgmma", untouched=(d,), type=MATRIX_TYPES[form.group(3)], n=int(form.group(1)),
            k=int(form.group(2)), a_in_registers=in_registers, transpose_a=transposed[0],
            transpose_b=transposed[1], b=self._operand(b, 8), negate_a=negate_a == -1, negate_b=negate_b == -1,
            accumulate=self._operand(accumulate, 1) if constant is None else self._constant(constant, 1),
            **{f"a{i}": place for i, place in enumerate((a_places * 4)[:4])},
            d=[self._operand(name, 4) for name in elements(d)],
        )  # fmt: skip

    def _proxy(self, instruction, opcode, operands) -> None:
        self._operate(instruction, "fence_proxy")

    def _shuffle(self, instruction, opcode, operands) -> None:
        result, _, predicate = operands[0].partition("|")
        value, lane, clamp = (self._operand(text, 4) for text in operands[1:4])
        self._operate(
            instruction, "shuffle", result=self._register(result), value=value, lane=lane, clamp=clamp,
            predicate=self._register(predicate) if predicate else -1, mode=SHUFFLES[opcode.split(".")[2]],
        )  # fmt: skip

    def _vote(self, instruction, opcode, operands) -> None:
        mode = VOTES[opcode.split(".")[2]]
        self._operate(instruction, "vote", result=self._operand(operands[0], 4 if mode == 0 else 1),
                      value=self._operand(operands[1], 1), mode=mode)  # fmt: skip

    def _elect(self, instruction, opcode, operands) -> None:
        result, _, predicate = operands[0].partition("|")
        place = -1 if result == "_" else self._register(result)
        self._operate(instruction, "elect", result=place, predicate=self._register(predicate))

    def _reduce(self, instruction, opcode, operands) -> None:
        words = opcode.split(".")
        if "NaN" in words or "abs" in words:
            raise UnsupportedError(f"the machine does not know {instruction.opcode}")
        self._operate(instruction, "reduce_warp", result=self._register(operands[0]),
                      value=self._operand(operands[1], 4), function=FUNCTIONS[f"{words[2]}.{words[-1]}"])  # fmt: skip

    def _vector(self, instruction, opcode, operands) -> None:
        size = int(re.sub(r"\D", "", opcode) or 0) // 8
        if operands[1].startswith("{"):
            names = elements(operands[1])
            parts = [self._operand(name, size // len(names)) for name in names]
            self._operate(instruction, "pack", result=self._operand(operands[0], size),
                          part_bytes=size // len(names), parts=parts)  # fmt: skip
        elif operands[0].startswith("{"):
            names = elements(operands[0])
            parts = [-1 if name == "_" else self._operand(name, size // len(names)) for name in names]
            self._operate(instruction, "unpack", value=self._operand(operands[1], size),
                          part_bytes=size // len(names), parts=parts)  # fmt: skip
        else:
            self._elementwise(instruction, opcode)

    # Runs.

    def run(
        self,
        grid: tuple[int, ...],
        arguments: list,
        shared_bytes: int,
        threads: int | None = None,
        schedule: Schedule = Schedule(),
        programs: list[int] | None = None,
        check: bool = True,
    ) -> Run:
        """Runs the grid, or `programs` of it, on the memory of the arguments.

        Args:
            grid: one to three numbers of programs.
            arguments: a tensor on the CPU or a number for each parameter; parameters after them get 0.
            shared_bytes: of a program.
            threads: of a program, where the text does not say.
            check: whether to look for races, and for gaps of views; the ends of views are checked always.

        Raises:
            Fault: with the instruction and its place in the Triton source.
        """
        kernel, grid = self.kernel, (tuple(grid) + (1, 1))[:3]
        threads = kernel.threads or threads
        memory = _Memory(arguments, check)
        registers = np.full(self._top, 0xFF, np.uint8)

        def put(place: int, size: int, value: int) -> None:
            data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            registers[place : place + 32 * size] = np.frombuffer(data * 32, np.uint8)

        for (value, size), place in self._constants.items():
            put(place, size, value)
        for name, value in zip(_RUN_REGISTERS, (*grid, threads)):
            put(self._places[name], 4, value)
        for (name, size, kind), place in self._parameters.items():
            put(place, size, self._argument(memory.values, name, kind))
        total = grid[0] * grid[1] * grid[2]
        chosen = np.asarray(range(total) if programs is None else programs, dtype=np.int32)
        counts, result = np.zeros(len(self._instructions), _COUNT), _Result()
        regions = (_Region * max(len(memory.regions), 1))(*memory.regions)
        settings = _Settings(
            self._code.ctypes.data, self._numbers.ctypes.data, ctypes.addressof(regions), registers.ctypes.data,
            len(self._code), len(memory.regions), self._top, threads, shared_bytes, _SHARED_BASE,
            0 if self._has_bytes else 1, (_INT * 3)(*grid),
            *(self._places[name] for name in ("%tid.x", "%laneid", "%warpid", "%ctaid.x")),
            int(check), int(schedule.backwards), int(schedule.late), chosen.ctypes.data, len(chosen),
        )  # fmt: skip
        machine = build.library()
        sizes = (
            _INSTRUCTION.itemsize,
            *map(ctypes.sizeof, (_Region, _Settings, _Result, _Found)),
            _COUNT.itemsize,
        )
        assert sizes == tuple(machine.size_of(i) for i in range(len(sizes))), "Python and C++ disagree on layouts"
        machine.run_grid(ctypes.byref(settings), ctypes.byref(result), ctypes.c_void_p(counts.ctypes.data))
        if result.error:
            raise Fault(f"{result.error.decode()}: {kernel.where(result.error_line)}")
        findings = [
            Finding(KINDS[f.kind], kernel.where(f.line), f.count, f.where, f.program, f.warp, f.other)
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


class _Memory:
    """The arguments as the machine takes them: an address of its own for each array argument, so that what is read
    through a view of a storage is checked against that view, and races against the storage."""

    def __init__(self, arguments: list, check: bool):
        self.regions, self.values = [], []
        self._kept = []  # what the regions point to
        storages: dict[int, tuple] = {}
        for number, argument in enumerate(arguments):
            if not isinstance(argument, torch.Tensor):
                self.values.append(argument)
                continue
            storage = argument.untyped_storage()
            size, start = storage.nbytes(), storage.data_ptr()
            if start not in storages:
                # Two bytes a cell: no element that kernels write to global memory is smaller, but for bytes.
                shift = 0 if argument.element_size() == 1 else 1
                cells = np.zeros(((size >> shift) + 1) * _GLOBAL_CELL_BYTES, np.uint8) if check else None
                storages[start] = shift, cells
            shift, cells = storages[start]
            touched = np.zeros(1, np.uint8)
            first, last, allowed = _extent(argument, size, check)
            base = ((len(self.regions) + 1) << 36) + 4096 + start % 256  # aligned as on the host
            self.regions.append(
                _Region(base, start, size, first, last, None if allowed is None else allowed.ctypes.data,
                        None if cells is None else cells.ctypes.data, touched.ctypes.data, shift, number)
            )  # fmt: skip
            self._kept.append((argument, touched, cells, allowed))
            self.values.append(base + argument.data_ptr() - start)

    def touched(self) -> list[torch.Tensor]:
        return [argument for argument, touched, *_ in self._kept if touched[0]]


def _extent(view: torch.Tensor, storage_bytes: int, gaps: bool) -> tuple[int, int, np.ndarray | None]:
    """First byte and end of a view in its storage, and, where it has gaps and they matter, which bytes it has."""
    size, first = view.element_size(), view.storage_offset() * view.element_size()
    if view.numel() == 0:
        return 0, 0, None
    last = first + size * (1 + sum((n - 1) * stride for n, stride in zip(view.shape, view.stride())))
    if not gaps or last - first == view.numel() * size:
        return first, last, None
    allowed = torch.zeros(storage_bytes, dtype=torch.uint8)
    elements = allowed[: storage_bytes // size * size].view(-1, size)
    elements.as_strided((*view.shape, size), (*(s * size for s in view.stride()), 1), first).fill_(1)
    return first, last, allowed.numpy()


def _immediate(text: str, size: int) -> int | None:
    """The bits of a constant: 0f3F800000, 0d3FF0000000000000, 0x3F80, -1, 1.0; nothing for a name."""
    if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    if re.fullmatch(r"-?\d*\.\d+([eE][-+]?\d+)?", text):
        return int.from_bytes(struct.pack("<f" if size == 4 else "<d", float(text)), "little")
    return None


# Tried in this order; what none matches is element-wise.
_LOWERINGS = (
    (r"bra\b", Program._branch),
    (r"(ret|exit|trap|bar\.warp\.sync)$", Program._plain),
    (_NOTHING, Program._plain),
    (r"(bar|barrier)(\.cta)?\.sync", Program._barrier),
    (r"fence\.proxy\.async", Program._proxy),
    (r"ld\.param", Program._parameter),
    (r"(ld|st)\.", Program._access),
    (r"(atom|red)\.", Program._atomic),
    (r"cp\.", Program._copy),
    (r"(ld|st)matrix\.", Program._matrices),
    (r"mma\.", Program._mma),
    (r"wgmma\.", Program._wgmma),
    (r"shfl\.", Program._shuffle),
    (r"vote\.", Program._vote),
    (r"elect\.", Program._elect),
    (r"redux\.", Program._reduce),
    (r"mov\.", Program._vector),
)
