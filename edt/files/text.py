"""Text that people and other programs wrote: their encodings, their JSON, their names on a terminal."""

import codecs
import json
import os
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_MARKS = (  # the longer first: UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path, what: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with the byte order mark that says so; without the mark.

    Args:
        what: what the file is, such as "labels"; it begins every error, and the path follows.

    Raises:
        ValueError: for bytes of another encoding (a code page cannot be told from another), or a NUL.
        OSError: if it cannot be read, naming it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # of the reading, not of the opening
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} {path} is not {encoding.removesuffix('-sig').upper()} (byte {error.start}: {error.reason}); "
            "save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(f"{what} {path} has a NUL in it; save it as UTF-8 text")
    return text


def read_json(path: Path, what: str, kind: type | None = None) -> Any:
    """The value of a JSON file, of the type `kind` (dict or list) where one is named.

    Raises:
        ValueError: naming the file, for text that `read_text` refuses, is no JSON, or is of another type.
        OSError: if it cannot be read.
    """
    value = parse_json(read_text(path, what), path, what)
    if kind is not None and not isinstance(value, kind):
        needed = {dict: "an object", list: "a list"}[kind]
        raise ValueError(f"{what} {path} is JSON, but {type(value).__name__}; it must be {needed}")
    return value


def parse_json(text: str, path: Path, what: str) -> Any:
    """`read_json` of a file whose text is read already."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4300 digits
        raise ValueError(f"{what} {path} is no JSON, or torn: {error}") from error


def printable(text: object) -> str:
    r"""One line that any terminal can show: control characters (escapes, line feeds) and lone surrogates, as names
    that are not UTF-8 have, become \x1b and \udce4."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def command(*words: object) -> str:
    """`edt` with these arguments as a line for the shell that this process was started from: by the same path, as
    edt may be on no PATH, or by python -m where it was so."""
    program, found = sys.argv[0], shutil.which("edt")
    if os.path.basename(program) == "__main__.py":
        start = [sys.orig_argv[0], "-m", "edt"]
    elif os.path.basename(program) == "edt" and not (found and os.path.abspath(found) == os.path.abspath(program)):
        start = [program]
    else:
        start = ["edt"]
    return printable(shlex.join(start + list(map(str, words))))


def say(text: str) -> None:
    """A line on stderr, if that is still there: long work goes on without its terminal."""
    with suppress(OSError, ValueError, RuntimeError):  # gone, closed, or, in a signal handler, amid another print
        if sys.stderr is not None:  # to print, None is stdout
            print(text, file=sys.stderr, flush=True)
