"""Pictures of one device's results: speed-ups, memory, roofline, sweep of the sequence length."""

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from .results import Results, Row, speedup
from .targets import groups, ours_of, peak

# A family of implementations by what its name contains, the first that fits; its colour is the same everywhere.
_FAMILIES = {
    "ours": ("ours", "#d62728"),
    "doubled keys": ("doubled keys", "#1f77b4"),
    "two passes": ("two passes", "#17becf"),
    "torch.compile": ("torch.compile", "#9467bd"),
    "eager": ("eager", "#7f7f7f"),
    "reference backend": ("eager", "#7f7f7f"),
    "flexattention": ("FlexAttention", "#2ca02c"),
    "sdpa": ("SDPA", "#bc7a00"),
    "liger": ("Liger-Kernel", "#8c564b"),
}
_PANELS = 8  # of bars in a picture, at most
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9,
          "figure.titlesize": 11, "savefig.dpi": 120}  # fmt: skip


def _family(row: Row) -> tuple[str, str]:
    """Its name and colour."""
    found = (value for part, value in _FAMILIES.items() if part in row.implementation.lower())
    name, colour = next(found, ("other", "#444444"))
    return (f"{name}, computes less" if row.role == "bound" else name), colour


def draw(folder: Path, suites: dict[str, Results]) -> list[str]:
    """Writes the pictures that there is data for; their names."""
    names = []
    for suite, results in suites.items():
        plots = {"speedup": speedup_bars, "memory": memory_bars}
        if suite == "attention" and results.environment["device"] != "cpu":  # whose caches hold what is moved
            plots |= {"roofline": roofline, "tokens": token_sweep}
        for name, plot in plots.items():
            with plt.rc_context(_STYLE):
                if figure := plot(suite, results):
                    names.append(f"{suite}-{name}.png")
                    figure.savefig(folder / names[-1])
                    plt.close(figure)
    return names


def _title(figure, results: Results, cases: list[list[Row]], text: str) -> None:
    device = results.environment["device"]
    device = "CPU: ours is the reference path" if device == "cpu" else device
    figure.suptitle(f"{text}\n{device}, {', '.join(dict.fromkeys(rows[0].dtype for rows in cases))}")


def _comparisons(results: Results, chosen: Callable[[Row], object]) -> list[list[Row]]:
    """Of each case in the first dtype, the chosen rows that worked, where ours and another are among them."""
    rows = [row for row in results.rows if row.dtype == results.rows[0].dtype and row.status == "ok"]
    found = groups([row for row in rows if chosen(row)])
    return [rows for rows in found if len(rows) > 1 and ours_of(rows)]


def _first(found: list[list[Row]]) -> list[list[Row]]:
    """The most telling, which come first; what is done in one case together."""
    found = [rows for rows in found if "bias constant" not in rows[0].work]
    names = list(dict.fromkeys(rows[0].case for rows in found))
    return sorted(found, key=lambda rows: names.index(rows[0].case))[:_PANELS]


def _bars(panels: list[list[tuple[Row, float]]], label: Callable[[float], str], axis: str, line: float | None):
    """A panel for each case, a bar for each implementation. With a line that bars are read against, all panels
    have one scale; else each has its own."""
    columns = min(2, len(panels))
    lines, most = math.ceil(len(panels) / columns), max(map(len, panels))
    size = ((8, 12.4)[columns - 1], (0.22 * most + 0.7) * lines + 0.8)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    values = [value for panel in panels for _, value in panel]
    log = line is not None and max(values) > 20 * min(values)
    for ax, panel in zip(axes.flat, panels, strict=False):
        panel = sorted(panel, key=lambda bar: -bar[1])
        for i, (row, value) in enumerate(panel):
            style = {"bound": {"alpha": 0.45, "hatch": "///"}, "variant": {"alpha": 0.6}}.get(row.role, {})
            ax.barh(i, value, color=_family(row)[1], edgecolor="white", linewidth=0, **style)
            ax.annotate(label(value), (value, i), (4, 0), textcoords="offset points", va="center", fontsize=8,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
        names = [row.implementation + (" *" if row.role == "bound" else "") for row, _ in panel]
        for text, (row, _) in zip(ax.set_yticks(range(len(panel)), names), panel, strict=True):
            text.label1.set_fontweight("bold" if row.role == "ours" else "normal")
        ax.invert_yaxis()
        ax.tick_params(axis="y", length=0)
        ax.set_title(f"{panel[0][0].case}\n{panel[0][0].work}", loc="left")
        if line is None:
            ax.set_xticks([])
            ax.set_xlim(0, 1.15 * panel[0][1])
            continue
        ax.axvline(line, color=_FAMILIES["ours"][1], linewidth=1, zorder=0)
        ax.set(xscale="log" if log else "linear", xlim=(min(values) / 1.5 if log else 0, max(values) * 1.15))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}×"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    if any(row.role == "bound" for panel in panels for row, _ in panel):
        axis += "; * a lower bound, which computes less"
    figure.supxlabel(f"{axis}; log scale" if log else axis, fontsize=9)
    return figure


def speedup_bars(suite: str, results: Results):
    found = _first(_comparisons(results, lambda row: row.time_ms))
    if not found:
        return None
    panels = [[(row, speedup(ours_of(rows), row)) for row in rows] for rows in found]
    axis = "time over ours: right of the line ours is faster, left of it slower"
    figure = _bars(panels, lambda value: f"{value:.2f}×", axis, 1)
    _title(figure, results, found, f"{suite}: how many times as long as ours each takes")
    return figure


def memory_bars(suite: str, results: Results):
    """Of what is done with a backward pass, where anything is."""
    found = _comparisons(results, peak)
    panels = _first([rows for rows in found if "backward" in rows[0].work] or found)
    if not panels:
        return None
    axis = "peak memory, of models with their weights: shorter is better; each panel has its own scale"
    figure = _bars([[(row, peak(row)) for row in rows] for rows in panels], _size, axis, None)
    _title(figure, results, panels, f"{suite}: memory at the peak")
    return figure


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def of_one_clock(rows: list[Row]) -> list[Row]:
    """Without those timed by another clock than ours: what no graph can hold has the host's share in its time."""
    return [row for row in rows if bool(row.graph_ms) == bool(ours_of(rows).graph_ms)]


def _two_passes(suite: str, results: Results, chosen: Callable, plot: Callable, text: str, label: str):
    """A panel each for forward, and for both passes; a legend outside, in the order of the marks."""
    found = [rows for rows in _comparisons(results, lambda row: row.time_ms) if chosen(rows[0].shape)]
    found = [of_one_clock(rows) for rows in found]
    works = {work: [rows for rows in found if rows[0].work == work] for work in ("forward", "forward+backward")}
    works = {work: cases for work, cases in works.items() if len(cases) > 1}
    if not works:
        return None
    figure, axes = plt.subplots(1, len(works), figsize=(5 * len(works) + 2, 4.4), squeeze=False, sharey=True,
                                layout="constrained")  # fmt: skip
    handles = {}
    for ax, (work, cases) in zip(axes.flat, works.items(), strict=True):
        ax.set(xscale="log", yscale="log", title=work)
        handles |= plot(ax, cases, results)
    axes[0, 0].set_ylabel(label)
    names = sorted(handles, key=lambda name: -handles[name][1])
    figure.legend([handles[name][0] for name in names], names, loc="outside right center", frameon=False)
    _title(figure, results, found, f"{suite}: {text}")
    return figure


def roofline(suite: str, results: Results):
    text = "the case's operations a second, and the measured ceilings (roofline); a column is a case"
    label = "operations a second: higher is better"
    return _two_passes(suite, results, lambda shape: shape["has_modulation"], _draw_roofline, text, label)


def _draw_roofline(ax, cases: list[list[Row]], results: Results) -> dict:
    copy, rate = results.ceilings.copy_bytes_per_second, results.ceilings.operations_per_second
    columns: dict[int, list[Row]] = {}
    for rows in cases:  # of those with about as many operations a byte, the first
        columns.setdefault(round(4 * math.log2(rows[0].operations / rows[0].bytes)), rows)
    rows = sorted((row for rows in columns.values() for row in rows), key=lambda row: row.role == "ours")
    at = [row.operations / row.bytes for row in rows]
    low, high = min(at) / 2.5, 2 * max(*at, rate / copy)
    ax.plot([low, rate / copy, high], [low * copy, rate, rate], color="black", linewidth=1.2)
    middle = math.sqrt(low * rate / copy)
    ax.text(0.85 * middle, middle * copy, f"copy, {copy / 1e12:.3g} TB/s", fontsize=8, ha="right")
    ax.text(high, 1.08 * rate, f"matrix products, {rate / 1e12:.3g} TFLOP/s", fontsize=8, ha="right")
    handles = {}
    for x, row in zip(at, rows, strict=True):
        (name, colour), y, ours = _family(row), row.operations / row.time_ms * 1e3, row.role == "ours"
        handle = ax.plot(x, y, "*" if ours else "o", color=colour, markersize=14 if ours else 6,
                         markerfacecolor="white" if row.role == "bound" else colour)[0]  # fmt: skip
        handles[name] = handle, max(y, handles.get(name, (None, 0))[1])
        if ours:
            ax.annotate(f"N {row.shape['tokens']}", (x, 0.01), xycoords=("data", "axes fraction"), ha="center",
                        fontsize=8)  # fmt: skip
    ax.margins(y=0.12)
    ax.set_xlabel("operations a byte of the least that must be moved")
    return handles


def token_sweep(suite: str, results: Results):
    text, label = "time over sequence length, of each family the fastest", "ns a token: lower is better"
    chosen = lambda shape: shape["has_modulation"] and shape["sweep"] == "tokens"  # noqa: E731
    return _two_passes(suite, results, chosen, _draw_sweep, text, label)


def _draw_sweep(ax, cases: list[list[Row]], results: Results) -> dict:
    lines: dict[str, dict[int, float]] = {}
    colours, handles = {}, {}
    for row in (row for rows in cases for row in rows):
        (name, colours[_family(row)[0]]), tokens = _family(row), row.shape["tokens"]
        each = 1e6 * row.time_ms / (tokens * row.shape["batch_size"])
        lines.setdefault(name, {})[tokens] = min(each, lines.get(name, {}).get(tokens, math.inf))
    for name, points in lines.items():
        xs, style = sorted(points), {"linewidth": 2.8, "markersize": 6, "zorder": 3} if name == "ours" else {}
        ys = [points[x] for x in xs]
        handle = ax.plot(xs, ys, color=colours[name], marker="o", linestyle="--" if "less" in name else "-",
                         **{"linewidth": 1.3, "markersize": 4} | style)[0]  # fmt: skip
        handles[name] = handle, ys[-1]
    ticks = sorted({x for points in lines.values() for x in points})
    ax.set_xticks(ticks, ticks)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_xlabel("tokens of a sequence")
    return handles
