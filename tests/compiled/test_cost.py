"""What is counted while compiled kernels run, against what is known of them; the floors; the report."""

import math
from collections import Counter

import pytest
import torch
from product_kernels import product

from benchmarks.compiled import build, cost
from benchmarks.compiled.launch import executing
from edt.model.presets import PRESETS

pytestmark = pytest.mark.skipif(bool(build.needs()), reason=build.needs())


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "matrix"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "matrix"),
        ("wgmma.wait_group.sync.aligned", "synchronise"),
        ("fence.proxy.async.shared::cta", "synchronise"),
        ("cp.async.wait_group", "synchronise"),
        ("cp.async.ca.shared.global", "global"),
        ("ld.global.L1::evict_last.v4.b32", "global"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "shared"),
        ("ex2.approx.ftz.f32", "special"),
        ("div.full.f32", "special"),
        ("div.s32", "integer"),
        ("fma.rn.f32", "float"),
        ("add.f32", "float"),
        ("cvt.rn.bf16x2.f32", "conversion"),
        ("mov.b32", "move"),
        ("setp.lt.s32", "control"),
        ("mad.wide.s32", "integer"),
    ],
)
def test_classes_of_instructions(opcode, expected):
    assert cost.classify(opcode) == expected


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_product_is_counted(target):
    """A (64, 128)·(128, 64) product: its operations, and its arrays once."""
    a, b, c = torch.randn(64, 128).bfloat16(), torch.randn(128, 64).bfloat16(), torch.empty(64, 64)
    with executing(target) as launches:
        product[(1,)](a, b, c, 64, 64, 128, 128, 1, 64, 1, 64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64,
                      PRECISION="tf32", num_warps=4)  # fmt: skip
    work = cost.count(launches[0])
    assert work.matrix_operations == 2 * 64 * 64 * 128
    assert work.array_bytes == 2 * 2 * 64 * 128 + 4 * 64 * 64
    assert work.global_bytes == work.array_bytes == 32 * work.least_sectors
    assert work.barriers >= 4  # of each of four warps, at least one
    assert work.instructions["matrix"] >= 4


def test_some_of_the_programs_stand_for_all():
    """An op of equal programs: counted from some, the work is that of all."""
    calls = cost.calls_of_training_step("EDT-S/2", batch_size=64)
    call = next(call for call in calls if call[0] == "gated_residual" and call[1][0][0][1] == 16)
    (sampled,), (whole,) = (cost.execute(call, "sm_90", every_program) for every_program in (False, True))
    assert sampled.programs < math.prod(whole.grid) == whole.programs
    assert cost.count(sampled).instructions == cost.count(whole).instructions


def test_a_norm_asks_for_whole_sectors_and_meets_few_conflicts():
    """Of a float32 stream with a bfloat16 branch, whose rows end within a tile: four rows at a time."""
    shape, strides = (256, 64, 312), (64 * 312, 312, 1)
    stream, branch, gate = (
        (shape, strides, torch.float32),
        (shape, strides, torch.bfloat16),
        ((256, 312), (6 * 312, 1), torch.bfloat16),
    )
    (launch,) = cost.execute(
        ("gated_residual_backward", (stream, None, None, branch, gate, None, None, None, 0)), "sm_90"
    )
    work = cost.count(launch)
    assert work.sectors < 1.1 * work.least_sectors
    assert work.wavefronts < 3 * work.least_wavefronts  # 10 times, where rows were added up as they lie


def test_the_calls_of_a_training_step():
    """Attention once a block in each of both passes, its backward as often; a merge and a split a stage."""
    calls = Counter()
    for (op, _), times in cost.calls_of_training_step("EDT-S/2", batch_size=2).items():
        calls[op] += times
    assert calls["amm_attention"] == calls["amm_attention_backward"] == 2 * sum(PRESETS["EDT-S/2"]["depths"])
    assert calls["token_merge_adaln"] == calls["token_split_concat_adaln"] == 2 * 2
    assert all(calls[op] == calls[f"{op}_backward"] for op in calls if not op.endswith("_backward"))


def test_floors_and_the_report():
    work = cost.Work(
        matrix_operations=989.4e12, array_bytes=3.35e12, specials=16 * 132 * 1.98e9, sums=1, products=2
    )
    floors = work.floors(cost.DEVICES[0])
    assert floors["matrix"] == pytest.approx(989.4e12 / (4096 * 132 * 1.98e9))
    assert floors["memory"] == pytest.approx(1 - 50e6 / 3.35e12)  # the L2 cache may hold that much
    assert floors["special"] == pytest.approx(1)
    assert floors["float"] == pytest.approx(2 / (128 * 132 * 1.98e9))  # the sum may be joined to a product
    twice = (work + work).floors(cost.DEVICES[0])["matrix"], (work * 2).floors(cost.DEVICES[0])["matrix"]
    assert twice == (2 * floors["matrix"],) * 2
    row = cost.Row(
        "EDT-S/2", "adaln.forward", "256×312", 3, 10, 8, work, [(2.0, "`ld.global.b32` at kernels.py:1:2")]
    )
    text = cost.report([row], "sm_90")
    assert "**Floors are bounds, not timings**" in text
    assert "| EDT-S/2 | all | 3 |" in text
    assert "| adaln.forward | 256×312 | 924.2146 | 999.9851 |" in text
    assert "2.0× | `ld.global.b32` at kernels.py:1:2" in text


def test_without_a_compiler_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        cost.main(["--models", "EDT-S/2"])
    assert exit.value.code == 2
    assert capsys.readouterr().err.endswith(
        "g++ is not installed; compiled kernels run on a machine written in C++\n"
    )
