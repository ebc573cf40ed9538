"""What is written whole or not at all, beside what others have there."""

import errno
import fcntl
import json
import os
import stat
from pathlib import Path

import pytest

from edt.files.outputs import NEW, clear_left, half_files, new_file, new_output, write_json
from edt.runs.log import keep_lines_until
from edt.train.config import TrainConfig

WRITERS = {
    "report.json": lambda file: write_json(file, {"seed": 1}),
    "metrics.jsonl": lambda file: keep_lines_until(file, 1),
    "config.yaml": TrainConfig(data=Path("data")).save,
}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_another_stays_whatever_its_name(tmp_path, name):
    file = tmp_path / name
    neighbours = [file.with_name(name + end) for end in (".partial", ".tmp", ".new")] + [file.with_suffix(".tmp")]
    for neighbour in neighbours:
        neighbour.write_text("mine")
    file.write_text('{"step": 1}\n{"step": 2}\n')
    WRITERS[name](file)
    assert '{"step": 2}' not in file.read_text()
    assert all(neighbour.read_text() == "mine" for neighbour in neighbours)
    assert names(tmp_path) == {name, *(neighbour.name for neighbour in neighbours)}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_any(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "report.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (ValueError("of the content"), ValueError, "^of the content$"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            OSError,
            r"report\.json cannot be written: No space left",
        ),
        (OSError("encoder error"), OSError, r"report\.json cannot be written: encoder error$"),
    ],
)
def test_a_file_that_is_not_completed_leaves_what_was_there(tmp_path, error, raised, message):
    (tmp_path / "report.json").write_text("before")
    with pytest.raises(raised, match=message), new_file(tmp_path / "report.json") as temporary:  # noqa: PT012
        temporary.write_text("half")
        assert half_files(tmp_path) == [temporary]
        raise error
    assert (tmp_path / "report.json").read_text() == "before"
    assert names(tmp_path) == {"report.json"}


@pytest.mark.parametrize("folder", ["none", "a file"])
def test_a_file_in_no_folder(tmp_path, folder):
    (tmp_path / "a file").write_text("mine")
    with pytest.raises(OSError, match=rf"{folder}/report\.json cannot be written: No"):
        write_json(tmp_path / folder / "report.json", {})
    assert (tmp_path / "a file").read_text() == "mine"


def left_by_a_killed_one(output: Path, former: str | None = None) -> Path:
    """As `new_output` leaves it where its process ends at once."""
    folder = output.with_name(f".{output.name}.partial-abcd1234")
    folder.mkdir()
    (folder / "lock").touch()
    (folder / NEW).mkdir()
    (folder / NEW / "weights").write_text("half")
    if former is not None:
        (folder / "former").mkdir()
        (folder / "former" / "weights").write_text(former)
    return folder


def test_what_a_killed_one_left_goes(tmp_path):
    for output in (tmp_path / "out", tmp_path / "o[u]t*"):
        left_by_a_killed_one(output)
        clear_left(output)
        assert names(tmp_path) == set()


def test_what_is_left_of_another_output_stays(tmp_path):
    left_by_a_killed_one(tmp_path / "output")
    clear_left(tmp_path / "out")
    clear_left(tmp_path / "out*")
    assert names(tmp_path) == {".output.partial-abcd1234"}


def test_a_former_output_is_put_back_where_there_is_none(tmp_path):
    left_by_a_killed_one(tmp_path / "out", former="before")
    clear_left(tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_text() == "before"
    left_by_a_killed_one(tmp_path / "out", former="replaced")  # killed after the new one took its place
    clear_left(tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_text() == "before"
    assert names(tmp_path) == {"out"}


def test_a_former_output_that_cannot_be_put_back_is_kept(tmp_path, monkeypatch):
    replace = os.replace

    def fail_at_the_output(source, target):
        if Path(target).name == "out":
            raise OSError(errno.EACCES, "Permission denied", str(source), None, str(target))
        replace(source, target)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("before")
    monkeypatch.setattr(os, "replace", fail_at_the_output)
    with (
        pytest.raises(OSError, match=r"Permission denied: '.*/former'"),  # which says where it is
        new_output(tmp_path / "out", overwrite=True) as temporary,
    ):
        temporary.mkdir()
    clear_left(tmp_path / "out")
    (folder,) = tmp_path.iterdir()
    assert (folder / "former" / "weights").read_text() == "before"
    monkeypatch.undo()
    clear_left(tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_text() == "before"
    assert names(tmp_path) == {"out"}


def with_a_thesis(folder: Path) -> None:
    (folder / "thesis.txt").write_text("chapter 1")


def without_a_lock(folder: Path) -> None:
    (folder / "lock").unlink()


def with_a_folder_for_a_lock(folder: Path) -> None:
    (folder / "lock").unlink()
    (folder / "lock").mkdir()


def with_a_link_for_a_lock(folder: Path) -> None:
    (folder / "lock").unlink()
    (folder.parent / "mine").touch()
    (folder / "lock").symlink_to(folder.parent / "mine")


def as_a_link(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    "change", [with_a_thesis, without_a_lock, with_a_folder_for_a_lock, with_a_link_for_a_lock, as_a_link]
)
def test_a_folder_that_is_not_surely_ours_stays(tmp_path, change):
    folder = left_by_a_killed_one(tmp_path / "out", former="mine")
    change(folder)
    before = sorted(tmp_path.rglob("*"))
    clear_left(tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_runs_is_left_alone(tmp_path):
    """Also in another thread: of the two the later one replaces the other's."""
    with new_output(tmp_path / "out") as first:
        first.write_text("first")
        clear_left(tmp_path / "out")
        with new_output(tmp_path / "out") as second:
            second.write_text("second")
        assert (tmp_path / "out").read_text() == "second"
    assert (tmp_path / "out").read_text() == "first"
    assert names(tmp_path) == {"out"}


def test_a_folder_that_came_meanwhile_stays(tmp_path):
    with pytest.raises(OSError, match="not empty"), new_output(tmp_path / "out") as temporary:  # noqa: PT012
        temporary.mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("chapter 1")
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "thesis.txt").read_text() == "chapter 1"


def test_without_locks_nothing_is_removed_for_others(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    left = left_by_a_killed_one(tmp_path / "out")
    with new_output(tmp_path / "out") as temporary:
        temporary.write_text(json.dumps("new"))
        clear_left(tmp_path / "out")
    assert names(tmp_path) == {"out", left.name}
