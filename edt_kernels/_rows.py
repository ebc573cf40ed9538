"""How the norm kernels cut (samples, rows, channels) into programs."""

import math
from dataclasses import dataclass

import triton

# Enough loads in flight to cover latency.
_TILE_ELEMENTS = 4096
# Programs of a backward pass, whatever the device, so that gradients are the same everywhere: about two for each
# multiprocessor of an H200.
_BACKWARD_PROGRAMS = 264


@dataclass(frozen=True)
class RowTile:
    """rows × slices × block_c elements; a backward program takes rows_per_program rows of one sample."""

    rows: int
    block_c: int
    num_warps: int
    rows_per_program: int


def choose_row_tile(samples: int, rows: int, slices: int, channels: int) -> RowTile:
    """For `samples` of `rows` rows, each of slices·channels channels."""
    block_c = triton.next_power_of_2(channels)
    row_elements = slices * block_c
    tile_rows = min(max(_TILE_ELEMENTS // row_elements, 1), triton.next_power_of_2(rows))
    # 16 or 32 elements a thread: what compiles without spills for EDT's backward passes on every target. With 32,
    # adaln's spilled at 1248 channels on sm_100; with 16, the merge's and the split's spilled on sm_90.
    num_warps = min(max(tile_rows * row_elements // (512 if slices == 1 else 1024), 1), 16)
    programs_per_sample = math.ceil(_BACKWARD_PROGRAMS / samples)
    tiles_per_program = math.ceil(math.ceil(rows / tile_rows) / programs_per_sample)
    return RowTile(tile_rows, block_c, num_warps, tiles_per_program * tile_rows)
