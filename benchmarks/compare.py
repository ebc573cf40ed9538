"""Does this machine agree with the stored tables: the same cases, measured here and there."""

import argparse
import math
import sys
from pathlib import Path

import torch

from .results import OUTPUTS, RESULTS, SUITES, Results, Row, device_slug, load, speedup


def main(arguments: list[str]) -> int:
    """Returns the exit status: 1 if they disagree.

    Raises:
        ValueError: for arguments that it cannot take.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path,
                        help=f"what --out named; default: {OUTPUTS}/<device>")  # fmt: skip
    parser.add_argument("--tables", type=Path, help="folder to compare with; default: benchmarks/results/<device>")
    parser.add_argument("--tolerance", type=float, default=0.1, help="how much longer ours may take: 0.1 is 10 %%")
    options = parser.parse_args(arguments)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    tables = options.tables or RESULTS / device_slug(name)
    if not tables.is_dir():
        raise ValueError(f"tables is {tables}, which is no folder; name one of results with --tables")
    return compare(options.folder or OUTPUTS / device_slug(name), tables, options.tolerance)


def compare(here: Path, tables: Path, tolerance: float) -> int:
    """Prints, for each case and implementation in both folders, the time here over the time there, by the same
    clock. Returns 1 where one that is right there is not right here, or where ours takes longer by more than
    `tolerance` (0.1: a tenth).

    Raises:
        ValueError: if the folders have no case in common, or are of different devices; for a tolerance that is
            none.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}; it must be a finite number of at least 0")
    stored, ratios, disagreements = _rows(tables), [], []
    found = _rows(here)
    if not stored.keys() & found.keys():
        raise ValueError(
            f"{here} and {tables} have no case of one device in common; measure one here with "
            "python -m benchmarks SUITE"
        )
    for key, row in found.items():
        other = stored.get(key)
        if other is None or other.status != "ok":
            continue
        what = f"{row.case}, {row.work}, {row.dtype}: {row.implementation}"
        ratio = speedup(other, row)  # time here over time there
        if row.status != "ok":
            disagreements.append(f"{what}: {row.status} here: {row.reason}")
        elif ratio:
            ratios.append(ratio)
            print(f"{ratio:6.2f}×  {what}")
            if row.role == "ours" and ratio > 1 + tolerance:
                disagreements.append(f"{what}: {ratio:.2f} times as long here, tolerated is {1 + tolerance:.2f}")
    print(
        f"{len(ratios)} times compared with {tables}, {len(disagreements)} disagreements", *disagreements, sep="\n"
    )
    return int(bool(disagreements))


def _rows(folder: Path) -> dict[tuple, Row]:
    suites: dict[str, Results] = {
        suite: load(path) for suite in SUITES if (path := folder / f"{suite}.json").exists()
    }
    return {
        (results.environment["device"], suite, *row.key): row
        for suite, results in suites.items()
        for row in results.rows
    }


if __name__ == "__main__":
    from .__main__ import main as command

    sys.exit(command(["compare", *sys.argv[1:]]))
