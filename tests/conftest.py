import fcntl
import os
import sys

# One thread here and in all that is started: workers are the parallelism, and sums in another order differ in the
# last bit. Before torch is imported: MKL's products may otherwise differ from those of a process that began so.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else a pool of processes that import torch each

import pytest
import torch
from torch._subclasses import FakeTensorMode

# What deterministic mode, which fills uninitialised memory with NaN, asks of cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Autograd's threads exist from the start where they can at all, with a GPU or a CUDA build of PyTorch: a fork of
# this process that differentiates then fails in every order of the tests.
if not torch.cuda.is_available():
    with FakeTensorMode():  # pretends that there are GPUs
        pass
torch.ones(1, requires_grad=True).backward()

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config, items):
    """A process runs either the interpreter tests or all the others: Triton binds its kernels at import."""
    selected, deselected = [], []
    for item in items:
        matches = ("interpreter" in item.keywords) == INTERPRETED
        (selected if matches else deselected).append(item)
    # Stable, and what takes minutes begins first, or the other workers wait for it in the end.
    items[:] = sorted(selected, key=lambda item: "long" not in item.keywords)
    config.hook.pytest_deselected(items=deselected)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_teardown(item):
    """A test may have changed what decides on launches. Workers share the GPU, and each keeps the memory that a
    test took."""
    if launches := sys.modules.get("edt_kernels._launch"):
        launches.forget_plans()
    if "gpu" in item.keywords and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture
def _much_memory(tmp_path_factory):
    """Of all workers one at a time runs a test with it: two do not fit into one GPU."""
    # pytest-xdist's groups would do, but are ignored without a word where its version does not fit pytest's.
    with open(tmp_path_factory.getbasetemp().parent / "much_memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@pytest.fixture
def _triton(monkeypatch):
    """The Triton backend, whose uninitialised memory is NaN: an element that no program writes shows."""
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "triton")
    torch.use_deterministic_algorithms(True, warn_only=True)  # of the reference, some are not
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def _tiny_training():
    """The preset "tiny"."""
    from training_runs import TINY

    from edt.model.presets import PRESETS

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        yield
