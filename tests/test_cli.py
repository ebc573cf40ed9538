import os
import subprocess
import sys

import pytest

from edt import EDTTransformer2DModel, cli, load_preset
from edt.cli import main

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
        (["tune", "--seconds", "nan"], "seconds is nan; it must not be negative"),
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
    ("error", "said"),
    [
        (ValueError("a is\n1\x1b[31m"), r"edt: error: a is 1\x1b[31m"),
        (OverflowError("int too large"), "edt: error: int too large"),
        (MemoryError(), "edt: error: out of memory"),
        (KeyError("shape"), r"edt: error: KeyError: 'shape' (test_cli.py:"),
        (RuntimeError(), "edt: error: RuntimeError:  (test_cli.py:"),
        (RecursionError("deep"), "edt: error: deep"),
        (BrokenPipeError(32, "of a worker"), "edt: error: of a worker"),
        (PermissionError(13, "Permission denied", "a\nb"), "edt: error: a b: Permission denied"),
        (OSError(36, "File name too long", "x" * 5000), f"edt: error: {'x' * 1000} … {'x' * 980}"),
    ],
)
def test_any_error_is_one_line(monkeypatch, capsys, error, said):
    def fail(options):
        raise error

    monkeypatch.setitem(cli._COMMANDS, "info", (cli.Info, fail))
    assert main(["info", "EDT-S/2"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(said)
    assert len(lines[0]) < 2100
    monkeypatch.setenv("EDT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["info", "EDT-S/2"])


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
