"""How fast is this on my machine, against what I would use instead: `python -m benchmarks`.

    python -m benchmarks attention | adaln | merge | split    an op, forward and backward
    python -m benchmarks model | train | sample               EDT
    python -m benchmarks loss_curves                          does training on the kernels go as without them
    python -m benchmarks static                               what the compiler makes of the kernels; needs no GPU
    python -m benchmarks all [--quick]                        all of these, and the report of them
    python -m benchmarks compare FOLDER                       does this machine agree with the committed tables
    python -m benchmarks report                               pages and plots of committed results, all tables

Every implementation is first checked, ops against float64, EDT against float32: one that is wrong is reported as
wrong and not timed. Without a GPU, `edt_kernels` takes its reference path, and what is timed is that, on the CPU.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import torch

try:
    from tqdm import tqdm
except ImportError:  # which a bare PyTorch image may be without: no bar, but all else
    tqdm = None

from edt_kernels._tiles import device_slug
from edt_kernels.testing import is_lost

from . import attention, measure, models, norms, results
from .compare import compare
from .harness import measure_case, selected, table
from .results import OURS, RESULTS, SUITES

_DTYPES = ("float32", "float16", "bfloat16", "mixed")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in (*SUITES, "all"):
        command = commands.add_parser(name, help=f"measure {name}")
        command.add_argument("--quick", action="store_true", help="few shapes, the most telling, in minutes")
        command.add_argument("--shapes", nargs="+", metavar="TEXT", help="cases whose name contains it")
        command.add_argument("--dtype", nargs="+", default=[], choices=_DTYPES, help="instead of the usual ones")
        command.add_argument("--peers", nargs="*", default=None, metavar="TEXT",
                             help="ours, and peers whose name contains it; none: ours alone")  # fmt: skip
        command.add_argument("--out", type=Path, help="folder for the results; default: results/<device>")
        command.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    curves = commands.add_parser("loss_curves", help="training on the kernels against training without them")
    curves.add_argument("--model", default="EDT-S/2", help="a preset")
    curves.add_argument("--steps", type=int, default=200)
    curves.add_argument("--batch-size", type=int, default=64, help="images a step")
    curves.add_argument("--out", type=Path, help="folder for the results; default: results/<device>")
    curves.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: without kernels, as a test"
    )
    static = commands.add_parser("static", help="compile every kernel; see python -m benchmarks.static --help")
    static.add_argument("arguments", nargs=argparse.REMAINDER)
    agreement = commands.add_parser("compare", help="results of this machine against the committed ones")
    agreement.add_argument("folder", type=Path, help="what --out named")
    agreement.add_argument("--tables", type=Path, help="folder to compare with; default: results/<device>")
    agreement.add_argument(
        "--tolerance", type=float, default=0.1, help="how much longer ours may take: 0.1 is 10 %%"
    )
    page = commands.add_parser("report", help="pages and plots of committed results, and READMEs' tables")
    page.add_argument("--results", type=Path, default=RESULTS, help="folder of folders of results")
    root = RESULTS.parents[1]
    readmes = [root / "README.md", *sorted(root.glob("*/README.md"))]
    page.add_argument("--readme", nargs="+", type=Path, default=readmes, metavar="PAGE", help="default: all")
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


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if an implementation of ours is wrong or fails, 2 for wrong arguments."""
    options = build_parser().parse_args(arguments)
    try:
        if options.command == "static":
            from . import static  # needs Triton

            return static.main(options.arguments)
        if options.command == "loss_curves":
            from . import loss_curves

            return loss_curves.run(options)
        if options.command == "compare":
            return compare(options.folder, options.tables or _tables_of_this_device(), options.tolerance)
        if options.command == "report":
            from . import report

            return report.write_committed(options.results, *options.readme)
        return measure_suites(options)
    except ValueError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbenchmarks: interrupted; the cases that were finished are stored", file=sys.stderr)
        return 130


def _tables_of_this_device() -> Path:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    folder = RESULTS / device_slug(name)
    if not folder.is_dir():
        raise ValueError(f"tables: there are none of {name!r} in {RESULTS}; name a folder with --tables")
    return folder


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


def measure_suites(options: argparse.Namespace) -> int:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda'; torch sees no GPU here, use cpu")
    suites = SUITES if options.command == "all" else (options.command,)
    cases, peers = choose(suites, device, options.dtype, options.quick, options.shapes, options.peers)
    environment = results.environment(device)
    folder = options.out or RESULTS / device_slug(environment["device"])
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
    faulty_kernels = False
    if options.command == "all":
        from . import report, static

        arguments = ["--out", str(folder / "static.json"), *(_QUICK_STATIC if options.quick else ())]
        faulty_kernels = static.main(arguments)
        report.write_folder(folder)
    loaded = (results.load(folder / f"{suite}.json") for suite in cases)
    bad = [row for found in loaded for row in found.rows if row.role == "ours" and row.status != "ok"]
    for row in bad:
        print(f"ours {row.status}: {row.suite} {row.case}, {row.work}, {row.dtype}: {row.reason}", file=sys.stderr)
    return bool(bad or faulty_kernels)


if __name__ == "__main__":
    sys.exit(main())
