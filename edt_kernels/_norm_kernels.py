"""x' = x + gate·y and LN(x')·(1+scale)+shift, either of them or both; the gradients.

One kernel a pass: without a gate x' is x, without a scale there is no norm. Absent tensors and their strides are
None, which the compiler sees. Notation, formulas and tiles are those of `edt_kernels._norm`. x' is rounded to its
dtype before it is normalised, so that backward, which reads x' back, normalises the same numbers. With dx' the sum
of the gradient that arrives at x' and the norm's,

    dx = dx'    dy = gate·dx'    dgate = Σ dx'·y
"""

import triton
import triton.language as tl

from . import _norm as norm


@triton.jit
def forward(
    x, y, gate, shift, scale, x_out, out, statistics,
    stride_xb, stride_xn, stride_yb, stride_yn, stride_gate, stride_shift, stride_scale, N, eps,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """x' into x_out (with a gate), its modulated norm into out and the rows' statistics (with a scale)."""
    sample, first, last = norm.rows_of_program(N, ROWS)
    place, _, _, exists = norm.channels_of_row(x, C, 1, BLOCK_C, LANES)
    row, number, row_exists, mask = norm.rows_of_tile(sample, N, first, last, exists, ROWS)
    x_tile = norm.load_rows(x, sample, row, stride_xb, stride_xn, place, mask, ALIGN)
    if gate is not None:
        y_tile = norm.load_rows(y, sample, row, stride_yb, stride_yn, place, mask, ALIGN)
        gate_row = norm.load_row(gate, sample, stride_gate, place, exists, ROWS)
        x_new = (x_tile + gate_row * y_tile).to(x_out.dtype.element_ty)
        norm.store(x_out + number * C, place, x_new, mask)
        x_tile = x_new.to(tl.float32)
    if scale is not None:
        x_hat = norm.normalize(x_tile, statistics, number, row_exists, exists, eps, C)
        result = norm.modulate(x_hat, shift, scale, sample, stride_shift, stride_scale, place, exists, ROWS)
        norm.store(out + number * C, place, result, mask)


@triton.jit(do_not_specialize=norm.ANY_VALUE)
def backward(
    grad_x_out, grad_out, x_out, y, gate, scale, statistics, grad_x, grad_y, partials,
    stride_gxb, stride_gxn, stride_gb, stride_gn, stride_xb, stride_xn, stride_yb, stride_yn,
    stride_gate, stride_scale, N, rows_per_program,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dx (with a scale; without, it is grad_x_out), dy (with a gate), and the partial sums of those that there are
    of dgate, dshift and dscale, in this order."""
    sample, first, last = norm.rows_of_program(N, rows_per_program)
    place, _, _, exists = norm.channels_of_row(x_out if scale is not None else grad_x_out, C, 1, BLOCK_C, LANES)
    if gate is not None:
        gate_row = norm.load_row(gate, sample, stride_gate, place, exists, ROWS)
        gate_sum = norm.zeros(place, ROWS)
    if scale is not None:
        scale_row = norm.load_row(scale, sample, stride_scale, place, exists, ROWS)
        shift_sum = norm.zeros(place, ROWS)
        scale_sum = norm.zeros(place, ROWS)
    for start in tl.range(first, last, ROWS, num_stages=2 if gate is not None and scale is not None else 3):
        row, number, row_exists, mask = norm.rows_of_tile(sample, N, start, last, exists, ROWS)
        if grad_x_out is not None:
            dx = norm.load_rows(grad_x_out, sample, row, stride_gxb, stride_gxn, place, mask, ALIGN)
        else:
            dx = norm.zeros(place, ROWS)
        if scale is not None:
            x_tile = norm.load_rows(x_out, sample, row, stride_xb, stride_xn, place, mask, ALIGN)
            grad_tile = norm.load_rows(grad_out, sample, row, stride_gb, stride_gn, place, mask, ALIGN)
            norm_dx, shift_sum, scale_sum = norm.differentiate(
                grad_tile, x_tile, scale_row, statistics, number, row_exists, shift_sum, scale_sum, C
            )
            dx += norm_dx
            norm.store(grad_x + number * C, place, dx, mask)
        if gate is not None:
            y_tile = norm.load_rows(y, sample, row, stride_yb, stride_yn, place, mask, ALIGN)
            norm.store(grad_y + number * C, place, gate_row * dx, mask)
            gate_sum += dx * y_tile
    if gate is not None:
        norm.store_sum(partials, 0, gate_sum, place, exists, C)
    if scale is not None:
        before: tl.constexpr = 0 if gate is None else 1
        norm.store_sum(partials, before, shift_sum, place, exists, C)
        norm.store_sum(partials, before + 1, scale_sum, place, exists, C)
