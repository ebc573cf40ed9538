"""`edt evaluate`: generated images against real ones, by features of InceptionV3 or of a model of one's own."""

import importlib
import importlib.util
import math
import os
import sys
import tempfile
import zipfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
from numpy import ndarray
from torch import Tensor
from tqdm import tqdm

from ..data.shards import MOST_SIDE
from ..devices import tf32, torch_device
from ..files.errors import named_errors
from ..files.outputs import sha256, write_json
from ..files.text import printable, read_json, say
from ..options import check_types
from .image_sets import FolderImages, NpzImages, has_images, open_images, read_statistics
from .metrics import Gaussian, RunningGaussian, RunningInceptionScore, frechet_distance, precision_recall

INCEPTION_FEATURES = {"pool": 2048, "spatial": 7 * 17 * 17}
NEIGHBOURS = 3
SPLITS = 10
_BATCH_BYTES = 2**28  # of images as uint8; networks have them as floats, several times
# What every report has, by which an earlier one is told from another program's file.
_REPORT = {"samples", "reference", "extractor", "metrics", "not_computed", "notes", "versions", "device"}
_NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "frechet_distance": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
}


@dataclass(frozen=True)
class EvaluateOptions:
    """Compares generated images with real ones: FID, sFID, Inception Score, precision and recall.

    Images are an .npz (arr_0 uint8 N×H×W×C, as edt sample and ADM write it) or a folder of images,
    searched to any depth. InceptionV3 needs pip install 'edt-kernels[evaluate]'.
    """

    samples: Path
    """The generated images."""
    reference: Path
    """The real images, or an .npz of ADM's statistics (mu, sigma; mu_s, sigma_s), with or without arr_0."""
    image_size: tuple[int, ...] | None = None
    """The samples' size, one number or height and width, to which edt extract's crop (ADM's) brings the images of
    a folder as reference, whatever their sizes. Without it they must be of one size."""
    inception_weights: Path | None = None
    """The file of torch-fidelity's weights of InceptionV3. By default it downloads them."""
    feature_model: str | None = None
    """Instead of InceptionV3: a .pt2 file of torch.export.save, exported with a dynamic batch, that takes float
    images (B, C, H, W) in [-1, 1] to features (B, F); or the word pixels, for the pixels themselves. Gives a
    Fréchet distance, precision and recall, and downloads nothing. A .pt2 can run code that its author chose."""
    trust_feature_model: bool = False
    """Load the .pt2. Torch runs code that it brings, so that of a stranger may do anything."""
    output: Path | None = None
    """A JSON file for the figures and all they depend on. It may replace an earlier report, nothing else."""
    batch_size: int = 64
    """The number of images whose features are computed at a time; of very large ones there are fewer."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """The device, cuda or cpu. By default it is the GPU if there is one."""

    def check(self) -> None:
        """Raises ValueError for options that cannot work, FileNotFoundError for missing files."""
        check_types(self)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.inception_weights is not None and self.feature_model is not None:
            raise ValueError("inception_weights and feature_model exclude each other; give one")
        for name in ("samples", "reference"):
            path = getattr(self, name)
            if not path.exists():
                raise FileNotFoundError(f"{name} {path}: there is no such file or folder")
        model = None if self.feature_model in (None, "pixels") else Path(self.feature_model)
        for name, path in (("inception_weights", self.inception_weights), ("feature_model", model)):
            if path is not None and not path.is_file():
                raise FileNotFoundError(f"{name} {path}: there is no such file")
        if model is not None:
            _check_is_exported(model)
            if not self.trust_feature_model:
                raise ValueError(
                    f"feature_model {model} is a .pt2, and to load one runs code that it brings; "
                    "--trust-feature-model says that you trust where it comes from"
                )
        if self.image_size is not None:
            if len(self.image_size) not in (1, 2) or not all(1 <= side <= MOST_SIDE for side in self.image_size):
                raise ValueError(
                    f"image_size is {self.image_size}; it must be one number, or height and width, of 1 to "
                    f"{MOST_SIDE}"
                )
            if not self.reference.is_dir():
                raise ValueError(
                    f"image_size crops a folder of images; reference {self.reference} is a file. Leave it out"
                )
        if self.output is not None:
            _check_output(self.output)
        torch_device(self.device)


def _check_output(file: Path) -> None:
    """Raises ValueError, OSError where the report could not be written, or would replace another file."""
    if os.path.lexists(file):
        if not file.is_file():  # /dev/stdout is none either: a rename would take its place
            kind = "a folder" if file.is_dir() else "a device or a link that leads nowhere"
            raise ValueError(f"output {file} is {kind}; it must be a file")
        try:
            ours = read_json(file, "output", dict).keys() >= _REPORT
        except ValueError:
            ours = False
        if not ours:
            raise ValueError(f"output {file} is there and no report of edt evaluate; give another")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent), suppress(FileNotFoundError):
            file.stat()  # whose name may be too long
    except OSError as error:
        raise OSError(error.errno, f"output {file} cannot be written: {error.strerror}") from error


# An extractor takes uint8 images (B, C, H, W) on its device to float features (B, F) by name, and has a `label`,
# which says in the results what ran. Of its features "pool" are those that are compared.


class Inception:
    """InceptionV3 of torch-fidelity, a port of the TensorFlow graph that FID is defined by.

    - pool (B, 2048): the averages of the last layer, for FID, precision and recall.
    - spatial (B, 2023): for sFID the first 7 channels of the 17×17 tensor that ADM's evaluator calls mixed_6/conv,
      flattened as there, channels last. torch-fidelity's table of names has it as Mixed_6d.branch1x1.
    - logits (B, 1008): without the bias, as for all published Inception Scores.
    """

    def __init__(self, weights: Path | None, device: torch.device):
        module = _torch_fidelity_module("feature_extractor_inceptionv3")
        file = weights or Path(torch.hub.get_dir(), "checkpoints", Path(module.URL_INCEPTION_V3).name)
        if file.is_file():
            _check_is_plain_weights(file)
        try:
            self.network = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
            )
        except OSError as error:
            if file.is_file():
                raise
            raise RuntimeError(
                f"InceptionV3's weights could not be downloaded to {file} ({error}); give them by "
                "--inception-weights"
            ) from error
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise ValueError(  # without the hundreds of names
                f"inception_weights {file} has not the weights of torch-fidelity's InceptionV3, which are "
                f"{module.URL_INCEPTION_V3}"
            ) from error
        self.network.to(device)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        name = f"InceptionV3 of torch-fidelity {version('torch-fidelity')}"
        self.label = {"name": name, "weights": str(file), "sha256": sha256(file)}

    def _keep_spatial(self, module, args, output: Tensor) -> None:
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)  # [B, 17, 17, 7]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        with tf32(False):
            pool, logits = self.network(images.expand(-1, 3, -1, -1))
        return {"pool": pool, "spatial": self.spatial, "logits": logits}


def _torch_fidelity_module(name: str):
    """A module of torch-fidelity without the rest of the package, whose import needs a torchvision that fits."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        raise RuntimeError(
            "InceptionV3 needs pip install 'edt-kernels[evaluate]' (or, where torch is not PyPI's, pip install "
            "--no-deps torch-fidelity); --feature-model does without"
        )
    with patch.dict(sys.modules, {"torch_fidelity": importlib.util.module_from_spec(spec)}):
        return importlib.import_module(f"torch_fidelity.{name}")


def _check_is_plain_weights(path: Path) -> None:
    """torch-fidelity unpickles whatever a file has; this refuses all but tensors first."""
    try:
        with named_errors(f"inception_weights {path}"):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ValueError as error:  # without torch's advice to unpickle it all the same
        raise ValueError(f"inception_weights {path} is no file of weights; torch.load cannot read it") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"inception_weights {path} is no file of weights; they must be tensors by name")


class ExportedModel:
    """A model that torch.export.save wrote."""

    def __init__(self, path: Path, device: torch.device):
        from torch.export.passes import move_to_device_pass  # takes a second, which others need not wait for

        self.path = path
        with named_errors(f"feature_model {path}", "cannot be loaded"):
            self.model = move_to_device_pass(torch.export.load(path), str(device)).module()
        self.label = {"name": "feature model", "path": str(path), "sha256": sha256(path)}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        with (
            named_errors(f"feature_model {self.path}", f"does not take images {tuple(images.shape)}"),
            tf32(False),
        ):
            features = self.model(images.contiguous().float() / 127.5 - 1)  # exported graphs take views
        if not (
            isinstance(features, Tensor)
            and features.ndim == 2
            and len(features) == len(images)
            and features.shape[1] > 0
        ):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"feature_model {self.path} returns {shape}; it must return ({len(images)}, F)")
        return {"pool": features.float()}


def _check_is_exported(path: Path) -> None:
    with named_errors(f"feature_model {path}", "is not a .pt2 file of torch.export.save"):
        if path.suffix != ".pt2":
            raise ValueError("its name must end in .pt2")
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("/archive_format") for name in archive.namelist()):
                raise ValueError("there is no archive_format in it")


class Pixels:
    """The pixels themselves, in [-1, 1]."""

    label = {"name": "pixels"}  # noqa: RUF012

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return {"pool": images.flatten(1).float() / 127.5 - 1}


@dataclass
class Measured:
    """What is kept of a set of images: float64 statistics of each kind of features, of "pool" also all of them
    (N, F) where asked for, and the Inception Score where there are logits."""

    gaussians: dict[str, Gaussian]
    pool: Tensor | None
    inception_score: tuple[float, float] | None


@torch.inference_mode()
def measure(
    name: str,
    images: NpzImages | FolderImages,
    extractor,
    *,
    batch_size: int,
    device: torch.device,
    skip: Collection[str] = (),
    keep_pool: bool,
    score: bool = False,
) -> Measured:
    """One pass over a set of images; statistics of the features in `skip` are left out."""
    running: dict[str, RunningGaussian] = {}
    pool, inception_score, seen = None, None, 0
    with tqdm(desc=name, unit="image", total=images.count) as bar:
        for batch in images.batches(_at_once(images, batch_size)):
            try:
                features = _features(extractor, batch, device)
                for value in features.values():
                    if not (finite := value.isfinite().all(dim=1)).all():
                        first = images.name(seen + int(finite.logical_not().nonzero()[0]))
                        raise ValueError(f"features of {first} are not finite")
                for key in features.keys() - {"logits", *skip}:
                    running.setdefault(key, RunningGaussian()).update(features[key])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            if score and "logits" in features:
                inception_score = inception_score or RunningInceptionScore(images.count, SPLITS)
                inception_score.update(features["logits"])
            if keep_pool:
                if pool is None:
                    pool = torch.empty(images.count, features["pool"].shape[1])
                pool[seen : seen + len(batch)] = features["pool"].cpu()
            seen += len(batch)
            bar.update(len(batch))
    return Measured(
        {key: gaussian.result() for key, gaussian in running.items()},
        pool,
        inception_score.result() if inception_score else None,
    )


def _at_once(images: NpzImages | FolderImages, batch_size: int) -> int:
    return max(1, min(batch_size, _BATCH_BYTES // math.prod(images.shape)))


def _features(extractor, batch: ndarray, device: torch.device) -> dict[str, Tensor]:
    return extractor(torch.from_numpy(batch).to(device).permute(0, 3, 1, 2))


def evaluate(options: EvaluateOptions) -> dict:
    """The report: what was compared, by what, the metrics, what was not computed and why, notes, versions.

    In memory are a batch of images, statistics of 2·F² float64, and for precision and recall the features of all
    images (N, F) float32: 0.4 GB for 50 000 of InceptionV3.

    Raises:
        ValueError, FileNotFoundError: for options, files or images that do not fit.
        RuntimeError: where torch-fidelity or its weights are missing.
    """
    options.check()
    device = torch_device(options.device)
    samples = open_images("samples", options.samples)
    statistics = {} if options.feature_model else read_statistics("reference", options.reference)
    for kind, gaussian in statistics.items():
        if len(gaussian.mean) != INCEPTION_FEATURES[kind]:
            raise ValueError(
                f"reference {options.reference} has {kind} statistics of {len(gaussian.mean)} features; "
                f"InceptionV3 has {INCEPTION_FEATURES[kind]}"
            )
    size = (options.image_size[0], options.image_size[-1]) if options.image_size else None
    if size and samples.shape[:2] != size:
        raise ValueError(
            f"image_size makes the reference's images {size[0]}×{size[1]}, samples {options.samples} are "
            f"{_size(samples)}; they must be of one size"
        )
    reference = None
    if not statistics or has_images(options.reference):
        reference = open_images("reference", options.reference, size, samples.shape[2])
    if options.feature_model == "pixels" and reference is not None and samples.shape != reference.shape:
        raise ValueError(
            f"samples are {_size(samples)}, the reference is {_size(reference)}; pixels need one shape"
            + _crop_hint(reference)
        )
    extractor = _make_extractor(options, device)
    dimensions = INCEPTION_FEATURES
    if options.feature_model:
        dimensions = {"pool": _count_features(samples, reference, extractor, options.batch_size, device)}

    # Said before hours of work, and in the report again.
    omitted, doubts = _omitted(samples, reference, statistics), _doubts(samples, reference, statistics, dimensions)
    if options.feature_model:
        omitted.pop("inception_score", None)
    for line in [*(f"no {_NAMES[name]}: {reason}" for name, reason in omitted.items()), *doubts]:
        say(f"edt: {line}")
    if options.feature_model:
        omitted |= dict.fromkeys(("fid", "sfid", "inception_score"), "the features are not InceptionV3's")

    settings = {"batch_size": options.batch_size, "device": device, "keep_pool": "precision" not in omitted}
    score = "inception_score" not in omitted
    drawn = measure("samples", samples, extractor, **settings, score=score)
    real = None if reference is None else measure("reference", reference, extractor, **settings, skip=statistics)

    metrics = {}
    distances = {"frechet_distance": "pool"} if options.feature_model else {"fid": "pool", "sfid": "spatial"}
    for metric, kind in distances.items():
        if metric in omitted:
            continue
        given = kind in statistics
        other = statistics[kind] if given else real.gaussians[kind]  # pyright: ignore[reportOptionalMemberAccess] - has images then
        other = Gaussian(other.mean.to(device), other.covariance.to(device))
        try:
            value = frechet_distance(drawn.gaussians[kind], other)
        except ValueError as error:
            raise ValueError(f"{metric} of samples and reference: {error}") from error
        source = "given statistics, approximate" if given else "the reference's images"
        metrics[metric] = {"value": value, "features": len(other.mean), "against": source}
    if drawn.inception_score:
        value, deviation = drawn.inception_score
        metrics["inception_score"] = {"value": value, "deviation": deviation, "splits": SPLITS, "shuffled": True}
    if "precision" not in omitted:
        pools = drawn.pool.to(device), real.pool.to(device)  # pyright: ignore[reportOptionalMemberAccess] - there then
        pair = precision_recall(*pools, neighbours=NEIGHBOURS, progress=True)
        for metric, value in zip(("precision", "recall"), pair):
            metrics[metric] = {"value": value, "neighbours": NEIGHBOURS}

    report = {
        "samples": _described(samples),
        "reference": {
            **(_described(reference) if reference else {"path": str(options.reference), "kind": "npz"}),
            "statistics": list(statistics),
            "cropped": size is not None,
        },
        "extractor": extractor.label,
        "metrics": metrics,
        "not_computed": omitted,
        "notes": [*_notes(samples, reference, statistics, options), *doubts],
        "versions": {name: version(name) for name in ("torch", "numpy", "pillow")},
        "device": str(device),
    }
    if options.output is not None:
        write_json(options.output, report)
    return report


def _make_extractor(options: EvaluateOptions, device: torch.device) -> Inception | ExportedModel | Pixels:
    if options.feature_model is None:
        return Inception(options.inception_weights, device)
    return Pixels() if options.feature_model == "pixels" else ExportedModel(Path(options.feature_model), device)


def _described(images: NpzImages | FolderImages) -> dict:
    return {"path": str(images.path), "kind": images.kind, "images": images.count, "shape": list(images.shape)}


def _size(images: NpzImages | FolderImages) -> str:
    return "×".join(map(str, images.shape))


@torch.inference_mode()
def _count_features(samples, reference, extractor, batch_size: int, device: torch.device) -> int:
    """How many the extractor makes of an image, by a first batch of either set.

    Raises:
        ValueError: where it takes one of the sets not, or makes more of one than of the other.
    """
    counts = []
    for name, images in (("samples", samples), ("reference", reference)):
        batch = next(images.batches(_at_once(images, batch_size)))
        try:
            counts.append(_features(extractor, batch, device)["pool"].shape[1])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if counts[0] != counts[1]:
        raise ValueError(
            f"frechet_distance of samples and reference: statistics are of {counts[0]} and of {counts[1]} "
            f"features; the samples are {_size(samples)}, the reference is {_size(reference)}"
        )
    return counts[0]


def _omitted(samples, reference, statistics) -> dict[str, str]:
    """The metrics of InceptionV3's features that these sets cannot have, and why."""
    omitted = {}
    if reference is None:
        omitted["precision"] = omitted["recall"] = "the reference has statistics alone, no images"
        for metric, kind in (("fid", "pool"), ("sfid", "spatial")):
            if kind not in statistics:
                omitted[metric] = f"the reference has neither statistics of {kind} features nor images"
    elif min(samples.count, reference.count) <= NEIGHBOURS:
        omitted["precision"] = omitted["recall"] = f"each set needs more than {NEIGHBOURS} images"
    if samples.count < SPLITS:
        omitted["inception_score"] = f"{SPLITS} splits need as many images"
    return omitted


def _doubts(samples, reference, statistics, dimensions: dict[str, int]) -> list[str]:
    """Why figures will say little: few images, different sizes."""
    doubts = []
    own = {kind: count for kind, count in dimensions.items() if kind not in statistics}
    for name, images, counts in (("samples", samples, dimensions), ("reference", reference, own)):
        dimension = max(counts.values(), default=0)
        if images is not None and images.count <= dimension:
            doubts.append(
                f"Few {name}: {images.count} images for {dimension} features have a singular covariance, and "
                "Fréchet distances far from those of many images."
            )
    if reference is not None and samples.shape != reference.shape:
        sizes = f"The samples are {_size(samples)}, the reference is {_size(reference)}"
        doubts.append(f"{sizes}{_crop_hint(reference)}.")
    return doubts


def _crop_hint(reference: NpzImages | FolderImages) -> str:
    return "" if reference.kind == "npz" else " (--image-size crops a folder to the samples' size)"


def _notes(samples, reference, statistics, options) -> list[str]:
    notes = []
    if statistics:
        notes.append(
            "The reference's statistics were made elsewhere, ADM's with the TensorFlow graph of InceptionV3; "
            "figures by torch-fidelity's port of it are approximate against them."
        )
    for name, images in (("samples", samples), ("reference", reference)):
        if images is not None and images.shape[2] == 1 and options.feature_model is None:
            notes.append(f"Grey {name}: InceptionV3 saw them repeated to three channels.")
    return notes


def format_report(report: dict) -> str:
    """The report as a table, with what it depends on."""
    lines = []
    for name in ("samples", "reference"):
        entry = report[name]
        parts = []
        if "images" in entry:
            made = "cropped to" if entry.get("cropped") else "of"
            parts.append(f"{entry['images']} images {made} {'×'.join(map(str, entry['shape']))}")
        if entry.get("statistics"):
            parts.append(f"statistics of {' and '.join(entry['statistics'])} features")
        lines.append(f"{name:16} {printable(entry['path'])} ({entry['kind']}): {', '.join(parts)}")
    label = report["extractor"]
    lines.append(f"{'features':16} {label['name']}")
    if "sha256" in label:
        lines.append(f"{'':16} {printable(label.get('weights') or label['path'])}, sha256 {label['sha256']}")
    lines.append("")
    for metric, name in _NAMES.items():
        if metric in report["metrics"]:
            entry = report["metrics"][metric]
            lines.append(f"{name:16} {entry['value']:10.4f}   {_parameters(entry)}")
        elif metric in report["not_computed"]:
            lines.append(f"{name:16} {'—':>10}   not computed: {report['not_computed'][metric]}")
    return "\n".join([*lines, *([""] if report["notes"] else []), *report["notes"]])


def _parameters(entry: dict) -> str:
    if "splits" in entry:
        return f"± {entry['deviation']:.4f} over {entry['splits']} splits, shuffled"
    if "neighbours" in entry:
        return f"k = {entry['neighbours']}"
    return f"{entry['features']} features, against {entry['against']}"
