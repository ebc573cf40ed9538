"""Names of a package that are imported from its modules when they are first used."""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from ._former import former_name, stand_in


def lazy(package: str) -> tuple[Callable, Callable, list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose `__init__.py` calls this: its names are what it
    imports under `if TYPE_CHECKING`, where type checkers and editors find them too. Its source must be there.

    So `edt.model.presets`, which is plain data, loads no torch, and the command line what one command needs.
    """
    loader: Any = sys.modules[package].__spec__.loader  # pyright: ignore[reportOptionalMemberAccess] - is being loaded
    body = ast.parse(loader.get_source(package)).body
    lines = [line for block in body if isinstance(block, ast.If) for line in block.body]
    modules = {name.name: line.module for line in lines if isinstance(line, ast.ImportFrom) for name in line.names}

    def get(name: str):
        if name in modules:
            value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        elif name.startswith("__"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        elif name.isidentifier() and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        else:
            value = former_name(package, name)
        setattr(sys.modules[package], name, value)
        return value

    stand_in(package)
    return get, lambda: sorted({*vars(sys.modules[package]), *modules}), sorted(modules)
