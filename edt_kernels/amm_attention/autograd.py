"""Launchers, tiles and torch registration of the `amm_attention` kernels."""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .._launch import (
    common_alignment,
    dense_rows,
    on_device_of,
    refuse_double_backward,
    refuse_forward_mode,
    refuse_transforms,
)
from . import kernels


@dataclass(frozen=True)
class Tile:
    """block_m query rows by block_n key rows; seq is the rows that one sequence takes of a packed tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    seq_m: int
    seq_n: int


@dataclass(frozen=True)
class TableTile:
    """rows × columns cells of the grid, of `items` batch items at once; a power of two each."""

    items: int
    rows: int
    columns: int
    num_warps: int
    num_stages: int


# (block_m, block_n, num_warps, num_stages) of each kernel, by matrix unit and padded head dim: the largest that
# compile without spills at EDT's shapes (`python -m benchmarks.static`), to be replaced by measured ones.
# float32 products are exact, so they run on the FMA units out of registers ("fma"; its D 128 still spills).
_TILES = {
    ("wgmma", 64): {"forward": (128, 64, 8, 2), "backward_q": (64, 64, 8, 2), "backward_kv": (64, 64, 8, 2)},
    ("wgmma", 128): {"forward": (64, 32, 8, 1), "backward_q": (64, 32, 8, 1), "backward_kv": (32, 64, 8, 1)},
    ("mma", 64): {"forward": (64, 64, 4, 2), "backward_q": (64, 32, 4, 2), "backward_kv": (64, 32, 4, 2)},
    ("mma", 128): {"forward": (64, 32, 8, 1), "backward_q": (64, 32, 8, 1), "backward_kv": (32, 64, 8, 1)},
    ("mfma", 64): {"forward": (64, 64, 4, 1), "backward_q": (64, 64, 4, 1), "backward_kv": (64, 64, 4, 1)},
    ("mfma", 128): {"forward": (64, 32, 4, 1), "backward_q": (64, 32, 4, 1), "backward_kv": (32, 64, 4, 1)},
    ("fma", 64): {"forward": (32, 32, 4, 1), "backward_q": (32, 32, 8, 1), "backward_kv": (32, 32, 8, 1)},
    ("fma", 128): {"forward": (16, 16, 4, 1), "backward_q": (32, 32, 8, 1), "backward_kv": (16, 16, 4, 1)},
}
_TABLE_TILES = {"wgmma": (64, 8), "mma": (32, 4), "mfma": (64, 4), "fma": (32, 4)}  # (cells, num_warps)


def matrix_unit(device: torch.device) -> str:
    """The key of the tile tables for 16-bit inputs: Hopper and datacenter Blackwell, other NVIDIA, AMD CDNA."""
    if device.type != "cuda":  # the interpreter
        return "wgmma"
    if torch.version.hip:
        return "mfma"
    return "wgmma" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "mma"


def choose_tile(kernel: str, unit: str, num_tokens: int, head_dim: int) -> Tile:
    """The tile of "forward", "backward_q" or "backward_kv". Sequences shorter than a tile are packed into it."""
    block_m, block_n, num_warps, num_stages = _TILES[unit, 64 if head_dim <= 64 else 128][kernel]
    if num_tokens <= 64:  # a loop of one iteration has nothing to load ahead
        block_m, num_stages = min(block_m, 64), 1
    seq = triton.next_power_of_2(num_tokens)
    if seq < min(block_m, block_n):  # queries and keys of a packed tile are the same rows
        block = min(block_m, block_n)
        return Tile(block, block, num_warps, num_stages, seq, seq)
    return Tile(block_m, block_n, num_warps, num_stages, block_m, block_n)


def choose_table_tile(unit: str, grid: tuple[int, int]) -> TableTile:
    """Whole rows of the grid as far as they fit, then more batch items where the grid is smaller."""
    cells, num_warps = _TABLE_TILES[unit]
    H, W = grid
    columns = min(triton.next_power_of_2(W), cells)
    rows = min(triton.next_power_of_2(H), cells // columns)
    return TableTile(cells // (rows * columns), rows, columns, num_warps, num_stages=1)


# Programs that share the sum over the batch in `backward_tables`, whatever the device, so that gradients are
# the same everywhere: about two waves of an H200. Each writes one (64, 64) partial: 8 MB a table, or more where
# heads times distances between tiles exceeds this number (24 heads of 64×64 tokens: 50 MB).
_TABLE_PROGRAMS = 512


@dataclass(frozen=True)
class _Problem:
    """What the launches of one call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None  # (heads, offsets)
    modulation: Tensor | None  # (heads or 1, offsets)
    grid: tuple[int, int]
    before: int
    scale: float

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    @property
    def unit(self) -> str:
        return "fma" if self.q.dtype == torch.float32 else matrix_unit(self.q.device)

    @property
    def precision(self) -> str:
        """Of float32 products: what PyTorch's own would be."""
        tf32 = self.q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        return "tf32" if tf32 else "ieee"

    def tile(self, kernel: str) -> Tile:
        _, N, _, D = self.shape
        return choose_tile(kernel, self.unit, N, D)

    def launch_grid(self, tile: Tile, block: int, seq: int) -> tuple[int]:
        B, N, heads, _ = self.shape
        return (triton.cdiv(N, seq) * heads * triton.cdiv(B, block // seq),)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Bias and modulation; q stands in for one that is absent and not read."""
        return (
            self.q if self.bias is None else self.bias,
            self.q if self.modulation is None else self.modulation,
        )

    def table_strides(self) -> tuple[int, int]:
        shared = self.modulation is None or self.modulation.shape[0] == 1
        return (
            0 if self.bias is None else self.bias.stride(0),
            0 if shared else self.modulation.stride(0),
        )

    def sizes(self) -> tuple:
        B, N, heads, _ = self.shape
        return (B, N, heads, *self.grid, self.before, self.scale)

    def constants(self, *tensors: Tensor) -> dict:
        """Compile-time arguments common to the kernels; `tensors` are the rows that one of them touches."""
        D = self.shape[-1]
        return {
            "D": D,
            "BLOCK_D": max(16, triton.next_power_of_2(D)),
            "ALIGN": common_alignment(*tensors),
            "HAS_BIAS": self.bias is not None,
            "HAS_MODULATION": self.modulation is not None,
            "PRECISION": self.precision,
        }

    def tile_constants(self, tile: Tile) -> dict:
        N = self.shape[1]
        return {
            "HAS_EXTRA": math.prod(self.grid) != N,
            "MASKED": tile.seq_n < tile.block_n or N % tile.seq_n != 0,
            "SEQ_M": tile.seq_m,
            "SEQ_N": tile.seq_n,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }


def _problem(q, k, v, modulation, rel_pos_bias, grid_h, grid_w, before, scale) -> _Problem:
    # The bias is stored (offsets, heads); a row of the grid should be one run of memory for a head.
    bias = None if rel_pos_bias is None else rel_pos_bias.t().contiguous()
    if modulation is not None:
        modulation = modulation.reshape(-1, (2 * grid_h - 1) * (2 * grid_w - 1)).contiguous()
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    return _Problem(q, k, v, bias, modulation, (grid_h, grid_w), before, scale)


def _forward(q, k, v, modulation, rel_pos_bias, grid_h, grid_w, before, scale):
    p = _problem(q, k, v, modulation, rel_pos_bias, grid_h, grid_w, before, scale)
    B, N, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(B, heads, N, dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, logsumexp
    tile = p.tile("forward")
    with on_device_of(q):
        kernels.forward[p.launch_grid(tile, tile.block_m, tile.seq_m)](
            p.q, p.k, p.v, *p.tables(), out, logsumexp,
            *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *out.stride()[:3], *p.table_strides(),
            *p.sizes(), **p.constants(p.q, p.k, p.v, out), **p.tile_constants(tile),
        )  # fmt: skip
    return out, logsumexp


def _backward(
    grad_out, q, k, v, modulation, rel_pos_bias, out, logsumexp, grid_h, grid_w, before, scale,
    needs_modulation, needs_bias,
):  # fmt: skip
    p = _problem(q, k, v, modulation, rel_pos_bias, grid_h, grid_w, before, scale)
    grad_out = dense_rows(grad_out)
    grad_q, grad_k, grad_v = (torch.empty_like(out) for _ in range(3))
    no_gradient = torch.empty(0, dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        grad_modulation = torch.zeros_like(modulation) if needs_modulation else no_gradient
        grad_bias = torch.zeros_like(rel_pos_bias) if needs_bias else no_gradient.clone()
        return grad_q, grad_k, grad_v, grad_modulation, grad_bias
    delta = torch.empty_like(logsumexp)
    inputs = (p.q, p.k, p.v)
    input_strides = [stride for tensor in inputs for stride in tensor.stride()[:3]]
    out_strides, grad_strides = out.stride()[:3], grad_out.stride()[:3]
    constants = p.constants(*inputs, out, grad_out)
    with on_device_of(q):
        tile = p.tile("backward_q")
        kernels.backward_q[p.launch_grid(tile, tile.block_m, tile.seq_m)](
            *inputs, *p.tables(), out, grad_out, logsumexp, delta, grad_q,
            *input_strides, *out_strides, *grad_strides, *p.table_strides(),
            *p.sizes(), **constants, **p.tile_constants(tile),
        )  # fmt: skip
        tile = p.tile("backward_kv")
        kernels.backward_kv[p.launch_grid(tile, tile.block_n, tile.seq_n)](
            *inputs, *p.tables(), grad_out, logsumexp, delta, grad_k, grad_v,
            *input_strides, *grad_strides, *out_strides, *p.table_strides(),
            *p.sizes(), **constants, **p.tile_constants(tile),
        )  # fmt: skip
        grad_modulation, grad_bias = no_gradient, no_gradient.clone()
        if needs_modulation or needs_bias:
            grad_modulation, grad_bias = _table_gradients(
                p, grad_out, logsumexp, delta, modulation, rel_pos_bias, needs_modulation, needs_bias, constants
            )
    return grad_q, grad_k, grad_v, grad_modulation, grad_bias


def _table_gradients(
    p: _Problem, grad_out, logsumexp, delta, modulation, rel_pos_bias, needs_modulation, needs_bias, constants
) -> tuple[Tensor, Tensor]:
    B, _, heads, _ = p.shape
    H, W = p.grid
    device = grad_out.device
    tile = choose_table_tile(p.unit, p.grid)
    layout = {"ITEMS": tile.items, "ROWS": tile.rows, "COLUMNS": tile.columns}
    block = math.prod(layout.values())
    distances = (2 * triton.cdiv(H, tile.rows) - 1) * (2 * triton.cdiv(W, tile.columns) - 1)
    groups = triton.cdiv(B, tile.items)
    groups_per_split = triton.cdiv(groups * heads * distances, _TABLE_PROGRAMS)
    splits = triton.cdiv(groups, groups_per_split)

    size = splits * heads * distances * block * block
    bias_partials = torch.empty(size if needs_bias else 0, dtype=torch.float32, device=device)
    modulation_partials = torch.empty(size if needs_modulation else 0, dtype=torch.float32, device=device)
    kernels.backward_tables[(splits * heads * distances,)](
        p.q, p.k, p.v, *p.tables(), grad_out, logsumexp, delta, bias_partials, modulation_partials,
        *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *grad_out.stride()[:3], *p.table_strides(),
        *p.sizes(), groups_per_split, **constants, **layout,
        GRAD_BIAS=needs_bias, GRAD_MODULATION=needs_modulation,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip

    def reduce(partials: Tensor) -> Tensor:
        gradient = torch.empty(heads, 2 * H - 1, 2 * W - 1, dtype=torch.float32, device=device)
        offsets_per_program = 16
        programs = heads * triton.cdiv((2 * H - 1) * (2 * W - 1), offsets_per_program)
        kernels.reduce_table_partials[(programs,)](
            partials, gradient, splits, heads, H, W, **layout, BLOCK_OFFSETS=offsets_per_program
        )
        return gradient

    grad_modulation, grad_bias = modulation_partials, bias_partials
    if needs_modulation:
        grad_modulation = reduce(modulation_partials)
        if modulation.ndim == 2:  # one table for all heads
            grad_modulation = grad_modulation.sum(0)
        grad_modulation = grad_modulation.to(modulation.dtype)
    if needs_bias:
        grad_bias = reduce(bias_partials).flatten(1).t().to(rel_pos_bias.dtype).contiguous()
    return grad_modulation, grad_bias


_ARGUMENTS = "int grid_h, int grid_w, int before, float scale"
torch.library.define(
    "edt_kernels::amm_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? modulation, Tensor? rel_pos_bias, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
torch.library.define(
    "edt_kernels::amm_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? modulation, Tensor? rel_pos_bias, Tensor out, "
    f"Tensor logsumexp, {_ARGUMENTS}, bool needs_modulation, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("edt_kernels::amm_attention", ("cuda", "cpu"))(_forward)
torch.library.impl("edt_kernels::amm_attention_backward", ("cuda", "cpu"))(_backward)


@torch.library.register_fake("edt_kernels::amm_attention")
def _(q, k, v, modulation, rel_pos_bias, grid_h, grid_w, before, scale):
    B, N, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, heads, N, dtype=torch.float32)


@torch.library.register_fake("edt_kernels::amm_attention_backward")
def _(
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


torch.library.register_autograd("edt_kernels::amm_attention", _differentiate, setup_context=_save_for_backward)
torch.library.register_autograd("edt_kernels::amm_attention_backward", refuse_double_backward("amm_attention"))
refuse_transforms("amm_attention")


def amm_attention(q, k, v, grid, modulation, rel_pos_bias, scale, num_extra_tokens) -> Tensor:
    """`edt_kernels.amm_attention` by the kernels; the arguments are checked."""
    refuse_forward_mode("amm_attention", q, k, v, modulation, rel_pos_bias)
    out, _ = torch.ops.edt_kernels.amm_attention(
        q, k, v, modulation, rel_pos_bias, *grid, num_extra_tokens[0], scale
    )
    return out
