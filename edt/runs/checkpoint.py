"""Checkpoints of a training run: folders that are either complete or recognised as damaged.

`RUN/checkpoints/step-00001000/` holds the files of one step and `checksums.json`, which is written last and lists
the size and SHA-256 of each. A checkpoint is written under a temporary name, flushed to the disk and renamed, so
that a process killed at any moment leaves the earlier ones as they were.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ..files.outputs import sha256
from ..files.text import read_json

CHECKPOINTS = "checkpoints"  # in the run's folder
CHECKSUMS = "checksums.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".writing-"
# What `train_state` and this write: a folder that has anything else was not left by a checkpoint.
_CONTENT = {"model", "ema", "optimizer.safetensors", "training.safetensors", "state.json", CHECKSUMS}


class DamagedCheckpointError(ValueError):
    """A checkpoint lacks a file, or one is not what was written."""


def write_checkpoint(
    root: Path, step: int, write: Callable[[Path], None], keep: int, keep_every: int | None = None
) -> Path:
    """Writes the checkpoint of `step` under `root` and removes earlier ones, but of all it keeps `keep`.

    Args:
        write: is called with an empty folder and puts the files there.
        keep_every: those of its multiples are kept beside them.

    Raises:
        OSError: where the disk is full, for one; what was written of it is removed, earlier ones are untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(root)
    temporary, final = root / f"{_TEMPORARY}{step:08d}", root / f"step-{step:08d}"
    temporary.mkdir()
    try:
        write(temporary)
        _write_checksums(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():  # damaged, or this step was reached before by a run that went on from an earlier one
        shutil.rmtree(final)
    os.replace(temporary, final)
    _flush(root)
    until_now = [
        folder
        for number, folder in list_checkpoints(root)
        if number <= step and not (keep_every and number % keep_every == 0)
    ]  # later ones are damaged
    for old in until_now[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each, the oldest first, damaged ones too."""
    try:
        folders = list(root.iterdir())  # a glob takes a folder that cannot be read for an empty one
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = ((_STEP_NAME.fullmatch(folder.name), folder) for folder in folders)
    return sorted((int(name[1]), folder) for name, folder in found if name and folder.is_dir())


def verify_checkpoint(folder: Path, part: str = "") -> None:
    """Compares every file, or those whose path within the checkpoint begins with `part`, with its checksum.

    Raises:
        DamagedCheckpointError: naming the first file that is missing, torn or changed.
        OSError: for a file that is there and cannot be read, as of a disk that has gone away.
    """
    try:
        listed = read_json(folder / CHECKSUMS, "list", dict)
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()
                    if name.startswith(part)}  # fmt: skip
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpointError(f"checkpoint {folder} has no readable {CHECKSUMS}: {error}") from error
    if not expected:
        raise DamagedCheckpointError(f"checkpoint {folder} lists no file of {part or 'it'} in {CHECKSUMS}")
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            raise DamagedCheckpointError(f"checkpoint {folder} lacks {name}")
        if file.stat().st_size != size:
            raise DamagedCheckpointError(
                f"checkpoint {folder} has {file.stat().st_size} bytes of {name}; {size} were written"
            )
        if sha256(file) != digest:
            raise DamagedCheckpointError(f"checkpoint {folder} has a {name} that is not what was written")


def latest_checkpoint(root: Path, on_damage: Callable[[str], None], part: str = "") -> Path | None:
    """The newest checkpoint that is undamaged, or whose `part` is (`verify_checkpoint`), or None; `on_damage` is
    told of each that is passed over."""
    for _, folder in reversed(list_checkpoints(root)):
        try:
            verify_checkpoint(folder, part)
        except DamagedCheckpointError as error:
            on_damage(f"{error}; the one before is used")
            continue
        return folder
    return None


def _write_checksums(folder: Path) -> None:
    checksums = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        _flush(file)
        checksums[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": sha256(file)}
    listing = folder / CHECKSUMS
    listing.write_text(json.dumps(checksums, indent=2) + "\n")
    _flush(listing)
    for directory in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _flush(directory)


def _remove_unfinished(root: Path) -> None:
    for folder in root.glob(f"{_TEMPORARY}*"):
        ours = folder.name.removeprefix(_TEMPORARY).isdecimal() and folder.is_dir() and not folder.is_symlink()
        if ours and {path.name for path in folder.iterdir()} <= _CONTENT:
            shutil.rmtree(folder)


def _flush(path: Path) -> None:
    """To the disk: a rename must not outlive a power cut that the data did not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
