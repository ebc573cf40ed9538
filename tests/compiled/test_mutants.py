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
from edt_kernels.amm_attention import autograd

pytestmark = pytest.mark.skipif(bool(build.needs()), reason=build.needs())
BF16 = torch.bfloat16


def run(case) -> None:
    if isinstance(case, Norm):
        norm_cases.run(edt_kernels, case, norm_cases.make_inputs(case, "cpu"))
    else:
        attention_cases.run(edt_kernels.amm_attention, case, attention_cases.make_inputs(case, BF16, "cpu"))


def tally(case, target: str, values: int, kernels: tuple[str, ...]) -> tuple[Counter, list[str]]:
    """How many mutants of each kind are found or missed, and the missed ones; of all kernels if none is named."""
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


# Of each kind, the share that is found at least in every case. What is missed is redundant in that place: a
# barrier right after another one; a proxy fence with nothing written before it; a fence of registers that nobody
# touched since an earlier one; a wait that the next one covers before anybody reads the result, and the groups
# that it splits; a number that no value of the case makes matter.
LEAST_FOUND = {
    "bar.sync": 0.8,
    "cp.async.wait_group": 1.0,
    "cp.async.commit_group": 0.3,
    "wgmma.fence": 0.5,
    "wgmma.commit_group": 0.3,
    "wgmma.wait_group": 0.3,
    "value": 0.7,
}

# Three of the five products of a step follow the fence of another one with no register written between them.
LEAST_FOUND_OF = {"resident_backward": LEAST_FOUND | {"wgmma.fence": 0.4}}

QUICK = [
    ("sm_90", Attention((8, 8), heads=1, batch_size=2, modulation=None), ("forward",)),
    ("sm_80", Attention((16, 16), heads=1, batch_size=1), ("forward",)),
    ("sm_90", Attention((8, 16), heads=1, batch_size=1, modulation=None), ("resident_backward",)),
]
CASES = [
    Attention((16, 16), heads=1, batch_size=1),
    Attention((8, 8), heads=1, batch_size=2, modulation=None),
    Attention((4, 4), heads=1, batch_size=5, modulation=None),
    *(Norm(op, (4, 4), 312, branch=BF16, modulation=BF16) for op in norm_cases.OPS),
]
EVERYTHING = [(target, case, ()) for target in ("sm_90", "sm_80") for case in CASES]
WHOLE_HEAD = Attention((16, 16), heads=1, batch_size=1, modulation=None)
RESIDENT = [("sm_90", WHOLE_HEAD, (kernel,)) for kernel in ("resident_forward", "resident_backward")]


def check(target, case, kernels, record, monkeypatch, values: int) -> None:
    if kernels and kernels[0].startswith("resident"):
        monkeypatch.setattr(autograd, "_RESIDENT_HEADS", 1)
    counts, missed = tally(case, target, values, kernels)
    record("mutants", dict(counts))
    print("\n".join(missed))
    assert counts["bar.sync:found"]
    for kind, least in LEAST_FOUND_OF.get("".join(kernels), LEAST_FOUND).items():
        found, lost = counts[f"{kind}:found"], counts[f"{kind}:missed"]
        assert found >= least * (found + lost), (kind, missed)


@pytest.mark.parametrize(("target", "case", "kernels"), QUICK, ids=str)
def test_most_mutants_are_noticed(target, case, kernels, record_property, monkeypatch):
    check(target, case, kernels, record_property, monkeypatch, values=8)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "case", "kernels"), [*EVERYTHING, *RESIDENT], ids=str)
def test_most_mutants_of_all_kernels_are_noticed(target, case, kernels, record_property, monkeypatch):
    check(target, case, kernels, record_property, monkeypatch, values=12)
