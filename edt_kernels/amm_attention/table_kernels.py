"""The gradients of both tables for sequences longer than a tile: `backward_tables`, whose partial sums
`reduce_table_partials` adds up. The formulas are in `edt_kernels.amm_attention.kernels`."""

import triton
import triton.language as tl

from .kernels import gradients_of_scores
from .memory import (
    ANY_ALIGNMENT,
    ANY_VALUE,
    load_logsumexp,
    load_rows,
    load_statistic,
    rounded_to_half,
    row_offsets,
)


@triton.jit
def rows_of_cells(item, cell, head, stride_b, stride_n, stride_h, group, first, ALIGN: tl.constexpr):
    """Element offsets of the rows of a tile's cells. Apart from the sum they do not change from tile to tile."""
    rows = row_offsets(item, cell, head, stride_b, stride_n, stride_h, ALIGN)
    return tl.multiple_of(
        rows + (tl.cast(group, tl.int64) * stride_b + tl.cast(first, tl.int64) * stride_n), ALIGN
    )


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def backward_tables(
    q, k, v, bias, modulation, grad_out, logsumexp, delta, bias_partials, modulation_partials,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    stride_bias, stride_bias_head, stride_modulation, stride_modulation_head,
    N, heads, H, W, before, scale, B, groups_per_split,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, ROUNDED: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, ITEMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Σ dS and Σ P ⊙ G over the batch and over all pairs of grid tiles that are equally far apart.

    Tiles are ROWS×COLUMNS cells of the grid (of ITEMS batch items where the grid is smaller than a tile), so the
    offset of two cells depends only on their places in their tiles and on how far apart the tiles are, and sums
    stay (BLOCK, BLOCK) however many tokens there are. Of T rows of tiles, T − d pairs are d apart. A program takes
    distances d and d − T of one head and one share of the batch: T pairs, as every program does, so that all end
    together, and those side by side read the same tiles at about the same time.
    Partials: (splits, heads, distances, BLOCK, BLOCK).
    """
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    BLOCK: tl.constexpr = ITEMS * ROWS * COLUMNS
    tiles_y, tiles_x = 1, 1
    if ITEMS == 1:  # else the grid is one tile, and without a loop over distances nothing spills
        tiles_y, tiles_x = tl.cdiv(H, ROWS), tl.cdiv(W, COLUMNS)
    across = 2 * tiles_x - 1
    share, place = tl.program_id(0) // (tiles_y * across), tl.program_id(0) % (tiles_y * across)
    head, first_group = share % heads, share // heads * groups_per_split
    last_group = tl.minimum(first_group + groups_per_split, tl.cdiv(B, ITEMS))

    if bias is not None:
        bias += head * stride_bias_head
    if modulation is not None:
        modulation += head * stride_modulation_head
    local = tl.arange(0, BLOCK)
    item, y, x = local // (ROWS * COLUMNS), local // COLUMNS % ROWS, local % COLUMNS
    cell = before + y * W + x
    # Query tile minus key tile.
    apart_x = place % across - tiles_x + 1
    for apart_y in range(place // across - tiles_y + 1, tiles_y, tiles_y):
        # The first query tile that has a key tile this far away.
        first_y, first_x = tl.maximum(apart_y, 0), tl.maximum(apart_x, 0)
        count_y, count_x = tiles_y - tl.abs(apart_y), tiles_x - tl.abs(apart_x)
        # (BLOCK, BLOCK), the same for every pair of tiles. Computed anew for each distance: kept over the loops
        # below, differences of cells would spill. `zero` is, as the compiler does not know.
        zero = tl.minimum(apart_y + tiles_y, 0)
        offset_y = (y ^ zero)[:, None] - y[None, :] + apart_y * ROWS
        offset_x = (x ^ zero)[:, None] - x[None, :] + apart_x * COLUMNS
        inside = (tl.abs(offset_y) < H) & (tl.abs(offset_x) < W)
        index = tl.where(inside, (offset_y + H - 1) * (2 * W - 1) + offset_x + W - 1, 0)
        logit, factor = None, None
        if bias is not None:
            logit = tl.load(bias + index * stride_bias).to(tl.float32)
            if ROUNDED:  # as the logsumexp was made with
                logit = rounded_to_half(logit).to(tl.float32)
        if modulation is not None:
            factor = tl.load(modulation + index * stride_modulation).to(tl.float32)
        if ITEMS > 1:  # pairs of different items are masked here: in the loop their masks would spill
            logit = tl.where(item[:, None] == item[None, :], 0.0 if logit is None else logit, float("-inf"))

        if bias_partials is not None:
            bias_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
        if modulation_partials is not None:
            modulation_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
        for pair in range(0, count_y * count_x):
            y_i, x_i = (first_y + pair // count_x) * ROWS, (first_x + pair % count_x) * COLUMNS
            y_j, x_j = y_i - apart_y * ROWS, x_i - apart_x * COLUMNS
            first_i, first_j = y_i * W + x_i, y_j * W + x_j
            for step in range(first_group, last_group):
                group = step * ITEMS
                valid_i = (group + item < B) & (y_i + y < H) & (x_i + x < W)
                valid_j = (group + item < B) & (y_j + y < H) & (x_j + x < W)
                q_offsets = rows_of_cells(item, cell, head, stride_qb, stride_qn, stride_qh, group, first_i, ALIGN)
                g_offsets = rows_of_cells(item, cell, head, stride_gb, stride_gn, stride_gh, group, first_i, ALIGN)
                k_offsets = rows_of_cells(item, cell, head, stride_kb, stride_kn, stride_kh, group, first_j, ALIGN)
                v_offsets = rows_of_cells(item, cell, head, stride_vb, stride_vn, stride_vh, group, first_j, ALIGN)
                first_row, i = ((group + item).to(tl.int64) * heads + head) * N, cell + first_i
                row_max, row_log_sum = load_logsumexp(logsumexp, first_row, i, N, valid_i, EXACT, MASKED)
                q_tile = load_rows(q, q_offsets, valid_i, D, BLOCK_D, MASKED)  # (BLOCK, BLOCK_D)
                k_tile = load_rows(k, k_offsets, valid_j, D, BLOCK_D, MASKED, 1)  # (BLOCK_D, BLOCK)
                grad_tile = load_rows(grad_out, g_offsets, valid_i, D, BLOCK_D, MASKED)  # (BLOCK, BLOCK_D)
                v_tile = load_rows(v, v_offsets, valid_j, D, BLOCK_D, MASKED, 1)  # (BLOCK_D, BLOCK)

                row_delta = load_statistic(delta + first_row, i, valid_i, 0.0, MASKED)
                p, grad_weights, grad_logits, _ = gradients_of_scores(
                    q_tile, k_tile, grad_tile, v_tile, row_max, row_log_sum, row_delta, scale, logit, factor,
                    valid_j[None, :], MASKED, False, False, EXACT, PRECISION,
                )  # fmt: skip
                if bias_partials is not None:
                    bias_sum += grad_logits
                if modulation_partials is not None:
                    modulation_sum += p * grad_weights

        distance = (apart_y + tiles_y - 1) * across + apart_x + tiles_x - 1
        partials = (share.to(tl.int64) * (2 * tiles_y - 1) * across + distance) * BLOCK * BLOCK
        partials += local[:, None] * BLOCK + local[None, :]
        if bias_partials is not None:
            tl.store(bias_partials + partials, bias_sum)
        if modulation_partials is not None:
            tl.store(modulation_partials + partials, modulation_sum)


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def reduce_table_partials(
    partials, grad_table, splits, heads, stride_offset, stride_head, H, W,
    ITEMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_OFFSETS: tl.constexpr,
):  # fmt: skip
    """dtable[head, Δ] = Σ of the partials at Δ. For a cell of the query tile, Δ leaves one distance between
    the tiles and one cell of the key tile, so every partial is read once."""
    tiles_y, tiles_x = tl.cdiv(H, ROWS), tl.cdiv(W, COLUMNS)
    distances = (2 * tiles_y - 1) * (2 * tiles_x - 1)
    head = tl.program_id(0) % heads
    offset = tl.program_id(0) // heads * BLOCK_OFFSETS + tl.arange(0, BLOCK_OFFSETS)
    offset_y, offset_x = offset // (2 * W - 1) - H + 1, offset % (2 * W - 1) - W + 1

    local = tl.arange(0, BLOCK)
    y, x = local // COLUMNS % ROWS, local % COLUMNS
    # y_i − y_j + ROWS·apart_y = offset_y with 0 ≤ y_j < ROWS; shifted to stay positive, where // rounds down.
    key_y = y[None, :] - offset_y[:, None] + (tiles_y - 1) * ROWS  # = y_j + ROWS·(tiles_y−1 − apart_y)
    key_x = x[None, :] - offset_x[:, None] + (tiles_x - 1) * COLUMNS
    distance_y, distance_x = 2 * (tiles_y - 1) - key_y // ROWS, 2 * (tiles_x - 1) - key_x // COLUMNS
    key = (local // (ROWS * COLUMNS) * ROWS)[None, :] + key_y % ROWS
    key = key * COLUMNS + key_x % COLUMNS
    exists = (distance_y >= 0) & (distance_x >= 0) & (key_y >= 0) & (key_x >= 0)
    exists &= (offset < (2 * H - 1) * (2 * W - 1))[:, None] & (local < ITEMS * ROWS * COLUMNS)[None, :]
    place = (distance_y * (2 * tiles_x - 1) + distance_x).to(tl.int64)
    place = (head * distances + place) * BLOCK * BLOCK + local[None, :] * BLOCK + key

    total = tl.zeros((BLOCK_OFFSETS, BLOCK), tl.float32)
    for _ in tl.range(0, splits, loop_unroll_factor=4):  # so many loads are on their way at once
        total += tl.load(partials + place, mask=exists, other=0.0)
        partials += heads * distances * BLOCK * BLOCK
    gradient = tl.sum(total, axis=1).to(grad_table.dtype.element_ty)
    exists = offset < (2 * H - 1) * (2 * W - 1)
    tl.store(grad_table + offset * stride_offset + head * stride_head, gradient, mask=exists)
