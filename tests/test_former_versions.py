"""What version 0.1 left is read by today's code: a run goes on, its weights and a pipeline load; and its modules'
names are found."""

import contextlib
import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import DiffusionPipeline
from released import FIXTURES
from training_runs import TINY

import edt
from edt._former import REPLACED
from edt.cli import main
from edt.data import open_dataset, verify_dataset
from edt.model import PRESETS
from edt.runs import list_checkpoints, read_metrics


@pytest.fixture
def former(tmp_path, monkeypatch):
    """Two steps of a model of the tiny preset's depths, half as wide, and the pipeline made of it."""
    size = {"hidden_sizes": (8,) * 5, "num_attention_heads": (1,) * 5}
    monkeypatch.setitem(PRESETS, "tiny", TINY | size)
    shutil.copytree(FIXTURES / "version_0.1", tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_run_goes_on(former, capsys):
    verify_dataset(open_dataset(former / "data"), progress=False)
    averages = edt.load_checkpoint(former / "run").state_dict()
    arguments = ["train", "--output", str(former / "run"), "--data", str(former / "data"), "--steps", "4"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert not any(name in said for name in ("precision", "flip"))  # which were called and spelt otherwise
    assert [line["step"] for line in read_metrics(former / "run" / "metrics.jsonl")] == [2, 4]
    assert [step for step, _ in list_checkpoints(former / "run" / "checkpoints")] == [4]
    assert any(
        (value != averages[name]).any() for name, value in edt.load_checkpoint(former / "run").state_dict().items()
    )


@pytest.mark.parametrize("of_the_folder", [False, True], ids=["EDTPipeline", "trust_remote_code"])
@pytest.mark.filterwarnings("ignore:edt:DeprecationWarning")
def test_a_pipeline_draws(former, of_the_folder):
    if of_the_folder:
        pipe = DiffusionPipeline.from_pretrained(former / "pipeline", trust_remote_code=True)
    else:
        pipe = edt.EDTPipeline.from_pretrained(former / "pipeline")
    assert isinstance(pipe, edt.EDTPipeline)
    averages = edt.load_checkpoint(former / "run").state_dict()
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, averages[name]), name


NAMES = [line.split(": ") for line in (FIXTURES / "version_0.1" / "names.txt").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:edt:DeprecationWarning")
@pytest.mark.parametrize(("module", "names"), NAMES, ids=[module for module, _ in NAMES])
def test_its_names_are_found(module, names):
    """All public names of its modules, none of which was a folder."""
    former = importlib.import_module(f"edt.{module}")
    assert [name for name in names.split() if not hasattr(former, name)] == []


def test_a_module_is_today_s_and_says_so():
    code = """
import warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import edt.config
    from edt.sampling import check_scheduler
import edt.diffusion.sampler, edt.model.presets
assert edt.config is edt.model.presets and edt.config.__spec__.name == "edt.model.presets"
assert check_scheduler is edt.diffusion.sampler.check_scheduler
print(*(warning.message for warning in told if "edt" in str(warning.message)), sep="\\n")
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == [
        "edt.config is edt.model.presets now",
        "edt.sampling.check_scheduler is in edt.diffusion.sampler now",
    ]


@pytest.mark.filterwarnings("ignore:edt:DeprecationWarning")
@pytest.mark.parametrize("by", ["pytest", "mock"])
def test_what_is_set_by_a_former_name_is_what_is_used(by):
    """As a test of a program on 0.1 does."""

    @contextlib.contextmanager
    def patch_object(*args):
        with mock.patch.object(*args) if by == "mock" else pytest.MonkeyPatch.context() as patch:
            if by == "pytest":
                patch.setattr(*args)
            yield

    for former, name, today in (
        ("edt.train", "open_folder", "edt.train.trainer"),
        ("edt.sampling", "scheduler_step", "edt.diffusion.sampler"),
        ("edt.evaluate", "evaluate", "edt.evaluation.evaluator"),
        ("edt.run_folder", "open_folder", "edt.files.lock"),
    ):
        former, today = map(importlib.import_module, (former, today))
        before = getattr(today, name)
        with patch_object(former, name, print):
            assert getattr(today, name) is getattr(former, name) is print
        assert getattr(today, name) is getattr(former, name) is before


@pytest.mark.parametrize("former", sorted(REPLACED))
def test_a_folder_s_own_modules_are_no_former_names(former):
    """Which setting them, as their import does, would overwrite."""
    modules = {path.stem for path in Path(importlib.import_module(f"edt.{former}").__file__).parent.glob("*.py")}
    for today in REPLACED[former].split():
        named = vars(importlib.import_module(f"edt.{today}"))
        assert all(named[name].__name__ == f"edt.{former}.{name}" for name in modules & named.keys())
