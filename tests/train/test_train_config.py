"""Where a training run's settings come from: command line, YAML or recipe, the run's folder, defaults."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from training_runs import as_arguments

from edt.cli import main
from edt.model.presets import PRESETS
from edt.train.config import CONFIG_FILE, RECIPES, TrainConfig, load_config, parse, recipe

# Of every field a value that is not its default.
OTHER = {
    "data": Path("other/data"),
    "output": Path("other/run"),
    "recipe": "EDT-B/2",
    "config": None,  # excludes a recipe; see below
    "model": "EDT-XL/2",
    "unconditional": True,
    "class_dropout": 0.25,
    "masking": False,
    "task_routing": (0.8, 4.0),
    "init_from": Path("weights"),
    "replace_head": False,
    "steps": 7,
    "batch_size": 12,
    "gradient_accumulation_steps": 3,
    "optimizer": "adamw",
    "learning_rate": 2e-4,
    "final_learning_rate": 1e-6,
    "decay_steps": 11,
    "warmup_steps": 5,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "ema_decay": 0.5,
    "ema_warmup": True,
    "alignment_encoder": "module:factory",
    "alignment_weight": 0.75,
    "manifold_weight": 2.0,
    "precision": "tf32",
    "gradient_checkpointing": True,
    "compile": True,
    "device": "cpu",
    "seed": 3,
    "flips": False,
    "num_workers": 0,
    "verify_data": False,
    "checkpoint_every": 13,
    "keep_checkpoints": 1,
    "keep_every": 7,
    "resume": "never",
    "log_every": 17,
    "trackers": ("wandb", "tensorboard"),
    "sample_every": 19,
    "sample_count": 23,
    "num_inference_steps": 29,
    "guidance_scale": 1.5,
    "vae": "some/vae",
    "max_skipped_steps": 31,
    "peak_tflops": 989.0,
}
NOT_SAVED = ("recipe", "config", "resume")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """The default output has no run."""
    monkeypatch.chdir(tmp_path)


def given(**without) -> dict:
    return {name: value for name, value in OTHER.items() if name not in without and value is not None}


def test_every_field_is_covered():
    defaults = TrainConfig(data=Path("data"))
    assert list(OTHER) == [field.name for field in fields(TrainConfig)]
    same = [name for name, value in OTHER.items() if value == getattr(defaults, name)]
    assert same == ["config"]


def test_every_field_on_the_command_line():
    assert parse(as_arguments(given())) == TrainConfig(**OTHER)


def test_every_field_through_yaml(tmp_path):
    config = TrainConfig(**{**OTHER, "recipe": None, "resume": "latest"})
    config.save(tmp_path / "config.yaml")
    assert set(yaml.safe_load((tmp_path / "config.yaml").read_text())) == set(OTHER) - set(NOT_SAVED)
    kept = config.absolute()
    assert load_config(tmp_path / "config.yaml") == kept
    assert parse(["--config", "config.yaml"]) == replace(kept, config=Path("config.yaml"))
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert values["trackers"] == ["wandb", "tensorboard"]


def test_paths_are_kept_absolute(tmp_path):
    """For a run is started again from anywhere. A VAE may be a folder, or a name, which stays."""
    (tmp_path / "vae").mkdir()
    for vae, kept in (("vae", str(tmp_path / "vae")), ("some/vae", "some/vae")):
        TrainConfig(**{**OTHER, "recipe": None, "vae": vae}).save(tmp_path / "config.yaml")
        values = yaml.safe_load((tmp_path / "config.yaml").read_text())
        paths = {name: values[name] for name in ("data", "output", "init_from", "vae")}
        assert paths == {"data": str(tmp_path / "other/data"), "output": str(tmp_path / "other/run"),
                         "init_from": str(tmp_path / "weights"), "vae": kept}  # fmt: skip


def test_defaults_through_yaml(tmp_path):
    """Those that are None too."""
    TrainConfig(data=Path("data")).save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == TrainConfig(data=Path("data")).absolute()


def test_the_command_line_is_before_yaml_and_yaml_before_defaults(tmp_path):
    (tmp_path / "my.yaml").write_text("data: from/yaml\nsteps: 5\nlearning_rate: 1e-4\ntrackers: []\n")
    config = parse(["--config", "my.yaml", "--steps", "6"])
    assert (config.steps, config.learning_rate, config.data) == (6, 1e-4, Path("from/yaml"))
    assert config.trackers == ()
    assert config.batch_size == 256
    assert parse(["--config", "my.yaml", "--data", "mine"]).data == Path("mine")


def test_the_command_line_is_before_the_recipe_and_the_recipe_before_the_run(tmp_path):
    TrainConfig(data=Path("data"), output=tmp_path / "run", learning_rate=1e-7).save(tmp_path / CONFIG_FILE)
    config = parse(["--recipe", "EDT-XL/2", "--data", "data", "--steps", "9", "--output", str(tmp_path)])
    assert (config.model, config.learning_rate, config.steps) == ("EDT-XL/2", 5e-4, 9)


def test_the_folder_of_a_run_is_enough(tmp_path):
    """Also after it was moved."""
    config = TrainConfig(**{**OTHER, "recipe": None, "resume": "latest", "output": Path("where/it/was")})
    (tmp_path / "moved").mkdir()
    config.save(tmp_path / "moved" / CONFIG_FILE)
    kept = replace(config.absolute(), output=Path("moved"))
    assert parse(["--output", "moved"]) == kept
    assert parse(["--output=moved", "--steps", "100"]) == replace(kept, steps=100)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    config = recipe(name, data=Path("data"))
    config.check()
    assert config.model in PRESETS
    assert parse(["--recipe", name, "--data", "data"]) == replace(config, recipe=name)


def test_without_data(capsys):
    for source in ([], ["--recipe", "EDT-S/2"]):
        with pytest.raises(SystemExit) as ended:
            main(["train", *source])
        assert ended.value.code == 2
        assert "--data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: x\nlearning_rat: 1\nbatchsize: 2", "has batchsize, learning_rat; edt train has no such field"),
        ("recipe: EDT-S/2", "has recipe; edt train has no such field"),
        ("steps: many", "has 'many' for steps; it must be int"),
        ("steps: 1.5", "has 1.5 for steps; it must be int"),
        ("steps: true", "has True for steps; it must be int"),
        ("steps: null", "has None for steps; it must be int"),
        ("masking: 1", "has 1 for masking; it must be bool"),
        ("learning_rate: fast", "has 'fast' for learning_rate; it must be float"),
        ("learning_rate: true", "has True for learning_rate; it must be float"),
        ("max_grad_norm: [1]", r"has \[1\] for max_grad_norm; it must be float"),
        ("model: 3", "has 3 for model; it must be str"),
        ("data: 3", "has 3 for data; it must be Path"),
        ("optimizer: sgd", "has 'sgd' for optimizer; it must be 'adan' or 'adamw'"),
        ("precision: [fp32]", r"has \['fp32'\] for precision; it must be 'auto' or 'bfloat16'"),
        ("trackers: tensorboard", "has 'tensorboard' for trackers; it must be "),
        ("trackers: [1]", "has 1 for trackers; it must be str"),
        ("task_routing: [0.8]", r"has \[0.8\] for task_routing; it must be "),
        ("- steps", "has list; it must be a mapping of edt train's fields"),
        ("", "has NoneType; it must be a mapping"),
        ("steps: [1", "is no YAML"),
        ("data: &a x\noutput: *a", r"is no YAML that edt train reads: it has an alias, \*a; write the value"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", "is no YAML that edt train reads: it has an alias"),
        ("<<: {steps: 1}\nbase: &b {}\nrun: {<<: *b}", "is no YAML that edt train reads"),
        ("steps: 1\nsteps: 2", "is no YAML that edt train reads: it has steps more than once"),
        ("model: !!python/object/apply:os.system [true]", "is no YAML that edt train reads"),
        ("model: !!set {a, b}", "has {'[ab]', '[ab]'} for model; it must be str"),
        ("model: 2020-01-01", r"has datetime\.date\(2020, 1, 1\) for model; it must be str"),
        ("model: 2020-13-45", "is no YAML that edt train reads: month must be in 1..12"),
        ("model: !!int ''", "is no YAML that edt train reads"),
        ("? [a]\n: 1", "is no YAML that edt train reads"),
        ("[" * 20_000, "is no YAML that edt train reads"),
        (f"steps: 1{'0' * 5000}", "is no YAML that edt train reads: Exceeds the limit"),
        (f"learning_rate: 1{'0' * 400}", "has an integer of 1329 bits for learning_rate; it must be float"),
        ("1: 2", "has 1; edt train has no such field"),
        ("data: !!binary aGk=", "has b'hi' for data; it must be Path"),
        ("task_routing: [0.8, [4.0]]", r"has \[4.0\] for task_routing; it must be float"),
    ],
)
def test_yaml_that_is_wrong(tmp_path, capsys, text, message):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"config my.yaml {message}"):
        load_config(Path("my.yaml"))
    assert main(["train", "--config", "my.yaml", "--data", "data"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("edt: error: config my.yaml ")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_yaml_with_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "my.yaml").write_bytes("data: dätä\nsteps: 3\n".encode(encoding))
    config = load_config(tmp_path / "my.yaml")
    assert (config.data, config.steps) == (Path("dätä"), 3)


def test_yaml_of_a_code_page(tmp_path, capsys):
    (tmp_path / "my.yaml").write_bytes("data: dätä\n".encode("latin-1"))
    assert main(["train", "--config", "my.yaml"]) == 2
    assert capsys.readouterr().err.startswith("edt: error: config my.yaml is not UTF-8 (byte 7: ")


def test_names_that_are_not_ascii(tmp_path):
    config = TrainConfig(data=tmp_path / "dätä 数", output=tmp_path)
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


COUNTS = [name for name, value in OTHER.items() if type(value) is int]


@pytest.mark.parametrize("name", COUNTS)
def test_counts_have_bounds(name):
    """Also where a slip of the finger would take all memory, or start a million processes."""
    for value, message in ((-1, "must be at least"), (10**400, "must be at most"), (10**5000, "must be at most")):
        with pytest.raises(ValueError, match=f"^{name} is .*{message}"):
            replace(TrainConfig(data=Path("data")), **{name: value}).check()
    assert as_arguments({name: 10**400})[1] == str(10**400)
    with pytest.raises(ValueError, match=f"^{name} is True; it must be int"):
        replace(TrainConfig(data=Path("data")), **{name: True}).check()


@pytest.mark.parametrize("name", [name for name, value in OTHER.items() if type(value) is float])
def test_numbers_have_bounds(name):
    for value in (float("nan"), float("inf"), -1.0, 10**400, "1", True, None):
        if value is not None or name not in ("max_grad_norm", "peak_tflops"):
            with pytest.raises(ValueError, match=f"^{name} is "):
                replace(TrainConfig(data=Path("data")), **{name: value}).check()
    for wrong in (0.5j, [], ()):
        with pytest.raises(ValueError, match=f"^{name} is .*; it must be float"):
            replace(TrainConfig(data=Path("data")), **{name: wrong}).check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "data"}, "data is 'data'; it must be Path"),
        ({"output": None}, "output is None; it must be Path"),
        ({"init_from": 3}, "init_from is 3; it must be Path or None"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; it must be 'adan' or 'adamw'"),
        ({"precision": None}, "precision is None; it must be 'auto' or "),
        ({"trackers": "wandb"}, "trackers is 'wandb'; it must be "),
        ({"trackers": ("wandb", 3)}, "trackers is .*; it must be "),
        ({"task_routing": (0.5,)}, "task_routing is .*; it must be "),
        ({"masking": 1}, "masking is 1; it must be bool"),
        ({"data": Path("a\0b")}, "data is .*, with a NUL"),
        ({"vae": "a\0b"}, "vae is .*, with a NUL"),
        ({"task_routing": (float("nan"), 1.0)}, "task_routing is .*; it must be two finite numbers"),
        ({"guidance_scale": 1e308}, "guidance_scale is 1e.308; it must be at most 1000000"),
        ({"num_workers": 2000}, "num_workers is 2000; it must be at most 1024"),
        *(
            ({name: 1e38}, f"{name} is 1e.38; it must be at most 1000000")
            for name in (
                "learning_rate",
                "final_learning_rate",
                "weight_decay",
                "alignment_weight",
                "manifold_weight",
                "peak_tflops",
            )
        ),
    ],
    ids=str,
)
def test_fields_of_another_type(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainConfig(**{"data": Path("data"), **fields}).check()


def test_sources_that_are_wrong(capsys):
    for args, message in (
        (["--config", "no.yaml"], "config no.yaml does not exist; it must be a YAML file of edt train's fields"),
        (["--recipe", "EDT-S/3"], "recipe is 'EDT-S/3'; it must be one of EDT-S/2, "),
        (["--recipe", "EDT-S/2", "--config", "my.yaml"], "recipe and config were both given"),
    ):
        assert main(["train", "--data", "data", *args]) == 2
        assert capsys.readouterr().err.startswith(f"edt: error: {message}")


@pytest.mark.parametrize(
    "args", [["--learning-rat", "1"], ["--steps", "many"], ["--precision", "fp64"], ["--step", "3"]]
)
def test_options_that_are_wrong(args, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--data", "data", *args])
    assert ended.value.code == 2
    assert args[0] in capsys.readouterr().err


def test_help(capsys):
    """Of all commands, and of all fields with their defaults."""
    options = [f"--{name.replace('_', '-')}" for name in OTHER]
    for args, words in ((["--help"], ["train"]), (["train", "--help"], [*options, "default: 0.001", "Adan."])):
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert ended.value.code == 0
        out = capsys.readouterr().out
        out = " ".join(out.replace("│", "").split())
        assert [word for word in words if word not in out] == []


def test_at_a_learning_rate_without_warmup_or_fall():
    config = TrainConfig(data=Path("data"), learning_rate=3e-4, final_learning_rate=3e-4)
    assert {config.learning_rate_at(step) for step in (0, 1, 399_999, 10**7)} == {3e-4}
