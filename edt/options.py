"""What Python does not check of options that come from no command line: types and counts."""

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

from edt_kernels._checks import shown

_UNIONS = (types.UnionType, Union)  # X | None; of Literal, Python makes the other


def check_types(options) -> None:
    """Raises ValueError for a field of a dataclass whose value is of another type than its hint, or has a NUL."""
    hints = get_type_hints(type(options))
    for name, value in vars(options).items():
        if not fits(value, hints[name]):
            raise ValueError(f"{name} is {shown(value)}; it must be {describe(hints[name])}")
        if isinstance(value, (str, Path)) and "\0" in str(value):
            raise ValueError(f"{name} is {str(value)!r}, with a NUL; no file or name has one")


def fits(value, hint) -> bool:
    """Whether a value is of a field's type; an integer fits a float that holds it, a list a tuple."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return any(fits(value, choice) for choice in choices)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in choices)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            return False
        kinds = choices[:1] * len(value) if choices[-1] is Ellipsis else choices
        return len(kinds) == len(value) and all(map(fits, value, kinds))
    if hint is float:
        return isinstance(value, float) or (type(value) is int and abs(value) <= sys.float_info.max)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def describe(hint) -> str:
    if get_origin(hint) in _UNIONS:
        return " or ".join(map(describe, get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return str(hint)
    return "None" if hint is types.NoneType else getattr(hint, "__name__", str(hint))


def check_count(name: str, value: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} is {shown(value)}; it must be an integer")
    if not 1 <= value < 2**31:
        raise ValueError(f"{name} is {shown(value)}; it must be at least 1, and below 2³¹")
