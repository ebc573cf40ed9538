"""The house as README draws it: which folder may import which, and what an import loads."""

import ast
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import edt
import edt_kernels

# Floor by floor; a line may import the lines above it, and on one line nobody imports another.
FLOORS = [
    {"_former", "_package"},
    {"_lazy"},
    {"files", "devices"},
    {"options"},
    {"interrupt", "model"},
    {"diffusion", "data"},
    {"runs", "evaluation"},
    {"train"},
    {"sampling"},
    {"demo"},
    {"cli"},
    {"__main__", "__init__"},
]
EDT, KERNELS = (Path(package.__file__).parent for package in (edt, edt_kernels))
MODULES = sorted(EDT.rglob("*.py"))


def imported(path: Path, package: Path) -> set[str]:
    """The dotted names of modules that a file of a package imports, relative ones spelt out."""
    names = set()
    within = (package.name, *path.relative_to(package).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = within[: len(within) - node.level + 1] if node.level else ()
            module = ".".join((*start, *(node.module or "").split("."))).strip(".")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def room(names: tuple[str, ...]) -> str:
    """The folder or file in edt/ that a module is in; a folder's `__main__` is an entrance, as edt's is."""
    return "__main__" if names[-1] == "__main__" else names[0]


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


def test_the_floors_are_all_there():
    rooms = {room(path.relative_to(EDT).with_suffix("").parts) for path in MODULES}
    assert rooms == set().union(*FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(EDT)))
def test_imports_go_down(path):
    own = room(path.relative_to(EDT).with_suffix("").parts)
    for name in imported(path, EDT):
        package, *below = name.split(".")
        if package == "edt" and below and below[0] != own:
            assert floor(below[0]) < floor(own), f"{own} imports {name}"


def test_no_circles_within_a_folder():
    """Nor anywhere else, for between the folders imports go down."""
    graph = {}
    for path in MODULES:
        names = path.relative_to(EDT.parent).with_suffix("").parts
        graph[".".join(names)] = imported(path, EDT)
    done = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way, module))
        if module not in done:
            for name in graph[module]:
                for target in {name, name.rpartition(".")[0]} & graph.keys():
                    visit(target, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_kernels_know_nothing_of_edt():
    for path in KERNELS.rglob("*.py"):
        assert not {name for name in imported(path, KERNELS) if name.split(".")[0] == "edt"}, path


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("edt", ("torch", "diffusers", "edt_kernels")),
        ("edt.model.presets", ("torch", "diffusers", "edt_kernels")),
        ("edt.sampling.pipeline", ("tyro", "matplotlib")),
        ("edt_kernels", ("diffusers",)),
    ],
)
def test_an_import_loads_what_it_needs(module, unneeded):
    code = f"import sys, {module}; print(*[name for name in {unneeded} if name in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert loaded == []


@pytest.mark.parametrize("package", ["edt", *(f"edt.{path.parent.name}" for path in EDT.glob("*/__init__.py"))])
def test_a_folder_hands_on_its_names(package):
    module = importlib.import_module(package)
    assert all(hasattr(module, name) for name in module.__all__)
    assert set(module.__all__) <= set(dir(module))
    for name in ("nothing", "nothing.at_all"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(module, name)


def test_a_zip_has_all_of_it(tmp_path):
    """As a zipapp does."""
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as app:
        for path in (*MODULES, *KERNELS.rglob("*.py")):
            app.write(path, path.relative_to(EDT.parent))
    code = "import sys; sys.path.insert(0, 'app.zip'); import edt; print(len(edt.PRESETS), edt.__file__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "app.zip" in run.stdout


def test_loaded_again_it_finds_former_modules_once():
    importlib.reload(edt)
    assert sum(type(finder).__name__ == "_FormerModules" for finder in sys.meta_path) == 1
