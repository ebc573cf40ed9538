"""LN over [pixel shuffle of x, skip], modulated; its gradients.

Notation, formulas and tiles are those of `edt_kernels._norm`, with two slices of C channels to a row. Slice 0 of
fine token (y, x) is run 2·(y % 2) + x % 2 of C channels of coarse token (y // 2, x // 2); slice 1 is the skip's
token. Each is read and written under its own mask; nothing is shuffled in memory.
"""

import triton
import triton.language as tl

from .. import _norm as norm


@triton.jit
def coarse_tokens(row, W, C: tl.constexpr):
    """The coarse token that each fine token is a run of, and where the run starts. W is the coarse width."""
    y, x = row // (2 * W), row % (2 * W)
    return y // 2 * W + x // 2, (2 * (y % 2) + x % 2) * C


@triton.jit
def forward(
    x, skip, shift, scale, out, statistics,
    stride_xb, stride_xn, stride_skip_b, stride_skip_n, stride_shift, stride_scale, N, W, eps,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """N fine tokens a sample; W is the coarse grid's width."""
    sample, first, last = norm.rows_of_program(N, ROWS)
    place, c, slices, exists = norm.channels_of_row(skip, C, 2, BLOCK_C, LANES)
    row, number, row_exists, mask = norm.rows_of_tile(sample, N, first, last, exists, ROWS)
    token, run = coarse_tokens(row, W, C)
    x_tile = norm.load_rows(x, sample, token, stride_xb, stride_xn, run + c, mask & (slices == 0), ALIGN)
    x_tile += norm.load_rows(skip, sample, row, stride_skip_b, stride_skip_n, c, mask & (slices == 1), ALIGN)
    x_hat = norm.normalize(x_tile, statistics, number, row_exists, exists, eps, 2 * C)
    result = norm.modulate(x_hat, shift, scale, sample, stride_shift, stride_scale, place, exists, ROWS)
    norm.store(out + number * (2 * C), place, result, mask)


@triton.jit(do_not_specialize=norm.ANY_VALUE)
def backward(
    grad_out, x, skip, scale, statistics, grad_x, grad_skip, partials,
    stride_gb, stride_gn, stride_xb, stride_xn, stride_skip_b, stride_skip_n, stride_scale,
    N, W, rows_per_program,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dx, dskip, and the partial sums of dshift and dscale."""
    sample, first, last = norm.rows_of_program(N, rows_per_program)
    place, c, slices, exists = norm.channels_of_row(skip, C, 2, BLOCK_C, LANES)
    scale_row = norm.load_row(scale, sample, stride_scale, place, exists, ROWS)
    shift_sum = norm.zeros(place, ROWS)
    scale_sum = norm.zeros(place, ROWS)
    for start in tl.range(first, last, ROWS, num_stages=2):
        row, number, row_exists, mask = norm.rows_of_tile(sample, N, start, last, exists, ROWS)
        token, run = coarse_tokens(row, W, C)
        x_tile = norm.load_rows(x, sample, token, stride_xb, stride_xn, run + c, mask & (slices == 0), ALIGN)
        x_tile += norm.load_rows(skip, sample, row, stride_skip_b, stride_skip_n, c, mask & (slices == 1), ALIGN)
        grad_tile = norm.load_rows(grad_out, sample, row, stride_gb, stride_gn, place, mask, ALIGN)
        dx, shift_sum, scale_sum = norm.differentiate(
            grad_tile, x_tile, scale_row, statistics, number, row_exists, shift_sum, scale_sum, 2 * C
        )
        norm.store(grad_x + ((sample * (N // 4) + token) * 4 * C + run), c, dx, mask & (slices == 0))
        norm.store(grad_skip + number * C, c, dx, mask & (slices == 1))
    norm.store_sum(partials, 0, shift_sum, place, exists, 2 * C)
    norm.store_sum(partials, 1, scale_sum, place, exists, 2 * C)
