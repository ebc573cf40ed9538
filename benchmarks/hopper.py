"""Whether machine code of Hopper (sm_90) keeps the rules of its asynchronous matrix products.

An HGMMA (PTX: wgmma.mma_async) is issued by the four warps of a warpgroup and runs on beside them. Until its group
is waited for (WARPGROUP.DEPBAR.LE gsb0, n: until n groups are left) its accumulators may be neither read nor
written, and the registers of its operand A not written. What it reads of shared memory may not be written until
every warpgroup that reads it has waited: a wait orders one warpgroup alone, so a barrier has to come before the
others store there. Triton before 3.9 does not see to that (its issue 11047). And where ptxas finds accumulators
touched between a group's products, it waits after every single one (its warning C7515): right, but slow.

`hazards` walks SASS along all branches, each loop a few times, with all threads of a program at once. It computes
what integer instructions make of thread numbers and constants; what comes from arguments and memory is unknown.
That decides where stores to shared memory and the products' operands lie, swizzles and buffers included.

What it leaves: predicates that are not known may be either, so that it may report what never happens. Named
barriers, functions that are called, the TMA and what needs more turns of a loop than `_TURNS` are not looked at;
nor is whether stores come before the products that read them.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .assembly import Instruction, parse

_TURNS = 3  # of each loop, so that its buffers come round
_WARPGROUP = 128  # threads
_SHARED_MEMORY, _GRANULE = 1 << 18, 16  # bytes: what a descriptor reaches, and how finely it is told apart
_MASK = 0xFFFFFFFF
Value = np.ndarray | None  # of each thread, 0 to 2³² − 1; None: unknown


@dataclass
class _Product:
    """An HGMMA that was issued."""

    place: str
    accumulators: set[int]  # numbers of registers
    operand: set[int]  # registers of A
    reads: np.ndarray  # (warpgroups, granules): what it reads of shared memory


@dataclass
class _State:
    """Of a program on one path through the code."""

    at: int = 0
    registers: dict[str, np.ndarray] = field(default_factory=dict)
    predicates: dict[str, np.ndarray] = field(default_factory=dict)
    open: list[_Product] = field(default_factory=list)  # issued, their group not closed
    groups: list[list[_Product]] = field(default_factory=list)  # closed, not waited for
    waited: list[_Product] = field(default_factory=list)  # by this warpgroup, with no barrier since
    written: set[int] = field(default_factory=set)  # registers, since the last WARPGROUP.ARRIVE
    turns: dict[int, int] = field(default_factory=dict)  # how often the path took each jump back

    def fork(self, at: int) -> "_State":
        return _State(
            at, dict(self.registers), dict(self.predicates), list(self.open), list(self.groups), list(self.waited),
            set(self.written), dict(self.turns),
        )  # fmt: skip

    def in_flight(self) -> Iterator[_Product]:
        yield from self.open
        for group in self.groups:
            yield from group


def product_faults(sass: str, ptx: str, num_warps: int) -> list[str]:
    """What is wrong with the products of a kernel: where it does not wait for them, or too often."""
    found = hazards(sass, num_warps)
    groups, waits = ptx.count("wgmma.commit_group"), sass.count("WARPGROUP.DEPBAR")
    if waits > groups:
        found.append(f"waits {waits} times for {groups} groups of products")
    return found


def hazards(sass: str, num_warps: int) -> list[str]:
    """What the code does while products may still be running, the first of each kind and how many there are."""
    walk = _Walk(sass, num_warps)
    walk.run()
    return [
        first + (f", and {len(places) - 1} more" if len(places) > 1 else "")
        for places in walk.found.values()
        for first in places[:1]
    ]


class _Walk:
    """All paths, with what was found on them and what shared memory was stored to and read by products."""

    def __init__(self, sass: str, num_warps: int):
        self.instructions, self.labels = parse(sass)
        products = [i for i, each in enumerate(self.instructions) if each.opcode.startswith("HGMMA")]
        self.last_product = max(products, default=-1)
        self.threads = 32 * num_warps
        self.found: dict[str, list[str]] = {}
        self.stored, self.read = self._no_memory(), self._no_memory()

    def _no_memory(self) -> np.ndarray:
        return np.zeros((self.threads // _WARPGROUP, _SHARED_MEMORY // _GRANULE), bool)

    def run(self) -> None:
        paths = [_State()]
        while paths:
            state = paths.pop()
            while state.at < len(self.instructions):
                instruction = self.instructions[state.at]
                guard = self._predicate(state, instruction.guard or "PT")
                some, others = (True, True) if guard is None else (guard.any(), not guard.all())
                if some and instruction.target:
                    target = self.labels[instruction.target]
                    if others and state.at > self.last_product and not (state.waited or any(state.in_flight())):
                        state.at += 1  # what comes is without products, whichever way it goes
                        continue
                    if others:
                        paths.append(state.fork(state.at + 1))
                    if target > state.at or self._turn(state):
                        state.at = target
                        continue
                    if others or not instruction.guard:
                        break
                elif some and not others and instruction.opcode == "EXIT":
                    break
                elif some:
                    self._step(state, instruction)
                state.at += 1

    def _turn(self, state: _State) -> bool:
        """Whether a path jumps back once more."""
        state.turns[state.at] = state.turns.get(state.at, 0) + 1
        return state.turns[state.at] < _TURNS

    def _step(self, state: _State, instruction: Instruction) -> None:
        opcode = instruction.opcode
        written, read = _registers(instruction)
        if opcode.startswith("HGMMA"):
            self._issue(state, instruction)
            return
        if opcode == "WARPGROUP.ARRIVE":
            state.written = set()
            return
        if opcode.startswith("WARPGROUP.DEPBAR"):
            left = int(instruction.operands[1], 16)
            done = state.groups[: len(state.groups) - left]
            state.groups = state.groups[len(done) :]
            if self.threads > _WARPGROUP:
                state.waited += [product for group in done for product in group]
            return
        if opcode.startswith("BAR.SYNC") and instruction.operands == ("0x0",):
            state.waited = []
            return
        for product in state.in_flight():
            if (written | read) & product.accumulators:
                self._report(instruction, "touches accumulators of", product)
            if written & product.operand:
                self._report(instruction, "overwrites A of", product)
        state.written |= written
        if re.match(r"STS|LDGSTS", opcode):
            self._store(state, instruction)
        self._compute(state, instruction)

    def _report(self, instruction: Instruction, what: str, product: _Product | None = None) -> None:
        text = f"{instruction.opcode} at {instruction.place} {what}"
        if product:
            text += f" the HGMMA at {product.place} before it is done"
        places = self.found.setdefault(what, [])
        if text not in places:
            places.append(text)

    # Products and stores.

    def _issue(self, state: _State, instruction: Instruction) -> None:
        """HGMMA.64xNxK accumulators, A in registers if not in shared memory, descriptors of A and B in a row."""
        columns = int(re.match(r"HGMMA\.64x(\d+)x", instruction.opcode).group(1))
        first, a, *rest = instruction.operands
        if a.startswith("R"):
            operand, matrices = set(range(int(a[1:]), int(a[1:]) + 4)), [(rest[0], "B", columns, 2)]
        else:
            operand, matrices = set(), [(a, "A", 64, 0), (a, "B", columns, 2)]
        reads = self._no_memory()
        for descriptor, letter, rows, offset in matrices:
            number = int(re.search(r"UR(\d+)", descriptor).group(1)) + offset
            low, high = (state.registers.get(f"UR{number + word}") for word in (0, 1))
            if low is None or high is None:
                self._report(instruction, "reads shared memory at an unknown address")
                continue
            for warpgroup in range(len(reads)):
                thread = warpgroup * _WARPGROUP
                for start, end in _extents(
                    int(low[thread]), int(high[thread]), rows, f"tnsp{letter}" in descriptor
                ):
                    reads[warpgroup, start // _GRANULE : -(-end // _GRANULE)] = True
        self.read |= reads
        for earlier in state.in_flight():
            if operand & earlier.accumulators:
                self._report(instruction, "reads accumulators of", earlier)
        accumulators = set(range(int(first[1:]), int(first[1:]) + columns // 2))
        if (operand | (accumulators if first in rest else set())) & state.written:
            self._report(instruction, "takes registers that were written after WARPGROUP.ARRIVE")
        state.open.append(_Product(instruction.place, accumulators, operand, reads))
        if "gsb0" in instruction.operands:
            state.groups.append(state.open)
            state.open = []

    def _store(self, state: _State, instruction: Instruction) -> None:
        pending = [*state.in_flight(), *state.waited]
        address = self._address(state, next(text for text in instruction.operands if text.startswith("[")))
        if address is None:
            if pending:
                self._report(instruction, "stores at an unknown address, perhaps what is read by", pending[-1])
            return
        size = 16 if instruction.opcode.startswith("STSM") else _size(instruction.opcode)
        guard = self._predicate(state, instruction.guard or "PT")
        stored = self._no_memory()
        for warpgroup in range(len(stored)):
            threads = slice(warpgroup * _WARPGROUP, (warpgroup + 1) * _WARPGROUP)
            places = address[threads] if guard is None else address[threads][guard[threads]]
            for end in (places, places + size - 1):
                stored[warpgroup, end % _SHARED_MEMORY // _GRANULE] = True
        self.stored |= stored
        waited = {id(product) for product in state.waited}
        for product in pending:
            for reader, reads in enumerate(product.reads):
                # Its own wait orders the stores of a warpgroup.
                others = [g for g in range(len(stored)) if g != reader or id(product) not in waited]
                if (stored[others].any(0) & reads).any():
                    self._report(instruction, "overwrites shared memory of", product)
                    break

    def _address(self, state: _State, text: str) -> Value:
        parts = [self._value(state, part) for part in text.strip("[]").split("+")]
        return None if any(part is None for part in parts) else sum(parts) & _MASK

    # Integer arithmetic.

    def _value(self, state: _State, text: str) -> Value:
        if text in state.registers:
            return state.registers[text]
        if (number := _constant(text)) is not None:
            return np.full(self.threads, number & _MASK, np.int64)
        if text.startswith(("-", "~")):
            value = self._value(state, text[1:])
            return value if value is None else (-value if text[0] == "-" else ~value) & _MASK
        return state.registers.get(text.removesuffix(".reuse"))

    def _predicate(self, state: _State, text: str) -> np.ndarray | None:
        if text.lstrip("!") in ("PT", "UPT"):
            value = np.ones(self.threads, bool)
        else:
            value = state.predicates.get(text.lstrip("!"))
        return ~value if value is not None and text.startswith("!") else value

    def _compute(self, state: _State, instruction: Instruction) -> None:
        """Does an integer instruction, or forgets what an instruction writes."""
        predicates, target, sources = _split(instruction)
        guard = self._predicate(state, instruction.guard or "PT")
        results = {}
        if guard is not None and _INTEGER.match(instruction.opcode):
            results = self._results(state, instruction.opcode, target, sources)
        for name in (*_names(instruction), *predicates):
            file = state.predicates if "P" in name else state.registers
            new, old = results.get("P" if name in predicates[:1] else name), file.get(name)
            if new is not None and (guard.all() or old is not None):
                file[name] = new if guard.all() else np.where(guard, new, old)
            else:
                file.pop(name, None)

    def _results(self, state: _State, opcode: str, target: str, sources: list[str]) -> dict[str, np.ndarray]:
        """What is written to each register, and as "P" to the first predicate, as far as it is known."""
        name, *flags = opcode.split(".")
        name = name[1:] if re.match(r"U[A-Z]", name) else name  # uniform instructions are the same
        if sources == ["SR_TID.X"]:
            return {target: np.arange(self.threads)}
        zeros = np.zeros(self.threads, np.int64)
        if sources == ["SR_CgaCtaId"]:  # addresses in the own program's memory
            return {target: zeros}
        if sources == ["SRZ"]:  # CS2R, of two registers
            return {target: zeros} if "32" in flags else {target: zeros, _next(target): zeros}
        if name == "IADD3" and "64" in flags:
            return self._add_64(state, target, sources)
        carries = [self._predicate(state, text) for text in sources if "P" in text]
        numbers = [text for text in sources if "P" not in text]
        values = [self._value(state, text) for text in numbers]
        if any(value is None for value in values):
            return {}
        if name == "ISETP":
            result = _compare(flags, *values[:2])
            if result is None or carries[0] is None:
                return {}
            return {"P": result & carries[0] if "AND" in flags else result | carries[0]}
        if name == "IADD3":
            total = sum(values)
            if "X" in flags:
                if any(carry is None for carry in carries):
                    return {}
                return {target: (total + sum(carry.astype(np.int64) for carry in carries)) & _MASK}
            carried = {} if any(text.startswith(("-", "~")) for text in numbers) else {"P": total > _MASK}
            return {target: total & _MASK, **carried}
        if name == "SEL":
            return {} if carries[0] is None else {target: np.where(carries[0], *values)}
        if name == "R2UR":  # of a warp's first thread
            return {target: np.repeat(values[0][::32], 32)}
        if name == "LOP3":
            result = _logic(*values[:3], int(numbers[3], 16))
            return {target: result, "P": result != 0}
        result = _arithmetic(name, flags, values)
        return {} if result is None else {target: result}

    def _add_64(self, state: _State, target: str, sources: list[str]) -> dict[str, np.ndarray]:
        total = np.zeros(self.threads, np.uint64)
        for text in sources:
            parts = [self._value(state, text), self._value(state, _next(text))]
            if parts[0] is None or parts[1] is None:
                return {}
            total += parts[0].astype(np.uint64) + (parts[1].astype(np.uint64) << np.uint64(32))
        return {
            target: (total & np.uint64(_MASK)).astype(np.int64),
            _next(target): (total >> np.uint64(32)).astype(np.int64),
        }


@functools.cache
def _constant(text: str) -> int | None:
    if text in ("RZ", "URZ"):
        return 0
    return int(text, 16) if re.fullmatch(r"-?0x[0-9a-f]+", text) else None


def _next(text: str) -> str:
    """The register of the high word; of a constant, zero."""
    match = re.fullmatch(r"(U?R)(\d+)", text)
    return f"{match.group(1)}{int(match.group(2)) + 1}" if match else "RZ"


def _compare(flags: list[str], a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    if "EX" in flags:  # of high words
        return None
    if "U32" not in flags:
        a, b = (np.where(value > _MASK >> 1, value - (1 << 32), value) for value in (a, b))
    return {"EQ": a == b, "NE": a != b, "LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b}.get(flags[0])


def _logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Bit by bit, the bit of the truth table that the three bits number."""
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result & _MASK


def _arithmetic(name: str, flags: list[str], values: list[np.ndarray]) -> np.ndarray | None:
    """The first word of the result, of what addresses are made with."""
    if name == "MOV":
        return values[0]
    if name == "VIADD":
        return (values[0] + values[1]) & _MASK
    if name == "IMAD" and not {"HI", "WIDE", "X"} & set(flags):
        return (values[0] * values[1] + values[2]) & _MASK if len(values) == 3 else None
    if name == "LEA" and not flags:
        return ((values[0] << values[2]) + values[1]) & _MASK
    if name == "LEA" and flags == ["HI"]:
        return ((values[2] << 32 | values[0]) >> (32 - values[3])) + values[1] & _MASK
    if name == "SHF" and flags == ["L", "U32"]:
        return values[0] << np.minimum(values[1], 32) & _MASK
    if name == "SHF" and flags == ["R", "U32", "HI"]:
        return values[2] >> np.minimum(values[1], 32)
    if name == "SHF" and flags == ["R", "S32", "HI"]:
        return (values[2] ^ 1 << 31) - (1 << 31) >> np.minimum(values[1], 31) & _MASK
    if name == "SGXT":
        ones = (1 << values[1]) - 1
        sign = np.where("U32" in flags, 0, 1 << values[1] - 1)
        return ((values[0] & ones ^ sign) - sign) & _MASK
    if name == "PRMT":
        both = values[2] << 32 | values[0]
        selector = values[1]
        if (selector & 0x8888).any():
            return None
        return sum((both >> 8 * (selector >> 4 * byte & 7) & 0xFF) << 8 * byte for byte in range(4))
    return None


# Instructions.

_INTEGER = re.compile(r"U?(MOV|VIADD|IADD3|IMAD|LEA|SHF|SGXT|PRMT|LOP3|SEL|ISETP)\b|C?S2U?R|R2UR")
_NO_TARGET = re.compile(
    r"ST|LDGSTS|BRA|BRX|EXIT|RET|BAR|BSYNC|BSSY|NOP|WARP|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|ERRBAR|CCTL|RED|R2P|YIELD"
)
_ONLY_PREDICATES = re.compile(r"U?(ISETP|FSETP|PLOP3|DSETP|HSETP2)")


@functools.cache
def _split(instruction: Instruction) -> tuple[list[str], str, list[str]]:
    """Predicates written, the first register written, sources."""
    opcode, operands = instruction.opcode, list(instruction.operands)
    if opcode.startswith("R2P"):
        return [f"P{number}" for number in range(7)], "", operands
    if _NO_TARGET.match(opcode):
        return [], "", operands
    predicates = []
    count = 2 if _ONLY_PREDICATES.match(opcode) else len(operands)
    while operands and len(predicates) < count and re.fullmatch(r"U?P[\dT]", operands[0]):
        predicates.append(operands.pop(0))
    target = "" if _ONLY_PREDICATES.match(opcode) or not operands else operands.pop(0)
    while target and len(operands) > 1 and re.fullmatch(r"U?P[\dT]", operands[0]):  # a carry
        predicates.append(operands.pop(0))
    return [name if not name.endswith("T") else "" for name in predicates], target, operands


def _size(opcode: str) -> int:
    """Bytes of a thread's load or store."""
    flags = opcode.split(".")
    return 16 if "128" in flags else 8 if "64" in flags else 4


@functools.cache
def _names(instruction: Instruction) -> list[str]:
    """The registers that an instruction writes."""
    _, target, _ = _split(instruction)
    match = re.fullmatch(r"(U?R)(\d+)", target)
    if not match:
        return []
    name, flags = instruction.opcode.split(".")[0], instruction.opcode.split(".")
    count = _size(instruction.opcode) // 4 if re.match(r"U?LD|UIADD3|ATOM", name) else 1
    if name == "LDSM":
        count = int(flags[-1])
    elif "WIDE" in flags or name == "CS2R":
        count = 2
    elif name in ("HMMA", "IMMA"):
        count = 4
    return [f"{match.group(1)}{int(match.group(2)) + i}" for i in range(count)]


@functools.cache
def _registers(instruction: Instruction) -> tuple[set[int], set[int]]:
    """The numbers of the ordinary registers that an instruction writes and reads. A wide store reads several."""
    _, _, sources = _split(instruction)
    written = {int(name[1:]) for name in _names(instruction) if name.startswith("R")}
    read = {int(number) for text in sources for number in re.findall(r"(?<![A-Z])R(\d+)", text)}
    if instruction.opcode.startswith("ST") and (data := re.fullmatch(r"R(\d+)(?:\.reuse)?", sources[-1])):
        words = (
            int(instruction.opcode[-1])
            if instruction.opcode.startswith("STSM")
            else _size(instruction.opcode) // 4
        )
        read |= {int(data.group(1)) + i for i in range(words)}
    return written, read


def _extents(low: int, high: int, rows: int, transposed: bool) -> list[tuple[int, int]]:
    """The bytes that a matrix descriptor of `rows` by 16 elements of 16 bits covers, in whole swizzled rows.

    PTX ISA, "Matrix descriptor": bits 0-13 start, 16-29 leading and 32-45 stride byte offset, each over 16; 62-63
    swizzle of 128, 64 or 32 bytes (1, 2, 3) or none. Eight rows of so many bytes are a block. A matrix as it is
    has one block below another, a stride apart. Transposed, its 16 rows along K are two blocks, beside which are
    as many more as a row has bytes for; which of both offsets is whose varies, so both ways are covered.
    """
    start, leading, stride = ((word & 0x3FFF) << 4 for word in (low, low >> 16, high))
    width = {1: 128, 2: 64, 3: 32}.get(high >> 30, 16)
    block = 8 * width
    start -= start % block
    if not transposed:
        blocks = {i * stride + k for i in range(rows // 8) for k in ({0} if width > 16 else {0, leading})}
    else:
        across = range(max(1, 2 * rows // width))
        blocks = {
            i * one + j * other
            for one, other in ((leading, stride), (stride, leading))
            for i in across
            for j in (0, 1)
        }
    return [(start + offset, start + offset + block) for offset in blocks]
