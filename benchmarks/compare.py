"""Does this machine agree with the stored tables: the same cases, measured here and there."""

from pathlib import Path

from .results import SUITES, Results, Row, load, speedup


def compare(here: Path, tables: Path, tolerance: float) -> int:
    """Prints, for each case and implementation in both folders, the time here over the time there, by the same
    clock. Returns 1 where one that is right there is not right here, or where ours takes longer by more than
    `tolerance` (0.1: a tenth).

    Raises:
        ValueError: if the folders have no case in common, or are of different devices.
    """
    stored, ratios, disagreements = _rows(tables), [], []
    found = _rows(here)
    if not stored.keys() & found.keys():
        raise ValueError(
            f"{here} and {tables} have no case of one device in common; measure one here with "
            "python -m benchmarks SUITE --out FOLDER"
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
