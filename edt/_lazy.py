"""Names of a package that are imported from its modules when they are first used."""

import importlib
import importlib.util
import sys
from collections.abc import Callable

from ._former import former_name


def lazy(package: str, **names: tuple[str, ...]) -> tuple[Callable, Callable, list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose module `m` has the names `names["m"]`.

    So `edt.model.presets`, which is plain data, loads no torch, and the command line what one command needs.
    """
    modules = {name: module for module, members in names.items() for name in members}

    def get(name: str):
        if name in modules:
            value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        elif name.startswith("__"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        elif importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        else:
            value = former_name(package, name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *modules}), sorted(modules)
