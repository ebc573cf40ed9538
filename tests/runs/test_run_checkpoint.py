import errno
import hashlib
import itertools
import os
import sys
from pathlib import Path

import pytest

from edt.runs.checkpoint import (
    CHECKSUMS,
    DamagedCheckpointError,
    latest_checkpoint,
    list_checkpoints,
    verify_checkpoint,
    write_checkpoint,
)


def write_files(folder: Path, content: str = "weights") -> None:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text(content * 100)
    (folder / "state.json").write_text(content)


def save(root: Path, step: int, keep: int = 3) -> Path:
    return write_checkpoint(root, step, lambda folder: write_files(folder, f"of {step}"), keep)


def steps(root: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(root)]


def no_damage(text: str):
    raise AssertionError(text)


def test_what_is_written_is_found_and_verified(tmp_path):
    assert latest_checkpoint(tmp_path / "none", no_damage) is None
    saved = save(tmp_path / "run" / "checkpoints", 7)
    assert saved.name == "step-00000007"
    verify_checkpoint(saved)
    assert latest_checkpoint(saved.parent, no_damage) == saved
    assert (saved / "state.json").read_text() == "of 7"


def test_the_newest_are_kept_in_order_of_their_steps(tmp_path):
    for step in (2, 9, 10, 100_000_000, 100_000_001):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == [100_000_000, 100_000_001]
    assert latest_checkpoint(tmp_path, no_damage).name == "step-100000001"


def test_of_what_is_there_only_checkpoints_count(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-00000009.bak").mkdir()
    (tmp_path / "step-9").mkdir()
    (tmp_path / ".writing-00000009").mkdir()
    assert steps(tmp_path) == [1]
    save(tmp_path, 2, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000002", "step-00000009", "step-00000009.bak", "step-9",
    ]  # fmt: skip


def test_a_folder_with_other_files_is_not_left_by_a_checkpoint(tmp_path):
    for name, content in ((".writing-00000009", "notes.txt"), (".writing-mine", "state.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text("mine")
    (tmp_path / "elsewhere" / "model").mkdir(parents=True)
    (tmp_path / ".writing-00000007").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".writing-00000008").write_text("mine")
    save(tmp_path, 1)
    with pytest.raises(FileExistsError, match="writing-00000009"):
        save(tmp_path, 9)
    assert (tmp_path / ".writing-00000009" / "notes.txt").read_text() == "mine"
    assert steps(tmp_path) == [1]
    assert len(list(tmp_path.glob(".writing-*"))) == 4


@pytest.mark.parametrize(
    ("name", "number"), [(CHECKSUMS, errno.EIO), ("model/weights", errno.EIO), ("checkpoints", errno.EACCES)]
)
def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch, name, number):
    """A run would go on from an older checkpoint, or anew."""
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        save(root, step)
    failing = root / "step-00000002" / name if name != "checkpoints" else root
    read_bytes, file_digest, iterdir, scandir = Path.read_bytes, hashlib.file_digest, Path.iterdir, os.scandir

    def fail(path, *args, otherwise):
        if Path(getattr(path, "name", path) if name == "model/weights" else path) == failing:
            raise OSError(number, os.strerror(number), *([str(path)] if name == "checkpoints" else []))
        return otherwise(path, *args)

    monkeypatch.setattr(Path, "read_bytes", lambda path: fail(path, otherwise=read_bytes))
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: fail(*args, otherwise=file_digest))
    monkeypatch.setattr(Path, "iterdir", lambda path: fail(path, otherwise=iterdir))
    monkeypatch.setattr(os, "scandir", lambda path=".": fail(path, otherwise=scandir))
    with pytest.raises(OSError, match=f"{os.strerror(number)}: '{failing}'"):
        latest_checkpoint(root, no_damage)


def test_later_damaged_ones_do_not_take_the_place_of_good_ones(tmp_path):
    """A run that went on from before them counts its own, and makes them anew when it comes to them."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "step-00000030" / "state.json").unlink()
    save(tmp_path, 24, keep=2)
    save(tmp_path, 28, keep=2)
    assert steps(tmp_path) == [24, 28, 30]
    save(tmp_path, 30, keep=2)
    assert steps(tmp_path) == [28, 30]
    assert latest_checkpoint(tmp_path, no_damage).name == "step-00000030"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = [
    (lambda folder: truncate(folder / "model" / "weights"), r"has 399 bytes of model/weights; 400 were written"),
    (lambda folder: flip_a_bit(folder / "model" / "weights"), r"has a model/weights that is not what was written"),
    (lambda folder: (folder / "state.json").unlink(), r"lacks state\.json"),
    (lambda folder: (folder / CHECKSUMS).unlink(), r"has no readable checksums\.json"),
    (lambda folder: truncate(folder / CHECKSUMS) or truncate(folder / CHECKSUMS), r"has no readable checksums"),
    (lambda folder: (folder / CHECKSUMS).write_text("[]"), r"has no readable checksums"),
    (lambda folder: (folder / CHECKSUMS).write_text('{"state.json": 4}'), r"has no readable checksums"),
    (lambda folder: (folder / CHECKSUMS).write_bytes(b"\xff"), r"has no readable checksums"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_recognised_and_the_one_before_is_taken(tmp_path, damage, message):
    for step in (1, 2):
        save(tmp_path, step)
    damage(tmp_path / "step-00000002")
    with pytest.raises(DamagedCheckpointError, match=f"step-00000002 {message}"):
        verify_checkpoint(tmp_path / "step-00000002")
    told = []
    assert latest_checkpoint(tmp_path, told.append).name == "step-00000001"
    assert len(told) == 1
    assert told[0].endswith("; the one before is used")
    damage(tmp_path / "step-00000001")
    assert latest_checkpoint(tmp_path, told.append) is None


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(tmp_path, error):
    save(tmp_path, 1)

    def fail(folder):
        write_files(folder)
        raise error

    with pytest.raises(type(error)):
        write_checkpoint(tmp_path, 2, fail, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    verify_checkpoint(tmp_path / "step-00000001")


OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def save_and_die(root: Path, step: int, keep: int, operation: int) -> bool:
    """In a fork, ended at once before its n-th operation on files; whether it came to its end before."""
    child = os.fork()
    if child == 0:
        count = itertools.count()
        sys.addaudithook(
            lambda event, _: os._exit(9) if event in OPERATIONS and next(count) == operation else None
        )
        save(root, step, keep)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_death_at_every_operation(tmp_path):
    """There is always a checkpoint that is whole; and the same is reached afterwards, with nothing left over."""
    found = []
    for operation in itertools.count():
        root = tmp_path / str(operation)
        save(root, 1, keep=1)
        done = save_and_die(root, 2, keep=1, operation=operation)
        newest = latest_checkpoint(root, no_damage)
        number = int(newest.name.removeprefix("step-"))
        assert (newest / "state.json").read_text() == f"of {number}"
        found.append(number)
        save(root, 2, keep=1)
        assert [path.name for path in root.iterdir()] == ["step-00000002"]
        assert latest_checkpoint(root, no_damage).name == "step-00000002"
        if done:
            break
    assert found == sorted(found)
    assert found.count(1) > 10  # while it was written
    assert found.count(2) > 3  # while the old one was removed


def test_milestones_are_kept_beside_the_newest(tmp_path):
    for step in range(1, 9):
        write_checkpoint(tmp_path, step, write_files, keep=2, keep_every=3)
    assert steps(tmp_path) == [3, 6, 7, 8]
