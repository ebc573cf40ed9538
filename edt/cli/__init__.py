"""The command line: `edt demo`, `extract`, `train`, …. A command is a function of `commands` or `info`, and
imports what it needs when it runs; what becomes of errors is in `errors`.
"""

import difflib
import importlib
import io
import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from .._lazy import lazy
from .._package import __version__, other_edt
from ..files.text import printable
from .errors import is_mendable, one_line, reader_has_gone

if TYPE_CHECKING:
    from .commands import Plot as Plot
    from .info import Info as Info
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
    __all__ += ["main"]

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
_BROKEN_PIPE = 141  # and for one whose reader has gone


class _Command(NamedTuple):
    """`function` of `module` takes the arguments after the command's name; it returns the exit code, or None."""

    module: str
    function: str
    help: str
    extra: str = ""  # of edt-kernels, that it needs


_MOVED = {"tune": "python -m benchmarks tune, in a checkout of the sources"}  # former commands
_COMMANDS = {
    "demo": _Command("commands", "run_demo", "Trains a small EDT on digits, draws and judges.", "train"),
    "extract": _Command("commands", "run_extract", "Turns images into a data folder for training.", "data"),
    "train": _Command("commands", "run_train", "Trains EDT on a data folder, or goes on with a run.", "train"),
    "plot": _Command("commands", "run_plot", "Draws losses, speed and memory of runs.", "train"),
    "convert": _Command("commands", "run_convert", "Turns a released .pt into a pipeline, and back."),
    "sample": _Command("commands", "run_sample", "Draws images from a checkpoint."),
    "evaluate": _Command("commands", "run_evaluate", "Compares images with real ones: FID and more.", "evaluate"),
    "ablate": _Command("commands", "run_ablate", "Measures what masking training and AMM do, on digits.", "train"),
    "info": _Command("info", "run_info", "Prints a model's parameters, multiply-adds and memory."),
}


def main(args: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    args = sys.argv[1:] if args is None else args
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with it closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that are not UTF-8; terminals that are not
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # of `edt … | head`, which has seen enough
        if not reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return _BROKEN_PIPE


def _run(args: list[str]) -> int:
    try:
        if os.environ.get("RANK", "0") == "0" and (said := other_edt()):  # of several processes one speaks
            print(f"edt: {said}", file=sys.stderr)
        _check_none_is_empty(args)
        command = _command_of(args)
        run = getattr(importlib.import_module(f"{__name__}.{command.module}"), command.function)
        return run(args[1:]) or 0
    except KeyboardInterrupt:
        print("\nedt: interrupted at once; only what was already saved is kept", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("EDT_TRACEBACK") == "1" or not is_mendable(error):
            raise
        if isinstance(error, FloatingPointError):
            print(f"edt: training stopped: {one_line(error)}", file=sys.stderr)
            return 1
        print(f"edt: error: {one_line(error, args[0] if args else '')}", file=sys.stderr)
        return 2


def _command_of(args: list[str]) -> _Command:
    """SystemExit for what is no command: after the help that was asked for, else with one line on stderr."""
    name = args[0] if args else "--help"
    if name in _COMMANDS:
        return _COMMANDS[name]
    if name in ("--help", "-h"):
        print(_help())
    elif name == "--version":
        print(f"edt-kernels {__version__}")
    elif name in _MOVED:
        raise ValueError(f"edt {name} is now {_MOVED[name]}")
    else:
        perhaps = "".join(f" (perhaps {near})" for near in difflib.get_close_matches(name, _COMMANDS, 1))
        kind = "option" if name.startswith("-") else "command"
        print(f"edt: error: there is no {kind} {printable(name)}{perhaps}; see edt --help", file=sys.stderr)
        raise SystemExit(2)
    raise SystemExit(0 if args else 2)


def _help() -> str:
    return "\n".join([
        "usage: edt [-h] [--version] COMMAND [OPTIONS]",
        "",
        "EDT, the Efficient Diffusion Transformer: data, training, sampling, evaluation, costs.",
        "",
        *(f"  {name:10} {command.help}{f' [{command.extra}]' if command.extra else ''}"
          for name, command in _COMMANDS.items()),
        "",
        "edt COMMAND --help explains a command's options. What has a name in brackets may need that extra of the",
        "package, such as pip install 'edt-kernels[train]'. EDT_TRACEBACK=1 shows where an error comes from.",
    ])  # fmt: skip


def _check_none_is_empty(args: list[str]) -> None:
    """As a path it would be the current folder, where nobody wants a run's files."""
    for before, given in zip(["edt", *args], args):
        name, equals, value = given.partition("=")
        if not given or (name.startswith("--") and equals and not value):
            raise ValueError(f"{name or before} has an empty argument after it; is a variable of the shell unset?")
