"""A disk that gets full."""

import contextlib
import ctypes
import errno
import os
from pathlib import Path

from edt.data import shards


@contextlib.contextmanager
def small_disk(folder: Path, room: int, monkeypatch):
    """A file system with so much room; where mounting one is not allowed, writes that fail as on it."""
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    mounted = libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={room}".encode()) == 0
    if not mounted:
        append = shards.ArrayWriter.append

        def append_if_room(writer, rows):
            used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            if used + rows.nbytes > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            append(writer, rows)

        monkeypatch.setattr(shards.ArrayWriter, "append", append_if_room)
    try:
        yield
    finally:
        if mounted:
            assert libc.umount(os.fsencode(folder)) == 0
        monkeypatch.undo()
