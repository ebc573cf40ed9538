"""Launchers, tiles and torch registration of the `amm_attention` kernels."""

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from .._launch import (
    common_alignment,
    define_gradient,
    define_op,
    dense_rows,
    launch,
    on_device_of,
    refuse_forward_mode,
)
from .._tiles import CellTile, ScoreTile, choose_tiles
from . import kernels, resident_kernels, short_kernels, table_kernels


@dataclass(frozen=True)
class TableTile:
    """rows × columns cells of the grid, of `items` batch items at once; a power of two each."""

    items: int
    rows: int
    columns: int
    num_warps: int
    num_stages: int


# The tile of each kernel, by matrix unit and padded head dim, where no table has a measured one: the largest that
# compile without spills at EDT's shapes (`python -m benchmarks static`). float32 products are exact, so they run
# on the FMA units out of registers ("fma"; its D 128 still spills). Triton gives each warp 16 rows of a score tile
# that feeds another product: with fewer than 16·num_warps rows (queries, in backward_kv and short_backward keys)
# warps repeat each other's work. 64 rows at 4 warps would not, but miscompile on Hopper (triton issue 11366,
# flash-linear-attention issue 984), so there 8 warps do.
_TILES = {
    ("wgmma", 64): {
        "short_forward": ScoreTile(64, 64, 8, 2),
        "short_backward": ScoreTile(64, 64, 8, 2),
        "resident_forward": ScoreTile(128, 64, 8, 1),
        "forward": ScoreTile(128, 64, 8, 2),
        "resident_backward": ScoreTile(32, 256, 8, 2),
        "backward_q": ScoreTile(128, 32, 8, 2),
        "backward_kv": ScoreTile(32, 128, 8, 2),
    },
    ("wgmma", 128): {
        "short_forward": ScoreTile(64, 64, 8, 1),
        "forward": ScoreTile(128, 32, 8, 2),
        "backward_q": ScoreTile(128, 32, 8, 1),
        "backward_kv": ScoreTile(16, 128, 8, 2),
    },
    ("mma", 64): {
        "short_forward": ScoreTile(64, 64, 8, 2),
        "short_backward": ScoreTile(32, 32, 4, 2),
        "forward": ScoreTile(64, 32, 4, 2),
        "backward_q": ScoreTile(64, 32, 4, 2),
        "backward_kv": ScoreTile(32, 64, 4, 1),
    },
    ("mma", 128): {
        "short_forward": ScoreTile(64, 64, 8, 1),
        "forward": ScoreTile(128, 32, 8, 1),
        "backward_q": ScoreTile(64, 32, 8, 1),
        "backward_kv": ScoreTile(32, 64, 8, 1),
    },
    ("mfma", 64): {
        "short_forward": ScoreTile(64, 64, 4, 1),
        "short_backward": ScoreTile(32, 32, 2, 1),
        "forward": ScoreTile(64, 64, 4, 1),
        "backward_q": ScoreTile(64, 64, 4, 1),
        "backward_kv": ScoreTile(64, 64, 4, 1),
    },
    ("mfma", 128): {
        "short_forward": ScoreTile(64, 64, 4, 1),
        "forward": ScoreTile(64, 32, 4, 1),
        "backward_q": ScoreTile(64, 32, 4, 1),
        "backward_kv": ScoreTile(32, 64, 4, 1),
    },
    ("fma", 64): {
        "short_forward": ScoreTile(32, 32, 4, 1),
        "short_backward": ScoreTile(32, 32, 8, 1),
        "forward": ScoreTile(32, 32, 4, 1),
        "backward_q": ScoreTile(32, 32, 8, 1),
        "backward_kv": ScoreTile(32, 32, 8, 1),
    },
    ("fma", 128): {
        "short_forward": ScoreTile(16, 16, 4, 1),
        "forward": ScoreTile(16, 16, 4, 1),
        "backward_q": ScoreTile(32, 32, 8, 1),
        "backward_kv": ScoreTile(16, 16, 4, 1),
    },
}
# Datacenter Blackwell takes Hopper's tiles but for these: the accumulators of resident_forward exceed its tensor
# memory (Triton compiles that to an empty kernel), the others spill.
_TILES["tcgen05", 64] = _TILES["wgmma", 64] | {
    "short_forward": ScoreTile(64, 64, 8, 1),
    "backward_q": ScoreTile(128, 64, 8, 2),
}
_TILES["tcgen05", 128] = _TILES["wgmma", 128] | {"backward_q": ScoreTile(128, 64, 8, 1)}
del _TILES["tcgen05", 64]["resident_forward"], _TILES["tcgen05", 64]["resident_backward"]
TABLE_TILES = {
    "wgmma": CellTile(64, 8, 2),
    "tcgen05": CellTile(64, 8, 1),
    "mma": CellTile(32, 8, 1),
    "mfma": CellTile(64, 4, 1),
    "fma": CellTile(32, 4, 1),
}

# What fits on the chip: 256 rows of 64 channels, twice, are 64 KB of shared memory.
_RESIDENT_TOKENS = 256
# Where fewer heads than this are to be computed (two for each multiprocessor of an H200), several programs a head
# fill the device better.
_RESIDENT_HEADS = 264
# Programs of the short kernels and of `backward_tables`, whatever the device, so that gradients are the same
# everywhere; up to twice as many, where heads or tiles do not divide them. Each of the short backward pass writes
# one (64, 64) partial, 4 to 8 MB in all; each of the tables' own pass up to two a table, 8 to 32 MB, or more where
# heads times distances exceed this number (24 heads of 64×64 tokens: 50 MB). Those all do the same work, in four
# rounds on the 132 multiprocessors of an H200.
_SHORT_PROGRAMS = {"short_forward": 528, "short_backward": 264}
_TABLE_PROGRAMS = 528


def matrix_unit(device: torch.device) -> str:
    """The key of the tile tables for 16-bit inputs: Hopper, datacenter Blackwell, other NVIDIA, AMD CDNA."""
    if device.type != "cuda":  # the interpreter
        return "wgmma"
    if torch.version.hip:
        return "mfma"
    return {9: "wgmma", 10: "tcgen05"}.get(torch.cuda.get_device_capability(device)[0], "mma")


def padded(head_dim: int) -> int:
    """The channels of a tile of rows. A `resident_forward` needs as many keys in its tiles: its two products then
    have one layout. Of different ones Triton 3.6 and 3.7 make PTX that copies accumulators before their product is
    waited for, which the PTX ISA leaves undefined."""
    return max(16, triton.next_power_of_2(head_dim))


def tiles_of(unit: str, head_dim: int) -> dict[str, ScoreTile]:
    return _TILES[unit, 64 if head_dim <= 64 else 128]


def choose_forward(unit: str, num_tokens: int, head_dim: int, num_heads: int, has_modulation: bool) -> str:
    """The kernel of the forward pass of `num_heads` heads over the whole batch."""
    tiles = tiles_of(unit, head_dim)
    if num_tokens <= tiles["short_forward"].block_m:
        return "short_forward"
    # Only WGMMA reads both operands from shared memory; others would keep them in registers, which are too few, as
    # they are for both tables (16 bytes spill).
    fits = "resident_forward" in tiles and num_tokens <= _RESIDENT_TOKENS and not has_modulation
    fits = fits and tiles["resident_forward"].block_n == padded(head_dim)
    return "resident_forward" if fits and num_heads >= _RESIDENT_HEADS else "forward"


def choose_backward(
    unit: str, num_tokens: int, grid: tuple[int, int], head_dim: int, num_heads: int, has_modulation: bool
) -> str:
    """The kernel of the backward pass, or "backward" for the three passes. Registers do not hold a second table:
    with AMM, which trained models of EDT have for inference alone, the kernels of one pass spill."""
    tiles = tiles_of(unit, head_dim)
    if has_modulation:
        return "backward"
    if "short_backward" in tiles and num_tokens <= tiles["short_backward"].block_m:
        return "short_backward"
    # Of smaller heads, products have layouts that take more registers; of others, rows are loaded in small pieces.
    right_heads = padded(head_dim) == 64 and head_dim % 4 == 0 and num_heads >= _RESIDENT_HEADS
    if "resident_backward" not in tiles or not right_heads:
        return "backward"
    # Nor do they hold masks: all rows of the tile exist, and its queries are whole rows of the grid.
    tile, whole = tiles["resident_backward"], num_tokens == math.prod(grid) == triton.next_power_of_2(num_tokens)
    fits = whole and num_tokens <= tile.block_n and tile.block_m % grid[1] == 0
    return "resident_backward" if fits else "backward"


def lay_out_cells(tile: CellTile, grid: tuple[int, int]) -> TableTile:
    """Whole rows of the grid as far as they fit, then more batch items where the grid is smaller."""
    H, W = grid
    columns = min(triton.next_power_of_2(W), tile.cells)
    rows = min(triton.next_power_of_2(H), tile.cells // columns)
    return TableTile(tile.cells // (rows * columns), rows, columns, tile.num_warps, tile.num_stages)


@dataclass(frozen=True)
class _Problem:
    """What the launches of one call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor  # (heads or 1, offsets): bias, modulation, or pairs of both; q stands in where there is neither
    has_bias: bool
    has_modulation: bool
    grid: tuple[int, int]
    before: int
    scale: float

    @property
    def unit(self) -> str:
        return "fma" if self.q.dtype == torch.float32 else matrix_unit(self.q.device)

    def forward_tile(self) -> tuple[str, ScoreTile]:
        """The kernel of the forward pass, and its tile."""
        B, N, heads, D = self.q.shape
        kernel = choose_forward(self.unit, N, D, B * heads, self.has_modulation)
        ((kernel, tile),) = self._measured("forward", {kernel: tiles_of(self.unit, D)[kernel]}).items()
        return kernel, tile

    def backward_tiles(self) -> dict[str, ScoreTile | CellTile]:
        """The tiles of the kernels of the backward pass: `short_backward`, or `backward_tables` after
        `resident_backward` or the two passes over queries and keys."""
        B, N, heads, D = self.q.shape
        tiles = tiles_of(self.unit, D) | {"backward_tables": TABLE_TILES[self.unit]}
        kernels = {
            "short_backward": ("short_backward",),
            "resident_backward": ("resident_backward", "backward_tables"),
            "backward": ("backward_q", "backward_kv", "backward_tables"),
        }[choose_backward(self.unit, N, self.grid, D, B * heads, self.has_modulation)]
        return self._measured("backward", {kernel: tiles[kernel] for kernel in kernels})

    def _measured(self, direction: str, heuristic: dict) -> dict:
        (B, N, heads, D), (H, W) = self.q.shape, self.grid
        key = {
            "dtype": "float32" if self.q.dtype == torch.float32 else "16-bit",
            "height": H,
            "width": W,
            "extra_tokens": N - H * W,
            "head_dim": D,
            "bias": self.has_bias,
            "modulation": self.has_modulation,
            "many_heads": B * heads >= _RESIDENT_HEADS,
        }
        return choose_tiles(self.q.device, f"amm_attention.{direction}", key, heuristic)

    def strides(self, *tensors: Tensor) -> list[int]:
        """Of q, k, v, then of these, as the kernels take them."""
        return [stride for tensor in (self.q, self.k, self.v, *tensors) for stride in tensor.stride()[:3]]

    def sizes(self) -> tuple:
        _, N, heads, _ = self.q.shape
        stride_table = self.table.stride(0) if self.table is not self.q and self.table.shape[0] > 1 else 0
        return (stride_table, N, heads, *self.grid, self.before, self.scale)

    def constants(self, *tensors: Tensor) -> dict:
        """Compile-time arguments common to the kernels; `tensors` are the rows that one of them touches."""
        D = self.q.shape[-1]
        tf32 = self.q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        return {
            "D": D,
            "BLOCK_D": padded(D),
            "ALIGN": common_alignment(self.q, self.k, self.v, *tensors),
            "HAS_BIAS": self.has_bias,
            "HAS_MODULATION": self.has_modulation,
            "PRECISION": "tf32" if tf32 else "ieee",  # what PyTorch's own products would be
        }

    def launch(
        self,
        kernel,
        tile: ScoreTile | TableTile,
        programs: int,
        pointers: tuple,
        rows: tuple,
        *extra: int,
        **constants,
    ) -> None:
        """`pointers` are the kernel's after the table, `rows` those of them whose strides it takes, `extra` its
        run-time arguments after the sizes."""
        launch(
            kernel, programs,
            self.q, self.k, self.v, self.table, *pointers, *self.strides(*rows), *self.sizes(), *extra,
            **self.constants(*rows), **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    def launch_tiles(self, kernel, tile: ScoreTile, programs_per_head: int, pointers, rows, **constants) -> None:
        """A kernel of which each program takes a tile of one head, or the whole head."""
        (B, N, heads, _), (H, W) = self.q.shape, self.grid
        has_extra, masked = H * W != N, N % tile.block_m != 0 or N % tile.block_n != 0
        constants |= {
            "HAS_EXTRA": has_extra,
            "MASKED": masked,
            "EVEN": not masked and not has_extra and tile.block_m % W == 0 and tile.block_n % W == 0,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        }
        self.launch(kernel, tile, B * heads * programs_per_head, pointers, rows, **constants)

    def launch_short(self, kernel, tile: ScoreTile, splits: int, pointers, rows, **constants) -> None:
        """A kernel of which each program takes one of `splits` shares of the batch of one head."""
        B, N, heads, _ = self.q.shape
        seq = triton.next_power_of_2(N)
        packed = tile.block_m // seq
        constants |= {
            "HAS_EXTRA": math.prod(self.grid) != N,
            "MASKED": packed > 1 or seq != N,
            "SEQ": seq,
            "BLOCK": tile.block_m,
        }
        steps = triton.cdiv(triton.cdiv(B, packed), splits)
        self.launch(kernel, tile, splits * heads, pointers, rows, B, steps, **constants)

    def short_splits(self, kernel: str, tile: ScoreTile) -> int:
        """Shares of the batch, none of them empty."""
        B, N, heads, _ = self.q.shape
        groups = triton.cdiv(B, tile.block_m // triton.next_power_of_2(N))
        steps = triton.cdiv(groups * heads, _SHORT_PROGRAMS[kernel])
        return triton.cdiv(groups, steps)


def _problem(q, k, v, modulation, rel_pos_bias, grid_h, grid_w, before, scale) -> _Problem:
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    offsets, heads = (2 * grid_h - 1) * (2 * grid_w - 1), q.shape[2]
    # The bias comes as (offsets, heads); a row of the grid should be one run of memory for a head.
    table = q
    if modulation is not None:
        table = modulation = modulation.reshape(-1, offsets).contiguous()
    if rel_pos_bias is not None:
        table = rel_pos_bias.t().contiguous()
    if modulation is not None and rel_pos_bias is not None:  # one 64-bit load gathers both
        pairs = torch.stack([table.float(), modulation.float().expand(heads, -1)], dim=-1)
        table = pairs.view(torch.int64).squeeze(-1)
    has_bias, has_modulation = rel_pos_bias is not None, modulation is not None
    return _Problem(q, k, v, table, has_bias, has_modulation, (grid_h, grid_w), before, scale)


def _logsumexp_shape(q: Tensor) -> tuple[int, ...]:
    """Of float32 inputs in two parts, see `kernels`."""
    B, N, heads, _ = q.shape
    return (B, heads, 2, N) if q.dtype == torch.float32 else (B, heads, N)


def _forward(q, k, v, modulation, rel_pos_bias, grid_h, grid_w, before, scale):
    p = _problem(q, k, v, modulation, rel_pos_bias, grid_h, grid_w, before, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(_logsumexp_shape(q), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, logsumexp
    pointers, rows = (out, logsumexp), (out,)
    kernel, tile = p.forward_tile()
    N = q.shape[1]
    with on_device_of(q):
        if kernel == "short_forward":
            p.launch_short(short_kernels.short_forward, tile, p.short_splits(kernel, tile), pointers, rows)
        elif kernel == "resident_forward":
            tiles = triton.cdiv(N, tile.block_n)
            p.launch_tiles(resident_kernels.resident_forward, tile, 1, pointers, rows, TILES=tiles)
        else:
            p.launch_tiles(kernels.forward, tile, triton.cdiv(N, tile.block_m), pointers, rows)
    return out, logsumexp


def _backward(
    grad_out, q, k, v, modulation, rel_pos_bias, out, logsumexp, grid_h, grid_w, before, scale,
    needs_modulation, needs_bias,
):  # fmt: skip
    out, logsumexp = out.contiguous(), logsumexp.contiguous()
    grad_q, grad_k, grad_v = (torch.empty_like(out) for _ in range(3))
    offsets = (2 * grid_h - 1, 2 * grid_w - 1)
    heads = q.shape[2]
    grad_bias, grad_modulation = (  # of each head; empty where not needed
        torch.empty((heads, *offsets) if needed else (0,), dtype=torch.float32, device=q.device)
        for needed in (needs_bias, needs_modulation)
    )
    if q.numel() == 0:
        grad_bias.zero_()
        grad_modulation.zero_()
    else:
        p = _problem(q, k, v, modulation, rel_pos_bias, grid_h, grid_w, before, scale)
        with on_device_of(q):
            _launch_backward(
                p, dense_rows(grad_out), out, logsumexp, grad_q, grad_k, grad_v, grad_bias, grad_modulation
            )
    if needs_bias:
        grad_bias = grad_bias.flatten(1).t().to(rel_pos_bias.dtype).contiguous()
    if needs_modulation:
        if modulation.ndim == 2:  # one table for all heads
            grad_modulation = grad_modulation.sum(0)
        grad_modulation = grad_modulation.to(modulation.dtype)
    return grad_q, grad_k, grad_v, grad_modulation, grad_bias


def _launch_backward(p, grad_out, out, logsumexp, grad_q, grad_k, grad_v, grad_bias, grad_modulation) -> None:
    """Fills the gradients; of the tables only those that have elements."""
    N, tiles = p.q.shape[1], p.backward_tiles()
    if "short_backward" in tiles:
        _launch_short_backward(p, tiles["short_backward"], grad_out, logsumexp, grad_q, grad_k, grad_v, grad_bias)
        return
    B, _, heads, _ = p.q.shape
    delta = torch.empty(B, heads, N, dtype=torch.float32, device=out.device)
    if "resident_backward" in tiles:
        tile = tiles["resident_backward"]
        p.launch_tiles(
            resident_kernels.resident_backward, replace(tile, block_n=N), 1,
            (out, grad_out, logsumexp, delta, grad_q, grad_k, grad_v), (out, grad_out),
        )  # fmt: skip
    else:
        tile = tiles["backward_q"]
        p.launch_tiles(
            kernels.backward_q, tile, triton.cdiv(N, tile.block_m),
            (out, grad_out, logsumexp, delta, grad_q), (out, grad_out), WHOLE_ROWS=tile.block_n >= N,
        )  # fmt: skip
        tile = tiles["backward_kv"]
        p.launch_tiles(
            kernels.backward_kv, tile, triton.cdiv(N, tile.block_n),
            (grad_out, logsumexp, delta, grad_k, grad_v), (grad_out, grad_k), WHOLE_ROWS=tile.block_n >= N,
        )  # fmt: skip
    if grad_bias.numel() or grad_modulation.numel():
        tile = lay_out_cells(tiles["backward_tables"], p.grid)
        _launch_table_gradients(p, tile, grad_out, logsumexp, delta, grad_bias, grad_modulation)


def _launch_short_backward(p, tile, grad_out, logsumexp, grad_q, grad_k, grad_v, grad_bias) -> None:
    splits, heads, block = p.short_splits("short_backward", tile), p.q.shape[2], tile.block_m
    needs_bias = grad_bias.numel() > 0
    size = splits * heads * block * block if needs_bias else 0
    partials = torch.empty(size, dtype=torch.float32, device=grad_q.device)
    p.launch_short(
        short_kernels.short_backward, tile, splits,
        (grad_out, logsumexp, grad_q, grad_k, grad_v, partials), (grad_out, grad_q), GRAD_BIAS=needs_bias,
    )  # fmt: skip
    if needs_bias:
        seq = triton.next_power_of_2(p.q.shape[1])
        launch(
            short_kernels.reduce_short_partials, _reduction_programs(grad_bias),
            partials, grad_bias, splits, heads, *p.grid, p.before,
            SEQ=seq, BLOCK=block, BLOCK_OFFSETS=_OFFSETS_PER_PROGRAM,
        )  # fmt: skip


def _launch_table_gradients(p, tile, grad_out, logsumexp, delta, grad_bias, grad_modulation) -> None:
    B, _, heads, _ = p.q.shape
    H, W = p.grid
    layout = {"ITEMS": tile.items, "ROWS": tile.rows, "COLUMNS": tile.columns}
    block = math.prod(layout.values())
    tiles_y, across = triton.cdiv(H, tile.rows), 2 * triton.cdiv(W, tile.columns) - 1
    distances, programs = (2 * tiles_y - 1) * across, tiles_y * across  # of a head and share
    groups = triton.cdiv(B, tile.items)
    groups_per_split = triton.cdiv(groups * heads * programs, _TABLE_PROGRAMS)
    splits = triton.cdiv(groups, groups_per_split)
    size = splits * heads * distances * block * block
    bias_partials, modulation_partials = (
        torch.empty(size if grad.numel() else 0, dtype=torch.float32, device=grad.device)
        for grad in (grad_bias, grad_modulation)
    )
    p.launch(
        table_kernels.backward_tables, tile, splits * heads * programs,
        (grad_out, logsumexp, delta, bias_partials, modulation_partials), (grad_out,), B, groups_per_split,
        GRAD_BIAS=grad_bias.numel() > 0, GRAD_MODULATION=grad_modulation.numel() > 0,
        MASKED=tile.items > 1 or H % tile.rows != 0 or W % tile.columns != 0, **layout,
    )  # fmt: skip
    for partials, gradient in ((bias_partials, grad_bias), (modulation_partials, grad_modulation)):
        if gradient.numel():
            launch(
                table_kernels.reduce_table_partials, _reduction_programs(gradient),
                partials, gradient, splits, heads, H, W, **layout, BLOCK_OFFSETS=_OFFSETS_PER_PROGRAM,
            )  # fmt: skip


_OFFSETS_PER_PROGRAM = 16


def _reduction_programs(gradient: Tensor) -> int:
    heads, rows, columns = gradient.shape
    return heads * triton.cdiv(rows * columns, _OFFSETS_PER_PROGRAM)


def _fake_forward(q, k, v, modulation, rel_pos_bias, grid_h, grid_w, before, scale):
    return q.new_empty(q.shape), q.new_empty(_logsumexp_shape(q), dtype=torch.float32)


def _fake_backward(
    grad_out, q, k, v, modulation, rel_pos_bias, out, logsumexp, grid_h, grid_w, before, scale,
    needs_modulation, needs_bias,
):  # fmt: skip
    gradients = [out.new_empty(out.shape) for _ in range(3)]
    for table, needed in ((modulation, needs_modulation), (rel_pos_bias, needs_bias)):
        gradients.append(table.new_empty(table.shape) if needed else q.new_empty(0, dtype=torch.float32))
    return tuple(gradients)


def _save_for_backward(ctx, inputs, output):
    q, k, v, modulation, rel_pos_bias, *ctx.arguments = inputs
    ctx.set_materialize_grads(False)  # no zeros for the logsumexp, which nobody differentiates
    ctx.save_for_backward(q, k, v, modulation, rel_pos_bias, *output)


def _differentiate(ctx, grad_out, _grad_logsumexp):
    q, k, v, modulation, rel_pos_bias, out, logsumexp = ctx.saved_tensors
    needs_modulation, needs_bias = ctx.needs_input_grad[3:5]
    *grads, grad_modulation, grad_bias = torch.ops.edt_kernels.amm_attention_backward(
        grad_out, q, k, v, modulation, rel_pos_bias, out, logsumexp, *ctx.arguments, needs_modulation, needs_bias
    )
    tables = (grad_modulation if needs_modulation else None, grad_bias if needs_bias else None)
    return (*grads, *tables, *[None] * len(ctx.arguments))


_ARGUMENTS = "int grid_h, int grid_w, int before, float scale"
define_op(
    "amm_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? modulation, Tensor? rel_pos_bias, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define_op(
    "amm_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? modulation, Tensor? rel_pos_bias, Tensor out, "
    f"Tensor logsumexp, {_ARGUMENTS}, bool needs_modulation, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
define_gradient("amm_attention", _save_for_backward, _differentiate)


def amm_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    modulation: Tensor | None,
    rel_pos_bias: Tensor | None,
    scale: float,
    num_extra_tokens: tuple[int, int],
) -> Tensor:
    """`edt_kernels.amm_attention` by the kernels; the arguments are checked."""
    refuse_forward_mode("amm_attention", q, k, v, modulation, rel_pos_bias)
    out, _ = torch.ops.edt_kernels.amm_attention(
        q, k, v, modulation, rel_pos_bias, *grid, num_extra_tokens[0], scale
    )
    return out
