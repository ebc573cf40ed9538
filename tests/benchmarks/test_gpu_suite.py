"""The orchestrator of the GPU's checks, with small scripts in place of its parts."""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import sample_results as sample

from benchmarks import gpu_suite, loss_curves
from benchmarks.gpu_suite import Part, deadlines, run
from benchmarks.pytest_output import count_tests

FAKE_TESTS = """
import os, pytest
def test_passes(): pass
@pytest.mark.parametrize("case", ["a b", "c"])
def test_cases(case): assert case != "c"
@pytest.mark.skip(reason="needs more")
def test_is_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError("fixture")
def test_errs(broken): pass
def test_crashes(): os.kill(os.getpid(), 9)
def test_is_never_reached(): pass
"""


def script(name, code, share=1.0, group="bench") -> Part:
    return Part(name, group, [sys.executable, "-c", code], share)


def test_a_crash_and_a_hang_are_survived_and_deadlines_hold(tmp_path, capsys):
    hang = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('hangs'); time.sleep(60)"
    child = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    )
    seen = (
        "import json, pathlib; parts = json.loads(pathlib.Path('{}').read_text())['parts']; "
        "print([(p['name'], p['status']) for p in parts])"
    ).format(tmp_path / "suite.json")
    parts = [
        script("crash", "import os; os.kill(os.getpid(), 11)"),
        script("fails", "raise SystemExit(3)"),
        Part("not there", "bench", ["/no/such/program"], 1),
        script("hang", hang),
        script("child", child, 0.5),
        script("sees what went before", seen, 8, "summary"),
    ]
    begin = time.monotonic()
    gpu_suite._GRACE_SECONDS, before = 0.5, gpu_suite._GRACE_SECONDS
    try:
        state = run(parts, 12, tmp_path, {})
    finally:
        gpu_suite._GRACE_SECONDS = before
    assert time.monotonic() - begin < 9
    statuses = {record["name"]: record["status"] for record in state["parts"]}
    assert statuses["crash"] == "crashed: signal 11"
    assert statuses["fails"] == "failed: exit status 3"
    assert statuses["not there"].startswith("failed: ")
    assert statuses["hang"] == statuses["child"] == "stopped: late"
    assert statuses["sees what went before"] == "ok"
    assert "('hang', 'stopped: late')" in (tmp_path / "summary.txt").read_text()
    assert json.loads((tmp_path / "suite.json").read_text()) == state
    assert "hangs" in (tmp_path / "bench.txt").read_text()
    assert "crashed: signal 11" in capsys.readouterr().out


def test_time_that_a_part_leaves_goes_to_the_next_and_what_has_none_is_not_started(tmp_path):
    parts = [script("short", "pass", 3), script("next", "pass", 1), script("none", "pass", 0)]
    assert deadlines(parts, 8) == [6, 8, 8]
    records = run(parts, 8, tmp_path, {})["parts"]
    assert records[0]["limit_s"] == pytest.approx(6, abs=0.2)
    assert records[1]["limit_s"] > 6
    late = gpu_suite.run_part(parts[0], -0.1, tmp_path, {})
    assert (late["status"], late["seconds"]) == ("no time", 0)


def test_what_an_earlier_run_measured_is_not_this_ones(tmp_path):
    for suite in ("attention", "adaln"):
        sample.results(sample.norm_rows()).save(tmp_path, suite)
    (tmp_path / "tiles.json").write_text("{}")
    for name in ("loss_curves.json", "loss_curves.png"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(SystemExit, match=r"has adaln\.json, and no suite\.json says that this wrote it"):
        run([script("benchmark adaln", "raise SystemExit(1)")], 60, tmp_path, {})
    assert (tmp_path / "adaln.json").exists()
    (tmp_path / "suite.json").write_text("{}")
    run([script("benchmark adaln", "raise SystemExit(1)")], 60, tmp_path, {})
    assert (tmp_path / "loss_curves.json").exists()
    (tmp_path / "host.json").write_text("{}")
    run([script("loss curves", "raise SystemExit(1)", group="curves")], 60, tmp_path, {})
    assert (tmp_path / "host.json").exists()
    run([script("host", "raise SystemExit(1)", group="host")], 60, tmp_path, {})
    for group in ("curves", "host"):
        (tmp_path / f"{group}.txt").unlink()
    assert {path.name for path in tmp_path.iterdir()} == {
        "attention.json", "attention.csv", "tiles.json", "bench.txt", "suite.json",
    }  # fmt: skip


def test_tests_are_counted_in_what_a_killed_pytest_wrote(tmp_path):
    (tmp_path / "test_fake.py").write_text(FAKE_TESTS)
    (tmp_path / "test_other.py").write_text("import no_such_module")
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "--rootdir",
               str(tmp_path), "-c", "/dev/null", "--continue-on-collection-errors"]  # fmt: skip
    state = run([Part("fake", "tests", [*command, str(tmp_path)], 1)], 60, tmp_path / "out", {"missing": []})
    record = state["parts"][0]
    assert record["status"] == "crashed: signal 9"
    tests = record["tests"]
    assert (tests["passed"], tests["failed"], tests["skipped"], tests["errors"]) == (2, 1, 1, 1)
    assert [name.split("::")[1] for name in tests["failures"]] == ["test_cases[c]", "test_errs"]
    assert [name.split("::")[1] for name in tests["unfinished"]] == ["test_crashes"]
    assert gpu_suite.failures(state)[-1] == "fake crashed: signal 9"
    assert len(gpu_suite.failures(state)) == 3


# What xdist writes, stopped by Ctrl-C.
XDIST = """
created: 2/2 workers
tests/test_a.py::test_passes
tests/test_a.py::test_cases[a b]
[gw0] [ 14%] PASSED tests/test_a.py::test_passes
tests/test_a.py::test_hangs
[gw1] [ 28%] FAILED tests/test_a.py::test_cases[a b]
tests/test_a.py::test_is_skipped
[gw1] [ 71%] SKIPPED tests/test_a.py::test_is_skipped

==================================== ERRORS ====================================
________________________ ERROR collecting tests/test_b.py ________________________
E   ModuleNotFoundError: No module named 'diffusers'
=========================== short test summary info ============================
FAILED tests/test_a.py::test_cases[a b] - AssertionError: assert 'c' != 'c'
ERROR tests/test_b.py - ImportError while importing test module
!!!!!!!!!!!!!!!!!!!!!!!!!!!!!! KeyboardInterrupt !!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!
"""


def test_tests_of_many_workers_are_counted_and_a_missing_module_is_no_failure():
    tests = count_tests(XDIST)
    assert tests == {
        "passed": 1, "failed": 1, "skipped": 1, "errors": 1, "failures": ["tests/test_a.py::test_cases[a b]"],
        "not_collected": ["tests/test_b.py"], "unfinished": ["tests/test_a.py::test_hangs"],
    }  # fmt: skip
    record = {"name": "tests/test_b.py", "group": "tests", "status": "failed: exit status 1", "tests": tests}
    state = {"wrong": [], "parts": [record], "missing": ["liger_kernel"]}
    assert len(gpu_suite.failures(state)) == 2
    state["missing"] = ["diffusers"]
    assert gpu_suite.failures(state) == ["test failed: tests/test_a.py::test_cases[a b]"]


def test_a_part_that_crashes_is_a_failure_and_one_that_is_late_is_none():
    statuses = ["ok", "stopped: late", "no time", "failed: exit status 1", "crashed: signal 11"]
    parts = [{"name": f"benchmark {i}", "group": "bench", "status": status} for i, status in enumerate(statuses)]
    state = {"wrong": [], "parts": parts, "missing": ["liger_kernel"]}
    crashed = "benchmark 4 crashed: signal 11"
    assert gpu_suite.failures(state) == ["benchmark 3 failed: exit status 1", crashed]
    assert gpu_suite.failures(state | {"missing": ["tyro"]}) == [crashed]


def test_output_cut_off_anywhere_is_counted():
    text = "tests/test_a.py::test_x[1] PASSED   [ 50%]\ntests/test_a.py::test_y FAILED [ 60%]\n"
    text += "tests/test_a.py::test_z "
    for end in range(len(text)):
        count_tests(text[:end])
    found = count_tests(text)
    assert (found["passed"], found["failed"], found["unfinished"]) == (1, 1, ["tests/test_a.py::test_z"])
    text = "[gw3] [ 50%] PASSED tests/test_a.py::test_x[1] \n[gw1] [ 60%] FAILED tests/test_a.py::test_y \n"
    found = count_tests(text)
    assert (found["passed"], found["failures"]) == (1, ["tests/test_a.py::test_y"])


def test_the_whole_prints_the_table_and_fails_where_ours_is_wrong(tmp_path, monkeypatch, capsys):
    rows = sample.attention_rows(16, 64)
    sample.results(rows).save(tmp_path, "attention")
    bad = sample.norm_rows()
    bad[0] = sample.without_times(bad[0], "wrong", "output 0: 7 times the error allowed")

    def save_wrong():
        sample.results(bad).save(tmp_path, "adaln")

    curves = {
        "steps": 1,
        "model": "EDT-S/2",
        "batch_size": 16,
        "seconds": {"ours": 9.0},
        "losses": {"ours": [2.0]},
    }
    verdict = {"within_bf16_noise": True, "reason": "within bf16 noise: 1, where 2 is allowed", "difference": 1.0}
    (tmp_path / "loss_curves.json").write_text(json.dumps(curves | verdict | {"noise": 1.0}))
    report = Part("report", "summary", [sys.executable, "-m", "benchmarks.report", str(tmp_path)], 30)
    monkeypatch.setattr(gpu_suite, "_PROBE", "print('Sample GPU')")
    monkeypatch.setattr(gpu_suite, "plan", lambda *arguments: [script("benchmark", "pass"), report])
    assert gpu_suite.main(["--out", str(tmp_path), "--minutes", "1", "--pack"]) == 0
    out = capsys.readouterr().out
    assert "attention: Sample GPU; driver 1.2" in out
    assert "loss curves, EDT-S/2, 1 steps of 16 images:" in out
    assert "  within bf16 noise: 1, where 2 is allowed" in out
    assert "| 3.00× | 70% | attention-eager 8.00× (eager, as released), ≥ 6×: met" in out
    assert (tmp_path / "report.md").exists()
    with zipfile.ZipFile(tmp_path / "gpu_suite.zip") as archive:
        assert {"suite.json", "summary.txt", "attention.json", "attention.csv"} <= set(archive.namelist())

    save_wrong()
    verdict = {"within_bf16_noise": False, "reason": "NOT within bf16 noise: 3, where 2 is allowed"}
    (tmp_path / "loss_curves.json").write_text(json.dumps(curves | verdict))
    monkeypatch.setattr(
        gpu_suite, "plan", lambda *arguments: [script("benchmark", "pass"), script("report", "pass", 1, "summary")]
    )
    assert gpu_suite.main(["--out", str(tmp_path), "--minutes", "1"]) == 1
    out = capsys.readouterr().out
    assert "ours: adaln: gated_residual_adaln EDT-XL/2 16x16 C936 B64, forward, mixed: wrong" in out
    assert "ours: loss curves: NOT within bf16 noise: 3, where 2 is allowed" in out


def test_the_plan_and_a_machine_without_a_gpu(tmp_path, capsys, monkeypatch):
    parts = gpu_suite.plan(list(gpu_suite.GROUP_SECONDS), tmp_path, has_xdist=True)
    names = [part.name for part in parts]
    assert names[:2] == ["compile", "tests"]
    tests = [word for word in parts[1].command if word.startswith("tests/")]
    assert tests[:2] == ["tests/kernels/test_amm_attention.py", "tests/kernels/test_norm_ops.py"]
    assert len(tests) == len(set(tests)) >= 11
    assert parts[1].command[parts[1].command.index("-m", 3) + 1] == "gpu and not slow"
    benchmarks = [name.split()[1] for name in names if name.startswith("benchmark ")]
    assert benchmarks == ["attention", "adaln", "merge", "split", "train", "model", "sample"]
    assert names[-4:] == ["host", "loss curves", "tiles", "report"]
    assert 60 <= parts[-3].share <= 90
    assert parts[-3].command[1:4] == ["-m", "benchmarks", "loss_curves"]
    loss_curves.build_parser().parse_args(parts[-3].command[4:])
    assert parts[-3].name not in {part.name for part in gpu_suite.plan(["tests", "tune"], tmp_path, True)}
    assert sum(part.share for part in parts) == pytest.approx(540)
    assert min(part.share for part in parts if part.group == "bench") >= 3 * gpu_suite._GRACE_SECONDS
    assert set(gpu_suite.TEST_FILES) <= {Path(name).stem for name in tests}
    assert deadlines(parts, 540)[-1] == pytest.approx(540)
    assert parts[1].command[parts[1].command.index("--dist") + 1] == "worksteal"
    assert "-n" not in gpu_suite.plan(["tests"], tmp_path, has_xdist=False)[0].command

    monkeypatch.setattr(gpu_suite, "_PROBE", "raise RuntimeError('no driver')")
    assert gpu_suite.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "gpu_suite: error: no GPU here: RuntimeError: no driver\n"
    assert gpu_suite.main(["--dry-run"]) == 0
    assert "over after  540 s" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_machine_on_which_triton_could_launch_nothing_is_told(tmp_path, monkeypatch, capsys):
    assert gpu_suite.compiler_fault() is None  # here
    broken = tmp_path / "cc"
    broken.write_text(
        "#!/bin/sh\necho 'probe.c:1:10: fatal error: Python.h: No such file or directory' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setattr(gpu_suite, "_PROBE", "print('Sample GPU')")
    assert gpu_suite.main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "cannot compile against" in error
    assert "Python.h: No such file or directory; install Python's headers" in error
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert "does not run: " in gpu_suite.compiler_fault()
    monkeypatch.delenv("CC")
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: None)
    assert gpu_suite.compiler_fault().startswith("no C compiler is here, which Triton needs at its first launch")


def test_it_needs_the_standard_library_alone():
    """On the machine that it reports about, anything else may be broken."""
    code = "import sys; import benchmarks.gpu_suite; print({'torch', 'numpy', 'pytest'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=gpu_suite.ROOT).stdout == "set()\n"
    )
