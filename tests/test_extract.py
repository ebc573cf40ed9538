import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from disks import small_disk
from image_folders import SIZES, random_image, run, save_images, save_vae
from PIL import Image

from edt.cli import main
from edt.data import open_dataset, to_latents, verify_dataset
from edt.sources import center_crop, to_pixels

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
    np.save(features / "5.npy", np.zeros((1, 4, 64, 64), np.float32))
    np.save(labels / "6.npy", np.array([-1]))
    manifest, _ = run(features, tmp_path / "data", npy_labels=labels)
    assert manifest.count == 8
    assert [file["path"] for file in manifest.skipped["files"]] == [f"{i}.npy" for i in (3, 4, 5, 6)]
    (labels / "7.npy").unlink()
    with pytest.raises(ValueError, match=r"7\.npy, which is not in .*imagenet_labels"):
        run(features, tmp_path / "other", npy_labels=labels)


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


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_faults_of_the_machine_are_no_unreadable_images(tmp_path, monkeypatch, error):
    save_images(tmp_path / "images", 2)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("edt.sources.ImageFolder.load", fail)
    with pytest.raises(type(error)):
        run(tmp_path / "images", tmp_path / "data", num_workers=0)
    monkeypatch.undo()
    assert run(tmp_path / "images", tmp_path / "data")[0].count == 2


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
import edt.extract
from edt.cli import main
encode = edt.extract.encode
def slow_encode(*args):
    time.sleep(0.1)
    return encode(*args)
edt.extract.encode = slow_encode
sys.exit(main(sys.argv[1:]))
"""


@contextlib.contextmanager
def slow_extraction(arguments: list[str], until: Path):
    """The command line in a process group of its own, up to the moment when a file appears."""
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "extract", *arguments],
        cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
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


def test_latents_that_are_not_finite(flat, tmp_path):
    folder = save_vae(tmp_path / "vae")
    model = AutoencoderKL.from_pretrained(folder)
    torch.nn.init.constant_(model.quant_conv.bias, 1e6)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="latents of image 0 are not finite in float16; is --vae right"):
        run(flat, tmp_path / "data", vae=str(folder))


def test_manifest_is_plain_json(classes, vae, tmp_path):
    run(classes, tmp_path / "data", vae=vae)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["class_names"] == ["ant", "zebra"]
    # Of PyPI's packages the version has no "+cu132", which torch.__version__ has.
    assert manifest["created_with"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(manifest["shards"][0]["sha256"]) == {"data-00000.npy", "labels-00000.npy"}
