"""How long a call of an op keeps the CPU: of real launches, beside its bound."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks import gpu_suite, host, report, static, suites

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")


@pytest.mark.skipif(bool(gpu_suite.compiler_fault()), reason="needs a C compiler and Python's headers")
def test_calls_are_timed_with_their_launches_and_shown_with_their_bounds(tmp_path):
    """In a process of its own: it replaces the driver."""
    out = tmp_path / "host.json"
    arguments = ["host", "--quick", "--ops", "gated_residual_adaln", "amm_attention, bias", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    ops = ["torch.add", "amm_attention, bias", "gated_residual_adaln"]
    names = [f"{op}: {work}" for op in ops for work in host.WORKS]
    assert list(found["microseconds"]) == list(found["launches"]) == names
    for op in ops:
        alone, forward, both = (found["launches"][f"{op}: {work}"] for work in host.WORKS)
        assert alone == forward
        assert 0 < forward < both or (op == "torch.add" and both == 0)
        taken = [found["microseconds"][f"{op}: {work}"] for work in host.WORKS]
        assert 0 < taken[0] < taken[2]
        assert taken[0] < 1000  # and nothing is compiled while the clock runs
    lines = {line.partition("  ")[0]: line for line in done.stdout.splitlines()}
    assert all(f"({bound})" in lines["amm_attention, bias"] for bound in (15, 25, 90))
    assert all(f"({bound})" in lines["gated_residual_adaln"] for bound in (12, 20, 90))
    assert "on which torch.add: forward+backward takes 12 µs" in done.stdout
    assert report._extra(tmp_path, "host") + "\n" == done.stdout


def test_what_is_over_its_bound_is_marked_by_the_machines_own_speed():
    names = [f"{op}: {work}" for op in ("torch.add", "adaln", "amm_attention") for work in host.WORKS]
    launches = dict.fromkeys(names, 1)
    twice_as_slow = dict(zip(names, (1.8, 3.0, 24.0, 24.1, 39.9, 179.0, 29.0, 51.0, 181.0)))
    shown = host.table(twice_as_slow, launches).splitlines()
    assert [line.count("*") for line in shown[1:4]] == [0, 1, 2]
    assert "2.00 times as fast as this one" in shown[-1]


def test_a_time_of_no_launch_is_refused():
    stub = SimpleNamespace(launches=lambda: 7)
    assert host.count_launches({"torch.add: forward": lambda: None}, stub) == {"torch.add: forward": 0}
    with pytest.raises(ValueError, match="adaln: forward launched nothing through the stub"):
        host.count_launches({"adaln: forward": lambda: None}, stub)


def test_without_a_c_compiler_it_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: None)
    assert command.main(["host", "--quick"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("benchmarks: error: no C compiler is here, which Triton needs at its first launch")


def test_all_has_it_where_there_is_a_compiler(tmp_path, monkeypatch, capsys):
    commands = []

    def run(command, **options):
        commands.append(command[1:])
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(suites, "SUITES", ())
    monkeypatch.setattr(static, "main", lambda arguments: 0)
    monkeypatch.setattr(suites, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(gpu_suite, "compiler_fault", lambda: None)
    arguments = ["all", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == 1  # a fault of the host's
    assert commands == [["-m", "benchmarks", "host", "--out", str(tmp_path / "host.json"), "--quick"]]
    monkeypatch.setattr(gpu_suite, "compiler_fault", lambda: "no C compiler is here")
    assert command.main(arguments) == 0
    assert len(commands) == 1
    assert "host: left out: no C compiler is here\n" in capsys.readouterr().out
