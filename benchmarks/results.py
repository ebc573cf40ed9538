"""What was measured, where, and how it is kept: one JSON and one CSV file a suite, in a folder a device."""

import argparse
import csv
import json
import math
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from .measure import Ceilings, Timing

RESULTS = Path(__file__).parent / "results"  # the committed ones, a folder a device
OUTPUTS = Path("outputs", "benchmarks")  # those of whoever measures, likewise
SUITES = ("attention", "adaln", "merge", "split", "model", "train", "sample")
# What became of an implementation. Times are there for "ok" alone.
STATUSES = ("ok", "wrong", "missing", "unsupported", "out of memory", "failed")
OURS = "ours"


@dataclass
class Row:
    """One implementation in one case."""

    suite: str
    case: str  # shape and batch, as printed
    work: str  # "forward", "forward+backward", "training step", …
    dtype: str
    shape: dict[str, object]  # the case in numbers, for plots: grid, heads, batch_size, …
    implementation: str
    role: str  # "ours"; "variant": ours, run another way; "peer": computes the same; "bound": computes less
    status: str = "ok"
    reason: str = ""  # of any other status
    backend: str = ""  # what ran: the pinned backend of SDPA, the Triton kernels or the reference path
    # The worst of the outputs and gradients against float64: its name, and its error over the budget.
    worst: str = ""
    error_over_budget: float | None = None
    ms: Timing | None = None  # between events around a call: with the host's share, where that is longer
    graph_ms: Timing | None = None  # of one call in replays of a CUDA graph: the device alone
    first_call_seconds: float | None = None
    peak_bytes: int | None = None
    bytes: int | None = None
    operations: int | None = None
    floor_ms: float | None = None
    quick: bool = False  # timed by the few repetitions of --quick
    extra: dict[str, float] = field(default_factory=dict)  # images_per_second, model_flop_utilisation, …

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.case, self.work, self.dtype, self.implementation

    @property
    def group(self) -> tuple[str, str, str]:
        """Rows of one group are compared."""
        return self.case, self.work, self.dtype

    @property
    def time_ms(self) -> float | None:
        """Of the device alone where that was measured, else between events."""
        timing = self.graph_ms or self.ms
        return timing.median if timing else None

    @property
    def fraction_of_floor(self) -> float | None:
        return self.floor_ms / self.time_ms if self.floor_ms and self.time_ms else None


def speedup(ours: Row, other: Row) -> float | None:
    """other's time over ours: device times where both have one, else both between events."""
    if ours.graph_ms and other.graph_ms:
        return other.graph_ms.median / ours.graph_ms.median
    if ours.ms and other.ms:
        return other.ms.median / ours.ms.median
    return None


@dataclass
class Results:
    """Of one suite on one device."""

    environment: dict[str, object]
    ceilings: Ceilings | None
    rows: list[Row] = field(default_factory=list)

    def add(self, rows: list[Row]) -> None:
        """In place of rows of the same key."""
        keys = {row.key for row in rows}
        self.rows = [row for row in self.rows if row.key not in keys] + rows

    def save(self, folder: Path, suite: str) -> None:
        """<suite>.json and <suite>.csv, each replaced at once."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "environment": self.environment,
            "ceilings": asdict(self.ceilings) if self.ceilings else None,
        }
        lines = ",\n".join(json.dumps(asdict(row)) for row in self.rows)
        text = json.dumps(content, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
        _replace(folder / f"{suite}.json", text)
        flat = [_flatten(row) for row in self.rows]
        with open(folder / f"{suite}.csv.part", "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)), restval="")
            writer.writeheader()
            writer.writerows(flat)
        os.replace(folder / f"{suite}.csv.part", folder / f"{suite}.csv")


def add_output(parser: argparse.ArgumentParser, what: str = "folder") -> None:
    """Options for where results go."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--out", type=Path, help=f"{what} for the results")
    either.add_argument(
        "--results",
        type=Path,
        default=OUTPUTS,
        help=f"folder with a folder for each device's results, such as benchmarks/results; default: {OUTPUTS}",
    )


def device_slug(name: str) -> str:
    """Of files and folders of a device: "NVIDIA H200" → nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def output_folder(options: argparse.Namespace, device: str) -> Path:
    return options.out or options.results / device_slug(device)


def load(path: Path) -> Results:
    """Raises ValueError for a file that is not one of ours."""
    try:
        content = json.loads(path.read_text())
        ceilings = content["ceilings"] and Ceilings(**content["ceilings"])
        rows = [_row(row) for row in content["rows"]]
        return Results(content["environment"], ceilings, rows)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result file of these benchmarks: {error!r}") from error


def open_results(folder: Path, suite: str, environment: dict, ceilings: Ceilings) -> Results:
    """The suite's results to add to: those of `folder` if they are of the same device, versions and commit (a
    known one, without changes), so that a run of a few shapes does not drop the others; else none."""
    path = folder / f"{suite}.json"
    known = re.fullmatch("[0-9a-f]+", str(environment["commit"]))
    if path.exists() and known:
        earlier = load(path)
        same = ("device", "versions", "commit", "threads")
        if all(earlier.environment.get(name) == environment[name] for name in same):
            return Results(environment, ceilings, earlier.rows)
    return Results(environment, ceilings)


def _row(values: dict) -> Row:
    for name in ("ms", "graph_ms"):
        if values[name] is not None:
            values[name] = Timing(**values[name])
    return Row(**values)


def _flatten(row: Row) -> dict:
    """One level of columns, with the derived ones."""
    flat = {}
    for column in fields(row):
        value = getattr(row, column.name)
        if isinstance(value, Timing):
            flat |= {f"{column.name}_{name}": number for name, number in asdict(value).items()}
        elif isinstance(value, dict):
            flat |= {f"{column.name}_{name}": number for name, number in value.items()}
        else:
            flat[column.name] = "" if value is None else value
    fraction = row.fraction_of_floor
    return flat | {"fraction_of_floor": "" if fraction is None else fraction}


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def environment(device: torch.device) -> dict[str, object]:
    """Device, driver, versions, commit and date of a run."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "diffusers", "liger-kernel"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    found = {
        "device": "cpu",
        "driver": None,
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "driver": _driver(),
            "cuda": torch.version.cuda or torch.version.hip,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": math.floor(properties.total_memory / 2**30),
        }
    else:
        found["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY")
        found["capability"] = torch.backends.cpu.get_cpu_capability()
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str:
    """Of the sources, "+changes" where files differ from it; EDT_BENCHMARK_COMMIT where there is no git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("EDT_BENCHMARK_COMMIT", "unknown")
    sources = [":/edt", ":/edt_kernels", ":/benchmarks/*.py"]
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno", "--", *sources], capture_output=True, text=True
    )
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
