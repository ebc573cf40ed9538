"""What is compiled ahead is what tests launch."""

import itertools
from concurrent.futures import Future

import pytest
import torch

from benchmarks import warm_up


class Pool:
    """In place of processes: what they are told."""

    def __init__(self, workers, initializer, initargs):
        assert (initializer, initargs) == (warm_up.start_worker, (90,))
        self.jobs, self.cancelled = [], False
        Pool.last = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def shutdown(self, cancel_futures):
        self.cancelled = cancel_futures

    def submit(self, function, *arguments):
        done = Future()
        if function is warm_up.compile_kernel:
            self.jobs.append(arguments)
        if len(self.jobs) == 2:
            done.set_exception(MemoryError())
        else:
            done.set_result(0)
        return done


@pytest.fixture
def _pool(monkeypatch):
    monkeypatch.setattr(warm_up, "ProcessPoolExecutor", Pool)


@pytest.mark.usefixtures("_pool")
def test_each_code_is_compiled_once_forward_and_backward():
    calls = list(itertools.islice(warm_up.calls_of_tests(), 2))
    compiled, failed = warm_up.warm_up(90, [*calls, *calls], 1)
    jobs = Pool.last.jobs
    assert (compiled + failed, failed) == (len(jobs), 1)
    assert {module for module, *_ in jobs} == {
        f"edt_kernels.amm_attention.{name}" for name in ("memory", "kernels", "table_kernels")
    }
    for _, _, arguments, _ in jobs:
        pointers = [argument for argument in arguments if isinstance(argument, warm_up._Pointer)]
        assert pointers
        assert all(pointer.data_ptr() < 16 for pointer in pointers)
    assert torch.randn(2, generator=torch.Generator().manual_seed(0)).abs().min() > 0  # as before


@pytest.mark.usefixtures("_pool")
def test_an_interruption_leaves_the_rest():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_up.warm_up(90, [interrupt], 1)
    assert Pool.last.cancelled


def test_all_listed_cases_and_quick_benchmarks_are_there():
    for calls in (warm_up.calls_of_benchmarks(), warm_up.calls_of_tests()):
        assert callable(next(calls))


def test_without_a_gpu_a_capability_is_asked_for(monkeypatch):
    monkeypatch.setattr(warm_up, "device_capability", lambda: None)
    with pytest.raises(ValueError, match="capability is not given, and nvidia-smi names no GPU"):
        warm_up.main([])
