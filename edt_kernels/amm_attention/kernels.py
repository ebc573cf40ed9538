"""softmax(q·kᵀ·scale + bias[Δ]) ⊙ m[Δ] · v and its gradients.

Forward: one program owns BLOCK_M query rows of one head and walks over the keys in tiles of BLOCK_N, with the
online softmax of FlashAttention-2. The factor m acts on the numerator only: with p = exp(logit − running_max)

    running_sum += Σ p          accumulator += (p ⊙ m)·v          out = accumulator / running_sum

Backward, with P the softmax recomputed from the saved logsumexp and G = dO·vᵀ:

    dS = P ⊙ (G ⊙ m − delta),   delta = rowsum(P ⊙ G ⊙ m) = rowsum(dO ⊙ O)
    dq = scale·dS·k    dk = scale·dSᵀ·q    dv = (P ⊙ m)ᵀ·dO    dbias[Δ] = Σ dS    dm[Δ] = Σ P ⊙ G

in three kernels, each of which owns what it writes, so that no sum depends on the order of programs:
`backward_q` (also writes delta), `backward_kv`, and `backward_tables`, whose partial sums
`reduce_table_partials` adds up.

Both tables are indexed by the offset Δ of two tokens of an H×W grid, and the index separates into a share of the
query and a share of the key, position(i) − position(j). Tokens before or after the grid have no offset.

Sequences shorter than a tile are packed: a tile of BLOCK rows holds BLOCK // SEQ sequences of one head, each
padded to SEQ rows, and pairs of different sequences are masked. Otherwise SEQ is BLOCK, and a tile is a piece
of one sequence.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def rows_of_tile(group, tile, B, N, BLOCK: tl.constexpr, SEQ: tl.constexpr):
    """Batch item, token and validity of each row of a tile of the packed sequences. All (BLOCK,)."""
    row = tl.arange(0, BLOCK)
    batch = group * (BLOCK // SEQ) + row // SEQ
    token = tile * SEQ + row % SEQ
    return batch, token, (token < N) & (batch < B)


@triton.jit
def row_offsets(batch, token, head, stride_b, stride_n, stride_h, ALIGN: tl.constexpr):
    """Element offset of each row, 64 bits wide. Every stride is a multiple of ALIGN: that decides how wide the
    loads are, and the compiler cannot see it for a stride such as a head of 52."""
    offsets = batch.to(tl.int64) * stride_b + token.to(tl.int64) * stride_n + head.to(tl.int64) * stride_h
    return tl.multiple_of(offsets, ALIGN)


@triton.jit
def load_rows(pointer, offsets, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D), zero outside."""
    d = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (d < D)[None, :]
    return tl.load(pointer + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def load_rows_transposed(pointer, offsets, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_D, BLOCK), zero outside."""
    d = tl.arange(0, BLOCK_D)
    mask = (d < D)[:, None] & valid[None, :]
    return tl.load(pointer + offsets[None, :] + d[:, None], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, offsets, valid, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (d < D)[None, :]
    tl.store(pointer + offsets[:, None] + d[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def grid_positions(token, before, H, W):
    """Each token's share of the table index, and which tokens are on the grid. Both (BLOCK,).

    position(i) − position(j) = (y_i − y_j)·(2W−1) + x_i − x_j, counted from the middle of the table. Tokens off
    the grid are clamped onto it, so that the index stays inside the table; their pairs are masked.
    """
    cell = token - before
    on_grid = (cell >= 0) & (cell < H * W)
    cell = tl.minimum(tl.maximum(cell, 0), H * W - 1)
    return (cell // W) * (2 * W - 1) + cell % W, on_grid


@triton.jit
def middle_of_table(H, W):
    """The index of the offset (0, 0)."""
    return (H - 1) * (2 * W - 1) + W - 1


@triton.jit
def load_table(table, index, both_on_grid, OTHER: tl.constexpr, HAS_EXTRA: tl.constexpr):
    """table[index] in float32; OTHER for pairs with a token outside the grid."""
    if HAS_EXTRA:
        return tl.load(table + index, mask=both_on_grid, other=OTHER).to(tl.float32)
    return tl.load(table + index).to(tl.float32)


@triton.jit
def masked_logits(
    products, scale, bias, index, both_on_grid, pair_valid,
    HAS_BIAS: tl.constexpr, HAS_EXTRA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """products·scale + bias[Δ], −∞ for pairs that do not exist."""
    logits = products * scale
    if HAS_BIAS:
        logits += load_table(bias, index, both_on_grid, 0.0, HAS_EXTRA)
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
def add_product(accumulator, a, b, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """accumulator + a·b. Matrix units add for nothing; on the FMA units of float32 the sum over all tiles would be
    one chain of roundings, so each tile's product is summed apart."""
    if EXACT:
        return accumulator + tl.dot(a, b, input_precision=PRECISION)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def forward(
    q, k, v, bias, modulation, out, logsumexp,
    stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh,
    stride_bias_h, stride_modulation_h,
    B, N, heads, H, W, before, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MODULATION: tl.constexpr, HAS_EXTRA: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, SEQ_M: tl.constexpr, SEQ_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    tiles = tl.cdiv(N, SEQ_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % heads
    group = tl.program_id(0) // (tiles * heads)
    bias += head * stride_bias_h + middle_of_table(H, W)
    modulation += head * stride_modulation_h + middle_of_table(H, W)

    batch_i, i, valid_i = rows_of_tile(group, tile, B, N, BLOCK_M, SEQ_M)
    position_i, on_grid_i = grid_positions(i, before, H, W)
    q_offsets = row_offsets(batch_i, i, head, stride_qb, stride_qn, stride_qh, ALIGN)
    q_tile = load_rows(q, q_offsets, valid_i, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)

    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for key_tile in range(0, tl.cdiv(N, SEQ_N)):
        batch_j, j, valid_j = rows_of_tile(group, key_tile, B, N, BLOCK_N, SEQ_N)
        position_j, on_grid_j = grid_positions(j, before, H, W)
        k_offsets = row_offsets(batch_j, j, head, stride_kb, stride_kn, stride_kh, ALIGN)
        v_offsets = row_offsets(batch_j, j, head, stride_vb, stride_vn, stride_vh, ALIGN)
        k_tile = load_rows_transposed(k, k_offsets, valid_j, D, BLOCK_D)  # (BLOCK_D, BLOCK_N)
        v_tile = load_rows(v, v_offsets, valid_j, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        index = position_i[:, None] - position_j[None, :]
        both_on_grid = on_grid_i[:, None] & on_grid_j[None, :]
        pair_valid = valid_j[None, :] & (batch_i[:, None] == batch_j[None, :])

        products = tl.dot(q_tile, k_tile, input_precision=PRECISION)
        logits = masked_logits(
            products, scale, bias, index, both_on_grid, pair_valid, HAS_BIAS, HAS_EXTRA, MASKED
        )  # (BLOCK_M, BLOCK_N)
        new_max = tl.maximum(running_max, tl.max(logits, axis=1))
        # A row may have no finite logit yet: a table may hold −∞, and a packed row beyond the batch has no pair.
        # Any finite maximum keeps its arithmetic finite.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = exp_difference(logits, safe_max[:, None], EXACT)
        rescale = exp_difference(running_max, safe_max, EXACT)
        running_sum = running_sum * rescale + tl.sum(p, axis=1)
        if HAS_MODULATION:
            p *= load_table(modulation, index, both_on_grid, 1.0, HAS_EXTRA)
        accumulator = accumulator * rescale[:, None]
        accumulator = add_product(accumulator, p.to(v_tile.dtype), v_tile, EXACT, PRECISION)
        running_max = new_max

    running_sum = tl.where(running_sum == 0.0, 1.0, running_sum)
    out_offsets = row_offsets(batch_i, i, head, stride_ob, stride_on, stride_oh, ALIGN)
    store_rows(out, out_offsets, valid_i, accumulator / running_sum[:, None], D, BLOCK_D)
    statistics = (batch_i.to(tl.int64) * heads + head) * N + i  # (B, heads, N)
    tl.store(logsumexp + statistics, running_max + tl.log(running_sum), mask=valid_i)


@triton.jit
def backward_q(
    q, k, v, bias, modulation, out, grad_out, logsumexp, delta, grad_q,
    stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh,
    stride_gb, stride_gn, stride_gh,
    stride_bias_h, stride_modulation_h,
    B, N, heads, H, W, before, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MODULATION: tl.constexpr, HAS_EXTRA: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, SEQ_M: tl.constexpr, SEQ_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M query rows, and delta. `out` and `grad_q` share their strides."""
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    tiles = tl.cdiv(N, SEQ_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % heads
    group = tl.program_id(0) // (tiles * heads)
    bias += head * stride_bias_h + middle_of_table(H, W)
    modulation += head * stride_modulation_h + middle_of_table(H, W)

    batch_i, i, valid_i = rows_of_tile(group, tile, B, N, BLOCK_M, SEQ_M)
    position_i, on_grid_i = grid_positions(i, before, H, W)
    q_offsets = row_offsets(batch_i, i, head, stride_qb, stride_qn, stride_qh, ALIGN)
    out_offsets = row_offsets(batch_i, i, head, stride_ob, stride_on, stride_oh, ALIGN)
    grad_offsets = row_offsets(batch_i, i, head, stride_gb, stride_gn, stride_gh, ALIGN)
    statistics = (batch_i.to(tl.int64) * heads + head) * N + i

    grad_tile = load_rows(grad_out, grad_offsets, valid_i, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    out_tile = load_rows(out, out_offsets, valid_i, D, BLOCK_D)
    row_delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
    tl.store(delta + statistics, row_delta, mask=valid_i)

    q_tile = load_rows(q, q_offsets, valid_i, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    # +∞ makes the probabilities of rows that do not exist zero.
    row_logsumexp = tl.load(logsumexp + statistics, mask=valid_i, other=float("inf"))
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for key_tile in range(0, tl.cdiv(N, SEQ_N)):
        batch_j, j, valid_j = rows_of_tile(group, key_tile, B, N, BLOCK_N, SEQ_N)
        position_j, on_grid_j = grid_positions(j, before, H, W)
        k_offsets = row_offsets(batch_j, j, head, stride_kb, stride_kn, stride_kh, ALIGN)
        v_offsets = row_offsets(batch_j, j, head, stride_vb, stride_vn, stride_vh, ALIGN)
        k_tile = load_rows(k, k_offsets, valid_j, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        v_tile = load_rows_transposed(v, v_offsets, valid_j, D, BLOCK_D)  # (BLOCK_D, BLOCK_N)
        index = position_i[:, None] - position_j[None, :]
        both_on_grid = on_grid_i[:, None] & on_grid_j[None, :]
        pair_valid = valid_j[None, :] & (batch_i[:, None] == batch_j[None, :])

        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        logits = masked_logits(products, scale, bias, index, both_on_grid, pair_valid, HAS_BIAS, HAS_EXTRA, MASKED)
        p = exp_difference(logits, row_logsumexp[:, None], EXACT)
        grad_p = tl.dot(grad_tile, v_tile, input_precision=PRECISION)
        if HAS_MODULATION:
            grad_p *= load_table(modulation, index, both_on_grid, 1.0, HAS_EXTRA)
        grad_logits = p * (grad_p - row_delta[:, None])
        accumulator = add_product(accumulator, grad_logits.to(k_tile.dtype), k_tile, EXACT, PRECISION)
    store_rows(grad_q, out_offsets, valid_i, accumulator * scale, D, BLOCK_D)


@triton.jit
def backward_kv(
    q, k, v, bias, modulation, grad_out, logsumexp, delta, grad_k, grad_v,
    stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    stride_ob, stride_on, stride_oh,
    stride_bias_h, stride_modulation_h,
    B, N, heads, H, W, before, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MODULATION: tl.constexpr, HAS_EXTRA: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, SEQ_M: tl.constexpr, SEQ_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N key rows. Scores are computed transposed, (keys, queries): multiplying by the
    transpose of a product gave wrong gradients on Hopper with Triton 3.4 to 3.7.0."""
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    tiles = tl.cdiv(N, SEQ_N)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % heads
    group = tl.program_id(0) // (tiles * heads)
    bias += head * stride_bias_h + middle_of_table(H, W)
    modulation += head * stride_modulation_h + middle_of_table(H, W)

    batch_j, j, valid_j = rows_of_tile(group, tile, B, N, BLOCK_N, SEQ_N)
    position_j, on_grid_j = grid_positions(j, before, H, W)
    k_offsets = row_offsets(batch_j, j, head, stride_kb, stride_kn, stride_kh, ALIGN)
    v_offsets = row_offsets(batch_j, j, head, stride_vb, stride_vn, stride_vh, ALIGN)
    k_tile = load_rows(k, k_offsets, valid_j, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    v_tile = load_rows(v, v_offsets, valid_j, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)

    k_accumulator = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    v_accumulator = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for query_tile in range(0, tl.cdiv(N, SEQ_M)):
        batch_i, i, valid_i = rows_of_tile(group, query_tile, B, N, BLOCK_M, SEQ_M)
        position_i, on_grid_i = grid_positions(i, before, H, W)
        q_offsets = row_offsets(batch_i, i, head, stride_qb, stride_qn, stride_qh, ALIGN)
        grad_offsets = row_offsets(batch_i, i, head, stride_gb, stride_gn, stride_gh, ALIGN)
        statistics = (batch_i.to(tl.int64) * heads + head) * N + i
        row_logsumexp = tl.load(logsumexp + statistics, mask=valid_i, other=float("inf"))
        row_delta = tl.load(delta + statistics, mask=valid_i, other=0.0)
        q_tile = load_rows(q, q_offsets, valid_i, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
        grad_tile = load_rows(grad_out, grad_offsets, valid_i, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
        index = position_i[None, :] - position_j[:, None]
        both_on_grid = on_grid_i[None, :] & on_grid_j[:, None]
        pair_valid = valid_j[:, None] & (batch_i[None, :] == batch_j[:, None])

        products = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        logits = masked_logits(
            products, scale, bias, index, both_on_grid, pair_valid, HAS_BIAS, HAS_EXTRA, MASKED
        )  # (BLOCK_N, BLOCK_M)
        p = exp_difference(logits, row_logsumexp[None, :], EXACT)
        grad_p = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
        if HAS_MODULATION:
            factor = load_table(modulation, index, both_on_grid, 1.0, HAS_EXTRA)
            grad_p *= factor
            weights = p * factor
        else:
            weights = p
        v_accumulator = add_product(v_accumulator, weights.to(grad_tile.dtype), grad_tile, EXACT, PRECISION)
        grad_logits = p * (grad_p - row_delta[None, :])
        k_accumulator = add_product(k_accumulator, grad_logits.to(q_tile.dtype), q_tile, EXACT, PRECISION)
    out_offsets = row_offsets(batch_j, j, head, stride_ob, stride_on, stride_oh, ALIGN)
    store_rows(grad_k, out_offsets, valid_j, k_accumulator * scale, D, BLOCK_D)
    store_rows(grad_v, out_offsets, valid_j, v_accumulator, D, BLOCK_D)


@triton.jit
def cells_of_tile(
    group, tile_y, tile_x, B, H, W, before,
    ITEMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Batch item, token and validity of each of the ITEMS·ROWS·COLUMNS cells of a tile of the grid."""
    local = tl.arange(0, ITEMS * ROWS * COLUMNS)
    batch = group * ITEMS + local // (ROWS * COLUMNS)
    y = tile_y * ROWS + local // COLUMNS % ROWS
    x = tile_x * COLUMNS + local % COLUMNS
    return batch, before + y * W + x, (batch < B) & (y < H) & (x < W)


@triton.jit
def backward_tables(
    q, k, v, bias, modulation, grad_out, logsumexp, delta, bias_partials, modulation_partials,
    stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    stride_bias_h, stride_modulation_h,
    B, N, heads, H, W, before, scale, groups_per_split,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MODULATION: tl.constexpr,
    GRAD_BIAS: tl.constexpr, GRAD_MODULATION: tl.constexpr, PRECISION: tl.constexpr,
    ITEMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Σ dS and Σ P ⊙ G over the batch and over all pairs of grid tiles that are equally far apart.

    Tiles are ROWS×COLUMNS cells of the grid (of ITEMS batch items where the grid is smaller than a tile), so the
    offset of two cells depends only on their places in their tiles and on how far apart the tiles are. A program
    takes one such distance, one head and one share of the batch, and its sums stay (BLOCK, BLOCK) however many
    tokens there are. Partials: (splits, heads, distances, BLOCK, BLOCK).
    """
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    BLOCK: tl.constexpr = ITEMS * ROWS * COLUMNS
    tiles_y, tiles_x = tl.cdiv(H, ROWS), tl.cdiv(W, COLUMNS)
    distances = (2 * tiles_y - 1) * (2 * tiles_x - 1)
    distance = tl.program_id(0) % distances
    head = (tl.program_id(0) // distances) % heads
    split = tl.program_id(0) // (distances * heads)
    # Query tile minus key tile, and the first query tile that has a key tile this far away.
    apart_y, apart_x = distance // (2 * tiles_x - 1) - tiles_y + 1, distance % (2 * tiles_x - 1) - tiles_x + 1
    first_y, first_x = tl.maximum(apart_y, 0), tl.maximum(apart_x, 0)
    count_y, count_x = tiles_y - tl.abs(apart_y), tiles_x - tl.abs(apart_x)
    first_group = split * groups_per_split
    group_count = tl.minimum(groups_per_split, tl.cdiv(B, ITEMS) - first_group)

    local = tl.arange(0, BLOCK)
    y, x = local // COLUMNS % ROWS, local % COLUMNS
    offset_y = y[:, None] - y[None, :] + apart_y * ROWS  # (BLOCK, BLOCK), the same for every pair of tiles
    offset_x = x[:, None] - x[None, :] + apart_x * COLUMNS
    inside = (tl.abs(offset_y) < H) & (tl.abs(offset_x) < W)
    index = (offset_y + H - 1) * (2 * W - 1) + offset_x + W - 1
    if HAS_BIAS:
        bias_tile = tl.load(bias + head * stride_bias_h + index, mask=inside, other=0.0).to(tl.float32)
    if HAS_MODULATION:
        factor = tl.load(modulation + head * stride_modulation_h + index, mask=inside, other=1.0).to(tl.float32)

    if GRAD_BIAS:
        bias_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
    if GRAD_MODULATION:
        modulation_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(0, count_y * count_x * group_count):
        group = first_group + step % group_count
        pair = step // group_count
        tile_y, tile_x = first_y + pair // count_x, first_x + pair % count_x
        batch_i, i, valid_i = cells_of_tile(group, tile_y, tile_x, B, H, W, before, ITEMS, ROWS, COLUMNS)
        batch_j, j, valid_j = cells_of_tile(
            group, tile_y - apart_y, tile_x - apart_x, B, H, W, before, ITEMS, ROWS, COLUMNS
        )
        q_offsets = row_offsets(batch_i, i, head, stride_qb, stride_qn, stride_qh, ALIGN)
        grad_offsets = row_offsets(batch_i, i, head, stride_gb, stride_gn, stride_gh, ALIGN)
        k_offsets = row_offsets(batch_j, j, head, stride_kb, stride_kn, stride_kh, ALIGN)
        v_offsets = row_offsets(batch_j, j, head, stride_vb, stride_vn, stride_vh, ALIGN)
        statistics = (batch_i.to(tl.int64) * heads + head) * N + i
        row_logsumexp = tl.load(logsumexp + statistics, mask=valid_i, other=float("inf"))
        q_tile = load_rows(q, q_offsets, valid_i, D, BLOCK_D)  # (BLOCK, BLOCK_D)
        k_tile = load_rows_transposed(k, k_offsets, valid_j, D, BLOCK_D)  # (BLOCK_D, BLOCK)
        grad_tile = load_rows(grad_out, grad_offsets, valid_i, D, BLOCK_D)  # (BLOCK, BLOCK_D)
        v_tile = load_rows_transposed(v, v_offsets, valid_j, D, BLOCK_D)  # (BLOCK_D, BLOCK)

        logits = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale
        if HAS_BIAS:
            logits += bias_tile
        pair_valid = valid_j[None, :] & (batch_i[:, None] == batch_j[None, :])
        logits = tl.where(pair_valid, logits, float("-inf"))
        p = exp_difference(logits, row_logsumexp[:, None], EXACT)
        grad_p = tl.dot(grad_tile, v_tile, input_precision=PRECISION)
        if GRAD_MODULATION:
            modulation_sum += p * grad_p
        if GRAD_BIAS:
            row_delta = tl.load(delta + statistics, mask=valid_i, other=0.0)
            if HAS_MODULATION:
                grad_p *= factor
            bias_sum += p * (grad_p - row_delta[:, None])

    partials = tl.program_id(0).to(tl.int64) * BLOCK * BLOCK + local[:, None] * BLOCK + local[None, :]
    if GRAD_BIAS:
        tl.store(bias_partials + partials, bias_sum)
    if GRAD_MODULATION:
        tl.store(modulation_partials + partials, modulation_sum)


@triton.jit
def reduce_table_partials(
    partials, grad_table, splits, heads, H, W,
    ITEMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_OFFSETS: tl.constexpr,
):  # fmt: skip
    """dtable[head, Δ] = Σ of the partials at Δ. For a cell of the query tile, Δ leaves one distance between
    the tiles and one cell of the key tile, so every partial is read once."""
    BLOCK: tl.constexpr = ITEMS * ROWS * COLUMNS
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
    exists &= (offset < (2 * H - 1) * (2 * W - 1))[:, None]
    place = (distance_y * (2 * tiles_x - 1) + distance_x).to(tl.int64)
    place = (head * distances + place) * BLOCK * BLOCK + local[None, :] * BLOCK + key

    total = tl.zeros((BLOCK_OFFSETS, BLOCK), tl.float32)
    for _ in range(0, splits):
        total += tl.load(partials + place, mask=exists, other=0.0)
        partials += heads * distances * BLOCK * BLOCK
    offsets = (2 * H - 1) * (2 * W - 1)
    tl.store(grad_table + head * offsets + offset, tl.sum(total, axis=1), mask=offset < offsets)
