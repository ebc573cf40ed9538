"""Tables of measured tiles: what writes them (`benchmarks.tuning`), and what launches make of them."""

import contextlib
import dataclasses
import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks import __main__ as command
from benchmarks import static, tiles, tuning
from benchmarks.tuning import Shape
from edt_kernels import _launch, _tiles
from edt_kernels._tiles import CellTile, RowLoop, RowTile, ScoreTile
from edt_kernels.amm_attention import autograd as attention
from edt_kernels.norms import kernels as norms

CPU = torch.device("cpu")
NORM = Shape("adaln", (2, 4), 16, batch_size=1, dtype=torch.float16)
# Of a few numbers the error scatters more than the budget allows.
ATTENTION = Shape("amm_attention", (2, 3), 32, batch_size=2, heads=2, dtype=torch.float16)
ALL_OPS = [
    Shape(op, (2, 2), 32, batch_size=2, heads=2, dtype=torch.float16, modulation=op == "amm_attention")
    for op in tiles.OPS
]


@pytest.fixture
def _few_candidates(monkeypatch, _triton):
    """Beside the static choice, two row tiles or one of each kernel of attention."""
    few = {
        ("adaln", "forward"): [RowTile(2, 1), RowTile(4, 2)],
        ("adaln", "backward"): [RowLoop(2, 1, 264), RowLoop(4, 2, 2)],
        ("amm_attention", "forward"): [ScoreTile(16, 32, 4, 1)],
        ("amm_attention", "short_backward"): [ScoreTile(32, 32, 4, 1)],
        ("amm_attention", "backward_q"): [ScoreTile(16, 32, 4, 1)],
        ("amm_attention", "backward_kv"): [ScoreTile(32, 16, 4, 1)],
        ("amm_attention", "backward_tables"): [CellTile(16, 4, 1)],
    }
    monkeypatch.setattr(
        tuning,
        "_tiles_of",
        lambda pass_name, kernel, key, unit: few.get((pass_name.partition(".")[0], kernel), []),
    )


def clock(microseconds=lambda tiles: 1.0):
    """A timer that knows how long tiles take, and which were timed."""

    def timer(calls):
        *_, chosen = _tiles.measured.values()
        timer.timed.append(chosen)
        return float(microseconds(chosen))

    timer.timed = []
    return timer


def by_tile(**microseconds):
    """Of norms: r2 is what tiles of two rows take; all others 7."""
    return clock(lambda tiles: microseconds.get(f"r{next(iter(tiles.values())).rows}", 7))


def tuned(path, shapes, timer, **options) -> dict:
    tuning.tune(CPU, shapes, path, timer, **options)
    return json.loads(path.read_text())


def results(shape):
    return tuning._Trial(shape, CPU).results()


def launching(monkeypatch, instead):
    """`instead(launch, tensors, run)` in place of each launch."""
    call = _launch.Launch.__call__
    monkeypatch.setattr(
        _launch.Launch,
        "__call__",
        lambda launch, *tensors: instead(launch, tensors, lambda: call(launch, *tensors)),
    )


@pytest.fixture
def launches(monkeypatch):
    """(rows, warps, programs) of each launch of `adaln`, as they come."""
    launches = []

    def record(launch, _tensors, run):
        launches.append((launch.constants["ROWS"], launch.constants["num_warps"], launch.programs))
        run()

    launching(monkeypatch, record)
    return launches


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A file for one. What a test puts into use is out of it afterwards."""
    monkeypatch.setattr(_tiles, "measured", {})
    yield tmp_path / "tiles.json"
    _launch.forget_plans()


@pytest.mark.interpreter
@pytest.mark.usefixtures("_few_candidates")
def test_launches_take_the_fastest_tiles_of_the_table(table, launches):
    results(NORM)
    assert launches[-2:] == [(8, 1, 1), (8, 1, 1)]  # the static choice
    forward, backward = tuned(table, [NORM], by_tile(r2=5, r4=6))["entries"]
    assert forward["tiles"] == {"forward": {"rows": 2, "num_warps": 1}}
    assert (forward["static_microseconds"], forward["microseconds"]) == (7, 5)
    assert forward["key"] == {"channels": 16, "dtype": "float32", "rows": 8}
    assert backward["tiles"] == {"backward": {"rows": 2, "num_warps": 1, "programs": 264}}
    results(NORM)
    assert launches[-2:] == [(8, 1, 1), (8, 1, 1)]  # nothing is used unasked
    tiles.use(table)
    results(NORM)
    assert launches[-2:] == [(2, 1, 4), (2, 1, 4)]
    results(dataclasses.replace(NORM, channels=24))  # has no entry
    assert launches[-2:] == [(8, 1, 1), (8, 1, 1)]


@pytest.mark.interpreter
@pytest.mark.usefixtures("_few_candidates")
def test_the_static_choice_stays_unless_another_is_clearly_faster(table):
    entries = tuned(table, [NORM], by_tile(r2=6.9, r4=6.9))["entries"]
    assert all(entry["tiles"] == entry["static_tiles"] for entry in entries)
    assert [entry["microseconds"] for entry in entries] == [7, 7]


@pytest.mark.interpreter
@pytest.mark.usefixtures("_few_candidates")
@pytest.mark.parametrize("modulation", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_another_kernel_may_be_faster(modulation, table, monkeypatch):
    """The general kernels where dispatch would take the short one, each with the fastest of its own tiles."""

    def microseconds(tiles):
        return sum(1 + abs(tile.num_warps - 4) + 9 * kernel.startswith("short") for kernel, tile in tiles.items())

    shape = dataclasses.replace(ATTENTION, modulation=modulation)
    forward, backward = tuned(table, [shape], clock(microseconds))["entries"]
    assert forward["tiles"] == {"forward": {"block_m": 16, "block_n": 32, "num_warps": 4, "num_stages": 1}}
    assert forward["static_tiles"]["forward"]["num_warps"] == 1
    assert backward["tiles"] == {
        "backward_q": {"block_m": 16, "block_n": 32, "num_warps": 4, "num_stages": 1},
        "backward_kv": {"block_m": 32, "block_n": 16, "num_warps": 4, "num_stages": 1},
        "backward_tables": {"cells": 16, "num_warps": 4, "num_stages": 1},
    }
    assert next(iter(backward["static_tiles"])) == ("backward_q" if modulation else "short_backward")

    tiles.use(table)
    launches = []

    def record(launch, _tensors, run):
        if "num_warps" in launch.constants:  # not so what adds up partial sums
            launches.append((launch.kernel.fn.__name__, launch.constants["num_warps"]))
        run()

    launching(monkeypatch, record)
    trial = tuning._Trial(shape, CPU)
    launches.clear()
    assert trial.fault() is None
    assert set(launches) == {(k, 4) for k in ("forward", "backward_q", "backward_kv", "backward_tables")}


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("shape", ALL_OPS, ids=lambda shape: shape.op)
def test_every_op_has_two_passes_that_are_right_and_can_be_timed(shape):
    trial = tuning._Trial(shape, CPU)
    passes = [f"{shape.op}.forward", f"{shape.op}.backward"]
    assert [name for name, *_ in trial.questions] == passes
    assert trial.fault() is None
    assert list(trial.calls) == passes
    for ((name, *key), heuristic), calls in zip(trial.questions.items(), trial.calls.values()):
        assert any(way.keys() == heuristic.keys() for way in tiles.PASSES[name])
        kinds = tiles.ATTENTION_KEY if shape.op == "amm_attention" else tiles.NORM_KEY
        assert {field: type(value) for field, value in key} == kinds
        for call in calls:
            call()


@pytest.mark.interpreter
@pytest.mark.usefixtures("_few_candidates")
@pytest.mark.parametrize("how", ["wrong", "unwritten", "other bits"])
def test_a_wrong_candidate_is_reported_and_not_chosen(how, table, monkeypatch, capsys):
    odd = itertools.cycle([0, 1])

    def wrong(launch, tensors, run):
        if launch.constants["ROWS"] == 2 and how == "unwritten":
            return
        run()
        if launch.constants["ROWS"] == 2:
            result = tensors[7 if launch.kernel is norms.forward else 8]
            result[0, 0, 0] += 1 if how == "wrong" else 1e-3 * next(odd)

    with monkeypatch.context() as patch:
        launching(patch, wrong)
        check_that_it_is_reported(table, capsys)


def check_that_it_is_reported(table, capsys):
    timer = by_tile(r2=1, r4=5)
    content = tuned(table, [NORM], timer)
    assert all(next(iter(entry["tiles"].values()))["rows"] == 4 for entry in content["entries"])
    assert [entry["rejected"] for entry in content["entries"]] == [{"wrong": 1}] * 2
    assert [next(iter(fault["tiles"].values()))["rows"] for fault in content["faults"]] == [2, 2]
    assert all(next(iter(tiles.values())).rows != 2 for tiles in timer.timed)
    assert capsys.readouterr().err.count("WRONG: adaln") == 2
    content["entries"].clear()
    table.write_text(json.dumps(content))
    again = tuned(table, [NORM], timer)  # goes on without what is known to be wrong
    assert [entry["rejected"] for entry in again["entries"]] == [{"known fault": 1}] * 2


@pytest.mark.interpreter
@pytest.mark.usefixtures("_few_candidates")
def test_a_wrong_static_choice_is_replaced(table, monkeypatch):
    """And then stands no longer in the way of the right results of the other pass."""

    def launch_others(launch, _tensors, run):
        if launch.kernel is not norms.forward or launch.constants["ROWS"] != 8:
            run()

    launching(monkeypatch, launch_others)
    content = tuned(table, [NORM], by_tile(r2=9, r4=8))
    forward, backward = content["entries"]
    assert (forward["tiles"]["forward"]["rows"], forward["static_microseconds"]) == (4, None)
    assert (backward["tiles"]["backward"]["rows"], backward["static_microseconds"]) == (8, 7)
    assert "wrong" in tuning.report(content)


@pytest.mark.interpreter
@pytest.mark.usefixtures("_few_candidates")
def test_what_does_not_launch_is_skipped(table, monkeypatch):

    def fail(launch, _tensors, run):
        if launch.constants["ROWS"] == 2:
            raise MemoryError("out of shared memory")
        run()

    launching(monkeypatch, fail)
    content = tuned(table, [NORM], by_tile(r4=5))
    assert [entry["rejected"] for entry in content["entries"]] == [{"MemoryError": 1}] * 2
    assert content["faults"] == []


@pytest.mark.interpreter
@pytest.mark.usefixtures("_few_candidates")
def test_nothing_is_written_where_nothing_works(table, monkeypatch, capsys):
    monkeypatch.setattr(tuning._Trial, "fault", lambda trial: "all wrong")
    content = tuned(table, [NORM], clock())
    assert (content["entries"], content["faults"]) == ([], [])
    assert "NOTHING WORKS: adaln.forward B1 2×4 C16: {'wrong': 3}" in capsys.readouterr().err


@pytest.mark.interpreter
@pytest.mark.usefixtures("_few_candidates")
def test_a_crash_of_the_device_is_recorded_and_avoided_by_the_next_run(table, monkeypatch):
    fault = tuning._Trial.fault

    def crash(trial):
        *_, chosen = _tiles.measured.values()
        if chosen == {"forward": RowTile(2, 1)}:
            raise RuntimeError("illegal memory access")
        return fault(trial)

    monkeypatch.setattr(tuning._Trial, "fault", crash)
    monkeypatch.setattr(tuning, "is_lost", lambda device: True)
    with pytest.raises(RuntimeError, match=r"adaln\.forward .*'rows': 2.* crashed the device \(illegal memory"):
        tuned(table, [NORM], clock())
    forward, backward = tuned(table, [NORM], clock())["entries"]
    assert (forward["rejected"], backward["rejected"]) == ({"known fault": 1}, {})


@pytest.mark.interpreter
@pytest.mark.usefixtures("_few_candidates")
def test_an_interruption_keeps_what_was_measured(table):
    def interrupt(tiles):
        if "backward" in tiles:
            raise KeyboardInterrupt
        return 1

    mine = table.with_name(table.name + ".new")
    mine.write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        tuned(table, [NORM], clock(interrupt))
    (first,) = json.loads(table.read_text())["entries"]
    assert first["pass"] == "adaln.forward"
    timer = clock()
    entries = tuned(table, [NORM, NORM], timer)["entries"]  # goes on; a shape's second time is not measured
    assert entries[0] == first
    assert [entry["pass"] for entry in entries] == ["adaln.forward", "adaln.backward"]
    assert all("backward" in tiles for tiles in timer.timed)
    assert {path.name for path in table.parent.iterdir()} == {table.name, mine.name}
    assert mine.read_text() == "mine"


@pytest.mark.interpreter
@pytest.mark.usefixtures("_few_candidates")
def test_no_measurement_begins_after_the_deadline(table):
    tuning.tune(CPU, [NORM], table, clock(), deadline=-math.inf)
    assert not table.exists()


@pytest.mark.interpreter
@pytest.mark.usefixtures("_few_candidates")
def test_another_version_does_not_continue_a_table(table):
    tuned(table, [NORM], clock())
    content = json.loads(table.read_text())
    table.write_text(json.dumps({**content, "torch": "1.0"}))
    with pytest.raises(ValueError, match=r"was measured with .*'torch': '1\.0'.*delete it or name another output"):
        tuned(table, [NORM], clock())


@pytest.mark.parametrize("output", ["file/tiles.json", "/proc/tiles.json"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(output, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuning, "_Trial", None)
    path = tmp_path / output
    with pytest.raises(ValueError, match=f"output is {path}, which cannot be written: "):
        tuning.tune(CPU, [NORM], path, clock())


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
def test_tuning_the_reference_is_refused(monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "reference")
    with pytest.raises(ValueError, match="EDT_KERNELS_BACKEND"):
        tuning._Trial(NORM, CPU)


# Tables in files.

KEY = {"dtype": "float32", "rows": 16, "channels": 40}
ENTRY = {"pass": "adaln.forward", "key": KEY, "tiles": {"forward": {"rows": 2, "num_warps": 1}}}
ATTENTION_KEY = {
    "dtype": "16-bit",
    "height": 16,
    "width": 16,
    "extra_tokens": 0,
    "head_dim": 52,
    "bias": True,
    "modulation": False,
    "many_heads": True,
}
TILE = {"block_m": 64, "block_n": 64, "num_warps": 8, "num_stages": 2}
FORWARD = {"pass": "amm_attention.forward", "key": ATTENTION_KEY, "tiles": {"forward": TILE}}


def changed(entry=ENTRY, **changes):
    return {"device": "NVIDIA H200", "entries": [ENTRY, {**entry, **changes}]}


def short(kernel, block_n=64, **key):
    key = {**ATTENTION_KEY, "height": 8, "width": 8, **key}
    return changed(
        FORWARD, **{"pass": f"amm_attention.{kernel[6:]}"}, key=key, tiles={kernel: {**TILE, "block_n": block_n}}
    )


def resident(block_n, **key):
    tile = {**TILE, "block_n": block_n}
    return changed(FORWARD, key={**ATTENTION_KEY, **key}, tiles={"resident_forward": tile})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no table of tiles"),
        ([], "is no table of tiles"),
        ({"device": "NVIDIA H200"}, "is no table of tiles"),
        ({"entries": []}, "is no table of tiles; it must be JSON with a 'device' and 'entries'"),
        ({"device": "NVIDIA H200", "entries": [3]}, "entry 0: pass is 3"),
        (
            changed(**{"pass": "adaln.sideways"}),
            r"entry 1: pass is 'adaln.sideways'; it must be one of amm_attention",
        ),
        (changed(**{"pass": []}), r"entry 1: pass is \[\]"),
        (changed(key=3), r"key is 3; adaln.forward needs dtype \(str\), rows \(int\), channels \(int\)"),
        (changed(key={"rows": 16}), "key is {'rows': 16}"),
        (changed(key={**KEY, "rows": "16"}), "key is .*'16'"),
        (changed(tiles=[]), r"tiles is \[\]; adaln.forward needs tiles of forward"),
        (changed(tiles={"backward": {"rows": 2, "num_warps": 1}}), "tiles is {'backward'"),
        (changed(FORWARD, tiles={}), "needs tiles of resident_forward or forward"),
        (changed(tiles={"forward": [2, 1]}), r"the tile of forward is \[2, 1\]; it needs rows, num_warps"),
        (changed(tiles={"forward": {"rows": 2}}), "the tile of forward is {'rows': 2}"),
        (changed(tiles={"forward": {"rows": 3, "num_warps": 1}}), "'rows': 3.* power of two"),
        (changed(tiles={"forward": {"rows": 2, "num_warps": True}}), "'num_warps': True"),
        (changed(tiles={"forward": {"rows": 0, "num_warps": 1}}), "'rows': 0"),
        (short("short_backward", block_n=32), "block_m = block_n"),
        (short("short_backward", extra_tokens=1), "for all tokens"),
        (short("short_backward", modulation=True), "without modulation"),
        (resident(block_n=32), "resident_forward block_n = head_dim rounded up"),
        (resident(block_n=64, head_dim=72), "resident_forward block_n = head_dim rounded up"),
    ],
)
def test_malformed_tables(content, message, table):
    table.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        tiles.use(table)
    assert str(table) in str(caught.value)
    assert _tiles.measured == {}


def test_a_missing_table(table):
    with pytest.raises(
        ValueError, match="is no file; it must be a table of tiles, which python -m benchmarks tune"
    ):
        tiles.use(table)


def on(device: str, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")


MEASURED = {**tiles.conditions("NVIDIA H200"), "entries": [ENTRY]}


@pytest.mark.filterwarnings("error")
def test_a_table_in_use_is_for_its_own_keys_and_replaces_the_one_before(table, monkeypatch):
    forgotten = []
    monkeypatch.setattr(_launch, "forget_plans", lambda: forgotten.append(dict(_tiles.measured)))
    on("NVIDIA H200", monkeypatch)
    table.write_text(json.dumps(MEASURED))
    tiles.use(table)
    heuristic = {"forward": RowTile(16, 2)}
    assert _tiles.choose_tiles("adaln.forward", KEY, heuristic) == {"forward": RowTile(2, 1)}
    assert _tiles.choose_tiles("adaln.forward", {**KEY, "rows": 17}, heuristic) is heuristic
    assert _tiles.choose_tiles("gated_residual.forward", KEY, heuristic) is heuristic
    assert len(forgotten[0]) == 1  # once the table was there
    table.write_text(json.dumps({**MEASURED, "entries": []}))
    tiles.use(table)
    assert _tiles.choose_tiles("adaln.forward", KEY, heuristic) is heuristic
    assert len(forgotten) == 2


def test_a_table_of_another_device_is_refused_but_on_a_cpu(table, monkeypatch):
    table.write_text(json.dumps({**MEASURED, "device": "NVIDIA H100"}))
    if not torch.cuda.is_available():
        tiles.use(table)
        assert len(_tiles.measured) == 1
    on("NVIDIA H200", monkeypatch)
    with pytest.raises(
        ValueError, match="was measured on 'NVIDIA H100'; this is 'NVIDIA H200': name a table of it"
    ):
        tiles.use(table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"triton": "1.0"}, r"with {'triton': '1\.0'}; this is {'triton': '"),
        ({"kernels": "of yesterday"}, "with {'kernels': 'of yesterday'}; this is {'kernels'"),
    ],
)
def test_a_table_of_other_kernels_is_used_with_a_warning(changes, message, table, monkeypatch):
    on("NVIDIA H200", monkeypatch)
    table.write_text(json.dumps({**MEASURED, **changes}))
    with pytest.warns(UserWarning, match=f"was measured {message}"):
        tiles.use(table)
    assert len(_tiles.measured) == 1


def test_a_command_takes_the_table_that_the_variable_names(table, monkeypatch, capsys):
    monkeypatch.setenv(tiles.VARIABLE, "nowhere.json")
    assert command.main(["adaln", "--device", "cpu"]) == 2
    assert "nowhere.json is no file; it must be a table of tiles" in capsys.readouterr().err
    table.write_text(json.dumps(changed()))
    monkeypatch.setenv(tiles.VARIABLE, str(table))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["adaln", "--shapes", "none such"]) == 2
    assert list(_tiles.measured.values()) == [{"forward": RowTile(2, 1)}]


def test_the_library_reads_no_table_by_itself(monkeypatch):
    """But what somebody wrote into the module."""
    monkeypatch.setenv("EDT_KERNELS_TILES", "nowhere.json")
    monkeypatch.setenv(tiles.VARIABLE, "nowhere.json")
    heuristic = {"forward": RowTile(16, 2)}
    assert _tiles.choose_tiles("adaln.forward", KEY, heuristic) is heuristic
    for (name, *key), chosen in _tiles.measured.items():
        chosen = {kernel: dataclasses.asdict(tile) for kernel, tile in chosen.items()}
        tiles.check_entry("edt_kernels._tiles.measured", {"pass": name, "key": dict(key), "tiles": chosen})


def test_the_static_report_sees_the_table(table, monkeypatch):
    table.write_text(json.dumps(changed(FORWARD)))
    shape = static.EDT_ATTENTION[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiles.use(table)
    sizes = {
        (launch.kernel, launch.constants["BLOCK_M"], launch.options["num_warps"])
        for launch in static.launches_of(shape, "sm_90")
        if "forward" in launch.kernel
        and launch.signature["bias"] != "constexpr"
        and launch.signature["modulation"] == "constexpr"
    }
    # The table is for many heads: the smaller of the report's two batches is left to dispatch.
    assert sizes == {("forward", 64, 8), ("forward", 128, 8)}


# What is tried.


@pytest.mark.parametrize("tokens", [4, 8, 16, 32])
@pytest.mark.parametrize("modulation", [False, True])
@pytest.mark.parametrize("unit", ["wgmma", "tcgen05", "mma", "mfma", "fma"])
def test_candidates_are_few_and_none_is_known_to_be_wrong(unit, modulation, tokens):
    key = {**ATTENTION_KEY, "height": tokens, "width": tokens, "modulation": modulation}
    static_tiles = attention.tiles_of(unit, tokens**2, 52)
    forward = attention.choose_forward(unit, tokens**2, 52, 1000, modulation)
    backward = attention.choose_backward(unit, tokens**2, 52, 1000, modulation)
    kernels = ("backward_q", "backward_kv", "backward_tables")
    if backward != "backward":
        kernels = ("short_backward",) if backward == "short_backward" else ("resident_backward", "backward_tables")
    for direction, heuristic in (("forward", [forward]), ("backward", kernels)):
        heuristic = {kernel: static_tiles[kernel] for kernel in heuristic}
        ways = tuning.candidates(f"amm_attention.{direction}", key, heuristic, unit)
        assert ways[0][0] == heuristic
        assert sum(len(tried) for _, options in ways for tried in options.values()) <= 180
        for start, options in ways:
            entry = {"pass": f"amm_attention.{direction}", "key": key}
            for kernel, tile in ((kernel, tile) for kernel, tried in options.items() for tile in tried):
                tiles.check_entry("", {**entry, "tiles": tuning._to_json({**start, kernel: tile})})
                rows = getattr(tile, "block_n" if kernel == "backward_kv" else "block_m", None)
                assert not (unit == "wgmma" and rows == 64 and tile.num_warps == 4), (kernel, tile)
                assert kernel != "resident_forward" or tile.block_n == 64, tile
                assert (
                    rows is None
                    or tile in (start[kernel],)
                    or unit == "fma"
                    or (16 * tile.num_warps <= rows or (unit, rows, tile.num_warps) == ("wgmma", 64, 8))
                )


@pytest.mark.parametrize("quick", [False, True])
def test_candidates_of_norms(quick):
    static_tile = RowLoop(4, 4, 264)
    key = {"dtype": "float32", "rows": 256, "channels": 936}
    ((start, options),) = tuning.candidates("adaln.backward", key, {"backward": static_tile}, "wgmma", quick)
    assert start == {"backward": static_tile}
    assert options["backward"][0] == static_tile
    assert len(options["backward"]) <= (12 if quick else 100)
    for tile in options["backward"]:
        different = [a != b for a, b in zip(dataclasses.astuple(tile), dataclasses.astuple(static_tile))]
        assert sum(different) <= (1 if quick else 3)


class FakeHopper:
    """What compiling asks a driver for."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def _fake_hopper(monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "triton")
    monkeypatch.setattr("edt_kernels._backend._INTERPRETED", True)  # so that CPU tensors may pass
    monkeypatch.setattr(tuning, "_compiles", lambda: True)
    monkeypatch.setattr(driver, "_active", FakeHopper())


@pytest.mark.usefixtures("_fake_hopper")
@pytest.mark.parametrize("shape", [NORM, dataclasses.replace(ATTENTION, modulation=True)], ids=lambda s: s.op)
def test_candidates_are_compiled_in_parallel_and_failures_rejected(shape, monkeypatch):
    trial = tuning._Trial(shape, CPU)
    question, heuristic = list(trial.questions.items())[1]
    search = tuning._Search(trial, question, heuristic, {}, [], None, 0.02, lambda: None)
    warmed, warm_up = [], tuning._warm_up

    def fail_for_8_warps(device, kernel, args, kwargs):
        warmed.append(kernel.fn.__name__)
        if kwargs["num_warps"] == 8 if "num_warps" in kwargs else False:
            raise MemoryError
        warm_up(device, kernel, args, kwargs)

    monkeypatch.setattr(tuning, "_warm_up", fail_for_8_warps)
    (kernel, tile), *_ = heuristic.items()
    search._compile([{**heuristic, kernel: dataclasses.replace(tile, num_warps=n)} for n in (1, 8)])
    assert search.rejected == ({"MemoryError": 1} if shape.op == "adaln" else {"MemoryError": 2})
    assert set(warmed) >= (
        {"backward"} if shape.op == "adaln" else {"backward_q", "backward_kv", "backward_tables"}
    )


# The command.


def test_tune_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["tune"]) == 2
    assert capsys.readouterr().err == "benchmarks: error: tune needs a CUDA or ROCm GPU; torch finds none here\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ops", "softmax"], "argument --ops: invalid choice: 'softmax'"),
        (["--models", "EDT-S/3"], "argument --models: invalid choice: 'EDT-S/3'"),
        (["--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["--seconds", "nan"], "seconds is nan; it must be a number of at least 0"),
    ],
)
def test_wrong_options_are_told(args, message, capsys):
    with contextlib.suppress(SystemExit):
        assert command.main(["tune", *args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("ends", [None, KeyboardInterrupt(), RuntimeError("adaln.forward crashed the device")])
def test_the_command_prints_what_was_measured(ends, table, capsys, monkeypatch):
    def tune(device, shapes, path, timer, quick, deadline):
        assert (device, len(shapes), path, quick) == (torch.device("cuda", 0), 12, table, True)
        assert 50 < deadline - time.monotonic() <= 60
        times = {"static_microseconds": 8.0, "microseconds": 6.0, "shape": str(ATTENTION)}
        entry = {**FORWARD, **times, "static_tiles": {"forward": {**TILE, "block_n": 32}}}
        path.write_text(json.dumps({"device": "", "entries": [entry], "faults": []}))
        if ends:
            raise ends

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "tune", tune)
    args = ["--ops", "amm_attention", "--models", "EDT-S/2", "--seconds", "60", "--quick"]
    status = {KeyboardInterrupt: 130, RuntimeError: 1}.get(type(ends), 0)
    assert command.main(["tune", "--output", str(table), *args]) == status
    out, err = capsys.readouterr()
    assert "8.0        6.0  0.750  forward: block_m 64, block_n 64, num_warps 8, num_stages 2" in out
    assert f"The table is {table}; EDT_BENCHMARK_TILES names one to use." in out
    assert ("interrupted" in err, "crashed the device" in err) == (status == 130, status == 1)


def test_the_table_goes_where_results_go(tmp_path, monkeypatch):
    written = []
    on("NVIDIA H200", monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "tune", lambda device, shapes, path, *_, **__: written.append(path))
    monkeypatch.chdir(tmp_path)
    assert command.main(["tune"]) == 0
    assert written == [Path("outputs", "benchmarks", "nvidia-h200", "tiles.json")]


def test_shapes_come_in_the_order_of_their_importance():
    shapes = tuning.shapes_of(("EDT-XL/2", "EDT-B/2", "EDT-S/2"), tiles.OPS, 64, torch.bfloat16)
    assert shapes[0] == Shape("amm_attention", (16, 16), 936, heads=18)
    sides = [shape.grid[0] for shape in shapes]
    assert sides.index(32) == len(shapes) // 2  # 256² pixels are 16×16 tokens
    assert [shape.op for shape in shapes[:10]] == ["amm_attention"] * 9 + ["gated_residual_adaln"]
    assert all(shape.modulation for shape in shapes[-9:])
    stages = {
        (shape.op, shape.grid, shape.channels)
        for shape in tuning.shapes_of(("EDT-digits",), tiles.OPS, 64, torch.bfloat16)
    }
    assert ("token_merge_adaln", (4, 4), 96) in stages


# On a GPU.


@pytest.mark.gpu
def test_gpu_tunes_and_reads_its_table(table, monkeypatch):
    shapes = [
        Shape("amm_attention", (4, 4), 2 * 52, batch_size=8, heads=2),
        Shape("adaln", (8, 8), 312, batch_size=8),
    ]
    gpu = torch.device("cuda", 0)
    tuning.tune(gpu, shapes, table, tuning.graph_microseconds, quick=True)
    entries = json.loads(table.read_text())["entries"]
    assert [entry["pass"] for entry in entries] == [
        f"{shape.op}.{direction}" for shape in shapes for direction in ("forward", "backward")
    ]
    for entry in entries:
        assert 0 < entry["microseconds"] <= entry["static_microseconds"] < 1e4
        assert entry["candidates"] > 1
    tiles.use(table)
    assert len(_tiles.measured) == 4
    for shape in shapes:
        assert tuning._Trial(shape, gpu).fault() is None


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        Shape("amm_attention", (side, side), 6 * 52, batch_size=64, heads=6, modulation=modulation)
        for side in (16, 8, 4)
        for modulation in (False, True)
    ],
    ids=str,
)
def test_gpu_every_candidate_is_right_or_known(shape, table):
    """Every tile that tuning may choose on this device, with the gradients of all inputs."""
    tuning.tune(torch.device("cuda", 0), [shape], table, lambda calls: 1.0)
    content = json.loads(table.read_text())
    assert len(content["entries"]) == 2
    assert content["faults"] == []
