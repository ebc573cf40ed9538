"""LN over the channels of 2×2 tokens, modulated, and the slices of dropped tokens zeroed; its gradients.

Notation, formulas and tiles are those of `edt_kernels._norm`, with four slices to a row: slice s of merged token
(y, x) is token (2y + s % 2, 2x + s // 2), so slices run (0,0), (1,0), (0,1), (1,1) by (row, column) offset.
"""

import triton
import triton.language as tl

from .. import _norm as norm


@triton.jit
def merged_tokens(row, slices, W):
    """The four tokens of each merged token. (PARTS, ROWS, LANES, 1)."""
    y, x = row // (W // 2), row % (W // 2)
    return (2 * y + slices % 2) * W + 2 * x + slices // 2


@triton.jit
def zero_dropped(values, keep, places, row_exists):
    """Zero in the slices of tokens that `keep` (bytes) drops."""
    return tl.where(norm.load(keep, places, row_exists) != 0, values, 0.0)


@triton.jit
def forward(
    x, shift, scale, keep, out, statistics,
    stride_xb, stride_xn, stride_shift, stride_scale, stride_keep, N, W, eps,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """N merged tokens a sample; W is the grid's width before merging."""
    sample, first, last = norm.rows_of_program(N, ROWS)
    place, c, slices, exists = norm.channels_of_row(x, C, 4, BLOCK_C, LANES)
    row, number, row_exists, mask = norm.rows_of_tile(sample, N, first, last, exists, ROWS)
    token = merged_tokens(row, slices, W)
    x_tile = norm.load_rows(x, sample, token, stride_xb, stride_xn, c, mask, ALIGN)
    x_hat = norm.normalize(x_tile, statistics, number, row_exists, exists, eps, 4 * C)
    result = norm.modulate(x_hat, shift, scale, sample, stride_shift, stride_scale, place, exists, ROWS)
    if keep is not None:
        result = zero_dropped(result, keep, sample * stride_keep + token, row_exists)
    norm.store(out + number * (4 * C), place, result, mask)


@triton.jit(do_not_specialize=norm.ANY_VALUE)
def backward(
    grad_out, x, scale, keep, statistics, grad_x, partials,
    stride_gb, stride_gn, stride_xb, stride_xn, stride_scale, stride_keep, N, W, rows_per_program,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """dx, and the partial sums of dshift and dscale."""
    sample, first, last = norm.rows_of_program(N, rows_per_program)
    place, c, slices, exists = norm.channels_of_row(x, C, 4, BLOCK_C, LANES)
    scale_row = norm.load_row(scale, sample, stride_scale, place, exists, ROWS)
    shift_sum = norm.zeros(place, ROWS)
    scale_sum = norm.zeros(place, ROWS)
    for start in tl.range(first, last, ROWS, num_stages=2):
        row, number, row_exists, mask = norm.rows_of_tile(sample, N, start, last, exists, ROWS)
        token = merged_tokens(row, slices, W)
        x_tile = norm.load_rows(x, sample, token, stride_xb, stride_xn, c, mask, ALIGN)
        grad_tile = norm.load_rows(grad_out, sample, row, stride_gb, stride_gn, place, mask, ALIGN)
        if keep is not None:
            grad_tile = zero_dropped(grad_tile, keep, sample * stride_keep + token, row_exists)
        dx, shift_sum, scale_sum = norm.differentiate(
            grad_tile, x_tile, scale_row, statistics, number, row_exists, shift_sum, scale_sum, 4 * C
        )
        norm.store(grad_x + (sample * N * 4 + token) * C, c, dx, mask)
    norm.store_sum(partials, 0, shift_sum, place, exists, 4 * C)
    norm.store_sum(partials, 1, scale_sum, place, exists, 4 * C)
