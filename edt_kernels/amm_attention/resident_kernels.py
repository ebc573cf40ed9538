"""The kernels of `edt_kernels.amm_attention.kernels` for sequences of which a whole head fits on the chip.

`resident_forward` and `resident_backward`: one program owns a (batch item, head), keeps its keys and values in
shared memory and walks over the queries. Each row is read once, where the programs of `forward` read the keys and
values again for each tile of queries. In the backward pass it keeps dk and dv in registers, and a step completes
its rows of dq: five products, of which `backward_q` and `backward_kv` make two again.

`short_backward`: a sequence is one tile. A program walks over its share of the batch, of one head: the bias is the
same at every step, so it is read once, and its gradient adds up in registers.

All read the tables as matrices, see `memory`.
"""

import triton
import triton.language as tl

from .kernels import add_product, attend, gradients_of_scores, masked_logits, store_output
from .memory import (
    ANY_ALIGNMENT,
    ANY_VALUE,
    load_logsumexp,
    load_pairs,
    load_rows,
    place_of_program,
    row_offsets,
    store_rows,
)


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def resident_forward(
    q, k, v, bias, modulation, out, logsumexp,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh,
    stride_bias, stride_modulation, N, heads, H, W, before, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SIDE: tl.constexpr, HAS_EXTRA: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out and logsumexp of one head; TILES tiles of BLOCK_N keys."""
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    _, head, batch = place_of_program(1, heads)
    k_tiles, v_tiles = (), ()
    for t in tl.static_range(TILES):
        j = t * BLOCK_N + tl.arange(0, BLOCK_N)
        k_offsets = row_offsets(batch, j, head, stride_kb, stride_kn, stride_kh, ALIGN)
        v_offsets = row_offsets(batch, j, head, stride_vb, stride_vn, stride_vh, ALIGN)
        k_tiles += (load_rows(k, k_offsets, j < N, D, BLOCK_D, MASKED, 1),)  # (BLOCK_D, BLOCK_N)
        v_tiles += (load_rows(v, v_offsets, j < N, D, BLOCK_D, MASKED),)  # (BLOCK_N, BLOCK_D)

    place = tl.arange(0, BLOCK_M)[:, None] * SIDE + tl.arange(0, BLOCK_N)[None, :]
    for start in tl.range(0, N, BLOCK_M, disable_licm=True):
        i = start + tl.arange(0, BLOCK_M)
        q_offsets = row_offsets(batch, i, head, stride_qb, stride_qn, stride_qh, ALIGN)
        q_tile = load_rows(q, q_offsets, i < N, D, BLOCK_D, MASKED)  # (BLOCK_M, BLOCK_D)
        running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        running_sum = tl.zeros((BLOCK_M,), tl.float32)
        accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for t in tl.static_range(TILES):
            j = t * BLOCK_N + tl.arange(0, BLOCK_N)
            first, logit, factor = start * SIDE + t * BLOCK_N, None, None
            if bias is not None:
                logit = load_pairs(bias + head * stride_bias + first, place, None, 0.0, False)
            if modulation is not None:
                factor = load_pairs(modulation + head * stride_modulation + first, place, None, 1.0, False)
            products = tl.dot(q_tile, k_tiles[t], input_precision=PRECISION)
            logits = masked_logits(products, scale, logit, (j < N)[None, :], MASKED)
            running_max, running_sum, accumulator = attend(
                logits, factor, v_tiles[t], running_max, running_sum, accumulator, EXACT, PRECISION
            )
        out_offsets = row_offsets(batch, i, head, stride_ob, stride_on, stride_oh, ALIGN)
        first_row = (batch.to(tl.int64) * heads + head) * N
        store_output(
            out, logsumexp, out_offsets, first_row, i, N, i < N,
            running_max, running_sum, accumulator, D, BLOCK_D, EXACT,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def resident_backward(
    q, k, v, bias, modulation, out, grad_out, logsumexp, delta, grad_q, grad_k, grad_v,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_gb, stride_gn, stride_gh,
    stride_bias, stride_modulation, N, heads, H, W, before, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SIDE: tl.constexpr, HAS_EXTRA: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv and delta of one head of BLOCK_N tokens, without modulation. `out` and the gradients are
    contiguous. Registers just hold it: masks would spill, and so would what is computed before the loop for use in
    it or after it."""
    tl.static_assert(modulation is None and not MASKED)
    head, batch = tl.program_id(0) % heads, tl.program_id(0) // heads
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
        place = j[:, None] * SIDE + tl.arange(0, BLOCK_M)[None, :]
        logit = None
        if bias is not None:
            logit = load_pairs(bias + head * stride_bias + start, place, None, 0.0, False)
        p, _grad_weights, grad_logits, _delta = gradients_of_scores(
            k_tile, q_tile, v_tile, grad_tile, row_max, row_log_sum, row_delta, scale, logit, None, None,
            False, True, False, False, PRECISION,
        )  # fmt: skip
        grad_logits = grad_logits.to(q_tile.dtype)
        v_accumulator = add_product(v_accumulator, p.to(grad_tile.dtype), grad_tile, False, PRECISION)
        k_accumulator = add_product(k_accumulator, grad_logits, q_tile, False, PRECISION)
        q_product = tl.dot(tl.trans(k_tile), grad_logits, input_precision=PRECISION)  # (BLOCK_D, BLOCK_M)
        store_rows(grad_q, out_offsets, all_queries, q_product * scale, D, BLOCK_D, 1)

    # The same place in other words.
    batch = (tl.program_id(0) + heads) // heads - 1
    row, head = batch * BLOCK_N + j, tl.program_id(0) - batch * heads
    out_offsets = row_offsets(0, row, head, 0, heads * D, D, ALIGN)
    store_rows(grad_k, out_offsets, all_keys, k_accumulator * scale, D, BLOCK_D)
    store_rows(grad_v, out_offsets, all_keys, v_accumulator, D, BLOCK_D)


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def short_backward(
    q, k, v, bias, modulation, grad_out, logsumexp, grad_q, grad_k, grad_v, partials,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, stride_ob, stride_on, stride_oh,
    stride_bias, stride_modulation, N, heads, H, W, before, scale, B, steps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SIDE: tl.constexpr, HAS_EXTRA: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of `steps` sequences of one head, and their share of dbias, unless `partials` is None:
    (programs a head, heads, BLOCK cells of queries, BLOCK cells of keys). There is no modulation. stride_o belongs
    to the gradients."""
    tl.static_assert(modulation is None and BLOCK_M == BLOCK_N)
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    head, first = tl.program_id(0) % heads, tl.program_id(0) // heads * steps
    token = tl.arange(0, BLOCK_N)
    place = token[:, None] * SIDE + token[None, :]
    logit = None
    if bias is not None:
        logit = load_pairs(bias + head * stride_bias, place, None, 0.0, False)

    if partials is not None:
        bias_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for batch in tl.range(
        first, tl.minimum(first + steps, B), disable_licm=True
    ):  # hoisted row offsets would spill
        valid = token < N
        q_offsets = row_offsets(batch, token, head, stride_qb, stride_qn, stride_qh, ALIGN)
        k_offsets = row_offsets(batch, token, head, stride_kb, stride_kn, stride_kh, ALIGN)
        v_offsets = row_offsets(batch, token, head, stride_vb, stride_vn, stride_vh, ALIGN)
        grad_offsets = row_offsets(batch, token, head, stride_gb, stride_gn, stride_gh, ALIGN)
        first_row = (tl.cast(batch, tl.int64) * heads + head) * N
        row_max, row_log_sum = load_logsumexp(logsumexp, first_row, token, N, valid, EXACT, MASKED)
        q_tile = load_rows(q, q_offsets, valid, D, BLOCK_D, MASKED)  # all (BLOCK, BLOCK_D)
        k_tile = load_rows(k, k_offsets, valid, D, BLOCK_D, MASKED)
        v_tile = load_rows(v, v_offsets, valid, D, BLOCK_D, MASKED)
        grad_tile = load_rows(grad_out, grad_offsets, valid, D, BLOCK_D, MASKED)
        out_offsets = row_offsets(batch, token, head, stride_ob, stride_on, stride_oh, ALIGN)
        p, _, grad_logits, _ = gradients_of_scores(
            k_tile, q_tile, v_tile, grad_tile, row_max, row_log_sum, None, scale, logit, None, valid[:, None],
            MASKED, True, True, EXACT, PRECISION,
        )  # fmt: skip
        if partials is not None:
            bias_sum += grad_logits
        grad_logits = grad_logits.to(q_tile.dtype)
        v_product = tl.dot(p.to(grad_tile.dtype), grad_tile, input_precision=PRECISION)
        k_product = tl.dot(grad_logits, q_tile, input_precision=PRECISION)
        q_product = tl.dot(tl.trans(k_tile), grad_logits, input_precision=PRECISION)  # (BLOCK_D, BLOCK)
        store_rows(grad_v, out_offsets, valid, v_product, D, BLOCK_D)
        store_rows(grad_k, out_offsets, valid, k_product * scale, D, BLOCK_D)
        store_rows(grad_q, out_offsets, valid, q_product * scale, D, BLOCK_D, 1)

    if partials is not None:
        cell = token - before
        on_grid = (cell >= 0) & (cell < H * W)
        cells = tl.program_id(0).to(tl.int64) * BLOCK_N * BLOCK_M + cell[None, :] * BLOCK_N + cell[:, None]
        tl.store(partials + cells, bias_sum, mask=on_grid[:, None] & on_grid[None, :])
