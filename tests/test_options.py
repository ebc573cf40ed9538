"""Options of commands that Python calls with values of other types than a command line gives."""

import ast
import inspect
import itertools
import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from edt.cli import Info, Plot
from edt.data.extraction import ExtractOptions, extract
from edt.demo.ablation import AblateOptions, ablate
from edt.demo.run import DemoOptions, run_demo
from edt.evaluation.evaluator import EvaluateOptions, evaluate
from edt.interrupt import StopRequest
from edt.options import check_types, parse, today
from edt.sampling.conversion import ConvertOptions, convert
from edt.sampling.sample_set import SampleOptions, draw_samples
from edt.train import config as train_config
from edt.train.config import TrainConfig, load_config

OPTIONS = {
    "ablate": (AblateOptions(), lambda options: ablate(options, StopRequest())),
    "convert": (ConvertOptions(Path("checkpoint"), Path("output")), convert),
    "demo": (DemoOptions(), run_demo),
    "evaluate": (EvaluateOptions(Path("samples"), Path("reference")), evaluate),
    "extract": (ExtractOptions(Path("source"), Path("output")), extract),
    "sample": (SampleOptions(Path("checkpoint")), lambda options: draw_samples(options, StopRequest())),
    "train": (TrainConfig(Path("data")), TrainConfig.check),
}
WRONG = [
    *((command, "output", "out", "Path") for command in OPTIONS),
    ("ablate", "seeds", 3, r"tuple\[int, \.\.\.\]"),
    ("ablate", "seeds", ("0", 1), r"tuple\[int, \.\.\.\]"),
    ("ablate", "steps", "9", "int"),
    ("convert", "vae", 3, "str or None"),
    ("convert", "weights", "averaged", "'ema' or 'model' or None"),
    ("convert", "dtype", ["float16"], "'float32' or 'float16' or 'bfloat16' or None"),
    ("convert", "overwrite", "no", "bool"),
    ("demo", "quick", 1, "bool"),
    ("demo", "seed", True, "int"),
    ("demo", "learning_rate", "fast", "float"),
    ("evaluate", "batch_size", 1.0, "int"),
    ("evaluate", "samples", None, "Path"),
    ("evaluate", "feature_model", Path("model.pt2"), "str or None"),
    ("extract", "channels", 3.0, "1 or 3"),
    ("sample", "labels", "tench", r"tuple\[str, \.\.\.\]"),
    ("sample", "labels", (3,), r"tuple\[str, \.\.\.\]"),
    ("sample", "guidance_interval", (0.1,), r"tuple\[float, float\] or None"),
    ("sample", "num_inference_steps", None, "int"),
]


@pytest.mark.parametrize(("command", "name", "value", "needed"), WRONG)
def test_other_types(tmp_path, monkeypatch, command, name, value, needed):
    monkeypatch.chdir(tmp_path)
    options, run = OPTIONS[command]
    needed = f"{needed} or None" if (command, name) == ("evaluate", "output") else needed
    with pytest.raises(ValueError, match=f"^{name} is .*; it must be {needed}$"):
        run(replace(options, **{name: value}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", OPTIONS)
def test_a_nul(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    options, run = OPTIONS[command]
    with pytest.raises(ValueError, match=r"output is 'a.*b', with a NUL"):
        run(replace(options, output=Path("a\0b")))


def test_types_that_fit():
    for options, _ in OPTIONS.values():
        check_types(options)
    check_types(AblateOptions(seeds=range(3)))
    check_types(DemoOptions(learning_rate=np.float64(0.1), guidance_scale=2))
    check_types(SampleOptions(Path(), labels=["3"], guidance_interval=[0, 1.5]))


def test_a_config_of_other_types_that_fit_is_saved(tmp_path):
    config = TrainConfig(
        tmp_path, output=tmp_path, learning_rate=np.float64(0.1), trackers=["wandb"], task_routing=[0.5, 1]
    )
    config.check()
    config.save(tmp_path / "config.yaml")
    saved = load_config(tmp_path / "config.yaml")
    assert (saved.learning_rate, saved.trackers, saved.task_routing) == (0.1, ("wandb",), (0.5, 1.0))


def test_former_names_in_python():
    options = SampleOptions(Path(), steps=3)
    assert (options.num_inference_steps, options.steps) == (3, 3)
    assert replace(options, steps=4) == SampleOptions(Path(), num_inference_steps=4)
    assert replace(options, seed=1).steps == 3
    assert DemoOptions(sampling_steps=5).num_inference_steps == AblateOptions(sampling_steps=5).sampling_steps == 5
    config = TrainConfig(Path(), flip=False, sample_steps=2, sample_guidance=3.0, precision="bf16")
    assert config == TrainConfig(
        Path(), flips=False, num_inference_steps=2, guidance_scale=3.0, precision="bfloat16"
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        SampleOptions(Path(), step=3)


def test_former_names_in_a_pickle():
    """Pickle sets attributes, under the names of when it was written."""
    config = TrainConfig.__new__(TrainConfig)
    config.__setstate__({**vars(TrainConfig(Path())), "flip": False})
    assert not config.flips
    assert pickle.loads(pickle.dumps(config)) == config


def test_former_names_on_the_command_line():
    args = "--data x --no-flip --sample_steps 7 --sample-guidance=2 --precision fp32"
    config = TrainConfig(Path("x"), flips=False, num_inference_steps=7, guidance_scale=2.0, precision="float32")
    assert train_config.parse(args.split()) == config
    args = ["--checkpoint", "fp16", "--output", "o", "--dtype=fp16"]  # of values only those of a precision
    assert parse(ConvertOptions, args, "edt convert") == ConvertOptions(Path("fp16"), Path("o"), dtype="float16")


def test_former_names_in_a_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("data: x\nflip: false\nsample_steps: 2\nsample_guidance: 3\nprecision: fp32\n")
    config = TrainConfig(Path("x"), flips=False, num_inference_steps=2, guidance_scale=3.0, precision="float32")
    assert load_config(file) == config
    config.save(file)
    assert "num_inference_steps: 2" in file.read_text()
    file.write_text("data: x\nflip: false\nflips: false\n")
    with pytest.raises(ValueError, match="has a field under its name of today and a former one; give it once"):
        load_config(file)


def test_what_has_no_former_name_is_as_it_was():
    values = {"flip": 1, "precision": ["fp32"], "vae": "fp32"}
    assert today(DemoOptions, values) == values


@pytest.mark.parametrize("kind", [Info, Plot, *(type(options) for options, _ in OPTIONS.values())])
def test_help_is_in_sentences(kind):
    """Of every option."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    helps = {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    assert helps.keys() == {field.name for field in fields(kind)}
    assert [name for name, text in helps.items() if not text.endswith((".", ".)"))] == []
