"""Every kernel, at the tiles that dispatch chooses, compiled for GPUs that need not be there.

The unmarked tests compile EDT at 256² for sm_90 and a cover of it for other targets; those marked slow compile
whatever `python -m benchmarks static` does.
"""

import contextlib
import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch
import triton

from benchmarks import assembly, static
from benchmarks.shapes import ATTENTION_256, ATTENTION_512, EDT_ATTENTION, NORMS_256, NormShape
from benchmarks.static_report import NARROW_LOADS, faults, summary

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
PROVEN = re.search(r"^triton==(.*)$", CONSTRAINTS.read_text(), re.MULTILINE).group(1)


def check(launches: list[static.Launch], target: str) -> list[static.Report]:
    """Compiles what differs among the launches and asserts that nothing is wrong with it."""
    rows = [static.report(launch, target, disassemble=False) for launch in static.unique(launches)]
    stored = static.stored_reports()
    for row in rows:  # what `--faults` believes the table
        if kept := stored.get(*row.fingerprints):
            given = {"shapes": [], "fingerprints": [], "inner_loop": False, "instructions": {}}
            assert dataclasses.replace(row, **given) == dataclasses.replace(kept, **given)
    found = {f"{row.target} {row.kernel}: {fault}": fault for row in rows for fault in faults(row)}
    without_spills(found)
    return rows


def without_spills(found: dict[str, str]) -> None:
    """Asserts that no fault was found, whatever the compiler; with another Triton than the proven one, registers
    alone may not suffice, and the test is an expected failure that says so."""
    spills = {kernel: fault for kernel, fault in found.items() if fault.startswith("spills")}
    version = triton.__version__.partition("+")[0]
    if version == PROVEN or not spills:
        assert not found
    assert found.keys() == spills.keys(), found
    if spills:
        pytest.xfail(f"registers proven with Triton {PROVEN}; with {version}, {spills}")


def check_attention(launches: list[static.Launch], target: str) -> None:
    rows = check(launches, target)
    switches = {row.kernel.partition("[")[2].rstrip("skx]") for row in rows if row.multiplies}
    assert switches == {"", "b", "m", "bm"}  # the bias and AMM, each or none or both


# Three stages a model for 256² pixels, and three for 512².


@pytest.mark.parametrize("side", [16, 8, 4])
def test_attention_of_edt_on_sm_90(side):
    """One stage of all sizes together: their head counts mostly compile to the same code."""
    shapes = [shape for shape in ATTENTION_256 if shape.grid == (side, side)]
    check_attention([launch for shape in shapes for launch in static.launches_of(shape, "sm_90")], "sm_90")


@pytest.mark.parametrize("shape", NORMS_256, ids=str)
def test_norms_of_edt_on_sm_90(shape):
    rows = check(static.launches_of(shape, "sm_90"), "sm_90")
    # Two programs of 8 warps a multiprocessor, or one of 16: some work while others wait for memory.
    warps = {row.kernel: row.programs_per_multiprocessor * row.tile["num_warps"] for row in rows}
    assert min(warps.values()) >= 16, warps


# sm_80 and sm_86 run the same code and share the cover; sm_86 has less shared memory.
FIRST_STAGE, _, LAST_STAGE = ATTENTION_256[:3]
NARROWEST, WIDEST = NORMS_256[0], max(NORMS_256, key=lambda shape: (shape.resizes, shape.channels))
LARGEST = ATTENTION_512[0]  # 512²'s first stage; the other grids of 512² are 256²'s too
COVER = [
    ("sm_90", LARGEST),
    ("sm_80", LAST_STAGE),
    ("sm_80", NARROWEST),
    ("sm_86", FIRST_STAGE),
    ("sm_86", WIDEST),
    *itertools.product(("sm_100", "sm_120", "gfx942"), (FIRST_STAGE, LAST_STAGE, NARROWEST, WIDEST)),
]


@pytest.mark.parametrize(("target", "shape"), COVER, ids=str)
def test_cover_of_edt(target, shape):
    (check if isinstance(shape, NormShape) else check_attention)(static.launches_of(shape, target), target)


@pytest.mark.slow
@pytest.mark.parametrize("shape", static.SHAPES, ids=str)
@pytest.mark.parametrize("target", static.TARGETS)
def test_all_shapes_on_all_targets(target, shape):
    (check if isinstance(shape, NormShape) else check_attention)(static.launches_of(shape, target), target)


EDGES = [
    ((1, 1), 1, 16, 1, (0, 0)),  # every size 1, which Triton makes a compile-time constant
    ((1, 5), 1, 52, 1, (0, 0)),
    ((9, 1), 3, 8, 2, (0, 0)),
    ((16, 16), 1, 72, 1, (0, 0)),
    ((24, 16), 4, 128, 2, (77, 3)),
]


@pytest.mark.parametrize(("grid", "heads", "head_dim", "batch_size", "extra"), EDGES)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_attention_compiles_at_other_shapes(grid, heads, head_dim, batch_size, extra, dtype):
    """What the interpreter does not see: the types of compile-time constants and of loops."""
    for launch in static.attention_launches(grid, heads, head_dim, dtype, "sm_90", (batch_size,), extra):
        shared_memory = static.compile_launch(launch, "sm_90").metadata.shared
        assert shared_memory <= assembly.MULTIPROCESSORS["sm_90"].shared_memory_of_program, launch


@pytest.mark.parametrize("head_dim", [16, 32])
def test_products_of_small_heads_are_waited_for(head_dim):
    """Their products have different layouts. (With 16, ptxas serialises those of backward_q, which is right.)"""
    launches = static.attention_launches((16, 16), 4, head_dim, torch.bfloat16, "sm_90", (128,))
    with_bias = [
        launch for launch in launches if static.switches(launch)["b"] and not static.switches(launch)["m"]
    ]
    assert [launch.kernel for launch in with_bias[:3]] == ["forward", "backward_q", "backward_kv"]
    rows = [static.report(launch, "sm_90", disassemble=False) for launch in with_bias]
    assert not [fault for row in rows for fault in row.wrong_products if not fault.startswith("waits")]


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
    rows = [static.report(launch, "sm_90", disassemble=False) for launch in launches]
    without_spills({row.kernel: f"spills {row.spilled_bytes}" for row in rows if row.spilled_bytes})


@pytest.mark.parametrize(("grid", "channels", "batch_size"), [((2, 2), 33, 1), ((6, 10), 1, 2), ((6, 6), 8192, 1)])
def test_norms_compile_at_other_shapes(grid, channels, batch_size):
    for launch in static.norm_launches(grid, channels, "sm_90", batch_size):
        shared_memory = static.compile_launch(launch, "sm_90").metadata.shared
        assert shared_memory <= assembly.MULTIPROCESSORS["sm_90"].shared_memory_of_program, launch


# The checks above can fail: each of these launches has one fault.


def forward_launch(target: str = "sm_90") -> static.Launch:
    return next(launch for launch in static.launches_of(FIRST_STAGE, target) if launch.kernel == "forward")


def test_a_spill_is_a_fault():
    launch = forward_launch()
    launch.constants |= {"BLOCK_M": 128, "BLOCK_N": 128}
    launch.options |= {"num_warps": 4}
    assert any(re.fullmatch(r"spills \d+ bytes", fault) for fault in faults(static.report(launch, "sm_90")))


def test_a_product_off_the_matrix_unit_is_a_fault():
    launch = forward_launch()
    launch.options |= {"num_warps": 2}  # fewer than a warpgroup, so the products fall back to the warps' mma
    launch.constants |= {"BLOCK_M": 32}
    assert "multiplies matrices without the matrix unit" in faults(static.report(launch, "sm_90"))


def test_exact_products_of_float32_need_no_matrix_unit():
    launch = static.launches_of(LAST_STAGE, "sm_90", torch.float32)[1]
    row = static.report(launch, "sm_90")
    assert row.matrix_instructions == 0
    assert not faults(row)


def test_a_narrow_load_is_a_fault():
    launch = forward_launch()
    launch.divisible.remove(list(launch.signature).index("k"))  # a pointer of which nothing is known
    assert faults(static.report(launch, "sm_90")) == ["loads k by 2 bytes where 8 are possible"]


def test_too_much_shared_memory_is_a_fault():
    launch = forward_launch("sm_86")
    launch.options |= {"num_stages": 12}
    (fault,) = faults(static.report(launch, "sm_86"))
    assert re.fullmatch(r"needs \d+ bytes of shared memory of 101376", fault)


def test_a_load_that_cannot_be_traced_is_a_fault():
    row = static.report(static.launches_of(NARROWEST, "sm_90")[0], "sm_90", disassemble=False)
    assert not faults(row)
    assert faults(dataclasses.replace(row, bytes_per_load={**row.bytes_per_load, "unknown": {4: 1}}))


@pytest.mark.parametrize("version", [PROVEN, "3.9.0"])
def test_only_spills_of_another_triton_are_expected(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    other, spill = {"forward": "needs 5 bytes of shared memory of 4"}, {"backward": "spills 8 bytes"}
    without_spills({})
    for found in (other, other | spill):
        with pytest.raises(AssertionError):
            without_spills(found)
    with pytest.raises(AssertionError if version == PROVEN else pytest.xfail.Exception, match="spills 8 bytes"):
        without_spills(spill)


def test_faults_are_those_of_the_stored_table_and_of_what_it_has_not(tmp_path, monkeypatch, capsys):
    template = next(iter(static.stored_reports().values()))
    shapes = [shape for shape in static.SHAPES if shape.model == "EDT-S/2"]
    launches = [launch for shape in shapes for launch in static.launches_of(shape, "sm_90")]
    names = list(dict.fromkeys(static.fingerprint(launch, "sm_90") for launch in launches))
    rows = [dataclasses.replace(template, fingerprints=[name], kernel=name, spilled_bytes=0) for name in names]
    rows[0].spilled_bytes, forgotten = 12, rows[-1]
    monkeypatch.setattr(static, "STORED", tmp_path / "table.json")
    static.store(rows[:-1], static.STORED)
    compiled = []

    class Pool:
        def map(self, function, jobs):
            compiled.extend(static.fingerprint(launch, target) for launch, target, *_ in jobs)
            return [dataclasses.replace(forgotten, shapes=["a shape"], spilled_bytes=34)]

    monkeypatch.setattr(static, "ProcessPoolExecutor", lambda: contextlib.nullcontext(Pool()))
    assert static.main(["--targets", "sm_90", "--models", "EDT-S/2", "--faults"]) == 1
    said = capsys.readouterr().out
    assert f"{len(names)} kernels, 2 faults" in said
    assert re.search(f"{names[0]} .*: spills 12 bytes", said)
    assert re.search(f"{names[-1]} a shape: spills 34 bytes", said)
    assert compiled == forgotten.fingerprints


def test_a_fingerprint_is_of_all_that_a_report_depends_on(monkeypatch):
    launch = forward_launch()
    names = {static.fingerprint(launch, "sm_90"), static.fingerprint(launch, "sm_80")}
    for change in (
        {"options": launch.options | {"num_stages": 7}},
        {"constants": launch.constants | {"BLOCK_M": 16}},
        {"divisible": launch.divisible[1:]},
        {"signature": launch.signature | {"q": "*fp16"}},
        {"kernel": "backward_q"},
    ):
        names.add(static.fingerprint(dataclasses.replace(launch, **change), "sm_90"))
    monkeypatch.setattr(triton, "__version__", "0.0")
    static._tools.cache_clear()
    names.add(static.fingerprint(launch, "sm_90"))
    static._tools.cache_clear()
    assert len(names) == 8
    monkeypatch.undo()
    assert static.fingerprint(launch, "sm_90") in names


# What the report is made of.


def test_launches_are_recorded_with_their_specialisations():
    launches = static.attention_launches((4, 4), 10, 52, torch.bfloat16, "sm_90", (1,), (1, 0))
    expand, forward, tables = (
        next(launch for launch in launches if launch.kernel == kernel)
        for kernel in ("expand_table", "forward", "backward_tables")
    )
    assert tables.signature["B"] == "i32"
    assert (expand.signature["table"], expand.signature["matrix"]) == ("*fp32", "*fp16")
    assert forward.signature["q"] == "*bf16"
    assert forward.signature["logsumexp"] == "*fp32"
    assert forward.signature["bias"] == forward.signature["modulation"] == "*fp16"
    assert (
        forward.constants["before"] == 1
    )  # integer arguments of 1 are compile-time constants, unless named otherwise
    assert forward.constants["ALIGN"] == 4  # heads of 52 are 104 bytes apart, so loads are 8 bytes wide
    assert (forward.constants["BLOCK_M"], forward.constants["SIDE"]) == (32, 32)


def test_the_number_of_heads_makes_no_other_code():
    """Nor does how far apart tokens are: 18 heads of 52 are no multiple of 16 channels, 16 and 32 are."""
    few, more, many = (
        {
            launch.identity
            for launch in static.attention_launches((16, 16), heads, 52, torch.bfloat16, "sm_90", (64,))
            if launch.kernel in ("forward", "backward_q", "backward_kv")
        }
        for heads in (18, 16, 32)
    )
    assert few == more == many


def test_the_batch_size_makes_no_other_code():
    """Apart from the choice between kernels, for which two batch sizes are enough, and all models together."""

    def codes(*batch_sizes: int) -> set[str]:
        launches = [
            launch
            for shape in ATTENTION_256
            for launch in static.attention_launches(
                shape.grid, shape.heads, shape.head_dim, torch.bfloat16, "sm_90", batch_sizes
            )
        ]
        for shape, batch_size in itertools.product(NORMS_256, batch_sizes):
            launches += static.norm_launches(
                shape.grid, shape.channels, "sm_90", batch_size, resizes=shape.resizes
            )
        return {launch.identity for launch in launches}

    assert codes(1, 2, 3, 5, 25, 32, 48, 100, 512) == codes(16, 64)


def test_every_launch_asks_for_fused_products_and_sums():
    """Triton 3.10 leaves them out unless asked."""
    for shape in (FIRST_STAGE, LAST_STAGE, NARROWEST):
        for launch in static.launches_of(shape, "sm_90"):
            assert launch.options["enable_fp_fusion"] is True, launch


def test_every_attention_kernel_is_among_the_launches():
    kernels = {launch.kernel for shape in EDT_ATTENTION for launch in static.launches_of(shape, "sm_90")}
    assert kernels == {
        "expand_table", "forward", "resident_forward", "backward_q", "backward_kv", "short_backward",
        "resident_backward", "backward_tables", "reduce_table_partials",
    }  # fmt: skip


def test_rows_may_be_loaded_by_16_bytes_except_heads_of_52_and_beside_a_float32_stream():
    """Of all shapes, without compiling: what `faults` holds the loads of 16-bit rows against."""
    for shape in static.SHAPES:
        widths = {
            width
            for launch in static.launches_of(shape, "sm_90")
            for argument, width in static.possible_load_bytes(launch).items()
            if launch.signature[argument] == "*bf16"
        }
        assert widths == {8 if getattr(shape, "head_dim", 52) == 52 else 16}, shape


def test_loads_are_traced_to_their_arguments():
    for target in ("sm_90", "gfx942"):
        row = static.report(forward_launch(target), target)
        rows = {argument for argument in row.bytes_per_load if argument not in NARROW_LOADS}
        assert rows == set(row.possible_bytes_per_load) == {"q", "k", "v"}
        assert {name: set(row.bytes_per_load[name]) for name in ("q", "bias")} == {"q": {8}, "bias": {16}}
        assert row.inner_loop
        assert row.instructions["matrix"] > 0
        assert row.instructions["special"] > 0  # exp2


def test_instruction_mix_of_the_inner_loop():
    sass = """
.L_x_0:
        /*0000*/                   MUFU.EX2 R1, R2 ;
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*0020*/              @!P0 LDGSTS.E.64 [R1], desc[UR4][R2.64] ;
        /*0030*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   FADD R1, R2, R3 ;
        /*0060*/              @!P2 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""
    mix, has_loop = assembly.instruction_mix(sass)
    assert has_loop
    assert mix == {"matrix": 1, "global": 1, "integer": 1, "control": 1}


def test_resident_programs():
    # 224 registers: two warps in each quarter of a multiprocessor, one program of eight.
    assert assembly.resident_programs("sm_90", 8, 224, 114688) == (1, "registers")
    assert assembly.resident_programs("sm_86", 4, 64, 40960) == (2, "shared memory")  # 41 KB each of 100 KB
    assert assembly.resident_programs("sm_120", 4, 32, 0) == (12, "warps")
    assert assembly.resident_programs("sm_100", 4, 64, 1024, tensor_memory=256) == (2, "tensor memory")


def test_resident_waves_are_those_that_llvm_states():
    for launch in static.launches_of(FIRST_STAGE, "gfx942"):
        gcn = static.compile_launch(launch, "gfx942").asm["amdgcn"]
        registers, _ = static._amd_registers(gcn)
        by_registers, _ = assembly.resident_programs("gfx942", 4, registers, 0)
        assert by_registers == int(re.search(r"; Occupancy: (\d+)", gcn).group(1)), launch


def test_summary_names_what_is_wrong(tmp_path):
    row = static.report(static.launches_of(NARROWEST, "sm_90")[0], "sm_90", ["a shape"])
    assert "1 kernels, 0 faults" in summary([row])
    assert "- sm_90 adaln forward, a shape: spills 8 bytes" in summary([dataclasses.replace(row, spilled_bytes=8)])
    static.store([dataclasses.replace(row, wrong_products=["waits"])], tmp_path / "triton-0.0.md")
    assert "- sm_90 adaln forward, a shape: waits" in (tmp_path / "triton-0.0.md").read_text()
    assert len(list(tmp_path.iterdir())) == 1
