"""`edt extract`: images to a data folder of VAE latents, or of pixels, that `edt.data` reads for training."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..devices import torch_device
from ..files.lock import LOCK_FILE, open_folder
from ..files.text import printable
from ..interrupt import StopRequest
from ..options import check_types
from . import shards
from .dataset import ignore_interrupts
from .image_files import UnreadableError
from .shards import MANIFEST, MOST_CLASSES, MOST_SIDE, PROGRESS, Manifest, Shard, ShardWriter, number_names
from .sources import HubDataset, ImageFolder, ReleasedFeatures, listing_digest
from .vae import load_autoencoder, weights_digest

_MOST_WORKERS = 1024
_VAE_DIGEST = "vae_sha256"  # in a manifest's extraction, beside the options


@dataclass(frozen=True)
class ExtractOptions:
    """Turns images into a data folder for training: latents of a VAE, or pixels.

    Interrupted at any point, the same command goes on from the last complete shard. A Hugging Face dataset needs
    pip install 'edt-kernels[data]'.
    """

    source: Path
    """A folder of class sub-folders of images, or of images alone (no classes); a Hugging Face dataset written by
    save_to_disk; or, with --npy-labels, the released code's folder of .npy features."""
    output: Path
    """The data folder to make."""
    vae: str | None = None
    """The AutoencoderKL, such as stabilityai/sd-vae-ft-ema or a local folder. Without it, pixels are stored."""
    vae_subfolder: str | None = None
    """The sub-folder of --vae that it is in, such as vae of a whole pipeline."""
    image_size: tuple[int, ...] = (256,)
    """The size that images are scaled and cropped to: one number, or height and width."""
    channels: Literal[1, 3] = 3
    """The channels of the images; 1 is grey."""
    flips: bool = True
    """Store latents of the mirrored images too; of pixels, that training may mirror them."""
    moments: bool = True
    """Store the VAE's mean and deviation, for a new sample at each reading; else one sample for good."""
    store_images: bool = False
    """Store the images too, beside their latents, for training that looks at both."""
    encode_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the VAE. bfloat16 is faster and coarser."""
    npy_labels: Path | None = None
    """The released code's folder of .npy labels; --source is then its folder of features, which are scaled and of
    one view, whatever the other options say."""
    image_column: str = "image"
    """The column of images in a Hugging Face dataset."""
    label_column: str | None = "label"
    """The column of labels in a Hugging Face dataset; None stands for no classes."""
    split: str = "train"
    """The split of a Hugging Face dataset that has several."""
    num_classes: int | None = None
    """The number of classes, for labels that are numbers without names. By default the highest label and one."""
    seed: int = 0
    """The seed of the samples that --no-moments draws, one for each image and view."""
    retry_skipped: bool = False
    """In a folder that is there, make those shards again of which images could not be read."""
    shard_size: int = 16384
    """Images in a shard. That is what an interruption can cost."""
    batch_size: int = 32
    """The number of images encoded at a time."""
    num_workers: int = field(default_factory=lambda: min(os.cpu_count() or 1, 8))
    """The number of processes that read and decode images; with 0, the main process does it in between."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """The device of the VAE, cuda or cpu. By default it is the GPU if there is one."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image_size[0], self.image_size[-1]

    def check(self) -> None:
        """Raises ValueError for options that cannot work, FileNotFoundError for missing folders."""
        check_types(self)
        for name in ("shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
        if not 0 <= self.num_workers <= _MOST_WORKERS:
            raise ValueError(f"num_workers is {self.num_workers}; it must be 0 to {_MOST_WORKERS}")
        if self.num_classes is not None and not 1 <= self.num_classes <= MOST_CLASSES:
            raise ValueError(f"num_classes is {self.num_classes}; it must be 1 to {MOST_CLASSES}")
        if len(self.image_size) not in (1, 2) or not all(1 <= side <= MOST_SIDE for side in self.image_size):
            raise ValueError(
                f"image_size is {self.image_size}; it must be one number, or height and width, of 1 to {MOST_SIDE}"
            )
        if self.vae == "":
            raise ValueError("vae is empty; leave out --vae to store pixels")
        if self.vae is None and (self.store_images or self.vae_subfolder):
            raise ValueError("store_images and vae_subfolder are for latents; they need --vae")
        if self.npy_labels is not None and self.vae is not None:
            raise ValueError("npy_labels says that source has latents already; leave out --vae")
        if self.store_images and self.channels != 3:
            raise ValueError(f"channels is {self.channels}; store_images needs 3")
        for name in ("source", "npy_labels"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise FileNotFoundError(f"{name} {folder}: there is no such folder")
            if folder is not None and _is_within(self.output, folder):
                raise ValueError(
                    f"output {self.output} is in {name} {folder}; what is written would be read; give another"
                )
            if folder is not None and _is_within(folder, self.output):
                raise ValueError(
                    f"{name} {folder} is in output {self.output}, which has to be a folder of its own"
                )
        torch_device(self.device)


def _is_within(folder: Path, other: Path) -> bool:
    return folder.resolve().is_relative_to(other.resolve())


def extract(options: ExtractOptions, stop: StopRequest | None = None) -> tuple[Manifest, bool]:
    """Makes the data folder, or what is missing of it; until `stop`, at which KeyboardInterrupt is raised.

    Returns:
        Its manifest, and whether anything was left to do.

    Raises:
        ValueError, TypeError: for wrong options, others than the folder was begun with, and a folder in which
            another process writes.
        OSError: on a full disk, and for a source that cannot be read; complete shards are kept.
    """
    options.check()
    source = open_source(options)
    if options.num_classes not in (None, source.num_classes):
        raise ValueError(f"num_classes is {options.num_classes}; source has {source.num_classes} of its own")
    settings = _settings(options, source)
    folder = options.output
    # What cannot work is refused before anything is written, or another's folder taken.
    planned = vae = None
    if _begun(folder, source, settings) is None:
        vae = load_vae(options)
        planned = _plan(options, source, settings, vae)
    with open_folder(folder):
        return _extract(options, source, settings, planned, vae, StopRequest() if stop is None else stop)


def _extract(
    options: ExtractOptions, source, settings: dict, planned: Manifest | None, vae, stop: StopRequest
) -> tuple[Manifest, bool]:
    """`extract` in a folder whose lock is held, under which its state is read; `planned` is for a new one."""
    folder = options.output
    begun = _begun(folder, source, settings)
    done = {
        shard.file: shard
        for shard in (begun.shards if begun and begun.count > 0 else ())  # of none, all are tried again
        if all((folder / file).is_file() for file in shard.files)
        and not (options.retry_skipped and shard.skipped["count"])
    }
    count = -(-len(source.names) // options.shard_size)
    missing = [number for number in range(count) if f"data-{number:05d}.npy" not in done]
    finished = shards.read_manifest(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    if not missing and finished and not (folder / PROGRESS).is_file():
        return finished, False
    if missing:
        vae = load_vae(options) if vae is None else vae
        _check_is_the_same_vae(options, begun, vae)
    manifest = begun or planned or _plan(options, source, settings, vae)
    with _saying_what_is_kept(folder, done, count):
        for left in shards.leftovers(folder):
            left.unlink()
        _save_progress(folder, manifest, done)
        for shard in _make_shards(options, source, manifest, missing, vae, stop) if missing else ():
            done[shard.file] = shard
            if finished:  # but for shards that were lost, or are made again: it stays true of what is there
                parts = {part.file: part for part in finished.shards} | done
                shards.write_manifest(folder / MANIFEST, _with_shards(finished, parts))
            _save_progress(folder, manifest, done)
    manifest = _finished(folder, manifest, done)
    with _saying_what_is_kept(folder, done, count):
        shards.write_manifest(folder / MANIFEST, manifest)
        (folder / PROGRESS).unlink(missing_ok=True)
    return manifest, bool(missing)


@contextmanager
def _saying_what_is_kept(folder: Path, done: dict[str, Shard], count: int) -> Iterator[None]:
    """Errors end with how many shards are complete, and that the same command goes on."""
    try:
        yield
    except Exception as error:
        what, full = str(error) or type(error).__name__, False
        if isinstance(error, OSError) and error.errno is not None:
            what = f"{error.strerror} ({error.filename or folder})"
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        said = (
            f"{what}: {len(done)} of {count} shards are complete and kept; {'make room' if full else 'mend this'} "
            "and run the same command again"
        )
        if not isinstance(error, OSError):
            error.args = (said,)
            raise
        stopped = OSError(said)
        stopped.errno = error.errno
        raise stopped from error


def open_source(options: ExtractOptions) -> ImageFolder | HubDataset | ReleasedFeatures:
    folder = options.source
    if options.npy_labels is not None:
        return ReleasedFeatures(folder, options.npy_labels, options.num_classes)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return HubDataset(
            folder,
            options.size,
            options.channels,
            split=options.split,
            image_column=options.image_column,
            label_column=options.label_column,
            num_classes=options.num_classes,
        )
    return ImageFolder(folder, options.size, options.channels)


def _settings(options: ExtractOptions, source) -> dict:
    """What decides the bytes of a shard. Batch size, workers and device change no more than rounding."""
    names = ("vae", "vae_subfolder", "channels", "flips", "moments", "store_images", "encode_dtype", "num_classes",
             "seed", "shard_size", "image_column", "split")  # fmt: skip
    return {
        "source": source.kind,
        "images": len(source.names),
        "names_and_labels": listing_digest(source),
        "image_size": list(options.size),
        **{name: getattr(options, name) for name in names},
    }


def _begun(folder: Path, source, settings: dict) -> Manifest | None:
    """The manifest of an extraction into this folder so far; None for a new one. A finished one has none but
    manifest.json; while shards of it are made again, progress.json has those that are not to be.

    Raises:
        ValueError: if it was begun with other options, or the folder has something else in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; it must be a folder, or not there yet")
    # Another process may write there until its lock is taken: progress.json is written before the first shard and
    # removed after manifest.json is there, so that what is listed first has one of them, looked for in this order.
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    for name in (PROGRESS, MANIFEST):
        if (folder / name).is_file():
            with suppress(FileNotFoundError):
                manifest = shards.read_manifest(folder / name)
                break
    else:
        # Its lock and temporary files: another has just begun, or was killed at once.
        if any(name != LOCK_FILE and not shards.is_leftover(name) for name in names):
            raise ValueError(f"output {folder} is not empty and was not begun by edt extract; give another folder")
        return None
    if manifest.extraction is None:
        raise ValueError(f"output {folder} has data that edt extract did not write; give another folder")
    begun = {name: value for name, value in manifest.extraction.items() if name != _VAE_DIGEST}
    if begun != settings:
        differing = [name for name in settings if begun.get(name) != settings[name]]
        was = ", ".join(f"{name} {begun.get(name)}" for name in differing)
        now = ", ".join(f"{name} {settings[name]}" for name in differing)
        text = f"output {folder} was begun with {was}; this is {now}. Give the same options, or another --output"
        if differing == ["names_and_labels"]:
            text += " (the images' names or labels are others now, or the order of the classes is)"
        raise ValueError(text)
    # Of numbers in .npy files the classes are counted in the end.
    if source.num_classes is not None and manifest.class_names != source.class_names:
        raise ValueError(
            f"output {folder} was begun with other names of the classes than source has now; give another --output"
        )
    return manifest


def _plan(options: ExtractOptions, source, settings: dict, vae) -> Manifest:
    """The manifest of a folder that has no shards yet."""
    common = {
        "num_classes": source.num_classes or 0,
        "class_names": source.class_names,
        "extraction": settings if vae is None else {**settings, _VAE_DIGEST: weights_digest(vae)},
    }
    if isinstance(source, ReleasedFeatures):
        C, H, W = source.shape
        return Manifest(
            kind="latents",
            shape=(C, H, W),
            dtype="float16",
            moments=False,
            views=1,
            mirror=False,
            stores_images=False,
            image_size=(8 * H, 8 * W),  # of the VAE that code uses
            **common,
        )
    if vae is None:
        return Manifest(
            kind="pixels",
            shape=(options.channels, *options.size),
            dtype="uint8",
            moments=False,
            views=1,
            mirror=options.flips,
            stores_images=False,
            image_size=options.size,
            **common,
        )
    config = vae.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    if any(side % factor for side in options.size):
        raise ValueError(f"image_size is {options.size}; this VAE needs multiples of {factor}")
    if config.in_channels != options.channels:
        raise ValueError(f"channels is {options.channels}; this VAE takes images of {config.in_channels}")
    if config.latents_mean is not None or config.latents_std is not None:
        raise ValueError(
            f"vae {options.vae} normalises each channel (latents_mean, latents_std), which is not done"
        )
    return Manifest(
        kind="latents",
        shape=(config.latent_channels, *(side // factor for side in options.size)),
        dtype="float16",
        moments=options.moments,
        views=2 if options.flips else 1,
        mirror=False,
        stores_images=options.store_images,
        image_size=options.size,
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor or 0.0,
        vae=options.vae if options.vae_subfolder is None else f"{options.vae} {options.vae_subfolder}",
        encode_dtype=options.encode_dtype,
        **common,
    )


def _check_is_the_same_vae(options: ExtractOptions, begun: Manifest | None, vae) -> None:
    """Raises ValueError for another VAE than the shards so far are of; of older folders that cannot be told."""
    then = begun and begun.extraction and begun.extraction.get(_VAE_DIGEST)
    if then and then != (now := weights_digest(vae)):
        raise ValueError(
            f"output {options.output} was begun with another VAE than vae {options.vae!r} is now: its weights, "
            f"scaling_factor or shift_factor were others (SHA-256 {then}, now {now}). Give that VAE, or another "
            "--output"
        )


def load_vae(options: ExtractOptions):
    """The VAE on the device; None for pixels."""
    if options.vae is None:
        return None
    vae = load_autoencoder(options.vae, options.vae_subfolder, getattr(torch, options.encode_dtype))
    return vae.to(torch_device(options.device))  # pyright: ignore[reportArgumentType] - diffusers' own hint


def _finished(folder: Path, manifest: Manifest, done: dict[str, Shard]) -> Manifest:
    manifest = _with_shards(manifest, done)
    if manifest.count == 0:
        first = manifest.skipped["files"][0]
        raise ValueError(
            f"none of {manifest.skipped['count']} images could be read; the first is {first['path']}: "
            f"{first['reason']}"
        )
    made = manifest.extraction or {}
    if made.get("source") == ReleasedFeatures.kind and made["num_classes"] is None:
        labels = (np.load(folder / shard.labels) for shard in manifest.shards if shard.count)
        count = 1 + max(int(part.max()) for part in labels)
        manifest = replace(manifest, num_classes=count, class_names=number_names(count))
    return manifest


def _with_shards(manifest: Manifest, done: dict[str, Shard]) -> Manifest:
    parts = tuple(done[file] for file in sorted(done, key=lambda file: (len(file), file)))
    return replace(
        manifest,
        shards=parts,
        count=sum(shard.count for shard in parts),
        skipped=shards.sum_skipped(shard.skipped for shard in parts),
    )


def _save_progress(folder: Path, manifest: Manifest, done: dict[str, Shard]) -> None:
    shards.write_manifest(folder / PROGRESS, _with_shards(manifest, done))


class _Readable(Dataset):
    """(index, array, label) of each image; (index, None, reason) of one that is itself to blame; else the error,
    which the main process raises: raised in a worker it would lose its type and number."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, index: int):
        try:
            return index, *self.source.load(index)
        except UnreadableError as error:
            return index, None, str(error)[:200]
        except Exception as error:
            return _portable(error, f"image {self.source.names[index]}")


def _portable(error: Exception, name: str) -> Exception:
    """An error that says of which image it is, and surely passes from one process to another."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror is not None:
        return OSError(error.errno, error.strerror, str(error.filename or name))
    if type(error) in (MemoryError, ValueError):
        return type(error)(f"{name}: {error}")
    kind = next((kind for kind in (OSError, MemoryError) if isinstance(error, kind)), RuntimeError)
    return kind(f"{name}: {type(error).__name__}: {error}")


def _collate(
    entries: list[Any],  # tuples, or an Exception
) -> tuple[list[int], Tensor | None, ndarray, list[tuple[int, str]]] | Exception:
    """Indices, arrays and labels of what could be read; indices and reasons of what could not. Or an error."""
    for entry in entries:
        if isinstance(entry, Exception):
            return entry
    read = [entry for entry in entries if entry[1] is not None]
    skipped = [(index, reason) for index, array, reason in entries if array is None]
    arrays = torch.from_numpy(np.stack([array for _, array, _ in read])) if read else None
    return [index for index, _, _ in read], arrays, np.array([label for _, _, label in read], np.int64), skipped


def _make_shards(
    options: ExtractOptions, source, manifest: Manifest, numbers: list[int], vae, stop: StopRequest
) -> Iterator[Shard]:
    """Writes the shards of these numbers, one after the other, and yields each.

    Batches end with their shard, so that its bytes do not depend on where an extraction was interrupted.
    """
    total, size = len(source.names), options.shard_size
    batches = []  # of each shard, the indices of each batch
    for number in numbers:
        indices = list(range(number * size, min((number + 1) * size, total)))
        batches.append([indices[i : i + options.batch_size] for i in range(0, len(indices), options.batch_size)])
    loader = DataLoader(
        _Readable(source),
        batch_sampler=[batch for shard in batches for batch in shard],
        collate_fn=_collate,
        num_workers=options.num_workers,
        worker_init_fn=ignore_interrupts,
        pin_memory=torch_device(options.device).type == "cuda",
    )
    todo = sum(len(batch) for shard in batches for batch in shard)
    with tqdm(desc="extracting", unit="image", total=total, initial=total - todo) as bar:
        stream = iter(loader)
        for number, shard in zip(numbers, batches):
            skipped = []
            with ShardWriter(options.output, number, manifest) as writer:
                for _ in shard:
                    batch = next(stream)
                    if isinstance(batch, Exception):
                        raise batch
                    indices, arrays, labels, unreadable = batch
                    skipped += [{"path": str(source.names[i]), "reason": reason} for i, reason in unreadable]
                    if indices:
                        if vae is None:
                            data = arrays.numpy()[:, None]
                        else:
                            data = encode(vae, arrays, indices, manifest, source.names)
                        writer.append(data, labels, arrays.numpy() if manifest.stores_images else None)
                    bar.update(len(indices) + len(unreadable))
                    # Asked for, as an exception that a signal raises is lost where Python ignores exceptions.
                    if stop:
                        raise KeyboardInterrupt
                yield writer.finish(shards.sum_skipped([{"count": len(skipped), "files": skipped}]))


@torch.inference_mode()
def encode(vae, images: Tensor, indices: list[int], manifest: Manifest, names: Sequence | None = None) -> ndarray:
    """(B, 3, h, w) uint8 → (B, views, K·C, H, W) float16, not scaled.

    Args:
        indices: of the images in the source, whose `names` are for errors; by default these numbers.

    Raises:
        ValueError: naming the first image whose latents are not finite.
    """
    images = (images.to(vae.device, non_blocking=True).float() / 127.5 - 1).to(vae.dtype)
    views = []
    for view in range(manifest.views):
        posterior = vae.encode(images.flip(-1) if view else images).latent_dist
        mean, std = posterior.mean.float().cpu(), posterior.std.float().cpu()
        if manifest.moments:
            views.append(torch.cat([mean, std], dim=1))
        else:
            seed = manifest.extraction["seed"]  # pyright: ignore[reportOptionalSubscript] - never of a manifest in work
            noise = [
                np.random.default_rng([seed, index, view]).standard_normal(mean.shape[1:], np.float32)
                for index in indices
            ]
            views.append(mean + std * torch.from_numpy(np.stack(noise)))
    encoded = torch.stack(views, dim=1).half()
    if not encoded.isfinite().all():
        first = indices[int((~encoded.isfinite()).flatten(1).any(dim=1).nonzero()[0])]
        first = first if names is None else names[first]
        raise ValueError(
            f"the VAE's latents of image {first} are not finite in float16; is --vae right? encode_dtype is "
            f"{manifest.encode_dtype}"
        )
    return encoded.numpy()


def summary(manifest: Manifest, folder: Path) -> str:
    """What the data folder has, in a line or two."""
    classes = f"{manifest.num_classes} classes" if manifest.num_classes else "no classes"
    views = " in both views" if manifest.views == 2 else ""
    size = sum((folder / file).stat().st_size for shard in manifest.shards for file in shard.files)
    text = (
        f"{printable(folder)}: {manifest.count} {manifest.kind} {manifest.shape}{views}, {classes}, "
        f"{len(manifest.shards)} shards, {size / 1e9:.2f} GB"
    )
    if skipped := manifest.skipped["count"]:
        first = manifest.skipped["files"][0]
        what = printable(f"{first['path']}: {first['reason']}")
        text += f"\n{skipped} unreadable, see {MANIFEST}; the first is {what}"
    return text
