"""LN(x)·(1+scale)+shift and its gradients, and the pieces that the other norms are made of.

All norms of this library work on tiles of (ROWS, SLICES, BLOCK_C): ROWS rows of one sample, each of SLICES·C
channels. SLICES is 1, or the number of tokens whose channels make up a row, so that each token's channels stay one
run of memory. Statistics and products are float32.

Backward recomputes x̂ = (x − mean)·rstd from the saved statistics. With h = dout·(1+scale),

    dx = rstd·(h − mean(h) − x̂·mean(h·x̂))    dshift = Σ dout    dscale = Σ dout·x̂

where the last two sum over the tokens of a sample: a program adds up its share of them in registers and writes one
partial, and the caller sums the partials of a sample. No two programs write the same place.
"""

import triton
import triton.language as tl


@triton.jit
def channels_of_row(C: tl.constexpr, SLICES: tl.constexpr, BLOCK_C: tl.constexpr):
    """Place in a row of SLICES·C channels, and which places exist. (1, SLICES, BLOCK_C), (1, 1, BLOCK_C)."""
    c = tl.arange(0, BLOCK_C)[None, None, :]
    return tl.arange(0, SLICES)[None, :, None] * C + c, c < C


@triton.jit
def row_starts(sample, row, stride_sample, stride_row, ALIGN: tl.constexpr):
    """Element offset of each row, 64 bits wide, told to be a multiple of ALIGN. (ROWS, 1, 1)."""
    starts = sample.to(tl.int64) * stride_sample + row.to(tl.int64) * stride_row
    return tl.multiple_of(starts, ALIGN)[:, None, None]


@triton.jit
def sample_stride(N, WIDTH: tl.constexpr):
    """Of a contiguous (B, N, WIDTH), 64 bits wide: one sample may have more than 2³¹ elements."""
    return tl.cast(N, tl.int64) * WIDTH


@triton.jit
def mean_of_rows(values, WIDTH: tl.constexpr):
    """(ROWS, SLICES, BLOCK_C) → (ROWS, 1, 1)."""
    return (tl.sum(tl.sum(values, axis=2), axis=1) / WIDTH)[:, None, None]


@triton.jit
def normalize(x, exists, eps, WIDTH: tl.constexpr):
    """x̂, mean and rstd of rows of WIDTH channels; x is zero where no channel exists."""
    mean = mean_of_rows(x, WIDTH)
    centered = tl.where(exists, x - mean, 0.0)
    rstd = tl.rsqrt(mean_of_rows(centered * centered, WIDTH) + eps)
    return centered * rstd, mean, rstd


@triton.jit
def normalize_backward(grad_out, x, mean, rstd, scale, exists, WIDTH: tl.constexpr):
    """dx and x̂."""
    x_hat = tl.where(exists, (x - mean) * rstd, 0.0)
    h = grad_out * (1.0 + scale)
    return rstd * (h - mean_of_rows(h, WIDTH) - x_hat * mean_of_rows(h * x_hat, WIDTH)), x_hat


@triton.jit
def forward(
    x, shift, scale, out, mean, rstd, stride_xb, stride_xn, stride_shift, stride_scale, N, eps,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, ROWS)
    sample = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    place, exists = channels_of_row(C, 1, BLOCK_C)
    mask = (row < N)[:, None, None] & exists

    x_tile = tl.load(x + row_starts(sample, row, stride_xb, stride_xn, ALIGN) + place, mask=mask, other=0.0)
    x_hat, row_mean, row_rstd = normalize(x_tile.to(tl.float32), exists, eps, C)
    shift_row = tl.load(shift + sample.to(tl.int64) * stride_shift + place, mask=exists).to(tl.float32)
    scale_row = tl.load(scale + sample.to(tl.int64) * stride_scale + place, mask=exists).to(tl.float32)
    result = x_hat * (1.0 + scale_row) + shift_row
    out_places = row_starts(sample, row, sample_stride(N, C), C, ALIGN) + place
    tl.store(out + out_places, result.to(out.dtype.element_ty), mask=mask)
    statistics = (sample.to(tl.int64) * N + row)[:, None, None]
    tl.store(mean + statistics, row_mean, mask=(row < N)[:, None, None])
    tl.store(rstd + statistics, row_rstd, mask=(row < N)[:, None, None])


@triton.jit
def backward(
    grad_out, x, scale, mean, rstd, grad_x, partials,
    stride_gb, stride_gn, stride_xb, stride_xn, stride_scale, N, rows_per_program,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, and the partials (2, B, programs a sample, C) of dshift and dscale."""
    programs = tl.cdiv(N, rows_per_program)
    sample = tl.program_id(0) // programs
    first = tl.program_id(0) % programs * rows_per_program
    last = tl.minimum(first + rows_per_program, N)
    place, exists = channels_of_row(C, 1, BLOCK_C)
    scale_row = tl.load(scale + sample.to(tl.int64) * stride_scale + place, mask=exists, other=0.0).to(tl.float32)

    shift_sum = tl.zeros((1, 1, BLOCK_C), tl.float32)
    scale_sum = tl.zeros((1, 1, BLOCK_C), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        row_exists = (row < last)[:, None, None]
        mask = row_exists & exists
        statistics = (sample.to(tl.int64) * N + row)[:, None, None]
        row_mean = tl.load(mean + statistics, mask=row_exists, other=0.0)
        row_rstd = tl.load(rstd + statistics, mask=row_exists, other=0.0)
        x_tile = tl.load(x + row_starts(sample, row, stride_xb, stride_xn, ALIGN) + place, mask=mask, other=0.0)
        grad_places = row_starts(sample, row, stride_gb, stride_gn, ALIGN) + place
        grad_tile = tl.load(grad_out + grad_places, mask=mask, other=0.0).to(tl.float32)
        dx, x_hat = normalize_backward(grad_tile, x_tile.to(tl.float32), row_mean, row_rstd, scale_row, exists, C)
        shift_sum += tl.sum(grad_tile, axis=0, keep_dims=True)
        scale_sum += tl.sum(grad_tile * x_hat, axis=0, keep_dims=True)
        out_places = row_starts(sample, row, sample_stride(N, C), C, ALIGN) + place
        tl.store(grad_x + out_places, dx.to(grad_x.dtype.element_ty), mask=mask)

    partial = tl.program_id(0).to(tl.int64) * C + place
    tl.store(partials + partial, shift_sum, mask=exists)
    tl.store(partials + partial + tl.num_programs(0).to(tl.int64) * C, scale_sum, mask=exists)
