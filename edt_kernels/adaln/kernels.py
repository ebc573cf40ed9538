"""LN(x)·(1+scale)+shift and its gradients; notation, formulas and tiles are those of `edt_kernels._norm`."""

import triton
import triton.language as tl

from .. import _norm as norm


@triton.jit
def forward(
    x, shift, scale, out, mean, rstd, stride_xb, stride_xn, stride_shift, stride_scale, N, eps,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample, first, last = norm.rows_of_program(N, ROWS)
    place, _, exists = norm.channels_of_row(C, 1, BLOCK_C)
    row, number, row_exists, mask = norm.rows_of_tile(sample, N, first, last, exists, ROWS)
    x_tile = norm.load_rows(x, sample, row, stride_xb, stride_xn, place, mask, ALIGN)
    x_hat = norm.normalize(x_tile, mean, rstd, number, row_exists, exists, eps, C)
    result = norm.modulate(x_hat, shift, scale, sample, stride_shift, stride_scale, place, exists)
    norm.store(out, number * C + place, result, mask)


@triton.jit(do_not_specialize=norm.ANY_VALUE)
def backward(
    grad_out, x, scale, mean, rstd, grad_x, partials,
    stride_gb, stride_gn, stride_xb, stride_xn, stride_scale, N, rows_per_program,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, and the partial sums of dshift and dscale."""
    sample, first, last = norm.rows_of_program(N, rows_per_program)
    place, _, exists = norm.channels_of_row(C, 1, BLOCK_C)
    scale_row = norm.load(scale, sample * stride_scale + place, exists)
    shift_sum = tl.zeros((ROWS, 1, BLOCK_C), tl.float32)
    scale_sum = tl.zeros((ROWS, 1, BLOCK_C), tl.float32)
    for start in range(first, last, ROWS):
        row, number, row_exists, mask = norm.rows_of_tile(sample, N, start, last, exists, ROWS)
        x_tile = norm.load_rows(x, sample, row, stride_xb, stride_xn, place, mask, ALIGN)
        grad_tile = norm.load_rows(grad_out, sample, row, stride_gb, stride_gn, place, mask, ALIGN)
        dx, shift_sum, scale_sum = norm.differentiate(
            grad_tile, x_tile, scale_row, mean, rstd, number, row_exists, exists, shift_sum, scale_sum, C
        )
        norm.store(grad_x, number * C + place, dx, mask)
    norm.store_sum(partials, 0, shift_sum, place, exists, C)
    norm.store_sum(partials, 1, scale_sum, place, exists, C)
