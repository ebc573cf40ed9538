"""Tables of measured tiles: JSON files that `python -m benchmarks tune` writes, and how launches come to use one.

    use(Path("tiles.json"))                                    # in Python
    EDT_BENCHMARK_TILES=tiles.json python -m benchmarks …      # for a command

An entry is found by equality of all of its key; what has no entry is left to the op. A table is of one device.
"""

import functools
import hashlib
import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch

import edt_kernels
from edt_kernels import _backend, _launch, _tiles
from edt_kernels._tiles import CellTile, RowLoop, RowTile, ScoreTile, Tile, Tiles
from edt_kernels.amm_attention.autograd import padded

VARIABLE = "EDT_BENCHMARK_TILES"
_NORMS = ("gated_residual_adaln", "adaln", "gated_residual", "token_merge_adaln", "token_split_concat_adaln")
OPS = ("amm_attention", *_NORMS)
# The passes of the ops: for each, the ways to compute it, and of a way, its kernels and the kind of their tiles.
PASSES: dict[str, tuple[dict[str, type[Tile]], ...]] = {
    "amm_attention.forward": (
        {"resident_forward": ScoreTile},
        {"forward": ScoreTile},
    ),
    "amm_attention.backward": (
        {"short_backward": ScoreTile},
        {"resident_backward": ScoreTile, "backward_tables": CellTile},
        {"backward_q": ScoreTile, "backward_kv": ScoreTile, "backward_tables": CellTile},
    ),
    **{f"{op}.forward": ({"forward": RowTile},) for op in _NORMS},
    **{f"{op}.backward": ({"backward": RowLoop},) for op in _NORMS},
}
# What a measurement is for. Batch sizes are not told apart, but for heads too few to fill a device.
ATTENTION_KEY = {
    "dtype": str,  # "float32" or "16-bit"
    "height": int,
    "width": int,
    "extra_tokens": int,
    "head_dim": int,
    "bias": bool,
    "modulation": bool,
    "many_heads": bool,
}
NORM_KEY = {"dtype": str, "rows": int, "channels": int}  # of the residual stream; rows of a sample


def use(path: Path) -> None:
    """From now on launches of this process take the tiles of a table, and no others that were measured.

    Raises:
        ValueError: for a file that is no table, or one of another device. One of other kernels or of another
            Triton is right but perhaps slow: a warning.
    """
    content, here = read_table(path), device_name(None)
    if here not in ("cpu", content["device"]):
        raise ValueError(f"{path} was measured on {content['device']!r}; this is {here!r}: name a table of it")
    conditions_here = {k: value for k, value in conditions(content["device"]).items() if k in content}
    there = {k: content[k] for k, value in conditions_here.items() if content[k] != value}
    if there:
        here = {k: conditions_here[k] for k in there}
        warnings.warn(f"{path} was measured with {there}; this is {here}: measure anew", stacklevel=2)
    _tiles.measured.clear()
    _tiles.measured.update(parse_entries(content["entries"]))
    _launch.forget_plans()  # launches remember what was chosen for them


def device_name(device: torch.device | None) -> str:
    """Of a device, or of the one that launches are on if none is given."""
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else "cpu"


def conditions(name: str) -> dict[str, str | None]:
    """What measured tiles are right and fast for, beside the release of torch: the device, Triton, the kernels."""
    return {"device": name, "triton": getattr(_backend.triton, "__version__", None), "kernels": _kernels()}


@functools.cache
def _kernels() -> str:
    """Of the sources of all kernels."""
    sources = (path.read_bytes() for path in sorted(Path(edt_kernels.__path__[0]).rglob("*.py")))
    code = b"".join(source for source in sources if b"\n@triton.jit" in source)
    return hashlib.sha256(code).hexdigest()[:16]


def read_table(path: Path) -> dict:
    """The checked content of a table's file."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; it must be a table of tiles, which python -m benchmarks tune writes")
    try:
        content = json.loads(path.read_text())
    except ValueError:  # wrong JSON or wrong UTF-8
        content = {}
    is_table = isinstance(content, dict) and isinstance(content.get("entries"), list)
    if not (is_table and isinstance(content.get("device"), str)):
        raise ValueError(f"{path} is no table of tiles; it must be JSON with a 'device' and 'entries'")
    for number, entry in enumerate(content["entries"]):
        check_entry(f"{path}, entry {number}", entry)
    return content


def check_entry(where: str, entry) -> None:
    """Raises ValueError for what no launch could take, or takes and gets wrong."""
    get = cast(Any, entry.get if isinstance(entry, dict) else {"pass": entry}.get)
    pass_name, key, tiles = get("pass"), get("key"), get("tiles")
    known = isinstance(pass_name, str) and pass_name in PASSES
    _require(known, f"{where}: pass is {pass_name!r}; it must be one of {', '.join(PASSES)}")
    kinds = ATTENTION_KEY if pass_name.startswith("amm_attention") else NORM_KEY
    needed = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
    right = isinstance(key, dict) and {name: type(value) for name, value in key.items()} == kinds
    _require(right, f"{where}: key is {key!r}; {pass_name} needs {needed}")
    ways = PASSES[pass_name]
    way = next((way for way in ways if isinstance(tiles, dict) and tiles.keys() == way.keys()), {})
    needed = " or ".join(" and ".join(way) for way in ways)
    _require(bool(way), f"{where}: tiles is {tiles!r}; {pass_name} needs tiles of {needed}")
    for kernel, kind in way.items():
        tile, names = tiles[kernel], [field.name for field in fields(kind)]
        right = isinstance(tile, dict) and sorted(tile) == sorted(names) and all(map(_is_size, tile.items()))
        if right and kernel == "short_backward":
            tokens = key["height"] * key["width"] + key["extra_tokens"]
            right = tile["block_m"] == tile["block_n"] >= tokens and not key["modulation"]
        if right and kernel == "resident_forward":
            right = tile["block_n"] == padded(key["head_dim"])
        _require(
            right,
            f"{where}: the tile of {kernel} is {tile!r}; it needs {', '.join(names)}, all but num_stages and "
            "programs a power of two; short_backward needs block_m = block_n for all tokens and a key without "
            "modulation, resident_forward block_n = head_dim rounded up to a power of two",
        )


def _is_size(item: tuple[str, object]) -> bool:
    name, size = item
    power_of_two = name in ("num_stages", "programs") or (type(size) is int and size & (size - 1) == 0)
    return type(size) is int and size > 0 and power_of_two


def parse_entries(entries: list[dict]) -> dict[tuple, Tiles]:
    """Of a checked table, as `edt_kernels._tiles.measured` has them."""
    return {
        _tiles.question(entry["pass"], entry["key"]): parse_tiles(entry["pass"], entry["tiles"])
        for entry in entries
    }


def parse_tiles(pass_name: str, tiles: dict[str, dict[str, int]]) -> Tiles:
    """From JSON, checked."""
    way = next(way for way in PASSES[pass_name] if way.keys() == tiles.keys())
    return {kernel: kind(**tiles[kernel]) for kernel, kind in way.items()}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
