"""The pictures of the demo, of training and of `edt sample`: images enlarged by whole numbers, with names."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..files.errors import named_errors
from ..files.text import printable

_SOFTWARE = "edt-kernels"
_FRAME, _INK, _PAPER = (184,) * 3, (0,) * 3, (255,) * 3
_LINE, _MARGIN, _TEXT, _TEXT_HEIGHT = 4, 8, 13, 18  # pixels, as all that follows
_LONGEST_NAME = 280  # beside a row
_NARROWEST = 400  # a page, for its title
_SMALLEST, _LARGEST = 40, 128  # side to enlarge images to, by how many there are
_LONGEST = 800  # a row or column of enlarged images


def save_samples(
    path: Path, images: ndarray, labels: ndarray, title: str, names: Mapping[int, str] | None = None
) -> None:
    """Images (N, H, W, C) uint8: a row for each of several labels, or about a square where each has but one.

    Args:
        names: of the labels, by number; others are shown as numbers. Of a single label, only a name is shown.
    """
    names = names or {}
    shown = [str(names.get(int(label), label)) for label in labels]
    if len(set(labels.tolist())) == 1:
        if (label := int(labels[0])) in names:
            title = f"{f'class {label}' if shown[0] == str(label) else shown[0]}\n{title}"
        save_mosaic(path, images, title)
    elif len(set(labels.tolist())) == len(labels):
        save_mosaic(path, images, title, captions=shown)
    else:
        save_label_grid(path, images, labels, title, names=names)


def save_label_grid(
    path: Path,
    images: ndarray,
    labels: ndarray,
    title: str,
    columns: int = 20,
    names: Mapping[int, str] | None = None,
) -> None:
    """One row for each label, named at its left, of its first `columns` images."""
    rows = {int(label): list(images[labels == label][:columns]) for label in np.unique(labels)}
    columns = max(map(len, rows.values()))
    cells = [image for row in rows.values() for image in row + [None] * (columns - len(row))]
    _write(path, _page(cells, columns, title, rows=[str((names or {}).get(label, label)) for label in rows]))


def save_mosaic(path: Path, images: ndarray, title: str, captions: Sequence[str] = ()) -> None:
    """All images in about a square, or few in a row, each with its caption below it."""
    columns = len(images) if len(images) < 4 else math.ceil(math.sqrt(len(images)))
    _write(path, _page(list(images), columns, title, captions=captions))


def save_class_page(path: Path, label: int, panels: dict[str, ndarray], columns: int = 25) -> None:
    """All images of one class, a panel for each variant below the others."""
    pages = [_page(list(images), columns, f"digit {label}, {title}") for title, images in panels.items()]
    whole = Image.new("RGB", (max(page.width for page in pages), sum(page.height for page in pages)), _PAPER)
    top = 0
    for page in pages:
        whole.paste(page, (0, top))
        top += page.height
    _write(path, whole)


def save_denoising_strip(path: Path, timesteps: list[int], frames: list[ndarray], labels: ndarray) -> None:
    """One row for each label, one column for each timestep, noise to image; frames[i] is (N, H, W, C) uint8."""
    images = np.stack(frames, axis=1).reshape(-1, *frames[0].shape[1:])
    title = "denoising: a column for each timestep"
    _write(
        path, _page(list(images), len(frames), title, rows=list(map(str, labels)), feet=list(map(str, timesteps)))
    )


def _page(
    cells: list[ndarray | None],
    columns: int,
    title: str,
    *,
    rows: Sequence[str] = (),
    captions: Sequence[str] = (),
    feet: Sequence[str] = (),
) -> Image.Image:
    """Images (H, W, C) uint8 of one size, row by row; None leaves a place empty.

    Args:
        rows: names at the left of each row.
        captions: names below each image.
        feet: names below each column.
    """
    H, W = next(cell.shape[:2] for cell in cells if cell is not None)
    longest = max(columns * W, -(-len(cells) // columns) * H)
    scale = max(-(-_SMALLEST // max(H, W)), min(_LARGEST // max(H, W), _LONGEST // longest))
    H, W = H * scale, W * scale
    across, down = W + _LINE, H + _LINE + (_LINE + _TEXT_HEIGHT if captions else 0)
    rows = [_shortened(row, _LONGEST_NAME) for row in rows]
    beside = max((math.ceil(_width(row)) + _MARGIN for row in rows), default=0)
    width = max(beside + columns * across + _LINE + 2 * _MARGIN, _NARROWEST)
    lines = _wrapped(title, width - 2 * _MARGIN)
    # Of the first image.
    left = (width + beside - columns * across + _LINE) // 2
    top = 2 * _MARGIN + len(lines) * _TEXT_HEIGHT + _LINE
    bottom = top + -(-len(cells) // columns) * down
    page = Image.new("RGB", (width, bottom + _MARGIN + (_TEXT_HEIGHT if feet else 0)), _PAPER)
    draw = ImageDraw.Draw(page)

    def write(text: str, x: int, y: int, anchor: str) -> None:
        draw.text((x, y), text, _INK, _font(), anchor)

    for i, line in enumerate(lines):
        write(line, width // 2, _MARGIN + i * _TEXT_HEIGHT, "ma")
    for i, cell in enumerate(cells):
        if cell is None:
            continue
        x, y = left + i % columns * across, top + i // columns * down
        draw.rectangle((x - _LINE, y - _LINE, x + W + _LINE - 1, y + H + _LINE - 1), _FRAME)
        page.paste(_enlarged(cell, scale), (x, y))
        if captions:
            write(_shortened(captions[i], W), x + W // 2, y + H + _LINE, "ma")
    for i, row in enumerate(rows):
        write(row, left - _LINE - _MARGIN, top + i * down + H // 2, "rm")
    for i, foot in enumerate(feet):
        write(_shortened(foot, W), left + i * across + W // 2, bottom, "ma")
    return page


def _enlarged(image: ndarray, scale: int) -> Image.Image:
    """Each pixel as a square of `scale` pixels; one channel as ink on paper (255 is black), three as colours."""
    if image.shape[-1] == 1:
        image = 255 - image.repeat(3, axis=-1)
    return Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1))


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Matplotlib's, which has most alphabets; without it Pillow's, which has ASCII."""
    try:
        from matplotlib import get_data_path
    except ImportError:
        return ImageFont.load_default(_TEXT)
    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _TEXT)


def _width(text: str) -> float:
    return _font().getlength(text)


def _shortened(text: str, width: int) -> str:
    """As much of the beginning as is at most `width` pixels long."""
    text = printable(text)
    if len(text) <= width and _width(text) <= width:
        return text
    text = text[: width // 2]  # each try is laid out
    while text and _width(text + "…") > width:
        text = text[:-1].rstrip(" ,")
    return text + "…"


def _wrapped(text: str, width: int) -> list[str]:
    """Its lines, broken between words where they are longer."""
    lines = []
    for line in text.splitlines():
        lines.append("")
        for word in printable(line).split(" "):
            longer = f"{lines[-1]} {word}".lstrip()
            if lines[-1] and _width(longer) > width:
                lines.append("")
                longer = word
            lines[-1] = longer
    return [_shortened(line, width) for line in lines]


def _write(path: Path, page: Image.Image) -> None:
    ours = PngInfo()
    ours.add_text("Software", _SOFTWARE)
    page.save(path, format="PNG", pnginfo=ours)


def save(figure, path: Path) -> None:
    """A Matplotlib figure as a PNG that says that it is ours."""
    figure.savefig(path, dpi=100, format="png", metadata={"Software": _SOFTWARE})


def is_ours(path: Path, *others: str) -> bool:
    """Whether this module wrote this file, or one of the `others`, as the beginning of its name.

    Raises:
        OSError: if it cannot be read.
    """
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with named_errors(path), Image.open(path) as image:
            return str(image.info.get("Software")).startswith((_SOFTWARE, *others))
    except ValueError:  # of what is no picture, or a crafted one
        return False
