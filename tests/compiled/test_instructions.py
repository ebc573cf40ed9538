"""What instructions compute, against numpy and torch; what the machine does not know."""

import numpy as np
import pytest
import torch
from small_programs import program, run

from benchmarks.compiled import build
from benchmarks.compiled.ptx import UnsupportedError, parse
from benchmarks.compiled.semantics import ELEMENTWISE, OPERATIONS, canonical

pytestmark = pytest.mark.skipif(bool(build.needs()), reason=build.needs())

INTEGERS = np.array(
    [0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32
)
FLOATS = np.array(
    [0.0, -0.0, 1.0, -1.5, 3.25e-39, 1e-30, 2.5, 3.5, 65504.0, 1e10, -1e10, np.inf, -np.inf, np.nan, 0.1, 7.0],
    np.float32,
)


def lanes(values: np.ndarray, shift: int) -> np.ndarray:
    """Thirty-two of them, from another one each."""
    return np.resize(np.roll(values, shift), 32)


def execute(line: str, inputs: list[np.ndarray], result_bytes: int) -> np.ndarray:
    """One instruction whose operands a, b, c and result o are registers of the arrays' sizes."""
    kinds = {1: ("p", "u8"), 2: ("h", "b16"), 4: ("r", "b32"), 8: ("d", "b64")}
    body = ["cvt.u64.u32 %d20, %r0;"]
    for number, (letter, array) in enumerate(zip("abc", inputs)):
        stem, kind = kinds[array.itemsize]
        register = f"%{stem}{10 + number}"
        body += [f"mad.wide.u32 %d21, %r0, {array.itemsize}, %d{number};", f"ld.global.{kind} {register}, [%d21];"]
        line = line.replace(f"${letter}", register)
    stem, kind = kinds[result_bytes]
    register = f"%{stem}15"
    body += [line.replace("$o", register) + ";"]
    if result_bytes == 1:
        body += [f"selp.b16 %h15, 1, 0, {register};"]
        register, kind, result_bytes = "%h15", "b16", 2
    body += [f"mad.wide.u32 %d21, %r0, {result_bytes}, %d{len(inputs)};", f"st.global.{kind} [%d21], {register};"]
    out = torch.zeros(32 * result_bytes, dtype=torch.uint8)
    tensors = [torch.from_numpy(array.view(np.uint8).copy()) for array in inputs]
    run("\n".join(body), *tensors, out)
    return out.numpy()


def s32(x):
    return x.view(np.int32)


def u64(x):
    return x.astype(np.uint64)


def bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy()


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


A, B, C = (lanes(INTEGERS, shift) for shift in (0, 5, 11))
SMALL = C % 40
FA, FB, FC = (lanes(FLOATS, shift) for shift in (0, 3, 7))
HALVES = bf16(FA), bf16(FB)


def packed(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def funnel(low, high, n, left: bool) -> np.ndarray:
    both = u64(high) << np.uint64(32) | u64(low)
    return ((both << u64(n)) >> np.uint64(32) if left else both >> u64(n)).astype(np.uint32)


def to_integers(x: np.ndarray) -> np.ndarray:
    """Towards zero; out of range the nearest, NaN zero."""
    return np.clip(np.nan_to_num(np.trunc(x.astype("f8"))), -(2**31), 2**31 - 1).astype("i8").astype("i4")


def tf32(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), (x.view("u4") + 0x1000 & 0xFFFFE000).view("f4"), x)


def bits(x: np.ndarray, start: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.array(
        [a >> s & (1 << n) - 1 for a, s, n in zip(x.tolist(), start.tolist(), count.tolist())], np.uint32
    )


np.seterr(all="ignore")  # of the expected values of this module
HALVES_SUM = bf16(from_bf16(HALVES[0]) + from_bf16(HALVES[1]))
INSTRUCTIONS = {
    "add.s32 $o, $a, $b": ([A, B], A + B),
    "sub.s32 $o, $a, $b": ([A, B], A - B),
    "mul.lo.s32 $o, $a, $b": ([A, B], A * B),
    "mul.hi.u32 $o, $a, $b": ([A, B], (u64(A) * u64(B) >> np.uint64(32)).astype(np.uint32)),
    "mul.wide.u32 $o, $a, $b": ([A, B], u64(A) * u64(B)),
    "mul.wide.s32 $o, $a, $b": ([A, B], s32(A).astype(np.int64) * s32(B).astype(np.int64)),
    "mad.wide.s32 $o, $a, -3, 5": ([A], s32(A).astype(np.int64) * -3 + 5),
    "mad.lo.s32 $o, $a, $b, $c": ([A, B, C], A * B + C),
    "div.s32 $o, $a, $b": ([A, B | 1], (s32(A) / s32(B | 1)).astype(np.int64).astype(np.int32)),
    "rem.u32 $o, $a, $b": ([A, B | 1], A % (B | 1)),
    "min.s32 $o, $a, $b": ([A, B], np.minimum(s32(A), s32(B))),
    "max.u32 $o, $a, $b": ([A, B], np.maximum(A, B)),
    "neg.s32 $o, $a": ([A], 0 - A),
    "and.b32 $o, $a, 0xFF": ([A], A & 255),
    "xor.b32 $o, $a, -1": ([A], ~A),
    "lop3.b32 $o, $a, $b, $c, 0xE8": ([A, B, C], A & B | A & C | B & C),
    "prmt.b32 $o, $a, $b, 0x7610": ([A, B], A & 0xFFFF | B & 0xFFFF0000),
    "shl.b32 $o, $a, $b": ([A, SMALL], np.where(SMALL > 31, 0, A << SMALL % 32)),
    "shr.s32 $o, $a, $b": ([A, SMALL], s32(A) >> np.minimum(SMALL, 31).astype(np.int32)),
    "shf.l.wrap.b32 $o, $a, $b, $c": ([A, B, SMALL], funnel(A, B, SMALL % 32, True)),
    "shf.r.clamp.b32 $o, $a, $b, $c": ([A, B, SMALL], funnel(A, B, np.minimum(SMALL, 32), False)),
    "bfe.u32 $o, $a, 3, $c": ([A, B, C % 20], bits(A, A * 0 + 3, C % 20)),
    "bfe.s32 $o, $a, 4, 8": ([A], s32(A << 20) >> 24),
    "bfi.b32 $o, $a, $b, 8, 4": ([A, B], B & ~np.uint32(0xF00) | A << 8 & 0xF00),
    "popc.b32 $o, $a": ([A], np.array([bin(a).count("1") for a in A.tolist()], np.uint32)),
    "clz.b32 $o, $a": ([A], np.array([32 - a.bit_length() for a in A.tolist()], np.uint32)),
    "brev.b32 $o, $a": ([A], np.array([int(f"{a:032b}"[::-1], 2) for a in A.tolist()], np.uint32)),
    "setp.lt.s32 $o, $a, $b": ([A, B], s32(A) < s32(B)),
    "setp.hi.u32 $o, $a, $b": ([A, B], A > B),
    "setp.ne.f32 $o, $a, $b": ([FA, FB], (FA < FB) | (FA > FB)),
    "setp.neu.f32 $o, $a, $b": ([FA, FB], FA != FB),
    "setp.nan.f32 $o, $a, $b": ([FA, FB], np.isnan(FA) | np.isnan(FB)),
    "add.rn.f32 $o, $a, $b": ([FA, FB], FA + FB),
    "mul.ftz.f32 $o, $a, 0f40000000": ([FA], np.where(abs(FA) < 1e-37, np.copysign(0, FA), FA) * np.float32(2)),
    "fma.rn.f32 $o, $a, $b, $c": ([FA, FB, FC], (FA.astype("f8") * FB + FC).astype("f4")),
    "max.f32 $o, $a, $b": ([FA, FB], np.fmax(FA, FB)),
    "min.NaN.f32 $o, $a, $b": ([FA, FB], np.minimum(FA, FB)),
    "div.full.f32 $o, $a, $b": ([FA, FB], FA / FB),
    "ex2.approx.ftz.f32 $o, $a": ([FA / 10], np.exp2(np.where(abs(FA) < 1e-37, 0, FA / 10))),
    "cvt.rn.bf16.f32 $o, $a": ([FA], bf16(FA)),
    "cvt.rn.bf16x2.f32 $o, $a, $b": ([FA, FB], packed(bf16(FB), bf16(FA))),
    "cvt.rn.f16.f32 $o, $a": ([FA], FA.astype(np.float16).view(np.uint16)),
    "cvt.f32.bf16 $o, $a": ([HALVES[0]], from_bf16(HALVES[0])),
    "cvt.rzi.s32.f32 $o, $a": ([FA], to_integers(FA)),
    "cvt.rn.f32.s32 $o, $a": ([A], s32(A).astype(np.float32)),
    "cvt.s64.s32 $o, $a": ([A], s32(A).astype(np.int64)),
    "cvt.u32.u64 $o, $a": ([u64(A) << np.uint64(7)], A << 7),
    "cvt.u16.u32 $o, $a": ([A], A.astype(np.uint16)),
    "cvt.rna.tf32.f32 $o, $a": ([FA], tf32(FA)),
    "add.bf16x2 $o, $a, $b": ([packed(*HALVES), packed(*HALVES[::-1])], packed(HALVES_SUM, HALVES_SUM)),
}  # fmt: skip
np.seterr(all="warn")


@pytest.mark.parametrize("line", INSTRUCTIONS)
def test_an_instruction(line):
    inputs, expected = INSTRUCTIONS[line]
    is_predicate = expected.dtype == bool
    result = execute(line, inputs, 1 if is_predicate else expected.itemsize)
    if is_predicate:
        assert (result.view(np.uint16) == expected).all()
    elif expected.dtype == np.float32:
        tolerance = 3e-7 if "ex2" in line else 0
        np.testing.assert_allclose(result.view(np.float32), expected, rtol=tolerance)
    elif "f16" in line and "cvt.f32" not in line:  # one pattern of NaN
        nan = {"cvt.rn.f16.f32": np.float16}.get(line.partition(" ")[0])
        decode = (lambda x: x.view(nan).astype("f4")) if nan else (lambda x: from_bf16(x.view(np.uint16)))
        np.testing.assert_array_equal(decode(result), decode(np.ascontiguousarray(expected).view(np.uint8)))
    else:
        np.testing.assert_array_equal(result, np.ascontiguousarray(expected).view(np.uint8))


def test_divisions_by_zero_and_overflows_do_not_end_the_process():
    zeros = A * 0
    execute("div.s32 $o, $a, $b", [A, zeros], 4)
    execute("rem.s32 $o, $a, $b", [A, zeros], 4)
    least = np.full(32, 2**31, np.uint32)
    assert (execute("div.s32 $o, $a, -1", [least], 4).view(np.uint32) == least).all()


def test_a_fused_multiply_add_of_16_bits_rounds_once():
    """1.26953125 + 2⁻³⁰: so close above the middle of two bfloat16 numbers that float32 has the middle itself,
    from where the even one, 1.265625, would be taken."""
    a, b, c = (bf16(np.full(32, value, np.float32)) for value in (1.625, 0.78125, 2.0**-30))
    result = execute("fma.rn.bf16 $o, $a, $b, $c", [a, b, c], 2).view(np.uint16)
    assert (from_bf16(result) == 1.2734375).all()


def test_comparisons_combine_with_a_predicate():
    body = """
        setp.lt.u32 %p1, %r1, 20;
        setp.gt.and.u32 %p2, %r1, 9, %p1;
        selp.b32 %r10, 1, 0, %p2;
        mad.wide.u32 %d5, %r1, 4, %d0;
        st.global.b32 [%d5], %r10;"""
    out = torch.zeros(32, dtype=torch.int32)
    run(body, out)
    assert out.nonzero().flatten().tolist() == list(range(10, 20))


def test_lanes_part_and_meet_again():
    """Lanes 0 to 9 and the others add different numbers, a different number of times."""
    body = """
        mov.b32 %r10, 0;
        setp.lt.u32 %p1, %r1, 10;
        @%p1 bra $FEW;
        mov.b32 %r11, %r1;
    $LOOP:
        add.s32 %r10, %r10, 1;
        add.s32 %r11, %r11, -1;
        setp.ne.s32 %p2, %r11, 0;
        @%p2 bra $LOOP;
        bra.uni $END;
    $FEW:
        add.s32 %r10, %r10, 100;
    $END:
        mad.wide.u32 %d5, %r1, 4, %d0;
        st.global.b32 [%d5], %r10;"""
    out = torch.zeros(32, dtype=torch.int32)
    run(body, out)
    assert out.tolist() == [100] * 10 + list(range(10, 32))


def test_shuffles_votes_and_reductions_of_a_warp():
    body = """
        shfl.sync.bfly.b32 %r10, %r1, 5, 31, -1;
        shfl.sync.up.b32 %r11|%p1, %r1, 1, 0, -1;
        setp.gt.u32 %p2, %r1, 29;
        vote.sync.ballot.b32 %r12, %p2, -1;
        redux.sync.max.s32 %r13, %r1, -1;
        mad.wide.u32 %d5, %r1, 16, %d0;
        st.global.v4.b32 [%d5], {%r10, %r11, %r12, %r13};"""
    out = torch.zeros(32, 4, dtype=torch.int32)
    run(body, out)
    lane = torch.arange(32)
    assert (out[:, 0] == lane ^ 5).all()
    assert out[:, 1].tolist() == [0, *range(31)]
    assert (out[:, 2] == torch.tensor(0xC0000000 - 2**32)).all()
    assert (out[:, 3] == 31).all()


def test_atomics_add_up_whatever_the_order():
    body = """
        atom.global.add.u32 %r10, [%d0], 1;
        red.global.max.s32 [%d0+4], %r1;
        atom.global.cas.b32 %r11, [%d0+8], 0, 7;"""
    out = torch.zeros(3, dtype=torch.int32)
    assert not run(body, out, programs=3, threads=64).findings
    assert out.tolist() == [192, 31, 7]


def test_every_opcode_is_in_the_machine_once():
    assert len(build.NUMBERS) == len(build.VARIANTS) + len(OPERATIONS)
    assert all(canonical(opcode) == (opcode, False) for opcode in ELEMENTWISE)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("frobnicate.b32 %r10, %r1;", "does not know frobnicate.b32"),
        ("add.s32 %r10, %d1, 1;", "%d1 has 8 bytes, not 4"),
        ("add.s32 %r10, %q1, 1;", "unknown register %q1"),
        ("bar.sync 1, 64;", "a barrier of some of the warps"),
        ("bar.warp.sync 1;", "only some lanes, or who knows which: 1"),
        ("shfl.sync.bfly.b32 %r10, %r1, 1, 31, 3;", "only some lanes, or who knows which: 3"),
        ("vote.sync.any.pred %p1, %p2, %r1;", "only some lanes, or who knows which: %r1"),
        ("mul.ftz.f16x2 %r10, %r1, %r2;", "does not know mul.ftz.f16x2"),
        ("bra $NOWHERE;", "no label $NOWHERE"),
        ("st.global.v2.b32 [%d1], {%r1, %d2};", "a vector of registers of several sizes"),
        ("add.s32 %r10, %r1;", "2 operands instead of 3"),
        ("ld.local.b32 %r10, [%d1];", "memory of local"),
        ("cp.async.bulk.tensor.2d.shared::cluster.global.tile [%r1], [%d1, {%r2, %r3}], [%r4];", "cp.async.bulk"),
    ],
)
def test_what_the_machine_does_not_know_is_named(body, reason):
    with pytest.raises(UnsupportedError, match=r"line \d+ of small's PTX") as error:
        program(body, 0)
    assert reason in str(error.value)


def test_a_text_without_a_kernel():
    with pytest.raises(UnsupportedError, match=r"no \.entry"):
        parse(".version 8.7")


def test_lanes_that_went_far_ahead_come_back_to_a_barrier():
    """A rare path that the compiler put behind the end: the others wait at the barrier, not for ever."""
    body = """
        setp.eq.u32 %p1, %r1, 3;
        mov.b32 %r10, 1;
        @%p1 bra $RARE;
    $BACK:
        bar.sync 0;
        mad.wide.u32 %d5, %r0, 4, %d0;
        st.global.b32 [%d5], %r10;
        ret;
    $RARE:
        mov.b32 %r10, 2;
        bra.uni $BACK;"""
    out = torch.zeros(64, dtype=torch.int32)
    run(body, out, threads=64)
    assert out.tolist() == [2 if i % 32 == 3 else 1 for i in range(64)]
