"""Launchers, tiles and torch registration of the `amm_attention` kernels."""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
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
from . import kernels, resident_kernels, table_kernels
from .memory import expand_table

# The tile of each kernel, by matrix unit and padded head dim, where no table has a measured one: the largest that
# compile without spills at EDT's shapes (`python -m benchmarks static`). float32 products are exact, so they run
# on the FMA units out of registers ("fma"; its D 128 still spills). Triton gives each warp 16 rows of a score tile
# that feeds another product: with fewer than 16·num_warps rows (queries, in backward_kv and short_backward keys)
# warps repeat each other's work. Of datacenter Blackwell the accumulators of resident_forward exceed the tensor
# memory (Triton compiles that to an empty kernel).
_KERNELS = "forward", "backward_q", "backward_kv", "short_backward", "resident_forward", "resident_backward"
_ROWS = {
    ("wgmma", 64): [
        (128, 64, 8, 2), (128, 32, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (128, 64, 8, 1), (32, 256, 8, 2),
    ],
    ("wgmma", 128): [(128, 32, 8, 2), (128, 32, 8, 1), (16, 128, 8, 2)],
    ("tcgen05", 64): [(128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2)],
    ("tcgen05", 128): [(128, 32, 8, 2), (128, 64, 8, 1), (16, 128, 8, 2)],
    ("mma", 64): [(64, 32, 4, 2), (64, 32, 4, 2), (32, 64, 4, 1), (32, 32, 4, 2)],
    ("mma", 128): [(128, 32, 8, 1), (64, 32, 8, 1), (32, 64, 8, 1)],
    ("mfma", 64): [(64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (32, 32, 2, 1)],
    ("mfma", 128): [(64, 32, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1)],
    ("fma", 64): [(32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)],
    ("fma", 128): [(16, 16, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1)],
}  # fmt: skip
_TILES = {key: {kernel: ScoreTile(*row) for kernel, row in zip(_KERNELS, rows)} for key, rows in _ROWS.items()}
TABLE_TILES = {
    unit: CellTile(*tile)
    for unit, *tile in (
        ("wgmma", 64, 8, 2), ("tcgen05", 64, 8, 1), ("mma", 32, 8, 1), ("mfma", 64, 4, 1), ("fma", 32, 4, 1),
    )
}  # fmt: skip

# Up to so many tokens a whole head fits on the chip (256 rows of 64 channels, twice, are 64 KB of shared memory),
# if there are so many heads (two for each multiprocessor of an H200): else several programs a head fill a device
# better.
_RESIDENT_TOKENS, _RESIDENT_HEADS = 256, 264
# Up to so many tokens kernels read the tables as matrices, see `memory`.
_MATRIX_TOKENS = 256
# Programs of `short_backward` (for tiles of 64 rows, else as many more as their rows are fewer) and
# `backward_tables`, whatever the device, so that gradients are the same everywhere; up to twice as many, where
# heads or tiles do not divide them. Each of the first writes one (64, 64) partial, 4 to 8 MB in all; each of the
# second up to two a table, 8 to 32 MB, or more where heads times distances exceed this number (24 heads of 64×64
# tokens: 50 MB). Those all do the same work, in four rounds on the 132 multiprocessors of an H200.
_SHORT_PROGRAMS, _TABLE_PROGRAMS = 264, 528
_ENTRIES_PER_PROGRAM, _OFFSETS_PER_PROGRAM = 1024, 16  # of the kernels that make matrices, and add up partials


def _ceil(a: int, b: int) -> int:
    """⌈a/b⌉, a twentieth of the time of triton.cdiv."""
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The next from n on."""
    return 1 << (n - 1).bit_length()


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
    return max(16, _power_of_2(head_dim))


def tiles_of(unit: str, num_tokens: int, head_dim: int) -> Tiles:
    """The tile of each kernel that takes such sequences, no larger than they."""
    tiles: Tiles = {"backward_tables": TABLE_TILES[unit]}
    rows = max(16, _power_of_2(num_tokens))
    for kernel, tile in _TILES[unit, 64 if head_dim <= 64 else 128].items():
        if kernel == "resident_backward":
            tile = replace(tile, block_n=num_tokens)
        elif rows <= 64 and kernel != "resident_forward":
            before, smaller = tile, replace(tile, block_m=min(tile.block_m, rows), block_n=min(tile.block_n, rows))
            side = "block_n" if kernel in ("backward_kv", "short_backward") else "block_m"
            num_warps = max(tile.num_warps * getattr(smaller, side) // getattr(before, side), 1)
            # 64 rows at 4 warps, which would be enough, miscompile on Hopper (triton issue 11366,
            # flash-linear-attention issue 984).
            many = unit in ("wgmma", "tcgen05") and getattr(smaller, side) == 64
            tile = replace(smaller, num_warps=8 if many else num_warps)
        if kernel != "short_backward" or num_tokens <= tile.block_m:
            tiles[kernel] = tile
    return tiles


def choose_forward(unit: str, num_tokens: int, head_dim: int, num_heads: int, has_modulation: bool) -> str:
    """The kernel of the forward pass of `num_heads` heads over the whole batch."""
    tiles = tiles_of(unit, num_tokens, head_dim)
    # Only WGMMA reads both operands from shared memory; others would keep them in registers, which are too few.
    fits = "resident_forward" in tiles and tiles["forward"].block_m < num_tokens <= _RESIDENT_TOKENS
    fits = fits and tiles["resident_forward"].block_n == padded(head_dim)
    # Nor do registers hold a modulation and masks.
    fits = fits and not (has_modulation and num_tokens % tiles["resident_forward"].block_m)
    return "resident_forward" if fits and num_heads >= _RESIDENT_HEADS else "forward"


def choose_backward(unit: str, num_tokens: int, head_dim: int, num_heads: int, has_modulation: bool) -> str:
    """The kernel of the backward pass, or "backward" for the three passes. Registers do not hold two tables: with
    AMM, which trained models of EDT have for inference alone, the kernels of one pass spill."""
    tiles = tiles_of(unit, num_tokens, head_dim)
    if has_modulation:
        return "backward"
    if "short_backward" in tiles:  # which has one for sequences that fit into it
        return "short_backward"
    # Of smaller heads, products have layouts that take more registers; of others, rows are loaded in small pieces.
    fits = "resident_backward" in tiles and padded(head_dim) == 64 and head_dim % 4 == 0
    # Nor do registers hold masks: all rows of the tile exist.
    fits = fits and num_tokens in (128, 256)
    return "resident_backward" if fits and num_heads >= _RESIDENT_HEADS else "backward"


# The kernels that a pass launches, by what chooses it.
_WAYS = {
    "resident_forward": ("resident_forward",),
    "forward": ("forward",),
    "short_backward": ("short_backward",),
    "resident_backward": ("resident_backward", "backward_tables"),
    "backward": ("backward_q", "backward_kv", "backward_tables"),
}


def lay_out_cells(tile: CellTile, grid: tuple[int, int]) -> dict[str, int]:
    """Whole rows of the grid as far as they fit, then more batch items where the grid is smaller."""
    columns = min(_power_of_2(grid[1]), tile.cells)
    rows = min(_power_of_2(grid[0]), tile.cells // columns)
    return {"ITEMS": tile.cells // (rows * columns), "ROWS": rows, "COLUMNS": columns}


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

    def tiles(self, direction: str) -> Tiles:
        """The tiles of the kernels of a pass."""
        (B, N, heads, D), (H, W) = self.q.shape, self.grid
        exact, modulation = self.q.dtype == torch.float32, self.modulation is not None
        unit = "fma" if exact else matrix_unit(self.q.device)
        choose = choose_forward if direction == "forward" else choose_backward
        tiles, way = tiles_of(unit, N, D), _WAYS[choose(unit, N, D, B * heads, modulation)]
        if modulation and self.rel_pos_bias is not None:  # registers hold less
            if unit == "tcgen05" and D > 64:
                tiles["backward_tables"] = TABLE_TILES["mma"]
            elif unit == "wgmma" and D <= 64:
                tiles["backward_tables"] = replace(tiles["backward_tables"], num_stages=1)
        key = {"dtype": "float32" if exact else "16-bit", "height": H, "width": W, "extra_tokens": N - H * W}
        key |= {"head_dim": D, "bias": self.rel_pos_bias is not None, "modulation": modulation}
        key |= {"many_heads": B * heads >= _RESIDENT_HEADS}
        return choose_tiles(f"amm_attention.{direction}", key, {kernel: tiles[kernel] for kernel in way})

    @property
    def by_head(self) -> bool:
        """Whether each head has a modulation of its own."""
        return self.modulation is not None and self.modulation.ndim == 3

    def table_strides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the bias and of the modulation: from offset to offset, from head to head."""
        (H, W), bias = self.grid, (0, 0) if self.rel_pos_bias is None else self.rel_pos_bias.stride()
        return bias, (1, (2 * H - 1) * (2 * W - 1) * self.by_head)

    def launch(self, kernel, programs: int, tile, rows: tuple, tables: tuple, *numbers, **constants) -> Launch:
        """`rows` are the tensors after q, k, v whose strides the kernel takes, `tables` the strides of the tables,
        `numbers` what follows the scale. It is to be called with q, k, v, bias, modulation and the others."""
        (_, N, heads, D), (H, W) = self.q.shape, self.grid
        strides = [stride for tensor in (self.q, self.k, self.v, *rows) for stride in tensor.stride()[:3]]
        gathers = N > _MATRIX_TOKENS and (self.modulation is not None or H * W != N)
        if gathers and kernel is not kernels.backward_q and not torch.version.hip:
            constants["maxnreg"] = 255  # else NVIDIA's assembler spills 8 or 16 bytes to stay within 128 or 168
        return Launch(
            kernel, programs, *strides, *tables, N, heads, H, W, self.before, self.scale, *numbers,
            **constants, D=D, BLOCK_D=padded(D), ALIGN=common_alignment(self.q, self.k, self.v, *rows),
            PRECISION="tf32" if self.tf32 else "ieee",  # what PyTorch's own products would be
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    def launch_scores(
        self, kernel, programs: int, tile: ScoreTile, rows: tuple, *numbers, keys_first, **constants
    ):
        """The `_Scores` of a kernel, so many programs a head."""
        (_, N, heads, _), (H, W) = self.q.shape, self.grid
        side = max(_power_of_2(N), tile.block_m, tile.block_n) if N <= _MATRIX_TOKENS else 0
        entries, has_extra = side**2 or (2 * H - 1) * (2 * W - 1), H * W != N
        masked = N % tile.block_m != 0 or N % tile.block_n != 0
        launch = self.launch(
            kernel, programs * heads, tile, rows, (entries, entries * self.by_head), *numbers, **constants,
            SIDE=side, HAS_EXTRA=has_extra and not side, MASKED=masked,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            EVEN=side > 0 or not (masked or has_extra or tile.block_m % W or tile.block_n % W),
        )  # fmt: skip
        matrices, block = [], min(entries, _ENTRIES_PER_PROGRAM)
        for num, strides, fill in zip((heads, heads if self.by_head else 1), self.table_strides(), (0.0, 1.0)):
            expand = Launch(
                expand_table, num * entries // block, *strides, H, W, self.before, fill,
                SIDE=side, KEYS_FIRST=keys_first, BLOCK=block,
            )  # fmt: skip
            matrices.append((expand, (num, side, side)))
        return _Scores(launch, matrices if side else None)

    def table_gradients(self, launch: Launch, splits: int, distances: int, **layout: int) -> "_TableGradients":
        (H, W), heads, offsets = self.grid, self.q.shape[2], (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1)
        bias, modulation = (
            Launch(
                table_kernels.reduce_table_partials, heads * _ceil(offsets, _OFFSETS_PER_PROGRAM), splits, heads,
                *strides, H, W, **layout, BLOCK_OFFSETS=_OFFSETS_PER_PROGRAM,
            )
            for strides in ((heads, 1), (1, offsets))
        )  # fmt: skip
        return _TableGradients(launch, splits * heads * distances * layout["BLOCK"] ** 2, (bias, modulation))


class _Scores(NamedTuple):
    """A launch of a kernel that reads the tables for each pair of tokens; and what makes matrices of bias and
    modulation, with their sizes, or None where the kernel reads the tables themselves."""

    launch: Launch
    matrices: list[tuple[Launch, tuple[int, int, int]]] | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rel_pos_bias, modulation, *others: Tensor | None) -> None:
        if self.matrices is None:  # a row of the grid should be one run of memory for a head
            bias = None if rel_pos_bias is None else rel_pos_bias.t().contiguous()
            return self.launch(q, k, v, bias, modulation, *others)
        dtype, read = torch.float32 if q.dtype == torch.float32 else torch.float16, []
        for table, (expand, sizes) in zip((rel_pos_bias, modulation), self.matrices):
            read.append(None if table is None else q.new_empty(sizes, dtype=dtype))
            if table is not None:
                expand(table, read[-1])
        self.launch(q, k, v, *read, *others)


class _TableGradients(NamedTuple):
    """A launch that makes `partials` numbers a table; for bias and modulation, one that adds those up."""

    launch: Launch
    partials: int
    reduce: tuple[Launch, Launch]


def _allows_tf32(q: Tensor) -> bool:
    return q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the rows' logsumexp, of float32 inputs in two parts, see `kernels`."""
    B, N, heads, _ = q.shape
    rows = (B, heads, 2, N) if q.dtype == torch.float32 else (B, heads, N)
    return dense_like(q), q.new_empty(rows, dtype=torch.float32)


def _dense(q, k, v, modulation) -> tuple:
    return dense_rows(q), dense_rows(k), dense_rows(v), None if modulation is None else modulation.contiguous()


def _dense_like(q: Tensor) -> Tensor:
    """An output's strides, without its memory."""
    return torch.empty(q.shape, dtype=q.dtype, device="meta")


def _plan_forward(*arguments) -> _Scores:
    p = _Problem(*arguments)
    ((kernel, tile),) = p.tiles("forward").items()
    (B, N, _, _), rows = p.q.shape, (_dense_like(p.q),)
    if kernel == "resident_forward":
        resident = resident_kernels.resident_forward
        return p.launch_scores(resident, B, tile, rows, keys_first=False, TILES=_ceil(N, tile.block_n))
    return p.launch_scores(kernels.forward, B * _ceil(N, tile.block_m), tile, rows, keys_first=False)


def _forward(q, k, v, modulation, rel_pos_bias, grid_h, grid_w, before, scale, signature=None):
    q, k, v, modulation = _dense(q, k, v, modulation)
    out, logsumexp = _empty_outputs(q)
    if q.numel():
        tensors = q, k, v, modulation, rel_pos_bias
        launch = planned(_plan_forward, signature, tensors, (grid_h, grid_w), before, scale, _allows_tf32(q))
        with on_device_of(q):
            launch(q, k, v, rel_pos_bias, modulation, out, logsumexp)
    return out, logsumexp


class _Backward(NamedTuple):
    """`short`, or `resident`, or q and kv. Of the tables' gradients `short` makes the partial sums, too."""

    tables: _TableGradients
    short: _Scores | None = None
    resident: _Scores | None = None
    q: _Scores | None = None
    kv: _Scores | None = None


def _plan_backward(grad_out, *arguments) -> _Backward:
    p = _Problem(*arguments)
    tiles, out, (B, N, heads, _), (H, W) = p.tiles("backward"), _dense_like(p.q), p.q.shape, p.grid
    if "short_backward" in tiles:
        kernel, tile = resident_kernels.short_backward, tiles["short_backward"]
        steps = _ceil(B * heads * tile.block_m, 64 * _SHORT_PROGRAMS)  # of a program
        splits = _ceil(B, steps)
        short = p.launch_scores(kernel, splits, tile, (grad_out, out), B, steps, keys_first=True)
        tables = p.table_gradients(short.launch, splits, 1, ITEMS=1, ROWS=H, COLUMNS=W, BLOCK=tile.block_m)
        return _Backward(tables, short=short)
    tables = _plan_tables(p, tiles["backward_tables"], grad_out)
    if "resident_backward" in tiles:
        kernel, tile = resident_kernels.resident_backward, tiles["resident_backward"]
        return _Backward(tables, resident=p.launch_scores(kernel, B, tile, (out, grad_out), keys_first=True))
    tile = tiles["backward_q"]
    q_pass = p.launch_scores(
        kernels.backward_q, B * _ceil(N, tile.block_m), tile, (out, grad_out), keys_first=False,
        WHOLE_ROWS=tile.block_n >= N,
    )  # fmt: skip
    tile = tiles["backward_kv"]
    kv_pass = p.launch_scores(
        kernels.backward_kv, B * _ceil(N, tile.block_n), tile, (grad_out, out), keys_first=True,
        WHOLE_ROWS=tile.block_n >= N,
    )  # fmt: skip
    return _Backward(tables, q=q_pass, kv=kv_pass)


def _plan_tables(p: _Problem, tile: CellTile, grad_out: Tensor) -> _TableGradients:
    (B, N, heads, _), (H, W), layout = p.q.shape, p.grid, lay_out_cells(tile, p.grid)
    items, rows, columns = layout.values()
    tiles_y, across = _ceil(H, rows), 2 * _ceil(W, columns) - 1
    distances, programs = (2 * tiles_y - 1) * across, tiles_y * across  # of a head and share
    groups_per_split = _ceil(_ceil(B, items) * heads * programs, _TABLE_PROGRAMS)
    splits = _ceil(_ceil(B, items), groups_per_split)
    (bias, modulation), rounded = p.table_strides(), p.q.dtype != torch.float32 and N <= _MATRIX_TOKENS
    launch = p.launch(
        table_kernels.backward_tables, splits * heads * programs, tile, (grad_out,), (*bias, *modulation),
        B, groups_per_split, ROUNDED=rounded, MASKED=items > 1 or H % rows != 0 or W % columns != 0, **layout,
    )  # fmt: skip
    return p.table_gradients(launch, splits, distances, **layout, BLOCK=tile.cells)


def _backward(
    grad_out, q, k, v, modulation, rel_pos_bias, out, logsumexp, grid_h, grid_w, before, scale,
    needs_modulation, needs_bias, signature=None,
):  # fmt: skip
    grad_out, (q, k, v, modulation) = dense_rows(grad_out), _dense(q, k, v, modulation)
    (B, N, heads, _), offsets = q.shape, (2 * grid_h - 1, 2 * grid_w - 1)
    grads = [dense_like(q) for _ in range(3)]
    new = functools.partial(q.new_empty, dtype=torch.float32)
    # The modulation's are of each head, and empty what is not needed.
    grad_modulation = new((heads, *offsets) if needs_modulation else 0)
    grad_bias = torch.empty_like(rel_pos_bias, memory_format=torch.contiguous_format) if needs_bias else new(0)
    if q.numel():
        plan = planned(
            _plan_backward, signature, (grad_out, q, k, v, modulation, rel_pos_bias),
            (grid_h, grid_w), before, scale, _allows_tf32(q),
        )  # fmt: skip
        inputs = q, k, v, rel_pos_bias, modulation
        partials = [new(plan.tables.partials) if needed else None for needed in (needs_bias, needs_modulation)]
        with on_device_of(q):
            if plan.short is not None:
                plan.short(*inputs, grad_out, logsumexp, *grads, partials[0])
            else:
                delta = new((B, heads, N))
                if plan.resident is not None:
                    plan.resident(*inputs, out, grad_out, logsumexp, delta, *grads)
                else:
                    plan.q(*inputs, out, grad_out, logsumexp, delta, grads[0])
                    plan.kv(*inputs, grad_out, logsumexp, delta, *grads[1:])
                if needs_bias or needs_modulation:
                    plan.tables.launch(*inputs, grad_out, logsumexp, delta, *partials)
            for partial, gradient, reduce in zip(partials, (grad_bias, grad_modulation), plan.tables.reduce):
                if partial is not None:
                    reduce(partial, gradient)
    else:
        grad_modulation.zero_()
        grad_bias.zero_()
    if needs_modulation:
        grad_modulation = (grad_modulation.sum(0) if modulation.ndim == 2 else grad_modulation).to(
            modulation.dtype
        )
    return *grads, grad_modulation, grad_bias


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


def amm_attention(known: tuple | None, q: Tensor, k: Tensor, v: Tensor, *arguments) -> Tensor:
    """`edt_kernels.amm_attention` by the kernels: modulation, rel_pos_bias, H, W, the tokens before the grid and
    the scale follow, all checked; `known` is the tensors' signature."""
    if has_gradient(q, k, v, *arguments[:2]):
        return _Function.apply(known, q, k, v, *arguments)
    return _forward_op(known, q, k, v, *arguments)[0]
