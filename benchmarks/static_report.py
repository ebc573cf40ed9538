"""The rows of the static report: what they hold, what is a fault, how they are printed."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import triton

from .assembly import MULTIPROCESSORS

# Arguments that are rightly loaded in pieces smaller than their alignment allows.
NARROW_LOADS = {
    "bias": "of a long sequence gathered at the offset of each pair of tokens, else as wide as its layout allows",
    "modulation": "as the bias",
    "table": "gathered, once a call",
    "matrix": "written",
    "logsumexp": "one number a row",
    "delta": "one number a row",
    "statistics": "two numbers a row",
    "keep": "one byte a token",
    "shift": "one row a program, shared out among all its threads",
    "scale": "one row a program, shared out among all its threads",
    "gate": "one row a program, shared out among all its threads",
    "partials": "gathered: neighbouring offsets of a table come from different tiles",
}

# The letters after a kernel's name: what it has.
FLAGS = {"b": "a bias", "m": "a modulation", "s": "their entries in matrices", "k": "masks", "x": "extra tokens"}


@dataclass
class Report:
    """One kernel, compiled for one target."""

    target: str
    op: str
    kernel: str  # with a letter for each flag, see `FLAGS`
    dtype: str
    shapes: list[str]  # that launch this code
    tile: dict[str, int]  # its integer constants, num_warps and num_stages
    registers: int
    spilled_bytes: int
    shared_memory: int
    multiplies: bool  # the kernel has a matrix product that belongs on the matrix unit
    matrix_instructions: int
    programs_per_multiprocessor: int
    occupancy: float  # resident warps, as a share of the most there can be
    limited_by: str
    inner_loop: bool  # what `instructions` counts; without a loop, the whole kernel
    instructions: dict[str, int]  # by class
    # Of each argument: how many loads of how many bytes; what the alignment of rows allows.
    bytes_per_load: dict[str, dict[int, int]] = field(default_factory=dict)
    possible_bytes_per_load: dict[str, int] = field(default_factory=dict)
    wrong_products: list[str] = field(default_factory=list)  # see `hopper.product_faults`
    fingerprints: list[str] = field(default_factory=list)  # of the compilations that came out so


def faults(report: Report) -> list[str]:
    """What a kernel must not have at a production shape."""
    found = []
    if report.spilled_bytes:
        found.append(f"spills {report.spilled_bytes} bytes")
    if report.multiplies and not report.matrix_instructions:
        found.append("multiplies matrices without the matrix unit")
    found += report.wrong_products
    limit = MULTIPROCESSORS[report.target].shared_memory_of_program
    if report.shared_memory > limit:
        found.append(f"needs {report.shared_memory} bytes of shared memory of {limit}")
    for argument, possible in report.possible_bytes_per_load.items():
        narrowest = min(report.bytes_per_load[argument])
        if narrowest < possible:
            found.append(f"loads {argument} by {narrowest} bytes where {possible} are possible")
    if "unknown" in report.bytes_per_load:
        found.append("loads from an address that could not be traced to an argument")
    return found


HEADER = (
    f"{'target':6} {'op':24} {'kernel':21} {'type':4} {'shapes':38} regs spill  shared matrix programs  occ  "
    "instructions of the inner loop"
)


def line(row: Report) -> str:
    """A report on one line of text, under HEADER."""
    shapes = row.shapes[0] + (f" +{len(row.shapes) - 1}" if len(row.shapes) > 1 else "")
    mix = " ".join(f"{kind} {count}" for kind, count in row.instructions.items())
    return (
        f"{row.target:6} {row.op:24} {row.kernel:21} {row.dtype:4} {shapes:38} {row.registers:4} "
        f"{row.spilled_bytes:5} {row.shared_memory:7} {row.matrix_instructions:6} "
        f"{row.programs_per_multiprocessor:8} {row.occupancy:4.0%}  {mix}"
    )


def summary(rows: list[Report]) -> str:
    """The table in Markdown: what each kernel takes over all its shapes, what its inner loop is made of, how it
    loads."""
    groups: dict[tuple[str, str, str], list[Report]] = {}
    for row in rows:
        groups.setdefault((row.target, row.op, row.kernel.partition("[")[0]), []).append(row)
    versions = f"PyTorch {torch.__version__.split('+')[0]}, Triton {triton.__version__}"
    found = [
        f"- {row.target} {row.op} {row.kernel}, {row.shapes[0]}: {fault}" for row in rows for fault in faults(row)
    ]
    sections = [
        "# What the compiler makes of every kernel",
        f"Written by `python -m benchmarks static` ({versions}). Every row of `table.md`, with its tile, is in "
        "`table.json`. Letters in brackets are what a kernel has: "
        + ", ".join(f"{letter} {what}" for letter, what in FLAGS.items())
        + ".",
        f"{len(rows)} kernels, {len(found)} faults: a spill, a matrix product off the matrix unit, a narrow load "
        "of rows, too much shared memory, a product of Hopper's that is not waited for or waited for too often.",
        "\n".join(found),
        "## Resources",
        "Ranges are over shapes and switches. Programs: how many fit on a multiprocessor at once, and what limits "
        "the fewest; occupancy is theirs. Where the limits come from is said in `benchmarks/assembly.py`.",
        _resources(groups),
        "## Instructions of the inner loop",
        "By class, at each op's first shape with every switch on. The compiler may have unrolled the loop. "
        "Kernels without a loop: all instructions.",
        _instructions(groups),
        "## Bytes per load",
        "Over all targets and shapes. What the alignment of rows allows: 16 bytes, or 8 where heads of 52 are "
        "104 bytes apart. Narrower by nature:",
        "\n".join(f"- `{argument}`: {reason}" for argument, reason in NARROW_LOADS.items()),
        _loads(rows),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _resources(groups: dict[tuple, list[Report]]) -> str:
    titles = ["target", "op", "kernel", "rows", "registers", "spilled bytes", "shared memory, KB", "programs"]
    table = []
    for key, group in groups.items():
        fewest = min(group, key=lambda row: row.programs_per_multiprocessor)
        spans = (
            _span(row.registers for row in group),
            _span(row.spilled_bytes for row in group),
            _span(round(row.shared_memory / 1024) for row in group),
            _span(row.programs_per_multiprocessor for row in group),
        )
        table.append(
            (*key, len(group), *spans, fewest.limited_by, _span(round(100 * row.occupancy) for row in group))
        )
    return _markdown([*titles, "limited by", "occupancy, %"], table)


def _instructions(groups: dict[tuple, list[Report]]) -> str:
    kinds = list(dict.fromkeys(kind for group in groups.values() for row in group for kind in row.instructions))
    table = []
    for (target, op, _), group in groups.items():
        row = max((row for row in group if row.shapes[0] == group[0].shapes[0]), key=lambda row: len(row.kernel))
        name = row.kernel if row.inner_loop else f"{row.kernel} (no loop)"
        table.append((target, op, name, *(row.instructions.get(kind, 0) for kind in kinds)))
    return _markdown(["target", "op", "kernel", *kinds], table)


def _loads(rows: list[Report]) -> str:
    widths: dict[tuple[str, str], dict[str, set[int]]] = {}
    for row in rows:
        arguments = widths.setdefault((row.op, row.kernel.partition("[")[0]), {})
        for argument, counts in row.bytes_per_load.items():
            arguments.setdefault(argument, set()).update(counts)
    table = [
        (*key, ", ".join(f"{argument} {_span(sizes, '/')}" for argument, sizes in arguments.items()))
        for key, arguments in widths.items()
    ]
    return _markdown(["op", "kernel", "bytes"], table)


def _span(numbers: Iterable[int], separator: str = "-") -> str:
    numbers = sorted(set(numbers))
    if separator == "-":
        numbers = numbers[:: max(1, len(numbers) - 1)]  # the ends
    return separator.join(map(str, numbers))


def _markdown(titles: list[str], table: list[tuple]) -> str:
    lines = [titles, ["---"] * len(titles), *table]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
