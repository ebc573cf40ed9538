"""What `edt extract` reads: image folders, Hugging Face datasets on disk, the released code's .npy features.

A source has `kind`, `names` and `num_classes`, `class_names`, `listing()`; `load(index)` gives an array and a
label, and raises UnreadableError for what is the item's own fault. Any other error is not: it must stop the work.
"""

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image, UnidentifiedImageError

from ..files.errors import named_errors
from ..files.text import read_json
from .image_files import SUFFIXES, UnreadableError, find_images, list_folder, read_file
from .shards import MOST_CLASSES, number_names, parse_npy_header

# What Pillow's decoders raise for a broken image that is in memory as a whole.
_DECODER_ERRORS = (
    ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_MOST_SCALED = 16  # times the pixels that are kept


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """ADM's crop to (height, width): halved by box filter while at least twice as large in both directions, then
    scaled by bicubic filter until it just covers the size, then the middle.

    Of an image that is more than 16 times as long as that, the middle is scaled alone: as a whole it could take
    gigabytes. That is the same but for roundings; shorter images are as ADM's to the bit.
    """
    height, width = size
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    scaled = round(image.width * scale), round(image.height * scale)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    if scaled[0] * scaled[1] > _MOST_SCALED * width * height:
        across, down = image.width / scaled[0], image.height / scaled[1]
        middle = left * across, top * down, (left + width) * across, (top + height) * down
        return image.resize((width, height), resample=Image.Resampling.BICUBIC, box=middle)
    image = image.resize(scaled, resample=Image.Resampling.BICUBIC)
    return image.crop((left, top, left + width, top + height))


def to_pixels(image: Image.Image, size: tuple[int, int], channels: int) -> ndarray:
    """(channels, height, width) uint8. EXIF orientation is ignored, as ADM and torchvision's ImageFolder do."""
    return _cropped(_converted(image, channels), size)


def _converted(image: Image.Image, channels: int) -> Image.Image:
    if image.mode[0] in "IF":  # PIL would clip 16-bit levels at 255
        raise ValueError(f"mode {image.mode}: levels of more than 8 bits are not read; convert the image first")
    return image.convert("RGB" if channels == 3 else "L")


def _cropped(image: Image.Image, size: tuple[int, int]) -> ndarray:
    pixels = np.asarray(center_crop(image, size))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode(content: bytes, size: tuple[int, int], channels: int) -> ndarray:
    """`to_pixels` of an image file's content.

    Raises:
        UnreadableError: for content that is no image, or a broken one.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = _converted(image, channels)
    except UnidentifiedImageError as error:  # whose text has an address in memory
        raise UnreadableError(f"UnidentifiedImageError: {len(content)} bytes that are no known image") from error
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise  # of the machine: content is read by now
        raise UnreadableError(f"OSError: {error}") from error
    except _DECODER_ERRORS as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from error
    return _cropped(pixels, size)  # whose errors are not the image's fault


def in_class_order(names: list[str]) -> list[str]:
    """As numbers where all are (2 before 10), else as text."""
    if all(name.isascii() and name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


class ImageFolder:
    """A folder of class sub-folders, each searched to any depth; or a folder of images alone, without classes.

    Classes are numbered in the order of their names (`in_class_order`), images are ordered by class, then by path.
    What counts as an image, and how links are followed, says `image_files.find_images`.
    """

    kind = "image folder"

    def __init__(self, folder: Path, size: tuple[int, int], channels: int):
        self.folder, self.size, self.channels = folder, size, channels
        classes, files = list_folder(folder)
        classes, files = in_class_order(classes), sorted(files)
        if classes and files:
            raise ValueError(
                f"source {folder} has images beside sub-folders, such as {files[0]} and {classes[0]}/; it "
                "must have sub-folders of images, one a class, or images alone"
            )
        if not classes and not files:
            raise ValueError(f"source {folder} has no images ({', '.join(SUFFIXES)}) and no sub-folders")
        self.names, self.labels = files, [0] * len(files)
        found = {name: [] for name in classes}
        for path in find_images(folder) if classes else ():
            found[path.split("/")[0]].append(path)
        for label, (name, paths) in enumerate(found.items()):
            if not paths:
                raise ValueError(f"source {folder} has a sub-folder {name} without images; each is a class")
            self.names += paths
            self.labels += [label] * len(paths)
        self.class_names = tuple(classes)
        self.num_classes = len(classes)

    def listing(self) -> Iterator[str]:
        return (f"{label} {name}" for name, label in zip(self.names, self.labels))

    def load(self, index: int) -> tuple[ndarray, int]:
        return decode(read_file(self.folder / self.names[index]), self.size, self.channels), self.labels[index]


class HubDataset:
    """A Hugging Face dataset that `save_to_disk` wrote, or one split of a dictionary of them."""

    kind = "Hugging Face dataset"

    def __init__(
        self,
        folder: Path,
        size: tuple[int, int],
        channels: int,
        *,
        split: str,
        image_column: str,
        label_column: str | None,
        num_classes: int | None,
    ):
        try:
            import datasets
        except ImportError as error:
            raise RuntimeError(
                f"source {folder} is a Hugging Face dataset; it needs pip install 'edt-kernels[data]'"
            ) from error
        self.size, self.channels, self.image_column = size, channels, image_column
        dataset = _load_from_disk(folder, split)
        for name, column in (("image_column", image_column), ("label_column", label_column)):
            if column is not None and column not in dataset.column_names:
                raise ValueError(
                    f"{name} is {column!r}; source {folder} has {', '.join(dataset.column_names)}"
                    + (" (None if there are no labels)" if name == "label_column" else "")
                )
        self.labels, self.num_classes, self.class_names = _column_labels(dataset, label_column, num_classes)
        # Undecoded: its decoder turns images by their EXIF orientation, ours does not.
        images = dataset.select_columns([image_column])
        fault = f"is {dataset.features[image_column]}; it must have images"
        with named_errors(f"image_column {image_column!r}", fault):
            self.dataset = images.cast_column(image_column, datasets.Image(decode=False))
        self.names = range(len(dataset))

    def listing(self) -> Iterator[str]:
        return map(str, self.labels)

    def load(self, index: int) -> tuple[ndarray, int]:
        entry = self.dataset[index][self.image_column]
        if entry is None or (entry["bytes"] is None and not entry["path"]):
            raise UnreadableError("has no image")
        content = read_file(entry["path"]) if entry["bytes"] is None else entry["bytes"]
        return decode(content, self.size, self.channels), int(self.labels[index])


def _load_from_disk(folder: Path, split: str):
    """The dataset, or its split where it has several.

    Raises:
        ValueError: for a split that is not there, and for files that are not as save_to_disk writes them; those it
            names must be in its folder.
    """
    import datasets

    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json", "source", dict).get("splits")
        if not isinstance(splits, list) or not splits:
            raise ValueError(
                f"source {folder / 'dataset_dict.json'} has splits {splits}; it must be a list of names"
            )
        if split not in splits:
            raise ValueError(f"split is {split!r}; source {folder} has {', '.join(map(str, splits))}")
        folder = folder / _inside(folder, split)
    state = read_json(folder / "state.json", "source", dict)
    read_json(folder / "dataset_info.json", "source", dict)
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise ValueError(f"source {folder / 'state.json'} has _data_files {files}; it must be a list of objects")
    for file in files:
        if not (folder / _inside(folder, file.get("filename"))).is_file():
            raise ValueError(f"source {folder} has no file {file['filename']}, which its state.json names")
    with named_errors(f"source {folder}", "is no dataset that save_to_disk wrote"):
        dataset = datasets.load_from_disk(str(folder)) if files else ()
    if len(dataset) == 0:
        raise ValueError(f"source {folder} is a Hugging Face dataset without rows; there is nothing to extract")
    return dataset


def _inside(folder: Path, name: object) -> str:
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"source {folder} names the file {name!r}; it must be a plain name, in that folder")
    return name


def _column_labels(dataset, column: str | None, num_classes: int | None) -> tuple[ndarray, int, tuple[str, ...]]:
    """Labels, how many classes, and their names: a ClassLabel's own, the sorted values of strings, or numbers."""
    if column is None:
        return np.zeros(len(dataset), np.int64), 0, ()
    feature = dataset.features[column]
    if not str(getattr(feature, "dtype", None)).startswith(("int", "uint", "string", "large_string")):
        raise ValueError(
            f"label_column {column!r} is {feature}; it needs integers or strings (None for no classes)"
        )
    values = dataset[column][:]
    if all(isinstance(value, str) for value in values):
        names = in_class_order(list(set(values)))
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers[value] for value in values]), len(names), tuple(names)
    if not all(type(value) is int for value in values):
        odd = next(value for value in values if type(value) not in (int, str))
        raise ValueError(
            f"label_column {column!r} has {odd!r}; it needs integers throughout, or strings (None for no classes)"
        )
    lowest, highest = min(values), max(values)
    if lowest < 0:
        raise ValueError(
            f"label_column {column!r} has the label {lowest}, which stands for none, as in test splits; give a "
            "split that has labels, or None for no classes"
        )
    names = getattr(feature, "names", None)
    count = len(names) if names else num_classes or highest + 1
    if highest >= count or count > MOST_CLASSES:
        most = min(count, MOST_CLASSES)
        raise ValueError(
            f"label_column {column!r} reaches from {lowest} to {highest}; {most} classes need 0 to {most - 1}"
        )
    return np.array(values, np.int64), count, tuple(names or number_names(count))


class ReleasedFeatures:
    """Latents as the released EDT and fast-DiT code writes them, one file each: features `0.npy`, `1.npy`, …
    (1, C, H, W), already scaled by 0.18215, and a folder of labels (1,) under the same names.

    That code mirrored half of the images at random before it encoded them, so there is one view. Labels are read
    along with the features; unless told, there are as many classes as the highest label needs. All must have the
    shape of the first that can be read; others are an error, as which of them are right cannot be told.
    """

    kind = "released .npy features"

    def __init__(self, folder: Path, labels_folder: Path, num_classes: int | None):
        self.folder, self.labels_folder = folder, labels_folder
        names, label_names = (
            {path.name for path in f.iterdir() if path.suffix == ".npy" and not path.name.startswith(".")}
            for f in (folder, labels_folder)
        )
        if not names:
            raise ValueError(f"source {folder} has no .npy files; it must be the folder of features")
        if odd := names ^ label_names:
            first = min(odd)
            where = labels_folder if first in names else folder
            raise ValueError(
                f"npy_labels {labels_folder} and source {folder} must have the same file names; {len(odd)} are in "
                f"one alone, such as {first}, which is not in {where}"
            )
        self.names = sorted(names, key=lambda name: (len(name), name))  # 2.npy before 10.npy
        self.num_classes = num_classes
        self.class_names = () if num_classes is None else number_names(num_classes)
        self.first, self.shape = self._first()

    def listing(self) -> Iterator[str]:
        return iter(self.names)

    def load(self, index: int) -> tuple[ndarray, int]:
        features = self._features(index)
        if features.shape != self.shape:
            raise ValueError(
                f"has features of shape {features.shape}, and {self.first} in the same folder {self.shape}; "
                "remove, or move, those of the one shape"
            )
        if not np.isfinite(features).all():
            raise UnreadableError("has values that are not finite in float16")
        label = _read_npy(self.labels_folder / self.names[index])
        if label.size != 1 or label.dtype.kind not in "iu":
            raise UnreadableError(f"has {label.dtype} {label.shape} for a label; it needs one integer")
        label, most = label.item(), self.num_classes or MOST_CLASSES
        if not 0 <= label < most:
            raise UnreadableError(f"has the label {label}; it needs an integer from 0 to {most - 1}")
        return features, label

    def _first(self) -> tuple[str, tuple[int, ...]]:
        """Name and shape of the first that can be read."""
        reasons = []
        for index, name in enumerate(self.names):
            try:
                return name, self._features(index).shape
            except UnreadableError as error:
                reasons.append(str(error))
        raise ValueError(
            f"none of {len(self.names)} files of source {self.folder} could be read; the first is "
            f"{self.names[0]}: {reasons[0]}"
        )

    def _features(self, index: int) -> ndarray:
        """(C, H, W) float16."""
        features = _read_npy(self.folder / self.names[index])
        if features.ndim != 4 or len(features) != 1 or features.dtype.kind != "f" or not features.size:
            raise UnreadableError(f"has {features.dtype} {features.shape}; it needs floats (1, C, H, W)")
        with np.errstate(over="ignore"):
            return features[0].astype(np.float16)


def _read_npy(path: Path) -> ndarray:
    """The array of an .npy file, of numbers alone; memory is taken for what is in the file, not for what it says.

    Raises:
        UnreadableError: for another content.
    """
    content = read_file(path)
    try:
        dtype, shape, order, start = parse_npy_header(io.BytesIO(content), len(content))
    except ValueError as error:
        raise UnreadableError(str(error)) from error
    return np.frombuffer(content, dtype, offset=start).reshape(shape, order=order)


def listing_digest(source) -> str:
    """Of names and labels: whether the source is the one that an extraction was begun with."""
    digest = hashlib.sha256()
    for line in source.listing():
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
