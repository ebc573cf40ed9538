"""How kernels read the tables of bias and modulation, which are indexed by the offset Δ of two tokens of an H×W grid.

The index separates into a share of the query and a share of the key, position(i) − position(j), and what depends on
the tile alone. A kernel reads an entry for each pair of tokens, in one of two forms:

- Long sequences gather from the table (SIDE = 0), whose entries stay on the chip. Pairs with a token before or after
  the grid, which have no offset, are masked.
- Short ones read matrices with an entry for each pair (SIDE > 0 rows and columns), which `expand_table` makes once
  for the whole batch: loads are wide, and go straight into the layout of the scores. Gathers of one entry a thread
  kept the load unit busy for longer than all else. A matrix of N tokens takes N² entries through the L2 cache for
  each head and batch item: as much as its q, k, v and output at 256 tokens of 64 channels, four times as much at 1024.

For float32 inputs matrices are float32. For others they are float16, whose rounding (2⁻¹² of an entry, 0.001 in a
bias of 4) is an eighth of bfloat16's; entries beyond ±65504 become that, which a softmax cannot tell apart.
"""

import triton
import triton.language as tl


@triton.jit
def positions(token, before, H, W):
    """Each token's share of the table index, and which tokens are on the grid.

    position(i) − position(j) = (y_i − y_j)·(2W−1) + x_i − x_j, counted from the middle of the table. Tokens off
    the grid are clamped onto it, so that the index stays inside the table; their pairs are masked.
    """
    cell = token - before
    on_grid = (cell >= 0) & (cell < H * W)
    cell = tl.minimum(tl.maximum(cell, 0), H * W - 1)
    return cell // W * (2 * W - 1) + cell % W, on_grid


@triton.jit
def query_places(i, before, H, W, SIDE: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """The queries' share of the places of pairs, and which queries are on the grid."""
    if SIDE:
        place, on_grid = i if KEYS_FIRST else i * SIDE, i >= 0
    else:
        place, on_grid = positions(i, before, H, W)
    return place, on_grid


@triton.jit
def key_places(j, before, H, W, SIDE: tl.constexpr, KEYS_FIRST: tl.constexpr):
    if SIDE:
        place, on_grid = j * SIDE if KEYS_FIRST else j, j >= 0
    else:
        position, on_grid = positions(j, before, H, W)
        place = -position
    return place, on_grid


@triton.jit
def places_apart(W, SIDE: tl.constexpr, TOKENS: tl.constexpr):
    """By how much the places of queries change from one tile of TOKENS columns of a matrix, or whole rows of the
    grid, to the next; those of keys, gathered, by as much less."""
    return TOKENS if SIDE else TOKENS // W * (2 * W - 1)


@triton.jit
def place_of_equals(H, W, SIDE: tl.constexpr):
    """What is to be added to the places of a query and a key in the table of a head; nothing in a matrix."""
    return 0 if SIDE else (H - 1) * (2 * W - 1) + W - 1


@triton.jit
def load_pairs(table, place, both_on_grid, other, HAS_EXTRA: tl.constexpr):
    """An entry for each pair in float32, `other` for those with a token outside the grid."""
    if HAS_EXTRA:
        return tl.load(table + place, mask=both_on_grid, other=other).to(tl.float32)
    else:
        return tl.load(table + place).to(tl.float32)


@triton.jit
def rounded_to_half(entries):
    """As those of a float16 matrix. Infinities and NaN stay."""
    entries = tl.where(tl.abs(entries) < float("inf"), tl.clamp(entries, -65504.0, 65504.0), entries)
    return entries.to(tl.float16)


@triton.jit(do_not_specialize_on_alignment=["stride_offset", "stride_head"])
def expand_table(
    table, matrix, stride_offset, stride_head, H, W, before, fill,
    SIDE: tl.constexpr, KEYS_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """matrix[head, i, j] = table[Δ(i, j)], or [head, j, i]; `fill` where a token is not on the grid."""
    PROGRAMS: tl.constexpr = SIDE * SIDE // BLOCK
    head, entry = tl.program_id(0) // PROGRAMS, tl.program_id(0) % PROGRAMS * BLOCK + tl.arange(0, BLOCK)
    i, j = (entry % SIDE, entry // SIDE) if KEYS_FIRST else (entry // SIDE, entry % SIDE)
    position_i, on_grid_i = positions(i, before, H, W)
    position_j, on_grid_j = positions(j, before, H, W)
    index = position_i - position_j + (H - 1) * (2 * W - 1) + W - 1
    values = tl.load(
        table + index.to(tl.int64) * stride_offset + head * stride_head, mask=on_grid_i & on_grid_j, other=fill
    ).to(tl.float32)
    if matrix.dtype.element_ty == tl.float16:
        values = rounded_to_half(values)
    tl.store(matrix + head * SIDE * SIDE + entry, values)
