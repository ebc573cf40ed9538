"""The suites of ops and of EDT: every implementation of every case, checked, timed and stored."""

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

import torch

try:
    from tqdm import tqdm
except ImportError:  # which a bare PyTorch image may be without: no bar, but all else
    tqdm = None

from . import attention, gpu_suite, measure, models, norms, results
from .budget import is_lost
from .harness import measure_case, selected, table
from .results import OURS, SUITES

_DTYPES = ("float32", "float16", "bfloat16", "mixed")


def build_parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}")
    parser.add_argument("--quick", action="store_true", help="few shapes, the most telling, in minutes")
    parser.add_argument("--shapes", nargs="+", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--dtype", nargs="+", default=[], choices=_DTYPES, help="instead of the usual ones")
    parser.add_argument("--peers", nargs="*", default=None, metavar="TEXT",
                        help="ours, and peers whose name contains it; none: ours alone")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    results.add_output(parser)
    return parser


def run_suite(
    suite: str,
    cases: list,
    implementations: list,
    device: torch.device,
    ceilings: measure.Ceilings,
    environment: dict,
    folder: Path,
    quick: bool,
) -> None:
    """Measures implementation by implementation; each is stored before the next begins. `quick`: what need not be
    compiled comes first, at all shapes, so that an early end leaves the most."""
    measure_one = _MODULES[suite][1]
    rounds = [implementations]
    if quick and device.type == "cuda":
        rounds = [[one for one in implementations if one.compiled == compiled] for compiled in (False, True)]
    stored = results.open_results(folder, suite, environment, ceilings)
    budget = measure.QUICK if quick else measure.Budget()
    total = len(rounds) * len(cases)
    progress = tqdm(total=total, desc=suite, unit="case", disable=None) if tqdm else contextlib.nullcontext()
    with progress as bar:
        for these in rounds:
            for case in cases:
                for row in measure_one(suite, case, these, device, ceilings, budget):
                    row.quick = quick
                    stored.add([row])
                    stored.save(folder, suite)
                    if row.status == "failed" and is_lost(device):
                        raise SystemExit(
                            f"benchmarks: error: the GPU is lost since {row.implementation}, {row.case}, "
                            f"{row.work}: {row.reason}; what comes after cannot be measured in this process"
                        )
                if bar is not None:
                    bar.update()
                group = (case.name, case.work, case.dtype)
                (tqdm.write if tqdm else print)(table([row for row in stored.rows if row.group == group]))


# What the static report takes a minute for: EDT-S on Hopper.
_QUICK_STATIC = ("--targets", "sm_90", "--models", "EDT-S/2")
_MODULES = {
    "attention": (attention, measure_case),
    **dict.fromkeys(norms.SUITE_OPS, (norms, measure_case)),
    **dict.fromkeys(("model", "train", "sample"), (models, models.measure_case)),
}


def choose(
    suites: tuple[str, ...],
    device: torch.device,
    dtypes: list[str],
    quick: bool,
    shapes: list[str] | None,
    peers: list[str] | None,
) -> tuple[dict[str, list], dict[str, list]]:
    """By suite its cases, but for suites that have none of the shapes, and the peers to compare with.

    Raises:
        ValueError: for a shape or a peer that none of the suites has.
    """
    modules = {suite: _MODULES[suite][0] for suite in suites}
    cases = [(suite, case) for suite in suites for case in modules[suite].cases(suite, device, dtypes, quick)]
    others = [
        (suite, one) for suite in suites for one in modules[suite].implementations(suite) if one.name != OURS
    ]
    chosen = (selected(items, patterns, lambda item: item[1].name, argument)
              for items, patterns, argument in ((cases, shapes, "shapes"), (others, peers, "peers")))  # fmt: skip
    return tuple(_by_suite(items) for items in chosen)


def _by_suite(items: list[tuple[str, object]]) -> dict[str, list]:
    found: dict[str, list] = {}
    for suite, item in items:
        found.setdefault(suite, []).append(item)
    return found


def main(arguments: list[str]) -> int:
    """The first argument is a suite or "all". Returns the exit status: 1 if an implementation of ours is wrong or
    fails.

    Raises:
        ValueError: for arguments that it cannot take.
    """
    command, *given = arguments
    options = build_parser(command).parse_args(given)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda'; torch sees no GPU here, use cpu")
    suites = SUITES if command == "all" else (command,)
    cases, peers = choose(suites, device, options.dtype, options.quick, options.shapes, options.peers)
    environment = results.environment(device)
    folder = results.output_folder(options, environment["device"])
    print(f"{environment['device']}, torch {environment['versions']['torch']}, commit {environment['commit']}")
    if device.type == "cpu":
        print("No GPU: edt_kernels takes its reference path, and these are times of this CPU.")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # In full even where all else is quick: of a GPU that is not yet warm they would be too low.
    ceilings = measure.measure_ceilings(
        device, dtype, measure.Budget() if device.type == "cuda" else measure.QUICK
    )
    print(
        f"ceilings: copy {ceilings.copy_bytes_per_second / 1e9:.0f} GB/s read and written, "
        f"{ceilings.matrix_dtype} products {ceilings.operations_per_second / 1e12:.2f} TFLOP/s\nresults: {folder}"
    )
    for suite in cases:
        ours = [one for one in _MODULES[suite][0].implementations(suite) if one.name == OURS]
        chosen = ours + peers.get(suite, [])
        run_suite(suite, cases[suite], chosen, device, ceilings, environment, folder, options.quick)
    faulty = False
    if command == "all":
        from . import report, static

        arguments = ["--out", str(folder / "static.json"), *(_QUICK_STATIC if options.quick else ())]
        faulty = static.main(arguments)
        if fault := gpu_suite.compiler_fault():
            print(f"host: left out: {fault}")
        else:  # in a process of its own, for it replaces the driver
            command = [sys.executable, "-m", "benchmarks", "host", "--out", str(folder.resolve() / "host.json")]
            command += ["--quick"] if options.quick else []
            faulty |= subprocess.run(command, check=False, cwd=gpu_suite.ROOT).returncode != 0
        report.write_folder(folder)
    loaded = (results.load(folder / f"{suite}.json") for suite in cases)
    bad = [row for found in loaded for row in found.rows if row.role == "ours" and row.status != "ok"]
    for row in bad:
        print(f"ours {row.status}: {row.suite} {row.case}, {row.work}, {row.dtype}: {row.reason}", file=sys.stderr)
    return bool(bad or faulty)
