"""The machine finds what is wrong with a program, and nothing in a right one: each fault by PTX of a few lines."""

import pytest
import torch
from small_programs import kinds, program, run

from benchmarks.compiled import build
from benchmarks.compiled.program import KINDS, FaultError, Schedule

pytestmark = pytest.mark.skipif(bool(build.needs()), reason=build.needs())
(
    READ_AFTER_WRITE,
    WRITE_AFTER_READ,
    WRITE_AFTER_WRITE,
    LANES_COLLIDE,
    PROGRAMS_COLLIDE,
    NEVER_WRITTEN,
    COPY_PENDING,
    OPERAND_OVERWRITTEN,
    NO_PROXY_FENCE,
    A_REGISTERS_CHANGED,
    ACCUMULATOR_TOUCHED,
    NO_WGMMA_FENCE,
    PENDING_AT_EXIT,
) = KINDS

# Each thread has 4 bytes of shared memory at %r11; %r12 is its neighbour's place, in the next warp %r13's.
PLACES = """
    mov.u32 %r10, global_smem;
    mad.lo.s32 %r11, %r0, 4, %r10;
    xor.b32 %r20, %r0, 1;
    mad.lo.s32 %r12, %r20, 4, %r10;
    xor.b32 %r21, %r0, 32;
    mad.lo.s32 %r13, %r21, 4, %r10;
"""


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)


# Global memory: bounds.


def load_each(byte: int, size: int = 4) -> str:
    """Every lane loads at p0 + 4·lane + byte."""
    return f"mad.wide.u32 %d5, %r0, 4, %d0;\nld.global.b{8 * size} %{'d' if size == 8 else 'r'}10, [%d5+{byte}];"


def test_loads_inside_an_argument():
    assert not run(load_each(0), numbers(32)).findings


@pytest.mark.parametrize("byte", [4, -4, 4000])
def test_a_load_outside_of_an_argument(byte):
    with pytest.raises(
        FaultError, match=r"out of bounds: 4 bytes at byte .* of argument 0.*line \d+ of small's PTX, 'ld"
    ):
        run(load_each(byte), numbers(32))


def test_a_load_through_another_view_of_the_same_storage():
    """Keys read through the queries of a packed projection: other memory of the same tensor."""
    q, k, _ = numbers(4, 3, 8).unbind(1)
    row = """
        and.b32 %r10, %r1, 7;
        shr.u32 %r11, %r1, 3;
        mad.lo.s32 %r10, %r11, 24, %r10;
        mad.wide.u32 %d5, %r10, 4, %d0;"""
    assert not run(f"{row} ld.global.b32 %r12, [%d5];", q, k).findings
    with pytest.raises(FaultError, match=r"argument 0, which has bytes 0 to 320 with gaps"):
        run(f"{row} ld.global.b32 %r12, [%d5+32];", q, k)


def test_a_misaligned_load():
    with pytest.raises(FaultError, match="misaligned: 8 bytes at byte 4 of argument 0"):
        run(load_each(0, 8), numbers(64))


def test_an_address_of_no_argument():
    with pytest.raises(FaultError, match="belongs to no argument"):
        run("mov.b64 %d5, 64; ld.global.b32 %r10, [%d5];", numbers(1))


def test_lanes_that_a_guard_leaves_out_may_point_anywhere():
    assert not run(f"setp.lt.u32 %p1, %r0, 4; {load_each(0).replace('ld.', '@%p1 ld.')}", numbers(4)).findings


def test_a_view_that_repeats_elements_has_no_others():
    view = numbers(4)[::3].expand(2, 2)
    assert not run("ld.global.b32 %r10, [%d0+12];", view).findings
    with pytest.raises(FaultError, match="with gaps"):
        run("ld.global.b32 %r10, [%d0+4];", view)


def test_a_view_without_elements():
    with pytest.raises(FaultError, match="argument 0, which has bytes 0 to 0"):
        run("ld.global.b32 %r10, [%d0];", numbers(4)[2:2])


# Global memory: races.


def test_two_programs_write_one_place():
    assert kinds(run("st.global.b32 [%d0], 7;", numbers(1), programs=2)) == [PROGRAMS_COLLIDE]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_program_reads_what_another_writes(backwards):
    """Whichever comes first."""
    body = """
        mov.u32 %r10, %ctaid.x;
        setp.eq.s32 %p1, %r10, 0;
        @%p1 ld.global.b32 %r11, [%d0];
        @!%p1 st.global.b32 [%d0], %r10;"""
    assert kinds(run(body, numbers(1), programs=2, schedule=Schedule(backwards=backwards))) == [PROGRAMS_COLLIDE]


def test_programs_that_share_a_storage_but_no_byte():
    body = "mov.u32 %r10, %ctaid.x; mad.wide.u32 %d5, %r10, 2, %d0; mov.b16 %h1, 3; st.global.b16 [%d5], %h1;"
    assert not run(body, torch.zeros(2, dtype=torch.int16), programs=2).findings


def test_programs_that_share_elements_but_no_byte():
    body = """
        mov.u32 %r10, %ctaid.x;
        cvt.u64.u32 %d5, %r10;
        add.s64 %d5, %d5, %d1;
        mov.b16 %h1, 3;
        st.global.b8 [%d5], %h1;"""
    wide = torch.zeros(1, dtype=torch.int16)
    assert not run(body, wide, wide.view(torch.uint8), programs=2).findings


def test_an_atomic_races_with_what_is_none():
    body = """
        mov.u32 %r10, %ctaid.x;
        setp.eq.s32 %p1, %r10, 0;
        @%p1 st.global.b32 [%d0], %r10;
        @!%p1 red.global.add.u32 [%d0], 1;"""
    assert kinds(run(body, numbers(1), programs=2)) == [PROGRAMS_COLLIDE]
    assert kinds(run(body, numbers(1), programs=2, schedule=Schedule(backwards=True))) == [PROGRAMS_COLLIDE]


def test_two_warps_write_one_place():
    assert kinds(run("st.global.b32 [%d0], %r2;", numbers(1), threads=64)) == [WRITE_AFTER_WRITE]


def test_the_same_value_may_be_written_twice():
    assert not run("st.global.b32 [%d0], 5;", numbers(1), threads=64).findings


def test_two_lanes_write_different_values_to_one_place():
    assert kinds(run("st.global.b32 [%d0], %r1;", numbers(1))) == [LANES_COLLIDE]


def test_a_barrier_orders_warps_in_global_memory():
    body = f"""{PLACES}
        mad.wide.u32 %d5, %r0, 4, %d0;
        mad.wide.u32 %d6, %r21, 4, %d0;
        st.global.b32 [%d5], %r0;
        BARRIER
        ld.global.b32 %r30, [%d6];"""
    assert not run(body.replace("BARRIER", "bar.sync 0;"), numbers(64), threads=64).findings
    races = kinds(run(body.replace("BARRIER", ""), numbers(64), threads=64))
    assert races in (
        [READ_AFTER_WRITE],
        [WRITE_AFTER_READ, READ_AFTER_WRITE],
        [READ_AFTER_WRITE, WRITE_AFTER_READ],
    )


# Shared memory.


def exchange(place: str, between: str) -> str:
    """Each thread writes its number into its place and reads `place`."""
    return f"""{PLACES}
        st.shared.b32 [%r11], %r0;
        {between}
        ld.shared.b32 %r30, [{place}];
        mad.wide.u32 %d5, %r0, 4, %d0;
        st.global.b32 [%d5], %r30;"""


def test_a_barrier_shows_what_another_warp_wrote():
    out = numbers(64)
    assert not run(exchange("%r13", "bar.sync 0;"), out, threads=64, shared=256).findings
    assert out.tolist() == [i ^ 32 for i in range(64)]


def test_without_a_barrier():
    assert READ_AFTER_WRITE in kinds(run(exchange("%r13", ""), numbers(64), threads=64, shared=256))


def test_lanes_of_a_warp_need_a_barrier_too():
    assert kinds(run(exchange("%r12", ""), numbers(32), shared=128)) == [READ_AFTER_WRITE]
    out = numbers(32)
    assert not run(exchange("%r12", "bar.warp.sync -1;"), out, shared=128).findings
    assert out.tolist() == [i ^ 1 for i in range(32)]


def test_a_write_over_what_another_warp_still_reads():
    body = exchange("%r13", "bar.sync 0;") + "{} st.shared.b32 [%r11], 0;"
    assert WRITE_AFTER_READ in kinds(run(body.format(""), numbers(64), threads=64, shared=256))
    assert not run(body.format("bar.sync 0;"), numbers(64), threads=64, shared=256).findings


def test_shared_memory_that_nobody_wrote():
    body = f"{PLACES} ld.shared.b32 %r30, [%r11];"
    assert kinds(run(body, shared=128)) == [NEVER_WRITTEN]
    # Nor what an earlier program left there.
    assert kinds(run(f"{body} st.shared.b32 [%r11], 1;", shared=128, programs=2)) == [NEVER_WRITTEN]


@pytest.mark.parametrize("shared", [124, 0])
def test_beyond_the_shared_memory(shared):
    with pytest.raises(
        FaultError, match=rf"out of bounds: 4 bytes at byte {shared} of {shared} bytes of shared memory"
    ):
        run(f"{PLACES} st.shared.b32 [%r11], 1;", shared=shared)


def test_misaligned_shared_memory():
    with pytest.raises(FaultError, match="misaligned: 16 bytes at byte 4 of shared memory"):
        run(f"{PLACES} st.shared.v4.b32 [%r11], {{%r0, %r0, %r0, %r0}};", shared=256)


def test_a_barrier_that_some_warps_never_reach():
    with pytest.raises(
        FaultError, match=r"1 of 2 warps of program 0 never reach this barrier: line \d+ .*bar.sync"
    ):
        run("setp.eq.s32 %p1, %r2, 0; @%p1 bra $END; bar.sync 0; $END:", threads=64)


def test_lanes_of_a_warp_at_different_barriers():
    body = """
        setp.lt.s32 %p1, %r1, 5;
        @%p1 bra $OTHER;
        bar.sync 0;
        bra.uni $END;
    $OTHER:
        bar.sync 0;
    $END:"""
    with pytest.raises(FaultError, match="a warp-wide instruction in a divergent warp: lanes"):
        run(body)


def test_a_barrier_that_a_guard_keeps_lanes_from():
    with pytest.raises(FaultError, match="a warp-wide instruction for some lanes: 0000001f of ffffffff"):
        run("setp.lt.s32 %p1, %r1, 5; @%p1 bar.sync 0;")


def test_a_program_that_does_not_end():
    with pytest.raises(FaultError, match=r"program 0 does not end within 200 million instructions.*bra"):
        run("$AGAIN: bra.uni $AGAIN;")


@pytest.mark.parametrize("threads", [48, 2048])
def test_programs_are_of_whole_warps(threads):
    with pytest.raises(ValueError, match=f"threads is {threads}; it must be a multiple of 32, from 32 to 1024"):
        run("mov.b32 %r10, 1;", threads=threads)


def test_arguments_elsewhere():
    with pytest.raises(TypeError, match="an argument is on meta; the machine runs on the memory of CPU tensors"):
        run("mov.b32 %r10, 1;", torch.empty(2, device="meta"))


def test_a_program_beyond_the_grid():
    with pytest.raises(ValueError, match=r"programs is \[5\]; they must be from 0 to 0"):
        program("mov.b32 %r10, 1;", 0).run((1,), [], 0, programs=[5])


def test_a_fault_names_its_instruction_among_those_of_a_line():
    with pytest.raises(FaultError, match=r"'ld\.global\.b32 %r10, \[%d0\+400\]'"):
        run("ld.global.b32 %r10, [%d0+400]; mov.b32 %r12, 0;", numbers(1))


def test_a_finding_in_words():
    (finding,) = run(f"{PLACES} ld.shared.b32 %r30, [%r11+4];", shared=256).findings
    first = "first at byte 4 of shared memory by warp 0 of program 0: line "
    assert str(finding).startswith(f"reads shared memory that nobody wrote, 64 times, {first}")
    (finding,) = run("st.global.b32 [%d0], 7;", numbers(1), programs=2).findings
    assert "at byte 0 of argument 0 by warp 0 of program 1" in str(finding)


def test_a_fault_names_the_line_of_the_source():
    body = f".loc 1 12 8 // kernels.py:12:8\n{load_each(4)}"
    with pytest.raises(FaultError, match=r"from kernels\.py:12:8$"):
        run(body, numbers(32))


# Asynchronous copies.


def copies(after: str = "cp.async.wait_group 0; bar.sync 0;", source_bytes: str = "4", place: str = "%r13") -> str:
    return f"""{PLACES}
        mad.wide.u32 %d5, %r0, 4, %d0;
        mad.wide.u32 %d6, %r0, 4, %d1;
        mov.b32 %r40, {source_bytes};
        cp.async.ca.shared.global [%r11], [%d5], 4, %r40;
        cp.async.commit_group;
        {after}
        ld.shared.b32 %r30, [{place}];
        st.global.b32 [%d6], %r30;"""


@pytest.mark.parametrize("adverse", [False, True])
def test_a_copy_that_is_waited_for(adverse):
    out = numbers(64) * 0
    assert not run(copies(), numbers(64), out, threads=64, shared=256, schedule=Schedule(adverse=adverse)).findings
    assert out.tolist() == [i ^ 32 for i in range(64)]


def test_a_copy_fills_up_with_zeros():
    out = numbers(32)
    run(copies(source_bytes="2", place="%r11"), numbers(32) + 0x10000, out, shared=128)
    assert out.tolist() == list(range(32))


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("bar.sync 0;", COPY_PENDING),  # no wait
        ("cp.async.wait_group 1; bar.sync 0;", COPY_PENDING),  # a wait for older groups only
        ("cp.async.wait_group 0;", READ_AFTER_WRITE),  # no barrier
        ("st.shared.b32 [%r11], 0; cp.async.wait_group 0; bar.sync 0;", COPY_PENDING),  # written meanwhile
    ],
)
def test_a_copy_that_is_read_too_early(after, expected):
    assert expected in kinds(run(copies(after), numbers(64), numbers(64), threads=64, shared=256))


def test_a_copy_over_one_that_is_on_its_way():
    """Waited for as if the first were enough."""
    again = """
        cp.async.ca.shared.global [%r11], [%d6], 4;
        cp.async.commit_group;
        cp.async.wait_group 1;"""
    assert COPY_PENDING in kinds(run(copies(again, place="%r11"), numbers(32), numbers(32), shared=128))


def test_copies_of_a_lane_that_others_do_not_wait_for():
    body = copies("setp.eq.u32 %p1, %r1, 0; @%p1 cp.async.wait_group 0; bar.sync 0;")
    with pytest.raises(FaultError, match="a warp-wide instruction for some lanes"):
        run(body, numbers(32), numbers(32), shared=128)


def test_a_copy_that_is_pending_at_the_end():
    body = copies("mov.b32 %r50, 0;").partition("ld.shared")[0]
    assert kinds(run(body, numbers(32), numbers(32), shared=128)) == [PENDING_AT_EXIT]


# Matrix products in flight: 64 × 8 += A (registers) × B (16 × 8, in shared memory, no swizzle).

ONES = "0x3F803F80"  # two bfloat16
PRODUCT = """
    mov.u32 %r10, global_smem;
    mad.lo.s32 %r11, %r0, 4, %r10;
    setp.lt.u32 %p1, %r0, 64;
    mov.b32 %r40, ONES;
    @%p1 st.shared.b32 [%r11], %r40;
    FENCE_PROXY
    bar.sync 0;
    mov.b32 %r50, 0; mov.b32 %r51, 0; mov.b32 %r52, 0; mov.b32 %r53, 0;
    mov.b32 %r60, ONES; mov.b32 %r61, ONES; mov.b32 %r62, ONES; mov.b32 %r63, ONES;
    shr.u32 %r12, %r10, 4;
    cvt.u64.u32 %d10, %r12;
    or.b64 %d10, %d10, 0x80000;
    or.b64 %d10, %d10, 0x800000000000;
    FENCE
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {%r50, %r51, %r52, %r53}, {%r60, %r61, %r62, %r63}, %d10, 1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    MEANWHILE
    WAIT
    AFTER
    mad.wide.u32 %d5, %r0, 16, %d0;
    st.global.v4.b32 [%d5], {%r50, %r51, %r52, %r53};
""".replace("ONES", ONES)  # fmt: skip


FENCE = "wgmma.fence.sync.aligned;"
AGAIN = """
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {%r50, %r51, %r52, %r53}, {%r60, %r61, %r62, %r63}, %d10, 1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
"""
SWAPPED = AGAIN.replace("{%r50, %r51,", "{%r51, %r50,")


def product(fence_proxy="fence.proxy.async.shared::cta;", fence=FENCE,
            wait="wgmma.wait_group.sync.aligned 0;", meanwhile="", after="", adverse=False):  # fmt: skip
    parts = {"FENCE_PROXY": fence_proxy, "FENCE": fence, "WAIT": wait, "MEANWHILE": meanwhile, "AFTER": after}
    body = PRODUCT
    for name, text in parts.items():
        body = body.replace(name, text)
    out = torch.zeros(128, 4)
    return run(body, out, threads=128, shared=256, schedule=Schedule(adverse=adverse)), out


@pytest.mark.parametrize("adverse", [False, True])
def test_a_product_that_is_waited_for(adverse):
    result, out = product(adverse=adverse)
    assert not result.findings
    assert (out == 16).all()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fence_proxy": ""}, NO_PROXY_FENCE),
        ({"fence": ""}, NO_WGMMA_FENCE),
        ({"fence": f"{FENCE} wgmma.wait_group.sync.aligned 0; add.s32 %r60, %r60, 0;"}, NO_WGMMA_FENCE),
        ({"fence": f"{FENCE} wgmma.wait_group.sync.aligned 0; mov.b32 %r50, 0;"}, NO_WGMMA_FENCE),
        ({"meanwhile": f"add.s32 %r60, %r60, 0; {AGAIN}"}, NO_WGMMA_FENCE),
        ({"meanwhile": SWAPPED}, ACCUMULATOR_TOUCHED),
        ({"wait": ""}, ACCUMULATOR_TOUCHED),
        ({"wait": "wgmma.wait_group.sync.aligned 1;"}, ACCUMULATOR_TOUCHED),
        ({"meanwhile": "mov.b32 %r70, %r50;"}, ACCUMULATOR_TOUCHED),
        ({"meanwhile": "mov.b32 %r60, 0;"}, A_REGISTERS_CHANGED),
        ({"meanwhile": "bar.sync 0; @%p1 st.shared.b32 [%r11], 0;"}, OPERAND_OVERWRITTEN),
        # Waited for by this warp, but not by the others: triton issue 11047.
        ({"after": "@%p1 st.shared.b32 [%r11], 0;"}, WRITE_AFTER_READ),
    ],
    ids=str,
)
def test_a_product_in_flight(change, expected):
    assert expected in kinds(product(**change)[0])


@pytest.mark.parametrize("sunk", ["add.s32 %r60, %r60, 0;", "mov.b32 %r50, 0;"])
def test_what_sinks_below_a_fence_is_put_above_it_by_ptxas(sunk):
    result, out = product(fence=f"{FENCE} {sunk}")
    assert not result.findings
    assert (out == 16).all()


def test_products_on_the_same_accumulators_need_no_other_fence():
    for change in ({"meanwhile": AGAIN}, {"after": f"{AGAIN} wgmma.wait_group.sync.aligned 0;"}):
        result, out = product(**change)
        assert not result.findings
        assert (out == 32).all()


def test_a_product_that_one_warp_leaves_out():
    with pytest.raises(FaultError, match="warps of a warpgroup issue different numbers of products"):
        product(fence="wgmma.fence.sync.aligned; setp.eq.u32 %p2, %r2, 3; @%p2 bra $END;", after="$END:")


def test_a_product_reads_its_operands_late():
    """Overwritten before the wait, they show in the result of one schedule, and not in the other's."""
    change = {"meanwhile": "bar.sync 0; mov.b32 %r41, 0; @%p1 st.shared.b32 [%r11], %r41; bar.sync 0;"}
    assert (product(**change)[1] == 16).all()
    assert (product(**change, adverse=True)[1] == 0).all()


# Mbarriers.


def test_an_mbarrier_is_there_for_others_after_a_barrier():
    body = """
        mov.u32 %r10, global_smem;
        setp.eq.u32 %p1, %r0, 0;
        setp.eq.u32 %p2, %r0, 32;
        @%p1 mbarrier.init.shared::cta.b64 [%r10], 1;
        BETWEEN
        @%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 0;"""
    assert not run(body.replace("BETWEEN", "bar.sync 0;"), threads=64, shared=16).findings
    assert READ_AFTER_WRITE in kinds(run(body.replace("BETWEEN", ""), threads=64, shared=16))


# What is counted.


def test_sectors_and_wavefronts_are_counted():
    def counts(shared_stride: int, global_stride: int) -> list[tuple[int, ...]]:
        body = f"""
            mov.u32 %r10, global_smem;
            mad.lo.s32 %r14, %r0, {shared_stride}, %r10;
            st.shared.b32 [%r14], 1;
            mad.wide.u32 %d5, %r0, {global_stride}, %d0;
            ld.global.b32 %r30, [%d5];"""
        result = run(body, numbers(32 * 16), shared=32 * 128)
        return [tuple(int(n) for n in row)[1:] for row in result.counts if row["requests"]]

    assert counts(4, 4) == [(1, 1, 1, 128), (1, 4, 4, 128)]
    assert counts(128, 64) == [(1, 32, 1, 128), (1, 32, 4, 128)]  # one bank for all lanes; a sector for each lane
