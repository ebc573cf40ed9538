"""Every kernel that dispatch chooses, compiled and executed: right numbers, nothing out of bounds, no race, the
same bits under every schedule.

The unmarked tests are a cover of kernels, switches, targets and dtypes; those marked slow are everything.
"""

import itertools

import pytest
import torch
from attention_cases import Case as Attention
from executed import ALL_SCHEDULES, SCHEDULES, judge
from norm_cases import OPS
from norm_cases import Case as Norm

from benchmarks.compiled import build
from edt_kernels.amm_attention import autograd

pytestmark = pytest.mark.skipif(bool(build.needs()), reason=build.needs())
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# EDT's stages with all that they are called with: AMM and a bias; the bias alone, as EDT trains; AMM in other
# models.
EDT = [
    Attention((16, 16), heads=2, batch_size=1),
    Attention((16, 16), heads=2, batch_size=1, modulation=None),
    Attention((16, 16), heads=2, batch_size=1, modulation="per head"),
    Attention((16, 16), heads=2, batch_size=1, modulation="fixed"),
    Attention((16, 16), heads=2, batch_size=1, bias=False),
    Attention((16, 16), heads=2, batch_size=1, bias=False, modulation=None),
    Attention((8, 8), heads=8, batch_size=2),
    Attention((8, 8), heads=8, batch_size=3, modulation=None),
    Attention((8, 8), heads=2, batch_size=2, modulation="per head"),
    Attention((8, 8), heads=2, batch_size=2, bias=False, modulation=None),
    Attention((4, 4), heads=10, batch_size=5),
    Attention((4, 4), heads=10, batch_size=9, modulation=None),
    Attention((4, 4), heads=2, batch_size=5, modulation="per head"),
    Attention((32, 32), heads=1, batch_size=1),
    Attention((32, 32), heads=1, batch_size=1, modulation=None),
]
# DiT's and PixArt's heads of 72, SD3's of 64 with text before or after the image, and what else people have.
OTHERS = [
    Attention((16, 16), head_dim=72, heads=1, batch_size=1),
    Attention((16, 16), head_dim=72, heads=1, batch_size=1, modulation=None),
    Attention((16, 16), head_dim=64, heads=1, batch_size=1, extra=(0, 33), bias=False),
    Attention((16, 16), head_dim=64, heads=1, batch_size=1, extra=(33, 0), bias=False, modulation=None),
    Attention((16, 16), head_dim=128, heads=1, batch_size=1),
    Attention((8, 8), head_dim=72, heads=2, batch_size=2),
    Attention((8, 8), head_dim=128, heads=2, batch_size=2, modulation=None),
    Attention((24, 16), head_dim=128, heads=1, batch_size=1, extra=(77, 3), modulation="per head"),
    Attention((13, 29), head_dim=40, heads=1, batch_size=1, layout="heads first"),
    Attention((16, 16), head_dim=32, heads=1, batch_size=1),
    Attention((11, 11), head_dim=16, heads=1, batch_size=1, extra=(7, 5), modulation=None),
    Attention((5, 7), heads=2, batch_size=2),
    Attention((5, 7), heads=1, batch_size=1, extra=(1, 2)),
    Attention((5, 7), heads=1, layout="strided", head_dim=20),
    Attention((7, 9), heads=2, batch_size=3, modulation=None),
    Attention((3, 3)),
    Attention((3, 3), modulation=None),
    Attention((3, 3), head_dim=72, heads=2, batch_size=7, modulation=None),
    Attention((9, 9), head_dim=128, heads=1, batch_size=1, extra=(3, 0)),
    Attention((10, 13), heads=1, batch_size=1),
    Attention((1, 300), head_dim=16, heads=1, batch_size=1),
    Attention((1, 1), head_dim=16),
    Attention((16, 16), heads=1, batch_size=2, tables=BF16),
]
# Many heads, whole on the chip: dispatch takes other kernels from 264 heads on, on sm_90, of backward where the
# grid fills the tile.
RESIDENT = [
    Attention((16, 16), heads=2, batch_size=1, modulation=None),
    Attention((16, 16), heads=1, batch_size=1, bias=False, modulation=None),
    Attention((9, 9), batch_size=1, modulation=None),
    Attention((11, 11), batch_size=1, heads=2, head_dim=32, extra=(7, 5), modulation=None),
    Attention((16, 16), batch_size=1, heads=1, head_dim=16, modulation=None),
    Attention((8, 16), batch_size=1, heads=1, bias=False, modulation=None, layout="heads first"),
    Attention((13, 17), heads=2, batch_size=2, modulation=None),
    Attention((15, 17), heads=1, batch_size=1, bias=False, modulation=None),
]
# Of whole images: minutes each.
LARGE = [
    Attention((32, 32), heads=1, batch_size=1, head_dim=72),
    Attention((64, 64), heads=1, batch_size=1, head_dim=64, extra=(0, 333), bias=False),
]


def norm_cases(dtype: torch.dtype) -> list[Norm]:
    """A stream in float32 with branches in `dtype`, as under autocast, at EDT's, DiT's and odd widths; all in
    `dtype`; strided; rows of whole images."""
    cases = []
    for op in OPS:
        mixed = {"stream": F32, "branch": dtype, "modulation": dtype}
        out = {} if op in ("gated_residual", "token_split_concat_adaln") else {"out_dtype": dtype}
        resizes = op.startswith("token")
        for grid, channels in (
            ((4, 4), 312),
            ((4, 6), 416),
            ((2, 4), 1152),
            ((2, 2), 1248),
            ((2, 2), 2080),
            ((2, 2), 52),
        ):
            if channels <= 1300 or not resizes:
                cases.append(Norm(op, grid, channels, **mixed, **out))
        keep = {"keep": True} if op == "token_merge_adaln" else {}
        cases.append(Norm(op, (4, 4), 312, stream=dtype, branch=dtype, modulation=dtype, **keep))
        cases.append(Norm(op, (2, 6), 37, stream=dtype, branch=dtype, modulation=F32, layout="strided"))
        cases.append(Norm(op, (16, 16), 312, batch_size=1, **mixed))
    return cases


COVER = {
    ("sm_90", BF16): [*EDT[:5], *EDT[6:8], *EDT[10:12], *OTHERS[:4], *OTHERS[9:11]],
    ("sm_90", F16): [EDT[1], EDT[7], EDT[11]],
    ("sm_80", BF16): [EDT[0], EDT[7], EDT[10], OTHERS[1]],
    ("sm_80", F16): [EDT[1], EDT[6], EDT[11], OTHERS[2]],
    ("sm_90", F32): [EDT[1], EDT[11]],  # what is exact is compiled otherwise, which only a compiler sees
}
RESIDENT_COVER = {("sm_90", BF16): [RESIDENT[0], RESIDENT[3], RESIDENT[4]], ("sm_90", F16): [RESIDENT[1]]}
NORMS_COVER = {
    # The first width and the strided one of each op; then DiT's width, all in one dtype.
    ("sm_90", BF16): [case for case in norm_cases(BF16) if case.channels in (312, 37) and case.batch_size > 1],
    ("sm_80", F16): [case for case in norm_cases(F16) if case.channels == 1152],
    ("sm_90", F32): [case for case in norm_cases(F32) if case.channels == 52],
}
ALL = [(target, dtype) for target in ("sm_90", "sm_80") for dtype in (BF16, F16, F32)]


def parameters(cover: dict, everything) -> list:
    """The cover, and as slow tests what is beyond it."""
    found = []
    for target, dtype in ALL:
        quick = cover.get((target, dtype), [])
        found += [pytest.param(target, dtype, case) for case in quick]
        found += [
            pytest.param(target, dtype, case, marks=pytest.mark.slow)
            for case in everything(dtype)
            if case not in quick
        ]
    return found


def check(case, dtype, target, record, quick_schedules=SCHEDULES) -> None:
    verdict = judge(case, dtype, target, quick_schedules)
    record("executed", verdict.summary())
    assert not verdict.faults()
    assert verdict.launches


@pytest.mark.parametrize(("target", "dtype", "case"), parameters(COVER, lambda dtype: EDT + OTHERS), ids=str)
def test_attention(target, dtype, case, record_property):
    check(case, dtype, target, record_property)


@pytest.mark.parametrize(
    ("target", "dtype", "case"),
    [
        p
        for p in parameters(RESIDENT_COVER, lambda dtype: RESIDENT)
        if p.values[0] == "sm_90" and p.values[1] != F32
    ],
    ids=str,
)
def test_attention_with_whole_heads_on_the_chip(target, dtype, case, record_property, monkeypatch):
    monkeypatch.setattr(autograd, "_RESIDENT_HEADS", 1)
    check(case, dtype, target, record_property)


@pytest.mark.parametrize(("target", "dtype", "case"), parameters(NORMS_COVER, norm_cases), ids=str)
def test_norms(target, dtype, case, record_property):
    check(case, dtype, target, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_attention_over_whole_images(target, case, record_property):
    check(case, BF16, target, record_property, SCHEDULES[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "case"),
    [
        *itertools.product(("sm_90", "sm_80"), [*EDT[:2], *EDT[6:8], *EDT[10:12]]),
        ("sm_86", EDT[0]),
        ("sm_86", EDT[7]),
    ],
    ids=str,
)
def test_every_schedule_gives_the_same_bits(target, case, record_property):
    verdict = judge(case, BF16, target, ALL_SCHEDULES)
    record_property("executed", verdict.summary())
    assert not verdict.faults()
