"""What the norms' launchers share; above all, how (samples, rows, channels) are cut into programs."""

import itertools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ._launch import Launch, common_alignment, planned
from ._tiles import RowLoop, RowTile, choose_tiles

# Programs of a backward pass, whatever the device, so that gradients are the same wherever no table of measured
# tiles says otherwise: two for each multiprocessor of an H100 or H200, as many as may be there at once.
_BACKWARD_PROGRAMS = 264


@dataclass(frozen=True)
class RowProgram:
    """rows × slices × block_c elements at a time. A program takes rows_per_program rows of one sample."""

    rows: int
    channels: int
    block_c: int
    num_warps: int
    rows_per_program: int
    programs: tuple[int, int]  # samples, programs of each
    options: dict[str, int]  # of the compiler


def choose_row_tile(rows: int, slices: int, channels: int, backward: bool) -> RowLoop:
    """What a pass takes without measurement, for samples of `rows` rows of slices·channels channels each."""
    # Backward, a thread holds 8 elements of each array and, over all rows, of three sums: at most 128 registers,
    # so that two programs share a multiprocessor, each with the next tile on its way. Forward holds no sums, and
    # with 16 elements makes half as many shuffles for each. Wider rows take 16 and then 32, which spill: on sm_90
    # adaln's backward beyond 8192 channels, gated_residual_adaln's beyond 4096, the merge's beyond 4·2048 and the
    # split's beyond 2·4096.
    row_elements = slices * triton.next_power_of_2(channels)
    each = 8 if backward and row_elements <= 2048 else 16
    tile_rows = max(min(256 * each // row_elements, triton.next_power_of_2(rows)), 1)
    num_warps = min(max(tile_rows * row_elements // (32 * each), 1), 16)
    return RowLoop(tile_rows, num_warps, _BACKWARD_PROGRAMS)


def cut_rows(tile: RowTile | RowLoop, samples: int, rows: int, slices: int, channels: int) -> RowProgram:
    """The programs of a pass over `samples` of `rows` rows, of so many channels a slice."""
    rows_per_program, many_registers = tile.rows, False
    if isinstance(tile, RowLoop):
        many_registers = slices == 1 and channels > 2048
        # The nearest number of programs, not the next larger: batches of 32 to 256 then make 256 of them, not 288
        # to 512 with a last wave nearly empty, and a large batch of few rows writes fewer partial sums.
        programs = max(round(tile.programs / max(samples, 1)), 1)
        rows_per_program *= max(triton.cdiv(triton.cdiv(rows, tile.rows), programs), 1)
    return RowProgram(
        rows=tile.rows,
        channels=channels,
        block_c=triton.next_power_of_2(channels),
        num_warps=tile.num_warps,
        rows_per_program=rows_per_program,
        programs=(samples, triton.cdiv(rows, rows_per_program)),
        # Left alone, NVIDIA's assembler spills 8 bytes to stay within 40, 64 or 80 registers, or takes 172, which
        # is one program a multiprocessor. gated_residual_adaln's backward needs them for rows of more than 2048
        # channels: with 128 it spills on Triton 3.6. AMD's compiler has no such option.
        options={} if torch.version.hip or many_registers else {"maxnreg": 128},
    )


def plan_rows(
    signature: tuple | None, name: str, kernel, shape: tuple[int, int, int, int],
    by_row: tuple[Tensor | None, ...], vectors: tuple[Tensor | None, ...], *numbers: float, out_dtype=None,
) -> tuple[Launch, tuple[int, int]]:  # fmt: skip
    """A pass of a norm, such as "adaln.forward", over (samples, rows, slices, channels of a slice): the launch of
    its kernel, and the numbers of samples and of programs of each.

    A kernel takes tensors of rows (B, N, C), vectors of samples (B, C), other tensors; the strides of the first
    two but for their last, dense, dimension; the number of rows, other numbers and, backward, the rows of a
    program. What is absent is None, and so are its strides.
    """
    return planned(
        _plan_rows, signature, (*by_row, *vectors), name, kernel, shape, len(by_row), numbers, out_dtype
    )


def _plan_rows(*arguments) -> tuple[Launch, tuple[int, int]]:
    *tensors, name, kernel, (samples, rows, slices, channels), count, numbers, _ = arguments
    direction = name.partition(".")[2]
    tile = choose_row_tile(rows, slices, channels, direction == "backward")
    heuristic = RowTile(tile.rows, tile.num_warps) if direction == "forward" else tile
    wide = any(t is not None and t.dtype == torch.float32 for t in tensors[:count])
    key = {"dtype": "float32" if wide else "16-bit", "rows": rows, "channels": channels}
    tile = choose_tiles(name, key, {direction: heuristic})[direction]
    cut = cut_rows(tile, samples, rows, slices, channels)
    if direction == "backward":
        numbers = *numbers, cut.rows_per_program
    strides = [[None] * (2 if i < count else 1) if t is None else t.stride()[:-1] for i, t in enumerate(tensors)]
    launch = Launch(
        kernel, math.prod(cut.programs), *itertools.chain(*strides), rows, *numbers,
        C=channels, ALIGN=math.gcd(channels, common_alignment(*tensors[:count])),
        ROWS=cut.rows, BLOCK_C=cut.block_c, LANES=max(32 * cut.num_warps // cut.rows, 1),
        num_warps=cut.num_warps, **cut.options,
    )  # fmt: skip
    return launch, cut.programs


def total(partials: Tensor) -> Tensor:
    """(quantities, samples, programs of each, channels) → (quantities, samples, channels)."""
    return partials.squeeze(2) if partials.shape[2] == 1 else partials.sum(2)


def in_dtypes(sums: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    """The quantities of `total`, each in the dtype of what it is the gradient of."""
    return [gradient.to(dtype) for gradient, dtype in zip(sums.unbind(0), dtypes)]


def dense_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty, of the tensor's shape, contiguous."""
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def empty_normed(x: Tensor, rows: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a forward kernel fills: the result, so many rows for each sample of x; mean and 1/σ of each row."""
    B = x.shape[0]
    out = x.new_empty((B, rows, channels), dtype=dtype)
    return out, x.new_empty((B, rows, 2), dtype=torch.float32)
