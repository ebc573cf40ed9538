"""The benchmarks' harness on the norm suites: what is checked, what is timed, what is reported as wrong."""

import dataclasses
import functools
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import attention, harness, measure, norms, results, suites
from benchmarks.harness import Implementation, UnavailableError
from benchmarks.measure import Budget, Ceilings
from benchmarks.norms import NormCase
from benchmarks.shapes import NormShape

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e11, "float32")
SHORT = Budget(warmup=1, repeat=1, rounds=2)
LAYER = NormShape("tiny", (4, 4), 24, resizes=True)
CASES = [
    NormCase(op, LAYER, 3, "float32", backward, has_keep=op == "token_merge_adaln")
    for ops in norms.SUITE_OPS.values()
    for op in ops
    for backward in (False, True)
]


def measured(case: NormCase, *implementations: Implementation) -> list[results.Row]:
    return list(harness.measure_case("adaln", case, list(implementations), CPU, CEILINGS, SHORT))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.work}")
def test_ours_and_eager_are_right_and_timed(case):
    rows = measured(case, norms.Ours(), norms.Eager())
    assert [(row.implementation, row.role, row.status) for row in rows] == [
        ("ours", "ours", "ok"),
        ("eager", "peer", "ok"),
    ]
    for row in rows:
        assert row.ms.p20 <= row.ms.median <= row.ms.p80
        assert row.error_over_budget <= 1
        assert row.backend
    assert results.speedup(*rows) == rows[1].ms.median / rows[0].ms.median


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
@pytest.mark.parametrize("op", [op for ops in norms.SUITE_OPS.values() for op in ops])
def test_low_precision_cases_are_right(op, dtype):
    case = NormCase(op, LAYER, 3, dtype, backward=True)
    assert [row.status for row in measured(case, norms.Ours(), norms.Eager())] == ["ok", "ok"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.work}")
@pytest.mark.parametrize("peer", [norms.Compiled, norms.CompiledStatic])
def test_compiled_peers_are_right(peer, case):
    assert [row.status for row in measured(case, peer())] == ["ok"]


@pytest.mark.parametrize("peer", [norms.Compiled, norms.CompiledStatic])
def test_compiled_peers_never_run_eagerly(peer, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    cases = [dataclasses.replace(CASES[1], layer=LAYER._replace(channels=24 + i)) for i in range(3)]
    compiled = peer()

    def run_all():
        for case in cases:
            harness.build_call(compiled, case, case.make_inputs(CPU, seed=0))()

    limit, error = torch._dynamo.config.patch(recompile_limit=2), torch._dynamo.exc.FailOnRecompileLimitHit
    with limit, pytest.raises(error):
        run_all()
    assert measured(CASES[1], compiled)[0].status == "ok"


class WrongOutput(norms.Ours):
    name = "ours"

    def forward(self, case, inputs):
        return super().forward(case, {**inputs, "shift": inputs["shift"] + 0.01})


class WrongGradient(norms.Ours):
    """Right forward; the gradient of scale lacks a sample."""

    name = "ours"

    def forward(self, case, inputs):
        scale = inputs["scale"]
        if scale.requires_grad:
            scale = torch.cat([scale[:1].detach(), scale[1:]])
        return super().forward(case, {**inputs, "scale": scale})


@pytest.mark.parametrize(
    ("wrong", "result"), [(WrongOutput, "output 1"), (WrongGradient, "grad of scale")], ids=["output", "gradient"]
)
def test_a_wrong_kernel_is_reported_and_not_timed(wrong, result):
    case = NormCase("gated_residual_adaln", LAYER, 3, "float32", backward=True)
    row, eager = measured(case, wrong(), norms.Eager())
    assert row.status == "wrong"
    assert result in row.reason
    assert row.error_over_budget > 1
    assert (row.ms, row.time_ms, row.fraction_of_floor) == (None, None, None)
    assert results.speedup(row, eager) is None
    assert "wrong: " in harness.table([row, eager])


@pytest.mark.parametrize(
    "broken", [torch.zeros(3, 16, 23), torch.full((3, 16, 24), float("nan"))], ids=["shape", "NaN"]
)
def test_results_of_another_shape_or_not_finite_are_wrong(broken):
    class Broken(norms.Ours):
        def forward(self, case, inputs):
            return (broken,)

    row = measured(NormCase("adaln", LAYER, 3, "float32", backward=False), Broken())[0]
    assert (row.status, row.error_over_budget) == ("wrong", float("inf"))


def test_one_that_fails_does_not_stop_the_others():
    class Failing(norms.Eager):
        name = "failing"

        def forward(self, case, inputs):
            raise RuntimeError("no kernel\nimage")

    class Missing(norms.Eager):
        name = "missing"

        def check(self, case, device):
            raise UnavailableError("package is not installed", "missing")

    rows = measured(CASES[0], Failing(), Missing(), norms.Liger(), norms.Ours())
    assert [(row.status, row.reason) for row in rows] == [
        ("failed", "RuntimeError: no kernel image"),
        ("missing", "package is not installed"),
        ("unsupported", "its kernels need a GPU"),
        ("ok", ""),
    ]


def test_a_reference_that_does_not_fit_is_named(monkeypatch):
    def too_large(case, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(harness, "expected", too_large)
    (row,) = measured(CASES[0], norms.Ours())
    assert (row.status, row.reason) == ("out of memory", "the float64 reference: CUDA out of memory")


def test_the_reference_is_the_same_in_parts(monkeypatch):
    case = NormCase("gated_residual_adaln", LAYER, 5, "float32", backward=True)
    inputs = case.make_inputs(CPU, seed=0)
    whole = harness.expected(case, inputs)
    monkeypatch.setattr(harness, "_REFERENCE_BYTES", 2 * case.reference_bytes)
    for results_whole, results_parts in zip(whole, harness.expected(case, inputs), strict=True):
        assert results_whole.keys() == results_parts.keys()
        for name, tensor in results_whole.items():
            torch.testing.assert_close(results_parts[name], tensor)


def test_selection_by_name():
    names = ["EDT-S/2 16x16", "EDT-S/2 8x8", "EDT-XL/2 16x16"]
    assert harness.selected(names, ["edt-s"], str, "shapes") == names[:2]
    assert harness.selected(names, ["8x8", "XL"], str, "shapes") == names[1:]
    assert harness.selected(names, None, str, "shapes") == names
    assert harness.selected(names, [], str, "peers") == []
    with pytest.raises(ValueError, match=r"shapes is 'EDT-L', which none of these names contains: EDT-S/2 16x16"):
        harness.selected(names, ["EDT-L"], str, "shapes")


def test_all_takes_what_any_suite_has():
    cases, peers = suites.choose(results.SUITES, CPU, [], True, ["8x8"], ["flash", "liger"])
    assert list(cases) == ["attention", "adaln"]  # of the CPU's quick cases
    assert {case.layer.grid for case in cases["adaln"]} == {(8, 8)}
    assert [one.name for one in peers["attention"]] == ["SDPA flash", "FlashAttention 4"]
    liger = ["Liger-Kernel LayerNorm + torch", "Liger-Kernel modulated RMSNorm"]
    assert [one.name for one in peers["merge"]] == liger
    cases, peers = suites.choose(results.SUITES, CPU, [], True, None, None)
    assert list(cases) == list(peers) == list(results.SUITES)
    with pytest.raises(ValueError, match=r"peers is 'sage', which none of these names contains: eager, as"):
        suites.choose(results.SUITES, CPU, [], True, None, ["sage"])


def test_turns_are_counted_and_reversed():
    order = []
    timings = measure.time_in_turn(
        {name: lambda name=name: order.append(name) for name in "ab"}, Budget(repeat=0, rounds=4)
    )
    assert "".join(order) == "abba" * 3
    assert timings.keys() == {"a", "b"}


def test_the_fastest_of_several_products_is_the_ceiling(monkeypatch):
    """A product of 512³ takes 1 ms, others 100, and a copy of 128 MiB 200."""

    def fast_ms(call, device, budget):
        if not hasattr(call, "args"):
            return 200.0
        x, weight = call.args
        assert call().shape == (len(x), len(weight))
        return 1.0 if x.shape == (512, 512) else 100.0

    monkeypatch.setattr(measure, "_fast_ms", fast_ms)
    found = measure.measure_ceilings(CPU, torch.float32, SHORT)
    assert found.operations_per_second == pytest.approx(2 * 512**3 * 1e3)
    assert found.copy_bytes_per_second == pytest.approx(2 * 2**27 * 5)


def test_a_busy_moment_does_not_lower_a_ceiling(monkeypatch):
    """Of calls that take 9, 2 and 7 s the fastest counts."""
    clock = iter([0, 9, 10, 12, 20, 27])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert measure._fast_ms(lambda: None, CPU, Budget(warmup=0, repeat=0, rounds=3)) == 2000


def test_floor_is_the_longer_of_bytes_and_operations():
    ceilings = Ceilings(copy_bytes_per_second=2e12, operations_per_second=5e14, matrix_dtype="bfloat16")
    assert ceilings.floor_ms(4_000_000, 0) == pytest.approx(0.002)
    assert ceilings.floor_ms(4_000_000, 5_000_000_000) == pytest.approx(0.01)


def test_the_command_measures_what_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "QUICK", SHORT)
    shape = "gated_residual_adaln EDT-S/2 8x8"
    arguments = ["adaln", "--quick", "--device", "cpu", "--out", str(tmp_path), "--shapes", shape]
    assert command.main([*arguments, "--peers", "eager"]) == 0
    stored = results.load(tmp_path / "adaln.json")
    assert {row.implementation for row in stored.rows} == {"ours", "eager"}
    assert {row.case for row in stored.rows} == {f"{shape} C416 B4"}
    assert {row.work for row in stored.rows} == {"forward", "forward+backward"}
    assert stored.environment["device"] == "cpu"
    assert {row.backend for row in stored.rows if row.role == "ours"} == {"reference path, plain torch"}
    assert (tmp_path / "adaln.csv").read_text().count("\n") == 1 + len(stored.rows)
    assert "these are times of this CPU" in capsys.readouterr().out

    assert command.main([*arguments[:-1], "C4160"]) == 2
    assert "shapes is 'C4160', which none of these names contains" in capsys.readouterr().err
    assert command.main([*arguments, "--peers", "FlashLayerNorm"]) == 2
    assert "peers is 'FlashLayerNorm'" in capsys.readouterr().err


def test_a_bare_image_measures_without_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suites, "tqdm", None)
    monkeypatch.setattr(measure, "QUICK", SHORT)
    arguments = ["adaln", "--quick", "--device", "cpu", "--out", str(tmp_path), "--peers"]
    assert command.main([*arguments, "--shapes", "gated_residual_adaln EDT-S/2 4x4"]) == 0
    assert "gated_residual_adaln EDT-S/2 4x4 C520 B4 · forward · float32" in capsys.readouterr().out


def test_a_wrong_kernel_fails_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "QUICK", SHORT)
    monkeypatch.setattr(norms, "Ours", WrongOutput)
    arguments = ["adaln", "--quick", "--device", "cpu", "--out", str(tmp_path), "--peers"]
    assert command.main([*arguments, "--shapes", "gated_residual_adaln EDT-S/2 4x4"]) == 1
    assert "ours wrong: adaln gated_residual_adaln EDT-S/2 4x4 C520 B4" in capsys.readouterr().err


def test_measuring_needs_no_matplotlib():
    code = "import sys; import benchmarks.suites, benchmarks.report; print('matplotlib' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_comes_after_a_lost_device_is_not_blamed(tmp_path, monkeypatch):
    def fail(case, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "QUICK", SHORT)
    monkeypatch.setattr(norms.Ours, "check", lambda self, *arguments: fail(*arguments))
    monkeypatch.setattr(suites, "is_lost", lambda device: True)
    arguments = ["split", "--quick", "--device", "cpu", "--out", str(tmp_path), "--peers", "eager"]
    with pytest.raises(SystemExit, match=r"the GPU is lost since ours, token_split_concat_adaln .* illegal mem"):
        command.main(arguments)
    assert [row.implementation for row in results.load(tmp_path / "split.json").rows] == ["ours"]


@pytest.mark.parametrize("suite", ["attention", *norms.SUITE_OPS])
def test_input_sets_exceed_the_cache(suite):
    """Of 50 MB, on H100 and H200, but for what is so small that launches are what it takes."""
    module, cache = norms if suite in norms.SUITE_OPS else attention, 50 * 2**20
    for case in module.cases(suite, torch.device("cuda"), [], quick=False):
        size = dataclasses.replace(case, backward=False).cost.bytes  # about what the inputs are
        assert harness.input_sets(size, cache) * size > cache, case.name


def test_a_command_without_a_gpu_refuses_one(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["adaln", "--device", "cuda"]) == 2
    assert "device is 'cuda'; torch sees no GPU here" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.work}")
def test_every_measurement_on_a_gpu(case):
    device = torch.device("cuda")
    rows = list(
        harness.measure_case(
            "adaln",
            dataclasses.replace(case, dtype="mixed"),
            norms.implementations("adaln"),
            device,
            CEILINGS,
            SHORT,
        )
    )
    assert rows[0].status == rows[1].status == "ok", rows
    for row in rows:
        if row.status == "ok":
            assert min(row.ms.median, row.graph_ms.median, row.peak_bytes) > 0
        else:
            assert row.status in ("missing", "unsupported"), row


@pytest.mark.gpu
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other workers use the GPU meanwhile")
def test_clocks_of_a_gpu_agree():
    """On a copy long enough that launching it does not show."""
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    calls = [lambda: target.copy_(source)]
    events, graph = (time(calls, Budget()) for time in (measure.time_events, measure.time_graph))
    assert events.median == pytest.approx(graph.median, rel=0.1)
    bandwidth = measure.measure_ceilings(torch.device("cuda"), torch.bfloat16, Budget()).copy_bytes_per_second
    assert bandwidth == pytest.approx(2 * 4 * 2**28 / events.median * 1e3, rel=0.1)
