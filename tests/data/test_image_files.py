import errno
import os

import pytest
from image_folders import random_image

from edt.data.image_files import UnreadableError, find_images, list_folder, read_file
from edt.data.sources import ImageFolder
from edt.evaluation.image_sets import open_images


def save(folder, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        random_image(i, (9, 8)).save(folder / name)


def test_what_is_found(tmp_path):
    """To any depth, links followed; no hidden files or folders, other suffixes, pipes."""
    folder = tmp_path / "images"
    save(folder, "b/c/1.PNG", "b/2.webp", "a.jpeg", "b/.ipynb_checkpoints/2.webp", ".trash/3.png", "b/._2.png")
    save(tmp_path / "elsewhere", "deep/4.bmp", "5.tif")
    (folder / "b" / "notes.txt").write_text("no image")
    (folder / "b" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "c" / "6.png").symlink_to("../../../elsewhere/5.tif")
    os.mkfifo(folder / "pipe.png")
    found = ["a.jpeg", "b/2.webp", "b/c/1.PNG", "b/c/6.png", "b/linked/5.tif", "b/linked/deep/4.bmp"]
    assert find_images(folder) == found
    assert list_folder(folder) == (["b"], ["a.jpeg"])


def test_links_that_lead_back(tmp_path):
    """Each real folder is taken once in each sub-folder, by the shortest of its paths."""
    save(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "here").symlink_to(".")
    (tmp_path / "a" / "b").symlink_to("../b")
    (tmp_path / "b" / "a").symlink_to("../a")
    (tmp_path / "b" / "again").symlink_to("../a")
    assert find_images(tmp_path) == ["a/1.png", "a/b/2.png", "b/2.png", "b/a/1.png"]


def test_links_that_cross(tmp_path):
    """Of so many folders that link to each other the ways are without number."""
    for i in range(60):
        save(tmp_path, f"class/{i:02}/1.png")
        for j in range(60):
            (tmp_path / "class" / f"{i:02}" / f"to-{j:02}").symlink_to(f"../{j:02}")
    (tmp_path / "other").symlink_to("class")
    assert find_images(tmp_path) == [f"{top}/{i:02}/1.png" for top in ("class", "other") for i in range(60)]


@pytest.mark.parametrize("name", ["gone.png", "gone", "cat/gone.png"])
def test_links_that_lead_nowhere(tmp_path, name):
    """Neither an image nor a class is left out without a word."""
    save(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / name).symlink_to("/nowhere/at/all")
    for read in (lambda: ImageFolder(tmp_path, (8, 8), 3), lambda: open_images("samples", tmp_path)):
        with pytest.raises(ValueError, match=f"{name} leads nowhere .to /nowhere/at/all"):
            read()
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(OSError, match=f"symbolic links: .*{name}"):
        find_images(tmp_path)


def test_extract_and_evaluate_find_the_same(tmp_path):
    save(tmp_path / "sets", "a/1.png", "a/deep/2.webp", "b/3.bmp", "b/.hidden/4.png")
    (tmp_path / "sets" / "c").symlink_to("a")
    names = ImageFolder(tmp_path / "sets", (8, 8), 3).names
    assert names == ["a/1.png", "a/deep/2.webp", "b/3.bmp", "c/1.png", "c/deep/2.webp"]
    images = open_images("samples", tmp_path / "sets")
    assert [file.relative_to(tmp_path / "sets").as_posix() for file in images.files] == names


def test_a_folder_of_a_thousand_levels(tmp_path):
    levels = [tmp_path / ("d/" * depth) for depth in range(1, 1101)]  # more than Python's stack would take
    for folder in levels:
        folder.mkdir()
    save(levels[-1], "1.png")
    found = find_images(tmp_path)
    (levels[-1] / "1.png").unlink()
    for folder in reversed(levels):  # pytest's own clean-up recurses
        folder.rmdir()
    assert found == ["d/" * 1100 + "1.png"]


def test_read_file(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert read_file(tmp_path / "a") == b"content"
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    for name, message in (("pipe", "no regular file"), ("sparse", "has 1099511627776 bytes")):
        with pytest.raises(UnreadableError, match=message):
            read_file(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_file(tmp_path / "nowhere")


def test_an_error_in_reading_names_the_file():
    """Of Linux: memory at address 0 opens, and does not read."""
    with pytest.raises(OSError, match=r"/proc/self/mem") as error:
        read_file("/proc/self/mem")
    assert error.value.errno == errno.EIO
