"""Does the executor see what it should? Compiled kernels of which one instruction is removed or changed."""

from collections import Counter

import attention_cases
import norm_cases
import pytest
import torch
from attention_cases import Case as Attention
from mutants import launches, mutants
from norm_cases import Case as Norm

import edt_kernels
from benchmarks.compiled import build

pytestmark = pytest.mark.skipif(bool(build.needs()), reason=build.needs())
BF16 = torch.bfloat16


def run(case) -> None:
    if isinstance(case, Norm):
        norm_cases.run(edt_kernels, case, norm_cases.make_inputs(case, "cpu"))
    else:
        attention_cases.run(edt_kernels.amm_attention, case, attention_cases.make_inputs(case, BF16, "cpu"))


def tally(case, target: str, values: int, kernels: tuple[str, ...] = ()) -> tuple[Counter, list[str]]:
    """How many mutants of each kind were found or missed, and the missed ones."""
    counts, missed = Counter(), []
    for name, launch in launches(lambda: run(case), target).items():
        if kernels and name not in kernels:
            continue
        assert not launch.notices(launch.program)  # itself
        for mutant in mutants(launch.program, values):
            found = launch.notices(mutant.program)
            counts[f"{mutant.kind}:{'found' if found else 'missed'}"] += 1
            if not found:
                missed.append(f"{name}: {mutant.change}")
    return counts, missed


def rate(counts: Counter, kind: str) -> float:
    found, missed = counts[f"{kind}:found"], counts[f"{kind}:missed"]
    return found / (found + missed) if found + missed else 1.0


QUICK = [("sm_90", Attention((8, 8), heads=1, batch_size=2, modulation=None), ("short_forward",)),
         ("sm_80", Attention((16, 16), heads=1, batch_size=1), ("forward",))]  # fmt: skip


@pytest.mark.parametrize(("target", "case", "kernels"), QUICK, ids=str)
def test_a_mutant_is_noticed(target, case, kernels, record_property):
    counts, missed = tally(case, target, 8, kernels)
    record_property("mutants", dict(counts))
    print("\n".join(missed))
