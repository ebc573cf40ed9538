"""Every kernel, at the tiles that dispatch chooses for EDT, compiled for GPUs that need not be there."""

import pytest
import torch

from benchmarks import static

KERNELS = {"forward", "backward_q", "backward_kv", "backward_tables", "reduce_table_partials"}


@pytest.mark.parametrize("shape", static.EDT_ATTENTION, ids=lambda shape: shape[0])
@pytest.mark.parametrize("target", static.TARGETS)
def test_attention_compiles_without_spills_on_tensor_cores(target, shape):
    rows = static.report_attention(*shape, 52, torch.bfloat16, target)
    assert {row.kernel.partition("[")[0] for row in rows} == KERNELS
    names = {row.kernel.replace("k]", "]") for row in rows}  # k: some pairs of a packed tile are masked
    assert names >= {"forward[b]", "forward[bm]", "backward_tables[b]", "backward_tables[bm]"}
    for row in rows:
        assert row.spilled_bytes == 0, row
        assert row.shared_memory <= static.SHARED_MEMORY[target], row
        if row.kernel.partition("[")[0] in static.MATRIX_KERNELS:  # on sm_90 these are WGMMA instructions
            assert row.tensor_core_instructions > 0, row


# All sizes for the GPU that the tiles are made for, the widest for the others.
NORM_SHAPES = [
    (target, shape)
    for target in static.TARGETS
    for shape in (static.EDT_NORMS if target == "sm_90" else static.EDT_NORMS[2::3])
]


@pytest.mark.parametrize(
    ("target", "shape"),
    NORM_SHAPES,
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}-C{value[2]}",
)
def test_norms_compile_without_spills(target, shape):
    rows = static.report_norms(*shape, target)
    assert {row.op for row in rows} >= {"adaln", "gated_residual_adaln"}
    for row in rows:
        assert row.spilled_bytes == 0, row
        assert row.shared_memory <= static.SHARED_MEMORY[target], row


@pytest.mark.parametrize(
    ("grid", "heads", "head_dim", "batch_size", "extra"),
    [
        ((1, 1), 1, 16, 1, (0, 0)),  # every size 1, which Triton makes a compile-time constant
        ((1, 5), 1, 52, 1, (0, 0)),
        ((9, 1), 3, 8, 2, (0, 0)),
        ((16, 16), 1, 72, 1, (0, 0)),
        ((24, 16), 4, 128, 2, (77, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_attention_compiles_at_other_shapes(grid, heads, head_dim, batch_size, extra, dtype):
    """What the interpreter does not see: the types of compile-time constants and of loops."""
    launches = static.attention_launches(grid, heads, head_dim, dtype, "sm_90", batch_size, extra)
    assert {launch.kernel for launch in launches} == KERNELS
    for launch in launches:
        usage = static.compile_launch(launch, "sm_90")
        assert usage["shared_memory"] <= static.SHARED_MEMORY["sm_90"], launch


@pytest.mark.parametrize(
    ("channels", "wider"),
    [
        (1152, ()),  # DiT-XL's
        (2048, ()),
        (4096, ("token_merge_adaln",)),
        (8192, ("token_merge_adaln", "token_split_concat_adaln", "gated_residual_adaln")),
    ],
)
def test_wide_norms_compile_without_spills(channels, wider):
    """As wide as `choose_row_tile` says; ops named `wider` hold more than that in registers."""
    launches = [launch for launch in static.norm_launches((8, 8), channels, "sm_90") if launch.op not in wider]
    assert launches
    for launch in launches:
        assert static.compile_launch(launch, "sm_90")["spilled_bytes"] == 0, launch


@pytest.mark.parametrize(("grid", "channels", "batch_size"), [((2, 2), 33, 1), ((6, 10), 1, 2), ((6, 6), 8192, 1)])
def test_norms_compile_at_other_shapes(grid, channels, batch_size):
    for launch in static.norm_launches(grid, channels, "sm_90", batch_size):
        usage = static.compile_launch(launch, "sm_90")
        assert usage["shared_memory"] <= static.SHARED_MEMORY["sm_90"], launch


def test_a_spill_is_reported():
    """The check above can fail: the same kernel at a tile far too large for its warps."""
    launch = static.attention_launches((16, 16), 6, 52, torch.bfloat16, "sm_90")[0]
    launch.constants |= {"BLOCK_M": 128, "SEQ_M": 128, "BLOCK_N": 128, "SEQ_N": 128}
    launch.options |= {"num_warps": 4}
    assert static.compile_launch(launch, "sm_90")["spilled_bytes"] > 0


def test_launches_are_recorded_with_their_specialisations():
    (forward, *_) = static.attention_launches((4, 4), 10, 52, torch.bfloat16, "sm_90", batch_size=1)
    assert forward.kernel == "forward"
    assert forward.signature["q"] == "*bf16"
    assert forward.signature["logsumexp"] == "*fp32"
    assert forward.constants["B"] == 1  # integer arguments of 1 are compile-time constants
    assert forward.constants["ALIGN"] == 4  # heads of 52 are 104 bytes apart, so loads are 8 bytes wide
    assert (forward.constants["BLOCK_M"], forward.constants["SEQ_M"]) == (64, 16)
