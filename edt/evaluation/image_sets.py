"""What `edt evaluate` reads: sets of images of one size, batch by batch; and statistics of features.

A set of images has `path`, `kind`, `count`, `shape` (H, W, C) and `batches(batch_size)`, which yields uint8 arrays
(B, H, W, C). Of its images one batch is held at a time.
"""

import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from tqdm import tqdm

from ..data.image_files import SUFFIXES, find_images
from ..data.shards import parse_npy_header
from ..data.sources import to_pixels
from ..files.errors import named_errors
from ..files.text import read_json
from .metrics import MAX_FEATURES, Gaussian

# In the folder of edt sample: what its images depend on, and themselves.
SETTINGS, IMAGES = "samples.json", "images"

_DEFLATED_AT_MOST = 1032  # times as many bytes come of a deflated stream
_WAITING = 4096  # images handed to threads at once; each takes 2 kB there
# ADM's names for means and covariances of InceptionV3's pooled and spatial features.
_STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class NpzImages:
    """`arr_0` of an .npz, uint8 (N, H, W, C), read as a stream: compressed or not, it is never held as a whole."""

    kind = "npz"

    def __init__(self, path: Path):
        self.path = path
        dtype, shape, order = _declared(path, "arr_0")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
            raise ValueError(f"arr_0 is {dtype} {shape}; it must be uint8 (N, H, W, C) with C 1 or 3")
        if order == "F":
            raise ValueError("arr_0 is stored in Fortran order; save numpy.ascontiguousarray of it")
        self.count, self.shape = shape[0], shape[1:]

    def batches(self, batch_size: int) -> Iterator[ndarray]:
        with named_errors(self.path), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
            *_, first = parse_npy_header(stream, archive.getinfo("arr_0.npy").file_size)
            stream.seek(first)
            for start in range(0, self.count, batch_size):
                batch = np.empty((min(batch_size, self.count - start), *self.shape), np.uint8)
                if stream.readinto(batch.reshape(-1)) < batch.nbytes:  # pyright: ignore[reportAttributeAccessIssue] - it has
                    raise EOFError(f"arr_0 ends before {self.count} images")
                yield batch

    def name(self, number: int) -> str:
        return f"image {number} of {self.path}"


def _declared(path: Path, name: str) -> tuple[np.dtype, tuple[int, ...], str]:
    """Dtype, shape and order that an array's header in an .npz declares; nothing of that size is allocated.

    Raises:
        ValueError: where the file cannot hold so much.
    """
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream, named_errors(name):
        member = archive.getinfo(f"{name}.npy")
        most = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _DEFLATED_AT_MOST}.get(member.compress_type)
        if most is None:
            raise ValueError("is compressed otherwise than numpy.savez and savez_compressed do")
        if member.file_size > most * member.compress_size + 1024:
            raise ValueError(f"has {member.file_size} bytes by its header; the file has not so many")
        return parse_npy_header(stream, member.file_size)[:3]


class FolderImages:
    """Every image below a folder (`image_files.find_images`), ordered by path.

    The first image decides on size and channels (grey is one). Grey images among coloured ones are repeated to
    three channels. With a `size`, (height, width), images of any sizes are cropped and converted to it and to
    `channels` as edt extract does.
    """

    kind = "folder"

    def __init__(self, path: Path, size: tuple[int, int] | None = None, channels: int = 3):
        self.path, self.size = path, size
        if _is_sample_set(path):  # whose grid is no image of it
            path = path / IMAGES
        self.root = path
        self.files = [path / name for name in find_images(path)]
        self.count = len(self.files)
        if not self.files:
            raise ValueError(f"there are no images in it ({', '.join(SUFFIXES)})")
        with named_errors(self.files[0]), Image.open(self.files[0]) as image:
            first = image.height, image.width, 1 if _is_grey(image) else 3
        self.shape = first if size is None else (*size, channels)

    def batches(self, batch_size: int) -> Iterator[ndarray]:
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:  # decoders run without Python's lock
            for start in range(0, self.count, batch_size):
                yield np.stack(list(pool.map(self._load, self.files[start : start + batch_size])))

    def check(self) -> None:
        """Looks at the header of every image, seconds for thousands: the last one may not fit, hours later."""
        bar = tqdm(desc="headers", unit="image", total=self.count, disable=self.count < 10_000)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool, bar:
            for start in range(0, self.count, _WAITING):
                files = self.files[start : start + _WAITING]
                list(pool.map(lambda file: self._load(file, decode=False), files))
                bar.update(len(files))

    def name(self, number: int) -> str:
        return str(self.files[number])

    def _load(self, file: Path, decode: bool = True) -> Any:
        with named_errors(file), Image.open(file) as image:
            H, W, C = self.shape
            if self.size is None and (image.height, image.width) != (H, W):
                first = self.files[0].relative_to(self.root)
                raise ValueError(
                    f"has {image.height}×{image.width} pixels, {first} has {H}×{W}; all images must be of one "
                    "size (--image-size crops a reference's to one)"
                )
            if image.mode[0] in "IF":  # PIL would clip 16-bit levels at 255
                raise ValueError(f"has mode {image.mode}; levels of more than 8 bits are not read")
            if self.size is not None:
                return to_pixels(image, self.size, C).transpose(1, 2, 0) if decode else None
            if image.has_transparency_data:
                raise ValueError("is transparent; put it on a background first")
            if C == 1 and not _is_grey(image):
                raise ValueError(f"has colours, {self.files[0].name} is grey; convert the one or the other")
            return np.asarray(image.convert("L" if C == 1 else "RGB")).reshape(H, W, C) if decode else None


def read_settings(folder: Path) -> dict:
    """What edt sample wrote beside its images. Raises ValueError for a samples.json of another program."""
    file = folder / SETTINGS
    settings = read_json(file, "settings", dict)
    number = settings.get("num_images")
    if not {"weights", "classes", "steps", "seed"} <= settings.keys() or type(number) is not int or number < 1:
        raise ValueError(f"settings {file} are not those of edt sample; move it, or give another output")
    return settings


def _is_sample_set(folder: Path) -> bool:
    if not (folder / SETTINGS).is_file():
        return False
    try:
        read_settings(folder)
    except ValueError:  # other programs have such a file too, beside images or above them
        return False
    return True


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L")


def open_images(
    name: str, path: Path, size: tuple[int, int] | None = None, channels: int = 3
) -> NpzImages | FolderImages:
    """A set of at least two images; `name` says in errors, all of them ValueError, whose path it is.

    Args:
        size, channels: what to make of the images of a folder; see `FolderImages`.
    """
    with named_errors(f"{name} {path}"):
        if not has_images(path):
            raise ValueError(
                f"there is no arr_0, uint8 (N, H, W, C), in it, but {', '.join(_members(path) or ())}"
            )
        images = FolderImages(path, size, channels) if path.is_dir() else NpzImages(path)
        if images.count < 2:
            raise ValueError("there is one image in it; at least 2 are needed")
    if isinstance(images, FolderImages):
        images.check()
    return images


def has_images(path: Path) -> bool:
    """Whether it is a folder, or an .npz with arr_0 rather than with statistics alone."""
    names = _members(path)
    return names is None or "arr_0" in names


def read_statistics(name: str, path: Path) -> dict[str, Gaussian]:
    """Means and covariances in an .npz under ADM's names: of "pool" mu, sigma, of "spatial" mu_s, sigma_s.

    Empty for a folder and for an .npz of images alone.
    """
    found = {}
    with named_errors(f"{name} {path}"):
        names = _members(path) or ()
        for features, pair in _STATISTICS.items():
            missing = [member for member in pair if member not in names]
            if len(missing) == 1:
                raise ValueError(f"there is no {missing[0]} in it beside {', '.join(names)}")
            if missing:
                continue
            shapes = [_declared(path, member)[1] for member in pair]
            if len(shapes[0]) != 1 or shapes[1] != 2 * shapes[0] or not 1 <= shapes[0][0] <= MAX_FEATURES:
                raise ValueError(
                    f"{pair[0]} is {shapes[0]}, {pair[1]} is {shapes[1]}; they must be (F,) and (F, F), F 1 to "
                    f"{MAX_FEATURES}"
                )
            with np.load(path) as arrays:
                mean, covariance = (arrays[member] for member in pair)
            if not all(array.dtype.kind == "f" and np.isfinite(array).all() for array in (mean, covariance)):
                raise ValueError(f"{pair[0]} and {pair[1]} must be finite floats")
            if covariance.diagonal().min() < 0 or not np.allclose(
                covariance, covariance.T, rtol=1e-3, atol=1e-5 * covariance.diagonal().max()
            ):
                raise ValueError(f"{pair[1]} is no covariance: it is not symmetric, or negative on its diagonal")
            found[features] = Gaussian(*(torch.from_numpy(x.astype(np.float64)) for x in (mean, covariance)))
    return found


def _members(path: Path) -> list[str] | None:
    """Names of the arrays in an .npz; None for a folder."""
    if path.is_dir():
        return None
    if not path.is_file():  # of a pipe one would wait
        raise ValueError("it is neither an .npz nor a folder")
    try:
        with zipfile.ZipFile(path) as archive:
            return [member.removesuffix(".npy") for member in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is neither an .npz nor a folder: {error}") from error
