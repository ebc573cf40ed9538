"""The pages as a reader takes them: each is gone through in order, every block run and every link followed."""

import contextlib
import io
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from diffusers_models import make
from image_folders import random_image, save_vae
from pages import PAGES, ROOT, Block, blocks, changed, prose
from released import TINY, tiny_model

import edt
from benchmarks import __main__ as benchmarks
from edt import cli
from edt.files.outputs import write_json
from edt.model.presets import PRESETS
from edt.sampling import ConvertOptions, convert

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
# What would take minutes: of Python, a number in a line; of edt, what is added to the options of a command.
FEWER_STEPS = ("num_inference_steps=250", "num_inference_steps=2")
QUICKER = {
    "extract": "--image-size 32 --num-workers 0",
    "sample": "--steps 2 --num-images 12",
    "train": "--steps 2 --batch-size 4 --num-workers 0 --sample-every 0",
}
# What cannot run here: the first words, what is added, and what the command then says once it knows its options.
REFUSED = {
    "edt evaluate --samples 50k/samples.npz": ("--inception-weights none.pth", "none.pth: there is no such file"),
}


@pytest.fixture
def _reader(tmp_path, monkeypatch):
    """A folder with what the pages take for granted, all of it tiny: published weights, a VAE, images, the demo's
    model. Names on the Hub are folders here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the same everywhere
    tiny = {name: value for name, value in TINY.items() if name != "num_classes"}
    for preset in ("EDT-S/2", "EDT-XL/2"):
        monkeypatch.setitem(PRESETS, preset, {**tiny, "class_dropout_prob": 0.1})
    tiny_model(num_classes=1000, class_dropout_prob=0.1).save_pretrained("trained")
    convert(ConvertOptions(Path("trained"), Path("EDT-S.pt")))
    write_json(Path("imagenet.json"), ["tench", *(f"class {i}" for i in range(1, 1000))])
    save_vae(Path("stabilityai/sd-vae-ft-ema"))
    make("dit", num_layers=28, attention_head_dim=4).save_pretrained("facebook/DiT-XL-2-256/transformer")
    edt.load_preset("EDT-digits").save_pretrained("outputs/demo")
    for i in range(6):
        for folder in ("images", f"imagenet/train/{i % 2}"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            random_image(i, (32, 32)).save(f"{folder}/{i}.png")
    Path("VIRTUAL_imagenet256_labeled.npz").touch()
    features = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    dynamic = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(features, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({**dynamic},))
    torch.export.save(exported, "features.pt2")


@pytest.mark.usefixtures("_reader")
@pytest.mark.parametrize("page", sorted(page for page in PAGES if blocks(page)))
def test_every_block_of_a_page_runs_after_those_above_it(page, capsys):
    variables, source = {}, None
    for block in blocks(page):
        where = f"{ROOT / page}, block at line {block.line}"
        if block.language == "python":
            source = block.text
            exec(compile(source.replace(*FEWER_STEPS), where, "exec"), variables)
        elif block.language == "diff":
            exec(compile(changed(source, block.text), where, "exec"), variables)
        elif block.language == "sh":
            for line in block.text.splitlines():
                run_line(block, line, capsys)
        else:
            pytest.fail(f"{where}: nothing here runs {block.language or 'a block without a language'!r}")
    check_what_came_of_it(page, variables)


def check_what_came_of_it(page: str, variables: dict) -> None:
    if page in ("README.md", "edt_kernels/README.md"):
        assert variables["normed"].shape == (4, 256, 312)
    if page == "edt_kernels/README.md":
        blocks = variables["transformer"].transformer_blocks
        modulated = [i for i, block in enumerate(blocks) if hasattr(block.attn1.processor, "modulation")]
        assert modulated == [15, 17, 19, 22, 24]
        assert type(blocks[0]).__module__ == "edt_kernels.integrations.diffusers.adaln"
    if page == "edt/README.md":
        assert variables["latents"].shape == (2, 4, 16, 16)
        assert len(variables["images"]) == 2


def run_line(block: Block, line: str, capsys) -> None:
    """For real where it is edt; of what sets up, measures or tests, that all it names is there."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    match words:
        case []:
            pass
        case ["edt" | ".venv/bin/edt", *arguments]:
            run_edt(" ".join(words), arguments, capsys)
        case ["accelerate", "launch", *options]:
            launched = launch_command_parser().parse_args(options)
            assert launched.module
            arguments = launched.training_script_args
            if launched.training_script == "edt.train":
                arguments = ["train", *arguments]
            else:
                assert launched.training_script == "edt"
            run_edt(" ".join(words), arguments, capsys)
        case ["python", "-m", "benchmarks", *arguments]:
            check_benchmark(arguments)
        case ["make", *targets]:
            assert set(targets) <= TARGETS, line
        case ["pip", "install" | "wheel", *arguments]:
            for extras in re.findall(r"\[(.*?)\]", " ".join(arguments)):
                assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), line
        case ["pytest", *arguments]:
            assert (ROOT / arguments[0]).exists(), line
        case _:
            pytest.fail(f"{block.page}, block at line {block.line}: nothing here runs {line!r}")


def run_edt(line: str, arguments: list[str], capsys) -> None:
    for beginning, (more, message) in REFUSED.items():
        if line.startswith(beginning):
            assert cli.main([*arguments, *more.split()]) == 2, line
            assert message in capsys.readouterr().err
            return
    assert cli.main([*arguments, *QUICKER.get(arguments[0], "").split()]) == 0, (
        f"{line}\n{capsys.readouterr().err}"
    )


def help_of(main, arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code in (0, None), arguments
    return out.getvalue()


def check_benchmark(arguments: list[str]) -> None:
    """Values by the command's own parser, which knows of an option where its help names it."""
    known = help_of(benchmarks.main, arguments)
    assert all(re.search(rf"{word}\b", known) for word in arguments if word.startswith("--")), arguments


def test_options_named_between_the_blocks_exist():
    named = {option for span in spans("edt/README.md") for option in re.findall(r"--[a-z_-]+", span)}
    commands = sorted({words[1] for words in map(str.split, spans("edt/README.md")) if words[0] == "edt"})
    assert {"sample", "train"} <= set(commands)
    known = "".join(help_of(cli.main, [command]) for command in {*commands, "extract", "convert", "evaluate"})
    others = {"--use_fsdp", "--help", "--no-deps"}  # accelerate's, everybody's, pip's
    assert {option for option in named if not re.search(rf"{option}\b", known)} <= others


@pytest.mark.parametrize("page", sorted(PAGES))
def test_targets_named_between_the_blocks_exist(page):
    assert {words[1] for words in map(str.split, spans(page)) if words[0] == "make" and len(words) > 1} <= TARGETS


def spans(page: str) -> list[str]:
    """Code between the words."""
    return re.findall(r"`([^`]+)`", prose(page))


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, heading = target.partition("#")
        file = PAGES[page].parent / path if path else PAGES[page]
        assert file.exists(), target
        assert not heading or heading in anchors(file), target


def anchors(file: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_front_page_is_short_and_its_lists_are_whole():
    page = (ROOT / "README.md").read_text()
    assert len(page.splitlines()) <= 150
    extras, layout = (page.partition(heading)[2].partition("\n## ")[0] for heading in ("## Install", "## Layout"))
    assert set(re.findall(r"^\| `(\w+)`", extras, re.MULTILINE)) == set(PROJECT["optional-dependencies"])
    folders = re.findall(r"^\| `([^`]+)/`", layout, re.MULTILINE)
    assert len(folders) <= 25
    assert all((ROOT / folder.replace("<op>", "adaln")).is_dir() for folder in folders)
    assert {path.parent.name for path in (ROOT / "edt").glob("*/__init__.py")} == {
        folder.removeprefix("edt/") for folder in folders if folder.startswith("edt/")
    }


def test_the_version_is_the_same_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == PROJECT["version"]
    assert cited["license"] == PROJECT["license"]
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
