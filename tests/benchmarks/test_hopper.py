"""The rules of Hopper's asynchronous products, on listings made by hand and on what the compiler makes.

Compiled for sm_90; no GPU is needed.
"""

import re

import pytest
import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia import hopper as gluon_hopper

from benchmarks import hopper, static

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


def listing(*lines: str) -> str:
    """SASS as nvdisasm prints it, of labels and instructions."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * place:04x}*/   {line} ;"
        for place, line in enumerate(lines)
    )


# 16 bytes a thread in R1. A at 0x400 to 0x2400 and B from there to 0x4400, in rows of 128 bytes.
START = (
    "S2R R0, SR_TID.X",
    "IMAD.SHL.U32 R1, R0, 0x10, RZ",
    "UMOV UR4, 0x40",
    "UMOV UR5, 0x40000040",
    "UMOV UR6, 0x240",
    "UMOV UR7, 0x40000040",
    "LDC R2, c[0x0][0x210]",
)
PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0"
FROM_REGISTERS = "HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, RZ, !UPT, gsb0"
ADDED = PRODUCT.replace("RZ, !UPT", "R24")
WAIT, BARRIER = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "BAR.SYNC.DEFER_BLOCKING 0x0"
ON_B, BESIDE = "STS.128 [R1+0x3400], R12", "STS.128 [R1+0x4400], R12"
USE = "FADD R3, R40, R3"


@pytest.mark.parametrize(
    ("lines", "num_warps", "fault"),
    [
        ((PRODUCT, WAIT, ON_B), 8, "overwrites shared memory of"),  # of the other warpgroup
        ((PRODUCT, WAIT, ON_B), 4, None),
        ((PRODUCT, ON_B, WAIT), 4, "overwrites shared memory of"),
        ((PRODUCT, WAIT, BARRIER, ON_B), 8, None),
        ((PRODUCT, BARRIER, WAIT, ON_B), 8, "overwrites shared memory of"),  # triton issue 11047
        ((PRODUCT, WAIT, BESIDE), 8, None),
        ((PRODUCT, WAIT, "LDGSTS.E.64 [R1+0x400], desc[UR8][R4.64], P0"), 8, "overwrites shared memory of"),
        ((PRODUCT, WAIT, "STSM.16.M88.4 [R1+0x400], R12"), 8, "overwrites shared memory of"),
        ((FROM_REGISTERS, WAIT, "STS.128 [R1+0x400], R12"), 8, None),  # its B is 2 KB
        ((FROM_REGISTERS, WAIT, "STS.128 [R1+0x2400], R12"), 8, "overwrites shared memory of"),
        ((PRODUCT, WAIT, "STS [R2], R12"), 8, "stores at an unknown address"),
        ((PRODUCT, WAIT, BARRIER, "STS [R2], R12"), 8, None),
        (("UMOV UR6, c[0x0][0x210]", PRODUCT, WAIT), 8, "reads shared memory at an unknown address"),
        ((PRODUCT, WAIT, USE), 8, None),
        ((PRODUCT, USE, WAIT), 8, "touches accumulators of"),
        ((PRODUCT, "MOV R55, RZ", WAIT), 8, "touches accumulators of"),
        ((PRODUCT, "MOV R56, RZ", WAIT), 8, None),
        ((PRODUCT, "STS.128 [R1+0x5000], R21", WAIT), 8, "touches accumulators of"),
        ((PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", USE), 8, "touches accumulators of"),
        ((PRODUCT, PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", WAIT, USE), 8, None),
        ((FROM_REGISTERS, "LDS.64 R10, [R1]", WAIT), 8, "overwrites A of"),
        ((FROM_REGISTERS, WAIT, "LDS.64 R10, [R1]"), 8, None),
        ((PRODUCT, FROM_REGISTERS.replace("R8", "R40"), WAIT), 8, "reads accumulators of"),
        (("WARPGROUP.ARRIVE", "MOV R9, R0", FROM_REGISTERS, WAIT), 8, "written after WARPGROUP.ARRIVE"),
        (("MOV R9, R0", "WARPGROUP.ARRIVE", "MOV R24, RZ", FROM_REGISTERS, WAIT), 8, None),
        (("WARPGROUP.ARRIVE", "MOV R24, RZ", ADDED, WAIT), 8, "written after WARPGROUP.ARRIVE"),
        ((PRODUCT, "@P0 BRA `(.L_x_1)", WAIT, ".L_x_1:", USE), 8, "touches accumulators of"),  # on one of two ways
        ((PRODUCT, "UISETP.EQ.AND UP0, UPT, URZ, 0x1, UPT", "@UP0 BRA `(.L_x_1)", WAIT, ".L_x_1:", USE), 8, None),
    ],
)
def test_what_may_not_be_done_before_a_product_is(lines, num_warps, fault):
    found = hopper.hazards(listing(*START, *lines, "EXIT"), num_warps)
    assert len(found) == (fault is not None), found
    if fault:
        assert fault in found[0]


@pytest.mark.parametrize(("barrier", "hazards"), [((), 1), ((BARRIER,), 0)])
def test_buffers_that_come_round(barrier, hazards):
    """Products read two buffers in turn; a turn fills the one that the turn before read."""
    sass = listing(
        *START, "UMOV UR8, URZ",
        ".L_x_0:", "ULOP3.LUT UR9, UR8, 0x1, URZ, 0xc0, !UPT", "ULEA UR6, UR9, 0x240, 0x9", PRODUCT, WAIT,
        *barrier, "ULOP3.LUT UR9, UR9, 0x1, URZ, 0x3c, !UPT", "LEA R3, UR9, R1, 0xd", "STS.128 [R3+0x2400], R12",
        "UIADD3 UR8, UR8, 0x1, URZ", "@P0 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert len(hopper.hazards(sass, 8)) == hazards


@pytest.fixture
def compiled(tmp_path):
    """SASS and PTX of a kernel that Triton compiled."""

    def disassemble(kernel) -> tuple[str, str]:
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        return static._run(static._NVIDIA_TOOLS / "nvdisasm", "-ndf", "-c", cubin), kernel.asm["ptx"]

    return disassemble


def test_branches_after_the_last_product_are_no_paths():
    """2⁴⁰ of them would take for ever."""
    branches = [line for n in range(40) for line in (f"@P1 BRA `(.L_x_{n})", "STS [R2], R12", f".L_x_{n}:")]
    assert not hopper.hazards(listing(*START, PRODUCT, WAIT, BARRIER, *branches), 8)
    (fault,) = hopper.hazards(listing(*START, PRODUCT, *branches[:3], WAIT), 8)  # beside one they are
    assert "stores at an unknown address" in fault


def launch_of(kernel: str, grid=(16, 16), head_dim=52) -> static.Launch:
    launches = static.attention_launches(grid, 6, head_dim, torch.bfloat16, "sm_90")
    return next(launch for launch in launches if launch.kernel == kernel)


@pytest.mark.parametrize(
    ("kernel", "side"),
    [
        ("forward", 16),
        ("resident_forward", 16),
        ("resident_backward", 16),
        ("backward_tables", 4),
        ("short_backward", 8),
    ],
)
def test_operands_are_found_where_they_were_stored(kernel, side, compiled):
    """All of their bytes, which the kernel itself has stored: the addresses computed for both are right."""
    sass, _ = compiled(static.compile_launch(launch_of(kernel, (side, side)), "sm_90"))
    walk = hopper._Walk(sass, 8)
    walk.run()
    assert not walk.found
    assert walk.read.any()
    assert not (walk.read.any(0) & ~walk.stored.any(0)).any()


def test_a_removed_wait_and_a_removed_barrier_are_found(compiled):
    sass, ptx = compiled(static.compile_launch(launch_of("forward"), "sm_90"))
    lines = sass.splitlines()
    assert not hopper.product_faults(sass, ptx, 8)
    found = {"WARPGROUP.DEPBAR": [], "BAR.SYNC": []}
    for instruction, faults in found.items():
        for place, line in enumerate(lines):
            if instruction in line:
                faults += hopper.hazards("\n".join(lines[:place] + lines[place + 1 :]), 8)
    waits, barriers = (" ".join(faults) for faults in found.values())
    assert "touches accumulators" in waits
    assert "overwrites shared memory" in waits
    assert re.search(r"LDGSTS\.\S+ at \w+ overwrites shared memory", barriers)


def test_more_waits_than_groups_are_a_fault(compiled):
    """Where both products' layouts differ, Triton 3.7 waits twice for one, and copies accumulators between."""
    launch = launch_of("resident_forward")
    launch.constants |= {"BLOCK_N": 32, "TILES": 8}
    sass, ptx = compiled(static.compile_launch(launch, "sm_90"))
    faults = hopper.product_faults(sass, ptx, 8)
    if VERSION < (3, 9):
        assert re.fullmatch(r"waits \d+ times for 16 groups of products", faults[-1])
    sass = listing(*START, PRODUCT, WAIT, PRODUCT, WAIT, "EXIT")
    assert hopper.product_faults(sass, "wgmma.commit_group", 8) == ["waits 2 times for 1 groups of products"]


@gluon.jit
def overwrite_an_operand(a, b, out):
    """Two products of the same a with two matrices b, the second stored where the first was."""
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[8, 1], instr_shape=[16, 64, 16])
    swizzled: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    i = gl.arange(0, 128, layout=gl.SliceLayout(1, rows))[:, None] * 64
    j = gl.arange(0, 64, layout=gl.SliceLayout(1, rows))[:, None] * 64
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, rows))[None, :]
    left = gl.allocate_shared_memory(gl.bfloat16, [128, 64], swizzled)
    right = gl.allocate_shared_memory(gl.bfloat16, [64, 64], swizzled)
    left.store(gl.load(a + i + column))
    right.store(gl.load(b + j + column))
    second = gl.load(b + 64 * 64 + j + column)
    gluon_hopper.fence_async_shared()
    total = gl.zeros([128, 64], gl.float32, products)
    total = gluon_hopper.warpgroup_mma(left, right, total, is_async=True)
    gl.barrier()  # which Triton takes for one that orders the product's reads
    total = gluon_hopper.warpgroup_mma_wait(0, deps=[total])
    right.store(second)
    gluon_hopper.fence_async_shared()
    total = gluon_hopper.warpgroup_mma(left, right, total, is_async=True)
    total = gluon_hopper.warpgroup_mma_wait(0, deps=[total])
    gl.store(out + i + column, gl.convert_layout(total, rows))


@pytest.mark.skipif(not hasattr(gl, "barrier"), reason="Triton 3.6 names its barrier otherwise")
def test_the_barrier_that_triton_leaves_out_is_found(compiled):
    """Triton issue 11047, which 3.9 has not any more."""
    types = {"a": "*bf16", "b": "*bf16", "out": "*fp32"}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(3)}
    source = GluonASTSource(overwrite_an_operand, types, {}, aligned)
    sass, ptx = compiled(triton.compile(source, target=static.TARGETS["sm_90"], options={"num_warps": 8}))
    faults = hopper.product_faults(sass, ptx, 8)
    if VERSION >= (3, 9):
        assert not faults
    else:
        (fault,) = faults
        assert re.match(r"STS\.128 at \w+ overwrites shared memory of the HGMMA at", fault)
