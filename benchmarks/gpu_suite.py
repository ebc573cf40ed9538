"""All that needs a GPU, in one command that keeps to its time: tests, quick benchmarks, loss curves, tiles.

    python -m benchmarks gpu_suite [--out DIR] [--minutes 9] [--only GROUP …] [--commit HASH] [--pack]

Each part is a process with a deadline; one that crashes or is late ends alone, and what it wrote is kept. Time
that a part leaves goes to the next. DIR/suite.json says what ran; it is written after every part. The exit status
is 1 if a test failed, ours was wrong or a part crashed, 2 without a GPU or a C compiler. The standard library is
all that this file needs.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .pytest_output import count_tests

ROOT = Path(__file__).resolve().parents[1]
# Imports, CUDA's start and the ceilings take several seconds of each; building and checking models as many again.
SUITES = {"attention": 63, "adaln": 23, "merge": 17, "split": 17, "train": 34, "model": 25, "sample": 25}
# Of all files with such tests, in the order of importance; others come last. One pytest runs them all: each would
# start workers of its own, which import torch and diffusers and start CUDA for 10 s. The workers share all tests
# evenly and take over from one another, so that each file has time by the number of its tests.
TEST_FILES = ("test_amm_attention", "test_norm_ops", "test_torch_integration", "test_model_on_kernels")
# Tiles come last: tuning takes whatever the others leave.
GROUP_SECONDS = {"compile": 57, "tests": 125, "bench": 204, "host": 18, "curves": 70, "tune": 36}
# So few images that three runs of 200 steps fit: a step is then mostly launches.
_LOSS_CURVES = "loss curves"
_CURVES = ("--model", "EDT-S/2", "--steps", "200", "--batch-size", "16")
_SUMMARY_SECONDS = 30
# Nothing of this is fatal to miss: what needs it fails, and says so.
MODULES = ("torch", "triton", "numpy", "einops", "pytest", "matplotlib", "safetensors", "tqdm", "diffusers",
           "accelerate", "pytorch_optimizer", "tyro", "yaml", "xdist", "hypothesis", "liger_kernel")  # fmt: skip
_GRACE_SECONDS = 5  # from Ctrl-C, at which pytest prints its failures and benchmarks stop, to the kill
_TUNE_ENDS_EARLY = 20  # tune begins nothing new after --seconds, but ends what it began
# What Triton does at its first launch, to reach the driver.
_C_SOURCE = "#include <Python.h>\nint answer(void) { return 42; }\n"
_PROBE = "import torch; p = torch.cuda.get_device_properties(0); print(p.name, 'torch', torch.__version__)"


def c_compiler() -> str | None:
    """Which Triton takes."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def compiler_fault() -> str | None:
    """Why Triton could not launch anything here: it compiles some C against Python's headers first."""
    compiler = c_compiler()
    if compiler is None:
        return "no C compiler is here, which Triton needs at its first launch; install gcc, or name one in CC"
    include = sysconfig.get_paths(scheme="posix_prefix")["include"]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.c"), Path(folder, "probe.so")
        source.write_text(_C_SOURCE)
        command = [compiler, str(source), "-shared", "-fPIC", f"-I{include}", "-o", str(library)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"the C compiler {compiler}, which Triton needs at its first launch, does not run: {error}"
    if done.returncode == 0:
        return None
    message = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
    return (
        f"{compiler} cannot compile against {include}, as Triton does at its first launch: {message.strip()}; "
        "install Python's headers (python3-dev)"
    )


@dataclass
class Part:
    name: str
    group: str  # "compile", "tests", "bench", "host", "curves", "tune", "summary": its output goes to <group>.txt
    command: list[str]  # "{seconds}" becomes the time that tune is given
    share: float  # of the whole time, before scaling


def plan(groups: list[str], out: Path, has_xdist: bool) -> list[Part]:
    parts = []
    if "compile" in groups:
        command = [sys.executable, "-m", "benchmarks", "warm_up"]
        parts.append(Part("compile", "compile", command, GROUP_SECONDS["compile"]))
    if "tests" in groups:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Compiling is most of the time. Each worker has a context of the GPU and tensors of its own there.
        workers = ["-n", str(max(1, min(8, cores // 2))), "--dist", "worksteal"] if has_xdist else []
        pytest = [sys.executable, "-m", "pytest", "-m", "gpu and not slow", "-v", "--tb=short",
                  "-p", "no:cacheprovider", *workers]  # fmt: skip
        files = [path for path in sorted((ROOT / "tests").rglob("test_*.py"))
                 if re.search(r"\bmark\.gpu\b", path.read_text(encoding="utf-8"))]  # fmt: skip
        order = [*TEST_FILES, ""]
        files.sort(key=lambda path: order.index(path.stem if path.stem in TEST_FILES else ""))
        names = [str(path.relative_to(ROOT)) for path in files]
        parts.append(Part("tests", "tests", [*pytest, *names], GROUP_SECONDS["tests"]))
    if "bench" in groups:
        command = [sys.executable, "-m", "benchmarks"]
        parts += [Part(f"benchmark {suite}", "bench", [*command, suite, "--quick", "--out", str(out)], share)
                  for suite, share in SUITES.items()]  # fmt: skip
    if "host" in groups:
        command = [sys.executable, "-m", "benchmarks", "host", "--quick", "--out", str(out / "host.json")]
        parts.append(Part("host", "host", command, GROUP_SECONDS["host"]))
    if "curves" in groups:
        command = [sys.executable, "-m", "benchmarks", "loss_curves", *_CURVES, "--out", str(out)]
        parts.append(Part(_LOSS_CURVES, "curves", command, GROUP_SECONDS["curves"]))
    if "tune" in groups:
        command = [sys.executable, "-m", "benchmarks", "tune", "--quick", "--seconds", "{seconds}"]
        command += ["--output", str(out / "tiles.json")]
        parts.append(Part("tiles", "tune", command, GROUP_SECONDS["tune"]))
    report = [sys.executable, "-m", "benchmarks", "report", str(out)]
    return [*parts, Part("report", "summary", report, _SUMMARY_SECONDS)]


def deadlines(parts: list[Part], seconds: float) -> list[float]:
    """After the start: when each has to be over. Fixed, so that time one leaves is the next one's."""
    total, so_far, found = sum(part.share for part in parts), 0.0, []
    for part in parts:
        so_far += part.share
        found.append(seconds * so_far / total)
    return found


def run_part(part: Part, seconds: float, out: Path, environment: dict[str, str]) -> dict:
    """What became of it; never raises for what the part does."""
    tune_seconds = str(max(1, int(seconds - _TUNE_ENDS_EARLY)))
    command = [word.replace("{seconds}", tune_seconds) for word in part.command]
    record = {"name": part.name, "group": part.group, "command": command, "limit_s": round(seconds, 1)}
    if seconds <= 0:
        return record | {"seconds": 0.0, "status": "no time"}
    path, begin = out / f"{part.group}.txt", time.monotonic()
    with open(path, "ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        start = log.tell()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return record | {"seconds": 0.0, "status": f"failed: {error}"}
        late = False
        try:
            process.wait(max(seconds - _GRACE_SECONDS, seconds / 2))
        except subprocess.TimeoutExpired:
            late = True
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(_GRACE_SECONDS, seconds / 2))
        finally:
            _signal(process, signal.SIGKILL)  # and what it left running
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process that a hung GPU holds does not die
                process.wait(_GRACE_SECONDS)
    code = process.returncode or 0
    ended = "ok" if code == 0 else f"crashed: signal {-code}" if code < 0 else f"failed: exit status {code}"
    record |= {"seconds": round(time.monotonic() - begin, 1), "status": "stopped: late" if late else ended}
    if part.group == "tests":
        record["tests"] = count_tests(path.read_bytes()[start:].decode(errors="replace"))
        if code == 5 and not late:  # pytest's for "none collected"
            record["status"] = "ok"
    return record


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def run(parts: list[Part], seconds: float, out: Path, state: dict, variables: dict | None = None) -> dict:
    """Part after part; `state` with the records is stored after each."""
    out.mkdir(parents=True, exist_ok=True)
    stale = [f"{group}.txt" for group in {part.group for part in parts}]
    # What an earlier run measured must not pass for this one's. (Tiles say themselves what they were measured on.)
    suites = [suite for suite in SUITES if any(part.name == f"benchmark {suite}" for part in parts)]
    stale += [f"{suite}.{kind}" for suite in suites for kind in ("json", "csv")]
    if any(part.name == _LOSS_CURVES for part in parts):
        stale += ["loss_curves.json", "loss_curves.png"]
    stale += ["host.json"] * any(part.group == "host" for part in parts)
    there = [name for name in stale if (out / name).exists()]
    if there and not (out / "suite.json").is_file():
        raise SystemExit(
            f"--out {out} has {there[0]}, and no suite.json says that this wrote it; give another --out"
        )
    _store(state, out / "suite.json")
    for name in there:
        (out / name).unlink()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"} | (variables or {})
    begin, state["parts"] = time.monotonic(), []
    for part, end in zip(parts, deadlines(parts, seconds), strict=True):
        left = begin + end - time.monotonic()
        print(f"{time.monotonic() - begin:5.0f} s  {part.name}, {left:.0f} s at most", flush=True)
        record = run_part(part, left, out, environment)
        state["parts"].append(record)
        state["seconds"] = round(time.monotonic() - begin, 1)
        state["wrong"] = wrong_rows(out)
        _store(state, out / "suite.json")
        tests = record.get("tests")
        line = f"         {record['status']} after {record['seconds']:.0f} s"
        if tests:
            line += ": " + ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped", "errors"))
            for what in ("failures", "not_collected", "unfinished"):
                line += "".join(f"\n         {what}: {name}" for name in tests[what])
        print(line, flush=True)
    return state


def _store(state: dict, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(state, indent=1) + "\n")
    os.replace(part, path)


def wrong_rows(out: Path) -> list[str]:
    """Of ours that are wrong or fail, read without torch."""
    found = []
    for suite in SUITES:
        try:
            rows = json.loads((out / f"{suite}.json").read_text())["rows"]
        except (OSError, ValueError, KeyError):
            continue
        found += [f"{suite}: {row['case']}, {row['work']}, {row['dtype']}: {row['status']}: {row['reason']}"
                  for row in rows if row["role"] == "ours" and row["status"] in ("wrong", "failed")]  # fmt: skip
    with contextlib.suppress(OSError, ValueError, KeyError):
        curves = json.loads((out / "loss_curves.json").read_text())
        if not curves["within_bf16_noise"]:
            found.append(f"{_LOSS_CURVES}: {curves['reason']}")
    return found


def failures(state: dict) -> list[str]:
    """Why the exit status is 1. What a missing module explains is no reason: tests that cannot be collected,
    commands that fail."""
    found = [f"ours: {text}" for text in state["wrong"]]
    missing = set(state["missing"]) - {"liger_kernel", "xdist"}  # which no test needs
    for record in (record for record in state["parts"] if "tests" in record):
        found += [f"test failed: {name}" for name in record["tests"]["failures"]]
        found += [f"not collected: {name}" for name in record["tests"]["not_collected"] if not missing]
    for record in state["parts"]:
        # Of pytest's own, 3 is an internal error, 4 an argument that it does not know; 1 is told above.
        telling = (
            ("failed: exit status 3", "failed: exit status 4")
            if "tests" in record
            else ("failed",) * (not missing)
        )
        if record["status"].startswith(("crashed", *telling)):
            found.append(f"{record['name']} {record['status']}")
    return found


def pack(out: Path) -> Path:
    path = out / "gpu_suite.zip"
    files = [file for file in sorted(out.rglob("*")) if file.is_file() and file != path]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.relative_to(out))
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu_suite", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu_suite", help="folder for all output")
    parser.add_argument("--minutes", type=float, default=9, help="for everything")
    parser.add_argument("--only", nargs="+", choices=list(GROUP_SECONDS), default=list(GROUP_SECONDS))
    parser.add_argument("--commit", help="of the sources, where there is no git to ask")
    parser.add_argument("--pack", action="store_true", help="put everything into DIR/gpu_suite.zip too")
    parser.add_argument("--dry-run", action="store_true", help="print commands and deadlines")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < math.inf:
        raise ValueError(f"minutes is {options.minutes}; it must be a finite number above 0")
    out, seconds = options.out.resolve(), 60 * options.minutes
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    parts = plan(options.only, out, "xdist" not in missing)
    if options.dry_run:
        for part, end in zip(parts, deadlines(parts, seconds), strict=True):
            print(f"over after {end:4.0f} s: {' '.join(part.command)}")
        print(f"missing: {', '.join(missing) or 'nothing'}")
        return 0
    try:
        command = [sys.executable, "-c", _PROBE]
        gpu = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except subprocess.SubprocessError as error:
        reason = (str(error.stderr or "").strip() or str(error)).splitlines()[-1]
        print(f"gpu_suite: error: no GPU here: {reason}", file=sys.stderr)
        return 2
    if fault := compiler_fault():
        print(f"gpu_suite: error: {fault}", file=sys.stderr)
        return 2
    print(f"{gpu.stdout.strip()}; missing: {', '.join(missing) or 'nothing'}; output: {out}", flush=True)
    state = {"gpu": gpu.stdout.strip(), "minutes": options.minutes, "commit": options.commit, "missing": missing}
    variables = {"EDT_BENCHMARK_COMMIT": options.commit} if options.commit else {}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended too
    try:
        state = run(parts, seconds, out, state, variables)
    finally:
        signal.signal(signal.SIGTERM, before)
    summary = out / "summary.txt"
    print(summary.read_text(encoding="utf-8", errors="replace") if summary.exists() else "no time for a report")
    found = failures(state)
    print("\n".join(found) or "no test failed, nothing of ours was wrong")
    if options.pack:
        print(f"packed: {pack(out)}")
    return int(bool(found))


if __name__ == "__main__":
    from .__main__ import main as command

    sys.exit(command(["gpu_suite", *sys.argv[1:]]))
