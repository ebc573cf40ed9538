"""Which files of a folder are images, for `edt extract` and `edt evaluate` alike; and reading them."""

import os
import stat
from collections import deque
from pathlib import Path

# Of what Pillow reads without further packages and people keep images in.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
_MOST_BYTES = 2**30  # of a file: Pillow refuses images that are larger than this without compression


class UnreadableError(ValueError):
    """What a file is to blame for itself: such a file is left out and listed, any other error stops the work."""


def find_images(folder: Path) -> list[str]:
    """Every image below a folder, to any depth, as path/from/the/folder, sorted by it.

    Links count as what they lead to, but within one sub-folder of `folder`, which may be a class, each real folder
    is taken once, by the shortest of its paths. Hidden files and folders, other suffixes and what is no regular
    file are passed over.

    Raises:
        ValueError: for a link that leads nowhere.
        OSError: for a folder that cannot be read.
    """
    tops, found = list_folder(folder)
    for top in tops:
        seen = {_identity(folder)}
        waiting = deque([top])
        while waiting:
            here = waiting.popleft()  # breadth first: Linux follows at most 40 links in a path
            identity = _identity(folder / here)
            if identity in seen:
                continue
            seen.add(identity)
            folders, images = list_folder(folder / here)
            found += [f"{here}/{name}" for name in images]
            waiting += [f"{here}/{name}" for name in sorted(folders)]
    return sorted(found)


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the sub-folders and of the images that are in a folder itself; see `find_images`."""
    folders, images = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.is_file():
                if os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                    images.append(entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise ValueError(
                    f"link {entry.path} leads nowhere (to {os.readlink(entry.path)}); mend or remove it, and "
                    f"others that find {folder} -xtype l shows"
                )
    return folders, images


def read_file(path: str | Path) -> bytes:
    """The content of a file of a source.

    Raises:
        UnreadableError: if it is too large for an image, or no file but a device, a pipe or a folder.
        OSError: naming it, for whatever keeps it from being read. None of these is taken for a fault of the file,
            as a mount that went away shows as any of them: no such file, permission denied, not connected, ….
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError("is no regular file")
    if status.st_size > _MOST_BYTES:
        raise UnreadableError(f"has {status.st_size} bytes; files of more than {_MOST_BYTES} are not read")
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # reading does not say of what
        raise
