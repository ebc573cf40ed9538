"""Tables of results: of a suite, of the targets, of each case in a line."""

from collections import Counter

from . import targets
from .results import Results, Row, speedup
from .targets import groups, ours_of
from .verdicts import evaluate


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _milliseconds(row: Row) -> str:
    """Of the device where there is a graph, else between events, marked with an e; with a q if --quick."""
    timing = row.graph_ms or row.ms
    marks = ("" if row.graph_ms else " e") + (" q" if row.quick else "")
    return f"{timing.median:.4g} ({timing.p20:.4g}–{timing.p80:.4g}){marks}"


def _status(row: Row) -> str:
    return "**wrong**" if row.status == "wrong" else row.status


def _cell(ours: Row | None, row: Row | None) -> str:
    """Times as long as ours; the status of what did not work; its own time where ours did not."""
    if row is None:
        return ""
    if row.status != "ok":
        return _status(row)
    ratio = ours and ours.status == "ok" and speedup(ours, row)
    if not ratio:
        return f"{_milliseconds(row)} ms" if row.time_ms else "no time"
    return ", ".join([f"{ratio:.2f}×", *_first_call(row)])


def _first_call(row: Row) -> list[str]:
    """Where one waits for it."""
    seconds = row.first_call_seconds or 0
    return [f"first call {seconds:.0f} s"] if seconds >= 5 else []


def ours_cells(row: Row | None) -> list[str]:
    if row is None:
        return ["not run", "", ""]
    if row.status != "ok" or not row.time_ms:
        return [f"**{row.status if row.status != 'ok' else 'no time'}**", "", ""]
    floor = f"{100 * row.fraction_of_floor:.0f} %" if row.fraction_of_floor else ""
    extra = {"images_per_second": "{:.4g} images/s", "model_flop_utilisation": "{:.1%} MFU",
             "ms_per_step": "{:.3g} ms a step"}  # fmt: skip
    if row.extra.get("model_flop_utilisation", 0) > 1:  # measured before its own products were
        extra["model_flop_utilisation"] = "MFU over a ceiling that was measured too low"
    parts = [text.format(row.extra[name]) for name, text in extra.items() if name in row.extra]
    memory = targets.peak(row)
    parts += [f"{memory / 2**20:.0f} MiB"] if memory else []
    parts += _first_call(row)
    return [_milliseconds(row), floor, ", ".join(parts)]


def suite_table(results: Results) -> str:
    """Peers, then lower bounds apart, then why something did not work."""
    text = []
    cases = groups(results.rows)
    for bounds in (False, True):
        # What ran in no case has a line below the table, not a column.
        names = list(dict.fromkeys(row.implementation for row in results.rows
                                   if row.role != "ours" and (row.role == "bound") == bounds
                                   and row.status not in ("missing", "unsupported")))  # fmt: skip
        if bounds and not names:
            continue
        lines = []
        for rows in cases:
            ours = ours_of(rows)
            by_name = {row.implementation: row for row in rows if (row.role == "bound") == bounds}
            if bounds and not by_name.keys() & set(names):
                continue
            start = [rows[0].case, rows[0].work, rows[0].dtype]
            start += [] if bounds else ours_cells(ours)
            lines.append([*start, *(_cell(ours, by_name.get(name)) for name in names)])
        header = ["case", "work", "dtype", *([] if bounds else ["ours, ms", "of floor", "ours: more"]), *names]
        if bounds:
            text.append("Lower bounds, which compute less:")
        text.append(markdown(header, lines))
    # Of those that ran too, why there is no time of a graph.
    reasons = Counter((row.implementation, _status(row), row.reason) for row in results.rows if row.reason)
    if reasons:
        lines = [f"- {name}, {status} in {count} of {len(cases)}: {reason}"
                 for (name, status, reason), count in reasons.items()]  # fmt: skip
        text.append("\n".join(lines))
    return "\n\n".join(text)


def targets_table(suites: dict[str, Results]) -> str:
    verdicts = evaluate(suites)
    lines = []
    for target in targets.TARGETS:
        here = [verdict for verdict in verdicts if verdict.target is target]
        measured = [f"{v.place}: {v}" for v in here if v.status != "not measured" or v.note]
        counts = {status: sum(v.status == status for v in here) for status in ("met", "missed", "not measured")}
        status = next((status for status in ("missed", "not measured") if counts[status]), "met")
        parts = [f"{count} {name}" for name, count in counts.items() if count]
        verdict = status if len(parts) == 1 else f"{status} ({', '.join(parts)})"
        lines.append([target.sentence, target.goal_text, f"**{verdict}**", "; ".join(measured)])
    return markdown(["target", "goal", "verdict", "measured"], lines)


def case_table(suites: dict[str, Results]) -> str:
    """As text, a line for each case: ours, the fastest peer, and the targets judged there."""
    verdicts = evaluate(suites, worst=False)
    lines = ["case | ours, ms | fastest peer | times as fast | of floor | targets"]
    for suite, results in suites.items():
        for rows in groups(results.rows):
            ours, start = ours_of(rows), f"{suite}: {rows[0].case}, {rows[0].work}, {rows[0].dtype}"
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
    ours = ours_of(rows)
    found = [(speedup(ours, row), row.implementation) for row in rows if row.role == "peer" and row.status == "ok"]
    found = [(ratio, name) for ratio, name in found if ratio]
    return (min(found)[1], f"{min(found)[0]:.2f}×") if found else ("none", "")
