"""How fast is this on my machine, against what I would use instead: `python -m benchmarks COMMAND`.

Every implementation is first checked, ops against float64, EDT against float32: one that is wrong is reported as
wrong and not timed. Without a GPU, `edt_kernels` takes its reference path, and what is timed is that, on the CPU.
EDT_BENCHMARK_TILES names a table of tiles to measure with, as `tune` writes it.
Results go to outputs/benchmarks/<device>; --results benchmarks/results puts them where they are committed.
"""

import importlib
import os
import sys
from pathlib import Path

# By name: the module, imported when it is called, whose `main` takes the arguments; and what it answers.
COMMANDS = {
    "attention": ("suites", "an op, forward and backward"),
    "adaln": ("suites", "the same; gated_residual and gated_residual_adaln too"),
    "merge": ("suites", "the same"),
    "split": ("suites", "the same"),
    "model": ("suites", "EDT's forward pass"),
    "train": ("suites", "a training step of EDT"),
    "sample": ("suites", "sampling with EDT"),
    "all": ("suites", "all of the above, static and host, and a page of it"),
    "compare": ("compare", "do the results of this machine agree with the committed ones"),
    "report": ("report", "pages and plots of committed results, and READMEs' tables; or the page of a folder"),
    "gpu_suite": ("gpu_suite", "all that needs a GPU, in 9 minutes: tests, quick benchmarks, loss curves, tiles"),
    "tune": ("tuning", "which tiles of the kernels are right and fast on this GPU, into a file"),
    "warm_up": ("warm_up", "compiles what tests and quick benchmarks launch on a GPU, on all cores"),
    "static": ("static", "what the compiler makes of the kernels; needs no GPU"),
    "executed": ("compiled.cost", "what the compiled kernels do, counted while they run on the CPU; needs g++"),
    "host": ("host", "how long a call of an op keeps the CPU; needs no GPU"),
    "loss_curves": ("loss_curves", "does training on the kernels go as without them"),
    "step_cache": ("step_cache", "what step caching saves and what it costs"),
    "schedulers": ("schedulers", "what other schedulers make of few steps"),
    "data_loading": ("data_loading", "latents a second from shards, and the memory it takes"),
}

# Those that launch nothing themselves, and the one that says what to launch.
_WITHOUT_TILES = ("compare", "data_loading", "gpu_suite", "report", "tune", "warm_up")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if an implementation of ours is wrong or fails, 2 for wrong arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(f"{__doc__}\n" + "\n".join(f"    {name:14}{text}" for name, (_, text) in COMMANDS.items()))
        print("\npython -m benchmarks COMMAND --help lists its options.")
        return 0
    try:
        if name not in COMMANDS:
            raise ValueError(f"python -m benchmarks takes one of {', '.join(COMMANDS)}; not {name!r}")
        if (file := os.environ.get("EDT_BENCHMARK_TILES")) and name not in _WITHOUT_TILES:
            from . import tiles

            tiles.use(Path(file))
        module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
        return module.main(arguments if module.__name__.endswith(".suites") else arguments[1:]) or 0
    except (ValueError, OSError) as error:
        if os.environ.get("EDT_TRACEBACK") == "1":
            raise
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbenchmarks: interrupted; what was finished is stored", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
