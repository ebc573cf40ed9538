"""The tiles of launches: the measured ones where a table has them, else each op's own choice.

A table is a JSON file that `edt tune` wrote on one device. The first of these is read, alone:

- the file that the environment variable EDT_KERNELS_TILES names; an error if it cannot be used;
- `edt-kernels/tiles/<device>.json` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache), where `edt tune` puts
  it; a warning says why one is passed over: broken, or of another device, Triton or version of the kernels;
- `edt_kernels/tiles/<device>.json`, as shipped.

Its entries are found by equality of all of their key; what has no entry is left to the op. CPU tensors take no
table but one that the variable names, of whichever device.
"""

import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch

from . import _backend

VARIABLE = "EDT_KERNELS_TILES"


@dataclass(frozen=True)
class ScoreTile:
    """block_m query rows by block_n key rows."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class CellTile:
    """So many cells of the grid, or of the grids of several batch items, by as many."""

    cells: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowTile:
    """So many rows, with all of their channels."""

    rows: int
    num_warps: int


@dataclass(frozen=True)
class RowLoop:
    """So many rows at a time, over which about this many programs in all walk."""

    rows: int
    num_warps: int
    programs: int


Tile = ScoreTile | CellTile | RowTile | RowLoop
Tiles = dict[str, Any]  # of the kernels of a pass, each of which has its kind of Tile

_NORMS = ("gated_residual_adaln", "adaln", "gated_residual", "token_merge_adaln", "token_split_concat_adaln")
OPS = ("amm_attention", *_NORMS)
# The passes of the ops: for each, the ways to compute it, and of a way, its kernels and the kind of their tiles.
PASSES: dict[str, tuple[dict[str, type[Tile]], ...]] = {
    "amm_attention.forward": (
        {"short_forward": ScoreTile},
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
_ATTENTION_KEY = {
    "dtype": str,  # "float32" or "16-bit"
    "height": int,
    "width": int,
    "extra_tokens": int,
    "head_dim": int,
    "bias": bool,
    "modulation": bool,
    "many_heads": bool,
}
_NORM_KEY = {"dtype": str, "rows": int, "channels": int}  # of the residual stream; rows of a sample


def choose_tiles(device: torch.device, pass_name: str, key: dict, heuristic: Tiles) -> Tiles:
    """The measured tiles of a pass, by kernel, or else `heuristic`."""
    return table_of(device).get(question(pass_name, key), heuristic)


def question(pass_name: str, key: dict) -> tuple:
    """How a table is asked for the tiles of a pass."""
    return pass_name, *sorted(key.items())


def table_of(device: torch.device) -> Mapping[tuple, Tiles]:
    """The table that dispatch reads for tensors on this device."""
    file = os.environ.get(VARIABLE, "")
    if not file and device.type != "cuda":
        return {}
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _table_of(file, device)


@functools.lru_cache  # reading is cheap, but every launch asks
def _table_of(file: str, device: torch.device) -> Mapping[tuple, Tiles]:
    name = device_name(device)
    if file:
        content = read_table(Path(file))
        _require(
            name in ("cpu", content["device"]),
            f"{file} was measured on {content['device']!r}; this is {name!r}: set {VARIABLE} to a table of it, "
            "which edt tune --output FILE writes, or unset it",
        )
        here = {key: value for key, value in conditions(content["device"]).items() if key in content}
        if difference := _difference(content, here):
            warnings.warn(f"{file} {difference}; edt tune --output FILE measures anew", stacklevel=2)
        return parse_entries(content["entries"])
    path = user_table(name)
    if path and os.path.isfile(path):  # unlike Path.is_file, also where the folder may not be read
        try:
            content = read_table(path)
            difference = _difference(content, conditions(name))
            _require(not difference, f"{path} {difference}")
            return parse_entries(content["entries"])
        except (OSError, ValueError) as error:
            warnings.warn(f"measured tiles are not used: {error}; delete it and run edt tune", stacklevel=2)
    path = shipped_table(name)
    return parse_entries(read_table(path)["entries"]) if path.is_file() else {}


def conditions(name: str) -> dict[str, str | None]:
    """What measured tiles are right and fast for, beside the release of torch: the device, Triton, the kernels."""
    return {"device": name, "triton": getattr(_backend.triton, "__version__", None), "kernels": _kernels()}


@functools.cache
def _kernels() -> str:
    """Of the sources of all kernels."""
    sources = (path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
    code = b"".join(source for source in sources if b"\n@triton.jit" in source)
    return hashlib.sha256(code).hexdigest()[:16]


def _difference(content: dict, here: dict) -> str:
    """What a table was measured with that is not as here, in words; nothing where all is."""
    there = {key: content.get(key) for key, value in here.items() if content.get(key) != value}
    return f"was measured with {there}; this is { {key: here[key] for key in there} }" if there else ""


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_slug(name: str) -> str:
    """Of files and folders of a device: "NVIDIA H200" → nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def user_table(name: str) -> Path | None:
    """Where `edt tune` puts the table of a device; None for a user without a home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # which its specification says to ignore
        cache = os.path.expanduser("~/.cache")
    return Path(cache, "edt-kernels", "tiles", f"{device_slug(name)}.json") if os.path.isabs(cache) else None


def shipped_table(name: str) -> Path:
    """Where the table of a device lies that the package brings."""
    return Path(__file__).parent / "tiles" / f"{device_slug(name)}.json"


def read_table(path: Path) -> dict:
    """The checked content of a table's file."""
    _require(
        path.is_file(), f"{path} is no file; it must be a table of tiles, which edt tune --output FILE writes"
    )
    try:
        content = json.loads(path.read_text())
    except ValueError:  # wrong JSON or wrong UTF-8
        content = {}
    is_table = isinstance(content, dict) and isinstance(content.get("entries"), list)
    _require(
        is_table and isinstance(content.get("device"), str),
        f"{path} is no table of tiles; it must be JSON with a 'device' and 'entries', as edt tune writes it",
    )
    for number, entry in enumerate(content["entries"]):
        _check_entry(f"{path}, entry {number}", entry)
    return content


def _check_entry(where: str, entry) -> None:
    get = cast(Any, entry.get if isinstance(entry, dict) else {"pass": entry}.get)
    pass_name, key, tiles = get("pass"), get("key"), get("tiles")
    known = isinstance(pass_name, str) and pass_name in PASSES
    _require(known, f"{where}: pass is {pass_name!r}; it must be one of {', '.join(PASSES)}")
    kinds = _ATTENTION_KEY if pass_name.startswith("amm_attention") else _NORM_KEY
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
        if right and kernel.startswith("short"):
            tokens = key["height"] * key["width"] + key["extra_tokens"]
            right = tile["block_m"] == tile["block_n"] >= tokens
            right &= kernel == "short_forward" or not key["modulation"]
        _require(
            right,
            f"{where}: the tile of {kernel} is {tile!r}; it needs {', '.join(names)}, all but num_stages and "
            "programs a power of two; short kernels need block_m = block_n for all tokens, short_backward a key "
            "without modulation",
        )


def _is_size(item: tuple[str, object]) -> bool:
    name, size = item
    power_of_two = name in ("num_stages", "programs") or (type(size) is int and size & (size - 1) == 0)
    return type(size) is int and size > 0 and power_of_two


def parse_entries(entries: list[dict]) -> dict[tuple, Tiles]:
    """Of a checked table."""
    return {question(entry["pass"], entry["key"]): parse_tiles(entry["pass"], entry["tiles"]) for entry in entries}


def parse_tiles(pass_name: str, tiles: dict[str, dict[str, int]]) -> Tiles:
    """From JSON, checked."""
    way = next(way for way in PASSES[pass_name] if way.keys() == tiles.keys())
    return {kernel: kind(**tiles[kernel]) for kernel, kind in way.items()}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
