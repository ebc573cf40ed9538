"""The tiles of launches: the measured ones where there are any, else each op's own choice."""

from dataclasses import dataclass
from typing import Any


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
class RowLoop(RowTile):
    """So many rows at a time, over which about this many programs in all walk."""

    programs: int


Tile = ScoreTile | CellTile | RowTile
Tiles = dict[str, Any]  # of the kernels of a pass, each of which has its kind of Tile

# By `question`. Empty until something was measured on a GPU: `python -m benchmarks tune` measures, and
# `benchmarks.tiles.use` puts a file of it here for one process; what holds for everybody is to be written here.
measured: dict[tuple, Tiles] = {}


def question(pass_name: str, key: dict) -> tuple:
    """What `measured` has a pass by, such as "adaln.forward". Equality of all of the key counts."""
    return pass_name, *sorted(key.items())


def choose_tiles(pass_name: str, key: dict, heuristic: Tiles) -> Tiles:
    return measured.get(question(pass_name, key), heuristic)
