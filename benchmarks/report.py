"""Pages of results: what one device's folder holds, and the tables in the READMEs.

python -m benchmarks report           the pages and pictures of committed results, and the READMEs' tables
python -m benchmarks report FOLDER    prints a line for each case and writes the folder's page and pictures
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from . import targets
from .results import RESULTS, SUITES, Results, load
from .tables import case_table, fastest_peer, markdown, ours_cells, suite_table, targets_table
from .targets import groups, ours_of

NOT_YET = "Not yet measured on a GPU."
_NAMES = ("ops-gpu", "model-gpu", "cpu", "ablation", "step-cache", "schedulers")
_OPS = SUITES[:4]
_MARKER = re.compile(r"<!-- (/?)benchmarks:(\S+) -->")
_ON_CPU = "CPU times of the reference path"
_README_CASES = 2  # of a suite
_HOW_TO_READ = """\
Ours in ms: the median (20 % to 80 % quantile) of the device's time, from CUDA graphs; with an e, between events or
calls, with the host's share; with a q, by the few repetitions of --quick. Others: how many times as long as ours
they take, by the same clock. Nothing that is wrong is timed. MFU: the model's operations over the time, as a share
of the rate of products: of its own by themselves, in the same dtype, and of large ones, the fastest."""


def read_folder(folder: Path, only: set[Path] | None = None) -> dict[str, Results]:
    """By suite. A file that is not one of ours is named and left out."""
    suites = {}
    for suite in SUITES:
        path = folder / f"{suite}.json"
        if path.exists() and (only is None or path.resolve() in only):
            try:
                suites[suite] = load(path)
            except ValueError as error:
                print(f"benchmarks: skipped: {error}", file=sys.stderr)
    return suites


def write_folder(folder: Path) -> None:
    """report.md, and pictures beside it. A folder without results is left alone."""
    _write(folder, read_folder(folder))


def _write(folder: Path, suites: dict[str, Results]) -> None:
    if suites:
        from . import plots  # needs matplotlib

        pictures = plots.draw(folder, suites)
        text = page(suites, pictures, (folder / "static.json").exists(), _extra(folder, "host"))
        (folder / "report.md").write_text(text)


def page(suites: dict[str, Results], pictures: list[str], has_static: bool, host: str) -> str:
    environment = next(iter(suites.values())).environment
    on_cpu = environment["device"] == "cpu"
    title = _ON_CPU if on_cpu else environment["device"]
    parts = [f"# Benchmarks: {title}", "Written by `python -m benchmarks`; do not edit."]
    if on_cpu:
        parts.append("Without a GPU, `edt_kernels` takes its reference path in plain torch. What is timed here is "
                     "that, not the kernels.")  # fmt: skip
    if has_static:
        parts.append("What the compiler makes of every kernel: [static.md](static.md).")
    parts += [_environment(next(iter(suites.values()))), _HOW_TO_READ]
    for suite, results in suites.items():
        parts.append(f"## {suite}: {_ON_CPU}" if on_cpu else f"## {suite}")
        if _environment(results) not in parts:
            parts.append(_environment(results))
        parts.append(suite_table(results))
        parts += [f"![{suite}, {name}]({name})" for name in pictures if name.startswith(f"{suite}-")]
    if host:
        parts.append(f"## host: what a call keeps the CPU\n\n```\n{host}\n```")
    parts.append("## Targets")
    if on_cpu:
        parts.append("They are of a GPU: not measured here.")
    else:
        parts += [f"Stated for {targets.STATED_FOR}; this is {title}. {targets.NOTE}", targets_table(suites)]
    return "\n\n".join(parts) + "\n"


def _extra(folder: Path, module: str) -> str:
    """What came of a benchmark that is no suite, loss curves or host, if it ran."""
    path = folder / f"{module}.json"
    try:
        summary = importlib.import_module(f".{module}", __package__).summary
        return summary(json.loads(path.read_text())) if path.exists() else ""
    except (ValueError, KeyError, TypeError) as error:
        return f"{module}: {path} is no result file of these benchmarks: {error!r}"


def _environment(results: Results) -> str:
    found = results.environment
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in found["versions"].items())
    known = (("driver", "driver"), ("cuda", "CUDA"), ("memory_gib", "GiB of memory:"), ("threads", "threads:"))
    parts = [f"{label} {found[name]}" for name, label in known if found.get(name)]
    text = f"{found['device']}; {', '.join(parts)}; {versions}; commit {found['commit']}; {found['date']}."
    if results.ceilings:
        text += (f" Ceilings: copy {results.ceilings.copy_bytes_per_second / 1e9:.0f} GB/s read and written, "
                 f"{results.ceilings.matrix_dtype} products "
                 f"{results.ceilings.operations_per_second / 1e12:.2f} TFLOP/s.")  # fmt: skip
    return text


def _readme_table(devices: dict[Path, dict[str, Results]], name: str, page: Path) -> str:
    """Medians of the first cases of each suite; of a CPU all is said to be of one. Links lead from the page."""
    on_cpu, lines, sources = name == "cpu", [], []
    for folder, suites in devices.items():
        here = {
            suite: results
            for suite, results in suites.items()
            if (results.environment["device"] == "cpu") == on_cpu
            and (on_cpu or (suite in _OPS) == (name == "ops-gpu"))
        }
        for results in here.values():
            cases = list(dict.fromkeys(row.case for row in results.rows))[: 1 if on_cpu else _README_CASES]
            for rows in groups([row for row in results.rows if row.case in cases]):
                ours = ours_of(rows)
                right = ours is not None and ours.status == "ok"
                ms, floor, _ = ours_cells(ours)
                ms, peer = (f"{ours.time_ms:.4g}", fastest_peer(rows)) if right else (ms, ("", ""))
                what = [rows[0].case, f"{rows[0].work}, {rows[0].dtype}", ms]
                lines.append([*what, *peer] if on_cpu else [results.environment["device"], *what, floor, *peer])
        if here:
            found = dict.fromkeys(
                f"{r.environment['device']}, {r.environment['date']}, commit {str(r.environment['commit'])[:12]}"
                for r in here.values()
            )
            link = Path(os.path.relpath(folder / "report.md", page.parent)).as_posix()
            sources.append(f"[{'; '.join(found)}]({link})")
    if not lines:
        return NOT_YET if not on_cpu else "Not yet measured with `python -m benchmarks`."
    if on_cpu:
        header = ["case", "work", "reference path, ms", "fastest peer", "its time over ours"]
    else:
        header = ["device", "case", "work", "ours, ms", "of floor", "fastest peer", "its time over ours"]
    return "\n\n".join([markdown(header, lines), f"Medians; all cases and peers: {', '.join(sources)}."])


def _ablation(results_root: Path, committed: set[Path]) -> str:
    """The table that `edt ablate` wrote."""
    path = results_root / "ablation" / "table.md"
    return path.read_text().strip() if path.resolve() in committed else "Not yet measured with `edt ablate`."


def _measured(module: str, results_root: Path, committed: set[Path]) -> str:
    """The table of a module of benchmarks that has a result file of its own."""
    benchmark = importlib.import_module(f".{module}", __package__)
    path = results_root / benchmark.FILE
    if path.resolve() not in committed:
        return f"Not yet measured with `python -m benchmarks {module}`."
    return benchmark.format_table(json.loads(path.read_text()))


def _committed(folder: Path) -> set[Path]:
    """Files under it that are as they were committed; others with results are named. Raises ValueError."""

    def git(*arguments: str) -> list[str]:
        try:
            run = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(f"results is {folder}, of which git knows nothing: {error}") from error
        return [line for line in run.stdout.split("\0") if line]

    top = Path(git("rev-parse", "--show-toplevel")[0].strip())
    tracked = {(top / name).resolve() for name in git("ls-files", "-z", "--full-name", ".")}
    status = git("status", "--porcelain", "--no-renames", "-uall", "-z", ".")
    return tracked - {(top / line[3:]).resolve() for line in status}


def write_committed(results_root: Path, *readmes: Path) -> int:
    """The pages of all devices and the READMEs' tables, of committed results alone. Returns the exit status.

    Raises:
        ValueError: for a marker in a README that has no end or is not known.
    """
    spans = {readme: found for readme in readmes if (found := _spans(readme))}  # others are left alone
    committed = _committed(results_root)
    devices = {}
    for folder in sorted(path for path in results_root.iterdir() if path.is_dir()):
        for path in sorted(folder.glob("*.json")):
            if path.stem in SUITES and path.resolve() not in committed:
                print(f"benchmarks: skipped: {path} is not committed as it is")
        if suites := read_folder(folder, committed):
            devices[folder] = suites
            _write(folder, suites)
    tables = {
        "ablation": _ablation,
        "step-cache": partial(_measured, "step_cache"),
        "schedulers": partial(_measured, "schedulers"),
    }
    for readme, found in spans.items():
        text = readme.read_text()
        for name, (start, end) in sorted(found.items(), key=lambda item: -item[1][0]):
            if name in tables:
                table = tables[name](results_root, committed)
            else:
                table = _readme_table(devices, name, readme)
            text = f"{text[:start]}\n{table}\n{text[end:]}"
        readme.write_text(text)
    return 0


def _spans(readme: Path) -> dict[str, tuple[int, int]]:
    """Of what is between the markers, by name."""
    found, opened = {}, None
    for match in _MARKER.finditer(readme.read_text()):
        closing, name = match.groups()
        if name not in _NAMES:
            raise ValueError(f"{readme} has the marker {match.group()}; names are {', '.join(_NAMES)}")
        if closing != ("/" if opened else "") or (opened and opened[0] != name) or name in found:
            raise ValueError(
                f"{readme}: the marker {match.group()} is out of place: each has a start and an end, once"
            )
        if closing:
            found[name], opened = (opened[1], match.start()), None
        else:
            opened = name, match.end()
    if opened:
        raise ValueError(f"{readme}: the marker <!-- benchmarks:{opened[0]} --> has no end")
    return found


def main(arguments: list[str]) -> int:
    """Returns the exit status.

    Raises:
        ValueError: for arguments that it cannot take.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", nargs="?", type=Path, help="of one device's results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of folders of committed results")
    root = RESULTS.parents[1]
    readmes = [root / "README.md", *sorted(root.glob("*/README.md"))]
    parser.add_argument("--readme", nargs="+", type=Path, default=readmes, metavar="PAGE", help="default: all")
    options = parser.parse_args(arguments)
    if options.folder is None:
        return write_committed(options.results, *options.readme)
    if not options.folder.is_dir():
        raise ValueError(f"folder is {options.folder}, which is no folder")
    suites = read_folder(options.folder)
    print("\n".join(f"{suite}: {_environment(results)}" for suite, results in suites.items()))
    print(case_table(suites), flush=True)
    for module in ("host", "loss_curves"):
        if text := _extra(options.folder, module):
            print(text, flush=True)
    _write(options.folder, suites)
    return 0


if __name__ == "__main__":
    from .__main__ import main as command

    sys.exit(command(["report", *sys.argv[1:]]))
