import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from disks import small_disk
from image_folders import SIZES, random_image, run, save_images, save_vae
from PIL import Image

import edt.data.shards
import edt.data.sources
from edt.cli import main
from edt.data.dataset import open_dataset, to_latents, verify_dataset
from edt.data.extraction import summary
from edt.data.shards import read_manifest
from edt.data.sources import center_crop, to_pixels

COUNT = 11


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    return str(save_vae(tmp_path_factory.mktemp("vae") / "tiny"))


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """Two classes, the second with a folder below it; and files that are no images."""
    folder = tmp_path_factory.mktemp("images") / "train"
    save_images(folder / "zebra", 5)
    save_images(folder / "ant", 4, first_seed=5)
    save_images(folder / "zebra" / "more", 2, first_seed=9)
    (folder / "ant" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    return folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "flat"
    save_images(folder, COUNT)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the lock's, which has the number of the process."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def all_items(dataset, view: int = 0):
    return dataset.read(np.arange(len(dataset)), np.full(len(dataset), view))


def adm_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """ADM's crop for two sides: box filter by hand, bicubic by torch's antialiased filter (a = −0.5, as PIL's),
    rounded after each direction, the width first and a half up, as PIL rounds."""
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].double()
    while x.shape[2] >= 2 * height and x.shape[3] >= 2 * width:
        x = box(box(x, 3), 2)
    factor = max(height / x.shape[2], width / x.shape[3])
    rows, columns = round(x.shape[2] * factor), round(x.shape[3] * factor)
    for out in ((x.shape[2], columns), (rows, columns)):
        x = torch.nn.functional.interpolate(x, out, mode="bicubic", antialias=True).clip(0, 255).add(0.5).floor()
    top, left = (rows - height) // 2, (columns - width) // 2
    return x[0, :, top : top + height, left : left + width].numpy()


def box(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Half as many pixels: each the mean of those whose centres lie in it. (On the border of two, PIL's
    rounding decides: so it is for the middle of an odd length with an even half.)"""
    length = x.shape[axis]
    cell = ((torch.arange(length) + 0.5) * (length // 2) / length).long()
    weights = torch.nn.functional.one_hot(cell).double()
    mean = torch.tensordot(x, weights / weights.sum(0), dims=([axis], [0])).movedim(-1, axis)
    return (mean + 0.5).floor()


@pytest.mark.parametrize("size", [(17, 17), (16, 24), (25, 9)])
@pytest.mark.parametrize("source", [(33, 47), (143, 79), (143, 300), (17, 200), (11, 13), (70, 34)])
def test_center_crop(size, source):
    pixels = np.asarray(random_image(sum(source), source[::-1]))
    cropped = to_pixels(Image.fromarray(pixels), size, 3).astype(int)
    assert cropped.shape == (3, *size)
    assert np.abs(cropped - adm_crop(pixels, *size)).max() <= 1  # levels: PIL has weights of 22 bits


def test_center_crop_keeps_an_image_of_the_size():
    image = random_image(0, (24, 16))
    assert np.array_equal(np.asarray(center_crop(image, (16, 24))), np.asarray(image))


@pytest.mark.parametrize("size", [(256, 256), (16, 24)])
@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (3, 700), (900, 30)])
def test_long_thin_images(shape, size, monkeypatch):
    """Their middle alone is scaled: never more than 16 times the pixels that are kept."""
    areas, resize = [], Image.Image.resize

    def record(image, wanted, *args, **kwargs):
        areas.append(wanted[0] * wanted[1])
        return resize(image, wanted, *args, **kwargs)

    pixels = np.asarray(random_image(1, shape[::-1]))
    monkeypatch.setattr(Image.Image, "resize", record)
    cropped = to_pixels(Image.fromarray(pixels), size, 3).astype(int)
    assert max(areas) <= max(16 * size[0] * size[1], shape[0] * shape[1] // 4)
    if max(shape) < 1000:
        assert np.abs(cropped - adm_crop(pixels, *size)).max() <= 2  # Pillow may begin with the other direction
    else:  # what is kept is a part of one pixel's width, or little more
        middle = pixels[shape[0] // 2, shape[1] // 2].astype(int)
        assert np.abs(cropped - middle[:, None, None]).max() <= 8


@pytest.mark.parametrize("workers", [0, 2])
def test_latents_are_the_posterior_of_each_view(classes, vae, tmp_path, workers):
    manifest, worked = run(classes, tmp_path / "data", vae=vae, shard_size=4, num_workers=workers, batch_size=3)
    assert worked
    dataset = open_dataset(tmp_path / "data")
    verify_dataset(dataset, progress=False)
    paths = [f"ant/{i:03d}" for i in range(4)] + [f"zebra/{i:03d}" for i in range(5)]
    paths += [f"zebra/more/{i:03d}" for i in range(2)]
    assert (len(dataset), dataset.num_classes, dataset.class_names) == (11, 2, ("ant", "zebra"))
    assert dataset.labels.tolist() == [0] * 4 + [1] * 7
    assert (dataset.latent_shape, dataset.num_views) == ((4, 8, 8), 2)
    assert [shard.count for shard in manifest.shards] == [4, 4, 3]
    assert (manifest.scaling_factor, manifest.shift_factor, manifest.encode_dtype) == (0.75, 0.125, "float32")

    model = AutoencoderKL.from_pretrained(vae).eval()
    for index, path in enumerate(paths):
        file = next(file for file in classes.rglob("*.*") if file.with_suffix("") == classes / path)
        pixels = torch.from_numpy(to_pixels(Image.open(file), (16, 16), 3)).float() / 127.5 - 1
        for view, image in enumerate((pixels, pixels.flip(-1))):
            with torch.no_grad():
                posterior = model.encode(image[None]).latent_dist
            stored = dataset.read([index], [view])["latents"].float()
            expected = torch.cat([posterior.mean, posterior.std], dim=1)
            assert torch.allclose(stored, expected, rtol=2**-10, atol=1e-5)
    assert not torch.equal(all_items(dataset, 0)["latents"], all_items(dataset, 1)["latents"].flip(-1))


def test_one_fixed_sample(flat, vae, tmp_path):
    """Of mean and std as they are stored otherwise, and the same for any shards and batches."""
    run(flat, tmp_path / "moments", vae=vae)
    run(flat, tmp_path / "sample", vae=vae, moments=False, seed=7)
    run(flat, tmp_path / "other", vae=vae, moments=False, seed=7, shard_size=3, batch_size=2)
    moments = all_items(open_dataset(tmp_path / "moments"), 1)["latents"].float()
    dataset = open_dataset(tmp_path / "sample")
    sample = all_items(dataset, 1)["latents"].float()
    mean, std = moments.chunk(2, dim=1)
    noise = (sample - mean) / std
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    assert torch.allclose(
        sample, all_items(open_dataset(tmp_path / "other"), 1)["latents"].float(), rtol=2**-9, atol=1e-4
    )
    assert torch.equal(to_latents(sample.half(), dataset), (sample - 0.125) * 0.75)


def test_rectangular_latents_with_images(classes, vae, tmp_path):
    run(classes, tmp_path / "data", vae=vae, image_size=(16, 32), store_images=True, flips=False, shard_size=5)
    dataset = open_dataset(tmp_path / "data", with_images=True)
    assert (dataset.latent_shape, dataset.num_views) == ((4, 8, 16), 1)
    images = all_items(dataset)["images"]
    assert (images.shape, images.dtype) == ((11, 3, 16, 32), torch.uint8)
    first = to_pixels(Image.open(classes / "ant" / "000.png"), (16, 32), 3)
    assert np.array_equal(images[0].numpy(), first)


def test_vae_in_bfloat16_from_a_subfolder(flat, vae, tmp_path):
    shutil.copytree(vae, tmp_path / "pipeline" / "vae")
    options = {"vae": str(tmp_path / "pipeline"), "vae_subfolder": "vae", "encode_dtype": "bfloat16"}
    manifest, _ = run(flat, tmp_path / "data", **options)
    run(flat, tmp_path / "exact", vae=vae)
    assert manifest.encode_dtype == "bfloat16"
    coarse, exact = (all_items(open_dataset(tmp_path / name))["latents"].float() for name in ("data", "exact"))
    assert not torch.equal(coarse, exact)
    assert (coarse - exact).norm() < 0.03 * exact.norm()


def test_grey_pixels_without_classes(flat, tmp_path):
    manifest, _ = run(flat, tmp_path / "data", channels=1)
    dataset = open_dataset(tmp_path / "data")
    assert (manifest.kind, manifest.views, manifest.mirror) == ("pixels", 1, True)
    assert (dataset.num_classes, dataset.class_names, dataset.num_views) == (0, (), 2)
    assert dataset.labels.tolist() == [0] * COUNT
    raw = all_items(dataset)["latents"]
    assert (raw.shape, raw.dtype) == ((COUNT, 1, 16, 16), torch.uint8)
    assert np.array_equal(raw[0].numpy(), to_pixels(Image.open(flat / "000.png"), (16, 16), 1))
    assert torch.equal(all_items(dataset, 1)["latents"], raw.flip(-1))


@pytest.mark.parametrize("labels", ["names", "strings", "numbers", "none"])
def test_hugging_face_dataset(tmp_path, labels):
    import datasets

    image, label = datasets.Image(), datasets.ClassLabel(names=["cat", "bat"])
    values = {"names": [0, 1, 0, 1], "strings": ["cat", "bat", "cat", "bat"], "numbers": [4, 1, 4, 1]}
    column = {} if labels == "none" else {"kind": values[labels]}
    features = {"picture": image, **({"kind": label} if labels == "names" else {})}
    images = [random_image(i, SIZES[i]) for i in range(4)]
    table = datasets.Dataset.from_dict({"picture": images, **column})
    table = table.cast(datasets.Features({**table.features, **features}))
    datasets.DatasetDict(train=table.select(range(1)), test=table).save_to_disk(tmp_path / "source")

    options = {"split": "test", "image_column": "picture", "label_column": "kind" if column else None}
    run(tmp_path / "source", tmp_path / "data", **options)
    dataset = open_dataset(tmp_path / "data")
    expected = {
        "names": ([0, 1, 0, 1], ("cat", "bat")),
        "strings": ([1, 0, 1, 0], ("bat", "cat")),
        "numbers": ([4, 1, 4, 1], ("0", "1", "2", "3", "4")),
        "none": ([0, 0, 0, 0], ()),
    }
    assert (dataset.labels.tolist(), dataset.class_names) == expected[labels]
    pixels = np.stack([to_pixels(image, (16, 16), 3) for image in images])
    assert np.array_equal(all_items(dataset)["latents"].numpy(), pixels)


def write_table(folder: Path, labels: list, feature=None, images: list | None = None) -> Path:
    import datasets

    images = [random_image(0, SIZES[0])] * len(labels) if images is None else images
    features = datasets.Features(image=datasets.Image(), label=feature or datasets.Value("int64"))
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).save_to_disk(folder)
    return folder


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([], "int64", "without rows"),
        ([0, -1], "int64", "the label -1, which stands for none, as in test splits; give a split"),
        ([0, 10**12], "int64", "reaches from 0 to 1000000000000; 1000000 classes need 0 to 999999"),
        ([0, None], "int64", "has None; it needs integers throughout"),
        (["a", None], "string", "has None; it needs integers throughout, or strings"),
        ([0.0, 1.0], "float32", "label_column 'label' is .*float32.*; it needs integers or strings"),
        ([True, False], "bool", "label_column 'label' is .*bool"),
    ],
)
def test_labels_of_a_hugging_face_dataset_that_are_none(tmp_path, labels, kind, message):
    import datasets

    source = write_table(tmp_path / "source", labels, datasets.Value(kind))
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_rows_without_an_image(tmp_path):
    source = write_table(tmp_path / "source", [0, 1], images=[random_image(0, SIZES[0]), None])
    manifest, _ = run(source, tmp_path / "data")
    assert manifest.skipped == {"count": 1, "files": [{"path": "1", "reason": "has no image"}]}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", "", r"state\.json is no JSON, or torn"),
        ("state.json", "[1]", r"state\.json is JSON, but list"),
        ("state.json", "{}", r"state\.json has _data_files None"),
        ("state.json", '{"_data_files": [{"filename": "../secret"}]}', r"names the file '\.\./secret'"),
        ("state.json", '{"_data_files": [{"filename": "/dev/zero"}]}', "names the file '/dev/zero'"),
        ("state.json", '{"_data_files": [{"filename": "nothing"}]}', r"has no file nothing"),
        ("dataset_info.json", "{", r"dataset_info\.json is no JSON"),
        ("dataset_dict.json", '{"splits": 3}', r"dataset_dict\.json has splits 3"),
        ("dataset_dict.json", '{"splits": ["test"]}', "split is 'train'; source .* has test"),
        ("data-00000-of-00001.arrow", "x", "is no dataset that save_to_disk wrote"),
    ],
)
def test_damaged_hugging_face_datasets(tmp_path, file, content, message):
    source = write_table(tmp_path / "source", [0, 1])
    (source / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "data")


NUMBERED = tuple(map(str, range(12)))


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (NUMBERED, NUMBERED),
        (("8", "07", "007", "10"), ("007", "07", "8", "10")),
        (("10", "9", "ant"), ("10", "9", "ant")),
        (("n02", "n1"), ("n02", "n1")),
    ],
)
@pytest.mark.parametrize("kind", ["folders", "strings"])
def test_order_of_classes(tmp_path, names, ordered, kind):
    """As numbers where all are numbers, else as text."""
    import datasets

    source = tmp_path / "source"
    if kind == "folders":
        for i, name in enumerate(names):
            save_images(source / name, 1, first_seed=i)
    else:
        write_table(source, list(names), datasets.Value("string"))
    run(source, tmp_path / "data")
    dataset = open_dataset(tmp_path / "data")
    assert dataset.class_names == ordered
    assert [ordered[label] for label in dataset.labels] == list(ordered if kind == "folders" else names)


def test_an_extraction_begun_in_another_order_of_classes_does_not_go_on(tmp_path, monkeypatch):
    for name in ("2", "10"):
        save_images(tmp_path / "images" / name, 1)
    monkeypatch.setattr("edt.data.sources.in_class_order", sorted)
    run(tmp_path / "images", tmp_path / "data")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"begun with names_and_labels .* or the order of the classes is"):
        run(tmp_path / "images", tmp_path / "data")


def test_labels_that_are_all_equal_and_none_at_all(tmp_path):
    """Their numbers are the same."""
    write_table(tmp_path / "source", [0, 0])
    run(tmp_path / "source", tmp_path / "data")
    with pytest.raises(ValueError, match="begun with other names of the classes"):
        run(tmp_path / "source", tmp_path / "data", label_column=None)


def test_hugging_face_dataset_errors(tmp_path, capsys, monkeypatch):
    import datasets

    table = datasets.Dataset.from_dict({"picture": [random_image(0, SIZES[0])], "label": [0]})
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "source")
    with pytest.raises(ValueError, match=r"image_column is 'image'; source .* has picture, label"):
        run(tmp_path / "source", tmp_path / "data")
    with pytest.raises(ValueError, match=r"split is 'test'; source .* has train"):
        run(tmp_path / "source", tmp_path / "data", split="test")
    with pytest.raises(ValueError, match=r"label_column is 'kind'; .*None if there are no labels"):
        run(tmp_path / "source", tmp_path / "data", image_column="picture", label_column="kind")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"pip install 'edt-kernels\[data\]'"):
        run(tmp_path / "source", tmp_path / "data")


@pytest.fixture
def released(tmp_path) -> tuple[Path, Path, np.ndarray]:
    """12 features with labels, of which none is class 0 or 3."""
    features, labels = tmp_path / "imagenet_features", tmp_path / "imagenet_labels"
    features.mkdir()
    labels.mkdir()
    values = np.random.default_rng(0).standard_normal((12, 1, 4, 32, 32), np.float32)
    for i, value in enumerate(values):
        np.save(features / f"{i}.npy", value)
        np.save(labels / f"{i}.npy", np.array([1 + i % 2]))
    return features, labels, values[:, 0]


def test_released_features(released, tmp_path):
    features, labels, values = released
    run(features, tmp_path / "data", npy_labels=labels, shard_size=5)
    dataset = open_dataset(tmp_path / "data")
    assert (dataset.num_classes, dataset.num_views, dataset.latent_shape) == (3, 1, (4, 32, 32))
    assert dataset.labels.tolist() == [1, 2] * 6
    raw = all_items(dataset)["latents"]
    assert np.array_equal(raw.numpy(), values.astype(np.float16))
    assert torch.equal(to_latents(raw, dataset), raw.float())
    run(features, tmp_path / "thousand", npy_labels=labels, num_classes=1000)
    assert open_dataset(tmp_path / "thousand").num_classes == 1000


def test_broken_released_features_are_skipped(released, tmp_path):
    features, labels, _ = released
    (features / "3.npy").write_bytes((features / "3.npy").read_bytes()[:-10])
    np.save(features / "4.npy", np.full((1, 4, 32, 32), np.nan, np.float32))
    np.save(labels / "6.npy", np.array([-1]))
    manifest, _ = run(features, tmp_path / "data", npy_labels=labels)
    assert manifest.count == 9
    assert [file["path"] for file in manifest.skipped["files"]] == [f"{i}.npy" for i in (3, 4, 6)]
    (labels / "7.npy").unlink()
    with pytest.raises(ValueError, match=r"7\.npy, which is not in .*imagenet_labels"):
        run(features, tmp_path / "other", npy_labels=labels)


@pytest.mark.parametrize("broken", [False, True])
def test_released_features_of_two_shapes(released, tmp_path, broken):
    """Which of them are right cannot be told: the first may be the odd one."""
    features, labels, _ = released
    if broken:
        (features / "0.npy").write_bytes(b"")
    first = 1 if broken else 0
    np.save(features / f"{first}.npy", np.zeros((1, 4, 64, 64), np.float32))
    message = rf"{first + 1}\.npy: has features of shape \(4, 32, 32\), and {first}\.npy .* \(4, 64, 64\)"
    with pytest.raises(ValueError, match=message):
        run(features, tmp_path / "data", npy_labels=labels)


def npy(shape: str, data: bytes = b"", descr: str = "'<f4'", order: bool = False) -> bytes:
    """An .npy file whose header says this."""
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"is truncated or no \.npy file"),
        (b"404: not found", r"is truncated or no \.npy file"),
        (npy("(1, 4, 32, 32)"), r"is truncated .has \d+ bytes"),
        (npy("(1, 4, 1000000, 1000000)"), r"its header says 16000000\d+"),
        (npy("(1, -4, 32, 32)"), "must be an array of numbers"),
        (npy("(True, 1, 1, 1)", bytes(4)), "must be an array of numbers"),
        (npy("(1,)", bytes(8), "'O'"), "must be an array of numbers"),
        (npy("(1, 0, 32, 32)"), r"needs floats \(1, C, H, W\)"),
        (npy("(", bytes(4)), r"is truncated or no \.npy file"),
    ],
)
@pytest.mark.parametrize("index", [0, 5])
def test_any_broken_npy_file_is_skipped(released, tmp_path, content, reason, index):
    """The first as well; and no memory is taken for what a header says."""
    features, labels, values = released
    (features / f"{index}.npy").write_bytes(content)
    manifest, _ = run(features, tmp_path / "data", npy_labels=labels)
    assert (manifest.count, manifest.skipped["count"]) == (11, 1)
    assert manifest.skipped["files"][0]["path"] == f"{index}.npy"
    assert re.search(reason, manifest.skipped["files"][0]["reason"])
    stored = all_items(open_dataset(tmp_path / "data"))["latents"].numpy()
    assert np.array_equal(stored, np.delete(values, index, axis=0).astype(np.float16))


def test_npy_files_of_other_orders(released, tmp_path):
    features, labels, values = released
    np.save(features / "0.npy", values[:1].astype(">f8"))
    np.save(features / "1.npy", np.asfortranarray(values[1:2]))
    run(features, tmp_path / "data", npy_labels=labels)
    stored = all_items(open_dataset(tmp_path / "data"))["latents"].numpy()
    assert np.array_equal(stored, values.astype(np.float16))


@pytest.mark.parametrize("label", [10**12, 10**6, -1, 2**63 - 1, True, 0.0])
def test_labels_of_npy_files_that_are_none(released, tmp_path, label):
    features, labels, _ = released
    np.save(labels / "3.npy", np.array([label]))
    manifest, _ = run(features, tmp_path / "data", npy_labels=labels)
    assert (manifest.count, manifest.num_classes, manifest.skipped["count"]) == (11, 3, 1)
    assert "label" in manifest.skipped["files"][0]["reason"]


def test_no_npy_file_readable(released, tmp_path):
    features, labels, _ = released
    for file in features.iterdir():
        file.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"none of 12 files of source .*features could be read; the first is 0\.npy"
    ):
        run(features, tmp_path / "data", npy_labels=labels)


def test_unreadable_images_are_skipped_and_listed(tmp_path):
    save_images(tmp_path / "images", 9)
    (tmp_path / "images" / "001.jpg").write_bytes(b"no image")
    whole = (tmp_path / "images" / "003.png").read_bytes()
    (tmp_path / "images" / "003.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(tmp_path / "images" / "006.png")
    manifest, _ = run(tmp_path / "images", tmp_path / "data", shard_size=2, num_workers=2)
    assert (manifest.count, manifest.skipped["count"]) == (6, 3)
    reasons = {file["path"]: file["reason"] for file in manifest.skipped["files"]}
    assert list(reasons) == ["001.jpg", "003.png", "006.png"]
    assert reasons["001.jpg"].startswith("UnidentifiedImageError")
    assert "truncated" in reasons["003.png"]
    assert "8 bits" in reasons["006.png"]
    dataset = open_dataset(tmp_path / "data")
    kept = [0, 2, 4, 5, 7, 8]
    files = [next((tmp_path / "images").glob(f"{i:03d}.*")) for i in kept]
    pixels = np.stack([to_pixels(Image.open(file), (16, 16), 3) for file in files])
    assert np.array_equal(all_items(dataset)["latents"].numpy(), pixels)


def test_mended_images_are_read_again_when_asked(tmp_path):
    save_images(tmp_path / "images", 6)
    mended = (tmp_path / "images" / "001.jpg").read_bytes()
    (tmp_path / "images" / "001.jpg").write_bytes(b"no image")
    manifest, _ = run(tmp_path / "images", tmp_path / "data", shard_size=2)
    kept = (tmp_path / "data" / "data-00001.npy").stat().st_mtime_ns
    (tmp_path / "images" / "001.jpg").write_bytes(mended)
    assert run(tmp_path / "images", tmp_path / "data", shard_size=2) == (manifest, False)
    again, worked = run(tmp_path / "images", tmp_path / "data", shard_size=2, retry_skipped=True)
    assert (worked, again.count, again.skipped) == (True, 6, {"count": 0, "files": []})
    assert (tmp_path / "data" / "data-00001.npy").stat().st_mtime_ns == kept
    whole, _ = run(tmp_path / "images", tmp_path / "whole", shard_size=2)
    assert again.shards == whole.shards


def test_a_retry_that_stops_leaves_data_to_train_on(tmp_path, monkeypatch):
    """Of the shards made again and of those not yet; the next command, with or without the option, goes on."""
    save_images(tmp_path / "images", 6)
    whole = {file: file.read_bytes() for file in (tmp_path / "images").iterdir()}
    for name in ("001.jpg", "003.png", "005.png"):
        next(file for file in whole if file.name[:3] == name[:3]).write_bytes(b"no image")
    run(tmp_path / "images", tmp_path / "data", shard_size=2)
    for file, content in whole.items():
        file.write_bytes(content)
    read = edt.data.sources.read_file

    def fail(path):
        if path.name[:3] == "002":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr("edt.data.sources.read_file", fail)
    with pytest.raises(OSError, match="1 of 3 shards are complete and kept"):
        run(tmp_path / "images", tmp_path / "data", shard_size=2, retry_skipped=True, batch_size=1)
    monkeypatch.undo()
    dataset = open_dataset(tmp_path / "data")
    verify_dataset(dataset, progress=False)
    assert (len(dataset), dataset.manifest.skipped["count"]) == (4, 2)
    again, worked = run(tmp_path / "images", tmp_path / "data", shard_size=2)
    assert (worked, again.count, again.skipped["count"]) == (True, 6, 0)
    assert run(tmp_path / "images", tmp_path / "data", shard_size=2) == (again, False)
    assert again == run(tmp_path / "images", tmp_path / "whole", shard_size=2)[0]


def test_images_none_of_which_could_be_read_are_tried_again(tmp_path):
    save_images(tmp_path / "images", 2)
    whole = {file: file.read_bytes() for file in (tmp_path / "images").iterdir()}
    for file in whole:
        file.write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(ValueError, match="none of 2 images could be read"):
            run(tmp_path / "images", tmp_path / "data")
    for file, content in whole.items():
        file.write_bytes(content)
    assert run(tmp_path / "images", tmp_path / "data")[0].count == 2


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error",
    [
        *(
            OSError(number, os.strerror(number), "mount/3.jpg")
            for number in (errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV, errno.ENOENT, errno.EACCES)
        ),
        ConnectionResetError("by peer"),
        MemoryError(),
        RuntimeError("a library's"),
    ],
)
def test_what_is_no_fault_of_an_image_stops(tmp_path, monkeypatch, error, workers):
    """And says of which image, keeps what is complete, and the same command goes on."""
    save_images(tmp_path / "images", 6)
    read = edt.data.sources.read_file

    def fail(path):
        if path.name[:3] >= "003":
            raise error
        return read(path)

    monkeypatch.setattr("edt.data.sources.read_file", fail)
    expected = type(error) if isinstance(error, MemoryError | RuntimeError) else OSError
    with pytest.raises(expected, match=r"3\.png|3\.jpg") as raised:
        run(tmp_path / "images", tmp_path / "data", num_workers=workers, shard_size=2, batch_size=1)
    if expected is OSError:
        assert raised.value.errno == error.errno
    assert "1 of 3 shards are complete and kept; mend this" in str(raised.value)
    monkeypatch.undo()
    kept = (tmp_path / "data" / "data-00000.npy").stat().st_mtime_ns
    manifest, _ = run(tmp_path / "images", tmp_path / "data", shard_size=2)
    assert (manifest.count, manifest.skipped["count"]) == (6, 0)
    assert (tmp_path / "data" / "data-00000.npy").stat().st_mtime_ns == kept


def test_what_decoders_say_of_a_broken_image(tmp_path, monkeypatch):
    save_images(tmp_path / "images", 2)
    errors = [OSError("broken data stream"), ValueError("v"), SyntaxError("s"), EOFError("e"), KeyError("k"),
              RuntimeError("r"), struct.error("t"), zlib.error("z"), OverflowError("o"), TypeError("y"),
              Image.DecompressionBombError("b")]  # fmt: skip
    opened, open_image = [], Image.open

    def fail_at_the_second(file):
        opened.append(file)
        if len(opened) % 2 == 0:
            raise errors[len(opened) // 2 - 1]
        return open_image(file)

    monkeypatch.setattr(Image, "open", fail_at_the_second)
    for i, error in enumerate(errors):
        manifest, _ = run(tmp_path / "images", tmp_path / f"data{i}")
        assert (manifest.count, manifest.skipped["count"]) == (1, 1)
        assert manifest.skipped["files"][0]["reason"] == f"{type(error).__name__}: {error}"


def test_a_fault_of_our_own_is_not_the_images(flat, tmp_path, monkeypatch):
    def fail(image, size):
        raise ValueError("ours")

    monkeypatch.setattr("edt.data.sources.center_crop", fail)
    with pytest.raises(ValueError, match=r"image 000\.png: ours: 0 of 1 shards"):
        run(flat, tmp_path / "data")


def test_images_that_vanish(tmp_path, monkeypatch):
    """As all do when a mount goes away."""
    save_images(tmp_path / "images", 3)
    source = edt.data.sources.ImageFolder(tmp_path / "images", (16, 16), 3)
    monkeypatch.setattr("edt.data.extraction.open_source", lambda options: source)
    (tmp_path / "images" / "001.jpg").unlink()
    with pytest.raises(OSError, match=r"No such file .*001\.jpg\): 0 of 1 shards are complete and kept"):
        run(tmp_path / "images", tmp_path / "data")
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_shard_of_unreadable_images_alone(tmp_path):
    save_images(tmp_path / "images", 6)
    for i in (2, 3):
        next((tmp_path / "images").glob(f"{i:03d}.*")).write_bytes(b"")
    run(tmp_path / "images", tmp_path / "data", shard_size=2)
    dataset = open_dataset(tmp_path / "data")
    assert [shard.count for shard in dataset.manifest.shards] == [2, 0, 2]
    assert len(all_items(dataset)["latents"]) == 4


def test_no_image_readable(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 1 images could be read; the first is a\.png: Unidentified"):
        run(tmp_path / "images", tmp_path / "data")


SLOW = """
import sys, time
import edt.data.extraction
from edt.cli import main
encode = edt.data.extraction.encode
def slow_encode(*args):
    time.sleep(0.1)
    return encode(*args)
edt.data.extraction.encode = slow_encode
sys.exit(main(sys.argv[1:]))
"""


@contextlib.contextmanager
def slow_extraction(arguments: list[str], until: Path):
    """The command line in a process group of its own, up to the moment when a file appears."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "extract", *arguments],
        cwd=root, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not until.exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_extraction_goes_on(flat, vae, tmp_path, how, capsys):
    """To the same bytes as one that was not interrupted. Ctrl-C says how, and ends with 130."""
    arguments = ["--source", str(flat), "--vae", vae, "--image-size", "16", "--shard-size", "3", "--batch-size",
                 "1", "--store-images", "--no-moments", "--num-workers", "1", "--device", "cpu"]  # fmt: skip
    data = tmp_path / "data"
    with slow_extraction([*arguments, "--output", str(data)], until=data / "data-00001.npy") as process:
        time.sleep(0.15)
        os.killpg(process.pid, how)  # as a terminal's Ctrl-C, which reaches the workers too
        _, error = process.communicate(timeout=60)
        assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert "the same command goes on" in error
        assert "Traceback" not in error
        assert not list(data.glob("*.partial"))
    assert (data / "progress.json").is_file()
    assert not (data / "manifest.json").exists()
    assert not (data / "data-00003.npy").exists()
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json; its extraction is not finished"):
        open_dataset(data)
    kept = (data / "data-00000.npy").stat().st_mtime_ns

    assert main(["extract", *arguments, "--output", str(data)]) == 0
    assert (data / "data-00000.npy").stat().st_mtime_ns == kept
    assert main(["extract", *arguments, "--output", str(tmp_path / "whole")]) == 0
    assert contents(data) == contents(tmp_path / "whole")
    assert len(contents(data)) == 13
    capsys.readouterr()
    assert main(["extract", *arguments, "--output", str(data)]) == 0
    assert "finished before, nothing to do" in capsys.readouterr().out


def test_other_options_on_a_begun_folder(flat, tmp_path):
    run(flat, tmp_path / "data")
    before = contents(tmp_path / "data")
    with pytest.raises(ValueError, match=r"begun with image_size \[16, 16\]; this is image_size \[24, 24\]"):
        run(flat, tmp_path / "data", image_size=(24,))
    with pytest.raises(ValueError, match="begun with flips True; this is flips False"):
        run(flat, tmp_path / "data", flips=False)
    run(flat, tmp_path / "data", batch_size=2)  # which changes nothing
    assert contents(tmp_path / "data") == before
    shutil.copytree(flat, tmp_path / "images")
    next((tmp_path / "images").iterdir()).unlink()
    with pytest.raises(ValueError, match=f"begun with images {COUNT}, .*; this is images {COUNT - 1}"):
        run(tmp_path / "images", tmp_path / "data")


def test_killed_in_its_last_step(flat, tmp_path):
    """With the manifest there already, and the progress still."""
    manifest, _ = run(flat, tmp_path / "data")
    before = contents(tmp_path / "data")
    shutil.copy(tmp_path / "data" / "manifest.json", tmp_path / "data" / "progress.json")
    assert run(flat, tmp_path / "data") == (manifest, False)
    assert contents(tmp_path / "data") == before


def test_a_folder_of_something_else_is_left_alone(flat, tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(ValueError, match="not empty and was not begun by edt extract"):
        run(flat, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_corrupt_shard_deleted_is_made_again(flat, tmp_path):
    run(flat, tmp_path / "data", shard_size=4)
    before = contents(tmp_path / "data")
    shard = tmp_path / "data" / "data-00001.npy"
    damaged = bytearray(shard.read_bytes())
    damaged[500] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"corrupt: .*data-00001\.npy .* delete"):
        verify_dataset(open_dataset(tmp_path / "data"), progress=False)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"data-00001\.npy is missing"):
        open_dataset(tmp_path / "data")
    _, worked = run(flat, tmp_path / "data", shard_size=4)
    assert worked
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize("mountable", [True, False])
def test_full_disk(flat, tmp_path, monkeypatch, capsys, mountable):
    """One clear line; the complete shards stay and are not made again."""
    if not mountable:
        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: type("Libc", (), {"mount": lambda *_: -1}))
    arguments = ["extract", "--source", str(flat), "--image-size", "64", "--shard-size", "4", "--num-workers", "0"]
    disk, data = tmp_path / "disk", tmp_path / "disk" / "data"
    with small_disk(disk, 100_000, monkeypatch):  # room for one shard of 49 kB and a part
        assert main([*arguments, "--output", str(data)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("edt: error: No space left on device")
        assert "1 of 3 shards are complete and kept" in error
        assert list(contents(data)) == ["data-00000.npy", "labels-00000.npy", "progress.json"]
        shutil.copytree(data, tmp_path / "data")
    kept = (tmp_path / "data" / "data-00000.npy").stat().st_mtime_ns
    assert main([*arguments, "--output", str(tmp_path / "data")]) == 0
    assert (tmp_path / "data" / "data-00000.npy").stat().st_mtime_ns == kept
    verify_dataset(open_dataset(tmp_path / "data"), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (15,)}, "image_size is .15, 15.; this VAE needs multiples of 2"),
        ({"channels": 1}, "channels is 1; this VAE takes images of 3"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"image_size": (16, 16, 3)}, "image_size is .16, 16, 3."),
        ({"vae": None, "store_images": True}, "they need --vae"),
        ({"npy_labels": Path(".")}, "leave out --vae"),
        ({"num_classes": 5}, "num_classes is 5; source has 0 of its own"),
        ({"device": "abacus"}, "device is 'abacus'"),
    ],
)
def test_wrong_options(flat, vae, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(flat, tmp_path / "data", **{"vae": vae, **options})
    assert not (tmp_path / "data").exists()


def test_wrong_sources(flat, classes, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source .*nowhere: there is no such folder"):
        run(tmp_path / "nowhere", tmp_path / "data")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="sub-folder cat without images"):
        run(tmp_path / "images", tmp_path / "data")
    shutil.copy(flat / "000.png", tmp_path / "images")
    with pytest.raises(ValueError, match=r"images beside sub-folders, such as 000\.png and cat/"):
        run(tmp_path / "images", tmp_path / "data")


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "a+")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another(folder: Path):
    """The folder's lock, by another process."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"held\n"
        yield
    finally:
        process.communicate()


@pytest.mark.parametrize("begun", [False, True])
def test_one_extraction_writes_in_a_folder(flat, tmp_path, begun):
    if begun:
        run(flat, tmp_path / "data", shard_size=4)
        (tmp_path / "data" / "data-00001.npy").unlink()
        (tmp_path / "data" / "data-00002.npy.partial").write_bytes(b"the other's")
    before = contents(tmp_path / "data") if begun else {}
    with held_by_another(tmp_path / "data"), pytest.raises(ValueError, match="data is in use by process"):
        run(flat, tmp_path / "data", shard_size=4, retry_skipped=True)
    assert contents(tmp_path / "data") == before
    assert run(flat, tmp_path / "data", shard_size=4)[1]
    assert not list((tmp_path / "data").glob("*.partial"))
    assert ".lock" not in (tmp_path / "data" / "manifest.json").read_text()


@pytest.mark.parametrize("look", range(6))
@pytest.mark.parametrize("step", ["begins", "ends"])
def test_another_extraction_begins_or_ends_between_two_looks(flat, tmp_path, monkeypatch, step, look):
    """At the folder, before its lock is taken: whatever is seen, the other's lock is what decides."""
    folder, begun, ended = (tmp_path / name for name in ("data", "begun", "ended"))
    run(flat, ended, shard_size=4)
    shutil.copytree(ended, begun)
    (begun / "manifest.json").rename(begun / "progress.json")
    (begun / "data-00002.npy").unlink()

    def go_on(to: Path) -> None:  # as edt extract: its shards, its manifest, and last what it no longer needs
        for name in sorted(contents(to), key=lambda name: (name == "manifest.json", name != "progress.json")):
            shutil.copy(to / name, folder / name)
        for name in contents(folder).keys() - contents(to).keys():
            (folder / name).unlink()

    looks = 0

    def looking(function):
        def looked(path, *args, **options):
            nonlocal looks
            if Path(path) in (folder, folder / "progress.json", folder / "manifest.json"):
                if looks == look:
                    looks += 1
                    go_on(begun if step == "begins" else ended)
                looks += 1
            return function(path, *args, **options)

        return looked

    with held_by_another(folder):
        if step == "ends":
            go_on(begun)
        for name in ("iterdir", "glob", "is_file"):
            monkeypatch.setattr(Path, name, looking(getattr(Path, name)))
        monkeypatch.setattr(edt.data.shards, "read_manifest", looking(edt.data.shards.read_manifest))
        with pytest.raises(ValueError, match="data is in use by process"):
            run(flat, folder, shard_size=4)


@pytest.mark.parametrize("where", ["inside", "same", "around", "by a link"])
def test_the_output_is_apart_from_the_source(tmp_path, where):
    source = tmp_path / "photos" / "images"
    save_images(source / "cat", 1)
    output = {
        "inside": source / "latents",
        "same": source,
        "around": tmp_path,
        "by a link": tmp_path / "link" / "x",
    }
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ValueError, match=r"output .* is in source|source .* is in output"):
        run(source, output[where])
    assert [path.name for path in source.rglob("*")] == ["cat", "000.png"]


def test_files_of_others_that_look_unfinished_are_left_alone(flat, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "film.partial").write_text("half a film")
    with pytest.raises(ValueError, match="not empty and was not begun by edt extract"):
        run(flat, tmp_path / "data")
    (tmp_path / "data" / "film.partial").rename(tmp_path / "film.partial")
    run(flat, tmp_path / "data")
    (tmp_path / "film.partial").rename(tmp_path / "data" / "film.partial")
    (tmp_path / "data" / "data-00000.npy").unlink()
    assert run(flat, tmp_path / "data")[1]
    assert (tmp_path / "data" / "film.partial").read_text() == "half a film"


def test_names_that_no_terminal_shows(tmp_path):
    """Of another encoding, and with an escape: in the manifest as they are, in the summary spelt out."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/images/gar\xe7on\x1b[31m"))
    save_images(folder, 2)
    (folder / "000.png").write_bytes(b"no image")
    manifest, _ = run(tmp_path / "images", tmp_path / "data")
    assert read_manifest(tmp_path / "data" / "manifest.json").class_names == (folder.name,)
    assert (tmp_path / "data" / "manifest.json").read_bytes().isascii()
    for line in summary(manifest, tmp_path / "data").splitlines():
        assert line.isprintable()
        line.encode()
    assert r"gar\udce7on\x1b[31m/000.png: UnidentifiedImageError" in line


@pytest.mark.parametrize("damage", ["lacking", "torn", "list", "another"])
def test_a_vae_that_is_none(flat, tmp_path, damage):
    """No random weights in the place of those that are missing."""
    from safetensors.torch import load_file, save_file

    folder = save_vae(tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    if damage == "lacking":
        kept = {name: w for name, w in load_file(weights).items() if name != "encoder.conv_in.weight"}
        save_file(kept, weights, metadata={"format": "pt"})
    elif damage == "torn":
        weights.write_bytes(weights.read_bytes()[:2000])
    else:
        (folder / "config.json").write_text("[1]" if damage == "list" else '{"block_out_channels": 3}')
    with pytest.raises(ValueError, match=f"vae .*{folder}"):
        run(flat, tmp_path / "data", vae=str(folder))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", (10**9,)), ("image_size", (0, 8)), ("image_size", 8), ("image_size", ("8",)),
        ("channels", 2), ("flips", "no"), ("encode_dtype", "float16"), ("num_classes", 10**12),
        ("num_classes", True), ("seed", -1),
        ("seed", 0.5), ("shard_size", "9"), ("batch_size", 0), ("num_workers", 10**6), ("num_workers", -1),
        ("source", "x"), ("source", None), ("output", "x"), ("npy_labels", 3), ("split", None), ("vae", ""),
        ("label_column", 3), ("device", None),
    ],
)  # fmt: skip
def test_options_of_other_types_and_sizes(flat, tmp_path, name, value):
    options = {"source": flat, "output": tmp_path / "data", name: value}
    with pytest.raises((TypeError, ValueError), match=name):
        run(options.pop("source"), options.pop("output"), **options)
    assert not (tmp_path / "data").exists()


def test_latents_that_are_not_finite(flat, tmp_path):
    folder = save_vae(tmp_path / "vae")
    model = AutoencoderKL.from_pretrained(folder)
    torch.nn.init.constant_(model.quant_conv.bias, 1e6)
    model.save_pretrained(folder)
    message = r"latents of image 000\.png are not finite in float16; is --vae right.*: 0 of 1 shards are complete"
    with pytest.raises(ValueError, match=message):
        run(flat, tmp_path / "data", vae=str(folder))


def test_another_vae_of_the_same_name(flat, tmp_path):
    """Shards of two VAEs are not mixed; what was begun before its digest was recorded goes on."""
    folder, data = save_vae(tmp_path / "vae"), tmp_path / "data"
    first, _ = run(flat, data, vae=str(folder), shard_size=4)
    (data / "data-00001.npy").unlink()
    model = AutoencoderKL.from_pretrained(folder)
    torch.nn.init.constant_(model.quant_conv.bias, 1)
    model.save_pretrained(folder)
    before = contents(data)
    with pytest.raises(ValueError, match=r"was begun with another VAE than vae '.*' is now: its weights"):
        run(flat, data, vae=str(folder), shard_size=4)
    assert contents(data) == before
    save_vae(folder, scaling_factor=0.5)
    with pytest.raises(ValueError, match=r"another VAE .* scaling_factor"):
        run(flat, data, vae=str(folder), shard_size=4)
    save_vae(folder)
    assert run(flat, data, vae=str(folder), shard_size=4) == (first, True)

    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["extraction"]["vae_sha256"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    (data / "data-00001.npy").unlink()
    assert run(flat, data, vae=str(folder), shard_size=4)[0].shards == first.shards


def test_manifest_is_plain_json(classes, vae, tmp_path):
    run(classes, tmp_path / "data", vae=vae)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["class_names"] == ["ant", "zebra"]
    # Of PyPI's packages the version has no "+cu132", which torch.__version__ has.
    assert manifest["created_with"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(manifest["shards"][0]["sha256"]) == {"data-00000.npy", "labels-00000.npy"}
