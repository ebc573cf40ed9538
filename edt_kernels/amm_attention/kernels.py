"""softmax(q·kᵀ·scale + bias[Δ]) ⊙ m[Δ] · v and its gradients, for sequences of any length.

Forward: one program owns BLOCK_M query rows of one head and walks over the keys in tiles of BLOCK_N, with the
online softmax of FlashAttention-2. The factor m acts on the numerator only: with p = exp(logit − running_max)

    running_sum += Σ p          accumulator += (p ⊙ m)·v          out = accumulator / running_sum

Backward, with P the softmax recomputed from the rows' saved logsumexp and G = dO·vᵀ:

    dS = P ⊙ (G ⊙ m − delta),   delta = rowsum(P ⊙ G ⊙ m) = rowsum(dO ⊙ O)
    dq = scale·dS·k    dk = scale·dSᵀ·q    dv = (P ⊙ m)ᵀ·dO    dbias[Δ] = Σ dS    dm[Δ] = Σ P ⊙ G

Where one key takes nearly all of a row, G ⊙ m and delta nearly cancel, and what is left shows their rounding.
Programs that hold whole rows of scores therefore make delta of the same P and G; the others of O, which is rounded
to its dtype, as FlashAttention-2 does: another walk over the keys would cost two products. Of float32 inputs the
logsumexp is kept in two parts, row maximum and log2 of the sum: rounded together, they would change P by the
magnitude of the logits times a rounding step.

Each kernel owns what it writes, so that no sum depends on the order of programs: here `backward_q` (also writes
delta) and `backward_kv`, in `table_kernels` the gradients of the tables. `resident_kernels` do more at once for
sequences that fit on the chip.

Tables are read in one of two forms, see `memory`: of up to 256 tokens as matrices with an entry for each pair,
of more as they are, at the offset of each pair.
"""

import triton
import triton.language as tl

from .memory import (
    ANY_ALIGNMENT,
    key_places,
    load_logsumexp,
    load_pairs,
    load_rows,
    load_statistic,
    place_of_equals,
    place_of_program,
    places_apart,
    query_places,
    row_offsets,
    store_rows,
)

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def masked_logits(products, scale, bias, pair_valid, MASKED: tl.constexpr):
    """products·scale + bias, −∞ for pairs that do not exist."""
    logits = products * scale
    if bias is not None:
        logits += bias
    if MASKED:
        logits = tl.where(pair_valid, logits, float("-inf"))
    return logits


@triton.jit
def exp_difference(logits, subtrahend, EXACT: tl.constexpr):
    """exp(logits − subtrahend). One fused multiply-add for 16-bit inputs; for float32 the difference first,
    because the rounding of a large product would show in the result."""
    if EXACT:
        return tl.exp2((logits - subtrahend) * LOG2_E)
    return tl.exp2(logits * LOG2_E - subtrahend * LOG2_E)


@triton.jit
def probabilities(logits, row_max, row_log_sum, EXACT: tl.constexpr, TRANSPOSED: tl.constexpr):
    """exp(logits − logsumexp), of what `load_logsumexp` gave."""
    row_max = row_max[None, :] if TRANSPOSED else row_max[:, None]
    if EXACT:
        row_log_sum = row_log_sum[None, :] if TRANSPOSED else row_log_sum[:, None]
        return tl.exp2((logits - row_max) * LOG2_E - row_log_sum)
    return exp_difference(logits, row_max, False)


@triton.jit
def add_product(accumulator, a, b, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """accumulator + a·b. Matrix units add for nothing; on the FMA units of float32 the sum over all tiles would be
    one chain of roundings, so each tile's product is summed apart."""
    if EXACT:
        return accumulator + tl.dot(a, b, input_precision=PRECISION)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def summand(a, b, EXACT: tl.constexpr):
    """a·b, to be summed. Each of the lanes that share a sum may fuse its own product into it: those differ by a
    rounding. Of 16-bit tiles a lane adds up several products first, or exact ones."""
    return tl.fma(a, b, 0.0) if EXACT else a * b


@triton.jit
def gradients_of_scores(
    left, right, grad_left, grad_right, row_max, row_log_sum, row_delta, scale, bias, factor, pair_valid,
    MASKED: tl.constexpr, TRANSPOSED: tl.constexpr, WHOLE_ROWS: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """P, G, dS and delta of a tile, (queries, keys), from left = q, right = kᵀ, grad_left = dO, grad_right = vᵀ.
    WHOLE_ROWS: the tile has all keys of its rows, which are normalised again and make delta.
    TRANSPOSED: (keys, queries), from k, q, v, dO. (Multiplying by the transpose of a product gave wrong gradients
    on Hopper with Triton 3.4 to 3.7.0.) They are transposed where they are used: earlier, sm_100 spills."""
    products = tl.dot(left, tl.trans(right) if TRANSPOSED else right, input_precision=PRECISION)
    logits = masked_logits(products, scale, bias, pair_valid, MASKED)
    p = probabilities(logits, row_max, row_log_sum, EXACT, TRANSPOSED)
    grad_weights = tl.dot(grad_left, tl.trans(grad_right) if TRANSPOSED else grad_right, input_precision=PRECISION)
    grad_p = grad_weights if factor is None else grad_weights * factor
    if WHOLE_ROWS:
        KEYS: tl.constexpr = 0 if TRANSPOSED else 1
        if EXACT or not TRANSPOSED:  # where a sum over keys crosses warps, a second one is 30 % more instructions
            row_sum = tl.sum(p, axis=KEYS, keep_dims=True)
            p = p / tl.where(row_sum == 0.0, 1.0, row_sum)
        weighted = summand(p, grad_p, EXACT)
        row_delta = tl.sum(weighted, axis=KEYS)
        grad_logits = weighted - p * (row_delta[None, :] if TRANSPOSED else row_delta[:, None])
    else:
        grad_logits = p * (grad_p - (row_delta[None, :] if TRANSPOSED else row_delta[:, None]))
    return p, grad_weights, grad_logits, row_delta


@triton.jit
def finite_maximum(row_max):
    """A row may have no finite logit, as a table may hold −∞. Any finite maximum keeps its arithmetic finite."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def attend(
    logits, factor, v_tile, running_max, running_sum, accumulator, EXACT: tl.constexpr, PRECISION: tl.constexpr
):
    """One step of the online softmax: (BLOCK_M, BLOCK_N) logits join the running maximum, sum and accumulator."""
    new_max = tl.maximum(running_max, tl.max(logits, axis=1))
    safe_max = finite_maximum(new_max)
    p = exp_difference(logits, safe_max[:, None], EXACT)
    rescale = exp_difference(running_max, safe_max, EXACT)
    running_sum = running_sum * rescale + tl.sum(p, axis=1)
    if factor is not None:
        p *= factor
    accumulator = accumulator * rescale[:, None]
    accumulator = add_product(accumulator, p.to(v_tile.dtype), v_tile, EXACT, PRECISION)
    return new_max, running_sum, accumulator


@triton.jit
def store_output(
    out, logsumexp, offsets, first, i, N, valid, running_max, running_sum, accumulator,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """`out` of rows i, and what `load_logsumexp` loads again."""
    running_sum = tl.where(running_sum == 0.0, 1.0, running_sum)
    store_rows(out, offsets, valid, accumulator / running_sum[:, None], D, BLOCK_D)
    if EXACT:
        tl.store(logsumexp + 2 * first + i, running_max, mask=valid)
        tl.store(logsumexp + 2 * first + N + i, tl.log2(running_sum), mask=valid)
    else:
        tl.store(logsumexp + first + i, running_max + tl.log(running_sum), mask=valid)


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def forward(
    q, k, v, bias, modulation, out, logsumexp,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh,
    stride_bias, stride_modulation, N, heads, H, W, before, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SIDE: tl.constexpr, HAS_EXTRA: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out and logsumexp of BLOCK_M query rows."""
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    tile, head, batch = place_of_program(tl.cdiv(N, BLOCK_M), heads)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    place_i, on_grid_i = query_places(i, before, H, W, SIDE, False)
    q_offsets = row_offsets(batch, i, head, stride_qb, stride_qn, stride_qh, ALIGN)
    q_tile = load_rows(q, q_offsets, i < N, D, BLOCK_D, MASKED)  # (BLOCK_M, BLOCK_D)

    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    place_j, on_grid_j = key_places(tl.arange(0, BLOCK_N), before, H, W, SIDE, False)
    step = places_apart(W, SIDE, BLOCK_N)
    if BLOCK_M == 128:  # WGMMA's tiles; of smaller ones one spills with it on sm_120
        # Else ptxas finds accumulators set on the way past the loop, and serialises its WGMMA (its warning C7515).
        tl.assume(N > 0)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        if not EVEN:
            place_j, on_grid_j = key_places(j, before, H, W, SIDE, False)
        k_offsets = row_offsets(batch, j, head, stride_kb, stride_kn, stride_kh, ALIGN)
        v_offsets = row_offsets(batch, j, head, stride_vb, stride_vn, stride_vh, ALIGN)
        k_tile = load_rows(k, k_offsets, j < N, D, BLOCK_D, MASKED, 1)  # (BLOCK_D, BLOCK_N)
        v_tile = load_rows(v, v_offsets, j < N, D, BLOCK_D, MASKED)  # (BLOCK_N, BLOCK_D)
        first = place_of_equals(H, W, SIDE)
        if EVEN:
            first += start // BLOCK_N * (step if SIDE else -step)
        place, both_on_grid = place_i[:, None] + place_j[None, :], on_grid_i[:, None] & on_grid_j[None, :]
        logit, factor = None, None
        if bias is not None:
            logit = load_pairs(bias + head * stride_bias + first, place, both_on_grid, 0.0, HAS_EXTRA)
        if modulation is not None:
            factor = load_pairs(modulation + head * stride_modulation + first, place, both_on_grid, 1.0, HAS_EXTRA)
        products = tl.dot(q_tile, k_tile, input_precision=PRECISION)
        logits = masked_logits(products, scale, logit, (j < N)[None, :], MASKED)
        running_max, running_sum, accumulator = attend(
            logits, factor, v_tile, running_max, running_sum, accumulator, EXACT, PRECISION
        )

    out_offsets = row_offsets(batch, i, head, stride_ob, stride_on, stride_oh, ALIGN)
    first_row = (batch.to(tl.int64) * heads + head) * N
    store_output(
        out, logsumexp, out_offsets, first_row, i, N, i < N, running_max, running_sum, accumulator,
        D, BLOCK_D, EXACT,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def backward_q(
    q, k, v, bias, modulation, out, grad_out, logsumexp, delta, grad_q,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_gb, stride_gn, stride_gh,
    stride_bias, stride_modulation, N, heads, H, W, before, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SIDE: tl.constexpr, HAS_EXTRA: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, WHOLE_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M query rows, and delta, which is (B, heads, N). `out` and `grad_q` share their strides."""
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    tile, head, batch = place_of_program(tl.cdiv(N, BLOCK_M), heads)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    place_i, on_grid_i = query_places(i, before, H, W, SIDE, False)
    q_offsets = row_offsets(batch, i, head, stride_qb, stride_qn, stride_qh, ALIGN)
    out_offsets = row_offsets(batch, i, head, stride_ob, stride_on, stride_oh, ALIGN)
    grad_offsets = row_offsets(batch, i, head, stride_gb, stride_gn, stride_gh, ALIGN)
    first_row = (batch.to(tl.int64) * heads + head) * N

    grad_tile = load_rows(grad_out, grad_offsets, i < N, D, BLOCK_D, MASKED)  # (BLOCK_M, BLOCK_D)
    row_delta = tl.zeros((BLOCK_M,), tl.float32)
    if not WHOLE_ROWS:
        out_tile = load_rows(out, out_offsets, i < N, D, BLOCK_D, MASKED)
        row_delta = tl.sum(summand(grad_tile.to(tl.float32), out_tile.to(tl.float32), EXACT), axis=1)
        tl.store(delta + first_row + i, row_delta, mask=i < N)

    q_tile = load_rows(q, q_offsets, i < N, D, BLOCK_D, MASKED)  # (BLOCK_M, BLOCK_D)
    row_max, row_log_sum = load_logsumexp(logsumexp, first_row, i, N, i < N, EXACT, MASKED)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    place_j, on_grid_j = key_places(tl.arange(0, BLOCK_N), before, H, W, SIDE, False)
    step = places_apart(W, SIDE, BLOCK_N)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        if not EVEN:
            place_j, on_grid_j = key_places(j, before, H, W, SIDE, False)
        k_offsets = row_offsets(batch, j, head, stride_kb, stride_kn, stride_kh, ALIGN)
        v_offsets = row_offsets(batch, j, head, stride_vb, stride_vn, stride_vh, ALIGN)
        k_tile = load_rows(k, k_offsets, j < N, D, BLOCK_D, MASKED)  # (BLOCK_N, BLOCK_D)
        v_tile = load_rows(v, v_offsets, j < N, D, BLOCK_D, MASKED, 1)  # (BLOCK_D, BLOCK_N)
        first = place_of_equals(H, W, SIDE)
        if EVEN:
            first += start // BLOCK_N * (step if SIDE else -step)
        place, both_on_grid = place_i[:, None] + place_j[None, :], on_grid_i[:, None] & on_grid_j[None, :]
        logit, factor = None, None
        if bias is not None:
            logit = load_pairs(bias + head * stride_bias + first, place, both_on_grid, 0.0, HAS_EXTRA)
        if modulation is not None:
            factor = load_pairs(modulation + head * stride_modulation + first, place, both_on_grid, 1.0, HAS_EXTRA)
        _, _, grad_logits, row_delta = gradients_of_scores(
            q_tile, tl.trans(k_tile), grad_tile, v_tile, row_max, row_log_sum, row_delta, scale, logit, factor,
            (j < N)[None, :], MASKED, False, WHOLE_ROWS, EXACT, PRECISION,
        )  # fmt: skip
        accumulator = add_product(accumulator, grad_logits.to(k_tile.dtype), k_tile, EXACT, PRECISION)
    store_rows(grad_q, out_offsets, i < N, accumulator * scale, D, BLOCK_D)
    if WHOLE_ROWS:
        tl.store(delta + first_row + i, row_delta, mask=i < N)


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def backward_kv(
    q, k, v, bias, modulation, grad_out, logsumexp, delta, grad_k, grad_v,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, stride_ob, stride_on, stride_oh,
    stride_bias, stride_modulation, N, heads, H, W, before, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SIDE: tl.constexpr, HAS_EXTRA: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, WHOLE_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N key rows. Matrices of the tables have keys first."""
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    tile, head, batch = place_of_program(tl.cdiv(N, BLOCK_N), heads)
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    place_j, on_grid_j = key_places(j, before, H, W, SIDE, True)
    k_offsets = row_offsets(batch, j, head, stride_kb, stride_kn, stride_kh, ALIGN)
    v_offsets = row_offsets(batch, j, head, stride_vb, stride_vn, stride_vh, ALIGN)
    k_tile = load_rows(k, k_offsets, j < N, D, BLOCK_D, MASKED)  # (BLOCK_N, BLOCK_D)
    v_tile = load_rows(v, v_offsets, j < N, D, BLOCK_D, MASKED)  # (BLOCK_N, BLOCK_D)

    k_accumulator = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    v_accumulator = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    place_i, on_grid_i = query_places(tl.arange(0, BLOCK_M), before, H, W, SIDE, True)
    step = places_apart(W, SIDE, BLOCK_M)
    tl.assume(N > 0)  # see `forward`
    for start in range(0, N, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        if not EVEN:
            place_i, on_grid_i = query_places(i, before, H, W, SIDE, True)
        q_offsets = row_offsets(batch, i, head, stride_qb, stride_qn, stride_qh, ALIGN)
        grad_offsets = row_offsets(batch, i, head, stride_gb, stride_gn, stride_gh, ALIGN)
        first_row = (batch.to(tl.int64) * heads + head) * N
        row_max, row_log_sum = load_logsumexp(logsumexp, first_row, i, N, i < N, EXACT, MASKED)
        row_delta = load_statistic(delta + first_row, i, i < N, 0.0, MASKED)
        q_tile = load_rows(q, q_offsets, i < N, D, BLOCK_D, MASKED)  # (BLOCK_M, BLOCK_D)
        grad_tile = load_rows(grad_out, grad_offsets, i < N, D, BLOCK_D, MASKED)  # (BLOCK_M, BLOCK_D)
        first = place_of_equals(H, W, SIDE)
        if EVEN:
            first += start // BLOCK_M * step
        place, both_on_grid = place_j[:, None] + place_i[None, :], on_grid_j[:, None] & on_grid_i[None, :]
        logit, factor = None, None
        if bias is not None:
            logit = load_pairs(bias + head * stride_bias + first, place, both_on_grid, 0.0, HAS_EXTRA)
        if modulation is not None:
            factor = load_pairs(modulation + head * stride_modulation + first, place, both_on_grid, 1.0, HAS_EXTRA)
        p, _, grad_logits, _ = gradients_of_scores(
            k_tile, q_tile, v_tile, grad_tile, row_max, row_log_sum, row_delta, scale, logit, factor,
            (j < N)[:, None], MASKED, True, WHOLE_ROWS and EXACT, EXACT, PRECISION,
        )  # fmt: skip
        weights = p if factor is None else p * factor
        v_accumulator = add_product(v_accumulator, weights.to(grad_tile.dtype), grad_tile, EXACT, PRECISION)
        k_accumulator = add_product(k_accumulator, grad_logits.to(q_tile.dtype), q_tile, EXACT, PRECISION)
    out_offsets = row_offsets(batch, j, head, stride_ob, stride_on, stride_oh, ALIGN)
    store_rows(grad_k, out_offsets, j < N, k_accumulator * scale, D, BLOCK_D)
    store_rows(grad_v, out_offsets, j < N, v_accumulator, D, BLOCK_D)
