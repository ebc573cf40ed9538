"""The kernels of `edt_kernels.amm_attention.kernels` for sequences that fit into one tile of scores.

A tile of BLOCK rows holds BLOCK // SEQ sequences of one head, from as many batch items, each padded to SEQ rows;
pairs of different sequences are masked. A program takes one head and walks over its share of the batch: the tables
are the same at every step, so they are gathered once. The softmax needs no running maximum, backward is one pass,
and the bias' gradient adds up in registers, one partial a program, which `reduce_short_partials` adds up.
"""

import triton
import triton.language as tl

from .kernels import (
    ANY_ALIGNMENT,
    ANY_VALUE,
    exp_difference,
    finite_maximum,
    gradients_of_scores,
    grid_positions,
    load_logsumexp,
    load_rows,
    load_rows_transposed,
    look_up,
    masked_logits,
    middle_of_table,
    row_offsets,
    store_output,
    store_rows,
    store_rows_transposed,
)


@triton.jit
def packed_rows(SEQ: tl.constexpr, BLOCK: tl.constexpr):
    """Sequence and token of each row of a tile. Both (BLOCK,)."""
    row = tl.arange(0, BLOCK)
    return row // SEQ, row % SEQ


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def short_forward(
    q, k, v, table, out, logsumexp,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh,
    stride_table, N, heads, H, W, before, scale, B, steps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MODULATION: tl.constexpr, HAS_EXTRA: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, SEQ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out and logsumexp of `steps` tiles of one head."""
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    head, first = tl.program_id(0) % heads, tl.program_id(0) // heads * steps
    table += head * stride_table + middle_of_table(H, W)
    sequence, token = packed_rows(SEQ, BLOCK)
    position, on_grid = grid_positions(token, before, H, W)
    bias, factor = look_up(
        table, position[:, None] - position[None, :], on_grid[:, None] & on_grid[None, :],
        HAS_BIAS, HAS_MODULATION, HAS_EXTRA,
    )  # fmt: skip
    if MASKED:
        pair_valid = (sequence[:, None] == sequence[None, :]) & (token < N)[None, :]
        bias = tl.where(pair_valid, bias, float("-inf"))

    last = tl.minimum(first + steps, tl.cdiv(B, BLOCK // SEQ))
    for step in tl.range(first, last, disable_licm=True):  # hoisted row offsets would spill
        batch = step * (BLOCK // SEQ) + sequence
        valid = (token < N) & (batch < B)
        q_offsets = row_offsets(batch, token, head, stride_qb, stride_qn, stride_qh, ALIGN)
        k_offsets = row_offsets(batch, token, head, stride_kb, stride_kn, stride_kh, ALIGN)
        v_offsets = row_offsets(batch, token, head, stride_vb, stride_vn, stride_vh, ALIGN)
        q_tile = load_rows(q, q_offsets, valid, D, BLOCK_D, MASKED)  # (BLOCK, BLOCK_D)
        k_tile = load_rows_transposed(k, k_offsets, valid, D, BLOCK_D, MASKED)  # (BLOCK_D, BLOCK)
        v_tile = load_rows(v, v_offsets, valid, D, BLOCK_D, MASKED)  # (BLOCK, BLOCK_D)
        products = tl.dot(q_tile, k_tile, input_precision=PRECISION)
        logits = masked_logits(products, scale, bias, None, HAS_BIAS or MASKED, False)
        row_max = tl.max(logits, axis=1)
        p = exp_difference(logits, finite_maximum(row_max)[:, None], EXACT)
        row_sum = tl.sum(p, axis=1)
        if HAS_MODULATION:
            p *= factor
        accumulator = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        out_offsets = row_offsets(batch, token, head, stride_ob, stride_on, stride_oh, ALIGN)
        first_row = (batch.to(tl.int64) * heads + head) * N
        store_output(
            out, logsumexp, out_offsets, first_row, token, N, valid, row_max, row_sum, accumulator,
            D, BLOCK_D, EXACT,
        )  # fmt: skip


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def short_backward(
    q, k, v, table, grad_out, logsumexp, grad_q, grad_k, grad_v, partials,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, stride_ob, stride_on, stride_oh,
    stride_table, N, heads, H, W, before, scale, B, steps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MODULATION: tl.constexpr, HAS_EXTRA: tl.constexpr, MASKED: tl.constexpr,
    GRAD_BIAS: tl.constexpr, PRECISION: tl.constexpr, SEQ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of `steps` tiles of one head, and their share of dbias: partials
    (programs a head, heads, BLOCK keys, BLOCK queries). There is no modulation (HAS_MODULATION is False).
    stride_o belongs to the gradients."""
    tl.static_assert(not HAS_MODULATION)
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    head, first = tl.program_id(0) % heads, tl.program_id(0) // heads * steps
    table += head * stride_table + middle_of_table(H, W)
    sequence, token = packed_rows(SEQ, BLOCK)
    position, on_grid = grid_positions(token, before, H, W)
    index, both_on_grid = position[None, :] - position[:, None], on_grid[None, :] & on_grid[:, None]
    bias, factor = look_up(table, index, both_on_grid, HAS_BIAS, False, HAS_EXTRA)
    if MASKED:
        pair_valid = (sequence[:, None] == sequence[None, :]) & (token < N)[:, None]
        bias = tl.where(pair_valid, bias, float("-inf"))

    if GRAD_BIAS:
        bias_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
    last = tl.minimum(first + steps, tl.cdiv(B, BLOCK // SEQ))
    for step in tl.range(first, last, disable_licm=True):  # hoisted row offsets would spill
        batch = step * (BLOCK // SEQ) + sequence
        valid = (token < N) & (batch < B)
        q_offsets = row_offsets(batch, token, head, stride_qb, stride_qn, stride_qh, ALIGN)
        k_offsets = row_offsets(batch, token, head, stride_kb, stride_kn, stride_kh, ALIGN)
        v_offsets = row_offsets(batch, token, head, stride_vb, stride_vn, stride_vh, ALIGN)
        grad_offsets = row_offsets(batch, token, head, stride_gb, stride_gn, stride_gh, ALIGN)
        first_row = (batch.to(tl.int64) * heads + head) * N
        row_max, row_log_sum = load_logsumexp(logsumexp, first_row, token, N, valid, EXACT, MASKED)
        q_tile = load_rows(q, q_offsets, valid, D, BLOCK_D, MASKED)  # all (BLOCK, BLOCK_D)
        k_tile = load_rows(k, k_offsets, valid, D, BLOCK_D, MASKED)
        v_tile = load_rows(v, v_offsets, valid, D, BLOCK_D, MASKED)
        grad_tile = load_rows(grad_out, grad_offsets, valid, D, BLOCK_D, MASKED)
        out_offsets = row_offsets(batch, token, head, stride_ob, stride_on, stride_oh, ALIGN)
        p, _, grad_logits, _ = gradients_of_scores(
            k_tile, q_tile, v_tile, grad_tile, row_max, row_log_sum, None, scale, bias, factor, None,
            HAS_BIAS or MASKED, False, False, True, True, EXACT, PRECISION,
        )  # fmt: skip
        if GRAD_BIAS:
            bias_sum += grad_logits
        grad_logits = grad_logits.to(q_tile.dtype)
        v_product = tl.dot(p.to(grad_tile.dtype), grad_tile, input_precision=PRECISION)
        k_product = tl.dot(grad_logits, q_tile, input_precision=PRECISION)
        q_product = tl.dot(tl.trans(k_tile), grad_logits, input_precision=PRECISION)  # (BLOCK_D, BLOCK)
        store_rows(grad_v, out_offsets, valid, v_product, D, BLOCK_D)
        store_rows(grad_k, out_offsets, valid, k_product * scale, D, BLOCK_D)
        store_rows_transposed(grad_q, out_offsets, valid, q_product * scale, D, BLOCK_D)

    if GRAD_BIAS:
        row = tl.arange(0, BLOCK)
        place = tl.program_id(0).to(tl.int64) * BLOCK * BLOCK + row[:, None] * BLOCK + row[None, :]
        tl.store(partials + place, bias_sum)


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def reduce_short_partials(
    partials, grad_bias, splits, heads, H, W, before,
    SEQ: tl.constexpr, BLOCK: tl.constexpr, BLOCK_OFFSETS: tl.constexpr,
):  # fmt: skip
    """dbias[head, Δ] = Σ of the partials at Δ: each query row has at most one key row at an offset."""
    offsets = (2 * H - 1) * (2 * W - 1)
    head = tl.program_id(0) % heads
    offset = tl.program_id(0) // heads * BLOCK_OFFSETS + tl.arange(0, BLOCK_OFFSETS)
    sequence, token = packed_rows(SEQ, BLOCK)
    y, x = (token - before) // W, (token - before) % W
    key_y = y[None, :] - (offset // (2 * W - 1) - H + 1)[:, None]
    key_x = x[None, :] - (offset % (2 * W - 1) - W + 1)[:, None]
    exists = ((token >= before) & (y < H))[None, :] & (offset < offsets)[:, None]
    exists &= (key_y >= 0) & (key_y < H) & (key_x >= 0) & (key_x < W)
    key = (sequence * SEQ + before)[None, :] + key_y * W + key_x
    place = key * BLOCK + tl.arange(0, BLOCK)[None, :]

    total = tl.zeros((BLOCK_OFFSETS, BLOCK), tl.float32)
    partials += head * BLOCK * BLOCK
    for _ in range(0, splits):
        total += tl.load(partials + place, mask=exists, other=0.0)
        partials += heads * BLOCK * BLOCK
    tl.store(grad_bias + head * offsets + offset, tl.sum(total, axis=1), mask=offset < offsets)
