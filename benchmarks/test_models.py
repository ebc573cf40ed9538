"""EDT's cases under pytest-benchmark: forward, training step, sampling. See `test_ops` for how to compare commits.

Each is checked against float32 (on a CPU float64) before it is timed, once a round.
"""

import torch

from benchmarks import models
from benchmarks.conftest import DEVICE
from benchmarks.results import Row

_ROUNDS = 5


def pytest_generate_tests(metafunc):
    quick = not metafunc.config.getoption("all_cases")
    arguments, names = [], []
    for suite in ("model", "train", "sample"):
        for case in models.cases(suite, DEVICE, [], quick):
            for implementation in models.implementations(suite):
                if implementation.applies(case, DEVICE):
                    arguments.append((case, implementation))
                    names.append(f"{case.name}, {case.work}, {case.dtype}: {implementation.name}")
    metafunc.parametrize(("case", "implementation"), arguments, ids=names)


def test_model(benchmark, case, implementation):
    torch._dynamo.reset()
    row = Row(case.suite, case.name, case.work, case.dtype, case.shape, implementation.name, implementation.role)
    with implementation.settings():
        checked = models.checked_workload(row, implementation, models.Given(case, DEVICE))
        assert checked is not None, row.reason
        _, timed = checked

        def call():
            timed()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{case.name}, {case.work}, {case.dtype}"
        benchmark.extra_info |= case.shape
        benchmark.pedantic(call, rounds=_ROUNDS, warmup_rounds=1)
