"""How many latents a second the loader gives, and that its memory does not grow.

    python -m benchmarks data_loading --latents 50000 --workers 2

Writes random latents of ImageNet's size (moments of 4×32×32 in float16, both views: 32 KiB an image, of which an
epoch reads 16 KiB) into a temporary folder and reads two epochs through `edt.data.make_loader`: the first from
the disk, for the files are dropped from the page cache before; the second, as all later ones, from the page cache
where memory holds them. Every byte of a batch is read once more, as a copy to a GPU would.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from edt.data.dataset import make_loader, number_names, open_dataset
from edt.data.shards import MANIFEST, Manifest, ShardWriter, write_manifest
from edt.options import check_count

from .results import add_output

FILE = Path("cpu", "data_loading.json")  # in the folder of results
_ROWS = 500  # written at a time


def write_random_latents(
    folder: Path, count: int, shard_size: int, shape: tuple[int, int, int] = (4, 32, 32)
) -> None:
    """A data folder such as edt extract makes of images, of noise."""
    manifest = Manifest(
        kind="latents",
        shape=shape,
        dtype="float16",
        moments=True,
        views=2,
        mirror=False,
        stores_images=False,
        num_classes=1000,
        class_names=number_names(1000),
        image_size=(8 * shape[1], 8 * shape[2]),
        scaling_factor=0.18215,
        count=count,
    )
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    written = []
    for start in range(0, count, shard_size):
        end = min(start + shard_size, count)
        with ShardWriter(folder, len(written), manifest) as writer:
            for first in range(start, end, _ROWS):
                rows = min(_ROWS, end - first)
                data = random.standard_normal((rows, *manifest.stored_shape), np.float32).astype(np.float16)
                writer.append(data, random.integers(1000, size=rows))
            written.append(writer.finish())
    write_manifest(folder / MANIFEST, replace(manifest, shards=tuple(written)))


def anonymous_memory(processes: list[int]) -> dict[str, int]:
    """Bytes of each process that no file backs: neither the mapped shards nor the batches in shared memory."""
    memory = {}
    for number, process in enumerate(processes):
        status = Path(f"/proc/{process}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
        memory["main" if number == 0 else f"worker {number}"] = int(line.split()[1]) * 1024
    return memory


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.glob("*.npy"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(folder: Path, *, workers: int, batch_size: int) -> dict:
    """Rates of the first and the second epoch, and memory from the end of the first to that of the second."""
    drop_from_page_cache(folder)
    dataset = open_dataset(folder)
    steps = len(dataset) // batch_size
    batches = iter(
        make_loader(dataset, seed=0, start=0, stride=batch_size, batch_size=batch_size, num_workers=workers)
    )
    processes = [os.getpid(), *(worker.pid for worker in getattr(batches, "_workers", []))]

    def read(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            next(batches)["latents"].view(torch.int64).sum()
        return time.perf_counter() - begun

    first = read(steps)
    memory = {"start": anonymous_memory(processes)}
    second = read(steps // 2)
    memory["middle"] = anonymous_memory(processes)
    second += read(steps - steps // 2)
    memory["end"] = anonymous_memory(processes)
    count, size = steps * batch_size, dataset.read([0], [0])["latents"].nbytes
    return {
        "latents_per_second": round(count / second),
        "megabytes_per_second": round(count * size / second / 1e6),
        "latents_per_second_from_disk": round(count / first),  # with the start of the workers
        "anonymous_memory_bytes": memory,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks data_loading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--latents", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--shard-size", type=int, default=16_384)
    parser.add_argument("--folder", type=Path, help="for the temporary data, on the disk to measure")
    add_output(parser, "file")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "shard_size"):
        check_count(name, getattr(options, name))
    if options.workers < 0:
        raise ValueError(f"workers is {options.workers}; it must be at least 0")
    if options.latents < 2 * options.batch_size:
        parser.error(f"--latents is {options.latents}; it must be at least two batches")
    temporary = Path(tempfile.mkdtemp(prefix="data-loading-", dir=options.folder))
    try:
        print(f"writing {options.latents} latents, {options.latents * 2**15 / 1e9:.2f} GB, to {temporary}")
        write_random_latents(temporary / "data", options.latents, options.shard_size)
        result = measure(temporary / "data", workers=options.workers, batch_size=options.batch_size)
    finally:
        shutil.rmtree(temporary)
    settings = {name: getattr(options, name) for name in ("latents", "workers", "batch_size", "shard_size")}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    report = {"cores": os.cpu_count(), **settings, **result, "versions": versions}
    rates = f"{result['latents_per_second']} latents/s, {result['megabytes_per_second']} MB/s"
    print(f"{rates}, {options.workers} workers; first epoch, from disk: {result['latents_per_second_from_disk']}")
    for when, memory in result["anonymous_memory_bytes"].items():
        print(f"anonymous memory, {when:6}: " + ", ".join(f"{k} {v / 2**20:.1f} MiB" for k, v in memory.items()))
    path = options.out or options.results / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    from .__main__ import main as command

    sys.exit(command(["data_loading", *sys.argv[1:]]))
