"""What the norms' launchers share; above all, how (samples, rows, channels) are cut into programs."""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ._launch import common_alignment, launch, on_device_of
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


def row_program(pass_name: str, x: Tensor, rows: int, slices: int, channels: int) -> RowProgram:
    """The programs of a pass, such as "adaln.forward", for the samples of x, the residual stream: `rows` rows of
    slices·channels channels each."""
    kernel = pass_name.partition(".")[2]
    tile = choose_row_tile(rows, slices, channels, kernel == "backward")
    heuristic = RowTile(tile.rows, tile.num_warps) if kernel == "forward" else tile
    dtype = "float32" if x.dtype == torch.float32 else "16-bit"
    key = {"dtype": dtype, "rows": rows, "channels": channels}
    tile = choose_tiles(x.device, pass_name, key, {kernel: heuristic})[kernel]
    return cut_rows(tile, x.shape[0], rows, slices, channels)


def launch_rows(kernel, tile: RowProgram, by_row: tuple[Tensor, ...], *arguments, **constants) -> None:
    """Launches a norm's kernel, if there are rows; `by_row` are the tensors that it reads or writes row by row."""
    programs = math.prod(tile.programs)
    if programs == 0:
        return
    with on_device_of(by_row[0]):
        launch(
            kernel, programs, *arguments,
            **constants, C=tile.channels, ALIGN=math.gcd(tile.channels, common_alignment(*by_row)),
            ROWS=tile.rows, BLOCK_C=tile.block_c, LANES=max(32 * tile.num_warps // tile.rows, 1),
            num_warps=tile.num_warps, **tile.options,
        )  # fmt: skip


def empty_normed(x: Tensor, rows: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What a forward kernel fills: the result, so many rows for each sample of x, and the rows' mean and rstd."""
    mean, rstd = (x.new_empty(x.shape[0], rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape[0], rows, channels, dtype=dtype), mean, rstd


def total(partials: Tensor) -> Tensor:
    """(quantities, samples, programs of each, channels) → (quantities, samples, channels)."""
    return partials.squeeze(2) if partials.shape[2] == 1 else partials.sum(2)


def save_for_backward(ctx, tensors: tuple[Tensor | None, ...], modulation: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the statistics, which nobody differentiates
    ctx.save_for_backward(*tensors)
    ctx.modulation_dtypes = [tensor.dtype for tensor in modulation]


def modulation_gradients(ctx, sums: Tensor) -> list[Tensor]:
    """The sums over each sample's rows, in the dtypes of the modulation."""
    return [gradient.to(dtype) for gradient, dtype in zip(sums.unbind(0), ctx.modulation_dtypes)]
