"""The benchmarks' model suites: what is checked, what is timed, what becomes of an implementation that fails."""

import importlib
import os
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from released import relative_error

import edt
from benchmarks import measure, models
from benchmarks.measure import Budget, Ceilings
from benchmarks.model_workloads import (
    ModelCase,
    Workload,
    build_ours,
    build_released,
    cast_weights,
    draw_batch,
    on_device,
    plain_of,
    released_gradients,
)
from benchmarks.models import Implementation, implementations
from benchmarks.results import Row
from edt.model.presets import PRESETS
from edt.runs.weights import to_released_state_dict

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e11, "float32")
SHORT = Budget(warmup=1, repeat=1, rounds=2)
SUITES = ("model", "train", "sample")
TINY = {
    "num_classes": 10,
    "hidden_sizes": (16, 24, 32, 24, 16),
    "num_attention_heads": (2, 2, 2, 2, 2),
    "depths": (2, 1, 1, 1, 1),
    "amm_blocks": (1, 4),
    "mid_mask": (1, (0.3, 0.4)),
}


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def tiny(suite: str, **changes) -> ModelCase:
    case = ModelCase(suite, "tiny", 128, 3, "float32", steps=3 if suite == "sample" else 0, compiled=False)
    return replace(case, **changes)


def measured(case: ModelCase, *chosen: Implementation):
    return list(
        models.measure_case(case.suite, case, list(chosen) or implementations(case.suite), CPU, CEILINGS, SHORT)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("suite", SUITES)
def test_what_runs_on_a_cpu_is_right_and_timed(suite, dtype):
    case = tiny(suite, dtype=dtype)
    rows = measured(case)
    assert [(row.implementation, row.role, row.status, row.reason) for row in rows] == [
        ("ours", "ours", "ok", ""),
        ("eager, released op sequence", "peer", "ok", ""),
    ]
    assert [row.backend for row in rows] == ["reference path, plain torch", "PyTorch"]
    for row in rows:
        assert row.group == (case.name, case.work, dtype)
        assert 0 <= row.error_over_budget <= 1
        assert row.worst
        assert row.ms.median > 0
        assert row.first_call_seconds > 0
        assert 0 < row.extra["relative_error"] < (1e-5 if dtype == "float32" else 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_compiled_implementations_are_right(suite, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", {**TINY, "depths": (1, 1, 1, 1, 1), "amm_blocks": (3,), "mid_mask": None})
    rows = measured(tiny(suite, compiled=True))
    assert [(row.implementation, row.status, row.reason) for row in rows] == [
        ("ours", "ok", ""),
        ("ours + torch.compile", "ok", ""),
        ("eager, released op sequence", "ok", ""),
        ("torch.compile of the released op sequence", "ok", ""),
    ]
    assert [row.role for row in rows] == ["ours", "variant", "peer", "peer"]


@pytest.mark.parametrize("resolution", [64, 512])
def test_the_released_operations_are_those_of_our_model(resolution):
    """With the masks of the second pass, the one in mid-stage included; at 512² with its modulation."""
    case = tiny("train", resolution=resolution, batch_size=1)
    batch, found = draw_batch(case, CPU), []
    assert len(batch.keep_masks) == 3
    assert build_ours(case).config.amm_form == {64: "exp_cos", 512: "cos"}[resolution]
    for build in (build_ours, build_released):
        work = Workload(on_device(build(case), case, CPU), batch, None)
        losses = work.losses()
        work.model.eval()
        found.append({"losses": losses, "prediction": work.predict(), **released_gradients(work.model)})
    ours, released = found
    assert ours.keys() == released.keys()
    errors = {name: relative_error(released[name], ours[name]) for name in ours}
    assert max(errors.values()) <= 1e-4, errors
    without_mid = replace(batch, keep_masks=[torch.ones_like(batch.keep_masks[0]), *batch.keep_masks[1:]])
    for build in (build_ours, build_released):
        work = Workload(on_device(build(case), case, CPU), without_mid, None)
        work.losses()
        name = "blocks.0.mlp.fc2.weight"
        assert relative_error(released_gradients(work.model)[name], ours[name]) > 1e-2


@pytest.mark.parametrize("resolution", [256, 512])
@pytest.mark.parametrize("preset", ["EDT-S/2", "EDT-B/2", "EDT-XL/2"])
def test_the_released_network_of_each_size_has_its_parameters(preset, resolution):
    config = ModelCase("model", preset, resolution, 1, "bfloat16").config
    with torch.device("meta"):
        ours = edt.EDTTransformer2DModel(**config)
        plain = plain_of(ours.config)
    expected = {name: parameter.shape for name, parameter in to_released_state_dict(ours).items()}
    assert {name: parameter.shape for name, parameter in plain.named_parameters()} == expected
    assert [number for number, block in enumerate(plain.blocks) if block.attn.amm] == sorted(config["amm_blocks"])
    assert plain.mid_block == (4 if preset == "EDT-XL/2" else None)


@pytest.mark.parametrize("build", [build_ours, build_released])
@pytest.mark.parametrize("suite", ["model", "sample"])
def test_weights_cast_beforehand_change_nothing(suite, build):
    case, found = tiny(suite, dtype="bfloat16"), []
    for dtype in (None, torch.bfloat16):
        model = on_device(build(case), case, CPU)
        cast_weights(model, dtype)
        work = Workload(model, draw_batch(case, CPU), torch.bfloat16)
        found.append(models._check(case, work))
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


@pytest.mark.parametrize(("suite", "dtype"), [("model", torch.bfloat16), ("train", torch.float32)])
def test_which_weights_are_cast_beforehand(suite, dtype):
    case = tiny(suite, dtype="bfloat16")
    tf32 = Implementation("TF32", released=True, tf32=True)
    for implementation, expected in ((implementations(suite)[0], dtype), (tf32, torch.float32)):
        model = implementation.build(case, CPU)
        assert {module.weight.dtype for module in model.modules() if isinstance(module, torch.nn.Linear)} == {
            expected
        }
        assert {p.dtype for name, p in model.named_parameters() if "rel_pos_bias" in name} == {torch.float32}


@dataclass(frozen=True)
class Wrong(Implementation):
    """Another weight, or a hook on a gradient."""

    name: str = "wrong"
    released: bool = True
    gradient: bool = False

    def build(self, case, device):
        model = super().build(case, device)
        weight = model.network.blocks[2].attn.rel_pos_bias.relative_position_bias_table
        if self.gradient:
            weight.register_hook(lambda gradient: 2 * gradient)
        else:
            weight.data[0] += 0.5
        return model


@pytest.mark.parametrize(
    ("suite", "gradient", "dtype"),
    [
        ("model", False, "float32"),
        ("train", False, "float32"),
        ("train", True, "float32"),
        ("train", True, "bfloat16"),
        ("sample", False, "float32"),
    ],
)
def test_a_wrong_one_is_reported_and_not_timed(suite, gradient, dtype):
    ours, wrong = measured(tiny(suite, dtype=dtype), implementations(suite)[0], Wrong(gradient=gradient))
    assert (ours.status, wrong.status) == ("ok", "wrong")
    assert "times the error allowed" in wrong.reason
    assert (wrong.ms, wrong.time_ms) == (None, None)
    assert "images_per_second" not in wrong.extra
    if gradient:
        assert wrong.worst == "gradient of blocks.2.attn.rel_pos_bias.relative_position_bias_table"


@pytest.mark.parametrize(("suite", "passes"), [("model", 1), ("train", 6), ("sample", 6)])
def test_rates_by_hand(suite, passes, monkeypatch):
    """Training: 2 passes of forward and backward, 3 forwards each. Sampling: 3 steps with and without labels."""
    monkeypatch.setattr(measure, "product_rate", lambda *arguments: 1e10)
    row = measured(tiny(suite), implementations(suite)[0])[0]
    seconds = row.ms.median / 1e3
    assert row.operations == 2 * passes * 3 * row.extra["multiply_adds"]
    assert row.extra["images_per_second"] == pytest.approx(3 / seconds)
    assert row.extra["model_flop_utilisation"] == pytest.approx(row.operations / seconds / 1e11)
    if suite == "sample":
        assert row.extra["ms_per_step"] == pytest.approx(row.ms.median / 3)


@pytest.mark.parametrize(("dtype", "own", "rate"), [("float32", 2e11, 2e11), ("float32", 1e10, 1e11),
                                                     ("bfloat16", 1e10, 1e10)])  # fmt: skip
def test_the_ceiling_of_a_case_is_of_its_own_products_or_of_large_ones_in_its_dtype(dtype, own, rate, monkeypatch):
    asked = []

    def product_rate(sizes, device, dtype, budget):
        asked.append((set(sizes), dtype))
        return own

    monkeypatch.setattr(measure, "product_rate", product_rate)
    row = measured(tiny("sample", dtype=dtype), implementations("sample")[0])[0]
    utilisation = row.operations / (row.ms.median / 1e3) / rate
    assert row.extra["model_flop_utilisation"] == pytest.approx(utilisation)
    # 3 images with and without their label, of 8×8, 4×4 and 2×2 tokens; MLPs four times as wide.
    widths = {(384, 16), (96, 24), (24, 32)}
    sizes = {(n, c, 4 * c) for n, c in widths} | {(n, 4 * c, c) for n, c in widths}
    assert asked == [(sizes, getattr(torch, dtype))]


def test_multiply_adds_are_the_published_ones():
    case = ModelCase("model", "EDT-S/2", 256, 1, "float32")
    assert round(models.Given(case, CPU).multiply_adds / 1e9, 3) == 2.667


@dataclass(frozen=True)
class Failing(Implementation):
    name: str = "failing"
    reference: bool = True
    error: type[Exception] = ValueError
    text: str = "no such\nthing"

    def applies(self, case, device):
        return True

    def build(self, case, device):
        assert os.environ["EDT_KERNELS_BACKEND"] == "reference"
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if self.tf32 else "ieee")
        raise self.error(self.text)


@pytest.mark.parametrize("before", [None, "reference", ""])
def test_settings_are_restored_after_a_failure(before, monkeypatch):
    monkeypatch.delenv("EDT_KERNELS_BACKEND", raising=False)
    if before is not None:
        monkeypatch.setenv("EDT_KERNELS_BACKEND", before)
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    tf32 = [backend.fp32_precision for backend in backends]
    failing, ours = measured(tiny("model"), Failing(tf32=True), implementations("model")[0])
    assert (failing.status, failing.reason, failing.ms) == ("failed", "ValueError: no such thing", None)
    assert ours.status == "ok"
    assert os.environ.get("EDT_KERNELS_BACKEND") == before
    assert [backend.fp32_precision for backend in backends] == tf32


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        (RuntimeError, "Triton Error [CUDA]: out of memory"),
    ],
)
def test_out_of_memory_is_a_status(error, text):
    failing, ours = measured(tiny("train"), Failing(error=error, text=text), implementations("train")[0])
    assert (failing.status, failing.reason) == ("out of memory", text)
    assert ours.status == "ok"


@pytest.mark.parametrize(
    ("suite", "module", "package"),
    [
        ("train", "pytorch_optimizer", "pytorch_optimizer"),
        ("train", "diffusers.training_utils", "diffusers"),
    ],
)
def test_a_missing_package_is_named(suite, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    for row in measured(tiny(suite)):
        assert (row.status, row.reason, row.ms) == ("missing", f"{package} is not installed", None)


def test_the_yardstick_is_the_same_in_parts(monkeypatch):
    for suite in SUITES:
        case, found = tiny(suite), []
        for samples in (8, 2):
            monkeypatch.setattr(models, "_SAMPLES_AT_A_TIME", samples)
            found.append(models.Given(case, CPU).expected.exact)
        whole, parts = found
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-5)


def test_nothing_passes_where_the_reference_is_not_finite(monkeypatch):
    def overflowing(model, case, device):
        model = on_device(model, case, device)
        next(model.parameters()).data.fill_(float("inf"))
        return model

    monkeypatch.setattr(models, "on_device", overflowing)
    for row in measured(tiny("model")):
        assert (row.status, row.ms) == ("failed", None)
        assert "not finite" in row.reason


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("quick", [True, False])
def test_cases(suite, quick):
    gpu = models.cases(suite, torch.device("cuda"), [], quick)
    assert len(set(gpu)) == len(gpu)
    assert {case.dtype for case in gpu} == {"bfloat16"}
    assert [case.compiled for case in gpu] == [not quick or i == 0 for i in range(len(gpu))]
    for case in gpu:
        assert case.steps == (0 if suite != "sample" else 10 if quick else 250)
    if not quick:
        assert gpu[0].name.startswith("EDT-XL/2 256² B")
        assert {(case.preset, case.resolution) for case in gpu} == {
            (f"EDT-{size}/2", resolution) for size in ("S", "B", "XL") for resolution in (256, 512)
        }
    (cpu,) = models.cases(suite, CPU, [], quick)
    assert (cpu.preset, cpu.dtype, cpu.compiled) == ("EDT-S/2", "float32", not quick)
    assert [case.dtype for case in models.cases(suite, CPU, ["mixed", "bfloat16", "float32"], quick)] == [
        "bfloat16",
        "float32",
    ]


def test_which_implementations_apply():
    def names(device: str, **changes) -> list[str]:
        case = tiny("model", **changes)
        return [i.name for i in implementations("model") if i.applies(case, torch.device(device))]

    everything = [i.name for i in implementations("model")]
    assert names("cuda", dtype="bfloat16", compiled=True) == everything
    assert names("cuda", compiled=True) == [name for name in everything if "TF32" not in name]
    assert not any("compile" in name for name in names("cuda", dtype="bfloat16"))
    assert names("cpu") == ["ours", "eager, released op sequence"]


@pytest.mark.parametrize("implementation", implementations("sample"), ids=lambda one: one.name)
def test_what_replays_cuda_graphs(implementation, monkeypatch):
    """Steps of ours, compiled peers by Inductor; nothing outside of sampling, nothing eager, none on a CPU."""
    gpu, modes = torch.device("cuda"), []
    monkeypatch.setattr(models, "kernels_backend", lambda device: "Triton kernels")
    has_graphs = "compile" in implementation.name or implementation.role == "ours"
    assert implementation.graphed(tiny("sample"), gpu) == has_graphs
    assert ("CUDA graphs" in implementation.backend(tiny("sample"), gpu)) == has_graphs
    assert not any(implementation.graphed(tiny(suite), gpu) for suite in ("model", "train"))
    assert not implementation.graphed(tiny("sample"), CPU)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, dynamic, mode: modes.append(mode))
    monkeypatch.setattr(models, "on_device", lambda model, case, device: on_device(model, case, CPU))
    implementation.build(tiny("sample"), gpu)
    assert modes == ([] if not implementation.compiled else
                     ["reduce-overhead"] if implementation.role == "peer" else [None])  # fmt: skip


def test_the_graph_of_a_workload_is_captured_once(monkeypatch):
    """Not once a call, as `edt.sample` by itself would."""
    given, case = [], tiny("sample")
    importlib.import_module("edt.diffusion.sampler")  # with the true one
    monkeypatch.setattr("edt.diffusion.cuda_graph.GraphedStep", lambda model: ("graph of", model))
    monkeypatch.setattr("edt.diffusion.sampler.sample", lambda *_, cuda_graph, **__: given.append(cuda_graph))
    for cuda_graph in (True, False):
        work = Workload(on_device(build_ours(case), case, CPU), draw_batch(case, CPU), None, cuda_graph)
        for _ in range(2):
            work.sample(2)
    assert given[0] is given[1]
    assert given[2:] == [False, False]


class Event:
    """In place of a CUDA event: each call took 4 s."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 4000.0


@pytest.mark.parametrize(("suite", "batch_size"), [("model", 3), ("model", 9), ("train", 3), ("sample", 3)])
def test_what_is_timed_on_a_gpu(suite, batch_size, monkeypatch):
    """With stand-ins for what needs one."""
    calls, timing = [], measure.Timing(2.0, 1.0, 3.0)

    def peak_bytes(call):
        call()
        return 5

    def time_events(calls, budget):
        calls[0]()
        return timing

    def time_graph(calls, budget):
        raise RuntimeError("not\ncaptured")

    for function in (peak_bytes, time_events, time_graph):
        monkeypatch.setattr(measure, function.__name__, function)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    case = tiny(suite, batch_size=batch_size)
    work = Workload(on_device(build_ours(case), case, CPU), draw_batch(case, CPU), None)
    timed = models._timed_call(case, work)
    row = Row(suite, case.name, case.work, case.dtype, case.shape, "ours", "ours")
    models._time_on_gpu(row, case, work, lambda: calls.append(timed()), SHORT)
    assert (row.status, row.peak_bytes, row.extra["peak_bytes_with_weights"]) == ("ok", 5, 7)
    if suite == "model":
        assert row.ms == timing
        assert row.reason == ("no CUDA graph: not captured" if batch_size <= 8 else "")
    else:
        assert row.ms == measure.Timing(4000.0, 4000.0, 4000.0)
    # Short and for the peak, but in sampling, whose peak needs few steps; three of 4 s are more than enough.
    assert len(calls) == {"model": 3, "train": 5, "sample": 3}[suite]


def test_one_long_call_is_timed_once(monkeypatch):
    monkeypatch.setattr(Event, "elapsed_time", lambda self, end: 20_000.0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert models._time_long(lambda: None, SHORT) == measure.Timing(20_000.0, 20_000.0, 20_000.0)
