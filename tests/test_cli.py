import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import edt
import edt_kernels
from edt import EDTTransformer2DModel, load_preset
from edt.cli import main
from edt.model.complexity import estimate_memory

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
SMALL = {
    "hidden_sizes": (16, 16, 16, 16, 16),
    "num_attention_heads": (2, 2, 2, 2, 2),
    "depths": (1, 1, 1, 1, 1),
    "amm_blocks": (3,),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Untrained models of a few kinds, by name."""
    kinds = {
        "digits": load_preset("EDT-digits"),
        "colour": EDTTransformer2DModel(
            **SMALL, sample_size=(8, 16), in_channels=3, out_channels=6, num_classes=2, patch_size=2
        ),
        "latent": EDTTransformer2DModel(**SMALL, sample_size=8, num_classes=2),
        "unconditional": EDTTransformer2DModel(
            **SMALL, sample_size=8, in_channels=1, out_channels=2, num_classes=0
        ),
    }
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model in kinds.items():
        model.save_pretrained(folder / name)
    return folder


def run_sample(checkpoint, output, *args) -> int:
    return main(["sample", "--checkpoint", str(checkpoint), "--output", str(output), "--steps", "3", *args])


@pytest.mark.parametrize("damage", ["truncated", "no weights", "no configuration", "broken configuration"])
def test_damaged_checkpoints(checkpoints, tmp_path, capsys, damage):
    load_preset("EDT-digits").save_pretrained(tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no configuration":
        config.unlink()
    else:
        config.write_text(config.read_text()[:50])
    assert run_sample(tmp_path, tmp_path / "out", "--labels", "3") == 2
    error = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in error[-1]
    assert error[-1].startswith("edt: error: ")


def test_info_of_a_preset(capsys):
    assert main(["info", "EDT-XL/2"]) == 0
    out = capsys.readouterr().out
    assert "698 523 098" in out
    assert "53.440 G" in out
    assert [f"stage {i}" in out for i in range(5)] == [True] * 5


def test_info_counts_what_step_caching_saves(capsys):
    assert main(["info", "EDT-S/2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert lines[0] == ["n", "=", "2", "n", "=", "3", "n", "=", "5"]
    assert lines[1] == ["deep", "features", "reused", "1.43×", "1.66×", "1.91×"]
    assert lines[2] == ["encoder", "features", "reused", "1.26×", "1.38×", "1.50×"]


def test_info_of_a_checkpoint(checkpoints, capsys):
    assert main(["info", str(checkpoints / "digits"), "--batch-size", "2"]) == 0
    count = sum(p.numel() for p in load_preset("EDT-digits").parameters())
    assert f"{count:,}".replace(",", " ") in capsys.readouterr().out


def test_info_in_16_bits_with_gradient_checkpointing(capsys):
    activations = []
    for args in ([], ["--precision", "bfloat16"], ["--precision", "bfloat16", "--gradient-checkpointing"]):
        assert main(["info", "EDT-S/2", *args]) == 0
        out = capsys.readouterr().out
        assert ("16-bit copies" in out) == ("bfloat16" in args) == ("memory, bfloat16" in out)
        assert (", gradient checkpointing, " in out) == ("--gradient-checkpointing" in args)
        row = next(line for line in out.splitlines() if line.startswith("activations"))
        activations.append(float(row.split()[-2]))
    assert activations[0] > activations[1] > activations[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["info", "EDT-XXL/2"], "model is 'EDT-XXL/2'; it must be a checkpoint folder or one of EDT-S/2"),
        (["info", "EDT-S/2", "--batch-size", "0"], "batch_size is 0"),
        (["demo", "--steps", "0"], "steps is 0"),
        (["demo", "--device", "abacus"], "device is 'abacus'"),
        (["info", ""], "info has an empty argument after it; is a variable of the shell unset?"),
        (["train", "--data", "data", "--output", ""], "--output has an empty argument after it"),
        (["train", "--data=", "--output", "run"], "--data has an empty argument after it"),
        (["tune", "--quick"], "edt tune is now python -m benchmarks tune, in a checkout of the sources"),
    ],
)
def test_other_errors_are_one_line(capsys, args, message):
    assert main(args) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_unknown_command_and_help(capsys):
    with pytest.raises(SystemExit) as unknown:
        main(["paint"])
    assert unknown.value.code == 2
    with pytest.raises(SystemExit) as helped:
        main(["--help"])
    assert helped.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("demo", "sample", "extract", "info"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("paint\x1b", r"there is no command paint\x1b; see edt --help"),
        ("trian --data x", "there is no command trian (perhaps train); see edt --help"),
        ("--verbose", "there is no option --verbose; see edt --help"),
        ("sample", "it needs --checkpoint; see edt sample --help"),
        ("info", "it needs MODEL; see edt info --help"),
        ("sample --checkpoint x --sed 3", "there is no option --sed (perhaps --seed); see edt sample --help"),
        ("sample --chekpoint=x", "there is no option --chekpoint (perhaps --checkpoint); see edt sample --help"),
        ("info --bogus EDT-S/2", "there is no option --bogus; see edt info --help"),
        ("train --data x --no-flup", "there is no option --no-flup (perhaps --flip); see edt train --help"),
        ("sample --checkpoint x --steps", "Missing value for argument '--num-inference-steps'"),
        ("sample --checkpoint x --guidance-interval 1", "Error parsing --guidance-interval: no type matching"),
        ("info EDT-S/2 --precision half", "invalid choice 'half' for argument '--precision'"),
        ("train --data x --steps many", "Error parsing --steps: invalid literal for int()"),
    ],
)
def test_usage_errors_are_one_line_that_says_where_help_is(capsys, args, said):
    with pytest.raises(SystemExit) as ended:
        main(args.split(" "))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"edt: error: {said}")
    command = args.split()[0]
    assert line.endswith(f"; see edt {command} --help" if command in ("sample", "info", "train") else " --help")
    assert "[bold]" not in line


@pytest.mark.parametrize("columns", ["20", "60", "200"])
def test_what_is_missing_is_not_what_its_help_names(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)  # at 60, a line of --output's help begins with --checkpoint
    with pytest.raises(SystemExit):
        main(["convert", "--checkpoint", "x"])
    assert capsys.readouterr().err == "edt: error: it needs --output; see edt convert --help\n"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[]", "config.json is JSON, but list; it must be an object"),
        ("null", "config.json is JSON, but NoneType; it must be an object"),
        ("[" * 100_000, "config.json is no JSON, or torn"),
        (
            '{"hidden_sizes": 3}',
            "has a config that does not fit: hidden_sizes is 3; it must be a tuple of integers",
        ),
        ('{"sample_size": [1]}', "has a config that does not fit: sample_size is [1]; it must be one side"),
    ],
    ids=["list", "null", "deep", "type", "size"],
)
def test_info_of_a_damaged_folder(tmp_path, capsys, config, said):
    (tmp_path / "config.json").write_text(config)
    assert main(["info", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"edt: error: checkpoint {tmp_path}")
    assert said in line


def test_info_leaves_out_what_the_model_does_not_know(tmp_path, capsys):
    config = tmp_path / "config.json"
    edt.load_preset("EDT-digits").save_config(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    known = capsys.readouterr().out
    config.write_text(json.dumps({**json.loads(config.read_text()), "of_a_later_version": 1}))
    assert main(["info", str(tmp_path)]) == 0
    assert capsys.readouterr().out == known


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"edt-kernels {edt.__version__}\n"
    assert edt.__version__ == edt_kernels.__version__ == PROJECT["version"]


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["info", "EDT-S/2"], ["train", "--help"]])
def test_what_loads_no_torch(args):
    """Importing it takes longer than all else that these do."""
    code = f"""
import sys
from edt.cli import main
try:
    main({args})
except SystemExit as ended:
    assert ended.code == 0
print(*({{"torch", "diffusers", "numpy", "edt_kernels"}} & sys.modules.keys()), file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ended.stderr.strip(), bool(ended.stdout)) == ("", True)


_BASE_INSTALL = """
import sys
from edt.cli.errors import _EXTRAS

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        brought = {*_EXTRAS, "torchvision", "scipy", "pandas", "pytest", "hypothesis"}
        return None if name.partition(".")[0] in brought else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
import edt
from edt.cli import main
assert all(getattr(edt, name) is not None for name in edt.__all__)
checkpoint, output = sys.argv[1:]
draw = ["sample", "--checkpoint", checkpoint, "--output", output, "--labels", "3", "--num-per-class", "1"]
assert main([*draw, "--num-inference-steps", "1"]) == 0
assert main(["info", "EDT-S/2"]) == 0
print("these fail:", file=sys.stderr)
for args in (["train", "--data", "x"], ["plot", "x"], ["demo", "--output", output], ["ablate"]):
    assert main(args) == 2, args
"""


def test_a_base_install(checkpoints, tmp_path):
    """Without what the extras bring, edt's names and commands work; those that need an extra name it."""
    output = tmp_path / "out"
    command = [sys.executable, "-c", _BASE_INSTALL, str(checkpoints / "digits"), str(output)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in output.iterdir()} >= {"samples.npz", "samples.png", "images"}
    lines = ended.stderr.partition("these fail:\n")[2].splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ("train", "plot", "demo", "ablate")):
        assert line.startswith(f"edt: error: {name} needs pip install 'edt-kernels[train]', which brings ")


def test_every_extra_that_is_named_brings_the_module():
    """And what the extras bring is known by its modules."""
    from edt.cli.errors import _EXTRAS

    extras = PROJECT["optional-dependencies"]
    names = {"scikit-learn": "sklearn"}
    for extra in ("train", "data", "evaluate"):
        packages = [package.split(">")[0] for package in extras[extra]]
        brought = {names.get(package, package.replace("-", "_")) for package in packages}
        assert brought == {module for module, of in _EXTRAS.items() if of == extra}


def test_the_other_edt(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "edt-3.1.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: edt\nVersion: 3.1.2\n")
    with pytest.raises(AttributeError, match=r"^module 'edt' has no attribute 'edtsq'$"):
        _ = edt.edtsq
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AttributeError, match=r"no attribute 'edtsq'; edt 3\.1\.2, a distance transform, is insta"):
        _ = edt.edtsq
    assert main(["info", "EDT-S/2"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "edt: edt 3.1.2, a distance transform, is installed beside edt-kernels; both are imported"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a is\n1\x1b[31m"), r"edt: error: a is 1\x1b[31m"),
        (OverflowError("int too large"), "edt: error: int too large"),
        (MemoryError(), "edt: error: out of memory"),
        (TypeError("a is 'x'; it must be an integer"), "edt: error: a is 'x'; it must be an integer"),
        (RuntimeError(), "edt: error: RuntimeError:  (test_cli.py:"),
        (json.JSONDecodeError("no JSON", "", 0), "edt: error: no JSON: line 1"),
        (EOFError("no more"), "edt: error: EOFError: no more (test_cli.py:"),
        (torch.OutOfMemoryError("CUDA out of memory"), "edt: error: CUDA out of memory"),
        (subprocess.SubprocessError("odd"), "edt: error: SubprocessError: odd (test_cli.py:"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "edt: error: No module named 'x'"),
        (BrokenPipeError(32, "of a worker"), "edt: error: of a worker"),
        (PermissionError(13, "Permission denied", "a\nb"), "edt: error: a b: Permission denied"),
        (OSError(36, "File name too long", "x" * 5000), f"edt: error: {'x' * 1000} … {'x' * 980}"),
    ],
)
def test_an_error_that_a_user_can_mend_is_one_line(monkeypatch, capsys, error, said):
    def fail(args):
        raise error

    monkeypatch.setattr("edt.cli.info.run_info", fail)
    assert main(["info", "EDT-S/2"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(said)
    assert len(lines[0]) < 2100
    monkeypatch.setenv("EDT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["info", "EDT-S/2"])


def test_training_that_stopped_is_no_error_of_the_command(monkeypatch, capsys):
    def fail(args):
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr("edt.cli.info.run_info", fail)
    assert main(["info", "EDT-S/2"]) == 1
    assert capsys.readouterr().err == "edt: training stopped: the loss is not finite\n"
    monkeypatch.setenv("EDT_TRACEBACK", "1")
    with pytest.raises(FloatingPointError):
        main(["info", "EDT-S/2"])


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (lambda: estimate_memory({}, "two"), "batch_size is 'two'; it must be an integer"),
        (lambda: torch.empty(2**50), "allocate memory"),
        (lambda: os.stat("/nowhere"), "/nowhere: No such file or directory"),
    ],
)
def test_checks_and_the_machine_speak_in_one_line(monkeypatch, capsys, fail, said):
    monkeypatch.setattr("edt.cli.info.run_info", lambda args: fail())
    assert main(["info", "EDT-S/2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("fail", "kind"),
    [
        (lambda: {}["shape"], KeyError),
        (lambda: [][0], IndexError),
        (lambda: None.shape, AttributeError),
        (lambda: 1 / 0, ZeroDivisionError),
        (lambda: len(3), TypeError),
        (lambda: estimate_memory({}, 1, batch=2), TypeError),
        (lambda: torch.ones(2) @ torch.ones(3), RuntimeError),
        (lambda: exec("from edt.model import nothing"), ImportError),
        (lambda: exec("assert False"), AssertionError),
        (lambda: exec("raise NotImplementedError"), NotImplementedError),
    ],
)
def test_a_bug_keeps_its_traceback(monkeypatch, capsys, fail, kind):
    monkeypatch.setattr("edt.cli.info.run_info", lambda args: fail())
    with pytest.raises(kind):
        main(["info", "EDT-S/2"])
    assert capsys.readouterr().err == ""


def test_former_names_go_on_with_the_same_images(checkpoints, tmp_path, capsys):
    """`--steps` and what samples.json calls it are those of the first version."""
    common = ["sample", "--checkpoint", str(checkpoints / "digits"), "--output", str(tmp_path), "--labels", "3"]
    assert main([*common, "--num-per-class", "1", "--steps", "1"]) == 0
    image = (tmp_path / "images" / "000000.png").stat()
    assert json.loads((tmp_path / "samples.json").read_text())["steps"] == 1
    assert main([*common, "--num-per-class", "1", "--num-inference-steps=1", "--dtype=fp32"]) == 0
    assert (tmp_path / "images" / "000000.png").stat() == image
    assert main([*common, "--num-per-class", "1", "--num-inference-steps", "2"]) == 2
    assert "drawn with other settings (steps)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--cache-interval", "20000"], "cache_interval is 20000; it must be 1 to 10000"),
        (["--cache-interval", "1", "--cache-schedule", "non-uniform"], "cache_interval is 1; around center"),
    ],
)
def test_errors_of_the_cache_name_its_option(checkpoints, tmp_path, capsys, args, said):
    assert run_sample(checkpoints / "digits", tmp_path / "out", "--labels", "3", *args) == 2
    assert said in capsys.readouterr().err


def test_a_reader_that_has_gone_and_a_terminal_of_another_encoding(tmp_path):
    """`edt info … | true` ends without a word; a name that the terminal cannot show is no error."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "edt", "info"]
    reader, writer = os.pipe()
    os.close(reader)
    gone = subprocess.run([*command, "EDT-S/2"], stdout=writer, stderr=subprocess.PIPE, env=environment, text=True)
    os.close(writer)
    assert (gone.returncode, gone.stderr) == (141, "")
    shown = subprocess.run([*command, "EDT-S/2"], capture_output=True, env=environment)
    assert shown.returncode == 0
    assert rb"1.43\xd7" in shown.stdout
    name = os.fsencode(tmp_path / "t") + b"\xe4nch"
    wrong = subprocess.run([*map(os.fsencode, command), name], capture_output=True, env=environment)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(b"edt: error: model is ")
    assert wrong.stderr.count(b"\n") == 1
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command, "EDT-S/2"], env=environment)
    assert closed.returncode == 0
