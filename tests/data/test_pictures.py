"""The pictures of samples, as they are seen: whole pixels, whole titles, names of classes."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from edt.data import pictures

IGUANA = "common iguana, iguana, Iguana iguana"
TITLE = "AMM on, guidance 1.5, 250 steps of dpm++"


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """All that is written into pictures from here on."""
    texts, write = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *a, **k: texts.append(a[2]) or write(*a, **k))
    return texts


def colours(count: int, size: tuple[int, int]) -> np.ndarray:
    """Noise of a width and a height."""
    return np.random.default_rng(0).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)


def scale_of(page: np.ndarray, image: np.ndarray) -> int:
    """The whole number by which the image is enlarged in a page; every pixel of it is a square of one colour."""
    corners = np.argwhere((page == image[0, 0]).all(axis=-1))
    for scale in range(20, 0, -1):
        block = image.repeat(scale, axis=0).repeat(scale, axis=1)
        if any(np.array_equal(page[y : y + len(block), x : x + block.shape[1]], block) for y, x in corners):
            return scale
    raise AssertionError("the image is not there as it is")


@pytest.mark.parametrize(
    ("size", "labels", "scale"),
    [
        ((8, 8), [3], 16),
        ((32, 32), [0, 1, 2], 4),
        ((32, 32), [0] * 3, 4),
        ((32, 48), [0, 0, 1, 1, 1], 2),
        ((32, 32), [*range(16)] * 20, 2),
        ((8, 8), [*range(10)] * 2, 10),
        ((256, 256), [39], 1),
        ((256, 256), [*range(4)], 1),
        ((100, 30), [0, 1] * 3, 1),
    ],
)
def test_pixels_are_enlarged_by_whole_numbers(tmp_path, size, labels, scale):
    images = colours(len(labels), size)
    pictures.save_samples(tmp_path / "a.png", images, np.array(labels), TITLE)
    page = np.asarray(Image.open(tmp_path / "a.png"))
    assert {scale_of(page, image) for image in (images[0], images[-1])} == {scale}
    assert pictures.is_ours(tmp_path / "a.png")


def test_grey_is_ink_on_paper(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    image[0, 0, 0] = 37
    pictures.save_samples(tmp_path / "a.png", image, np.array([3]), TITLE)
    assert scale_of(np.asarray(Image.open(tmp_path / "a.png")), 255 - image[0].repeat(3, axis=-1)) == 16


@pytest.mark.parametrize("title", [TITLE, " ".join([TITLE] * 7), "step 7\nlatents; --vae decodes", "x" * 500])
@pytest.mark.parametrize(("count", "size"), [(1, (8, 8)), (3, (32, 32)), (16, (256, 256))])
def test_titles_are_not_cut(tmp_path, written, title, count, size):
    """There is paper all around, and between the title and the picture."""
    pictures.save_samples(tmp_path / "a.png", colours(count, size), np.zeros(count, int), title)
    page = np.asarray(Image.open(tmp_path / "a.png"))
    for edge in (page[:4], page[-4:], page[:, :4], page[:, -4:]):
        assert (edge == 255).all()
    if " " in title:
        assert " ".join(written).split() == title.split()
    else:
        assert len(written) == 1
        assert written[0].endswith("…")


def test_classes_are_named(tmp_path, written):
    """Below an image of each, or beside a row of each; what has no name by its number."""
    names = {0: IGUANA, 1: "tench", 2: "Ä" * 500, 4: "4", 5: "bad\x1b[31m\udce4"}
    for labels, expected in (
        ([0, 1, 3, 5], ["common iguana…", "tench", "3", r"bad\x1b[31m\ud…"]),
        ([0, 0, 1, 3, 3], [IGUANA, "tench", "3"]),
        ([1, 1], ["tench"]),
        ([4, 4], ["class 4"]),
        ([5, 5], [r"bad\x1b[31m\udce4"]),
        ([3, 3], []),
    ):
        written.clear()
        images = colours(len(labels), (32, 32))
        pictures.save_samples(tmp_path / "a.png", images, np.array(labels), TITLE, names)
        assert sorted(written) == sorted([TITLE, *expected])
    pictures.save_samples(tmp_path / "a.png", colours(4, (32, 32)), np.array([2, 2, 1, 1]), TITLE, names)
    assert max(map(len, written)) < 50


def test_labels_of_unlike_many_images(tmp_path, written):
    images = colours(6, (64, 64))
    pictures.save_label_grid(tmp_path / "a.png", images, np.array([7, 0, 0, 0, 7, 3]), TITLE, columns=2)
    page = np.asarray(Image.open(tmp_path / "a.png"))
    assert [scale_of(page, images[i]) for i in (0, 1, 2, 4, 5)] == [2] * 5
    with pytest.raises(AssertionError, match="not there"):
        scale_of(page, images[3])
    assert written == [TITLE, "0", "3", "7"]
