"""LN over [pixel shuffle of x, skip], modulated; its gradients.

The notation and the norm are those of `edt_kernels.adaln.kernels`, with two slices of C channels to a row. Slice 0
of fine token (y, x) is run 2·(y % 2) + x % 2 of C channels of coarse token (y // 2, x // 2); slice 1 is the same
token of the skip. Each is read and written under its own mask; nothing is shuffled in memory.
"""

import triton
import triton.language as tl

from ..adaln.kernels import channels_of_row, normalize, normalize_backward, row_starts, sample_stride


@triton.jit
def shuffled_starts(sample, row, W, stride_sample, stride_token, C: tl.constexpr, ALIGN: tl.constexpr):
    """Element offset of each fine token's run of C channels in x; W is the coarse width. (ROWS, 1, 1)."""
    y, x = row // (2 * W), row % (2 * W)
    token, run = (y // 2) * W + x // 2, 2 * (y % 2) + x % 2
    starts = sample.to(tl.int64) * stride_sample + token.to(tl.int64) * stride_token + run * C
    return tl.multiple_of(starts, ALIGN)[:, None, None]


@triton.jit
def slice_places(
    sample, row, W, stride_xb, stride_xn, stride_skip_b, stride_skip_n,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Where the channels of slice 0 lie in x, and of slice 1 in the skip. Both (ROWS, 2, BLOCK_C)."""
    c = tl.arange(0, BLOCK_C)[None, None, :]
    up_places = shuffled_starts(sample, row, W, stride_xb, stride_xn, C, ALIGN) + c
    skip_places = row_starts(sample, row, stride_skip_b, stride_skip_n, ALIGN) + c
    return tl.broadcast_to(up_places, (ROWS, 2, BLOCK_C)), tl.broadcast_to(skip_places, (ROWS, 2, BLOCK_C))


@triton.jit
def forward(
    x, skip, shift, scale, out, mean, rstd,
    stride_xb, stride_xn, stride_skip_b, stride_skip_n, stride_shift, stride_scale, N, W, eps,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """N fine tokens a sample; W is the coarse grid's width."""
    tiles = tl.cdiv(N, ROWS)
    sample = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    row_exists = (row < N)[:, None, None]
    place, exists = channels_of_row(C, 2, BLOCK_C)
    mask, is_skip = row_exists & exists, tl.arange(0, 2)[None, :, None] == 1

    up_places, skip_places = slice_places(
        sample, row, W, stride_xb, stride_xn, stride_skip_b, stride_skip_n, C, ALIGN, ROWS, BLOCK_C
    )
    x_tile = tl.load(x + up_places, mask=mask & (is_skip == 0), other=0.0).to(tl.float32)
    x_tile += tl.load(skip + skip_places, mask=mask & is_skip, other=0.0).to(tl.float32)
    x_hat, row_mean, row_rstd = normalize(x_tile, exists, eps, 2 * C)
    shift_row = tl.load(shift + sample.to(tl.int64) * stride_shift + place, mask=exists).to(tl.float32)
    scale_row = tl.load(scale + sample.to(tl.int64) * stride_scale + place, mask=exists).to(tl.float32)
    result = x_hat * (1.0 + scale_row) + shift_row
    out_places = row_starts(sample, row, sample_stride(N, 2 * C), 2 * C, ALIGN) + place
    tl.store(out + out_places, result.to(out.dtype.element_ty), mask=mask)
    statistics = (sample.to(tl.int64) * N + row)[:, None, None]
    tl.store(mean + statistics, row_mean, mask=row_exists)
    tl.store(rstd + statistics, row_rstd, mask=row_exists)


@triton.jit
def backward(
    grad_out, x, skip, scale, mean, rstd, grad_x, grad_skip, partials,
    stride_gb, stride_gn, stride_xb, stride_xn, stride_skip_b, stride_skip_n, stride_scale,
    N, W, rows_per_program,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx and dskip (contiguous), and the partials (2, B, programs a sample, 2C) of dshift and dscale."""
    programs = tl.cdiv(N, rows_per_program)
    sample = tl.program_id(0) // programs
    first = tl.program_id(0) % programs * rows_per_program
    last = tl.minimum(first + rows_per_program, N)
    place, exists = channels_of_row(C, 2, BLOCK_C)
    is_skip = tl.arange(0, 2)[None, :, None] == 1
    scale_row = tl.load(scale + sample.to(tl.int64) * stride_scale + place, mask=exists, other=0.0).to(tl.float32)

    shift_sum = tl.zeros((1, 2, BLOCK_C), tl.float32)
    scale_sum = tl.zeros((1, 2, BLOCK_C), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        row_exists = (row < last)[:, None, None]
        mask = row_exists & exists
        statistics = (sample.to(tl.int64) * N + row)[:, None, None]
        row_mean = tl.load(mean + statistics, mask=row_exists, other=0.0)
        row_rstd = tl.load(rstd + statistics, mask=row_exists, other=0.0)
        up_places, skip_places = slice_places(
            sample, row, W, stride_xb, stride_xn, stride_skip_b, stride_skip_n, C, ALIGN, ROWS, BLOCK_C
        )
        x_tile = tl.load(x + up_places, mask=mask & (is_skip == 0), other=0.0).to(tl.float32)
        x_tile += tl.load(skip + skip_places, mask=mask & is_skip, other=0.0).to(tl.float32)
        grad_places = row_starts(sample, row, stride_gb, stride_gn, ALIGN) + place
        grad_tile = tl.load(grad_out + grad_places, mask=mask, other=0.0).to(tl.float32)
        dx, x_hat = normalize_backward(grad_tile, x_tile, row_mean, row_rstd, scale_row, exists, 2 * C)
        shift_sum += tl.sum(grad_tile, axis=0, keep_dims=True)
        scale_sum += tl.sum(grad_tile * x_hat, axis=0, keep_dims=True)
        up_places, skip_places = slice_places(
            sample, row, W, sample_stride(N, C), 4 * C, sample_stride(N, C), C, C, ALIGN, ROWS, BLOCK_C
        )
        tl.store(grad_x + up_places, dx.to(grad_x.dtype.element_ty), mask=mask & (is_skip == 0))
        tl.store(grad_skip + skip_places, dx.to(grad_skip.dtype.element_ty), mask=mask & is_skip)

    partial = tl.program_id(0).to(tl.int64) * 2 * C + place
    tl.store(partials + partial, shift_sum, mask=exists)
    tl.store(partials + tl.num_programs(0).to(tl.int64) * 2 * C + partial, scale_sum, mask=exists)
