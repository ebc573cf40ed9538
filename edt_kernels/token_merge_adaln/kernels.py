"""LN over the channels of 2×2 tokens, modulated, and the slices of dropped tokens zeroed; its gradients.

The notation and the norm are those of `edt_kernels.adaln.kernels`, with four slices to a row: slice s of merged
token (y, x) is token (2y + s % 2, 2x + s // 2), so slices run (0,0), (1,0), (0,1), (1,1) by (row, column) offset.
"""

import triton
import triton.language as tl

from ..adaln.kernels import channels_of_row, normalize, normalize_backward, row_starts, sample_stride


@triton.jit
def merged_tokens(row, W):
    """The four tokens of each merged token. (ROWS, 4, 1)."""
    slices = tl.arange(0, 4)[None, :]
    y, x = row // (W // 2), row % (W // 2)
    return ((2 * y[:, None] + slices % 2) * W + 2 * x[:, None] + slices // 2)[:, :, None]


@triton.jit
def token_starts(sample, token, stride_sample, stride_token, ALIGN: tl.constexpr):
    """Element offset of each token, 64 bits wide, told to be a multiple of ALIGN. (ROWS, 4, 1)."""
    starts = sample.to(tl.int64) * stride_sample + token.to(tl.int64) * stride_token
    return tl.multiple_of(starts, [ALIGN, ALIGN, ALIGN])


@triton.jit
def forward(
    x, shift, scale, keep, out, mean, rstd,
    stride_xb, stride_xn, stride_shift, stride_scale, stride_keep, N, W, eps,
    C: tl.constexpr, MASKED: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """N merged tokens a sample; W is the grid's width before merging."""
    tiles = tl.cdiv(N, ROWS)
    sample = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    row_exists = (row < N)[:, None, None]
    place, exists = channels_of_row(C, 4, BLOCK_C)
    c = tl.arange(0, BLOCK_C)[None, None, :]
    token = merged_tokens(row, W)

    starts = token_starts(sample, token, stride_xb, stride_xn, ALIGN)
    x_tile = tl.load(x + starts + c, mask=row_exists & exists, other=0.0).to(tl.float32)  # (ROWS, 4, BLOCK_C)
    x_hat, row_mean, row_rstd = normalize(x_tile, exists, eps, 4 * C)
    shift_row = tl.load(shift + sample.to(tl.int64) * stride_shift + place, mask=exists).to(tl.float32)
    scale_row = tl.load(scale + sample.to(tl.int64) * stride_scale + place, mask=exists).to(tl.float32)
    result = x_hat * (1.0 + scale_row) + shift_row
    if MASKED:
        kept = tl.load(keep + sample.to(tl.int64) * stride_keep + token, mask=row_exists, other=0)
        result = tl.where(kept != 0, result, 0.0)
    out_places = row_starts(sample, row, sample_stride(N, 4 * C), 4 * C, ALIGN) + place
    tl.store(out + out_places, result.to(out.dtype.element_ty), mask=row_exists & exists)
    statistics = (sample.to(tl.int64) * N + row)[:, None, None]
    tl.store(mean + statistics, row_mean, mask=row_exists)
    tl.store(rstd + statistics, row_rstd, mask=row_exists)


@triton.jit
def backward(
    grad_out, x, scale, keep, mean, rstd, grad_x, partials,
    stride_gb, stride_gn, stride_xb, stride_xn, stride_scale, stride_keep, N, W, rows_per_program,
    C: tl.constexpr, MASKED: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx (contiguous), and the partials (2, B, programs a sample, 4C) of dshift and dscale."""
    programs = tl.cdiv(N, rows_per_program)
    sample = tl.program_id(0) // programs
    first = tl.program_id(0) % programs * rows_per_program
    last = tl.minimum(first + rows_per_program, N)
    place, exists = channels_of_row(C, 4, BLOCK_C)
    c = tl.arange(0, BLOCK_C)[None, None, :]
    scale_row = tl.load(scale + sample.to(tl.int64) * stride_scale + place, mask=exists, other=0.0).to(tl.float32)

    shift_sum = tl.zeros((1, 4, BLOCK_C), tl.float32)
    scale_sum = tl.zeros((1, 4, BLOCK_C), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        row_exists = (row < last)[:, None, None]
        mask = row_exists & exists
        token = merged_tokens(row, W)
        statistics = (sample.to(tl.int64) * N + row)[:, None, None]
        row_mean = tl.load(mean + statistics, mask=row_exists, other=0.0)
        row_rstd = tl.load(rstd + statistics, mask=row_exists, other=0.0)
        starts = token_starts(sample, token, stride_xb, stride_xn, ALIGN)
        x_tile = tl.load(x + starts + c, mask=mask, other=0.0).to(tl.float32)
        grad_places = row_starts(sample, row, stride_gb, stride_gn, ALIGN) + place
        grad_tile = tl.load(grad_out + grad_places, mask=mask, other=0.0).to(tl.float32)
        if MASKED:
            kept = tl.load(keep + sample.to(tl.int64) * stride_keep + token, mask=row_exists, other=0)
            grad_tile = tl.where(kept != 0, grad_tile, 0.0)
        dx, x_hat = normalize_backward(grad_tile, x_tile, row_mean, row_rstd, scale_row, exists, 4 * C)
        shift_sum += tl.sum(grad_tile, axis=0, keep_dims=True)
        scale_sum += tl.sum(grad_tile * x_hat, axis=0, keep_dims=True)
        grad_starts = token_starts(sample, token, sample_stride(N, 4 * C), C, ALIGN)
        tl.store(grad_x + grad_starts + c, dx.to(grad_x.dtype.element_ty), mask=mask)

    partial = tl.program_id(0).to(tl.int64) * 4 * C + place
    tl.store(partials + partial, shift_sum, mask=exists)
    tl.store(partials + tl.num_programs(0).to(tl.int64) * 4 * C + partial, scale_sum, mask=exists)
