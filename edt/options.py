"""Options of commands: from the command line, under the names that they had before, and of the types they say."""

import contextlib
import difflib
import functools
import io
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .files.text import printable

_UNIONS = (types.UnionType, Union)  # X | None; of Literal, Python makes the other
_SPELT = ("precision", "dtype", "encode_dtype")  # whose values have short names, too
_IN_FULL = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

T = TypeVar("T")


def renamed(**former: str) -> Callable[[type[T]], type[T]]:
    """A class of options whose fields also go by former names: `renamed(steps="num_inference_steps")`.

    As arguments, where they outweigh today's, which `dataclasses.replace` gives as well; as attributes; on the
    command line by `parse`; and in files by `today`.
    """

    def decorate(kind: type[T]) -> type[T]:
        init = kind.__init__

        @functools.wraps(init)
        def with_former_names(self, *args, **kwargs):
            init(self, *args, **today(kind, kwargs))

        def from_pickle(self, state):
            self.__dict__.update(today(kind, state))

        kind.__init__, kind.__setstate__ = with_former_names, from_pickle  # pyright: ignore[reportAttributeAccessIssue]
        kind._former = former  # pyright: ignore[reportAttributeAccessIssue]
        for old, new in former.items():
            setattr(kind, old, property(lambda self, new=new: getattr(self, new)))
        return kind

    return decorate


def today(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of options by name, under the names and in the spelling of today."""
    former = getattr(kind, "_former", {})
    named = {name: value for name, value in values.items() if name not in former}
    named |= {former[name]: value for name, value in values.items() if name in former}
    spelt = {name: _IN_FULL[named[name]] for name in _SPELT if named.get(name) in tuple(_IN_FULL)}
    return named | spelt


def parse(kind: type[T], args: Sequence[str], prog: str, default: T | None = None) -> T:
    """The options that a command line gives.

    Raises:
        SystemExit: after --help; with 2 for wrong options, after a line on stderr that says where help is.
    """
    import tyro

    _check_names(kind, args, prog)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            given: dict[str, Any] = {} if default is None else {"default": default}
            options = tyro.cli(kind, args=_args_of_today(kind, args), prog=prog, **given)
    except SystemExit as ended:
        if ended.code:
            print(f"edt: error: {_in_one_line(said.getvalue())}; see {prog} --help", file=sys.stderr)
        raise
    sys.stderr.write(said.getvalue())
    return options


def _check_names(kind: type, args: Sequence[str], prog: str) -> None:
    """SystemExit for an option that there is none of, as it was typed; tyro would miss others before it."""
    known = [*get_type_hints(kind), *getattr(kind, "_former", {}), "help"]
    for arg in args:
        typed, _, _ = arg.partition("=")
        name = re.sub("^--(no[-_])?", "", typed).replace("-", "_")
        if typed.startswith("--") and not name.startswith("tyro") and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            perhaps = f" (perhaps --{near[0].replace('_', '-')})" if near else ""
            print(
                f"edt: error: there is no option {printable(typed)}{perhaps}; see {prog} --help", file=sys.stderr
            )
            raise SystemExit(2)


def _args_of_today(kind: type, args: Sequence[str]) -> list[str]:
    former, result, name = getattr(kind, "_former", {}), [], ""
    for arg in args:
        option = re.fullmatch(r"--(no[-_])?([\w-]+)(=?)(.*)", arg, re.DOTALL)
        if option:
            no, name, equals, value = option.groups("")
            name = name.replace("-", "_")
            name = former.get(name, name)
            start = f"--{no}{name}{equals}"
        else:
            start, value = "", arg
        result.append(start + (_IN_FULL.get(value, value) if name in _SPELT else value))
    return result


def _in_one_line(box: str) -> str:
    """What is wrong by the box that tyro draws, in whose rows, between rules, are also a guess and the help."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)
    parts: list[list[str]] = [[]]
    for row in (row.strip(" │") for row in box.splitlines()):
        if re.search("[─-]{8}", row) or row == "Got errors:":
            parts.append([])
        elif row:
            parts[-1].append(row)
    parts = [part for part in parts if part]
    if not box.startswith("╭"):  # to a terminal without such letters, where the title is no part of a rule
        parts = parts[1:]
    said, *others = parts or [["the options are wrong"]]
    if said[0].startswith("Missing from"):
        missing = re.findall(r"^[│ ] {5}(--[\w-]+|[A-Z-]+)(?= |$)", box, re.MULTILINE)  # help is further right
        said = ["it needs", ", ".join(missing)]
    for part in others:
        if part[0].startswith("Perhaps you meant"):
            said.append(f"(perhaps {part[1].split()[0]})")
    return printable(" ".join(said)).rstrip(". ")


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


def shown(value) -> str:
    """A value in an error."""
    from edt_kernels._checks import shown  # imports torch, which is needed for errors alone

    return shown(value)
