"""Pages of results: what one device's folder holds, and README's tables.

python -m benchmarks.report FOLDER    prints a line for each case and writes the folder's page and pictures
"""

import re
import subprocess
import sys
from pathlib import Path

from . import plots, targets
from .results import SUITES, Results, Row, load, speedup
from .targets import groups

NOT_YET = "Not yet measured on a GPU."
_NAMES = ("ops-gpu", "model-gpu", "cpu")
_OPS = SUITES[:4]
_MARKER = re.compile(r"<!-- (/?)benchmarks:(\S+) -->")
_ON_CPU = "CPU times of the reference path"
_README_CASES = 2  # of a suite


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
        pictures = plots.draw(folder, suites)
        (folder / "report.md").write_text(page(suites, pictures, (folder / "static.json").exists()))


def page(suites: dict[str, Results], pictures: list[str], has_static: bool) -> str:
    environment = next(iter(suites.values())).environment
    on_cpu = environment["device"] == "cpu"
    title = _ON_CPU if on_cpu else environment["device"]
    parts = [f"# Benchmarks: {title}", "Written by `python -m benchmarks`; do not edit."]
    if on_cpu:
        parts.append("Without a GPU, `edt_kernels` takes its reference path in plain torch. What is timed here is "
                     "that, not the kernels.")  # fmt: skip
    if has_static:
        parts.append("What the compiler makes of every kernel: [static.md](static.md).")
    for suite, results in suites.items():
        heading = f"{suite}: {_ON_CPU}" if on_cpu else suite
        parts += [f"## {heading}", _environment(results), suite_table(results)]
        parts += [f"![{suite}, {name}]({name})" for name in pictures if name.startswith(f"{suite}-")]
    parts.append("## Targets")
    if on_cpu:
        parts.append("They are of a GPU: not measured here.")
    else:
        parts += [f"Stated for {targets.STATED_FOR}; this is {title}. {targets.NOTE}", _targets_table(suites)]
    return "\n\n".join(parts) + "\n"


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


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _milliseconds(row: Row) -> str:
    """Of the device where there is a graph; else between events, marked with an e."""
    timing = row.graph_ms or row.ms
    between = "" if row.graph_ms else " e"
    return f"{timing.median:.4g} ({timing.p20:.4g}–{timing.p80:.4g}){between}"


def _cell(ours: Row | None, row: Row | None) -> str:
    """Times as long as ours; the status of what did not work; its own time where ours did not."""
    if row is None:
        return ""
    if row.status != "ok":
        return "**wrong**" if row.status == "wrong" else row.status
    ratio = ours and ours.status == "ok" and speedup(ours, row)
    return f"{ratio:.2f}×" if ratio else f"{_milliseconds(row)} ms" if row.time_ms else "no time"


def _ours_cells(row: Row | None) -> list[str]:
    if row is None:
        return ["not run", "", ""]
    if row.status != "ok" or not row.time_ms:
        return ["**wrong**" if row.status == "wrong" else f"**{row.status}**", "", ""]
    floor = f"{100 * row.fraction_of_floor:.0f} %" if row.fraction_of_floor else ""
    extra = {"images_per_second": "{:.4g} images/s", "model_flop_utilisation": "{:.1%} MFU",
             "ms_per_step": "{:.3g} ms a step"}  # fmt: skip
    parts = [text.format(row.extra[name]) for name, text in extra.items() if name in row.extra]
    memory = targets.peak(row)
    parts += [f"{memory / 2**20:.0f} MiB"] if memory else []
    return [_milliseconds(row), floor, ", ".join(parts)]


def _ours(rows: list[Row]) -> Row | None:
    return next((row for row in rows if row.role == "ours"), None)


def suite_table(results: Results) -> str:
    """Peers, then lower bounds apart, then why something did not work."""
    text = ["Ours in ms: median (20 %–80 % quantile) of the device's time in a CUDA graph; with an e, between events "
            "or calls, the host's share included. Others: times as long as ours."]  # fmt: skip
    cases = groups(results.rows)
    for bounds in (False, True):
        names = list(dict.fromkeys(row.implementation for row in results.rows
                                   if row.role != "ours" and (row.role == "bound") == bounds))  # fmt: skip
        if bounds and not names:
            continue
        lines = []
        for rows in cases:
            ours = _ours(rows)
            by_name = {row.implementation: row for row in rows if (row.role == "bound") == bounds}
            if bounds and not by_name:
                continue
            start = [rows[0].case, rows[0].work, rows[0].dtype]
            start += [] if bounds else _ours_cells(ours)
            lines.append([*start, *(_cell(ours, by_name.get(name)) for name in names)])
        header = ["case", "work", "dtype", *([] if bounds else ["ours, ms", "of floor", "ours: more"]), *names]
        if bounds:
            text.append("Lower bounds, which compute less:")
        text.append(_markdown(header, lines))
    reasons: dict[tuple, int] = {}
    for row in results.rows:
        if row.status != "ok":
            key = row.implementation, row.status, row.reason
            reasons[key] = reasons.get(key, 0) + 1
    text += ["\n".join(f"- {name}, {'**wrong**' if status == 'wrong' else status} in {count} of {len(cases)} cases: "
                       f"{reason}" for (name, status, reason), count in reasons.items())] if reasons else []  # fmt: skip
    return "\n\n".join(text)


def _targets_table(suites: dict[str, Results]) -> str:
    verdicts = targets.evaluate(suites)
    lines = []
    for target in targets.TARGETS:
        here = [verdict for verdict in verdicts if verdict.target is target]
        measured = [f"{v.place}: {v}" for v in here if v.status != "not measured" or v.note]
        counts = {status: sum(v.status == status for v in here) for status in ("met", "missed", "not measured")}
        status = next((status for status in ("missed", "not measured") if counts[status]), "met")
        parts = [f"{count} {name}" for name, count in counts.items() if count]
        verdict = status if len(parts) == 1 else f"{status} ({', '.join(parts)})"
        lines.append([target.sentence, target.goal_text, "; ".join(measured), f"**{verdict}**"])
    return _markdown(["target", "goal", "measured", "verdict"], lines)


def case_table(suites: dict[str, Results]) -> str:
    """As text, a line for each case: ours, the fastest peer, and the targets judged there."""
    verdicts = targets.evaluate(suites, worst=False)
    lines = ["case | ours, ms | fastest peer | times as fast | of floor | targets"]
    for suite, results in suites.items():
        for rows in groups(results.rows):
            ours, start = _ours(rows), f"{suite}: {rows[0].case}, {rows[0].work}, {rows[0].dtype}"
            if ours is None or ours.status != "ok" or not ours.time_ms:
                lines.append(f"{start} | ours {f'{ours.status}: {ours.reason}' if ours else 'not run'}")
                continue
            name, ratio = fastest_peer(rows)
            judged = [f"{v.target.id} {v}, {v.target.goal_text}: {v.status}"
                      for v in verdicts if v.ours is ours and v.figure is not None]  # fmt: skip
            floor = f"{ours.fraction_of_floor:.0%}" if ours.fraction_of_floor else ""
            cells = [start, f"{ours.time_ms:.4f}", name, ratio, floor, "; ".join(judged) or "none here"]
            lines.append(" | ".join(cells))
    return "\n".join(lines)


def fastest_peer(rows: list[Row]) -> tuple[str, str]:
    """Its name, and its time over ours."""
    ours = _ours(rows)
    found = [(speedup(ours, row), row.implementation) for row in rows if row.role == "peer" and row.status == "ok"]
    found = [(ratio, name) for ratio, name in found if ratio]
    return (min(found)[1], f"{min(found)[0]:.2f}×") if found else ("none", "")


def _readme_table(devices: dict[str, dict[str, Results]], name: str) -> str:
    """The first cases of each suite; of a CPU all is said to be of one."""
    lines, devices_named = [], []
    for folder, suites in devices.items():
        for suite, results in suites.items():
            device = results.environment["device"]
            if (device == "cpu") != (name == "cpu") or (name != "cpu" and (suite in _OPS) != (name == "ops-gpu")):
                continue
            cases = list(dict.fromkeys(row.case for row in results.rows))[:_README_CASES]
            for rows in groups([row for row in results.rows if row.case in cases]):
                ours = _ours(rows)
                peer = fastest_peer(rows) if ours and ours.status == "ok" else ("", "")
                lines.append(
                    [device, rows[0].case, f"{rows[0].work}, {rows[0].dtype}", *_ours_cells(ours)[:2], *peer]
                )
            commit = str(results.environment["commit"])[:12]
            devices_named.append(f"{suite}: [{device}, {results.environment['date']}, commit {commit}]"
                                 f"(benchmarks/results/{folder}/report.md)")  # fmt: skip
    if not lines:
        return NOT_YET if name != "cpu" else "Not yet measured with `python -m benchmarks`."
    header = ["device", "case", "work", f"ours, ms{', of the reference path' if name == 'cpu' else ''}", "of floor",
              "fastest peer", "its time over ours"]  # fmt: skip
    return "\n\n".join([_markdown(header, lines), "From " + "; ".join(devices_named) + "."])


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


def write_committed(results_root: Path, readme: Path) -> int:
    """The pages of all devices and README's tables, of committed results alone. Returns the exit status.

    Raises:
        ValueError: for a marker in the README that has no end or is not known.
    """
    text = readme.read_text()
    spans = _spans(text)
    committed = _committed(results_root)
    devices = {}
    for folder in sorted(path for path in results_root.iterdir() if path.is_dir()):
        for path in sorted(folder.glob("*.json")):
            if path.stem in SUITES and path.resolve() not in committed:
                print(f"benchmarks: skipped: {path} is not committed as it is")
        if suites := read_folder(folder, committed):
            devices[folder.name] = suites
            _write(folder, suites)
    for name, (start, end) in sorted(spans.items(), key=lambda item: -item[1][0]):
        text = f"{text[:start]}\n{_readme_table(devices, name)}\n{text[end:]}"
    readme.write_text(text)
    return 0


def _spans(text: str) -> dict[str, tuple[int, int]]:
    """Of what is between the markers, by name."""
    found, opened = {}, None
    for match in _MARKER.finditer(text):
        closing, name = match.groups()
        if name not in _NAMES:
            raise ValueError(f"README has the marker {match.group()}; names are {', '.join(_NAMES)}")
        if closing != ("/" if opened else "") or (opened and opened[0] != name) or name in found:
            raise ValueError(f"README's marker {match.group()} is out of place: each has a start and an end, once")
        if closing:
            found[name], opened = (opened[1], match.start()), None
        else:
            opened = name, match.end()
    if opened:
        raise ValueError(f"README's marker <!-- benchmarks:{opened[0]} --> has no end")
    return found


if __name__ == "__main__":
    loaded = read_folder(Path(sys.argv[1]))
    print(case_table(loaded), flush=True)
    _write(Path(sys.argv[1]), loaded)
