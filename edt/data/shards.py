"""The data folder that `edt extract` writes and `edt.data` reads: manifest.json and a few large .npy files.

    data-00000.npy    (n, views, K·C, H, W) float16 latents, K = 2 for mean and std, else 1; or uint8 pixels
    labels-00000.npy  (n,) int64, all 0 for unconditional data
    images-00000.npy  (n, 3, h, w) uint8, where images are stored beside latents

View 0 is the image, view 1 its mirror image. A file has its final name only once it is complete.
"""

import io
import math
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy import ndarray

from edt_kernels._checks import shown

from ..files.outputs import is_half, sha256, write_json
from ..files.text import read_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # the manifest of an extraction that is not finished: the shards so far
PARTIAL = ".partial"
MOST_CLASSES = 10**6  # each has a name in the manifest, and a row in the model
MOST_SIDE = 2**14  # of an image or a latent, in pixels
_HEADER = 2**14  # of an .npy file, more than numpy parses
_LISTED = 100  # skipped files named in the manifest; all are counted
# The JSON ones are of earlier versions.
_HALF = re.compile(r"((data|labels|images)-\d{5,}\.npy|(manifest|progress)\.json)\.partial")


@dataclass(frozen=True)
class Shard:
    """One part of the data: its files, and what they must hold."""

    file: str
    labels: str
    images: str | None
    count: int
    sha256: dict[str, str]  # by file name
    skipped: dict = field(default_factory=lambda: {"count": 0, "files": []})

    def __post_init__(self):
        """Names of files of this folder alone: what a manifest names is opened, and by extract replaced."""
        names = {"data": self.file, "labels": self.labels, "images": self.images}
        number = re.fullmatch(r"data(-\d{5,}\.npy)", self.file) if isinstance(self.file, str) else None
        for kind, name in names.items():
            if not (number and name == kind + number[1]) and not (kind == "images" and name is None):
                field_name = "file" if kind == "data" else kind
                raise ValueError(f"{field_name} of a shard is {shown(name)}; it must be {kind}-00000.npy, or so")
        _check(f"count of {self.file}", self.count, int, least=0)
        _check(f"sha256 of {self.file}", self.sha256, dict)
        if set(self.sha256) != {name for name in names.values() if name is not None}:
            raise ValueError(f"sha256 of {self.file} is of {shown(list(self.sha256))}, which are not its files")
        if not all(isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) for x in self.sha256.values()):
            raise ValueError(
                f"sha256 of {self.file} has {shown(list(self.sha256.values()))}; it must be 64 hexadecimal digits"
            )
        _check_skipped(self.skipped)

    @property
    def files(self) -> list[str]:
        return list(self.sha256)


@dataclass(frozen=True)
class Manifest:
    """What is in a data folder."""

    kind: str  # "latents" or "pixels"
    shape: tuple[int, int, int]  # (C, H, W) of an item, as the model takes it
    dtype: str  # as stored: "float16" or "uint8"
    moments: bool  # mean and std of the posterior are stored, so that each reading draws anew
    views: int  # stored of each item: 2 with the mirrored one
    mirror: bool  # whether a reader may mirror the stored items themselves: true of pixels alone
    stores_images: bool
    num_classes: int  # 0 is unconditional
    class_names: tuple[str, ...]
    image_size: tuple[int, int]  # (height, width)
    scaling_factor: float = 1.0  # latents = (stored − shift_factor)·scaling_factor
    shift_factor: float = 0.0
    vae: str | None = None
    encode_dtype: str | None = None
    count: int = 0
    skipped: dict = field(default_factory=lambda: {"count": 0, "files": []})
    shards: tuple[Shard, ...] = ()
    extraction: dict | None = None  # the options that decide what is stored; None: not written by edt extract
    created_with: dict = field(default_factory=lambda: _versions())
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        """Raises ValueError or TypeError, naming the field, for what no data folder can have."""
        if self.kind not in ("latents", "pixels"):
            raise ValueError(f"kind is {shown(self.kind)}; it must be latents or pixels")
        latents = self.kind == "latents"
        if self.dtype != ("float16" if latents else "uint8"):
            raise ValueError(f"dtype is {shown(self.dtype)}; {self.kind} are {'float16' if latents else 'uint8'}")
        for name, length in (("shape", 3), ("image_size", 2)):
            sides = getattr(self, name)
            if not isinstance(sides, tuple) or len(sides) != length:
                raise TypeError(f"{name} is {shown(sides)}; it must be {length} whole numbers")
            for side in sides:
                _check(name, side, int, least=1, most=MOST_SIDE)
        for name in ("moments", "mirror", "stores_images"):
            _check(name, getattr(self, name), bool)
        _check("views", self.views, int, least=1, most=2)
        if not latents and (self.moments or self.stores_images or self.views == 2):
            raise ValueError("kind is pixels; moments, images and a second view are for latents")
        if latents and self.mirror:
            raise ValueError("mirror is True; latents need those of the mirrored images as a second view instead")
        _check("num_classes", self.num_classes, int, least=0, most=MOST_CLASSES)
        if not isinstance(self.class_names, tuple) or not all(isinstance(name, str) for name in self.class_names):
            raise TypeError("class_names must be a list of text")
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names are {len(self.class_names)}; num_classes is {self.num_classes}")
        for name in ("scaling_factor", "shift_factor"):
            value = getattr(self, name)
            if type(value) not in (int, float):
                raise TypeError(f"{name} is {shown(value)}; it must be a number")
            if not abs(value) <= 1e30 or (name == "scaling_factor" and not value):  # not of NaN either
                raise ValueError(
                    f"{name} is {value}; it must be finite{' and not 0' * (name == 'scaling_factor')}"
                )
        if not latents and self.image_size != self.shape[1:]:
            raise ValueError(f"image_size is {self.image_size}; pixels {self.shape} have {self.shape[1:]}")
        for name, kind in (("vae", str), ("extraction", dict)):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), kind)
        if self.encode_dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"encode_dtype is {shown(self.encode_dtype)}; it must be float32, bfloat16 or None")
        _check("created_with", self.created_with, dict)
        _check("count", self.count, int, least=0)
        _check_skipped(self.skipped)
        if not isinstance(self.shards, tuple) or not all(isinstance(shard, Shard) for shard in self.shards):
            raise TypeError("shards must be a list of shards")
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("shards has a file twice")
        if any((shard.images is None) == self.stores_images for shard in self.shards):
            raise ValueError(
                f"stores_images is {self.stores_images}, and a shard has {'no' * self.stores_images} images"
            )

    @property
    def stored_shape(self) -> tuple[int, int, int, int]:
        """(views, K·C, H, W) of an item in its file."""
        C, H, W = self.shape
        return self.views, C * (2 if self.moments else 1), H, W

    def arrays(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Kind of file → dtype and shape of one item in it."""
        arrays = {
            "data": (np.dtype(self.dtype), self.stored_shape),
            "labels": (np.dtype(np.int64), ()),
        }
        if self.stores_images:
            arrays["images"] = (np.dtype(np.uint8), (3, *self.image_size))
        return arrays


def _check(name: str, value: Any, kind: type, least: int | None = None, most: int | None = None) -> None:
    if type(value) is not kind:  # a bool is no number here
        raise TypeError(f"{name} is {shown(value)}; it must be of type {kind.__name__}")
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(
            f"{name} is {value}; it must be {f'at least {least}' if most is None else f'{least} to {most}'}"
        )


def _check_skipped(skipped: Any) -> None:
    _check("skipped", skipped, dict)
    if set(skipped) != {"count", "files"} or not isinstance(skipped["files"], list):
        raise ValueError(f"skipped has {', '.join(map(repr, skipped))}; it must have a count and a list of files")
    _check("count of skipped", skipped["count"], int, least=len(skipped["files"]))
    for file in skipped["files"]:
        if not isinstance(file, dict) or {*map(type, file.values())} != {str} or set(file) != {"path", "reason"}:
            raise ValueError(f"skipped names {shown(file)}; it must be an object of path and reason")


def number_names(num_classes: int) -> tuple[str, ...]:
    """Names of classes that have none. Raises ValueError for more than a manifest can hold."""
    if num_classes > MOST_CLASSES:
        raise ValueError(
            f"there is the label {num_classes - 1}, for which {num_classes} classes are needed; at most "
            f"{MOST_CLASSES} are possible"
        )
    return tuple(map(str, range(num_classes)))


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "diffusers", "numpy", "pillow")}


def read_manifest(path: Path) -> Manifest:
    """Raises ValueError for a file that is no manifest of this format."""
    try:
        content = read_json(path, "manifest")
        if not isinstance(content, dict) or "format_version" not in content:
            raise ValueError("it has no format_version")
        version = content["format_version"]
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(f"its format_version is {shown(version)}; this code reads {FORMAT_VERSION}")
        if wrong := {entry.name for entry in fields(Manifest)} ^ set(content):
            raise ValueError(f"it lacks, or should not have, {', '.join(sorted(wrong))}")
        for name in ("shards", "shape", "class_names", "image_size"):
            _check(name, content[name], list)
            content[name] = tuple(content[name])
        for shard in content["shards"]:
            if not isinstance(shard, dict) or set(shard) != {entry.name for entry in fields(Shard)}:
                raise ValueError(f"its shards have {shown(shard)}")
        content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        return Manifest(**content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest written by edt extract: {error}") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    write_json(path, asdict(manifest))


def sum_skipped(parts: Iterable[dict]) -> dict:
    """{count, files} of several such; only so many files are named."""
    parts = list(parts)
    files = [file for part in parts for file in part["files"]]
    return {"count": sum(part["count"] for part in parts), "files": files[:_LISTED]}


def parse_npy_header(file: IO[bytes], size: int) -> tuple[np.dtype, tuple[int, ...], Literal["F", "C"], int]:
    """Dtype, shape, order ("C" or "F") and beginning of the array in an .npy file of so many bytes.

    Raises:
        ValueError: for another content, objects, and a header that says another size.
    """
    file = io.BytesIO(file.read(_HEADER))  # one that says of itself that it has gigabytes would be read first
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")  # 3.0 is for names of fields
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # of the parser of its text, which is Python's: MemoryError of a deep one
        raise ValueError(f"is truncated or no .npy file ({error})") from error
    if dtype.hasobject or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"has {dtype} {shape}; it must be an array of numbers")
    start = file.tell()
    if size != (needed := start + math.prod(shape) * dtype.itemsize):
        truncated = "is truncated (" if size < needed else ""
        raise ValueError(f"{truncated}has {size} bytes; its header says {needed}{')' * bool(truncated)}")
    return dtype, shape, "F" if fortran else "C", start


def leftovers(folder: Path) -> list[Path]:
    """Files that an interrupted writing left in a folder, told by their names."""
    return [path for path in folder.iterdir() if is_leftover(path.name)]


def is_leftover(name: str) -> bool:
    return is_half(name) or bool(_HALF.fullmatch(name))


class ArrayWriter:
    """Appends rows to an .npy file whose length is known only in the end; temporary until `finish`.

    Written, not memory-mapped: on a full disk a write raises OSError, a store into a mapping kills the process.
    """

    def __init__(self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...]):
        self.path, self.dtype, self.row_shape = path, dtype, row_shape
        self.temporary = path.with_name(path.name + PARTIAL)
        self.count = 0
        self.file = open(self.temporary, "wb")  # noqa: SIM115, closed by sync or abort
        self._write_header()
        self.data_start = self.file.tell()

    def append(self, rows: ndarray) -> None:
        if rows.dtype != self.dtype or rows.shape[1:] != self.row_shape:
            raise ValueError(
                f"rows of {self.path.name} are {rows.dtype} {rows.shape[1:]}; the shard has "
                f"{self.dtype} {self.row_shape}"
            )
        self.file.write(np.ascontiguousarray(rows).data)
        self.count += len(rows)

    def sync(self) -> None:
        """Completes the file under its temporary name."""
        self.file.seek(0)
        self._write_header()  # numpy pads it such that any length fits
        assert self.file.tell() == self.data_start
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def abort(self) -> None:
        with suppress(OSError):  # what was buffered does not fit on a full disk either
            self.file.close()
        self.temporary.unlink(missing_ok=True)

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.count, *self.row_shape),
        }
        np.lib.format.write_array_header_1_0(self.file, header)


class ShardWriter:
    """Writes the files of one shard; as a context, removes what is not finished."""

    def __init__(self, folder: Path, index: int, manifest: Manifest):
        self.writers: dict[str, ArrayWriter] = {}
        try:
            for kind, (dtype, shape) in manifest.arrays().items():
                self.writers[kind] = ArrayWriter(folder / f"{kind}-{index:05d}.npy", dtype, shape)
        except BaseException:
            self.abort()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.abort()

    def append(self, data: ndarray, labels: ndarray, images: ndarray | None = None) -> None:
        """Rows of each file; images where the manifest stores them."""
        rows = {"data": data, "labels": labels, "images": images}
        for kind, writer in self.writers.items():
            writer.append(rows[kind])

    def finish(self, skipped: dict | None = None) -> Shard:
        """Gives the files their names. `skipped` is {count, files} of what could not be read."""
        writers = list(self.writers.values())
        for writer in writers:
            writer.sync()
        digests = {writer.path.name: sha256(writer.temporary) for writer in writers}
        for writer in writers:
            os.replace(writer.temporary, writer.path)
        files = {kind: writer.path.name for kind, writer in self.writers.items()}
        return Shard(
            file=files["data"],
            labels=files["labels"],
            images=files.get("images"),
            count=writers[0].count,
            sha256=digests,
            skipped=skipped or {"count": 0, "files": []},
        )

    def abort(self) -> None:
        for writer in self.writers.values():
            writer.abort()
