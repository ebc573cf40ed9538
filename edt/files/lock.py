"""One process writes in a folder."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .text import printable, say

LOCK_FILE = ".lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


def open_folder(folder: Path) -> IO[str]:
    """Makes the folder where it is missing and takes it for this process, until the returned file is closed.

    On a file system that has no locks stderr is told that nothing keeps a second command out, and that is all.

    Raises:
        ValueError: if it is a file, or another process has it.
        OSError: if it cannot be made or written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; it must be a folder, or not there yet")
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Of the owner's number alone anything is read, and a file of somebody else may have the name.
            lock = open(folder / LOCK_FILE, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        except OSError as error:
            raise OSError(f"output {folder} cannot be written: {error.strerror or error}") from error
        try:
            _take(lock, folder)
        except BaseException:
            lock.close()
            raise
        # A run that failed may have removed the folder, and the lock with it, between its opening and its taking.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK_FILE).stat()):
                return lock
        lock.close()


def _take(lock: IO[str], folder: Path) -> None:
    try:
        # Of the process, not of the open file: workers that outlive a killed run for a moment do not hold it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.seek(0)
        owner = printable(lock.read(20).strip())
        raise ValueError(
            f"output {folder} is in use by process {owner or 'unknown'}; give another output"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OSError(f"output {folder} cannot be locked: {error.strerror or error}") from error
        say(f"edt: output {folder} is on a file system without locks ({error.strerror}); nothing keeps two "
            "commands from writing there at once, which would damage both")  # fmt: skip
    lock.seek(0)
    content = lock.read(20).strip()
    if content and not content.isdecimal():
        return  # not ours: it serves as a lock, and stays as it is
    try:
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
    except OSError as error:
        raise OSError(f"output {folder} cannot be written: {error.strerror or error}") from error


@contextmanager
def own_folder(lock: IO[str], folder: Path, is_new: bool) -> Iterator[None]:
    """Holds the lock that `open_folder` gave; where an error comes before anything was written into a folder that
    `is_new`, there is none afterwards."""
    with lock:
        try:
            yield
        except BaseException:
            with suppress(OSError):  # it is gone, or somebody has put something there
                if is_new and {path.name for path in folder.iterdir()} == {LOCK_FILE}:
                    (folder / LOCK_FILE).unlink()
                    folder.rmdir()
            raise
