"""Whose fault an error of reading a file is: the file's, or the machine's, which has no memory or lost a disk."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_NO_MEMORY = re.compile("allocate memory|not enough memory|out of memory")  # in RuntimeErrors of torch
_SYSTEM = re.compile(r"(.*) \(os error (\d+)\)", re.DOTALL)  # in safetensors' errors, which have no errno


@contextmanager
def named_errors(what: str | Path, fault: str = "") -> Iterator[None]:
    """Whatever a reader raises for bad content of `what`, as a ValueError: `what` `fault`: the reader's words.

    What the content is not to blame for is raised as what it is, after `what cannot be read`: MemoryError, torch's
    OutOfMemoryError, and as an OSError what the operating system says, such as of a mount that went away.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(str(what)):
            raise  # says it already
        raise _of_machine(error, what) or _of_content(error, f"{what} {fault}".rstrip()) from error


def _of_machine(error: Exception, what: str | Path) -> Exception | None:
    if isinstance(error, OSError) and error.errno is not None:
        return _system_error(error.errno, f"{what} cannot be read: {error.strerror}", error.filename, what)
    if isinstance(error, FileNotFoundError) and str(error).startswith(os.strerror(errno.ENOENT)):
        # safetensors', without a number; diffusers' are of folders that lack what their content names.
        return FileNotFoundError(f"{what} cannot be read: {error}")
    cause = error
    while cause is not None:  # diffusers turns any error into an OSError without a number
        said = str(cause)
        if isinstance(cause, torch.OutOfMemoryError):
            return torch.OutOfMemoryError(f"{what} cannot be read: {said}")
        if isinstance(cause, MemoryError) or (isinstance(cause, RuntimeError) and _NO_MEMORY.search(said)):
            return MemoryError(f"{what} cannot be read: {said or 'out of memory'}")
        if system := _SYSTEM.search(said):
            return _system_error(int(system[2]), f"{what} cannot be read: {system[1]}", None, what)
        cause = cause.__cause__ or cause.__context__
    return None


def _system_error(number: int, said: str, file: object, what: str | Path) -> OSError:
    """Of the class for its number; it names the file where `what` does not."""
    return OSError(number, said) if file is None or str(file) in str(what) else OSError(number, said, file)


def _of_content(error: Exception, what: str) -> ValueError:
    # Readers of crafted files raise almost any; of some kinds the text alone does not say what happened.
    plain = isinstance(error, ValueError | SyntaxError | EOFError | OSError | TypeError | RuntimeError)
    return ValueError(f"{what}: {error if plain and str(error) else repr(error)}")
