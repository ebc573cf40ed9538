"""The ops' cases under pytest-benchmark, to see whether a change made anything slower:

    pytest benchmarks -k ours --benchmark-save=before           # on the commit to compare with
    pytest benchmarks -k ours --benchmark-compare --benchmark-compare-fail=median:10%

Each is checked against float64 before it is timed. Times include the host's: each call waits for the
device. On a busy machine compare ratios of a group, ours against eager, instead.
"""

import pytest
import torch

from benchmarks import attention, norms
from benchmarks.conftest import DEVICE
from benchmarks.harness import UnavailableError, build_call, coarsest_dtype, expected, role_of, worst_error


def pytest_generate_tests(metafunc):
    quick = not metafunc.config.getoption("all_cases")
    arguments, names = [], []
    for suite, module in (("attention", attention), *((suite, norms) for suite in norms.SUITE_OPS)):
        implementations = module.implementations(suite)
        for case in module.cases(suite, DEVICE, [], quick):
            for implementation in implementations:
                arguments.append((case, implementation))
                names.append(f"{case.name}, {case.work}, {case.dtype}: {implementation.name}")
    metafunc.parametrize(("case", "implementation"), arguments, ids=names)


def test_op(benchmark, case, implementation):
    try:
        implementation.check(case, DEVICE)
    except UnavailableError as error:
        pytest.skip(str(error))
    torch._dynamo.reset()  # each case alone, as from the command line: recompilations are limited
    computed = implementation.computes(case)
    inputs = computed.make_inputs(DEVICE, seed=0)
    call = build_call(implementation, computed, inputs)
    references = expected(computed, inputs)
    worst, ratio = worst_error(
        implementation.restore(computed, call()),
        *references,
        role_of(implementation, case),
        coarsest_dtype(inputs),
    )
    assert ratio <= 1, f"{worst} has {ratio:.3g} times the error allowed"
    del references

    def timed():
        results = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return results

    benchmark.group = f"{case.name}, {case.work}, {case.dtype}"
    benchmark.extra_info |= {"bytes": case.cost.bytes, "operations": case.cost.operations, **case.shape}
    benchmark(timed)
