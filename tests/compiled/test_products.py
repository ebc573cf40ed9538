"""The machine's matrix instructions, swizzled layouts, pipelines and reductions, by kernels beyond doubt."""

import itertools

import pytest
import torch
from executed import SCHEDULES
from product_kernels import chained, product, product_by_descriptors, softmax

from benchmarks.compiled import build
from benchmarks.compiled.launch import executing
from benchmarks.compiled.program import KINDS, FaultError, Program
from benchmarks.compiled.ptx import parse

pytestmark = pytest.mark.skipif(bool(build.needs()), reason=build.needs())
TARGETS = ("sm_80", "sm_90")
HALVES = (torch.bfloat16, torch.float16)


def relative_error(result, exact) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


def run(target: str, kernel, grid: int | tuple[int, int], arguments: tuple, **constants) -> list[str]:
    """Under each schedule, whose results must not differ; what was found."""
    found, results = [], []
    for schedule in SCHEDULES:
        with executing(target, schedule) as launches:
            kernel[grid if isinstance(grid, tuple) else (grid,)](*arguments, **constants)
        found += [str(finding) for finding in launches[0].findings]
        results.append([t.clone() for t in arguments if isinstance(t, torch.Tensor)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str
)
def test_softmax(target, dtype, limit):
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.full_like(x, float("nan"))
    assert not run(target, softmax, 5, (x, y, 300, 300), BLOCK=512, num_warps=4)
    assert relative_error(y, x.double().softmax(1)) <= limit


# Rows, columns, channels a step, warps, stages; and whether it is among the quick ones.
TILES = [
    ((64, 64, 32, 4, 2), True),
    ((128, 64, 64, 8, 3), True),
    ((16, 16, 16, 1, 1), True),
    ((128, 128, 64, 4, 1), False),
    ((32, 64, 32, 8, 2), False),
    ((64, 128, 64, 4, 4), False),
    ((128, 256, 64, 8, 2), False),
    ((64, 16, 64, 4, 2), False),
    ((64, 32, 128, 4, 3), False),
]


def product_cases() -> list:
    kinds = [*((dtype, "tf32") for dtype in HALVES), (torch.float32, "tf32"), (torch.float32, "ieee")]
    cases = []
    for (tile, quick), (dtype, precision), transposed in itertools.product(
        TILES, kinds, itertools.product((0, 1), (0, 1))
    ):
        large = tile[0] * tile[1] > 64 * 64
        if dtype == torch.float32 and (tile[0] * tile[1] > 128 * 64 or tile[2] > 64):
            continue  # does not fit into shared memory, or takes long
        quick &= dtype == torch.bfloat16 or (dtype == torch.float32 and precision == "tf32" and not large)
        cases.append(pytest.param(tile, dtype, precision, transposed, marks=() if quick else pytest.mark.slow))
    return cases


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("tile", "dtype", "precision", "transposed"), product_cases(), ids=str)
def test_a_product(target, tile, dtype, precision, transposed):
    rows, columns, channels, warps, stages = tile
    M, N, K = rows + 8, columns + 16, 4 * channels + 8  # two tiles each way, the second mostly empty
    generator = torch.Generator().manual_seed(0)
    a = torch.randn((K, M) if transposed[0] else (M, K), generator=generator).to(dtype)
    b = torch.randn((N, K) if transposed[1] else (K, N), generator=generator).to(dtype)
    A, B = a.t() if transposed[0] else a, b.t() if transposed[1] else b
    c = torch.full((M, N), float("nan"))
    assert not run(
        target, product, 4, (a, b, c, M, N, K, *A.stride(), *B.stride(), N),
        BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=channels, PRECISION=precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    exact = dtype != torch.float32 or precision == "ieee"
    assert relative_error(c, A.double() @ B.double()) <= (2e-6 if exact else 1e-3)


CHAINS = [
    ((64, 64, 64, 4, 2), True),
    ((128, 64, 64, 8, 2), True),
    ((64, 64, 64, 8, 2), False),
    ((128, 64, 64, 4, 1), False),
    ((64, 32, 64, 4, 1), False),
    ((64, 128, 128, 4, 2), False),
    ((128, 32, 128, 8, 2), False),
    ((16, 128, 64, 8, 2), False),
    ((32, 64, 64, 4, 2), False),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "tile", [pytest.param(tile, marks=() if quick else pytest.mark.slow) for tile, quick in CHAINS], ids=str
)
def test_a_product_of_a_product(target, tile, dtype, transposed):
    rows, block, D, warps, stages = tile
    K = 2 * block
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(n, D, generator=generator).to(dtype) for n in (rows, K, K))
    out = torch.full((K if transposed else rows, D), float("nan"))
    p = ((a.double() @ b.double().t()) * 0.25).to(dtype).double()
    assert not run(
        target, chained, 1, (a, b, c, out, K),
        M=rows, BLOCK=block, D=D, TRANSPOSED=transposed, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    # Where a float32 sum lies between two 16-bit numbers, p's rounding may go the other way.
    assert relative_error(out, p.t() @ a.double() if transposed else p @ c.double()) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tile", [(64, 64, 64), (64, 32, 32), (128, 64, 16)], ids=str)
def test_a_product_by_the_tensor_memory_accelerator(tile, dtype, stages):
    """Tiles with swizzles of 128, 64 and 32 bytes, cut off by the matrices' ends."""
    M, N, K = 104, 72, 200
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((M, K), (K, N)))
    c = torch.full((M, N), float("nan"), dtype=dtype)
    grid = (-(-M // tile[0]), -(-N // tile[1]))
    sizes = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile))
    assert not run(
        "sm_90", product_by_descriptors, grid, (a, b, c, M, N, K), **sizes, num_stages=stages, num_warps=4
    )
    assert relative_error(c, a.double() @ b.double()) <= torch.finfo(dtype).eps


def run_changed(old: str, new: str) -> list[str]:
    """Kinds of what is found in that kernel with a piece of its PTX replaced."""
    a, b, c = torch.randn(64, 128).bfloat16(), torch.randn(128, 64).bfloat16(), torch.empty(64, 64).bfloat16()

    def replace(_, program):
        assert old in program.kernel.text
        return Program(parse(program.kernel.text.replace(old, new)))

    with executing("sm_90", replace=replace) as launches:
        product_by_descriptors[(1, 1)](a, b, c, 64, 64, 128, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4)
    return [finding.kind for finding in launches[0].findings]


def test_faults_around_the_tensor_memory_accelerator():
    assert not run_changed("bar.sync", "bar.sync")
    assert KINDS[6] in run_changed("@!complete bra.uni waitLoop;", "")  # one try is no wait
    assert KINDS[8] in run_changed("fence.proxy.async", "// fence.proxy.async")
    assert KINDS[12] in run_changed("cp.async.bulk.commit_group;", "")
    with pytest.raises(FaultError, match="no mbarrier was initialised there"):
        run_changed("mbarrier.init.shared::cta.b64", "prefetch.global.L2")
    with pytest.raises(FaultError, match="4 of 4 warps of program 0 wait for ever at an mbarrier"):
        run_changed("16384;", "16385;")
