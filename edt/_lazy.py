"""Names of a package that are imported from its modules when they are first used."""

import importlib
import sys
from collections.abc import Callable


def lazy(package: str, **names: tuple[str, ...]) -> tuple[Callable, Callable, list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose module `m` has the names `names["m"]`.

    So `edt.model.presets`, which is plain data, loads no torch, and the command line what one command needs.
    """
    modules = {name: module for module, members in names.items() for name in members}

    def get(name: str):
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *modules}), sorted(modules)
