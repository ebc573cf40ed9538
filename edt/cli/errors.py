"""What the command line makes of errors: one line of those that a user can mend; of others, Python's traceback."""

import dis
import re
import select
import traceback
from pathlib import Path

from ..files.text import printable

# Modules that extras of edt-kernels bring.
_EXTRAS = {
    "datasets": "data",
    "matplotlib": "train",
    "pytorch_optimizer": "train",
    "sklearn": "train",
    "tensorboard": "train",
    "torch_fidelity": "evaluate",
}
_MENDABLE = (ValueError, OSError, MemoryError, OverflowError, FloatingPointError, EOFError)
_CHECKED = (TypeError, RuntimeError, Exception)  # of these classes themselves
_MACHINE = re.compile("out of memory|allocate memory|not enough memory|CUDA|HIP|NVIDIA|driver")  # torch's words
_RAISE = dis.opmap["RAISE_VARARGS"]


def is_mendable(error: BaseException) -> bool:
    """Whether bad input, a file or the machine is to blame; of a bug the traceback is worth more than a line.

    - ValueError, OSError and lack of memory; a module that is not installed; a library's own class of errors.
    - TypeError and RuntimeError where somebody's check raised them, not where an operation failed; but for what
      torch says of the machine.
    - KeyError, AttributeError, AssertionError, … are bugs.
    """
    if isinstance(error, BrokenPipeError) and reader_has_gone():
        return False
    if isinstance(error, ImportError):
        return not (error.name or "").startswith("edt")
    if isinstance(error, _MENDABLE) or type(error).__module__ != "builtins":
        return True
    return type(error) in _CHECKED and (_is_raised(error) or bool(_MACHINE.search(str(error))))


def _is_raised(error: BaseException) -> bool:
    """By a `raise` of Python code: that was the last instruction."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_code.co_code[place.tb_lasti] == _RAISE


def reader_has_gone() -> bool:
    """Of stdout or stderr; any other pipe that breaks, such as a worker's, is an error like others."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


_LONGEST_MESSAGE = 2000
# Of bad input, whose message says what is wrong. Any other has to say what it is, and where.
_EXPLAINED = (ValueError, TypeError, OSError, RuntimeError, ImportError, OverflowError, FloatingPointError)


def one_line(error: BaseException, command: str = "") -> str:
    """The error's message in one line that a terminal can show, also of a name of thousands of letters."""
    message = str(error)
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get((error.name or "").partition(".")[0])):
        return f"{command} needs pip install 'edt-kernels[{extra}]', which brings {error.name}".lstrip()
    if isinstance(error, OSError) and error.strerror is not None and error.filename2 is None:  # not [Errno 13]
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    message = printable(re.sub(r"\s+", " ", message).strip())
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE // 2]} … {message[-_LONGEST_MESSAGE // 2 :]}"
    if isinstance(error, MemoryError):
        return f"out of memory{f': {message}' if message else ''}"
    if isinstance(error, _EXPLAINED) and message:
        return message
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    return f"{type(error).__name__}: {message} ({where}; EDT_TRACEBACK=1 shows more)"
