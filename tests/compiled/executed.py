"""What the compiled kernels make of a case, executed on the CPU, and the verdict."""

import functools
import zlib
from dataclasses import dataclass

import attention_cases
import norm_cases
import torch
from torch import Tensor

import edt_kernels
from benchmarks.budget import error_and_budget
from benchmarks.compiled.launch import Executed, executing
from benchmarks.compiled.program import Finding, Schedule

# What is open is decided one way, and then every way the other.
SCHEDULES = (Schedule(), Schedule(backwards=True, adverse=True))
ALL_SCHEDULES = (*SCHEDULES, Schedule(backwards=True), Schedule(adverse=True))


@dataclass
class Verdict:
    over_budget: dict[str, float]  # of each result, its error over its budget
    findings: list[Finding]
    differing: list[str]  # results whose bits depend on the schedule
    launches: list[Executed]

    def summary(self) -> dict:
        """For the report of all tests: see conftest.py."""
        return {
            "launches": len(self.launches),
            "kernels": sorted(
                {f"{launch.target} {launch.launch.module} {launch.kernel}" for launch in self.launches}
            ),
            "codes": sorted({f"{zlib.crc32(launch.program.kernel.text.encode()):x}" for launch in self.launches}),
            "instructions": sum(launch.run.executed for launch in self.launches),
            "over_budget": max(self.over_budget.values()),
        }

    def faults(self) -> list[str]:
        too_far = [
            f"{name}: error {ratio:.2f} of its budget" for name, ratio in self.over_budget.items() if ratio > 1
        ]
        return (
            too_far
            + list(map(str, self.findings))
            + [f"{name} depends on the schedule" for name in self.differing]
        )


def judge(case, dtype: torch.dtype, target: str, schedules=SCHEDULES, **options) -> Verdict:
    """Runs an op's case, forward and backward, under each schedule; `options` are those of `executing`."""
    run, judges = _reference(case, dtype)
    results, launches = [], []
    for schedule in schedules:
        with executing(target, schedule, **options) as executed:
            results.append(run())
        launches += executed
    ratios = {}
    for name, (exact, eager, slack) in judges.items():
        error, budget = error_and_budget(results[0][name], exact, eager, slack=slack)
        ratios[name] = error / budget if budget else float(error > 0)
    differing = [name for name in judges if any(not _same_bits(r[name], results[0][name]) for r in results)]
    return Verdict(ratios, [f for launch in launches for f in launch.findings], differing, launches)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


@functools.lru_cache(maxsize=64)
def _reference(case, dtype: torch.dtype):
    """A function that runs the case on the kernels, and by what its results are judged."""
    if isinstance(case, norm_cases.Case):
        inputs = norm_cases.make_inputs(case, "cpu")
        judges = {name: (*pair, 0.0) for name, pair in norm_cases.references(case, inputs).items()}
        return functools.partial(norm_cases.run, edt_kernels, case, inputs), judges
    inputs = attention_cases.make_inputs(case, dtype, "cpu")
    judges = {
        name: (judge.exact, judge.eager, judge.slack)
        for name, judge in attention_cases.references(case, dtype, inputs).items()
    }
    return functools.partial(attention_cases.run, edt_kernels.amm_attention, case, inputs), judges
