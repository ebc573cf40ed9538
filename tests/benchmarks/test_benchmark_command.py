"""`python -m benchmarks`: which commands there are, where results go, what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import sample_results as sample

from benchmarks import __main__ as command
from benchmarks import compare, measure, results
from benchmarks.measure import Budget

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_help_lists_every_command_without_torch():
    code = "import sys; from benchmarks.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    *lines, torch_is_loaded = python("-c", code).stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("    ")] == list(command.COMMANDS)
    assert torch_is_loaded == "False"


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0
    usage = capsys.readouterr().out.split("\n")[0]
    assert name == "static" or usage.startswith(f"usage: python -m benchmarks {name} ")


@pytest.mark.parametrize("arguments", [[], ["gpu-suite"], ["--quick"], ["norms"]])
def test_a_wrong_command_is_one_line_with_the_right_ones(arguments, capsys):
    assert command.main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("benchmarks: error: python -m benchmarks takes one of attention, adaln, ")
    assert error.endswith(f"data_loading; not {arguments[0] if arguments else ''!r}")


def test_modules_are_commands_or_say_which_there_are():
    done = python("-m", "benchmarks.gpu_suite", "--dry-run")
    assert (done.returncode, "benchmarks report" in done.stdout) == (0, True)
    done = python("-m", "benchmarks.norms")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "takes one of attention, adaln, merge" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--tolerance", "nan"], "tolerance is nan; it must be a finite number of at least 0"),
        (["compare", "--tolerance", "inf"], "tolerance is inf"),
        (["compare", "--tolerance", "-0.1"], "tolerance is -0.1"),
        (["gpu_suite", "--minutes", "nan"], "minutes is nan; it must be a finite number above 0"),
        (["gpu_suite", "--minutes", "0"], "minutes is 0.0"),
        (["data_loading", "--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["data_loading", "--shard-size", "-1"], "shard_size is -1"),
        (["data_loading", "--workers", "-1"], "workers is -1; it must be at least 0"),
        (["step_cache", "--checkpoint", "x", "--num-steps", "0"], "num_steps is 0"),
        (["step_cache", "--checkpoint", "no such folder"], "no such folder"),
        (["schedulers", "--checkpoint", "no such folder"], "no such folder"),
        (["report", "no such folder"], "folder is no such folder, which is no folder"),
        (["compare", "--tables", "no such folder"], "tables is no such folder, which is no folder"),
        (["data_loading", "--latents", "600", "--folder", "no such folder"], "no such folder"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert command.main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("benchmarks: error: ")
    assert message in error


def test_a_users_results_are_not_among_the_committed_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "QUICK", Budget(warmup=1, repeat=1, rounds=2))
    monkeypatch.chdir(tmp_path)
    arguments = ["adaln", "--quick", "--device", "cpu", "--shapes", "gated_residual EDT-S/2 4x4", "--peers"]
    assert command.main(arguments) == 0
    mine = Path("outputs", "benchmarks", "cpu")
    assert {path.name for path in mine.iterdir()} == {"adaln.json", "adaln.csv"}
    assert command.main([*arguments, "--results", "benchmarks/results"]) == 0
    assert Path("benchmarks", "results", "cpu", "adaln.json").is_file()
    assert f"results: {mine}\n" in capsys.readouterr().out


def test_a_users_results_are_compared_with_the_committed_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Sample GPU")
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "committed")
    monkeypatch.chdir(tmp_path)
    for folder in (compare.RESULTS, results.OUTPUTS):
        sample.results(sample.norm_rows()).save(folder / "sample-gpu", "adaln")
    assert command.main(["compare"]) == 0
    assert f"compared with {tmp_path / 'committed' / 'sample-gpu'}, 0 disagreements" in capsys.readouterr().out
