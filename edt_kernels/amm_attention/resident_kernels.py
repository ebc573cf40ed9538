"""`forward` of `edt_kernels.amm_attention.kernels` for sequences of a few tiles, with a whole head on the chip.

One program owns a (batch item, head), keeps its keys and values in shared memory and walks over the queries: each
row is read once, where the programs of `forward` read the keys and values again for each tile of queries.
"""

import triton
import triton.language as tl

from .kernels import (
    ANY_ALIGNMENT,
    attend,
    grid_positions,
    load_rows,
    load_rows_transposed,
    look_up,
    masked_logits,
    middle_of_table,
    place_of_program,
    row_offsets,
    store_output,
)


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def resident_forward(
    q, k, v, table, out, logsumexp,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh,
    stride_table, N, heads, H, W, before, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MODULATION: tl.constexpr, HAS_EXTRA: tl.constexpr, MASKED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out and logsumexp of one head; TILES tiles of BLOCK_N keys."""
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    _, head, batch = place_of_program(1, heads)
    table += head * stride_table + middle_of_table(H, W)
    k_tiles, v_tiles = (), ()
    for t in tl.static_range(TILES):
        j = t * BLOCK_N + tl.arange(0, BLOCK_N)
        k_offsets = row_offsets(batch, j, head, stride_kb, stride_kn, stride_kh, ALIGN)
        v_offsets = row_offsets(batch, j, head, stride_vb, stride_vn, stride_vh, ALIGN)
        k_tiles += (load_rows_transposed(k, k_offsets, j < N, D, BLOCK_D, MASKED),)  # (BLOCK_D, BLOCK_N)
        v_tiles += (load_rows(v, v_offsets, j < N, D, BLOCK_D, MASKED),)  # (BLOCK_N, BLOCK_D)

    position_j, on_grid_j = grid_positions(tl.arange(0, BLOCK_N), before, H, W)
    position_i, on_grid_i = grid_positions(tl.arange(0, BLOCK_M), before, H, W)
    for start in tl.range(0, N, BLOCK_M, disable_licm=True):
        i = start + tl.arange(0, BLOCK_M)
        q_offsets = row_offsets(batch, i, head, stride_qb, stride_qn, stride_qh, ALIGN)
        q_tile = load_rows(q, q_offsets, i < N, D, BLOCK_D, MASKED)  # (BLOCK_M, BLOCK_D)
        running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        running_sum = tl.zeros((BLOCK_M,), tl.float32)
        accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if not EVEN:
            position_i, on_grid_i = grid_positions(i, before, H, W)
        for t in tl.static_range(TILES):
            j = t * BLOCK_N + tl.arange(0, BLOCK_N)
            if not EVEN:
                position_j, on_grid_j = grid_positions(j, before, H, W)
            index, both_on_grid = (
                position_i[:, None] - position_j[None, :],
                on_grid_i[:, None] & on_grid_j[None, :],
            )
            bias, factor = look_up(table, index, both_on_grid, HAS_BIAS, HAS_MODULATION, HAS_EXTRA)
            products = tl.dot(q_tile, k_tiles[t], input_precision=PRECISION)
            logits = masked_logits(products, scale, bias, (j < N)[None, :], HAS_BIAS, MASKED)
            running_max, running_sum, accumulator = attend(
                logits, factor, v_tiles[t], running_max, running_sum, accumulator, HAS_MODULATION, EXACT, PRECISION
            )
            if EVEN:
                table -= BLOCK_N // W * (2 * W - 1)
        if EVEN:
            table += (TILES * BLOCK_N + BLOCK_M) // W * (2 * W - 1)
        out_offsets = row_offsets(batch, i, head, stride_ob, stride_on, stride_oh, ALIGN)
        first_row = (batch.to(tl.int64) * heads + head) * N
        store_output(
            out, logsumexp, out_offsets, first_row, i, N, i < N,
            running_max, running_sum, accumulator, D, BLOCK_D, EXACT,
        )  # fmt: skip
