"""Files and folders that are there whole or as they were before, whatever ends the process that writes them."""

import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_HALF = re.compile(r"\.[0-9a-f]{16}\.edt-half")
_PARTIAL, _LOCK, _FORMER = ".partial-", "lock", "former"
NEW = "edt-convert"  # torch.save names the folder within a .pt so, by which edt convert knows its own


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, of no other's name, that takes its place in the end; not with an exception.

    Raises:
        OSError: naming `path`.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.edt-half")
    try:
        open(temporary, "x").close()  # with the permissions of any new file
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:  # such as of a full disk, which names no file
        if error.errno is None:
            raise OSError(f"{path} cannot be written: {error}") from error
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error


def write_json(path: Path, content: dict) -> None:
    """Replaces the file in one step, once the new content is on the disk."""
    with new_file(path) as temporary, open(temporary, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")  # ASCII, whatever names are in it
        file.flush()
        os.fsync(file.fileno())


def half_files(folder: Path) -> list[Path]:
    """What `new_file` left in a folder when it was killed; or has not finished, so the caller holds its lock."""
    return [path for path in folder.glob(".*") if is_half(path.name)]


def is_half(name: str) -> bool:
    """Whether `new_file` gives its temporary files such names."""
    return bool(_HALF.fullmatch(name))


@contextmanager
def new_output(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A path beside `output` for the file or folder that takes its place in the end; not with an exception.

    It is in a hidden folder with a file that is locked for as long as this process lives, so that a later
    `clear_left` knows what a killed one left.

    Args:
        overwrite: takes the place of a folder that has something in it too, which is deleted.

    Raises:
        OSError: where there is no room for it; for such a folder without `overwrite`.
    """
    output = output.resolve()  # of a link, what it leads to
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}{_PARTIAL}"))
    except OSError as error:
        raise OSError(error.errno, f"output {output} cannot be written: {error.strerror}") from error
    with open(folder / "unlocked", "w") as lock:
        # Of the open file, not of the process as a run's: another thread must not take it for a dead one's.
        with suppress(OSError):  # a file system without locks, where nothing is ever removed for others
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.replace(lock.name, folder / _LOCK)  # under this name it is never seen unlocked
        try:
            yield folder / NEW
            if overwrite and output.is_dir():
                os.replace(output, folder / _FORMER)  # a folder cannot be renamed onto a full one
            os.replace(folder / NEW, output)
        finally:
            _remove(folder, output, lock)


def clear_left(output: Path) -> None:
    """Removes what `new_output` of this output left when it was killed, after it has put back an output that was
    amid its replacement."""
    output = output.resolve()
    for folder in output.parent.glob(f".{glob.escape(output.name)}{_PARTIAL}*"):
        with suppress(OSError):  # of a process that runs, or removed by another meanwhile
            if folder.is_symlink() or {path.name for path in folder.iterdir()} - {_LOCK, NEW, _FORMER}:
                continue  # not ours
            if not stat.S_ISREG((folder / _LOCK).lstat().st_mode):
                continue
            with open(folder / _LOCK, "r+") as lock:  # NFS locks for writing only what is open for it
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder, output, lock)


def _remove(folder: Path, output: Path, lock: IO[str]) -> None:
    if os.path.lexists(folder / _FORMER) and not os.path.lexists(output):
        os.replace(folder / _FORMER, output)  # an error leaves everything: this is all that there is of the output
    for path in list(folder.iterdir()):
        if path.name == _LOCK:
            continue  # goes last, so that what is left of this is known for ours
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / _LOCK).unlink(missing_ok=True)
    lock.close()  # until then NFS keeps it in the folder, under another name
    folder.rmdir()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:  # reading does not say of what
            raise OSError(error.errno, error.strerror, str(path)) from error
