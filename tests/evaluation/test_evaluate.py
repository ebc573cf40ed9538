import errno
import importlib
import importlib.util
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import types
import urllib.error
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import random_image, save_images
from image_folders import run as extract_images
from PIL import Image
from torch import nn

from edt.cli import main
from edt.data import digits
from edt.data.digits import load_split_digits, to_uint8
from edt.data.shards import parse_npy_header
from edt.demo import judge
from edt.evaluation.evaluator import (
    _REPORT,
    INCEPTION_FEATURES,
    EvaluateOptions,
    ExportedModel,
    Inception,
    _torch_fidelity_module,
    evaluate,
    format_report,
    measure,
)
from edt.evaluation.image_sets import open_images, read_statistics
from edt.evaluation.metrics import (
    MAX_FEATURES,
    Gaussian,
    RunningGaussian,
    RunningInceptionScore,
    frechet_distance,
    gaussian,
    precision_recall,
)

CPU = torch.device("cpu")
needs_torch_fidelity = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="needs torch-fidelity"
)


def normal(count: int, dimension: int, seed: int) -> torch.Tensor:
    """Correlated features."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ mixing + mixing[0]


@pytest.fixture(scope="module")
def theirs():
    """torch-fidelity's own arithmetic. The package imports torchvision for data sets and other networks, which
    these functions do not use: empty modules stand in for one that fits torch, which not every machine has."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity")
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    modules = {name: types.ModuleType(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(modules["torchvision.datasets"], name, type(name, (), {}))
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        functions = types.SimpleNamespace(
            fid=importlib.import_module("torch_fidelity.metric_fid").fid_statistics_to_metric,
            isc=importlib.import_module("torch_fidelity.metric_isc").isc_features_to_metric,
            prc=importlib.import_module("torch_fidelity.metric_prc").prc_features_to_metric,
        )
        for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
            del sys.modules[name]
    return functions


# The Fréchet distance.


def test_frechet_distance_in_closed_form():
    """Of 2×2 matrices tr X^½ = (tr X + 2·det(X)^½)^½; here of C·C' with covariances that do not commute."""
    C, D = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([[1.0, -0.3], [-0.3, 3.0]]).double()
    product = C @ D
    root = math.sqrt(float(product.trace() + 2 * product.det().sqrt()))
    means = torch.tensor([1.0, 2.0]).double(), torch.tensor([-1.0, 0.5]).double()
    expected = 4 + 2.25 + 3 + 4 - 2 * root
    assert frechet_distance(Gaussian(means[0], C), Gaussian(means[1], D)) == pytest.approx(expected, rel=1e-12)
    # One dimension: (μ − μ')² + (σ − σ')².
    one = [
        Gaussian(torch.tensor([m]).double(), torch.tensor([[s**2]]).double()) for m, s in ((3.0, 2.0), (7.0, 5.0))
    ]
    assert frechet_distance(*one) == pytest.approx(16 + 9, rel=1e-12)


def test_frechet_distance_of_singular_covariances():
    """C = u·uᵀ and C' = v·vᵀ: tr (C·C')^½ is |u·v|."""
    u, v = torch.linspace(0, 1, 40).double(), torch.linspace(1, -2, 40).double()
    zero = torch.zeros(40).double()
    expected = float(u @ u + v @ v - 2 * (u @ v).abs())
    distance = frechet_distance(Gaussian(zero, u.outer(u)), Gaussian(zero, v.outer(v)))
    assert distance == pytest.approx(expected, rel=1e-6)
    few = gaussian(normal(5, 40, 0))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6 * float(few.covariance.trace()))


@pytest.mark.parametrize("count", [30, 500])
def test_frechet_distance_is_torch_fidelitys(theirs, count):
    a, b = normal(count, 64, 1), normal(count + 7, 64, 2)
    statistics = [{"mu": x.mean(0).numpy(), "sigma": np.cov(x.numpy(), rowvar=False)} for x in (a, b)]
    expected = theirs.fid(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(expected, rel=1e-7)


def test_running_gaussian_is_the_covariance_for_any_batches():
    features = normal(101, 7, 3) + 1e6  # a mean that sums of squares would cancel against
    for sizes in ([101], [1] * 101, [50, 1, 50]):
        running = RunningGaussian()
        for batch in features.split(sizes):
            running.update(batch)
        result = running.result()
        assert torch.allclose(result.mean, features.mean(0), rtol=1e-14)
        assert torch.allclose(result.covariance, torch.cov(features.T), rtol=1e-8, atol=1e-8)


def test_features_that_make_no_covariance():
    running = RunningGaussian()
    running.update(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="features of image 4 are not finite"):
        running.update(torch.tensor([[0.0, 1.0], [0.0, math.nan]]))
    with pytest.raises(ValueError, match="features has 1 per image, and had 2 before"):
        running.update(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="features are of 1 images"):
        gaussian(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=f"features has {MAX_FEATURES + 1} per image"):
        gaussian(torch.zeros(2, MAX_FEATURES + 1))
    with pytest.raises(ValueError, match="statistics are of 2 and of 3 features"):
        frechet_distance(gaussian(torch.zeros(3, 2)), gaussian(torch.zeros(3, 3)))


# Precision and recall.


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def test_precision_and_recall_of_constructed_sets():
    reference = column(*map(float, range(10)))  # distances to the third neighbour: 2, at both ends 3
    # 4.5 and 11 lie within a real image's radius (of 9: 3), 12.5 and 200 do not.
    assert precision_recall(column(4.5, 11, 12.5, 200), reference)[0] == 0.5
    # Samples around 0: their radii are 0.3 and 0.2, so they reach only the real image 0.
    assert precision_recall(column(-0.1, 0, 0.1, 0.2), reference) == (1, 0.1)
    assert precision_recall(reference, reference) == (1, 1)
    assert precision_recall(reference + 1000, reference) == (0, 0)
    # With one neighbour 10.5 is no longer within the radius 1 of 9; 12 never is.
    pair = column(10.5, 12, 30)
    assert precision_recall(pair, reference, neighbours=1)[0] == 0
    assert precision_recall(pair, reference, neighbours=2)[0] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="neighbours is 3; it must be less than the number of samples, 3"):
        precision_recall(pair, reference)


def test_precision_and_recall_in_blocks(theirs, monkeypatch):
    """Against torch-fidelity's, and against the definition image by image."""
    samples, reference = normal(90, 5, 4).float(), (normal(70, 5, 4) * 0.8 + 0.7).float()

    def radius(x, own):
        return sorted(float((x - y).norm()) for y in own)[3]

    def share(inside, around):
        radii = [radius(x, around) for x in around]
        return np.mean([any((x - y).norm() <= r for y, r in zip(around, radii)) for x in inside])

    expected = share(samples, reference), share(reference, samples)
    assert all(0 < value < 1 for value in expected)
    monkeypatch.setattr("edt.evaluation.metrics._ROWS", 32)
    assert precision_recall(samples, reference) == pytest.approx(expected)
    assert precision_recall(samples + 300, reference + 300) == pytest.approx(expected)
    found = theirs.prc(samples, reference, prc_neighborhood=3, verbose=False)
    assert (found["precision"], found["recall"]) == pytest.approx(expected)


# The Inception Score.


def inception_score(logits: torch.Tensor, splits: int, batch_size: int) -> tuple[float, float]:
    score = RunningInceptionScore(len(logits), splits)
    for batch in logits.split(batch_size):
        score.update(batch)
    return score.result()


def test_inception_score_of_known_sets():
    certain = 1000 * torch.eye(12)
    assert inception_score(certain, 1, 5) == pytest.approx((12, 0))  # every image another class
    assert inception_score(certain[:1].repeat(12, 1), 3, 5) == pytest.approx((1, 0))
    assert inception_score(torch.zeros(12, 7), 2, 5) == pytest.approx((1, 0))
    sorted_by_class = certain[:2].repeat_interleave(500, dim=0)
    assert inception_score(sorted_by_class, 10, 64)[0] == pytest.approx(2, rel=0.05)  # not 1: splits are shuffled
    with pytest.raises(ValueError, match="num_images is 9; 10 splits"):
        RunningInceptionScore(9, 10)


@pytest.mark.parametrize("batch_size", [1, 8, 57])
def test_inception_score_is_torch_fidelitys(theirs, batch_size):
    logits = 3 * normal(57, 20, 5).float()
    expected = theirs.isc(logits, splits=10)
    found = inception_score(logits, 10, batch_size)
    assert found == pytest.approx((expected["inception_score_mean"], expected["inception_score_std"]), rel=1e-12)


# Reading.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_npz_images(tmp_path, save, batch_size):
    expected = np.random.default_rng(0).integers(0, 256, (11, 5, 6, 3), dtype=np.uint8)
    save(tmp_path / "a.npz", labels=np.arange(11), arr_0=expected)
    images = open_images("samples", tmp_path / "a.npz")
    assert (images.count, images.shape) == (11, (5, 6, 3))
    for _ in range(2):
        batches = list(images.batches(batch_size))
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}
        assert np.array_equal(np.concatenate(batches), expected)


def test_folder_of_images(tmp_path):
    """To any depth, ordered by path, grey and palette images as three channels."""
    (tmp_path / "b" / "c").mkdir(parents=True)
    random_image(0, (9, 8)).save(tmp_path / "b" / "c" / "0.PNG")
    random_image(1, (9, 8), "L").save(tmp_path / "b" / "1.png")
    random_image(2, (9, 8)).save(tmp_path / "a.jpeg")
    random_image(3, (9, 8)).quantize().save(tmp_path / "b" / "2.png")
    random_image(4, (7, 7)).save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("no image")
    images = open_images("samples", tmp_path)
    assert (images.count, images.shape) == (4, (8, 9, 3))
    files = [tmp_path / name for name in ("a.jpeg", "b/1.png", "b/2.png", "b/c/0.PNG")]
    expected = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    for batch_size in (1, 3, 10):
        assert np.array_equal(np.concatenate(list(images.batches(batch_size))), expected)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_reading_holds_one_batch(tmp_path, kind):
    """Peak of a whole pass over 400 images, their features (one number each) and statistics included."""
    array = np.zeros((400, 64, 64, 3), np.uint8)
    if kind == "npz":
        np.savez_compressed(tmp_path / "a.npz", arr_0=array)
    else:
        for i, image in enumerate(array):
            Image.fromarray(image).save(tmp_path / f"{i}.png")
    images = open_images("samples", tmp_path / "a.npz" if kind == "npz" else tmp_path)

    def brightness(batch):
        return {"pool": batch.float().flatten(1).mean(dim=1, keepdim=True)}

    for _ in range(2):  # the first imports what it needs
        tracemalloc.start()
        measured = measure("samples", images, brightness, batch_size=8, device=CPU, keep_pool=True)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert measured.pool.shape == (400, 1)
    assert peak < array.nbytes / 8  # a batch is 1/50 of all


# From end to end.


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Real digits for training and held out, noise, and a folder of the held-out ones."""
    folder = tmp_path_factory.mktemp("sets")
    real = load_split_digits()
    held_out = to_uint8(real.held_out_images)
    np.savez_compressed(folder / "train.npz", arr_0=to_uint8(real.train_images))
    np.savez(folder / "held_out.npz", arr_0=held_out)
    noise = np.random.default_rng(0).integers(0, 256, held_out.shape, dtype=np.uint8)
    np.savez(folder / "noise.npz", arr_0=noise)
    (folder / "held_out").mkdir()
    order = np.random.default_rng(1).permutation(len(held_out))
    for i, image in enumerate(held_out[order]):
        Image.fromarray(image[..., 0]).save(folder / "held_out" / f"{i:03d}.png")
    return folder


def run(sets: Path, samples: str, reference: str, **options) -> dict:
    options = {"device": "cpu", **options}
    return evaluate(EvaluateOptions(samples=sets / samples, reference=sets / reference, **options))


def values(report: dict) -> dict[str, float]:
    return {name: entry["value"] for name, entry in report["metrics"].items()}


def test_pixels_of_digits(sets, tmp_path):
    same = values(run(sets, "held_out.npz", "held_out.npz", feature_model="pixels"))
    assert same == {"frechet_distance": pytest.approx(0, abs=1e-4), "precision": 1, "recall": 1}
    real = values(run(sets, "train.npz", "held_out.npz", feature_model="pixels"))
    noise = values(run(sets, "noise.npz", "held_out.npz", feature_model="pixels"))
    assert 0.1 < real["frechet_distance"] < noise["frechet_distance"] / 10
    assert min(real["precision"], real["recall"]) > 0.8
    assert noise["precision"] < 0.05
    assert real["frechet_distance"] == pytest.approx(
        judge.frechet_distance(
            *(
                digits.from_uint8(np.load(sets / f"{name}.npz")["arr_0"]).astype(float)
                for name in ("train", "held_out")
            )
        ),
        rel=1e-5,
    )


def test_neither_order_nor_batches_nor_files_matter(sets):
    expected = values(run(sets, "train.npz", "held_out.npz", feature_model="pixels"))
    for reference, batch_size in (("held_out", 64), ("held_out.npz", 7), ("held_out", 1000)):
        found = run(sets, "train.npz", reference, feature_model="pixels", batch_size=batch_size)
        assert values(found) == pytest.approx(expected, rel=1e-6)  # pixels that never vary: singular


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, images):
        return self.norm(self.conv(images).relu().mean((2, 3)))


def export(model: nn.Module, path: Path, channels: int = 1, dynamic: bool = True) -> None:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    torch.export.save(
        torch.export.export(model.eval(), (torch.zeros(2, channels, 8, 8),), dynamic_shapes=shapes), path
    )


def test_exported_feature_model(sets, tmp_path, capsys):
    torch.manual_seed(0)
    model = Features()
    nn.init.normal_(model.norm.running_mean)
    export(model, tmp_path / "features.pt2")
    output = tmp_path / "results" / "evaluation.json"
    args = ["--samples", str(sets / "train.npz"), "--reference", str(sets / "held_out.npz"), "--device", "cpu"]
    args += [
        "--feature-model",
        str(tmp_path / "features.pt2"),
        "--trust-feature-model",
        "--output",
        str(output),
        "--batch-size",
        "100",
    ]
    assert main(["evaluate", *args]) == 0
    report = json.loads(output.read_text())
    with torch.no_grad():
        features = [
            model(torch.from_numpy(digits.from_uint8(np.load(sets / f"{name}.npz")["arr_0"])))
            for name in ("train", "held_out")
        ]
    assert values(report) == pytest.approx(
        {
            "frechet_distance": frechet_distance(*map(gaussian, features)),
            **dict(zip(("precision", "recall"), precision_recall(*features))),
        },
        rel=1e-4,
    )
    assert report["samples"] == {
        "path": str(sets / "train.npz"), "kind": "npz", "images": 1437, "shape": [8, 8, 1],
    }  # fmt: skip
    assert report["extractor"]["sha256"]
    assert report["metrics"]["precision"]["neighbours"] == 3
    assert report["versions"]["torch"]
    assert set(report["not_computed"]) == {"fid", "sfid", "inception_score"}
    table = capsys.readouterr().out
    assert f"{report['metrics']['frechet_distance']['value']:.4f}   6 features" in table
    assert "not computed: the features are not InceptionV3's" in table
    assert report["extractor"]["sha256"] in table


def test_code_of_a_feature_model_runs_only_where_it_is_trusted(sets, tmp_path, capsys):
    """An expression of a shape in the .pt2 is evaluated by torch.export.load, whatever it does."""
    export(nn.Flatten(), tmp_path / "good.pt2")
    ran, evil = tmp_path / "ran", tmp_path / "evil.pt2"
    code = f"__import__('pathlib').Path('{ran}').touch()".encode()
    with zipfile.ZipFile(tmp_path / "good.pt2") as good, zipfile.ZipFile(evil, "w") as changed:
        for name in good.namelist():
            content = good.read(name)
            if name.endswith("models/model.json"):
                content = re.sub(rb'("expr_str": ?")[^"]*', lambda match: match[1] + code, content, count=1)
            changed.writestr(name, content)
    args = ["--samples", str(sets / "held_out.npz"), "--reference", str(sets / "held_out.npz"), "--device", "cpu"]
    args += ["--feature-model", str(evil)]
    assert main(["evaluate", *args]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert (
        f"feature_model {evil} is a .pt2, and to load one runs code that it brings; --trust-feature-model" in error
    )
    assert not ran.exists()
    assert main(["evaluate", *args, "--trust-feature-model"]) == 2
    assert f"feature_model {evil} cannot be loaded" in capsys.readouterr().err.splitlines()[-1]
    assert ran.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("colour", r"^samples: feature_model .*\.pt2 does not take images \(64, 1, 8, 8\)"),
        ("static", r"does not take images \(64, 1, 8, 8\)"),
        ("maps", r"returns \(64, 6, 6, 6\); it must return \(64, F\)"),
        ("nan", r"^samples: features of image 0 of .*held_out\.npz are not finite"),
    ],
)
def test_feature_models_that_do_not_fit(sets, tmp_path, name, message):
    model, channels = {"colour": (nn.Flatten(), 3), "maps": (nn.Conv2d(1, 6, 3), 1)}.get(name, (nn.Flatten(), 1))
    if name == "nan":
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        nn.init.constant_(model[1].bias, math.nan)
    model_file = str(tmp_path / "model.pt2")
    export(model, model_file, channels, dynamic=name != "static")
    with pytest.raises(ValueError, match=message):
        run(sets, "held_out.npz", "held_out.npz", feature_model=model_file, trust_feature_model=True)


# InceptionV3: torch-fidelity's own network, with random weights.


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity")
    module = _torch_fidelity_module("feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # so that the last layers still tell images apart
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Two sets of coloured images, the second of another size."""
    folder = tmp_path_factory.mktemp("colours")
    for name, seeds, size in (("samples", range(10), (16, 16)), ("reference", range(10, 15), (24, 20))):
        np.savez(folder / f"{name}.npz", arr_0=np.stack([np.asarray(random_image(i, size)) for i in seeds]))
    return folder


def test_inception_without_torchvision(weights, colours, monkeypatch):
    """The features are the network's; spatial are the first channels of Mixed_6d, which Mixed_6e takes."""
    monkeypatch.setitem(sys.modules, "torchvision", None)  # its import would raise
    before = set(sys.modules)
    inception = Inception(weights, CPU)
    assert not any(name.startswith("torch_fidelity") for name in set(sys.modules) - before)
    taken = []
    inception.network.Mixed_6e.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    images = torch.from_numpy(np.load(colours / "samples.npz")["arr_0"][:3]).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = inception(images)
        pool, logits = inception.network(images)
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "pool": (3, 2048), "spatial": (3, 2023), "logits": (3, 1008),
    }  # fmt: skip
    assert torch.equal(features["pool"], pool)
    assert torch.equal(features["logits"], logits)
    assert torch.allclose(pool @ inception.network.fc.weight.T, logits, rtol=1e-4, atol=1e-4)  # no bias
    for channel in range(7):
        assert torch.equal(features["spatial"][:, channel::7], taken[0][:, channel].flatten(1))
    assert 0 < (features["spatial"] > 0).double().mean() < 1  # after its ReLU
    grey = inception(images[:, :1])["pool"]
    assert torch.allclose(grey, inception(images[:, :1].repeat(1, 3, 1, 1))["pool"], rtol=1e-5, atol=1e-5)


def small_sample_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Fréchet distance without covariances: tr (C·C')^½ is the nuclear norm of X·X'ᵀ/((n − 1)(n' − 1))^½."""
    X, Y = (x.double() - x.double().mean(0) for x in (a, b))
    n, m = len(X) - 1, len(Y) - 1
    shared = torch.linalg.svdvals(X @ Y.T).sum() / math.sqrt(n * m)
    shift = a.double().mean(0) - b.double().mean(0)
    return float(shift @ shift + X.square().sum() / n + Y.square().sum() / m - 2 * shared)


def test_evaluation_by_inception(weights, colours, tmp_path, capsys):
    """FID against ADM's statistics, sFID against images; all metrics from the features by other formulas."""
    inception = Inception(weights, CPU)
    with torch.no_grad():
        drawn, real = (
            inception(torch.from_numpy(np.load(colours / f"{name}.npz")["arr_0"]).permute(0, 3, 1, 2))
            for name in ("samples", "reference")
        )
    statistics = real["pool"].double() + 0.5
    reference = tmp_path / "reference.npz"
    np.savez(
        reference, arr_0=np.load(colours / "reference.npz")["arr_0"],
        mu=statistics.mean(0).numpy(), sigma=np.cov(statistics.numpy(), rowvar=False),
    )  # fmt: skip
    output = tmp_path / "evaluation.json"
    args = ["--samples", str(colours / "samples.npz"), "--reference", str(reference), "--output", str(output)]
    args += ["--inception-weights", str(weights), "--batch-size", "4", "--device", "cpu"]
    assert main(["evaluate", *args]) == 0
    report = json.loads(output.read_text())
    precision, recall = precision_recall(drawn["pool"], real["pool"])
    assert values(report) == pytest.approx(
        {
            "fid": small_sample_distance(drawn["pool"], statistics),
            "sfid": small_sample_distance(drawn["spatial"], real["spatial"]),
            "inception_score": inception_score(drawn["logits"], 10, 10)[0],
            "precision": precision,
            "recall": recall,
        },
        rel=1e-3,
    )
    assert report["metrics"]["fid"]["against"] == "given statistics, approximate"
    assert report["metrics"]["sfid"]["against"] == "the reference's images"
    assert report["metrics"]["inception_score"]["splits"] == 10
    assert report["reference"]["statistics"] == ["pool"]
    assert report["extractor"]["weights"] == str(weights)
    assert report["extractor"]["name"].startswith("InceptionV3 of torch-fidelity 0.")
    assert report["not_computed"] == {}
    out = capsys.readouterr().out
    assert "approximate against them" in out
    assert "Few samples: 10 images for 2048 features have a singular covariance" in out
    assert "The samples are 16×16×3, the reference is 20×24×3" in out


def test_what_is_not_computed_is_said(weights, sets, tmp_path, capsys, monkeypatch):
    """Nine grey images, fewer than splits, against statistics alone; the weights from torch.hub's cache."""
    monkeypatch.setattr("edt.evaluation.evaluator.frechet_distance", lambda a, b: float(len(b.mean)))  # 3 s each
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / "weights-inception-2015-12-05-6726825d.pth").symlink_to(weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    np.savez(tmp_path / "few.npz", arr_0=np.load(sets / "noise.npz")["arr_0"][:9])
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    report = run(tmp_path, "few.npz", "statistics.npz")
    assert values(report) == {"fid": 2048}
    assert report["not_computed"] == {
        "precision": "the reference has statistics alone, no images",
        "recall": "the reference has statistics alone, no images",
        "sfid": "the reference has neither statistics of spatial features nor images",
        "inception_score": "10 splits need as many images",
    }
    assert "Grey samples: InceptionV3 saw them repeated to three channels." in report["notes"]
    assert report["extractor"]["weights"] == str(cache / "weights-inception-2015-12-05-6726825d.pth")


def test_adm_statistics(tmp_path):
    mean, covariance = np.arange(4.0), np.eye(4, dtype=np.float32)
    np.savez(tmp_path / "a.npz", mu=mean, sigma=covariance, mu_s=mean[:2], sigma_s=2 * covariance[:2, :2])
    found = read_statistics("reference", tmp_path / "a.npz")
    assert {name: tuple(entry.mean.shape) for name, entry in found.items()} == {"pool": (4,), "spatial": (2,)}
    assert torch.equal(found["spatial"].covariance, 2 * torch.eye(2, dtype=torch.float64))
    assert INCEPTION_FEATURES == {"pool": 2048, "spatial": 2023}


# What does not work.


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


@needs_torch_fidelity
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no weights", "is no file of weights"),
        (pickle.dumps(Malicious(), protocol=2), "is no file of weights"),
        ([torch.zeros(2)], "is no file of weights; they must be tensors by name"),
        ({1: torch.zeros(2)}, "is no file of weights; they must be tensors by name"),
        ({"fc.weight": 2}, "is no file of weights; they must be tensors by name"),
        ({"fc.weight": torch.zeros(2)}, "has not the weights of torch-fidelity's InceptionV3"),
    ],
    ids=("text", "code", "list", "number", "no tensor", "other weights"),
)
def test_wrong_inception_weights(sets, tmp_path, capsys, content, message):
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        run(sets, "train.npz", "held_out.npz", inception_weights=path)
    assert "executed" not in capsys.readouterr().out


@needs_torch_fidelity
def test_downloaded_weights_that_are_damaged(sets, tmp_path, monkeypatch):
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.write_bytes(b"torn")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=rf"inception_weights {cached} is no file of weights"):
        run(sets, "train.npz", "held_out.npz")


def raises(error):
    def fail(*args, **kwargs):
        raise error

    return fail


NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory")
GONE = OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@needs_torch_fidelity
def test_weights_are_not_blamed_for_the_machine(weights, monkeypatch):
    for error, kind in ((GONE, OSError), (NO_MEMORY, MemoryError)):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", raises(error))
            with pytest.raises(kind, match=rf"inception_weights {weights} cannot be read"):
                Inception(weights, CPU)
    monkeypatch.setattr(nn.Module, "load_state_dict", raises(NO_MEMORY))
    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator"):
        Inception(weights, CPU)


def test_feature_models_are_not_blamed_for_the_machine(sets, tmp_path, monkeypatch):
    file = tmp_path / "model.pt2"
    export(nn.Flatten(), file)
    options = {"feature_model": str(file), "trust_feature_model": True}
    for where, error, kind in (
        ("zipfile.ZipFile", GONE, OSError),
        ("torch.export.load", GONE, OSError),
        ("torch.export.load", NO_MEMORY, MemoryError),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, raises(error))
            with pytest.raises(kind, match=rf"feature_model {file} cannot be read"):
                run(sets, sets / "held_out", sets / "held_out", **options)
    model = ExportedModel(file, CPU)
    for error, kind in ((NO_MEMORY, MemoryError), (torch.OutOfMemoryError("CUDA"), torch.OutOfMemoryError)):
        model.model = raises(error)
        with pytest.raises(kind, match=rf"feature_model {file} "):
            model(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_a_broken_feature_model(sets, tmp_path, capsys):
    """The end of a zip file alone, whose list of files is none."""
    file = tmp_path / "model.pt2"
    export(nn.Flatten(), file)
    content = file.read_bytes()
    start = content.rindex(b"PK\x05\x06")
    file.write_bytes(bytes(start) + content[start:])
    assert zipfile.is_zipfile(file)
    args = ["--samples", str(sets / "held_out.npz"), "--reference", str(sets / "held_out.npz"), "--device", "cpu"]
    assert main(["evaluate", *args, "--feature-model", str(file), "--trust-feature-model"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"feature_model {file} is not a .pt2 file of torch.export.save" in error


@needs_torch_fidelity
def test_failed_download(sets, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(RuntimeError, match=r"could not be downloaded to .*no network.* --inception-weights"):
        run(sets, "train.npz", "held_out.npz")


def test_missing_torch_fidelity(sets, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(RuntimeError, match=r"pip install 'edt-kernels\[evaluate\]'"):
        run(sets, "train.npz", "held_out.npz")


def write_header(path: Path, name: str, descr: str, shape: tuple[int, ...], mode: str = "w") -> None:
    """An .npz whose array declares a shape and has but 768 bytes."""
    with zipfile.ZipFile(path, mode) as archive, archive.open(f"{name}.npy", "w") as file:
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, header)
        file.write(bytes(768 if shape != (4, 8, 8, 3) else 700))


def save_sets(folder: Path, kind: str) -> Path:
    """Images or statistics with one fault."""
    array, path = np.zeros((4, 8, 8, 1), np.uint8), folder / "x.npz"
    arrays = {
        "floats": {"arr_0": array.astype(np.float32)},
        "three dimensions": {"arr_0": array[..., 0]},
        "four channels": {"arr_0": np.zeros((4, 8, 8, 4), np.uint8)},
        "latents": {"latents": array, "labels": np.zeros(4)},
        "one": {"arr_0": array[:1]},
        "fortran": {"arr_0": np.asfortranarray(np.zeros((4, 8, 8, 3), np.uint8))},
        "other dimension": {"mu": np.zeros(64), "sigma": np.eye(64)},
        "not square": {"mu": np.zeros(2048), "sigma": np.zeros((2048, 3))},
        "mu alone": {"mu": np.zeros(2048)},
        "nan statistics": {"mu": np.full(3, np.nan), "sigma": np.eye(3)},
        "no covariance": {"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))},
        "negative": {"mu": np.zeros(3), "sigma": -np.eye(3)},
        "no features": {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
        "objects": {"mu": np.array([None]), "sigma": np.array([[None]])},
        "object images": {"arr_0": np.array([None])},
    }
    headers = {
        "huge": ("|u1", (10**6, 10**5, 10**5, 3)),
        "shorter": ("|u1", (4, 8, 8, 3)),
        "below zero": ("|u1", (-4, -8, 8, 1)),
        "endless header": ("|u1", (4,) * 9999),
    }
    if kind in headers:
        write_header(path, "arr_0", *headers[kind])
        return path
    if kind == "huge statistics":
        write_header(path, "mu", "<f8", (10**6,))
        write_header(path, "sigma", "<f8", (10**6, 10**6), mode="a")
        return path
    if kind == "bzip2":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive, archive.open("arr_0.npy", "w") as file:
            np.lib.format.write_array(file, array)
        return path
    if kind == "pipe":
        os.mkfifo(path)
        return path
    if kind in arrays:
        np.savez(path, **arrays[kind])
    elif kind == "no npz":
        path.write_bytes(b"no zip")
    elif kind in ("truncated", "damaged"):
        noise = np.random.default_rng(0).integers(0, 256, (500, 8, 8, 1), dtype=np.uint8)
        np.savez_compressed(path, arr_0=noise)
        content = bytearray(path.read_bytes())
        content[9000] ^= 255
        path.write_bytes(content if kind == "damaged" else content[:9000])
    elif kind != "nowhere":
        path = folder / "images"
        path.mkdir()
        if kind != "empty":
            random_image(0, (8, 8), "L" if kind == "colour among grey" else "RGB").save(path / "0.png")
            other = random_image(1, (9, 8) if kind == "sizes" else (8, 8))
            if kind == "transparent":
                other.putalpha(7)
            if kind == "16 bits":
                other = Image.fromarray(np.zeros((8, 8), np.uint16))
            other.save(path / "1.png")
            if kind == "bomb":  # 10¹⁰ pixels, as its header has it
                content = bytearray((path / "1.png").read_bytes())
                content[16:24] = (100_000).to_bytes(4, "big") * 2
                content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
                (path / "1.png").write_bytes(content)
            if kind == "broken":
                (path / "1.png").write_bytes((path / "0.png").read_bytes()[:-30])
    return path


@pytest.mark.parametrize(
    ("option", "kind", "message"),
    [
        ("samples", "nowhere", "x.npz: there is no such file or folder"),
        ("samples", "no npz", "x.npz: it is neither an .npz nor a folder"),
        ("samples", "floats", "arr_0 is float32 (4, 8, 8, 1); it must be uint8 (N, H, W, C)"),
        ("samples", "three dimensions", "arr_0 is uint8 (4, 8, 8)"),
        ("samples", "four channels", "with C 1 or 3"),
        ("samples", "latents", "there is no arr_0, uint8 (N, H, W, C), in it, but latents, labels"),
        ("samples", "one", "there is one image in it; at least 2 are needed"),
        ("samples", "fortran", "Fortran order"),
        ("samples", "truncated", "x.npz"),
        ("samples", "damaged", "x.npz"),
        ("samples", "empty", "there are no images in it (.jpg, .jpeg, .png, "),
        ("samples", "sizes", "1.png: has 8×9 pixels, 0.png has 8×8; all images must be of one size"),
        ("samples", "colour among grey", "1.png: has colours, 0.png is grey"),
        ("samples", "transparent", "1.png: is transparent"),
        ("samples", "16 bits", "levels of more than 8 bits"),
        ("samples", "broken", "1.png: "),
        ("samples", "object images", "x.npz: arr_0: has object (1,); it must be an array of numbers"),
        ("samples", "huge", "x.npz: arr_0: is truncated (has 896 bytes; its header says 300000000000"),
        ("samples", "shorter", "x.npz: arr_0: is truncated (has 828 bytes; its header says 896)"),
        ("samples", "below zero", "x.npz: arr_0: has uint8 (-4, -8, 8, 1); it must be an array of numbers"),
        ("samples", "endless header", "x.npz: "),
        ("samples", "bzip2", "x.npz: arr_0: is compressed otherwise than numpy.savez"),
        ("samples", "pipe", "x.npz: it is neither an .npz nor a folder"),
        ("samples", "bomb", "1.png: "),
        ("reference", "huge statistics", "x.npz: mu: is truncated (has 896 bytes; its header says 8000128"),
        ("reference", "no covariance", "x.npz: sigma is no covariance"),
        ("reference", "negative", "x.npz: sigma is no covariance"),
        ("reference", "no features", "they must be (F,) and (F, F), F 1 to"),
        ("reference", "objects", "x.npz: mu: has object (1,); it must be an array of numbers"),
        ("reference", "other dimension", "has pool statistics of 64 features; InceptionV3 has 2048"),
        ("reference", "not square", "mu is (2048,), sigma is (2048, 3)"),
        ("reference", "mu alone", "there is no sigma in it beside mu"),
        ("reference", "nan statistics", "mu and sigma must be finite floats"),
    ],
)
def test_wrong_sets_are_one_line(sets, tmp_path, capsys, option, kind, message):
    path = save_sets(tmp_path, kind)
    paths = {"samples": sets / "held_out.npz", "reference": sets / "held_out.npz", option: path}
    if path.is_dir():
        paths["reference"] = path  # of the same shape
    args = [part for name, value in paths.items() for part in (f"--{name}", str(value))]
    pixels = ["--feature-model", "pixels"] if option == "samples" else []
    assert main(["evaluate", *args, *pixels, "--output", str(tmp_path / "o.json"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("edt: error: ")
    assert message in error
    assert str(path) in error
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"feature_model": "nowhere.pt2"}, "feature_model nowhere.pt2: there is no such file"),
        ({"batch_size": -(10**400)}, "it must be at least 1"),
        ({"feature_model": __file__}, "is not a .pt2 file of torch.export.save"),
        ({"inception_weights": Path("nowhere.pth")}, "inception_weights nowhere.pth: there is no such file"),
        ({"inception_weights": Path(__file__), "feature_model": "pixels"}, "exclude each other"),
        ({"output": Path(__file__).parent}, "it must be a file"),
        ({"device": "abacus"}, "device is 'abacus'"),
    ],
)
def test_wrong_options(sets, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(sets, "held_out.npz", "held_out.npz", **options)


def test_a_reference_that_the_feature_model_does_not_take_is_found_first(sets, tmp_path, monkeypatch):
    np.savez(tmp_path / "wider.npz", arr_0=np.zeros((5, 8, 9, 1), np.uint8))
    export(nn.Flatten(), tmp_path / "model.pt2")
    monkeypatch.setattr("edt.evaluation.evaluator.measure", raises(AssertionError("all features were computed")))
    options = {"feature_model": str(tmp_path / "model.pt2"), "trust_feature_model": True}
    with pytest.raises(ValueError, match=r"^reference: feature_model .* does not take images \(5, 1, 8, 9\)"):
        run(sets, "held_out.npz", tmp_path / "wider.npz", **options)


def test_all_headers_are_read_before_any_image(sets, tmp_path, monkeypatch):
    """What does not fit is found in seconds, in the reference too, before hours of features."""
    path = save_sets(tmp_path, "sizes")
    monkeypatch.setattr(
        "edt.evaluation.evaluator.measure", lambda *args, **options: pytest.fail("features were computed")
    )
    with pytest.raises(ValueError, match=r"1\.png: has 8×9 pixels"):
        run(sets, "held_out.npz", path, inception_weights=None)


def test_a_reference_of_any_sizes(tmp_path, capsys):
    """Cropped as edt extract does, and converted to the samples' channels."""
    save_images(tmp_path / "raw" / "a", 4)
    save_images(tmp_path / "raw" / "b", 3, first_seed=4)
    random_image(9, (50, 20), "CMYK").save(tmp_path / "raw" / "c.jpg")
    transparent = random_image(10, (30, 30))
    transparent.putalpha(7)
    transparent.save(tmp_path / "raw" / "d.png")
    for channels, mode in ((3, "RGB"), (1, "L")):
        manifest, _ = extract_images(tmp_path / "raw" / "a", tmp_path / mode, channels=channels)
        extracted = np.load(tmp_path / mode / manifest.shards[0].file)[:, 0]  # [4, C, 16, 16]
        (cropped,) = open_images("reference", tmp_path / "raw" / "a", (16, 16), channels).batches(10)
        assert np.array_equal(cropped, extracted.transpose(0, 2, 3, 1))
        samples = np.random.default_rng(0).integers(0, 256, (5, 16, 16, channels), dtype=np.uint8)
        np.savez(tmp_path / "samples.npz", arr_0=samples)
        arguments = ["--samples", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "raw")]
        arguments += ["--feature-model", "pixels", "--device", "cpu", "--output", str(tmp_path / "report.json")]
        assert main(["evaluate", *arguments, "--image-size", "16"]) == 0
        assert f"raw (folder): 9 images cropped to 16×16×{channels}" in capsys.readouterr().out
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["reference"]["cropped"]
        assert report["reference"]["shape"] == [16, 16, channels]
    assert main(["evaluate", *arguments]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "raw/a/001.jpg: has 40×33 pixels, a/000.png has 33×40; all images must be of one size (--image" in error


@pytest.mark.parametrize(
    ("size", "reference", "message"),
    [
        (
            (16,),
            "folder",
            "image_size makes the reference's images 16×16, samples .*s.npz are 8×8×1; they must be of",
        ),
        ((8, 9), "folder", "images 8×9, samples"),
        ((8,), "s.npz", r"image_size crops a folder of images; reference .*s\.npz is a file"),
        ((0,), "folder", r"image_size is \(0,\)"),
        ((8, 8, 8), "folder", r"image_size is \(8, 8, 8\); it must be one number, or height and width"),
        ((10**9,), "folder", r"of 1 to 16384"),
    ],
)
def test_wrong_image_sizes(tmp_path, size, reference, message):
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    save_images(tmp_path / "folder", 3)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "s.npz", reference, image_size=size, feature_model="pixels")


def test_what_will_be_missing_is_said_first(tmp_path, capsys, monkeypatch):
    """Before any features are computed, and in the report again."""
    for name, side in (("samples", 8), ("reference", 9)):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.zeros((3, side, side, 3), np.uint8))
    said = [
        "no precision: each set needs more than 3 images",
        "no recall: each set needs more than 3 images",
        "no Inception Score: 10 splits need as many images",
        "Few samples: 3 images for 2048 features",
        "Few reference: 3 images for 2048 features",
        "The samples are 8×8×3, the reference is 9×9×3.",
    ]
    monkeypatch.setattr("edt.evaluation.evaluator.Inception", lambda *args: None)

    def interrupted(*args, **options):
        lines = capsys.readouterr().err.splitlines()
        assert [line.startswith(f"edt: {text}") for line, text in zip(lines, said, strict=True)] == [True] * 6
        raise KeyboardInterrupt

    monkeypatch.setattr("edt.evaluation.evaluator.measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "samples.npz", "reference.npz")


def test_headers_are_read_some_at_a_time(tmp_path, monkeypatch):
    for i in range(5):
        random_image(i, (8, 8)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr("edt.evaluation.image_sets._WAITING", 2)
    assert open_images("samples", tmp_path).count == 5
    random_image(4, (8, 9)).save(tmp_path / "4.png")
    with pytest.raises(ValueError, match=r"4\.png: has 9×8 pixels"):
        open_images("samples", tmp_path)


@pytest.mark.parametrize(
    ("length", "content"), [(2**28, b" " * 2**26), (9000, b"-" * 9000)], ids=("of gigabytes", "deep")
)
def test_a_header_that_is_none(tmp_path, length, content):
    """One that says so does not take gigabytes; one that Python's parser gives up on is the file's fault."""
    content = np.lib.format.magic(2, 0) + length.to_bytes(4, "little") + content
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", content)
    tracemalloc.start()
    said = pytest.raises(ValueError, match=r"is truncated or no \.npy file")
    with zipfile.ZipFile(tmp_path / "x.npz") as archive, archive.open("arr_0.npy") as stream, said:
        parse_npy_header(stream, len(content))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


def test_an_npz_is_not_blamed_for_a_mount_that_went_away(sets, monkeypatch):
    monkeypatch.setattr(zipfile, "ZipFile", raises(GONE))
    for read in (open_images, read_statistics):
        with pytest.raises(OSError, match=r"samples .*held_out\.npz cannot be read: Stale") as caught:
            read("samples", sets / "held_out.npz")
        assert caught.value.errno == errno.ESTALE


@pytest.mark.parametrize("content", [b'{"samples": []}', b"[]", b"{", b'{"num_images": 2, "steps": 3}'])
def test_images_beside_another_programs_samples_json(tmp_path, content):
    """All of the folder is read; of edt sample's own set, what is in images/."""
    for name in ("a.png", "images/b.png", "data/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        random_image(0, (8, 8)).save(tmp_path / name)
    (tmp_path / "images" / "d.png").symlink_to("b.png")
    (tmp_path / "samples.json").write_bytes(content)
    assert open_images("samples", tmp_path).count == 4
    ours = {"num_images": 2, "weights": {}, "classes": [0], "steps": 3, "seed": 0}
    (tmp_path / "samples.json").write_text(json.dumps(ours))
    images = open_images("samples", tmp_path)
    assert [file.name for file in images.files] == ["b.png", "d.png"]


def test_features_that_are_not_finite_are_named(tmp_path):
    """With the set and the file; and those of a reference whose statistics are given too."""
    for i in range(5):
        random_image(i, (8, 8)).save(tmp_path / f"{i}.png")
    images = open_images("reference", tmp_path)
    seen = []

    def infinite(batch):
        seen.extend(batch)
        features = torch.zeros(len(batch), 3)
        if len(seen) > 3:
            features[3 - len(seen), 1] = math.inf
        return {"pool": features}

    with pytest.raises(ValueError, match=rf"^reference: features of {tmp_path}/3\.png are not finite$"):
        measure("reference", images, infinite, batch_size=2, device=CPU, keep_pool=True, skip={"pool"})


def test_fewer_large_images_at_a_time(sets, monkeypatch):
    monkeypatch.setattr("edt.evaluation.evaluator._BATCH_BYTES", 200)
    images = open_images("samples", sets / "held_out.npz")
    sizes = set()

    def features(batch):
        sizes.add(len(batch))
        return {"pool": torch.zeros(len(batch), 1)}

    measure("samples", images, features, batch_size=64, device=CPU, keep_pool=False)
    assert sizes == {3}
    monkeypatch.setattr("edt.evaluation.evaluator._BATCH_BYTES", 1)
    measure("samples", images, features, batch_size=64, device=CPU, keep_pool=False)
    assert sizes == {3, 1}


class View(nn.Module):
    """As exported, it takes images in no other strides than their own."""

    def forward(self, images):
        return images.view(images.shape[0], -1)


def test_feature_models_of_coloured_images(colours, tmp_path):
    program = torch.export.export(
        View(), (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, tmp_path / "model.pt2")
    options = {"feature_model": str(tmp_path / "model.pt2"), "trust_feature_model": True, "batch_size": 3}
    samples = colours / "samples.npz"  # the last batch is one image
    assert values(run(colours, samples, samples, **options))["frechet_distance"] == pytest.approx(0, abs=1e-4)


class Rows(nn.Module):
    """As many features as rows."""

    def forward(self, images):
        return images.mean((1, 3))


def test_features_of_other_shapes_and_products(sets, tmp_path, monkeypatch):
    np.savez(tmp_path / "higher.npz", arr_0=np.zeros((5, 9, 8, 1), np.uint8))
    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("rows")},)
    program = torch.export.export(Rows(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    options = {"feature_model": str(tmp_path / "model.pt2"), "trust_feature_model": True}
    said = "frechet_distance of samples and reference: statistics are of 9 and of 8 features"
    with monkeypatch.context() as patch:
        patch.setattr("edt.evaluation.evaluator.measure", raises(AssertionError("all features were computed")))
        with pytest.raises(ValueError, match=said):
            run(sets, tmp_path / "higher.npz", "held_out.npz", **options)
    model = ExportedModel(tmp_path / "model.pt2", CPU)
    model.model = lambda images: images[:, :0, 0, 0]
    with pytest.raises(ValueError, match=r"returns \(2, 0\); it must return \(2, F\)"):
        model(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    precisions = []

    def exactly(images):
        precisions.append(torch.backends.cudnn.conv.fp32_precision)
        return images.flatten(1)

    model.model = exactly
    model(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert precisions == ["ieee"]


def test_a_disk_that_fails_is_no_bad_image(tmp_path, monkeypatch):
    """As of a mount that went away."""
    for i in range(2):
        random_image(i, (8, 8)).save(tmp_path / f"{i}.png")
    images = open_images("samples", tmp_path)

    def fail(*args):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(OSError, match=r"0\.png cannot be read: Stale file handle") as caught:
        list(images.batches(2))
    assert caught.value.errno == errno.ESTALE
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="cannot be read: Stale file handle"):
        open_images("samples", tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b'{"name": "my package"}', b"\xff\xfe\x00", b"{",
     b'{"samples": [1], "reference": "a book", "metrics": {}}'],
)  # fmt: skip
def test_output_that_is_no_report_stays(sets, tmp_path, content):
    output = tmp_path / "package.json"
    output.write_bytes(content)
    with pytest.raises(ValueError, match=r"package\.json is there and no report of edt evaluate; give another"):
        run(sets, "held_out.npz", "held_out.npz", feature_model="pixels", output=output)
    assert output.read_bytes() == content


def test_a_report_is_replaced(sets, tmp_path):
    output = tmp_path / "report.json"
    report = run(sets, "noise.npz", "held_out.npz", feature_model="pixels", output=output)
    assert report.keys() == json.loads(output.read_text()).keys() == _REPORT
    run(sets, "held_out.npz", "held_out.npz", feature_model="pixels", output=output)
    assert json.loads(output.read_text())["samples"]["path"].endswith("held_out.npz")


def test_output_that_cannot_be_written_is_found_first(sets, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output .*file/o\.json cannot be written: "):
        run(sets, "held_out.npz", "held_out.npz", feature_model="pixels", output=tmp_path / "file" / "o.json")
    with pytest.raises(
        ValueError, match="output /dev/null is a device or a link that leads nowhere; it must be a file"
    ):
        run(sets, "held_out.npz", "held_out.npz", feature_model="pixels", output=Path("/dev/null"))
    images = sets / "held_out.npz"
    with pytest.raises(OSError, match=r"output .*nnn cannot be written: File name too long"):
        EvaluateOptions(images, images, feature_model="pixels", output=tmp_path / ("n" * 300)).check()


def test_names_that_are_no_utf8(sets, tmp_path):
    """And bear a terminal's escapes: printed by any encoding, and stored."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gar\xe7on\x1b[31m"))
    folder.mkdir()
    np.savez(folder / "a.npz", arr_0=np.load(sets / "held_out.npz")["arr_0"])
    report = run(sets, folder / "a.npz", "held_out.npz", feature_model="pixels", output=folder / "o.json")
    text = format_report(report)
    text.encode()
    assert r"gar\udce7on\x1b[31m" in text
    assert json.loads((folder / "o.json").read_text())["samples"]["path"] == str(folder / "a.npz")


def test_statistics_beyond_floats():
    far = Gaussian(torch.full((2,), 1e200, dtype=torch.float64), torch.eye(2).double())
    near = Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    with pytest.raises(ValueError, match="distance is not finite"):
        frechet_distance(far, near)
    wide = Gaussian(near.mean, 1e200 * near.covariance)
    with pytest.raises(ValueError, match="product is not finite"):
        frechet_distance(wide, wide)


def test_sets_that_do_not_go_together(sets, colours, tmp_path):
    with pytest.raises(ValueError, match="samples are 16×16×3, the reference is 8×8×1; pixels need"):
        run(sets, colours / "samples.npz", "held_out.npz", feature_model="pixels")
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match=r"there is no arr_0, .* in it, but mu, sigma"):
        run(sets, "held_out.npz", tmp_path / "statistics.npz", feature_model="pixels")
    np.savez(tmp_path / "few.npz", arr_0=np.load(sets / "noise.npz")["arr_0"][:3])
    report = run(sets, tmp_path / "few.npz", "held_out.npz", feature_model="pixels")
    assert report["not_computed"]["precision"] == "each set needs more than 3 images"
    assert any(note.startswith("Few samples: 3 images for 64 features") for note in report["notes"])


SLOW = """
import sys, time
from pathlib import Path
from edt.cli import main
from edt.evaluation.evaluator import Pixels
def slow(self, images):
    Path(sys.argv[-1]).touch()
    time.sleep(0.2)
    return {"pool": images.flatten(1).float()}
Pixels.__call__ = slow
sys.exit(main(sys.argv[1:-1]))
"""


def test_interrupt(sets, tmp_path):
    args = ["--samples", str(sets / "train.npz"), "--reference", str(sets / "held_out.npz"), "--feature-model",
            "pixels", "--batch-size", "1", "--output", str(tmp_path / "o.json"), "--device", "cpu"]  # fmt: skip
    begun = tmp_path / "begun"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "evaluate", *args, str(begun)],
        cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not begun.exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert error.splitlines()[-1] == "edt: interrupted; nothing was written"
    assert "Traceback" not in error
    assert not (tmp_path / "o.json").exists()
