"""The kernels of `edt_kernels.amm_attention.kernels` for sequences of a few tiles, with a whole head on the chip.

One program owns a (batch item, head), keeps its keys and values in shared memory and walks over the queries: each
row is read once, where the programs of `forward` read the keys and values again for each tile of queries. In the
backward pass it keeps dk and dv in registers, and a step completes its rows of dq: five products, of which
`backward_q` and `backward_kv` make two again.
"""

import triton
import triton.language as tl

from .kernels import (
    ANY_ALIGNMENT,
    add_product,
    attend,
    gradients_of_scores,
    grid_positions,
    load_logsumexp,
    load_rows,
    load_rows_transposed,
    look_up,
    masked_logits,
    middle_of_table,
    place_of_program,
    row_offsets,
    store_output,
    store_rows,
    store_rows_transposed,
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


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def resident_backward(
    q, k, v, table, out, grad_out, logsumexp, delta, grad_q, grad_k, grad_v,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_gb, stride_gn, stride_gh,
    stride_table, N, heads, H: tl.constexpr, W: tl.constexpr, before, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MODULATION: tl.constexpr, HAS_EXTRA: tl.constexpr, MASKED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv and delta of one head of BLOCK_N tokens on an EVEN grid, without modulation. `out` and the
    gradients are contiguous. Registers just hold it: masks, whose pairs need their indices, would spill, and so
    would what is computed before the loop for use in it or after it."""
    tl.static_assert(EVEN and not HAS_MODULATION)
    head, batch = tl.program_id(0) % heads, tl.program_id(0) // heads
    table += head * stride_table + middle_of_table(H, W)
    j, all_keys = tl.arange(0, BLOCK_N), tl.full((BLOCK_N,), True, tl.int1)
    k_offsets = row_offsets(batch, j, head, stride_kb, stride_kn, stride_kh, ALIGN)
    v_offsets = row_offsets(batch, j, head, stride_vb, stride_vn, stride_vh, ALIGN)
    k_tile = load_rows(k, k_offsets, all_keys, D, BLOCK_D, False)  # (BLOCK_N, BLOCK_D)
    v_tile = load_rows(v, v_offsets, all_keys, D, BLOCK_D, False)  # (BLOCK_N, BLOCK_D)

    k_accumulator = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    v_accumulator = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first_row = (batch.to(tl.int64) * heads + head) * BLOCK_N
    for start in tl.range(0, BLOCK_N, BLOCK_M, disable_licm=True):
        i, all_queries = start + tl.arange(0, BLOCK_M), tl.full((BLOCK_M,), True, tl.int1)
        q_offsets = row_offsets(batch, i, head, stride_qb, stride_qn, stride_qh, ALIGN)
        out_offsets = row_offsets(batch, i, head, stride_ob, stride_on, stride_oh, ALIGN)
        grad_offsets = row_offsets(batch, i, head, stride_gb, stride_gn, stride_gh, ALIGN)
        q_tile = load_rows(q, q_offsets, all_queries, D, BLOCK_D, False)  # (BLOCK_M, BLOCK_D)
        grad_tile = load_rows(grad_out, grad_offsets, all_queries, D, BLOCK_D, False)  # (BLOCK_M, BLOCK_D)
        out_tile = load_rows(out, out_offsets, all_queries, D, BLOCK_D, False)  # (BLOCK_M, BLOCK_D)
        row_max, row_log_sum = load_logsumexp(logsumexp, first_row, i, N, all_queries, False, False)
        row_delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
        tl.store(delta + first_row + i, row_delta)
        position_i, _on_grid_i = grid_positions(tl.arange(0, BLOCK_M), 0, H, W)
        position_j, _on_grid_j = grid_positions(j, 0, H, W)
        bias, factor = look_up(
            table + start // W * (2 * W - 1), position_i[None, :] - position_j[:, None], None,
            HAS_BIAS, False, False,
        )  # fmt: skip
        p, _grad_weights, grad_logits, _delta = gradients_of_scores(
            k_tile, q_tile, v_tile, grad_tile, row_max, row_log_sum, row_delta, scale, bias, factor, None,
            HAS_BIAS, False, False, True, False, False, PRECISION,
        )  # fmt: skip
        grad_logits = grad_logits.to(q_tile.dtype)
        v_accumulator = add_product(v_accumulator, p.to(grad_tile.dtype), grad_tile, False, PRECISION)
        k_accumulator = add_product(k_accumulator, grad_logits, q_tile, False, PRECISION)
        q_product = tl.dot(tl.trans(k_tile), grad_logits, input_precision=PRECISION)  # (BLOCK_D, BLOCK_M)
        store_rows_transposed(grad_q, out_offsets, all_queries, q_product * scale, D, BLOCK_D)

    # The same place in other words.
    batch = (tl.program_id(0) + heads) // heads - 1
    row, head = batch * BLOCK_N + j, tl.program_id(0) - batch * heads
    out_offsets = row_offsets(0, row, head, 0, heads * D, D, ALIGN)
    store_rows(grad_k, out_offsets, all_keys, k_accumulator * scale, D, BLOCK_D)
    store_rows(grad_v, out_offsets, all_keys, v_accumulator, D, BLOCK_D)
