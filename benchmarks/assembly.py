"""What the compiler's output says of a kernel: its inner loop, how wide it loads, how many programs fit.

Reads text only: SASS (`nvdisasm -c`), GCN assembly and LLVM's intermediate representation, as Triton keeps them.
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass

# Instruction classes in the order in which they are tried. SASS without its uniform-datapath prefix, GCN as it is.
_CLASSES = {
    "matrix": r"[HQIBDO]?G?MMA$|UTC\w*MMA$|v_mfma",
    "spill": r"LDL$|STL$|scratch_",
    "control": r"BRA|BRX|BAR|BSSY|BSYNC|WARP|EXIT|RET|CALL|NOP|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|SYNCS|UTCBAR"
    r"|UTCATOMSWS|ELECT|NANOSLEEP|BPT|KILL|YIELD|ERRBAR|CCTL|VIRTCOUNT|PLOP3|P2R|R2P"
    r"|s_(branch|cbranch|waitcnt|barrier|nop|setprio|endpgm|and_saveexec|andn2_saveexec|sleep|sched)",
    "global": r"LDG|STG|LD$|ST$|UBLK|UTMA|RED$|ATOM$|ATOMG|global_|buffer_|flat_",
    "shuffle": r"SHFL|VOTE|C?REDUX|MATCH|ds_bpermute|ds_permute|ds_swizzle|v_readlane|v_readfirstlane|v_permlane",
    # Tensor memory (sm_100) counts as shared: both hold operands of the matrix unit.
    "shared": r"LDS|STS|ATOMS|LDTM|STTM|UTCCP|ds_",
    "special": r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "conversion": r"F2F|F2I|I2F|F2FP|I2I|FRND|v_cvt_|v_ldexp",
    "move": r"MOV|R2UR|CS2R|S2R|S2UR|LDC|ULDC|v_mov|s_mov|v_accvgpr|s_load|v_swap",
    "float": r"F(ADD|MUL|FMA|MNMX|SETP|SEL|SET|CHK|SWZ)|[HD](ADD|MUL|FMA|MNMX|SETP)|FHFMA|FHADD"
    r"|v_(pk_)?(add|sub|subrev|mul|fma|fmac|mac|max|min|max3|min3|div_scale|div_fmas|div_fixup)_(legacy_)?f(16|32|64)"
    r"|v_cmpx?_\w+_f(16|32|64)|v_dot",
    "integer": r"I|L|SH|SGXT|SEL|V|PRMT|POPC|FLO|BREV|BMSK|P|R|v_|s_",
}
_CLASS_PATTERNS = {name: re.compile(pattern) for name, pattern in _CLASSES.items()}


@functools.cache
def classify(opcode: str) -> str:
    """matrix, float, special (exp2, log2, 1/x, ...), integer (addresses too), shared, global, ... of an opcode."""
    name = opcode.split(".")[0]
    # Uniform-datapath instructions are the same with a U in front; UTC… and UBLK… are not.
    if re.match(r"U(?!TC|BLK|TMA)[A-Z]", name):
        name = name[1:]
    if opcode.startswith("IMAD.MOV"):
        return "move"
    return next((kind for kind, pattern in _CLASS_PATTERNS.items() if pattern.match(name)), "other")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    target: str | None  # the label that a branch jumps to
    place: str = ""  # of SASS: its address in the code, the predicate that guards it, its operands
    guard: str = ""
    operands: tuple[str, ...] = ()


def parse(assembly: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions in order, and for each label the number of instructions before it."""
    instructions, labels = [], {}
    for line in re.sub(r"\n\s+;", " ;", assembly).splitlines():  # a remark may go on in the next line
        # LLVM says which of its blocks belong to a loop; others may be jumped back to because they were moved.
        if label := re.match(r"(\.L(?!BB)\w+|\.LBB\w+(?=:.*Loop)):", line):
            labels[label.group(1)] = len(instructions)
        elif sass := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*)", line):
            place, guard, opcode, operands = sass.groups(default="")
            jump = re.search(r"`\((\.L\w+)\)", operands) if opcode.startswith("BRA") else None
            instructions.append(
                Instruction(
                    opcode, jump and jump.group(1), place, guard, tuple(re.split(r",\s*", operands.strip()))
                )
            )
        elif gcn := re.match(r"\s+([vs]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+|scratch_\w+)\b(.*)", line):
            jump = re.match(r"\s+(\.L\w+)", gcn.group(2)) if "branch" in gcn.group(1) else None
            instructions.append(Instruction(gcn.group(1), jump and jump.group(1)))
    return instructions, labels


def inner_loop(assembly: str) -> list[str] | None:
    """The opcodes of the loop that works: of those with the most matrix instructions, or global loads where there
    are none, the shortest. None without a loop that loads or multiplies."""
    instructions, labels = parse(assembly)
    best, best_key = None, (0, 0, 0)
    for end, instruction in enumerate(instructions):
        start = labels.get(instruction.target, end + 1)
        if start > end:  # not a jump, or a jump forward
            continue
        body = [instruction.opcode for instruction in instructions[start : end + 1]]
        count = Counter(map(classify, body))
        key = (count["matrix"], count["global"], -len(body))
        if key[:2] != (0, 0) and key > best_key:
            best, best_key = body, key
    return best


def instruction_mix(assembly: str) -> tuple[dict[str, int], bool]:
    """Instructions by class, of the inner loop, or of the whole kernel if it has none; and whether it has."""
    loop = inner_loop(assembly)
    opcodes = loop or [instruction.opcode for instruction in parse(assembly)[0]]
    counts = Counter(map(classify, opcodes))
    return {kind: counts[kind] for kind in (*_CLASSES, "other") if counts[kind]}, loop is not None


def global_loads(llvm: str, parameters: list[str]) -> dict[str, dict[int, int]]:
    """Bytes of each load from global memory, by the kernel's argument that the address comes from.

    {argument: {bytes of a load: how many such loads}}. `parameters` are the run-time arguments in order. An
    address is followed from the argument through arithmetic, loops and selections.
    """
    lines = llvm.splitlines()
    (definition,) = (line for line in lines if line.startswith("define") and "kernel" in line)
    origins = dict(zip(re.findall(r"(%[\w.]+)[,)]", definition), parameters))
    # Twice: an address that goes round a loop is used before it is defined.
    for _ in range(2):
        for line in lines:
            if match := re.match(r"\s+(%[\w.]+) = (?:tail call )?(?:getelementptr|phi|select|ptr)\b(.*)", line):
                sources = [origins[name] for name in re.findall(r"%[\w.]+", match.group(2)) if name in origins]
                if sources:
                    origins[match.group(1)] = sources[0]
    loads: dict[str, Counter] = {}
    for line in lines:
        if size := _bytes_of_load(line):
            found = [
                origins[name] for name in re.findall(r"%[\w.]+", line.partition("=")[2] or line) if name in origins
            ]
            loads.setdefault(found[0] if found else "unknown", Counter())[size] += 1
    return {argument: dict(sorted(counter.items())) for argument, counter in loads.items()}


_LLVM_BITS = {"bfloat": 16, "half": 16, "float": 32, "double": 64}


def _bytes_of_load(line: str) -> int | None:
    """Of a line of LLVM's representation that loads from global memory: NVIDIA's as inline PTX, AMD's as such."""
    if match := re.search(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)", line):
        return int(match.group(1) or 1) * int(match.group(2)) // 8
    if "cp.async" in line and (match := re.search(r"\.shared\.global.*?\], (0x[0-9a-f]+|\d+)", line)):
        return int(match.group(1), 0)
    if match := re.search(r"= load (?:<(\d+) x )?(\w+)>?, ptr addrspace\(1\)", line):
        return _bytes(match.group(1), match.group(2))
    if match := re.search(r"call (?:<(\d+) x )?(\w+)>? @llvm\.amdgcn\.raw\.ptr\.buffer\.load", line):
        return _bytes(match.group(1), match.group(2))
    return None


def _bytes(count: str | None, element: str) -> int:
    return int(count or 1) * (_LLVM_BITS.get(element) or int(element.removeprefix("i"))) // 8


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs on one streaming multiprocessor, or one compute unit, share."""

    threads: int  # of a warp
    warps: int
    programs: int
    registers: int  # a thread may hold all of them if one warp runs on each of the four partitions
    register_unit: int  # a warp's registers a thread are rounded up to this
    shared_memory: int
    shared_memory_of_program: int  # at most
    reserved: int  # shared memory that the system takes of each program
    tensor_memory: int = 0  # columns


# CUDA C++ programming guide, appendix "compute capabilities", tables of technical specifications: resident warps
# and blocks, 64 K registers and the shared memory of a multiprocessor; a block may take 1 KB less, and each block
# costs 1 KB. Registers are given to warps in units of 256, 8 a thread (CUDA's cuda_occupancy.h). Tensor memory:
# PTX ISA, tcgen05.alloc.
# gfx942: AMD's CDNA3 instruction set architecture, 512 vector registers a lane in each of four SIMDs, for 8 waves
# at most, in units of 8; 64 KB of LDS; 16 groups of several waves, for so many barriers (LLVM's AMDGPU back end).
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(32, 64, 32, 512, 8, 164 << 10, 163 << 10, 1 << 10),
    "sm_86": Multiprocessor(32, 48, 16, 512, 8, 100 << 10, 99 << 10, 1 << 10),
    "sm_90": Multiprocessor(32, 64, 32, 512, 8, 228 << 10, 227 << 10, 1 << 10),
    "sm_100": Multiprocessor(32, 64, 32, 512, 8, 228 << 10, 227 << 10, 1 << 10, tensor_memory=512),
    "sm_120": Multiprocessor(32, 48, 24, 512, 8, 100 << 10, 99 << 10, 1 << 10),
    "gfx942": Multiprocessor(64, 32, 16, 512, 8, 64 << 10, 64 << 10, 0),
}
_PARTITIONS = 4


def resident_programs(
    target: str, num_warps: int, registers: int, shared_memory: int, tensor_memory: int = 0
) -> tuple[int, str]:
    """How many programs fit on one multiprocessor at once, and what limits them."""
    limits = MULTIPROCESSORS[target]
    rounded = -(-registers // limits.register_unit) * limits.register_unit
    by_limit = {
        "warps": limits.warps // num_warps,
        "programs": limits.programs,
        "registers": limits.registers // rounded * _PARTITIONS // num_warps,
    }
    if shared_memory + limits.reserved:
        by_limit["shared memory"] = limits.shared_memory // (shared_memory + limits.reserved)
    if tensor_memory:
        by_limit["tensor memory"] = limits.tensor_memory // tensor_memory
    limit = min(by_limit, key=by_limit.get)
    return by_limit[limit], limit
