import json
import os
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.data_loading import anonymous_memory, write_random_latents
from edt.data import shards
from edt.data.dataset import SampleOrder, make_loader, open_dataset, to_latents, verify_dataset, write_dataset

COUNT = 10
RANDOM = np.random.default_rng(0)
MOMENTS = RANDOM.standard_normal((COUNT, 2, 8, 4, 6)).astype(np.float16)
IMAGES = RANDOM.integers(0, 256, (COUNT, 3, 8, 12), np.uint8)
LABELS = np.arange(COUNT) % 3


@pytest.fixture
def folder(tmp_path) -> Path:
    """10 latents (4, 4, 6) with moments, both views and images, in shards of 4, 4 and 2."""
    options = {"moments": True, "scaling_factor": 0.5, "shift_factor": 0.25, "images": IMAGES, "shard_size": 4}
    write_dataset(tmp_path / "data", MOMENTS, LABELS, **options)
    return tmp_path / "data"


def test_read(folder):
    dataset = open_dataset(folder, with_images=True)
    assert (len(dataset), dataset.num_classes, dataset.class_names) == (COUNT, 3, ("0", "1", "2"))
    assert (dataset.latent_shape, dataset.num_views) == ((4, 4, 6), 2)
    assert (dataset.labels.dtype, dataset.labels.tolist()) == (np.int64, LABELS.tolist())
    indices, views = np.array([9, 0, 4, 4, 7, 3, 8]), np.array([1, 0, 1, 0, 0, 1, 1])
    batch = dataset.read(indices, views)
    assert torch.equal(batch["latents"], torch.from_numpy(MOMENTS[indices, views]))
    assert torch.equal(batch["labels"], torch.from_numpy(LABELS[indices]))
    images = torch.from_numpy(IMAGES[indices])
    images[views == 1] = images[views == 1].flip(-1)
    assert torch.equal(batch["images"], images)
    assert set(open_dataset(folder).read(indices, views)) == {"latents", "labels"}


def test_read_refuses_what_is_not_there(folder):
    dataset = open_dataset(folder)
    for indices, views, message in (([10], [0], "indices reach from 10"), ([-1], [0], "-1"), ([0], [2], "views")):
        with pytest.raises(IndexError, match=message):
            dataset.read(np.array(indices), np.array(views))
    for indices, views in (([0.5], [0]), ([[0]], [0]), ([0, 1], [0]), (["a"], [0])):
        with pytest.raises(ValueError, match=r"indices|views"):
            dataset.read(indices, views)
    assert dataset.read([], [])["latents"].shape == (0, 8, 4, 6)


def test_to_latents(folder, tmp_path):
    dataset = open_dataset(folder)
    raw = dataset.read(np.arange(COUNT), np.ones(COUNT, int))["latents"]
    latents = to_latents(raw, dataset, torch.Generator().manual_seed(3))
    mean, std = torch.from_numpy(MOMENTS[:, 1]).float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(latents, (mean + std * noise - 0.25) * 0.5)
    assert torch.equal(latents, to_latents(raw, dataset.manifest, torch.Generator().manual_seed(3)))
    assert not torch.equal(latents, to_latents(raw, dataset))
    fixed = write_dataset(tmp_path / "fixed", MOMENTS[:, 0], scaling_factor=0.5, shift_factor=0.25)
    assert torch.equal(to_latents(raw, fixed), (raw.float() - 0.25) * 0.5)
    pixels = write_dataset(tmp_path / "pixels", IMAGES, LABELS)
    raw = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 8, 2).repeat(1, 1, 1, 6)
    assert to_latents(raw, pixels).aminmax() == (-1, 1)
    with pytest.raises(ValueError, match=r"raw has shape \(1, 3, 8, 12\); this data needs \('B', 8, 4, 6\)"):
        to_latents(raw, dataset)


def test_pixels_are_mirrored_only_where_that_is_allowed(tmp_path):
    names = ("ant", "bee", "cat")
    plain = write_dataset(tmp_path / "plain", IMAGES, LABELS, class_names=names)
    mirrored = write_dataset(
        tmp_path / "mirrored", torch.from_numpy(IMAGES), torch.from_numpy(LABELS), mirror=True
    )
    assert (plain.num_views, mirrored.num_views, plain.class_names) == (1, 2, names)
    views = np.arange(COUNT) % 2
    latents = mirrored.read(np.arange(COUNT), views)["latents"].numpy()
    assert np.array_equal(latents[::2], IMAGES[::2])
    assert np.array_equal(latents[1::2], IMAGES[1::2, ..., ::-1])


def test_write_dataset_refuses_what_does_not_fit(folder, tmp_path):
    def refuses(error, message, *args, to=tmp_path / "new", **options):
        with pytest.raises(error, match=message):
            write_dataset(to, *args, **options)

    refuses(FileExistsError, "not empty", IMAGES, LABELS, to=folder)
    refuses(TypeError, "items has dtype int64", LABELS)
    refuses(TypeError, "labels has dtype float64", IMAGES, LABELS / 2)
    refuses(ValueError, r"labels has shape \(9,\); 10 items need", IMAGES, LABELS[:9])
    refuses(ValueError, "labels has the label 2; it must have 0 to 1", IMAGES, LABELS, class_names=("a", "b"))
    refuses(ValueError, "labels has the label -1", IMAGES, LABELS - 1)
    refuses(ValueError, r"items has shape \(10, 8\)", MOMENTS[:, 0, :, 0, 0])
    refuses(ValueError, "mirror is True", MOMENTS, LABELS, mirror=True)
    refuses(ValueError, "images has shape", MOMENTS, LABELS, images=IMAGES[:3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("items", MOMENTS * NAN), ("items", MOMENTS.astype(np.float32) + 1e6), ("items", MOMENTS + INFINITY),
        ("items", np.zeros((2, 1, 0, 0), np.uint8)), ("items", [[1], [2, 3]]),
        ("items", torch.empty(1, device="meta")),
        ("scaling_factor", None), ("scaling_factor", "1"), ("scaling_factor", NAN), ("scaling_factor", 0.0),
        ("scaling_factor", [1.0]), ("scaling_factor", 10**400), ("scaling_factor", True), ("shift_factor", []),
        ("shift_factor", INFINITY), ("moments", "no"), ("labels", [10**12] * COUNT),
        ("labels", [2**64 - 1] * COUNT),
        ("labels", ["a"] * COUNT), ("class_names", "abc"), ("class_names", (1, 2, 3)), ("shard_size", 0),
        ("shard_size", -1), ("shard_size", 1.5), ("images", IMAGES / 255), ("images", IMAGES[..., :0]),
    ],
)  # fmt: skip
def test_write_dataset_refuses_values(tmp_path, name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        write_dataset(tmp_path / "data", **{"items": MOMENTS, "labels": LABELS, name: value})
    assert not list(tmp_path.iterdir())


def test_write_dataset_takes_any_float(tmp_path):
    """Of numpy and torch."""
    latents = torch.randn(COUNT, 4, 4, 6).to(torch.bfloat16).requires_grad_()
    dataset = write_dataset(tmp_path / "data", latents, scaling_factor=np.float32(0.5))
    raw = dataset.read(np.arange(COUNT), np.zeros(COUNT, int))["latents"]
    assert torch.equal(raw.float(), latents.float())
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["scaling_factor"] == 0.5


def test_what_an_interrupted_write_dataset_left(tmp_path):
    """Goes; but nothing of others, whatever it is called."""
    stranger = tmp_path / "data.partial"
    stranger.mkdir()
    (stranger / "data-00000.npy").write_bytes(b"mine")
    if (child := os.fork()) == 0:
        try:
            shards.ShardWriter.finish = lambda writer: os._exit(9)
            write_dataset(tmp_path / "data", IMAGES)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) == 2
    dataset = write_dataset(tmp_path / "data", IMAGES)
    assert sorted(path.name for path in dataset.folder.iterdir()) == [
        "data-00000.npy", "labels-00000.npy", "manifest.json",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.partial"]
    assert (stranger / "data-00000.npy").read_bytes() == b"mine"


def test_verify(folder):
    verify_dataset(open_dataset(folder))
    shard = folder / "images-00002.npy"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(
        ValueError, match=rf"corrupt: {shard} .*delete what is named here and run the same edt extr"
    ):
        verify_dataset(open_dataset(folder), progress=False)


def rewrite_manifest(folder: Path, **changes) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def damage_folder(folder: Path, damage: str) -> None:
    shard, labels = folder / "data-00001.npy", folder / "labels-00001.npy"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "too long":
        shard.write_bytes(shard.read_bytes() + b"\0")
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "missing":
        labels.unlink()
    elif damage == "other shape":
        np.save(shard, MOMENTS[:3])
    elif damage == "label":
        np.save(labels, np.array([0, 3, 1, 2]))
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "no JSON":
        (folder / "manifest.json").write_text("{")
    elif damage == "other JSON":
        (folder / "manifest.json").write_text("[1, 2]")
    elif damage == "newer":
        rewrite_manifest(folder, format_version=2)
    elif damage == "extra":
        rewrite_manifest(folder, colour="blue")
    elif damage == "count":
        rewrite_manifest(folder, count=11)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("truncated", ValueError, r"data-00001\.npy is truncated .*delete it and run the same edt extract again"),
        ("too long", ValueError, r"data-00001\.npy has \d+ bytes; its header says"),
        ("empty", ValueError, r"data-00001\.npy is truncated or no \.npy file"),
        ("missing", FileNotFoundError, r"labels-00001\.npy is missing; run the same edt extract again"),
        ("other shape", ValueError, r"data-00001\.npy has float16 \(3, 2, 8, 4, 6\); the manifest says"),
        ("label", ValueError, r"labels-00001\.npy has the label 3; it must have 0 to 2"),
        ("no manifest", FileNotFoundError, r"data has no manifest\.json; edt extract writes one"),
        ("no JSON", ValueError, r"manifest\.json is not a manifest written by edt extract"),
        ("other JSON", ValueError, "it has no format_version"),
        ("newer", ValueError, "its format_version is 2; this code reads 1"),
        ("extra", ValueError, "it lacks, or should not have, colour"),
        ("count", ValueError, "the manifest counts 11 items, its shards hold 10"),
    ],
)
def test_a_damaged_folder_does_not_open(folder, damage, error, message):
    damage_folder(folder, damage)
    with pytest.raises(error, match=message):
        open_dataset(folder)


def test_other_folders_do_not_open(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        open_dataset(tmp_path / "nowhere")
    write_dataset(tmp_path / "data", IMAGES)
    with pytest.raises(ValueError, match="extract with --store-images"):
        open_dataset(tmp_path / "data", with_images=True)
    np.save(tmp_path / "data" / "labels-00000.npy", np.ones(COUNT, np.int64))
    with pytest.raises(ValueError, match="has the label 1; it must have only 0, as data without classes has"):
        open_dataset(tmp_path / "data")


def edit_manifest(folder: Path, path: list, value) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    here = manifest
    for name in path[:-1]:
        here = here[name]
    here[path[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["kind"], "foo"), (["kind"], "pixels"), (["shape"], [4, 4]), (["shape"], [4, 4, 10**12]),
        (["shape", 1], -4), (["shape", 0], True), (["shape", 0], 4.0), (["shape"], "abc"),
        (["dtype"], "object"), (["dtype"], "float32"),
        (["moments"], "no"), (["views"], 3), (["views"], True), (["mirror"], True), (["mirror"], "no"),
        (["stores_images"], False), (["num_classes"], 10**12), (["num_classes"], 2), (["class_names"], "abc"),
        (["class_names", 0], 3), (["class_names"], {}), (["image_size"], [8]), (["image_size", 0], 10**9),
        (["scaling_factor"], NAN), (["scaling_factor"], "1"), (["scaling_factor"], 0),
        (["scaling_factor"], 10**400),
        (["shift_factor"], INFINITY), (["shift_factor"], None), (["vae"], 3), (["encode_dtype"], "int8"),
        (["count"], "10"), (["count"], -1), (["skipped"], []), (["skipped"], {"count": 0}),
        (["skipped", "files"], ["a.png"]), (["skipped", "count"], "0"), (["shards"], {}), (["shards", 0], 3),
        (["shards", 0], {}), (["shards", 0, "file"], "../data-00000.npy"), (["shards", 0, "file"], "/etc/passwd"),
        (["shards", 0, "file"], None), (["shards", 0, "labels"], "labels-00001.npy"),
        (["shards", 0, "images"], None), (["shards", 0, "count"], 4.0), (["shards", 0, "sha256"], {}),
        (["shards", 0, "sha256", "data-00000.npy"], "0"), (["shards", 0, "sha256", "/etc/passwd"], "0" * 64),
        (["extraction"], [1]), (["created_with"], None), (["format_version"], True),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be(folder, path, value):
    """Whatever it names or numbers is checked before it is used, and no file outside is touched."""
    edit_manifest(folder, path, value)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest written by edt extract: ") as error:
        open_dataset(folder)
    reason = str(error.value).split("edt extract: ")[1]
    assert any(name in reason for name in (*path, "pixels") if isinstance(name, str))
    assert "delete" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "null", "\0", '{"format_version": 1}', '{"count": 1' + "0" * 5000]
)
def test_text_that_is_no_manifest(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest"):
        open_dataset(folder)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_shard_that_is_no_file(folder, kind):
    shard = folder / "data-00001.npy"
    shard.unlink()
    make = {
        "pipe": lambda: os.mkfifo(shard),
        "device": lambda: shard.symlink_to("/dev/zero"),
        "folder": shard.mkdir,
    }
    make[kind]()
    with pytest.raises(ValueError, match=r"data-00001\.npy is no file"):
        open_dataset(folder)


def test_headers_take_no_memory(folder):
    """A shard of 10¹¹ labels, of which the disk holds none."""
    with open(folder / "labels-00001.npy", "wb") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (10**11,)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ValueError, match=r"labels-00001\.npy is truncated .*its header says 800000000128"):
        open_dataset(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_becomes_shorter(folder, workers):
    """While it is read: an error that names it, where a memory map would have ended the process."""
    dataset = open_dataset(folder, with_images=True)
    batches = iter(make_loader(dataset, seed=0, start=0, stride=10, batch_size=10, num_workers=workers))
    next(batches)
    os.truncate(folder / "images-00001.npy", 200)
    with pytest.raises(OSError, match=r"images-00001\.npy became shorter since it was opened, to 200 bytes"):
        take(batches, 10)
    assert len(dataset.read([0, 1, 9], [0, 0, 0])["images"]) == 3  # of other shards
    with pytest.raises(OSError, match=r"images-00001\.npy became shorter"):
        dataset.read([7], [0])


def test_shards_may_be_links(folder, tmp_path):
    """To another disk."""
    expected = open_dataset(folder).read([5], [1])["latents"]
    (folder / "data-00001.npy").rename(tmp_path / "moved.npy")
    (folder / "data-00001.npy").symlink_to(tmp_path / "moved.npy")
    verify_dataset(open_dataset(folder), progress=False)
    assert torch.equal(open_dataset(folder).read([5], [1])["latents"], expected)


def test_order_is_a_permutation_each_epoch():
    n = 1000
    order = SampleOrder(n, seed=5, num_views=2)
    epochs = [order(np.arange(e * n, (e + 1) * n)) for e in range(3)]
    for indices, views in epochs:
        assert sorted(indices) == list(range(n))
        assert 400 < views.sum() < 600
    for a, b in ((0, 1), (1, 2), (0, 2)):
        for which in (0, 1):
            assert not np.array_equal(epochs[a][which], epochs[b][which])
    other = SampleOrder(n, seed=6, num_views=2)(np.arange(n))
    assert not np.array_equal(other[0], epochs[0][0])


@pytest.mark.parametrize("position", [0, 1, 9, 10, 12345, 10**12])
def test_order_from_any_position(position):
    """As in the stream from its beginning, whatever was asked for before; a span may cover several epochs."""
    order = SampleOrder(10, seed=1, num_views=2)
    indices, views = order(np.arange(position, position + 35))
    for offset in (34, 0, 17):
        again = SampleOrder(10, seed=1, num_views=2)(np.array([position + offset]))
        assert (*again[0], *again[1]) == (indices[offset], views[offset])


def test_order_without_flips_has_the_same_items():
    positions = np.arange(50)
    flipped, plain = SampleOrder(10, 1, num_views=2), SampleOrder(10, 1, num_views=2, flip=False)
    assert np.array_equal(flipped(positions)[0], plain(positions)[0])
    assert not plain(positions)[1].any()
    assert not SampleOrder(10, 1, num_views=1)(positions)[1].any()


def test_order_stays_as_it_is():
    """A run that goes on under a newer version must see the same samples."""
    indices, views = SampleOrder(8, seed=0, num_views=2)(np.arange(8))
    assert indices.tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
    assert views.tolist() == [0, 0, 1, 0, 0, 0, 0, 1]


def take(loader, count: int) -> list[dict[str, torch.Tensor]]:
    return [batch for batch, _ in zip(loader, range(count))]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("batch_size", [4, 25])  # straddling epochs; larger than the data
def test_loader_gives_the_stream(folder, batch_size):
    dataset = open_dataset(folder, with_images=True)
    order = SampleOrder(COUNT, seed=2, num_views=2)
    options = {"seed": 2, "start": 3, "stride": batch_size, "batch_size": batch_size}
    plain = take(make_loader(dataset, num_workers=0, **options), 6)
    for k, batch in enumerate(plain):
        positions = np.arange(3 + k * batch_size, 3 + (k + 1) * batch_size)
        assert same(batch, dataset.read(*order(positions)))
    assert all(map(same, plain, take(make_loader(dataset, num_workers=2, **options), 6)))


def test_ranks_partition_the_stream_and_a_run_goes_on(folder):
    dataset = open_dataset(folder)

    def batches(ranks: int, start: int, steps: int) -> list[torch.Tensor]:
        """Of each step, what all ranks together see."""
        size = 12 // ranks
        loaders = [
            make_loader(dataset, seed=0, start=start + r * size, stride=12, batch_size=size, num_workers=0)
            for r in range(ranks)
        ]
        return [torch.cat([b["latents"] for b in step]) for step in zip(*(take(x, steps) for x in loaders))]

    alone = batches(1, 0, 5)
    for ranks in (2, 3):
        assert all(map(torch.equal, alone, batches(ranks, 0, 5)))
    assert all(map(torch.equal, alone[2:], batches(2, 2 * 12, 3)))


def test_loader_refuses_what_cannot_work(folder):
    dataset = open_dataset(folder)
    options = {"seed": 0, "start": 0, "stride": 1, "batch_size": 1, "num_workers": 0}
    wrong = (("seed", -1), ("start", -1), ("stride", 0), ("batch_size", 0), ("num_workers", -1), ("start", 10**30),
             ("batch_size", 10**12), ("seed", 0.5), ("start", None), ("num_workers", "2"))  # fmt: skip
    for name, value in wrong:
        with pytest.raises((ValueError, TypeError), match=f"{name} is {value!r}"):
            make_loader(dataset, **{**options, name: value})


def test_a_pickled_dataset_opens_the_folder_again(folder):
    """For workers that are spawned: no data goes along."""
    dataset = open_dataset(folder, with_images=True)
    loader = make_loader(dataset, seed=0, start=0, stride=4, batch_size=4, num_workers=0)
    pickled = pickle.dumps(loader.dataset)
    assert len(pickled) < 1000
    assert same(pickle.loads(pickled)[8], loader.dataset[8])


def test_throughput_and_constant_memory(tmp_path):
    """Two workers over two epochs of 6000 latents in 197 MB. The floor is far below what is measured alone, as the
    machine may be shared: benchmarks/results/cpu/data_loading.json."""
    write_random_latents(tmp_path / "data", 6000, shard_size=2500)
    batch_size, steps = 250, 48
    options = {"stride": batch_size, "batch_size": batch_size, "num_workers": 2}
    batches = iter(make_loader(open_dataset(tmp_path / "data"), seed=0, start=0, **options))
    memory, begun = [], time.perf_counter()
    for step in range(steps):
        assert len(next(batches)["labels"]) == batch_size
        if step % 12 == 11:
            memory.append(anonymous_memory([os.getpid(), *(w.pid for w in batches._workers)]))
    rate = steps * batch_size / (time.perf_counter() - begun)
    assert rate > 2000
    growth = {name: memory[-1][name] - memory[0][name] for name in memory[0]}
    assert max(growth.values()) < 2**23, growth  # of 8 MB that all batches together would exceed 20 times


@pytest.mark.parametrize("allowed", [True, False])
def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch, allowed):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    write_dataset(tmp_path / "data", np.zeros((64, 1, 2, 2), np.uint8), shard_size=1)
    with open(tmp_path / "data" / "manifest.json") as file:
        low = file.fileno() + 30  # the lowest number that is free, and so many more
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, limits[1]))
    try:
        if allowed:
            assert len(open_dataset(tmp_path / "data").read(np.arange(64), np.zeros(64, int))["labels"]) == 64
        else:
            monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
            with pytest.raises(OSError, match=f"this process may open {low}, and the shards need 64; raise"):
                open_dataset(tmp_path / "data")
            monkeypatch.undo()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


HELD = """
import sys
from edt.data.dataset import make_loader, open_dataset
loader = make_loader(open_dataset(sys.argv[1]), seed=0, start=0, stride=2, batch_size=2, num_workers=2)
next(iter(loader))
"""


def test_a_program_ends_that_still_holds_a_loader(folder):
    subprocess.run(
        [sys.executable, "-c", HELD, str(folder)], cwd=Path(__file__).parents[2], timeout=60, check=True
    )
