"""Launchers, tiles and torch registration of the `amm_attention` kernels."""

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from .._launch import (
    Launch,
    Op,
    common_alignment,
    dense_like,
    dense_rows,
    has_gradient,
    on_device_of,
    once_differentiable,
    planned,
)
from .._tiles import CellTile, ScoreTile, Tiles, choose_tiles
from .._tracing import signature
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


def _ceil(a: int, b: int) -> int:
    """⌈a/b⌉, a twentieth of the time of triton.cdiv."""
    return -(-a // b)


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
    modulation: Tensor | None
    rel_pos_bias: Tensor | None
    grid: tuple[int, int]
    before: int
    scale: float
    tf32: bool

    @property
    def has_bias(self) -> bool:
        return self.rel_pos_bias is not None

    @property
    def has_modulation(self) -> bool:
        return self.modulation is not None

    @property
    def unit(self) -> str:
        return "fma" if self.q.dtype == torch.float32 else matrix_unit(self.q.device)

    def forward_tile(self) -> tuple[str, ScoreTile]:
        """The kernel of the forward pass, and its tile."""
        B, N, heads, D = self.q.shape
        kernel = choose_forward(self.unit, N, D, B * heads, self.has_modulation)
        ((kernel, tile),) = self._measured("forward", {kernel: tiles_of(self.unit, D)[kernel]}).items()
        return kernel, tile

    def backward_tiles(self) -> Tiles:
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
        return choose_tiles(f"amm_attention.{direction}", key, heuristic)

    def strides(self, *tensors: Tensor) -> list[int]:
        """Of q, k, v, then of these, as the kernels take them."""
        return [stride for tensor in (self.q, self.k, self.v, *tensors) for stride in tensor.stride()[:3]]

    def sizes(self) -> tuple:
        _, N, heads, _ = self.q.shape
        by_head = self.has_bias or (self.modulation is not None and self.modulation.ndim == 3)
        stride_table = (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1) if by_head and heads > 1 else 0
        return (stride_table, N, heads, *self.grid, self.before, self.scale)

    def launch(self, kernel, tile: ScoreTile | TableTile, programs: int, rows: tuple, *extra: int, **constants):
        """`rows` are the tensors after q, k, v whose strides the kernel takes, `extra` its numbers after the
        sizes. It is to be called with q, k, v, the table, and the kernel's other tensors."""
        D = self.q.shape[-1]
        return Launch(
            kernel, programs, *self.strides(*rows), *self.sizes(), *extra,
            **constants, D=D, BLOCK_D=padded(D), ALIGN=common_alignment(self.q, self.k, self.v, *rows),
            HAS_BIAS=self.has_bias, HAS_MODULATION=self.has_modulation,
            PRECISION="tf32" if self.tf32 else "ieee",  # what PyTorch's own products would be
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    def launch_tiles(self, kernel, tile: ScoreTile, programs_per_head: int, rows, **constants) -> Launch:
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
        return self.launch(kernel, tile, B * heads * programs_per_head, rows, **constants)

    def launch_short(self, kernel, tile: ScoreTile, splits: int, rows, **constants) -> Launch:
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
        steps = _ceil(_ceil(B, packed), splits)
        return self.launch(kernel, tile, splits * heads, rows, B, steps, **constants)

    def short_splits(self, kernel: str, tile: ScoreTile) -> int:
        """Shares of the batch, none of them empty."""
        B, N, heads, _ = self.q.shape
        groups = _ceil(B, tile.block_m // triton.next_power_of_2(N))
        steps = _ceil(groups * heads, _SHORT_PROGRAMS[kernel])
        return _ceil(groups, steps)


def _table(q: Tensor, modulation: Tensor | None, rel_pos_bias: Tensor | None) -> Tensor:
    """(heads or 1, offsets): bias, modulation, or pairs of both; q stands in where there is neither.

    The bias comes as (offsets, heads); a row of the grid should be one run of memory for a head.
    """
    if rel_pos_bias is None:
        return q if modulation is None else modulation.contiguous()
    bias = rel_pos_bias.t().contiguous()
    if modulation is None:
        return bias
    pairs = [bias.float(), modulation.float().reshape(-1, bias.shape[1]).expand(bias.shape)]
    return torch.stack(pairs, dim=-1).view(torch.int64)  # one 64-bit load gathers both


def _allows_tf32(q: Tensor) -> bool:
    return q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the rows' logsumexp, of float32 inputs in two parts, see `kernels`."""
    B, N, heads, _ = q.shape
    rows = (B, heads, 2, N) if q.dtype == torch.float32 else (B, heads, N)
    return dense_like(q), q.new_empty(rows, dtype=torch.float32)


def _dense_like(q: Tensor) -> Tensor:
    """An output's strides, without its memory."""
    return torch.empty(q.shape, dtype=q.dtype, device="meta")


def _plan_forward(q, k, v, modulation, rel_pos_bias, grid, before, scale, tf32) -> Launch:
    p = _Problem(q, k, v, modulation, rel_pos_bias, grid, before, scale, tf32)
    kernel, tile = p.forward_tile()
    rows, N = (_dense_like(q),), q.shape[1]
    if kernel == "short_forward":
        return p.launch_short(short_kernels.short_forward, tile, p.short_splits(kernel, tile), rows)
    if kernel == "resident_forward":
        return p.launch_tiles(resident_kernels.resident_forward, tile, 1, rows, TILES=_ceil(N, tile.block_n))
    return p.launch_tiles(kernels.forward, tile, _ceil(N, tile.block_m), rows)


def _forward(q, k, v, modulation, rel_pos_bias, grid_h, grid_w, before, scale, signature=None):
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    out, logsumexp = _empty_outputs(q)
    if q.numel():
        tensors = q, k, v, modulation, rel_pos_bias
        launch = planned(_plan_forward, signature, tensors, (grid_h, grid_w), before, scale, _allows_tf32(q))
        with on_device_of(q):
            launch(q, k, v, _table(q, modulation, rel_pos_bias), out, logsumexp)
    return out, logsumexp


@dataclass(frozen=True)
class _TableGradients:
    """What adds up the gradients of tables from `partials` numbers a table."""

    launch: Launch
    partials: int
    reduce: Launch


@dataclass(frozen=True)
class _Backward:
    """`short`; or `resident` or q and kv, and, if a table's gradient is needed, `tables`."""

    short: _TableGradients | None = None
    resident: Launch | None = None
    q: Launch | None = None
    kv: Launch | None = None
    tables: _TableGradients | None = None


def _plan_backward(
    grad_out, q, k, v, modulation, rel_pos_bias, grid, before, scale, tf32, needs_modulation, needs_bias
) -> _Backward:
    p = _Problem(q, k, v, modulation, rel_pos_bias, grid, before, scale, tf32)
    N, tiles, out = q.shape[1], p.backward_tiles(), _dense_like(q)
    if "short_backward" in tiles:
        return _Backward(short=_plan_short_backward(p, tiles["short_backward"], grad_out, out, needs_bias))
    tables = None
    if needs_modulation or needs_bias:
        tile = lay_out_cells(tiles["backward_tables"], grid)
        tables = _plan_tables(p, tile, grad_out, needs_modulation, needs_bias)
    if "resident_backward" in tiles:
        tile = replace(tiles["resident_backward"], block_n=N)
        launch = p.launch_tiles(resident_kernels.resident_backward, tile, 1, (out, grad_out))
        return _Backward(resident=launch, tables=tables)
    tile = tiles["backward_q"]
    q_pass = p.launch_tiles(
        kernels.backward_q, tile, _ceil(N, tile.block_m), (out, grad_out), WHOLE_ROWS=tile.block_n >= N
    )
    tile = tiles["backward_kv"]
    kv_pass = p.launch_tiles(
        kernels.backward_kv, tile, _ceil(N, tile.block_n), (grad_out, out), WHOLE_ROWS=tile.block_n >= N
    )
    return _Backward(q=q_pass, kv=kv_pass, tables=tables)


def _plan_short_backward(p, tile, grad_out, out, needs_bias) -> _TableGradients:
    splits, heads, block = p.short_splits("short_backward", tile), p.q.shape[2], tile.block_m
    launch = p.launch_short(
        short_kernels.short_backward, tile, splits, (grad_out, out), GRAD_BIAS=needs_bias,
    )  # fmt: skip
    reduce = Launch(
        short_kernels.reduce_short_partials, _reduction_programs(p), splits, heads, *p.grid, p.before,
        SEQ=triton.next_power_of_2(p.q.shape[1]), BLOCK=block, BLOCK_OFFSETS=_OFFSETS_PER_PROGRAM,
    )  # fmt: skip
    return _TableGradients(launch, splits * heads * block * block, reduce)


def _plan_tables(p, tile, grad_out, needs_modulation, needs_bias) -> _TableGradients:
    B, _, heads, _ = p.q.shape
    H, W = p.grid
    layout = {"ITEMS": tile.items, "ROWS": tile.rows, "COLUMNS": tile.columns}
    block = math.prod(layout.values())
    tiles_y, across = _ceil(H, tile.rows), 2 * _ceil(W, tile.columns) - 1
    distances, programs = (2 * tiles_y - 1) * across, tiles_y * across  # of a head and share
    groups = _ceil(B, tile.items)
    groups_per_split = _ceil(groups * heads * programs, _TABLE_PROGRAMS)
    splits = _ceil(groups, groups_per_split)
    launch = p.launch(
        table_kernels.backward_tables, tile, splits * heads * programs, (grad_out,), B, groups_per_split,
        GRAD_BIAS=needs_bias, GRAD_MODULATION=needs_modulation,
        MASKED=tile.items > 1 or H % tile.rows != 0 or W % tile.columns != 0, **layout,
    )  # fmt: skip
    reduce = Launch(
        table_kernels.reduce_table_partials, _reduction_programs(p), splits, heads, H, W,
        **layout, BLOCK_OFFSETS=_OFFSETS_PER_PROGRAM,
    )  # fmt: skip
    return _TableGradients(launch, splits * heads * distances * block * block, reduce)


def _backward(
    grad_out, q, k, v, modulation, rel_pos_bias, out, logsumexp, grid_h, grid_w, before, scale,
    needs_modulation, needs_bias, signature=None,
):  # fmt: skip
    grad_out, q, k, v = map(dense_rows, (grad_out, q, k, v))
    B, N, heads, _ = q.shape
    grad_q, grad_k, grad_v = (dense_like(q) for _ in range(3))
    new = functools.partial(q.new_empty, dtype=torch.float32)
    table_shape = (heads, 2 * grid_h - 1, 2 * grid_w - 1)
    grad_bias, grad_modulation = (  # of each head; empty where not needed
        new(table_shape if needed else 0) for needed in (needs_bias, needs_modulation)
    )
    if q.numel() == 0:
        return (
            grad_q,
            grad_k,
            grad_v,
            *_table_gradients(grad_modulation.zero_(), grad_bias.zero_(), modulation, rel_pos_bias),
        )
    plan = planned(
        _plan_backward, signature, (grad_out, q, k, v, modulation, rel_pos_bias),
        (grid_h, grid_w), before, scale, _allows_tf32(q), needs_modulation, needs_bias,
    )  # fmt: skip
    inputs = q, k, v, _table(q, modulation, rel_pos_bias)
    with on_device_of(q):
        if plan.short is not None:
            partials = new(plan.short.partials if needs_bias else 0)
            plan.short.launch(*inputs, grad_out, logsumexp, grad_q, grad_k, grad_v, partials)
            if needs_bias:
                plan.short.reduce(partials, grad_bias)
        else:
            delta = new((B, heads, N))
            if plan.resident is not None:
                plan.resident(*inputs, out, grad_out, logsumexp, delta, grad_q, grad_k, grad_v)
            else:
                plan.q(*inputs, out, grad_out, logsumexp, delta, grad_q)
                plan.kv(*inputs, grad_out, logsumexp, delta, grad_k, grad_v)
            if plan.tables is not None:
                partials = [
                    new(plan.tables.partials if needed else 0) for needed in (needs_bias, needs_modulation)
                ]
                plan.tables.launch(*inputs, grad_out, logsumexp, delta, *partials)
                for needed, partial, gradient in zip(
                    (needs_bias, needs_modulation), partials, (grad_bias, grad_modulation)
                ):
                    if needed:
                        plan.tables.reduce(partial, gradient)
    return grad_q, grad_k, grad_v, *_table_gradients(grad_modulation, grad_bias, modulation, rel_pos_bias)


def _table_gradients(grad_modulation, grad_bias, modulation, rel_pos_bias) -> tuple[Tensor, Tensor]:
    """As the tables are, from the gradients for each head."""
    if grad_modulation.numel():
        grad_modulation = (grad_modulation.sum(0) if modulation.ndim == 2 else grad_modulation).to(
            modulation.dtype
        )
    if grad_bias.numel():
        grad_bias = grad_bias.flatten(1).t().to(rel_pos_bias.dtype).contiguous()
    return grad_modulation, grad_bias


_OFFSETS_PER_PROGRAM = 16


def _reduction_programs(p: _Problem) -> int:
    (H, W), heads = p.grid, p.q.shape[2]
    return heads * _ceil((2 * H - 1) * (2 * W - 1), _OFFSETS_PER_PROGRAM)


def _fake_backward(
    grad_out, q, k, v, modulation, rel_pos_bias, out, logsumexp, grid_h, grid_w, before, scale,
    needs_modulation, needs_bias,
):  # fmt: skip
    gradients = [dense_like(q) for _ in range(3)]
    for table, needed in ((modulation, needs_modulation), (rel_pos_bias, needs_bias)):
        gradients.append(table.new_empty(table.shape) if needed else q.new_empty(0, dtype=torch.float32))
    return tuple(gradients)


_ARGUMENTS = "int grid_h, int grid_w, int before, float scale"
_forward_op = Op(
    "amm_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? modulation, Tensor? rel_pos_bias, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    lambda q, *_: _empty_outputs(q),
)
_backward_op = Op(
    "amm_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? modulation, Tensor? rel_pos_bias, Tensor out, "
    f"Tensor logsumexp, {_ARGUMENTS}, bool needs_modulation, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, known, q, k, v, modulation, rel_pos_bias, *numbers):
        out, logsumexp = _forward_op(known, q, k, v, modulation, rel_pos_bias, *numbers)
        ctx.save_for_backward(q, k, v, modulation, rel_pos_bias, out, logsumexp)
        ctx.numbers = numbers
        return out

    @staticmethod
    def backward(ctx, grad_out):
        needs_modulation, needs_bias = ctx.needs_input_grad[4:6]
        tensors = grad_out, *ctx.saved_tensors
        *grads, grad_modulation, grad_bias = _backward_op(
            signature(*tensors), *tensors, *ctx.numbers, needs_modulation, needs_bias
        )
        tables = grad_modulation if needs_modulation else None, grad_bias if needs_bias else None
        return once_differentiable("amm_attention", tensors, (None, *grads, *tables, *[None] * len(ctx.numbers)))


def amm_attention(
    known: tuple | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modulation: Tensor | None,
    rel_pos_bias: Tensor | None,
    grid: tuple[int, int],
    before: int,
    scale: float,
) -> Tensor:
    """`edt_kernels.amm_attention` by the kernels; the arguments are checked, `known` is the tensors' signature."""
    arguments = known, q, k, v, modulation, rel_pos_bias, *grid, before, scale
    if has_gradient(q, k, v, modulation, rel_pos_bias):
        return _Function.apply(*arguments)
    return _forward_op(*arguments)[0]
