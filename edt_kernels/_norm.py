"""LN(x)·(1+scale)+shift and its gradients on tiles of rows: what the norms' kernels are made of, @triton.jit only.

A tile is (ROWS, SLICES, BLOCK_C): ROWS rows of one sample, each of SLICES·C channels. SLICES is 1, or the number
of tokens whose channels make up a row, so that each token's channels stay one run of memory. What belongs to rows
is (ROWS, 1, 1), to places in a row (1, SLICES, BLOCK_C). All is computed in float32.

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
def channels_of_row(C: tl.constexpr, SLICES: tl.constexpr, BLOCK_C: tl.constexpr):
    """Places in a row of SLICES·C channels, their channels in the slice, and which exist."""
    c = tl.arange(0, BLOCK_C)[None, None, :]
    return tl.arange(0, SLICES)[None, :, None] * C + c, c, c < C


@triton.jit
def rows_of_tile(sample, N, first, last, exists, ROWS: tl.constexpr):
    """Rows of the sample from `first` on, their numbers among all samples' rows, which of them come before `last`,
    and which of their channels exist."""
    row = first + tl.arange(0, ROWS)[:, None, None]
    return row, sample * N + row, row < last, (row < last) & exists


@triton.jit
def load(pointer, offsets, exists):
    """In float32, zero where nothing exists."""
    offsets, exists = tl.broadcast(offsets, exists)
    return tl.load(pointer + offsets, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def load_rows(pointer, sample, row, stride_sample, stride_row, channel, exists, ALIGN: tl.constexpr):
    """`load` of channels of rows of a sample. The strides are multiples of ALIGN: that decides how wide the loads
    are, and the compiler cannot see it for one such as 52. It is told of the strides because the same hint on the
    offsets of a single row, which it turns into a scalar, fails to compile."""
    stride_sample = tl.multiple_of(tl.cast(stride_sample, tl.int64), ALIGN)
    stride_row = tl.multiple_of(tl.cast(stride_row, tl.int64), ALIGN)
    return load(pointer, sample * stride_sample + row * stride_row + channel, exists)


@triton.jit
def store(pointer, offsets, values, exists):
    offsets, exists = tl.broadcast(offsets, exists)
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def mean_of_rows(values, WIDTH: tl.constexpr):
    return (tl.sum(tl.sum(values, axis=2), axis=1) / WIDTH)[:, None, None]


@triton.jit
def normalize(x, statistics, number, row_exists, exists, eps, WIDTH: tl.constexpr):
    """x̂ of a tile that is zero where nothing exists. Stores the mean and rstd of its rows."""
    row_mean = mean_of_rows(x, WIDTH)
    centered = tl.where(exists, x - row_mean, 0.0)
    row_rstd = tl.rsqrt(mean_of_rows(centered * centered, WIDTH) + eps)
    store(statistics, 2 * number, row_mean, row_exists)
    store(statistics, 2 * number + 1, row_rstd, row_exists)
    return centered * row_rstd


@triton.jit
def modulate(x_hat, shift, scale, sample, stride_shift, stride_scale, place, exists):
    """x̂·(1+scale)+shift. The modulation is read this late to hold no registers while the statistics are made."""
    shift_row = load(shift, sample * stride_shift + place, exists)
    scale_row = load(scale, sample * stride_scale + place, exists)
    return x_hat * (1.0 + scale_row) + shift_row


@triton.jit
def differentiate(
    grad_out, x, scale_row, statistics, number, row_exists, exists, shift_sum, scale_sum, WIDTH: tl.constexpr
):
    """dx of a tile; the sums of dshift and dscale with it. They have a tile's shape, and `store_sum` adds up its
    rows: adding them here would exchange them between warps for every tile."""
    row_mean, row_rstd = load(statistics, 2 * number, row_exists), load(statistics, 2 * number + 1, row_exists)
    x_hat = tl.where(exists, (x - row_mean) * row_rstd, 0.0)
    h = grad_out * (1.0 + scale_row)
    dx = row_rstd * (h - mean_of_rows(h, WIDTH) - x_hat * mean_of_rows(h * x_hat, WIDTH))
    return dx, shift_sum + grad_out, scale_sum + grad_out * x_hat


@triton.jit
def store_sum(partials, quantity: tl.constexpr, values, place, exists, WIDTH: tl.constexpr):
    """Writes this program's row of a quantity of `partials` (quantities, programs, WIDTH)."""
    row = tl.num_programs(0).to(tl.int64) * quantity + tl.program_id(0)
    store(partials, row * WIDTH + place, tl.sum(values, axis=0, keep_dims=True), exists)
