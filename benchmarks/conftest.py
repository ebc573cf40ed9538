"""`pytest benchmarks`: options, and what a saved baseline says about the machine."""

import torch

from benchmarks import results

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser):
    parser.addoption("--all-cases", action="store_true", help="not only those of python -m benchmarks --quick")


def pytest_benchmark_update_machine_info(config, machine_info):
    """Of the device that was measured, and no host's name."""
    machine_info.clear()
    machine_info.update(results.environment(DEVICE))
    machine_info["cpu"] = {}  # where pytest-benchmark looks for the processor
