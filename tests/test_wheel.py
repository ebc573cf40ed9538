"""What users install: the wheel, and beside it what it asks for and nothing else."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
USE = """
import torch, edt, edt_kernels, edt_kernels.integrations.diffusers

x, vectors = torch.randn(2, 16, 8), torch.randn(3, 2, 8)
table = edt_kernels.amm_table((4, 4))
out = edt_kernels.amm_attention(*torch.randn(2, 16, 3, 2, 4).unbind(2), grid=(4, 4), modulation=table)
x, normed = edt_kernels.gated_residual_adaln(x, out.flatten(2), *vectors)
assert torch.allclose(normed, edt_kernels.reference.adaln(x, *vectors[1:]))
merged = edt_kernels.token_merge_adaln(normed, *torch.randn(2, 2, 32), grid=(4, 4))
joined = edt_kernels.token_split_concat_adaln(merged, x, *torch.randn(2, 2, 16), grid=(2, 2))
assert joined.shape == (2, 16, 16) and joined.isfinite().all()

for name in edt.__all__:
    getattr(edt, name)
edt.load_preset("EDT-digits").save_pretrained("model")
"""


def run(*command, cwd: Path, status: int = 0) -> str:
    """What a command prints on both streams."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=env)
    printed = done.stdout + done.stderr
    assert done.returncode == status, printed
    return printed


def build(kind: str, sources: Path, output: Path) -> Path:
    """By the setuptools that is here: pip would download one for each build."""
    run(
        sys.executable,
        "-c",
        f"from setuptools import build_meta; build_meta.build_{kind}({str(output)!r})",
        cwd=sources,
    )
    return next(output.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind]))


def make_environment(folder: Path, wheel: Path) -> Path:
    """The bin folder of an environment like that of `pip install WHEEL`: with the wheel, and, linked and not
    downloaded, the distributions of this environment that it requires, and those that they require."""
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    run(sys.executable, "-m", "pip", "--python", folder, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    (installed,) = metadata.distributions(path=[str(packages)])
    todo, seen = [(text, "") for text in installed.requires], set()
    while todo:
        text, extra = todo.pop()
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        distribution = metadata.distribution(requirement.name)
        for wanted in ("", *requirement.extras):
            if (distribution.name, wanted) not in seen:
                seen.add((distribution.name, wanted))
                todo += [(text, wanted) for text in distribution.requires or ()]
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (packages / name).exists():  # two may share one
                (packages / name).symlink_to(distribution.locate_file(name))
    return folder / "bin"


@pytest.mark.long
def test_the_wheel(tmp_path):
    sources = tmp_path / "sources"
    copytree(ROOT, sources, ignore=ignore_patterns(".*", "outputs", "build", "dist", "*.egg-info", "__pycache__"))
    archive = build("sdist", sources, tmp_path)
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert {"LICENSE", "README.md", "pyproject.toml"} <= {path.name for path in unpacked.iterdir()}
    assert not (unpacked / "tests").exists()  # a part of them could not run

    wheel = build("wheel", unpacked, tmp_path)
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    ours = {
        str(path.relative_to(ROOT))
        for package in ("edt", "edt_kernels")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".json", ".typed")
    }
    assert names == ours
    assert {"edt/py.typed", "edt_kernels/py.typed"} <= names

    programs = make_environment(tmp_path / "environment", wheel)
    python, edt = programs / "python", programs / "edt"
    run(python, "-c", USE, cwd=tmp_path)
    version = wheel.name.split("-")[1]
    assert run(edt, "--version", cwd=tmp_path).strip().endswith(version)
    assert "EDT-S/2" in run(edt, "info", "EDT-S/2", cwd=tmp_path)
    run(edt, "sample", "--checkpoint", "model", "--output", "images", "--labels", "3", "--steps", "2",
        cwd=tmp_path)  # fmt: skip
    assert len(list((tmp_path / "images").glob("**/*.png"))) >= 2
    needs_train = "pip install 'edt-kernels[train]'"
    assert needs_train in run(edt, "train", "--data", "data", "--output", "run", cwd=tmp_path, status=2)
    assert "edt-kernels[train]" in run(python, "-m", "edt.train", "--help", cwd=tmp_path)
    judged = run(edt, "evaluate", "--samples", "images", "--reference", "images", cwd=tmp_path, status=2)
    assert "pip install 'edt-kernels[evaluate]'" in judged
