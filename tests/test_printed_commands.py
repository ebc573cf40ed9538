"""The commands that edt prints for the user to type next work as they are printed."""

import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from training_runs import ROOT, small_arguments

from edt.cli import main
from edt.data.dataset import write_dataset
from edt.files.text import command

# As pip writes it.
SCRIPT = f"#!{sys.executable}\nimport sys\nfrom edt.cli import main\nsys.exit(main())\n"


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """edt as installed into an environment; the current folder is beside it."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    script = tmp_path / ".venv" / "bin" / "edt"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return script.parent


def test_after_a_training(scripts, tmp_path, monkeypatch, capfd):
    """Of a run whose folder has a space in its name; started as make does, by a path that is not on PATH."""
    images = np.random.default_rng(0).integers(0, 256, (8, 1, 8, 8), dtype=np.uint8)
    write_dataset(tmp_path / "data", images, np.arange(8) % 2)
    monkeypatch.setattr(sys, "argv", [".venv/bin/edt"])
    assert main(small_arguments(tmp_path / "data", "my run", model="EDT-digits", steps=1)) == 0
    printed = capfd.readouterr().out.splitlines()[-1].strip()
    assert printed == ".venv/bin/edt sample --checkpoint 'my run' --classes all"
    more = " --steps 1 --num-images 2 --device cpu"
    assert subprocess.run(printed + more, shell=True).returncode == 0
    assert "2 images in outputs/samples" in capfd.readouterr().out
    assert len(list((tmp_path / "outputs" / "samples" / "images").iterdir())) == 2


def test_the_program_as_it_was_started(scripts, monkeypatch):
    module = os.path.join(ROOT, "edt", "__main__.py")
    for argv, original, expected in (
        ([".venv/bin/edt"], [sys.executable, ".venv/bin/edt"], ".venv/bin/edt"),
        ([str(scripts / "edt")], [sys.executable, str(scripts / "edt")], shlex.quote(str(scripts / "edt"))),
        ([module, "demo"], ["venv/bin/python", "-m", "edt", "demo"], "venv/bin/python -m edt"),
        (["-c"], ["python", "-c", "…"], "edt"),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", original)
        assert command("sample", "--output", "a b") == f"{expected} sample --output 'a b'"
    monkeypatch.setenv("PATH", str(scripts), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", [str(scripts / "edt")])
    assert command("info", "EDT-S/2") == "edt info EDT-S/2"


def test_python_m(scripts):
    show = "from edt.files.text import command; print(command('info', 'EDT-S/2'))"
    (scripts / "shows").mkdir()
    (scripts / "shows" / "__main__.py").write_text(show)
    shown = subprocess.run(
        [sys.executable, "-m", "shows"], cwd=scripts, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == f"{shlex.quote(sys.executable)} -m edt info EDT-S/2"
