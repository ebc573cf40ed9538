"""What each instruction computes: a table of the element-wise ones, and the operands of the machine's operations.

Element-wise instructions read and write registers of one lane. Each row gives, for opcodes that share a meaning,
the type of the result, the types of the operands and the result as a C expression in the operands a, b, c, d. (PTX
ISA, "Instruction Set": integer arithmetic, floating point, half precision, comparison and selection, logic and
shift, data movement and conversion.) In a row, T is each of its types in turn, U the unsigned type of that width,
W the type twice as wide. Functions are those of `machine/numbers.hpp`.

Modifiers that say how much precision is asked for (.rn, .approx, .full) are dropped: everything is computed with
one rounding, which the hardware's approximations (ex2, rcp, ...) come within two units in the last place of. The
modifier .ftz flushes subnormal operands and results to zero.
"""

import re
from dataclasses import dataclass

# C types by PTX type. Registers of b, f16 and bf16 types hold bits.
_C_TYPES = {
    **{f"{sign}{bits}": f"{sign}{bits}" for sign in "su" for bits in (8, 16, 32, 64)},
    **{f"b{bits}": f"u{bits}" for bits in (8, 16, 32, 64)},
    **{"f32": "f32", "f64": "f64", "pred": "u8", "f16": "u16", "bf16": "u16", "f16x2": "u32", "bf16x2": "u32"},
    "tf32": "f32",
}
_WIDTHS = {"u8": 16, "s8": 16, "f32": 32, "f64": 64}  # 8-bit values live in 16-bit registers


@dataclass(frozen=True)
class Elementwise:
    result: str  # C types
    operands: tuple[str, ...]
    expression: str
    predicate: bool = False  # the result is one
    predicates: tuple[bool, ...] = ()  # which operands are

    @property
    def register_bytes(self) -> tuple[int, ...]:
        """Of the result and of each operand."""
        kinds = [(self.result, self.predicate), *zip(self.operands, self.predicates)]
        return tuple(1 if predicate else register_bits(kind) // 8 for kind, predicate in kinds)


def register_bits(c_type: str) -> int:
    return _WIDTHS.get(c_type) or int(c_type[1:])


_SIGNED, _UNSIGNED = "s16 s32 s64", "u16 u32 u64"
_INTEGERS, _BITS = f"{_SIGNED} {_UNSIGNED}", "b16 b32 b64"
_FLOATS = "f32 f64"
_ROWS = [
    # opcode, types, result, operands, expression
    ("mov.T", f"{_BITS} {_INTEGERS} {_FLOATS} pred", "T", "T", "a"),
    ("cvta.to.global.T", "u64", "T", "T", "a"),
    ("cvta.global.T", "u64", "T", "T", "a"),
    ("add.T", _INTEGERS, "U", "U U", "a + b"),
    ("sub.T", _INTEGERS, "U", "U U", "a - b"),
    ("mul.lo.T", _INTEGERS, "U", "U U", "a * b"),
    ("mad.lo.T", _INTEGERS, "U", "U U U", "a * b + c"),
    ("mul.wide.T", "s16 s32 u16 u32", "W", "T T", "(W)a * (W)b"),
    ("mad.wide.T", "s16 s32 u16 u32", "W", "T T W", "(W)a * (W)b + c"),
    ("mul.hi.T", "s32 u32", "T", "T T", "(T)(((W)a * (W)b) >> 32)"),
    ("mul.hi.T", "s64 u64", "T", "T T", "high_product(a, b)"),
    ("mad.hi.T", "s32 u32", "T", "T T T", "(T)(((W)a * (W)b) >> 32) + c"),
    ("div.T", _INTEGERS, "T", "T T", "divide(a, b)"),
    ("rem.T", _INTEGERS, "T", "T T", "remainder(a, b)"),
    ("min.T", _INTEGERS, "T", "T T", "a < b ? a : b"),
    ("max.T", _INTEGERS, "T", "T T", "a > b ? a : b"),
    ("abs.T", _SIGNED, "T", "T", "a < 0 ? (T)(0 - (U)a) : a"),
    ("neg.T", _SIGNED, "U", "U", "0 - a"),
    ("popc.T", "b32 b64", "u32", "T", "__builtin_popcountll(a)"),
    ("clz.T", "b32 b64", "u32", "T", "leading_zeros(a)"),
    ("brev.T", "b32 b64", "T", "T", "reverse_bits(a)"),
    ("bfe.T", "s32 s64 u32 u64", "T", "T u32 u32", "extract_bits(a, b, c)"),
    ("bfi.T", "b32 b64", "T", "T T u32 u32", "insert_bits(a, b, c, d)"),
    ("and.T", _BITS, "T", "T T", "a & b"),
    ("or.T", _BITS, "T", "T T", "a | b"),
    ("xor.T", _BITS, "T", "T T", "a ^ b"),
    ("not.T", _BITS, "T", "T", "~a"),
    ("and.T", "pred", "T", "T T", "a & b & 1"),
    ("or.T", "pred", "T", "T T", "(a | b) & 1"),
    ("xor.T", "pred", "T", "T T", "(a ^ b) & 1"),
    ("not.T", "pred", "T", "T", "~a & 1"),
    ("shl.T", _BITS, "T", "T u32", "shift_left(a, b)"),
    ("shr.T", f"{_BITS} {_INTEGERS}", "T", "T u32", "shift_right(a, b)"),
    ("shf.l.wrap.T", "b32", "T", "T T u32", "funnel_left(a, b, c & 31)"),
    ("shf.l.clamp.T", "b32", "T", "T T u32", "funnel_left(a, b, c > 32 ? 32 : c)"),
    ("shf.r.wrap.T", "b32", "T", "T T u32", "funnel_right(a, b, c & 31)"),
    ("shf.r.clamp.T", "b32", "T", "T T u32", "funnel_right(a, b, c > 32 ? 32 : c)"),
    ("lop3.T", "b32", "T", "T T T T", "logic3(a, b, c, d)"),
    ("prmt.T", "b32", "T", "T T T", "permute_bytes(a, b, c)"),
    ("selp.T", f"{_BITS} {_INTEGERS} {_FLOATS}", "T", "T T pred", "c & 1 ? a : b"),
    ("add.T", _FLOATS, "T", "T T", "a + b"),
    ("sub.T", _FLOATS, "T", "T T", "a - b"),
    ("mul.T", _FLOATS, "T", "T T", "a * b"),
    ("fma.T", _FLOATS, "T", "T T T", "std::fma(a, b, c)"),
    ("neg.T", _FLOATS, "T", "T", "-a"),
    ("abs.T", _FLOATS, "T", "T", "std::fabs(a)"),
    ("min.T", _FLOATS, "T", "T T", "minimum(a, b)"),
    ("max.T", _FLOATS, "T", "T T", "maximum(a, b)"),
    ("min.NaN.T", "f32", "T", "T T", "a != a || b != b ? (T)NAN : minimum(a, b)"),
    ("max.NaN.T", "f32", "T", "T T", "a != a || b != b ? (T)NAN : maximum(a, b)"),
    ("copysign.T", _FLOATS, "T", "T T", "std::copysign(b, a)"),
    ("div.T", _FLOATS, "T", "T T", "a / b"),
    ("rcp.T", _FLOATS, "T", "T", "1 / a"),
    ("sqrt.T", _FLOATS, "T", "T", "std::sqrt(a)"),
    ("rsqrt.T", _FLOATS, "T", "T", "1 / std::sqrt(a)"),
    ("ex2.T", "f32", "T", "T", "std::exp2(a)"),
    ("lg2.T", "f32", "T", "T", "std::log2(a)"),
    ("sin.T", "f32", "T", "T", "std::sin(a)"),
    ("cos.T", "f32", "T", "T", "std::cos(a)"),
    ("tanh.T", "f32", "T", "T", "std::tanh(a)"),
    # Conversions: cvt.to.from.
    ("cvt.f32.T", _INTEGERS, "f32", "T", "(f32)a"),
    ("cvt.f64.T", _INTEGERS, "f64", "T", "(f64)a"),
    ("cvt.f64.T", "f32", "f64", "T", "(f64)a"),
    ("cvt.f32.T", "f64", "f32", "T", "(f32)a"),
    ("cvt.rzi.T.f32", _INTEGERS, "T", "f32", "to_integer<T>(std::trunc(a))"),
    ("cvt.rni.T.f32", _INTEGERS, "T", "f32", "to_integer<T>(std::nearbyint(a))"),
    ("cvt.rmi.T.f32", _INTEGERS, "T", "f32", "to_integer<T>(std::floor(a))"),
    ("cvt.rpi.T.f32", _INTEGERS, "T", "f32", "to_integer<T>(std::ceil(a))"),
    ("cvt.rzi.T.T", "f32", "T", "T", "std::trunc(a)"),
    ("cvt.rni.T.T", "f32", "T", "T", "std::nearbyint(a)"),
    ("cvt.rmi.T.T", "f32", "T", "T", "std::floor(a)"),
    ("cvt.rpi.T.T", "f32", "T", "T", "std::ceil(a)"),
    ("cvt.T.T", "f32", "T", "T", "a"),
    ("cvt.bf16.T", "f32", "u16", "T", "to_bf16(a)"),
    ("cvt.f16.T", "f32", "u16", "T", "to_f16(a)"),
    ("cvt.bf16x2.T", "f32", "u32", "T T", "(u32)to_bf16(a) << 16 | to_bf16(b)"),
    ("cvt.f16x2.T", "f32", "u32", "T T", "(u32)to_f16(a) << 16 | to_f16(b)"),
    ("cvt.T.bf16", "f32", "T", "u16", "from_bf16(a)"),
    ("cvt.T.f16", "f32", "T", "u16", "from_f16(a)"),
    ("cvt.rna.tf32.T", "f32", "T", "T", "round_to_tf32(a)"),
]
# Ordered comparisons are false where an operand is NaN, those with a u are true.
_COMPARISONS = {
    **{"eq": "A == B", "ne": "A < B || A > B", "lt": "A < B", "le": "A <= B", "gt": "A > B", "ge": "A >= B"},
    **{"equ": "!(A < B || A > B)", "neu": "!(A == B)", "ltu": "!(A >= B)", "leu": "!(A > B)"},
    **{"gtu": "!(A <= B)", "geu": "!(A < B)", "num": "A == A && B == B", "nan": "A != A || B != B"},
}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
# Of 16-bit floats: computed in float32, which is exact enough for one rounding to be right.
_HALF_ARITHMETIC = {
    "add": (2, "A + B"),
    "sub": (2, "A - B"),
    "mul": (2, "A * B"),
    "fma": (3, "fma_to_odd(A, B, C)"),
    "max": (2, "maximum(A, B)"),
    "min": (2, "minimum(A, B)"),
    "neg": (1, "-A"),
    "abs": (1, "std::fabs(A)"),
}


def _expand() -> dict[str, Elementwise]:
    table: dict[str, Elementwise] = {}

    def add(opcode: str, result: str, operands: list[str], expression: str) -> None:
        predicates = tuple(kind == "pred" for kind in operands)
        kinds = tuple(_C_TYPES.get(kind, kind) for kind in operands)
        table[opcode] = Elementwise(_C_TYPES.get(result, result), kinds, expression, result == "pred", predicates)

    for opcode, types, result, operands, expression in _ROWS:
        for kind in types.split():
            c, bits = _C_TYPES[kind], re.sub(r"\D", "", kind)
            names = {"T": kind, "U": f"u{bits}", "W": f"{c[0]}{2 * int(bits or 0)}"}
            c_names = names | {"T": c}
            add(
                re.sub(r"\bT\b", kind, opcode),
                names.get(result, result),
                [names.get(operand, operand) for operand in operands.split()],
                re.sub(r"\b[TUW]\b", lambda found, c_names=c_names: c_names[found.group()], expression),
            )
    whole = [f"{sign}{bits}" for sign in "su" for bits in (8, 16, 32, 64)]
    for target in whole:
        for source in whole:
            add(f"cvt.{target}.{source}", target, [source], f"({target})a")
    for name, expression in _COMPARISONS.items():
        for kind in [*_INTEGERS.split(), *_BITS.split(), *_FLOATS.split(), "f16", "bf16"]:
            integer = kind[0] in "sub" and kind != "bf16"
            if integer and (name not in ("eq", "ne", "lt", "le", "gt", "ge")):
                continue
            value = {"f16": "from_f16({})", "bf16": "from_bf16({})"}.get(kind, "{}")
            add(
                f"setp.{name}.{kind}", "pred", [kind, kind],
                expression.replace("A", value.format("a")).replace("B", value.format("b")),
            )  # fmt: skip
    for kind in ("f16", "bf16"):
        for name, (count, expression) in _HALF_ARITHMETIC.items():

            def half(shift: str, expression=expression, kind=kind) -> str:
                value = re.sub(r"[ABC]", lambda v: f"from_{kind}((u16)({v.group().lower()}{shift}))", expression)
                return f"to_{kind}({value})"

            add(f"{name}.{kind}", "u16", ["u16"] * count, half(""))
            add(f"{name}.{kind}x2", "u32", ["u32"] * count, f"(u32){half(' >> 16')} << 16 | {half('')}")
    return table


ELEMENTWISE = _expand()
_PRECISION = re.compile(r"\.(rn|approx|full)(?=\.)")


def canonical(opcode: str) -> tuple[str, bool]:
    """The opcode as `ELEMENTWISE` has it, and whether it flushes subnormal numbers to zero.

    mul.rn.ftz.f32 → mul.f32, True; setp.lo.u32 → setp.lt.u32, False.
    """
    words = _PRECISION.sub("", opcode.replace(".ftz", "")).split(".")
    if words[0] == "setp" and words[1] in _UNSIGNED_NAMES:
        words[1] = _UNSIGNED_NAMES[words[1]]
    return ".".join(words), ".ftz" in opcode


# The machine's other operations and their operands, which it gets as numbers in this order: places of registers
# (`machine/machine.cpp` reads them as structures made of this table), sizes in bytes, offsets, flags. The last may
# be several.
OPERATIONS = {
    "nothing": "",
    "branch": "target",
    "exit": "",
    "trap": "",
    "barrier": "",
    "warp_barrier": "",
    "load_global": "address offset element_bytes register_bytes is_signed *values",
    "store_global": "address offset element_bytes register_bytes *values",
    "load_shared": "address offset element_bytes register_bytes is_signed *values",
    "store_shared": "address offset element_bytes register_bytes *values",
    # `old` is -1 for red, which gives nothing back; `third` is cas's new value.
    "atomic": "is_shared address offset bytes function old value third",
    "copy_async": "target target_offset source source_offset bytes source_bytes",
    "commit_copies": "",
    "wait_copies": "groups_left",
    "load_matrices": "address offset transposed *values",
    "store_matrices": "address offset transposed *values",
    "mma": "type k d0 d1 d2 d3 *a_b_c",
    "wgmma": "type n k a_in_registers transpose_a transpose_b a0 a1 a2 a3 b accumulate negate_a negate_b *d",
    "fence_wgmma": "",
    "commit_wgmma": "",
    "wait_wgmma": "groups_left",
    "fence_proxy": "",
    "replace_tensor_map": "address offset field ordinal value value_bytes",
    "copy_tensor_map": "target target_offset source source_offset",
    "load_tile": "target target_offset map map_offset barrier barrier_offset *coordinates",
    "store_tile": "source source_offset map map_offset *coordinates",
    "commit_stores": "",
    "wait_stores": "groups_left",
    "init_mbarrier": "address offset arrivals",
    "end_mbarrier": "address offset",
    "expect_bytes": "address offset bytes",
    "wait_mbarrier": "result address offset parity",
    "shuffle": "result predicate value lane clamp mode",
    "vote": "result value mode",
    "elect": "result predicate",
    "reduce_warp": "result value function",
    "pack": "result part_bytes *parts",
    "unpack": "value part_bytes *parts",
}
# All lanes of a warp execute these together (.sync, .aligned).
_WHOLE_WARP = """barrier warp_barrier load_matrices store_matrices mma wgmma fence_wgmma commit_wgmma wait_wgmma
    commit_copies wait_copies shuffle vote elect reduce_warp"""
WHOLE_WARP = frozenset(_WHOLE_WARP.split())
MATRIX_TYPES = {"f16": 0, "bf16": 1, "tf32": 2}
# Of a tensor map, in the order of `machine/bulk.hpp`.
_TENSOR_MAP_FIELDS = """global_address rank box_dim global_dim global_stride element_stride elemtype
    interleave_layout swizzle_mode fill_mode"""
TENSOR_MAP_FIELDS = tuple(_TENSOR_MAP_FIELDS.split())
SHUFFLES = {"up": 0, "down": 1, "bfly": 2, "idx": 3}
VOTES = {"ballot": 0, "any": 1, "all": 2, "uni": 3}
# Functions of atom, red and redux, by name and type.
_FUNCTIONS = """add.u32 add.u64 add.f32 add.f64 min.u32 min.s32 min.u64 min.s64 max.u32 max.s32 max.u64 max.s64
    and.b32 or.b32 xor.b32 and.b64 or.b64 xor.b64 exch.b32 exch.b64 cas.b32 cas.b64 min.f32 max.f32"""
FUNCTIONS = {name: number for number, name in enumerate(_FUNCTIONS.split())}
