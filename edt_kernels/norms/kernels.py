"""All norm-type ops: x' = x + gate·y, LN(x')·(1+scale)+shift, either of them or both, and their gradients.

One kernel a pass, of which an op leaves out what it has not: without a gate x' is x, without a scale there is no
norm. Absent tensors and their strides are None, which the compiler sees. All is computed in float32.

Forward, with x' rounded to its dtype first, so that backward, which reads it back, normalises the same numbers:

    x̂ = (x' − mean)·rstd    rstd = 1/√(variance + eps)    out = x̂·(1+scale) + shift

Backward, with h = dout·(1+scale) and dx', what arrives at x' and what the norm adds to it:

    dx' = dx_out + rstd·(h − mean(h) − x̂·mean(h·x̂))    dx = dx'    dy = gate·dx'
    dgate = Σ dx'·y    dshift = Σ dout    dscale = Σ dout·x̂

The sums go over the rows of a sample: a program adds up its share in registers and writes one partial sum of each,
which the launcher adds up. No two programs write the same place.

A row has SLICES·C channels, all of them read and written where they are; nothing is shuffled in memory:

    1  a token.
    4  the merge: slice s of merged token (y, x) is token (2y + s % 2, 2x + s // 2) of a grid of width W, so slices
       run (0,0), (1,0), (0,1), (1,1) by (row, column) offset; `keep` (bytes) zeroes those of dropped tokens.
    2  the split: slice 0 of fine token (y, x) is run 2·(y % 2) + x % 2 of C channels of x's token (y // 2, x // 2)
       on a coarse grid of width W; slice 1 is the fine token of y, the skip connection.

A tile is (PARTS, ROWS, LANES, VEC): ROWS rows of one sample, shared out among LANES threads, of which each takes
VEC channels at a time: 16 bytes of the residual stream, so that what the threads of a warp load at once is one run
of memory. What belongs to rows is (1, ROWS, 1, 1), to places in a row (PARTS, 1, LANES, VEC).
"""

import triton
import triton.language as tl


@triton.jit
def rows_of_program(N, rows_per_program):
    """This program's sample, 64 bits wide as then are all offsets made of it, and its rows, from first to last."""
    programs = tl.cdiv(N, rows_per_program)
    first = tl.program_id(0) % programs * rows_per_program
    return (tl.program_id(0) // programs).to(tl.int64), first, tl.minimum(first + rows_per_program, N)


@triton.jit
def channels_of_row(stream, C: tl.constexpr, SLICES: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr):
    """Places in a row, their channels in the slice, their runs' slices, and which exist."""
    VEC: tl.constexpr = min(128 // stream.dtype.element_ty.primitive_bitwidth, BLOCK_C)
    ROW_RUNS: tl.constexpr = SLICES * BLOCK_C // VEC  # runs of VEC channels
    RUNS: tl.constexpr = BLOCK_C // VEC
    WIDTH: tl.constexpr = min(LANES, ROW_RUNS)
    part, lane = tl.arange(0, ROW_RUNS // WIDTH)[:, None, None, None], tl.arange(0, WIDTH)[None, None, :, None]
    slices, first = (part * WIDTH + lane) // RUNS, (part * WIDTH + lane) % RUNS * VEC
    c = first + tl.arange(0, VEC)[None, None, None, :]
    # Where runs end with the row, one comparison for a whole run.
    exists = first < C if C % VEC == 0 else c < C
    return slices * C + c, c, slices, exists


@triton.jit
def load(pointer, offsets, exists):
    """In float32, zero where nothing exists."""
    offsets, exists = tl.broadcast(offsets, exists)
    return tl.load(pointer + offsets, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def load_row(pointer, sample, stride_sample, place, exists, ROWS: tl.constexpr):
    """`load` of the sample's row of the modulation, once for each row of a tile: loaded as one row, it would be
    exchanged between all threads."""
    place = tl.broadcast_to(place, (place.shape[0], ROWS, place.shape[2], place.shape[3]))
    return load(pointer, sample * stride_sample + place, exists)


@triton.jit
def load_rows(pointer, sample, row, stride_sample, stride_row, channel, exists, ALIGN: tl.constexpr):
    """`load` of channels of rows of a sample. The strides are multiples of ALIGN: that decides how wide the loads
    are, and the compiler cannot see it for one such as 52. It is told of the strides because the same hint on the
    offsets of a single row, which it turns into a scalar, fails to compile."""
    stride_sample = tl.multiple_of(tl.cast(stride_sample, tl.int64), ALIGN)
    stride_row = tl.multiple_of(tl.cast(stride_row, tl.int64), ALIGN)
    return load(pointer + (sample * stride_sample + row * stride_row), channel, exists)


@triton.jit
def store(pointer, offsets, values, exists):
    offsets, exists = tl.broadcast(offsets, exists)
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def tokens_of_slices(row, slices, W, C: tl.constexpr, SLICES: tl.constexpr):
    """The token of x that each slice of a row is of, and where in it the slice starts."""
    if SLICES == 4:
        y, x = row // (W // 2), row % (W // 2)
        return (2 * y + slices % 2) * W + 2 * x + slices // 2, 0
    elif SLICES == 2:
        y, x = row // (2 * W), row % (2 * W)
        return y // 2 * W + x // 2, (2 * (y % 2) + x % 2) * C
    else:
        return row, 0


@triton.jit
def sum_of_parts(values):
    """(PARTS, ROWS, LANES, VEC) → (ROWS, LANES·VEC), within each thread."""
    values = tl.sum(values, axis=0)
    return tl.reshape(values, (values.shape[0], values.shape[1] * values.shape[2]))


@triton.jit
def mean_of_rows(values, WIDTH: tl.constexpr):
    return (tl.sum(sum_of_parts(values), axis=1) / WIDTH)[None, :, None, None]


@triton.jit
def means_of_rows(a, b, WIDTH: tl.constexpr):
    """Both in one exchange between warps."""
    a, b = tl.split(tl.sum(tl.join(sum_of_parts(a), sum_of_parts(b)), axis=1) / WIDTH)
    return a[None, :, None, None], b[None, :, None, None]


@triton.jit
def sum_of_rows(values):
    """Over the rows of a tile, which lie in different warps; of half of each run at a time, down to one channel.
    Lanes are then ROWS values apart in the shared memory that warps exchange, not VEC·ROWS, which was 16 conflicts
    of banks with each access."""
    PARTS: tl.constexpr = values.shape[0]
    ROWS: tl.constexpr = values.shape[1]
    LANES: tl.constexpr = values.shape[2]
    VEC: tl.constexpr = values.shape[3]
    if ROWS == 1 or VEC == 1:
        return tl.sum(values, axis=1, keep_dims=True)
    else:
        even, odd = tl.split(tl.reshape(values, (PARTS, ROWS, LANES, VEC // 2, 2)))
        return tl.reshape(tl.join(sum_of_rows(even), sum_of_rows(odd)), (PARTS, 1, LANES, VEC))


@triton.jit
def store_sum(partials, quantity: tl.constexpr, values, place, exists, WIDTH: tl.constexpr):
    """Writes this program's row of a quantity of `partials` (quantities, programs, WIDTH)."""
    row = tl.num_programs(0).to(tl.int64) * quantity + tl.program_id(0)
    store(partials, row * WIDTH + place, sum_of_rows(values), exists)


@triton.jit
def forward(
    x, y, gate, shift, scale, keep, x_out, out, statistics,
    stride_xb, stride_xn, stride_yb, stride_yn, stride_gate, stride_shift, stride_scale, stride_keep, N, W, eps,
    C: tl.constexpr, SLICES: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """x' into x_out (with a gate); out, and mean and rstd of each row (with a scale). N rows a sample."""
    sample, first, last = rows_of_program(N, ROWS)
    place, c, slices, exists = channels_of_row(y if SLICES == 2 else x, C, SLICES, BLOCK_C, LANES)
    row = first + tl.arange(0, ROWS)[None, :, None, None]
    number, row_exists, mask = sample * N + row, row < last, (row < last) & exists
    token, start = tokens_of_slices(row, slices, W, C, SLICES)
    of_x = mask & (slices == 0) if SLICES == 2 else mask
    tile = load_rows(x, sample, token, stride_xb, stride_xn, start + c, of_x, ALIGN)
    if SLICES == 2:
        tile += load_rows(y, sample, row, stride_yb, stride_yn, c, mask & (slices == 1), ALIGN)
    if gate is not None:
        y_tile = load_rows(y, sample, row, stride_yb, stride_yn, place, mask, ALIGN)
        gate_row = load_row(gate, sample, stride_gate, place, exists, ROWS)
        x_new = (tile + gate_row * y_tile).to(x_out.dtype.element_ty)
        store(x_out + number * C, place, x_new, mask)
        tile = x_new.to(tl.float32)
    if scale is not None:
        mean = mean_of_rows(tile, SLICES * C)
        centered = tl.where(exists, tile - mean, 0.0)
        rstd = tl.rsqrt(mean_of_rows(centered * centered, SLICES * C) + eps)
        store(statistics, 2 * number, mean, row_exists)
        store(statistics, 2 * number + 1, rstd, row_exists)
        x_hat = centered * rstd
        # The modulation is read this late to hold no registers while the statistics are made.
        shift_row = load_row(shift, sample, stride_shift, place, exists, ROWS)
        scale_row = load_row(scale, sample, stride_scale, place, exists, ROWS)
        result = x_hat * (1.0 + scale_row) + shift_row
        if keep is not None:
            kept = load(keep, sample * stride_keep + token, row_exists)
            result = tl.where(kept != 0, result, 0.0)
        store(out + number * (SLICES * C), place, result, mask)


# Whether a program's rows, which the batch size decides, are 1 or a multiple of 16 is worth no code of its own.
@triton.jit(do_not_specialize=["rows_per_program"])
def backward(
    grad_x_out, grad_out, x, y, gate, scale, keep, statistics, grad_x, grad_y, partials,
    stride_gxb, stride_gxn, stride_gb, stride_gn, stride_xb, stride_xn, stride_yb, stride_yn,
    stride_gate, stride_scale, stride_keep, N, W, rows_per_program,
    C: tl.constexpr, SLICES: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """dx (with a scale; without, it is grad_x_out), dy (with a gate, or of a split), and the partial sums of those
    that there are of dgate, dshift and dscale, in this order. x is what was normalised: x', if there is a gate."""
    sample, first, last = rows_of_program(N, rows_per_program)
    stream = y if SLICES == 2 else x if scale is not None else grad_x_out
    place, c, slices, exists = channels_of_row(stream, C, SLICES, BLOCK_C, LANES)
    if gate is not None:
        gate_row = load_row(gate, sample, stride_gate, place, exists, ROWS)
        gate_sum = tl.zeros_like(gate_row)
    if scale is not None:
        scale_row = load_row(scale, sample, stride_scale, place, exists, ROWS)
        shift_sum = tl.zeros_like(scale_row)
        scale_sum = tl.zeros_like(scale_row)
    STAGES: tl.constexpr = 3 if SLICES == 1 and (gate is None or scale is None) else 2
    for begin in tl.range(first, last, ROWS, num_stages=STAGES):
        row = begin + tl.arange(0, ROWS)[None, :, None, None]
        number, row_exists, mask = sample * N + row, row < last, (row < last) & exists
        if grad_x_out is not None:
            dx = load_rows(grad_x_out, sample, row, stride_gxb, stride_gxn, place, mask, ALIGN)
        if scale is not None:
            token, start = tokens_of_slices(row, slices, W, C, SLICES)
            of_x = mask & (slices == 0) if SLICES == 2 else mask
            tile = load_rows(x, sample, token, stride_xb, stride_xn, start + c, of_x, ALIGN)
            if SLICES == 2:
                tile += load_rows(y, sample, row, stride_yb, stride_yn, c, mask & (slices == 1), ALIGN)
            grad_tile = load_rows(grad_out, sample, row, stride_gb, stride_gn, place, mask, ALIGN)
            if keep is not None:
                kept = load(keep, sample * stride_keep + token, row_exists)
                grad_tile = tl.where(kept != 0, grad_tile, 0.0)
            # Where nothing exists grad_tile is zero, and with it all that x̂ is part of.
            mean, rstd = load(statistics, 2 * number, row_exists), load(statistics, 2 * number + 1, row_exists)
            x_hat = (tile - mean) * rstd
            h = grad_tile * (1.0 + scale_row)
            mean_h, mean_hx = means_of_rows(h, h * x_hat, SLICES * C)
            norm_dx = rstd * (h - mean_h - x_hat * mean_hx)
            # Of a tile's shape until the end: rows lie in different warps, which would exchange them each time.
            shift_sum += grad_tile
            scale_sum += grad_tile * x_hat
            dx = dx + norm_dx if grad_x_out is not None else norm_dx
            if SLICES == 2:
                store(grad_x + ((sample * (N // 4) + token) * 4 * C + start), c, dx, of_x)
                store(grad_y + number * C, c, dx, mask & (slices == 1))
            else:
                store(grad_x + (sample * N * SLICES + token) * C, c, dx, of_x)
        if gate is not None:
            y_tile = load_rows(y, sample, row, stride_yb, stride_yn, place, mask, ALIGN)
            store(grad_y + number * C, place, gate_row * dx, mask)
            gate_sum += dx * y_tile
    if gate is not None:
        store_sum(partials, 0, gate_sum, place, exists, C)
    if scale is not None:
        store_sum(partials, 0 if gate is None else 1, shift_sum, place, exists, SLICES * C)
        store_sum(partials, 1 if gate is None else 2, scale_sum, place, exists, SLICES * C)
