"""The pictures of the demo and of `edt sample`."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy import ndarray
from PIL import Image

from ..files.errors import named_errors

_SOFTWARE = "edt-kernels"
_LINE = 72  # light on the inverted scale of ink on paper


def mosaic(images: ndarray, columns: int) -> ndarray:
    """(N, H, W, C) uint8, row by row → one image with a grey line between neighbours."""
    N, H, W, C = images.shape
    rows = -(-N // columns)
    canvas = np.full((rows * (H + 1) + 1, columns * (W + 1) + 1, C), _LINE, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        canvas[y * (H + 1) + 1 :, x * (W + 1) + 1 :][:H, :W] = image
    return canvas


def show(axes, images: ndarray, columns: int) -> None:
    """Draws a mosaic; one channel as ink on paper (255 is black), three as colours."""
    axes.imshow(mosaic(images, columns).squeeze(-1) if images.shape[-1] == 1 else mosaic(images, columns),
                cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")  # fmt: skip
    axes.set(xticks=[], yticks=[])
    axes.set_anchor("N")
    axes.spines[:].set_visible(False)


def save_label_grid(path: Path, images: ndarray, labels: ndarray, title: str, columns: int = 20) -> None:
    """One row for each label, named at its left, of its first `columns` images."""
    names = np.unique(labels)
    columns = min(columns, max(int((labels == name).sum()) for name in names))
    H, W = images.shape[1:3]
    blank = np.zeros((columns, *images.shape[1:]), dtype=np.uint8)
    rows = [np.concatenate([images[labels == name][:columns], blank])[:columns] for name in names]
    cell = max(0.4, W / 100)  # inches: a pixel of the picture for each of a large image
    figure = Figure(figsize=(cell * columns + 0.8, cell * len(names) * H / W + 0.7), layout="constrained")
    axes = figure.subplots()
    show(axes, np.concatenate(rows), columns)
    axes.set_yticks([row * (H + 1) + 1 + H / 2 for row in range(len(names))], [str(name) for name in names])
    axes.tick_params(length=0, labelsize=13)
    axes.set_title(title)
    save(figure, path)


def save_mosaic(path: Path, images: ndarray, title: str) -> None:
    """All images in about a square."""
    columns = math.ceil(math.sqrt(len(images)))
    H, W = images.shape[1:3]
    cell = max(0.6, W / 100)
    figure = Figure(figsize=(cell * columns + 0.4, cell * -(-len(images) // columns) * H / W + 0.6),
                    layout="constrained")  # fmt: skip
    axes = figure.subplots()
    show(axes, images, columns)
    axes.set_title(title)
    save(figure, path)


def save_class_page(path: Path, label: int, panels: dict[str, ndarray], columns: int = 10) -> None:
    """All images of one class, a panel for each variant."""
    figure = Figure(figsize=(3.4 * len(panels), 2.4), layout="constrained")
    for axes, (title, images) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items()):
        show(axes, images, columns)
        axes.set_title(title)
    figure.suptitle(f"digit {label}")
    save(figure, path)


def save_denoising_strip(path: Path, timesteps: list[int], frames: list[ndarray], labels: ndarray) -> None:
    """One row for each label, one column for each timestep, noise to image; frames[i] is (N, H, W, C) uint8."""
    H, W = frames[0].shape[1:3]
    figure = Figure(figsize=(0.6 * len(frames) + 0.8, 0.6 * len(labels) + 0.9), layout="constrained")
    axes = figure.subplots()
    show(axes, np.stack(frames, axis=1).reshape(-1, *frames[0].shape[1:]), len(frames))
    axes.set_yticks([row * (H + 1) + 1 + H / 2 for row in range(len(labels))], [str(label) for label in labels])
    axes.set_xticks([column * (W + 1) + 1 + W / 2 for column in range(len(frames))], [str(t) for t in timesteps])
    axes.tick_params(length=0)
    axes.set(xlabel="timestep", title="denoising")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """As a PNG that says that it is ours."""
    figure.savefig(path, dpi=100, format="png", metadata={"Software": _SOFTWARE})


def is_ours(path: Path, *others: str) -> bool:
    """Whether `save` wrote this file, or one of the `others`, as the beginning of its name.

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
