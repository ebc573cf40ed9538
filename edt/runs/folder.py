"""The folder of a training run: errors leave their traceback there, data are verified once."""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..data.dataset import LatentDataset, verify_dataset
from ..files.text import read_json

ERROR_FILE = "error.log"
_VERIFIED_FILE = "verified.json"


@contextmanager
def tracebacks(folder: Path) -> Iterator[None]:
    """What ends a run leaves its traceback in error.log: the command line says one line of it."""
    try:
        yield
    except Exception as error:
        # A disk that is full ends the run and leaves no room for its log: the error itself must come through.
        with suppress(OSError), (folder / ERROR_FILE).open("a", encoding="utf-8", errors="replace") as file:
            traceback.print_exception(error, file=file)
        raise


def verify_once(dataset: LatentDataset, folder: Path, progress: bool) -> dict:
    """`verify_dataset`, unless `folder` remembers that it was done and no file changed its size or time since.

    Returns:
        What `remember_verified` writes.

    Raises:
        ValueError: as `verify_dataset`.
    """
    names = [name for shard in dataset.manifest.shards for name in shard.sha256]
    stats = {name: (dataset.folder / name).stat() for name in names}
    found = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    try:
        verified = read_json(folder / _VERIFIED_FILE, "record")
    except (OSError, ValueError):
        verified = None  # none yet, or torn
    if verified != found:
        verify_dataset(dataset, progress=progress)
    return found


def remember_verified(found: dict, folder: Path) -> None:
    (folder / _VERIFIED_FILE).write_text(json.dumps(found) + "\n")
