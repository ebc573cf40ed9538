"""How kernels read and write: rows of q, k, v and the like, statistics of rows, and the tables.

The tables of bias and modulation are indexed by the offset Δ of two tokens of an H×W grid. The index separates
into a share of the query and a share of the key, position(i) − position(j), and what depends on the tile alone.
A kernel reads an entry for each pair of tokens, in one of two forms:

- Long sequences gather from the table (SIDE = 0), whose entries stay on the chip. Pairs with a token before or
  after the grid, which have no offset, are masked.
- Short ones read matrices with an entry for each pair (SIDE rows and columns), which `expand_table` makes once for
  the whole batch: loads are wide, and nothing is computed for them. Gathers of one entry a thread kept the load
  unit busy for longer than all else. But N² entries for each head and batch item pass the L2 cache: at 256 tokens
  of 64 channels as much as q, k, v and output, at 1024 four times as much.

For float32 inputs matrices are float32. For others they are float16, whose rounding (2⁻¹² of an entry, 0.001 in
a bias of 4) is an eighth of bfloat16's; entries beyond ±65504 become that, which a softmax cannot tell apart.
"""

import triton
import triton.language as tl

# Whether these arguments are multiples of 16 tells the compiler nothing (of strides ALIGN does); asked, it would
# make the same code again for each combination. Nor is it worth codes that what the batch size decides is 1.
ANY_ALIGNMENT = ["stride_qn", "stride_kn", "stride_vn", "stride_on", "stride_gn", "heads"]
ANY_VALUE = ["B", "steps", "groups_per_split", "splits"]


@triton.jit
def place_of_program(tiles, heads):
    """Tile, head and batch item. Tiles of one head run side by side: they read the same keys or queries."""
    program = tl.program_id(0)
    return program % tiles, program // tiles % heads, program // (tiles * heads)


@triton.jit
def row_offsets(batch, token, head, stride_b, stride_n, stride_h, ALIGN: tl.constexpr):
    """Element offset of each row, 64 bits wide. Every stride is a multiple of ALIGN: that decides how wide the
    loads are, and the compiler cannot see it for a stride such as a head of 52."""
    offsets = tl.cast(batch, tl.int64) * stride_b + token.to(tl.int64) * stride_n + head.to(tl.int64) * stride_h
    return tl.multiple_of(offsets, ALIGN)


@triton.jit
def load_rows(
    pointer, offsets, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr = 0
):
    """(rows, BLOCK_D), zero outside; with ROWS = 1, the axis of rows, (BLOCK_D, rows)."""
    d = tl.expand_dims(tl.arange(0, BLOCK_D), ROWS)
    mask = d < D
    if MASKED:
        mask = mask & tl.expand_dims(valid, 1 - ROWS)
    return tl.load(pointer + tl.expand_dims(offsets, 1 - ROWS) + d, mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, offsets, valid, values, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr = 0):
    """Of the shape that `load_rows` gives."""
    d = tl.expand_dims(tl.arange(0, BLOCK_D), ROWS)
    mask = tl.expand_dims(valid, 1 - ROWS) & (d < D)
    tl.store(pointer + tl.expand_dims(offsets, 1 - ROWS) + d, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_statistic(pointer, i, valid, other, MASKED: tl.constexpr):
    """One number for each of the rows i."""
    return tl.load(pointer + i, mask=valid, other=other) if MASKED else tl.load(pointer + i)


@triton.jit
def load_logsumexp(logsumexp, first, i, N, valid, EXACT: tl.constexpr, MASKED: tl.constexpr):
    """What `probabilities` takes of rows i of the batch item and head whose rows start at `first`. Rows that do
    not exist get +∞, which makes their probabilities zero."""
    if EXACT:
        row_max = load_statistic(logsumexp + 2 * first, i, valid, 0.0, MASKED)
        row_log_sum = load_statistic(logsumexp + 2 * first + N, i, valid, float("inf"), MASKED)
    else:
        row_max, row_log_sum = load_statistic(logsumexp + first, i, valid, float("inf"), MASKED), 0.0
    return row_max, row_log_sum  # one return: where there are two, the compiler wants one type of both


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
    entries = tl.where(tl.abs(entries) < float("inf"), tl.minimum(tl.maximum(entries, -65504.0), 65504.0), entries)
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
