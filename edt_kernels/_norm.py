"""LN(x)·(1+scale)+shift and its gradients on tiles of rows: what the norms' kernels are made of, @triton.jit only.

A tile is (PARTS, ROWS, LANES, VEC): ROWS rows of one sample, each of SLICES·C channels, shared out among LANES
threads, of which each takes VEC channels at a time: 16 bytes of the residual stream, so that what the threads of a
warp load at once is one run of memory. SLICES is 1, or the number of tokens whose channels make up a row. What
belongs to rows is (1, ROWS, 1, 1), to places in a row (PARTS, 1, LANES, VEC). All is computed in float32.

Forward, which saves the two statistics of each row:

    x̂ = (x − mean)·rstd    rstd = 1/√(variance + eps)    out = x̂·(1+scale) + shift

Backward, which computes x̂ again from them, with h = dout·(1+scale):

    dx = rstd·(h − mean(h) − x̂·mean(h·x̂))    dshift = Σ dout    dscale = Σ dout·x̂

where the last two sum over the rows of a sample: a program adds up its share in registers and writes one partial
sum of each; the launcher adds up the partial sums of a sample. No two programs write the same place.
"""

import triton
import triton.language as tl

# Whether these arguments, which the batch size decides, are 1 or multiples of 16 is not worth codes of their own.
ANY_VALUE = ["rows_per_program"]


@triton.jit
def rows_of_program(N, rows_per_program):
    """This program's sample, 64 bits wide as then are all offsets made of it, and its rows, from first to last."""
    programs = tl.cdiv(N, rows_per_program)
    first = tl.program_id(0) % programs * rows_per_program
    return (tl.program_id(0) // programs).to(tl.int64), first, tl.minimum(first + rows_per_program, N)


@triton.jit
def channels_of_row(stream, C: tl.constexpr, SLICES: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr):
    """Places in a row of SLICES·C channels, their channels in the slice, their runs' slices, and which exist."""
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
def zeros(place, ROWS: tl.constexpr):
    return tl.zeros((place.shape[0], ROWS, place.shape[2], place.shape[3]), tl.float32)


@triton.jit
def rows_of_tile(sample, N, first, last, exists, ROWS: tl.constexpr):
    """Rows of the sample from `first` on, their numbers among all samples' rows, which of them come before `last`,
    and which of their channels exist."""
    row = first + tl.arange(0, ROWS)[None, :, None, None]
    return row, sample * N + row, row < last, (row < last) & exists


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
    sums = tl.sum(tl.join(sum_of_parts(a), sum_of_parts(b)), axis=1)
    a, b = tl.split(sums / WIDTH)
    return a[None, :, None, None], b[None, :, None, None]


@triton.jit
def normalize(x, statistics, number, row_exists, exists, eps, WIDTH: tl.constexpr):
    """x̂ of a tile that is zero where nothing exists. Stores mean and rstd of its rows."""
    row_mean = mean_of_rows(x, WIDTH)
    centered = tl.where(exists, x - row_mean, 0.0)
    row_rstd = tl.rsqrt(mean_of_rows(centered * centered, WIDTH) + eps)
    store(statistics, 2 * number, row_mean, row_exists)
    store(statistics, 2 * number + 1, row_rstd, row_exists)
    return centered * row_rstd


@triton.jit
def modulate(x_hat, shift, scale, sample, stride_shift, stride_scale, place, exists, ROWS: tl.constexpr):
    """x̂·(1+scale)+shift. The modulation is read this late to hold no registers while the statistics are made."""
    shift_row = load_row(shift, sample, stride_shift, place, exists, ROWS)
    scale_row = load_row(scale, sample, stride_scale, place, exists, ROWS)
    return x_hat * (1.0 + scale_row) + shift_row


@triton.jit
def differentiate(
    grad_out, x, scale_row, statistics, number, row_exists, shift_sum, scale_sum, WIDTH: tl.constexpr
):
    """dx of a tile; the sums of dshift and dscale with it. They have a tile's shape, and `store_sum` adds up its
    rows: adding them here would exchange them between warps for every tile. Where nothing exists
    grad_out is zero, and with it all that x̂ is part of."""
    row_mean, row_rstd = load(statistics, 2 * number, row_exists), load(statistics, 2 * number + 1, row_exists)
    x_hat = (x - row_mean) * row_rstd
    h = grad_out * (1.0 + scale_row)
    mean_h, mean_hx = means_of_rows(h, h * x_hat, WIDTH)
    dx = row_rstd * (h - mean_h - x_hat * mean_hx)
    return dx, shift_sum + grad_out, scale_sum + grad_out * x_hat


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
