"""Reading a data folder for training: shards that stay on the disk, an infinite order of samples, a loader.

    dataset = open_dataset("data/imagenet-256")
    for batch in make_loader(dataset, seed=0, start=0, stride=256, batch_size=256, num_workers=4):
        latents = to_latents(batch["latents"].to(device), dataset)

`edt extract` writes such folders (`edt.data.shards` has the format), `write_dataset` makes small ones from arrays.
"""

import errno
import functools
import itertools
import math
import multiprocessing
import os
import resource
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from ..files.outputs import clear_left, new_output
from . import shards
from .shards import MANIFEST, Manifest, ShardWriter, number_names

_advise = getattr(os, "posix_fadvise", None)  # macOS has none


class _Rows:
    """Items in an .npy file, read one by one at their places.

    Read, not memory-mapped: a file that became shorter and a disk that fails are an OSError, where a mapping would
    kill the process without a word.
    """

    def __init__(self, path: Path, start: int, dtype: np.dtype, shape: tuple[int, ...]):
        self.path, self.start, self.dtype, self.count, self.row_shape = path, start, dtype, shape[0], shape[1:]
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)
        if _advise:
            _advise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # what lies around an item is not read with it

    def read_ahead(self, row: int, size: int) -> None:
        """Asks the disk for a row before it is read; reading alone would wait for one after the other."""
        if _advise:
            _advise(self.descriptor, self.start + row * size, size, os.POSIX_FADV_WILLNEED)

    def read_into(self, row: int, memory: memoryview) -> None:
        """Row `row` of a file that is seen as rows of the size of `memory`."""
        place = self.start + row * len(memory)
        while memory:
            try:
                count = os.preadv(self.descriptor, [memory], place)
            except OSError as error:
                error.filename = str(self.path)  # reading does not say of what
                raise
            if count == 0:
                raise OSError(
                    f"shard {self.path} became shorter since it was opened, to "
                    f"{os.fstat(self.descriptor).st_size} bytes; nothing may write there while it is read. Delete "
                    "it and run the same edt extract again"
                )
            place, memory = place + count, memory[count:]


class LatentDataset:
    """A data folder, opened by `open_dataset`; its shards stay on the disk.

    Attributes:
        folder, manifest: where and what it is.
        num_classes: 0 for unconditional data; class_names: one for each class.
        latent_shape: (C, H, W) of an item, as the model takes it.
        labels: (N,) int64.
        num_views: 2 where an item can be had mirrored, else 1.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        data: list[_Rows],
        labels: list[ndarray],
        images: list[_Rows] | None,
    ):
        self.folder, self.manifest = folder, manifest
        self.num_classes, self.class_names = manifest.num_classes, manifest.class_names
        self.latent_shape = manifest.shape
        self.num_views = 2 if manifest.mirror else manifest.views
        self.labels = np.concatenate(labels)
        self._data, self._images = data, images
        self._starts = np.cumsum([0, *map(len, labels)])  # of the shards, then the end

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self):
        # A file descriptor means nothing elsewhere; a spawned worker opens the folder itself.
        return functools.partial(open_dataset, with_images=self._images is not None), (self.folder,)

    def read(self, indices: ndarray, views: ndarray) -> dict[str, Tensor]:
        """Items by number, each in view 0 or, mirrored, 1, in the order asked for.

        Returns:
            latents: (B, K·C, H, W) float16 or uint8 as stored, see `to_latents`; labels: (B,) int64; and, if
            opened with them, images: (B, 3, h, w) uint8, mirrored as the latents are.

        Raises:
            IndexError: if an index or a view is not there.
            OSError: naming the shard, if it became shorter or cannot be read.
        """
        indices, views = np.asarray(indices), np.asarray(views)
        for name, numbers in (("indices", indices), ("views", views)):
            if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
                raise ValueError(f"{name} is {numbers.dtype} {numbers.shape}; it must be integers (B,)")
        if len(views) != len(indices):
            raise ValueError(f"views has {len(views)} numbers; {len(indices)} indices need as many")
        indices, views = indices.astype(np.int64), views.astype(np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(
                f"indices reach from {indices.min()} to {indices.max()}; {self.folder} has {len(self)} items"
            )
        if len(views) and (views.min() < 0 or views.max() >= self.num_views):
            raise IndexError(f"views reach from {views.min()} to {views.max()}; there are {self.num_views}")
        stored_views = np.zeros_like(views) if self.manifest.mirror else views
        latents = self._gather(self._data, indices, stored_views)
        if self.manifest.mirror:
            _mirror(latents, views)
        batch = {"latents": torch.from_numpy(latents), "labels": torch.from_numpy(self.labels[indices])}
        if self._images is not None:
            images = self._gather(self._images, indices)
            _mirror(images, views)
            batch["images"] = torch.from_numpy(images)
        return batch

    def _gather(self, parts: list[_Rows], indices: ndarray, views: ndarray | None = None) -> ndarray:
        row_shape = parts[0].row_shape
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[numbers]
        if views is not None:  # (n, views, …) as rows of one view each
            rows, row_shape = rows * row_shape[0] + views, row_shape[1:]
        gathered = np.empty((len(indices), *row_shape), parts[0].dtype)
        size = math.prod(row_shape) * gathered.itemsize
        places = [(parts[number], row) for number, row in zip(numbers.tolist(), rows.tolist())]
        for part, row in places:
            part.read_ahead(row, size)
        memory = gathered.reshape(-1).data.cast("B")
        for i, (part, row) in enumerate(places):
            part.read_into(row, memory[i * size : (i + 1) * size])
        return gathered


def _mirror(images: ndarray, views: ndarray) -> None:
    """In place, along the width, where the view is 1."""
    images[views == 1] = images[views == 1, ..., ::-1]


def open_dataset(folder: str | Path, *, with_images: bool = False) -> LatentDataset:
    """Opens a data folder after a check of every file's header and size, and of all labels.

    Reads no data but the labels; `verify_dataset` compares checksums.

    Raises:
        FileNotFoundError: if the folder, its manifest or a shard is missing.
        ValueError: if the manifest is none, a file is not as it says, a label is none of its classes, or
            images are asked for where none are stored.
    """
    folder = _folder(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder}: there is no such folder; edt extract makes one")
    if not (folder / MANIFEST).is_file():
        begun = (folder / shards.PROGRESS).is_file()
        what = (
            "its extraction is not finished, run the same edt extract again" if begun else "edt extract writes one"
        )
        raise FileNotFoundError(f"data folder {folder} has no {MANIFEST}; {what}")
    manifest = shards.read_manifest(folder / MANIFEST)
    if with_images and not manifest.stores_images:
        raise ValueError(f"data folder {folder} has no images beside its latents; extract with --store-images")
    if not manifest.shards:
        raise ValueError(f"data folder {folder}: its manifest lists no shards")
    data, labels, images = [], [], []
    with _files_allowed(len(manifest.shards) * (1 + with_images)):
        for shard in manifest.shards:
            for kind, (dtype, item_shape) in manifest.arrays().items():
                name = {"data": shard.file, "labels": shard.labels, "images": shard.images}[kind]
                rows = _open_rows(folder / name, dtype, (shard.count, *item_shape))
                if kind == "labels":
                    labels.append(_read_labels(rows))
                    _check_labels(f"shard {rows.path}", labels[-1], manifest.num_classes)
                elif kind == "data" or with_images:
                    (data if kind == "data" else images).append(rows)
    count = sum(map(len, labels))
    if count != manifest.count or count == 0:
        raise ValueError(
            f"data folder {folder}: the manifest counts {manifest.count} items, its shards hold {count}"
        )
    return LatentDataset(folder, manifest, data, labels, images if with_images else None)


@contextmanager
def _files_allowed(count: int) -> Iterator[None]:
    """Where so many more files come near to what this process may open, often 1024, its own limit is raised as far
    as it may; where that is too few, the error says what to do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 4 * count:  # −1 is none
        highest = 2**20 if hard == resource.RLIM_INFINITY else hard  # macOS refuses infinity
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, highest), hard))
    try:
        yield
    except OSError as error:
        if error.errno == errno.EMFILE:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            error.strerror = (
                f"{error.strerror}: this process may open {limit}, and the shards need {count}; raise the limit "
                "(ulimit -n), or extract with a larger --shard-size"
            )
        raise


def _open_rows(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> _Rows:
    again = "delete it and run the same edt extract again"
    if not path.exists():
        raise FileNotFoundError(f"shard {path} is missing; run the same edt extract again")
    if not path.is_file():
        raise ValueError(f"shard {path} is no file; {again}")
    try:
        with open(path, "rb") as file:
            *found, order, start = shards.parse_npy_header(file, os.fstat(file.fileno()).st_size)
    except ValueError as error:
        raise ValueError(f"shard {path} {error}; {again}") from error
    if found != [dtype, shape] or (order == "F" and len(shape) > 1):
        raise ValueError(
            f"shard {path} has {found[0]} {found[1]}{' in Fortran order' * (order == 'F')}; the manifest says "
            f"{dtype} {shape}; {again}"
        )
    return _Rows(path, start, dtype, shape)


def _read_labels(rows: _Rows) -> ndarray:
    try:
        labels = np.empty(rows.count, rows.dtype)
    except MemoryError as error:
        raise MemoryError(f"shard {rows.path} has {rows.count} labels") from error
    if rows.count:
        rows.read_into(0, labels.data.cast("B"))
    return labels


def _check_labels(where: str, labels: ndarray, num_classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= max(num_classes, 1))]
    if len(wrong):
        allowed = f"0 to {num_classes - 1}" if num_classes else "only 0, as data without classes has"
        raise ValueError(f"{where} has the label {wrong[0]}; it must have {allowed}")


def verify_dataset(dataset: LatentDataset, progress: bool = True) -> None:
    """Reads every file and compares its SHA-256 with the manifest's.

    Raises:
        ValueError: naming the files that differ, and what to do.
    """
    digests = [item for shard in dataset.manifest.shards for item in shard.sha256.items()]
    corrupt = [
        str(dataset.folder / name)
        for name, digest in tqdm(digests, desc="verifying", unit="file", disable=not progress)
        if shards.sha256(dataset.folder / name) != digest
    ]
    if corrupt:
        raise ValueError(
            f"corrupt: {', '.join(corrupt)} (SHA-256 differs from the manifest); delete what is named here and "
            "run the same edt extract again, which makes only these shards anew"
        )


def to_latents(
    raw: Tensor, manifest: Manifest | LatentDataset, generator: torch.Generator | None = None
) -> Tensor:
    """What `read` gave → (B, C, H, W) float32 on the same device, as the model takes it.

    Pixels: x/127.5 − 1. Latents: (x − shift)·scaling, where x of stored moments is mean + std·ε with ε drawn
    anew from `generator`.
    """
    if isinstance(manifest, LatentDataset):
        manifest = manifest.manifest
    needed = manifest.stored_shape[1:]
    if raw.shape[1:] != needed:
        raise ValueError(f"raw has shape {tuple(raw.shape)}; this data needs {('B', *needed)}")
    raw = raw.float()
    if manifest.kind == "pixels":
        return raw / 127.5 - 1
    if manifest.moments:
        mean, std = raw.chunk(2, dim=1)
        device = mean.device if generator is None else generator.device
        raw = mean + std * torch.randn(mean.shape, generator=generator, device=device).to(mean.device)
    return (raw - manifest.shift_factor) * manifest.scaling_factor


def write_dataset(
    folder: str | Path,
    items: ndarray | Tensor,
    labels: ndarray | Tensor | None = None,
    *,
    class_names: tuple[str, ...] | None = None,
    mirror: bool = False,
    moments: bool = False,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
    images: ndarray | Tensor | None = None,
    shard_size: int | None = None,
) -> LatentDataset:
    """Makes a data folder of arrays in memory and opens it. The folder appears complete or not at all.

    Args:
        items: (N, C, H, W) uint8 pixels or float latents, or (N, views, C, H, W) with latents of the mirrored
            images as view 1; with `moments`, means and standard deviations in 2C channels.
        labels: (N,) integers, numbering `class_names` where those are given; None for unconditional data.
        mirror: whether pixels may be mirrored.
        scaling_factor, shift_factor: of latents that are not yet scaled, see `to_latents`.
        images: (N, 3, h, w) uint8, stored beside latents.
        shard_size: items a shard; by default all are in one.

    Raises:
        FileExistsError: if the folder exists and is not empty.
        TypeError, ValueError: if the arrays do not fit each other, or have values that float16 cannot hold.
    """
    folder, items = _folder(folder), _array("items", items)
    kind = "pixels" if items.dtype == np.uint8 else "latents"
    if kind == "latents" and not np.issubdtype(items.dtype, np.floating):
        raise TypeError(f"items has dtype {items.dtype}; it needs uint8 pixels or floating-point latents")
    if items.ndim == 4:
        items = items[:, None]
    if items.ndim != 5 or items.size == 0 or items.shape[1] not in (1, 2):
        raise ValueError(f"items has shape {items.shape}; it needs (N, C, H, W) or (N, 1 or 2 views, C, H, W)")
    most = np.finfo(np.float16).max
    if kind == "latents" and not (items.min() >= -most and items.max() <= most):  # nor NaN
        raise ValueError(
            f"items reach from {items.min()} to {items.max()}; float16, as which they are stored, has ±{most:g}"
        )
    if shard_size is not None:
        _check_whole("shard_size", shard_size, 1)
    if moments and items.shape[2] % 2:
        raise ValueError(f"items has {items.shape[2]} channels; moments need means and as many deviations")
    labels_given = labels is not None
    labels = _array("labels", labels) if labels_given else np.zeros(len(items), np.int64)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels has dtype {labels.dtype}; it needs integers")
    if labels.shape != (len(items),):
        raise ValueError(f"labels has shape {labels.shape}; {len(items)} items need ({len(items)},)")
    if labels.max() >= shards.MOST_CLASSES:
        raise ValueError(f"labels has the label {labels.max()}; it must be 0 to {shards.MOST_CLASSES - 1}")
    if class_names is None:
        class_names = number_names(int(labels.max()) + 1) if labels_given else ()
    if not isinstance(class_names, tuple | list):
        raise TypeError(f"class_names is {class_names!r}; it must be a tuple of names")
    _check_labels("labels", labels, len(class_names))
    if images is not None:
        images = _array("images", images)
        if images.shape[:2] != (len(items), 3) or images.ndim != 4 or not images.size or images.dtype != np.uint8:
            raise ValueError(
                f"images has shape {images.shape} of {images.dtype}; it needs ({len(items)}, 3, h, w) of uint8"
            )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder {folder} is there and not empty; give another, or remove it")

    channels = items.shape[2] // (2 if moments else 1)
    manifest = Manifest(
        kind=kind,
        shape=(channels, *items.shape[3:]),
        dtype="uint8" if kind == "pixels" else "float16",
        moments=moments,
        views=items.shape[1],
        mirror=mirror,
        stores_images=images is not None,
        num_classes=len(class_names),
        class_names=tuple(class_names),
        image_size=tuple((items if images is None else images).shape[-2:]),
        scaling_factor=scaling_factor.item() if isinstance(scaling_factor, np.generic) else scaling_factor,
        shift_factor=shift_factor.item() if isinstance(shift_factor, np.generic) else shift_factor,
        count=len(items),
    )
    shard_size = shard_size or len(items)
    clear_left(folder)
    with new_output(folder) as temporary:
        temporary.mkdir()
        written = []
        for start in range(0, len(items), shard_size):
            part = slice(start, start + shard_size)
            with ShardWriter(temporary, len(written), manifest) as writer:
                writer.append(
                    items[part].astype(manifest.dtype),
                    labels[part].astype(np.int64),
                    None if images is None else images[part],
                )
                written.append(writer.finish())
        shards.write_manifest(temporary / MANIFEST, replace(manifest, shards=tuple(written)))
    return open_dataset(folder)


def _folder(folder: str | Path) -> Path:
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder is {folder!r}; it must be a path")
    if "\0" in os.fspath(folder):
        raise ValueError(f"folder is {os.fspath(folder)!r}; a path has no NUL")
    return Path(folder)


def _array(name: str, values) -> ndarray:
    if isinstance(values, Tensor):
        if values.is_meta:
            raise ValueError(f"{name} is on meta; it needs values")
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # which numpy does not have
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name} cannot be an array: {error}") from error


def _check_whole(name: str, value: int, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}; it must be a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name} is {value}; it must be {least} to {most}")


class SampleOrder:
    """The infinite stream of samples: position p is item permutation[p % n] of epoch p // n, and its view there.

    Permutation and views (a fair coin for each place) are drawn from SeedSequence([seed, epoch]) alone: any
    position can be asked for directly, by any process. Without `flip`, all views are 0 and the items the same.
    """

    def __init__(self, num_samples: int, seed: int, *, num_views: int = 1, flip: bool = True):
        _check_whole("num_samples", num_samples, 1)
        _check_whole("seed", seed, 0)
        self.num_samples, self.seed = num_samples, seed
        self.flip = flip and num_views == 2
        self._drawn: dict[int, tuple[ndarray, ndarray]] = {}  # the last epoch: 20 ms to draw for a million items

    def __call__(self, positions: ndarray) -> tuple[ndarray, ndarray]:
        """(B,) positions → (B,) items and (B,) views."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        indices, views = np.empty_like(places), np.zeros_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            permutation, flipped = self._draw(int(epoch))
            indices[here] = permutation[places[here]]
            if self.flip:
                views[here] = flipped[places[here]]
        return indices, views

    def _draw(self, epoch: int) -> tuple[ndarray, ndarray]:
        if epoch not in self._drawn:
            random = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
            permutation = random.permutation(self.num_samples)
            views = random.integers(2, size=self.num_samples, dtype=np.uint8)
            self._drawn = {epoch: (permutation, views)}
        return self._drawn[epoch]


class _Batches(Dataset):
    """The batch of the stream's samples from a position on."""

    def __init__(self, dataset: LatentDataset, order: SampleOrder, batch_size: int):
        self.dataset, self.order, self.batch_size = dataset, order, batch_size

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.dataset.read(*self.order(np.arange(position, position + self.batch_size)))


class _Positions(Sampler):
    def __init__(self, start: int, stride: int):
        self.start, self.stride = start, stride

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start, self.stride)


def make_loader(
    dataset: LatentDataset,
    *,
    seed: int,
    start: int,
    stride: int,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    flip: bool = True,
    prefetch_factor: int = 4,
) -> DataLoader:
    """An infinite loader; batch k is the samples start + k·stride … + batch_size − 1 of `SampleOrder`.

    Process r of R, with b samples each a step, takes start = (steps done)·R·b + r·b and stride = R·b; so a run
    goes on exactly where it stopped, and also with another R, for equal R·b. Batches straddle epochs and may
    be larger than the data. `num_workers` processes read ahead `prefetch_factor` batches each; 0 reads when
    asked. Ctrl-C is left to the main process.
    """
    for name, value, least, most in (
        ("start", start, 0, 2**62), ("stride", stride, 1, 2**62), ("batch_size", batch_size, 1, 2**20),
        ("num_workers", num_workers, 0, 2**10), ("prefetch_factor", prefetch_factor, 1, 2**10),
    ):  # fmt: skip
        _check_whole(name, value, least, most)
    order = SampleOrder(len(dataset), seed, num_views=dataset.num_views, flip=flip)
    return DataLoader(
        _Batches(dataset, order, batch_size),
        batch_size=None,
        sampler=_Positions(start, stride),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        prefetch_factor=prefetch_factor if num_workers else None,
        worker_init_fn=ignore_interrupts,
    )


def ignore_interrupts(worker: int) -> None:
    """For a worker process: Ctrl-C and SIGHUP reach every process of a terminal, a scheduler's SIGTERM every one
    of a job; the main one decides what to do, and workers end with it."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """By its SIGTERM multiprocessing ends workers at exit, and waits for them for ever, where a variable or an
    error's traceback still holds the loader."""
    parent = multiprocessing.parent_process()
    while parent and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)
