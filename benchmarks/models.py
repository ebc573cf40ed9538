"""EDT against the released operations: suites `model` (forward), `train` (a step) and `sample`.

Peers have the same weights and are given the same batch. Before anything is timed each is checked against our
model on the reference path without autocast: in float32 without TF32, or in float64 where the case itself is in
float32. The error allowed is a multiple of the reference path's own in the case's dtype, plus a rounding step:

model   ‖prediction − exact‖
train   ‖losses − exact‖ of each sample in both passes; ‖gradient − exact‖ over all parameters together; and, more
        loosely, of each by itself, so that a small one cannot be wrong unseen
sample  ‖latents − exact‖ after a few steps from the same noise, with the same noise added in each

Outside of training the weights of products are in autocast's dtype beforehand, for all alike: eager code would
cast them once in each context of autocast, compiled code in each call.

Model FLOP utilisation is the case's operations (`ModelCase`) over its time and the rate of its own products: the
fastest of those of its MLPs, measured by themselves in the case's dtype, and of the large ones of the ceilings.
Sampling is timed over all of a case's steps, on a GPU with CUDA graphs where an implementation has them.
`first_call_seconds` is of the first check, in training without the optimiser; compiled code that an earlier run
left on disk shortens it.
"""

import contextlib
import gc
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from unittest.mock import patch

import torch
from torch import Tensor, nn

from edt.devices import tf32

from . import measure
from .harness import UnavailableError, kernels_backend, recorded
from .measure import Budget, Ceilings, Timing
from .model_workloads import (
    Batch,
    InParts,
    ModelCase,
    Workload,
    build_ours,
    build_released,
    cast_weights,
    draw_batch,
    on_device,
    released_gradients,
)
from .results import OURS, Row

# As in the harness: peers round more often than the reference path, ours must not.
_ERROR_FACTOR = {"ours": 2.0, "variant": 2.0, "peer": 6.0}
# How much looser a parameter's own gradient is judged: its error is a sum of few roundings, and scatters.
_PARAMETER_FACTOR = 4.0
_GRADIENT = "gradient of "
_CHECKED_STEPS = 10
# Of the network in float32 or float64 whose N×N matrices are all in memory.
_SAMPLES_AT_A_TIME = 8
# Up to here the host may be what limits a forward pass: the device's time is measured too, in a CUDA graph.
_LAUNCH_BOUND_BATCH = 8
# A training step or a sampling run is repeated as often as fits, but this often unless that takes too long.
_LONG_REPEATS, _LONG_MS = 5, 10_000


@dataclass(frozen=True)
class Implementation:
    """A way to run EDT."""

    name: str
    role: str = "peer"
    released: bool = False  # the operations as released, in place of our model
    compiled: bool = False
    reference: bool = False  # our model on the reference path
    tf32: bool = False  # no autocast, and TF32 products

    def applies(self, case: ModelCase, device: torch.device) -> bool:
        """Where the kernels do not run, ours is on the reference path; there is no TF32 on a CPU, nor within the
        error that float32 is allowed."""
        if (self.reference or self.tf32) and device.type != "cuda":
            return False
        return not (self.compiled and not case.compiled) and not (self.tf32 and case.dtype == "float32")

    def graphed(self, case: ModelCase, device: torch.device) -> bool:
        """Whether sampling replays CUDA graphs: of ours, the step's own; of what is compiled, Inductor's. At small
        batches the host is else what is measured. Eager code has none, as whoever changes nothing has none."""
        ours = not (self.released or self.reference)
        return case.suite == "sample" and device.type == "cuda" and (ours or self.compiled)

    def backend(self, case: ModelCase, device: torch.device) -> str:
        found = ["PyTorch"] if self.released else [kernels_backend(device)]
        found += ["Inductor"] * self.compiled + ["CUDA graphs"] * self.graphed(case, device)
        return ", ".join(found)

    def build(self, case: ModelCase, device: torch.device) -> nn.Module:
        model = on_device(build_released(case) if self.released else build_ours(case), case, device)
        if case.suite != "train" and not self.tf32:
            cast_weights(model, case.autocast_dtype)
        if self.compiled:
            inductor_graphs = self.graphed(case, device) and self.role == "peer"
            mode = "reduce-overhead" if inductor_graphs else None
            (model.network if self.released else model).compile(dynamic=False, mode=mode)
        return model

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Around each of its calls: the environment is read, and TF32 decided, then."""
        with _reference_backend(self.reference), tf32(self.tf32):
            yield


def implementations(suite: str) -> list[Implementation]:
    return [
        Implementation(OURS, "ours"),
        Implementation("ours + torch.compile", "variant", compiled=True),
        Implementation("eager, released op sequence", released=True),
        Implementation("eager, released op sequence, TF32", released=True, tf32=True),
        Implementation("torch.compile of the released op sequence", released=True, compiled=True),
        Implementation("reference backend", reference=True),
        Implementation("torch.compile of the reference backend", reference=True, compiled=True),
    ]


def _reference_backend(enabled: bool) -> contextlib.AbstractContextManager:
    return patch.dict(os.environ, {"EDT_KERNELS_BACKEND": "reference"} if enabled else {})


def cases(suite: str, device: torch.device, dtypes: list[str], quick: bool) -> list[ModelCase]:
    """The most telling first; `quick`: few, what is soon built and compiled first, and torch.compile there alone.
    On a CPU EDT-S in float32."""
    on_gpu = device.type == "cuda"
    # The ops' "mixed" is what autocast to bfloat16 makes of a model.
    dtypes = [{"mixed": "bfloat16"}.get(dtype, dtype) for dtype in dtypes or ["bfloat16" if on_gpu else "float32"]]
    sampling_steps = 0
    if not on_gpu:
        shapes = [("EDT-S/2", 256, 2 if suite == "sample" else 4)]
        if suite == "sample":
            sampling_steps = 2 if quick else 4
    elif quick:
        shapes = {
            "model": [("EDT-S/2", 256, 64), ("EDT-XL/2", 256, 64), ("EDT-XL/2", 256, 1)],
            "train": [("EDT-S/2", 256, 256), ("EDT-XL/2", 256, 64)],
            "sample": [("EDT-S/2", 256, 64), ("EDT-S/2", 256, 1)],
        }[suite]
        sampling_steps = 10 if suite == "sample" else 0
    else:
        batches = {"model": (64, 1, 256, 8), "train": (256, 64, 8, 1), "sample": (64, 1, 8, 256)}[suite]
        # Where 256 is too much for EDT-XL, for one or for all, the largest that fits is among these.
        batches_xl = (256, 128, 64, 8, 1) if suite == "train" else batches
        shapes = [
            (preset, resolution, batch_size)
            for resolution in (256, 512)
            for preset in ("EDT-XL/2", "EDT-B/2", "EDT-S/2")
            for batch_size in (batches_xl if preset == "EDT-XL/2" else batches)
        ]
        sampling_steps = 250 if suite == "sample" else 0
    return [
        ModelCase(suite, *shape, dtype=dtype, steps=sampling_steps, compiled=not quick or (on_gpu and i == 0))
        for i, shape in enumerate(shapes)
        for dtype in dict.fromkeys(dtypes)
    ]


def _check(case: ModelCase, work: Workload) -> dict[str, Tensor]:
    """What is compared, by name."""
    if case.suite == "model":
        return {"prediction": work.predict()}
    if case.suite == "sample":
        return {"latents": work.sample(min(_CHECKED_STEPS, case.steps))}
    work.model.zero_grad()
    losses = work.losses()
    gradients = released_gradients(work.model)
    return {"losses": losses, **{f"{_GRADIENT}{name}": gradient for name, gradient in gradients.items()}}


def _timed_call(case: ModelCase, work: Workload) -> Callable[[], object]:
    if case.suite == "model":
        return work.predict
    return work.training_step() if case.suite == "train" else lambda: work.sample(case.steps)


@dataclass(frozen=True)
class _Expected:
    """Results of the yardstick, on the CPU, and how far the reference path in the case's dtype is from each."""

    exact: dict[str, Tensor]
    norm: dict[str, float]
    eager_error: dict[str, float]
    eps: float  # of the case's dtype

    def judge(self, results: dict[str, Tensor], role: str) -> tuple[dict[str, float], float]:
        """Errors over what is allowed, by result; and the relative error of all gradients or of the one result."""
        gradients = [name for name in self.exact if name.startswith(_GRADIENT)]
        norm, eager = dict(self.norm), dict(self.eager_error)
        error = {name: _distance(results[name], exact) for name, exact in self.exact.items()}
        judged = "all gradients" if gradients else next(iter(norm))
        if gradients:
            for values in (norm, error, eager):
                values[judged] = math.hypot(*(values[name] for name in gradients))
        ratios = {}
        for name in norm:
            allowed = _ERROR_FACTOR[role] * eager[name] + self.eps * norm[name]
            if name in gradients:  # by chance the reference path may be close: no closer than it is over all
                least = _ERROR_FACTOR[role] * eager[judged] / norm[judged] * norm[name]
                allowed = _PARAMETER_FACTOR * max(allowed, least)
            ratios[name] = error[name] / allowed if allowed > 0 else (0.0 if error[name] == 0 else math.inf)
        return ratios, error[judged] / norm[judged]


def _distance(result: Tensor, exact: Tensor) -> float:
    if result.shape != exact.shape or not result.isfinite().all():
        return math.inf
    return (result.double() - exact.to(result.device, torch.float64)).norm().item()


class Given:
    """What the implementations of a case share, made when the first of them needs it."""

    def __init__(
        self,
        case: ModelCase,
        device: torch.device,
        ceilings: Ceilings | None = None,
        budget: Budget = measure.QUICK,
    ):
        self.case, self.device, self.ceilings, self.budget = case, device, ceilings, budget

    @cached_property
    def parts(self) -> list:
        from edt.model.complexity import cost_table

        return cost_table(build_ours(self.case))

    @property
    def multiply_adds(self) -> int:
        return sum(part.multiply_adds for part in self.parts)

    @cached_property
    def matrix_rate(self) -> float:
        """Operations each second of the fastest products."""
        case, ratio = self.case, build_ours(self.case).config.mlp_ratio
        samples = case.batch_size * (2 if case.steps else 1)  # guidance
        shapes = {(samples * math.prod(part.grid), part.channels, int(ratio * part.channels))
                  for part in self.parts if part.blocks}  # fmt: skip
        shapes |= {(rows, hidden, channels) for rows, channels, hidden in shapes}
        with tf32(False):
            rate = measure.product_rate(shapes, self.device, getattr(torch, case.dtype), self.budget)
        same = self.ceilings.matrix_dtype == case.dtype
        return max(rate, self.ceilings.operations_per_second) if same else rate

    @cached_property
    def batch(self) -> Batch:
        return draw_batch(self.case, self.device)

    @cached_property
    def expected(self) -> _Expected:
        """A few samples at a time, so that batches that fit with the kernels alone can be checked too."""
        case = self.case
        exact = self._on_the_reference_path(torch.float64 if case.dtype == "float32" else torch.float32, None)
        norm = {name: tensor.double().norm().item() for name, tensor in exact.items()}
        exact = {name: tensor.cpu() for name, tensor in exact.items()}  # its memory is the implementations'
        eager = self._on_the_reference_path(torch.float32, case.autocast_dtype)
        error = {name: _distance(eager[name], tensor) for name, tensor in exact.items()}
        if not all(map(math.isfinite, (*norm.values(), *error.values()))):
            raise ValueError(f"the reference path in {case.dtype} is not finite; nothing can be judged by it")
        return _Expected(exact, norm, error, torch.finfo(getattr(torch, case.dtype)).eps)

    def _on_the_reference_path(self, dtype: torch.dtype, autocast_dtype: torch.dtype | None) -> dict[str, Tensor]:
        with _reference_backend(True), tf32(False):
            ours = on_device(build_ours(self.case), self.case, self.device)
            ours = ours.double() if dtype == torch.float64 else ours
            work = Workload(InParts(ours, _SAMPLES_AT_A_TIME), self.batch, autocast_dtype)
            return _check(self.case, work)


def measure_case(
    suite: str,
    case: ModelCase,
    implementations: list[Implementation],
    device: torch.device,
    ceilings: Ceilings,
    budget: Budget,
) -> Iterator[Row]:
    """A row for each implementation that applies. On a GPU one after the other, each alone in its memory; on a CPU
    in turns."""
    given = Given(case, device, ceilings, budget)
    rows, waiting = [], {}
    for implementation in implementations:
        if not implementation.applies(case, device):
            continue
        row = Row(suite, case.name, case.work, case.dtype, case.shape, implementation.name, implementation.role)
        with recorded(row), _failures_named(), implementation.settings():
            call = _measure(row, implementation, given, budget)
            if call is not None:
                waiting[row.implementation] = call
        if device.type == "cuda":
            _free()
            yield _with_rates(row, case)
        else:
            rows.append(row)
    timings = measure.time_in_turn(waiting, budget) if waiting else {}
    waiting.clear()
    _free()
    for row in rows:
        row.ms = timings.get(row.implementation)
        yield _with_rates(row, case)


def _with_rates(row: Row, case: ModelCase) -> Row:
    if row.ms:
        seconds = row.ms.median / 1e3
        row.extra["images_per_second"] = case.batch_size / seconds
        rate = row.extra["matrix_operations_per_second"]
        row.extra["model_flop_utilisation"] = row.operations / seconds / rate
        if case.steps:
            row.extra["ms_per_step"] = row.ms.median / case.steps
    return row


def _measure(
    row: Row, implementation: Implementation, given: Given, budget: Budget
) -> Callable[[], object] | None:
    """Fills the row, on a GPU with times. On a CPU returns what is to be timed."""
    row.extra["multiply_adds"] = given.multiply_adds
    row.operations = given.case.operations(given.multiply_adds)
    row.extra["matrix_operations_per_second"] = given.matrix_rate
    if given.device.type == "cuda":
        row.floor_ms = 1e3 * row.operations / given.matrix_rate
    checked = checked_workload(row, implementation, given)
    if checked is None:
        return None
    work, timed = checked
    if given.device.type == "cuda":
        _time_on_gpu(row, given.case, work, timed, budget)
        return None

    def call() -> None:
        with implementation.settings():
            timed()

    return call


def checked_workload(
    row: Row, implementation: Implementation, given: Given
) -> tuple[Workload, Callable[[], object]] | None:
    """The implementation on the batch, and the call to time; None if it is wrong, as the row then says."""
    case, device = given.case, given.device
    row.backend = implementation.backend(case, device)
    expected = given.expected
    model = implementation.build(case, device)
    own_graph = implementation.graphed(case, device) and implementation.role != "peer"
    work = Workload(model, given.batch, None if implementation.tf32 else case.autocast_dtype, own_graph)
    timed = _timed_call(case, work)  # before anything is spent: raises for missing packages
    results = {}
    row.first_call_seconds = measure.first_call_seconds(lambda: results.update(_check(case, work)), device)
    ratios, row.extra["relative_error"] = expected.judge(results, implementation.role)
    row.worst = max(ratios, key=ratios.get)
    row.error_over_budget = ratios[row.worst]
    if row.error_over_budget > 1:
        row.status = "wrong"
        row.reason = f"{row.worst}: {row.error_over_budget:.3g} times the error allowed"
        return None
    model.zero_grad()
    return work, timed


def _time_on_gpu(row: Row, case: ModelCase, work: Workload, timed: Callable, budget: Budget) -> None:
    short = timed if case.suite != "sample" else lambda: work.sample(min(_CHECKED_STEPS, case.steps))
    short()  # the optimiser makes its state
    row.peak_bytes = measure.peak_bytes(short)
    row.extra["peak_bytes_with_weights"] = torch.cuda.max_memory_allocated()
    if case.suite != "model":
        row.ms = _time_long(timed, budget)
        return
    row.ms = measure.time_events([timed], budget)
    if case.batch_size <= _LAUNCH_BOUND_BATCH:
        try:
            row.graph_ms = measure.time_graph([timed], budget)
        except Exception as error:  # whatever a library does that cannot be captured
            row.reason = f"no CUDA graph: {' '.join(str(error).split())[:300]}"


def _time_long(call: Callable[[], object], budget: Budget) -> Timing:
    """Between CUDA events around each call. One of more than `_LONG_MS` is timed once."""
    times = []
    while (len(times) < _LONG_REPEATS or sum(times) < budget.repeat) and sum(times) < _LONG_MS:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times
    return Timing(statistics.median(times), fifths[0], fifths[-1])


def _free() -> None:
    """What the last implementation leaves: compiled code refers to its weights."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _failures_named() -> Iterator[None]:
    """The status of what is not torch.OutOfMemoryError, such as cuBLAS without a workspace, and of imports."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UnavailableError(f"{package} is not installed", "missing") from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if any(text in str(error) for text in ("out of memory", "ALLOC_FAILED")):
            raise UnavailableError(" ".join(str(error).split())[:300], "out of memory") from error
        raise


if __name__ == "__main__":
    from .__main__ import main as command

    sys.exit(command(["models", *sys.argv[1:]]))
