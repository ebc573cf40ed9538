"""Instructions with names → the machine's, with places of registers and constants in a warp's register file.

Most PTX instructions are one of `semantics.ELEMENTWISE`; the others become one of `semantics.OPERATIONS` here.
"""

import re
import struct

import numpy as np

from . import build
from .ptx import Instruction, Kernel, UnsupportedError, address, elements
from .semantics import (
    ELEMENTWISE,
    FUNCTIONS,
    MATRIX_TYPES,
    OPERATIONS,
    SHUFFLES,
    TENSOR_MAP_FIELDS,
    VOTES,
    WHOLE_WARP,
    canonical,
)

_FIELDS = (
    "operation",
    "whole_warp",
    "guard",
    "guard_negated",
    "operands",
    "registers",
    "num_registers",
)
INSTRUCTION = np.dtype([(name, "i4") for name in _FIELDS])
SHARED_BASE = (
    1024  # where shared memory begins in its window of addresses: not at 0, so that 0 is no address of it
)
# Written by the machine for each thread, and for each run.
THREAD_REGISTERS = ("%tid.x", "%laneid", "%warpid", "%ctaid.x", "%ctaid.y", "%ctaid.z")
RUN_REGISTERS = ("%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.x")
_FIXED_REGISTERS = {"%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1}
# Without effect here: where data is cached; fences of memory, as instructions are executed in order; how many
# registers warps have; what waits for earlier launches, as launches do not overlap.
_NOTHING = re.compile(
    r"membar\.|fence\.(acq_rel|sc|mbarrier_init|proxy\.tensormap)|griddepcontrol\.|discard\.|prefetch\.|setmaxnreg\."
    r"|nanosleep\.|applypriority\."
)
_CACHE_HINTS = re.compile(
    r"\.(L1::\w+|L2::\w+|nc|weak|relaxed|acquire|release|acq_rel|gpu|cta|volatile|ca|cg|cs|lu|cv|wb|wt)(?=\.)"
)
_OWN_SHARED = re.compile(r"::cta(?=\.|$)")  # shared::cta is what shared means


class Lowered:
    """What the machine runs of a kernel.

    A warp's register file holds each register and each constant for 32 lanes side by side; a place is where they
    begin, in bytes.

        code, operands        the instructions, and the numbers that they refer to
        sources               the PTX instruction of each
        places, constants     of registers by name; of constants by value and bytes
        parameters            of the kernel's parameters by name, bytes of the register and type they are loaded as
        register_bytes        of the whole file
        shared_cell_bytes     the smallest access to shared memory that checks tell apart
    """

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.places: dict[str, int] = {}
        self.constants: dict[tuple[int, int], int] = {}
        self.parameters: dict[tuple[str, int, str], int] = {}
        self.sources: list[Instruction] = []
        self.register_bytes = 0
        self._instructions: list[tuple[int, ...]] = []
        self._operands: list[int] = []
        for name in (*THREAD_REGISTERS, *RUN_REGISTERS):
            self.places[name] = self._allocate(4)
        starts: list[int] = []  # of each parsed instruction, the machine's: one may become two
        self._branches: list[int] = []  # operands that hold the number of a parsed instruction
        for self._number, instruction in enumerate(kernel.instructions):
            starts.append(len(self._instructions))
            try:
                self._lower(instruction)
            except (UnsupportedError, KeyError, ValueError) as error:
                reason = (
                    error if isinstance(error, UnsupportedError) else "operands that the machine does not know"
                )
                raise UnsupportedError(f"{kernel.where(instruction)}: {reason}") from None
        starts.append(len(self._instructions))
        for at in self._branches:
            self._operands[at] = starts[self._operands[at]]
        self.register_bytes = -(-self.register_bytes // 64) * 64
        self.code = np.array(self._instructions, dtype=INSTRUCTION)
        self.operands = np.array([*self._operands, 0], dtype=np.int32)
        self.shared_cell_bytes = 1 if re.search(r"\.shared\S*\.[bsu]8\b", kernel.text) else 2

    # Registers and constants.

    def _allocate(self, size: int) -> int:
        self.register_bytes += 32 * size
        return self.register_bytes - 32 * size

    def _size(self, name: str) -> int:
        if name in THREAD_REGISTERS or name in RUN_REGISTERS or name in _FIXED_REGISTERS:
            return 4
        if name not in self.kernel.register_bytes:
            raise UnsupportedError(f"unknown register {name}")
        return self.kernel.register_bytes[name]

    def _register(self, name: str) -> int:
        if name in _FIXED_REGISTERS:
            return self._constant(_FIXED_REGISTERS[name], 4)
        if name not in self.places:
            self.places[name] = self._allocate(self._size(name))
        return self.places[name]

    def _constant(self, value: int, size: int) -> int:
        key = (value & (1 << 8 * size) - 1, size)
        if key not in self.constants:
            self.constants[key] = self._allocate(size)
        return self.constants[key]

    def _operand(self, text: str, size: int) -> int:
        """The place of a register, which must have so many bytes, or of a constant."""
        if text.startswith("!"):
            raise UnsupportedError("a negated operand")
        if text == "global_smem":
            return self._constant(SHARED_BASE, size)
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
        if name not in build.NUMBERS:
            raise UnsupportedError(f"the machine does not know {instruction.opcode}")
        guard = instruction.guard.lstrip("!")
        text = " ".join(operand for operand in instruction.operands if operand not in untouched)
        registers = [self.places[r] for r in re.findall(r"%?[\w$]+", text) if r in self.places]
        at = len(self._operands)
        self.sources.append(instruction)
        self._operands += [*operands, *registers]
        self._instructions.append(
            (
                build.NUMBERS[name],
                int(name in WHOLE_WARP),
                self._register(guard) if guard else -1,
                int(instruction.guard.startswith("!")),
                at,
                at + len(operands),
                len(registers),
            )
        )

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
        if opcode == "bar.warp.sync":
            self._all_lanes(operands[0])
        name = {"ret": "exit", "exit": "exit", "trap": "trap", "bar.warp.sync": "warp_barrier"}.get(
            opcode, "nothing"
        )
        self._operate(instruction, name)

    @staticmethod
    def _all_lanes(mask: str) -> None:
        if (_immediate(mask, 4) or 0) & 0xFFFFFFFF != 0xFFFFFFFF:
            raise UnsupportedError(f"only some lanes, or who knows which: {mask}")

    def _branch(self, instruction, opcode, operands) -> None:
        self._branches.append(len(self._operands))
        if operands[0] not in self.kernel.labels:
            raise UnsupportedError(f"no label {operands[0]}")
        target = min(self.kernel.labels[operands[0]], key=lambda at: abs(at - self._number))  # that of this block
        self._operate(instruction, "branch", target=target)

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
        if key not in self.parameters:
            self.parameters[key] = self._allocate(size)
        self._emit(instruction, (f"mov.b{8 * size}", False), [self._register(target), self.parameters[key]])

    def _access(self, instruction, opcode, operands) -> None:
        words = opcode.split(".")
        kind, space = ("load" if words[0] == "ld" else "store"), words[1]
        if space not in ("global", "shared"):
            raise UnsupportedError(f"memory of {space}")
        values, place = (operands[0], operands[1]) if kind == "load" else (operands[1], operands[0])
        names = elements(values)
        element = int(words[-1][1:]) // 8
        sizes = {self._size(name) for name in names if name in self.kernel.register_bytes} or {max(element, 2)}
        if len(sizes) > 1:
            raise UnsupportedError("a vector of registers of several sizes")
        (size,) = sizes
        base, offset = self._address(place, 8 if space == "global" else 4)
        fields = {"is_signed": words[-1][0] == "s"} if kind == "load" else {}
        self._operate(
            instruction, f"{kind}_{space}", address=base, offset=offset, element_bytes=element,
            register_bytes=size, values=[self._operand(name, size) for name in names], **fields,
        )  # fmt: skip

    def _atomic(self, instruction, opcode, operands) -> None:
        words = opcode.split(".")
        space, function, kind = words[1], words[2], words[-1]
        if space not in ("global", "shared"):
            raise UnsupportedError(f"memory of {space}")
        operands = list(operands)
        old = operands.pop(0) if words[0] == "atom" else "_"
        size = int(kind[1:]) // 8
        base, offset = self._address(operands[0], 8 if space == "global" else 4)
        third = self._operand(operands[2], size) if function == "cas" else -1
        self._operate(
            instruction, "atomic", is_shared=space == "shared", address=base, offset=offset, bytes=size,
            function=self._function(function, kind), old=-1 if old == "_" else self._register(old),
            value=self._operand(operands[1], size), third=third,
        )  # fmt: skip

    @staticmethod
    def _function(name: str, kind: str) -> int:
        function = f"{name}.{kind}".replace("add.s", "add.u")
        if function not in FUNCTIONS:
            raise UnsupportedError(f"the machine does not know {name} of {kind}")
        return FUNCTIONS[function]

    def _copy(self, instruction, opcode, operands) -> None:
        if opcode.startswith("cp.async.commit"):
            self._operate(instruction, "commit_copies")
        elif opcode.startswith("cp.async.wait_group"):
            self._operate(instruction, "wait_copies", groups_left=int(operands[0], 0))
        elif opcode.startswith("cp.async.wait_all"):
            self._operate(instruction, "commit_copies")
            self._operate(instruction, "wait_copies", groups_left=0)
        elif re.match(r"cp\.async\.(shared\.)?global", opcode):
            target, source = self._address(operands[0], 4), self._address(operands[1], 8)
            size = int(operands[2], 0)
            given = self._operand(operands[3], 4) if len(operands) > 3 else self._constant(size, 4)
            self._operate(
                instruction, "copy_async", target=target[0], target_offset=target[1], source=source[0],
                source_offset=source[1], bytes=size, source_bytes=given,
            )  # fmt: skip
        else:
            raise UnsupportedError(f"the machine does not know {instruction.opcode}")

    def _bulk(self, instruction, opcode, operands) -> None:
        """Of the tensor memory accelerator, tiles of one to five dimensions."""
        if opcode.startswith("cp.async.bulk.commit_group"):
            self._operate(instruction, "commit_stores")
        elif opcode.startswith("cp.async.bulk.wait_group"):
            self._operate(instruction, "wait_stores", groups_left=int(operands[0], 0))
        elif re.fullmatch(r"cp\.async\.bulk\.tensor\.\dd\.shared\.global(\.tile)?\.mbarrier\S*", opcode):
            target, barrier = self._address(operands[0], 4), self._address(operands[2], 4)
            tensor_map, coordinates = self._tile(operands[1])
            self._operate(
                instruction, "load_tile", target=target[0], target_offset=target[1], map=tensor_map[0],
                map_offset=tensor_map[1], barrier=barrier[0], barrier_offset=barrier[1], coordinates=coordinates,
            )  # fmt: skip
        elif re.fullmatch(r"cp\.async\.bulk\.tensor\.\dd\.global\.shared(\.tile)?\.bulk_group", opcode):
            source = self._address(operands[1], 4)
            tensor_map, coordinates = self._tile(operands[0])
            self._operate(
                instruction, "store_tile", source=source[0], source_offset=source[1], map=tensor_map[0],
                map_offset=tensor_map[1], coordinates=coordinates,
            )  # fmt: skip
        else:
            raise UnsupportedError(f"the machine does not know {instruction.opcode}")

    def _tile(self, operand: str) -> tuple[tuple[int, int], list[int]]:
        """The address of the tensor map and the coordinates of "[%rd1, {%r1, %r2}]"."""
        tensor_map, _, coordinates = operand.strip("[] ").partition(",")
        return self._address(f"[{tensor_map}]", 8), [self._operand(c, 4) for c in elements(coordinates)]

    def _tensor_map(self, instruction, opcode, operands) -> None:
        if opcode.startswith("tensormap.cp_fenceproxy.global.shared"):
            target, source = (self._address(operand, 8) for operand in operands[:2])
            self._operate(instruction, "copy_tensor_map", target=target[0], target_offset=target[1],
                          source=source[0], source_offset=source[1])  # fmt: skip
            return
        form = re.fullmatch(r"tensormap\.replace\.tile\.(\w+)\.shared\.b1024\.b(32|64)", opcode)
        if form is None:
            raise UnsupportedError(f"the machine does not know {instruction.opcode}")
        (base, offset), size = self._address(operands[0], 8), int(form.group(2)) // 8
        ordinal = int(operands[1], 0) if len(operands) == 3 else 0
        self._operate(
            instruction, "replace_tensor_map", address=base, offset=offset, ordinal=ordinal, value_bytes=size,
            field=TENSOR_MAP_FIELDS.index(form.group(1)), value=self._operand(operands[-1], size),
        )  # fmt: skip

    def _mbarrier(self, instruction, opcode, operands) -> None:
        form = re.fullmatch(
            r"mbarrier\.(init|inval|arrive\.expect_tx|(?:try|test)_wait\.parity)\.shared\.b64", opcode
        )
        kind = form and form.group(1)
        if kind == "init":
            base, offset = self._address(operands[0], 4)
            self._operate(instruction, "init_mbarrier", address=base, offset=offset,
                          arrivals=self._operand(operands[1], 4))  # fmt: skip
        elif kind == "inval":
            base, offset = self._address(operands[0], 4)
            self._operate(instruction, "end_mbarrier", address=base, offset=offset)
        elif kind == "arrive.expect_tx" and operands[0] == "_":
            base, offset = self._address(operands[1], 4)
            self._operate(
                instruction, "expect_bytes", address=base, offset=offset, bytes=self._operand(operands[2], 4)
            )
        elif kind and kind.endswith("parity"):
            base, offset = self._address(operands[1], 4)
            self._operate(instruction, "wait_mbarrier", result=self._operand(operands[0], 1), address=base,
                          offset=offset, parity=self._operand(operands[2], 4))  # fmt: skip
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
            d0=d[0], d1=d[1], d2=d[2], d3=d[3], a_b_c=[place for operand in a_b_c for place in operand],
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
            instruction, "wgmma", untouched=(d, a), type=MATRIX_TYPES[form.group(3)], n=int(form.group(1)),
            k=int(form.group(2)), a_in_registers=in_registers, transpose_a=transposed[0],
            transpose_b=transposed[1], b=self._operand(b, 8), negate_a=negate_a == -1, negate_b=negate_b == -1,
            accumulate=self._operand(accumulate, 1) if constant is None else self._constant(constant, 1),
            **{f"a{i}": place for i, place in enumerate((a_places * 4)[:4])},
            d=[self._operand(name, 4) for name in elements(d)],
        )  # fmt: skip

    def _proxy(self, instruction, opcode, operands) -> None:
        self._operate(instruction, "fence_proxy")

    def _shuffle(self, instruction, opcode, operands) -> None:
        self._all_lanes(operands[4])
        result, _, predicate = operands[0].partition("|")
        value, lane, clamp = (self._operand(text, 4) for text in operands[1:4])
        self._operate(
            instruction, "shuffle", result=self._register(result), value=value, lane=lane, clamp=clamp,
            predicate=self._register(predicate) if predicate else -1, mode=SHUFFLES[opcode.split(".")[2]],
        )  # fmt: skip

    def _vote(self, instruction, opcode, operands) -> None:
        self._all_lanes(operands[2])
        mode = VOTES[opcode.split(".")[2]]
        self._operate(instruction, "vote", result=self._operand(operands[0], 4 if mode == 0 else 1),
                      value=self._operand(operands[1], 1), mode=mode)  # fmt: skip

    def _elect(self, instruction, opcode, operands) -> None:
        self._all_lanes(operands[1])
        result, _, predicate = operands[0].partition("|")
        place = -1 if result == "_" else self._register(result)
        self._operate(instruction, "elect", result=place, predicate=self._register(predicate))

    def _reduce(self, instruction, opcode, operands) -> None:
        words = opcode.split(".")
        if "NaN" in words or "abs" in words:
            raise UnsupportedError(f"the machine does not know {instruction.opcode}")
        self._all_lanes(operands[2])
        function = self._function(words[2], words[-1])
        self._operate(instruction, "reduce_warp", result=self._register(operands[0]),
                      value=self._operand(operands[1], 4), function=function)  # fmt: skip

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
    (r"bra\b", Lowered._branch),
    (r"(ret|exit|trap|bar\.warp\.sync)$", Lowered._plain),
    (_NOTHING, Lowered._plain),
    (r"(bar|barrier)(\.cta)?\.sync", Lowered._barrier),
    (r"fence\.proxy\.async", Lowered._proxy),
    (r"ld\.param", Lowered._parameter),
    (r"(ld|st)\.", Lowered._access),
    (r"(atom|red)\.", Lowered._atomic),
    (r"cp\.async\.bulk", Lowered._bulk),
    (r"cp\.", Lowered._copy),
    (r"tensormap\.", Lowered._tensor_map),
    (r"mbarrier\.", Lowered._mbarrier),
    (r"(ld|st)matrix\.", Lowered._matrices),
    (r"mma\.", Lowered._mma),
    (r"wgmma\.", Lowered._wgmma),
    (r"shfl\.", Lowered._shuffle),
    (r"vote\.", Lowered._vote),
    (r"elect\.", Lowered._elect),
    (r"redux\.", Lowered._reduce),
    (r"mov\.", Lowered._vector),
)
