"""One case of an op through every implementation: checked against float64, then timed, on a GPU or a CPU."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edt_kernels._backend import select_backend

from . import measure
from .budget import error_and_budget
from .costs import Cost
from .measure import Budget, Ceilings
from .results import OURS, Row, speedup

# A kernel is held to twice eager's own error. A peer is not wrong for rounding more often than eager, to the
# coarsest dtype of the case (as autocast does in gate·y), but it is where it computes something else.
_EAGER_FACTOR = {"ours": 2.0, "peer": 6.0, "bound": 6.0}
_ROUNDINGS_OF_PEERS = 4
# Float64 matrices of the reference at a time.
_REFERENCE_BYTES = 2**31
_INPUT_SETS = 64  # at most


class UnavailableError(Exception):
    """An implementation cannot take a case: `status` is "missing" (a package) or "unsupported"."""

    def __init__(self, reason: str, status: str = "unsupported"):
        super().__init__(reason)
        self.status = status


class Case(Protocol):
    """What an op computes on which shape. Frozen, so that cases that compute the same are equal."""

    dtype: str
    backward: bool

    @property
    def name(self) -> str: ...
    @property
    def work(self) -> str: ...
    @property
    def shape(self) -> dict[str, object]: ...
    @property
    def cost(self) -> Cost: ...
    @property
    def reference_bytes(self) -> int:
        """Of the float64 tensors that the reference makes for one sample."""

    def make_inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """By argument, and the upstream gradients as "grad 0", "grad 1" by output. (B, …), but for tables."""

    def differentiated(self) -> tuple[str, ...]:
        """The inputs whose gradients are taken."""

    def batched(self, name: str) -> bool:
        """Whether an input has a batch dimension."""

    def reference(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]: ...


class Implementation:
    """A way to compute cases of an op. Ours and each peer are one."""

    name: str
    backend = ""
    compiled = False  # by torch.compile, which takes its time at each shape

    def check(self, case: Case, device: torch.device) -> None:
        """Raises UnavailableError."""

    def computes(self, case: Case) -> Case:
        """The case itself, or the smaller one that this computes in its place: a lower bound."""
        return case

    def prepare(self, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs in the layout that this likes best. Not timed."""
        return inputs

    def forward(self, case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def restore(self, case: Case, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undoes `prepare` in "output i" and "grad of <input>"."""
        return results


def role_of(implementation: Implementation, case: Case) -> str:
    if implementation.name == OURS:
        return "ours"
    return "peer" if implementation.computes(case) == case else "bound"


def build_call(implementation: Implementation, case: Case, inputs: dict[str, Tensor]) -> Callable[[], dict]:
    """What is timed: forward, and where the case says so the gradients of `differentiated`. Returns a dict of
    "output i" and "grad of <input>" by name."""
    inputs = {
        name: tensor.detach().requires_grad_(case.backward and name in case.differentiated())
        for name, tensor in implementation.prepare(case, inputs).items()
    }
    upstream = [inputs.pop(name) for name in sorted(inputs) if name.startswith("grad ")]
    leaves = {name: inputs[name] for name in case.differentiated()}

    def call() -> dict[str, Tensor]:
        with torch.set_grad_enabled(case.backward):
            outputs = implementation.forward(case, inputs)
        results = {f"output {i}": output for i, output in enumerate(outputs)}
        if case.backward:
            gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
            results |= {f"grad of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return results

    return call


class _Reference(Implementation):
    name = "reference"

    def forward(self, case, inputs):
        return case.reference(inputs)


def expected(case: Case, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's outputs and gradients in float64, and in the inputs' own dtypes. A few samples at a time, so
    that the matrices of large cases fit; gradients of tables are summed over them in float64."""
    batch_size = next(len(tensor) for name, tensor in inputs.items() if case.batched(name))
    samples = max(1, _REFERENCE_BYTES // case.reference_bytes)
    exact, eager = {}, {}
    for first in range(0, batch_size, samples):
        part = {
            name: tensor[first : first + samples] if case.batched(name) else tensor
            for name, tensor in inputs.items()
        }
        double = {name: t.double() if t.is_floating_point() else t for name, t in part.items()}
        for results, arguments in ((exact, double), (eager, part)):
            for name, tensor in build_call(_Reference(), case, arguments)().items():
                results.setdefault(name, []).append(tensor.detach())
    for results in (exact, eager):
        for name, parts in results.items():
            if name.startswith("output") or case.batched(name.removeprefix("grad of ")):
                results[name] = torch.cat(parts)
            else:
                results[name] = torch.stack(parts).double().sum(0).to(parts[0].dtype)
    return exact, eager


def worst_error(
    results: dict[str, Tensor],
    exact: dict[str, Tensor],
    eager: dict[str, Tensor],
    role: str,
    coarsest: torch.dtype,
) -> tuple[str, float]:
    """The name of the result that is farthest off, and its error over its budget; wrong if that exceeds 1.
    `coarsest` is the dtype of the case that rounds most."""
    ratios = {}
    for name in exact:
        slack = 0.0
        if role != "ours":
            slack = _ROUNDINGS_OF_PEERS * torch.finfo(coarsest).eps * exact[name].norm().item()
        error, budget = error_and_budget(
            results[name].detach(), exact[name], eager[name], eager_factor=_EAGER_FACTOR[role], slack=slack
        )
        ratios[name] = error / budget if budget > 0 else (0.0 if error == 0 else float("inf"))
    worst = max(ratios, key=ratios.get)
    return worst, ratios[worst]


def coarsest_dtype(inputs: dict[str, Tensor]) -> torch.dtype:
    """Of the floating inputs, the one with the largest rounding step."""
    dtypes = {tensor.dtype for tensor in inputs.values() if tensor.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def input_sets(num_bytes: int, l2_bytes: int) -> int:
    """How many sets of inputs of this size exceed the L2 cache twice."""
    return min(_INPUT_SETS, 2 * l2_bytes // num_bytes + 1)


@dataclass
class _Candidate:
    row: Row
    calls: list[Callable[[], dict]]


def measure_case(
    suite: str,
    case: Case,
    implementations: list[Implementation],
    device: torch.device,
    ceilings: Ceilings,
    budget: Budget,
) -> Iterator[Row]:
    """A row for each implementation: on a GPU as soon as it is measured, on a CPU, where they take turns, at the
    end. One that is wrong is not timed, one that fails does not stop the others."""
    torch._dynamo.reset()  # recompilations are limited
    inputs = case.make_inputs(device, seed=0)
    sets = [inputs]
    if device.type == "cuda":
        size = sum(tensor.numel() * tensor.element_size() for tensor in inputs.values())
        sets += [case.make_inputs(device, seed) for seed in range(1, input_sets(size, measure.l2_bytes(device)))]
    references: dict[Case, tuple[dict, dict]] = {}
    candidates = []
    for implementation in implementations:
        candidate = _check(suite, case, implementation, sets, references, device, ceilings)
        if device.type == "cuda":
            if candidate.row.status == "ok":
                _time_on_gpu(candidate, budget)
            yield candidate.row
        else:
            candidates.append(candidate)
    calls = {c.row.implementation: c.calls[0] for c in candidates if c.row.status == "ok"}
    timings = measure.time_in_turn(calls, budget) if calls else {}
    for candidate in candidates:
        candidate.row.ms = timings.get(candidate.row.implementation)
        yield candidate.row


def _check(suite, case, implementation, sets, references, device, ceilings) -> _Candidate:
    cost, role = case.cost, role_of(implementation, case)
    row = Row(
        suite, case.name, case.work, case.dtype, case.shape, implementation.name, role,
        bytes=cost.bytes, operations=cost.operations,
        # None on a CPU, whose caches hold what these cases move.
        floor_ms=ceilings.floor_ms(cost.bytes, cost.operations) if device.type == "cuda" else None,
    )  # fmt: skip
    calls = []
    with recorded(row):
        implementation.check(case, device)
        row.backend = implementation.backend  # some learn it from the device
        computed = implementation.computes(case)
        if computed not in references:
            try:
                references[computed] = expected(computed, sets[0])
            except torch.OutOfMemoryError as error:  # not for the implementation to answer for
                reason = f"the float64 reference: {_one_line(error)}"
                raise UnavailableError(reason, "out of memory") from error
        calls = [build_call(implementation, computed, inputs) for inputs in sets]
        row.first_call_seconds = measure.first_call_seconds(calls[0], device)
        results = implementation.restore(computed, calls[0]())
        row.worst, row.error_over_budget = worst_error(
            results, *references[computed], role, coarsest_dtype(sets[0])
        )
        if row.error_over_budget > 1:
            row.status = "wrong"
            row.reason = f"{row.worst}: {row.error_over_budget:.3g} times the error allowed"
        elif device.type == "cuda":
            del results
            row.peak_bytes = measure.peak_bytes(calls[0])
    return _Candidate(row, calls)


def _time_on_gpu(candidate: _Candidate, budget: Budget) -> None:
    row = candidate.row
    with recorded(row):
        row.ms = measure.time_events(candidate.calls, budget)
        try:
            row.graph_ms = measure.time_graph(candidate.calls, budget)
        except Exception as error:  # whatever a library does that cannot be captured
            row.reason = f"no CUDA graph: {_one_line(error)}"
    candidate.calls.clear()
    gc.collect()


class recorded:  # noqa: N801
    """Turns what an implementation raises into its row's status."""

    def __init__(self, row: Row):
        self.row = row

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        if error is None or not isinstance(error, Exception):
            return False  # Ctrl-C
        if isinstance(error, UnavailableError):
            self.row.status, self.row.reason = error.status, str(error)
        elif isinstance(error, torch.OutOfMemoryError):
            self.row.status, self.row.reason = "out of memory", _one_line(error)
            torch.cuda.empty_cache()
        else:
            self.row.status, self.row.reason = "failed", f"{type(error).__name__}: {_one_line(error)}"
        return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def kernels_backend(device: torch.device) -> str:
    """What `edt_kernels` runs on the device."""
    backend = select_backend(q=torch.empty(0, device=device))
    return {"triton": "Triton kernels", "reference": "reference path, plain torch"}[backend]


def selected(items: list, patterns: list[str] | None, name: Callable[[object], str], argument: str) -> list:
    """Items whose name contains any of the patterns, in any case of letters; all of them for None.

    Raises:
        ValueError: for a pattern that no name contains.
    """
    if patterns is None:
        return items
    for pattern in patterns:
        if not any(pattern.lower() in name(item).lower() for item in items):
            known = ", ".join(dict.fromkeys(map(name, items)))
            raise ValueError(f"{argument} is {pattern!r}, which none of these names contains: {known}")
    return [item for item in items if any(pattern.lower() in name(item).lower() for pattern in patterns)]


def table(rows: list[Row]) -> str:
    """The rows of one case as text; the ratio is their time over ours."""
    ours = next((row for row in rows if row.role == "ours" and row.status == "ok"), None)
    lines = [f"{rows[0].case} · {rows[0].work} · {rows[0].dtype}"]
    for row in rows:
        start = f"  {row.implementation:42} {row.role:8} "
        if row.status != "ok":
            lines.append(f"{start}{row.status}: {row.reason}")
            continue
        ratio = speedup(ours, row) if ours else None
        times = f"{row.ms.median:9.4f} ms" + (f", graph {row.graph_ms.median:9.4f}" if row.graph_ms else "")
        fraction = f", {row.fraction_of_floor:4.0%} of floor" if row.fraction_of_floor else ""
        peak = f", {row.peak_bytes / 2**20:8.1f} MiB" if row.peak_bytes is not None else ""
        lines.append(f"{start}{times}{f', ×{ratio:.2f}' if ratio else ''}{fraction}{peak}")
    return "\n".join(lines)
