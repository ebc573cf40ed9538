"""x' = x + gate·y, and with it LN(x')·(1+scale)+shift; the gradients of both.

The notation and the norm are those of `edt_kernels.adaln.kernels`. x' is rounded to its dtype before it is
normalised, so that backward, which reads x' back, normalises the same numbers. With dx' the sum of the gradient
that arrives at x' and the norm's,

    dx = dx'    dy = gate·dx'    dgate = Σ dx'·y
"""

import triton
import triton.language as tl

from ..adaln.kernels import channels_of_row, normalize, normalize_backward, row_starts, sample_stride


@triton.jit
def forward(
    x, y, gate, shift, scale, x_out, out, mean, rstd,
    stride_xb, stride_xn, stride_yb, stride_yn, stride_gate, stride_shift, stride_scale, N, eps,
    C: tl.constexpr, NORM: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x' and, with NORM, its modulated norm."""
    tiles = tl.cdiv(N, ROWS)
    sample = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    place, exists = channels_of_row(C, 1, BLOCK_C)
    mask = (row < N)[:, None, None] & exists
    out_places = row_starts(sample, row, sample_stride(N, C), C, ALIGN) + place

    x_tile = tl.load(x + row_starts(sample, row, stride_xb, stride_xn, ALIGN) + place, mask=mask, other=0.0)
    y_tile = tl.load(y + row_starts(sample, row, stride_yb, stride_yn, ALIGN) + place, mask=mask, other=0.0)
    gate_row = tl.load(gate + sample.to(tl.int64) * stride_gate + place, mask=exists, other=0.0).to(tl.float32)
    x_new = (x_tile.to(tl.float32) + gate_row * y_tile.to(tl.float32)).to(x_out.dtype.element_ty)
    tl.store(x_out + out_places, x_new, mask=mask)
    if NORM:
        x_hat, row_mean, row_rstd = normalize(x_new.to(tl.float32), exists, eps, C)
        shift_row = tl.load(shift + sample.to(tl.int64) * stride_shift + place, mask=exists).to(tl.float32)
        scale_row = tl.load(scale + sample.to(tl.int64) * stride_scale + place, mask=exists).to(tl.float32)
        result = x_hat * (1.0 + scale_row) + shift_row
        tl.store(out + out_places, result.to(out.dtype.element_ty), mask=mask)
        statistics = (sample.to(tl.int64) * N + row)[:, None, None]
        tl.store(mean + statistics, row_mean, mask=(row < N)[:, None, None])
        tl.store(rstd + statistics, row_rstd, mask=(row < N)[:, None, None])


@triton.jit
def backward(
    grad_x_out, grad_out, x_out, y, gate, scale, mean, rstd, grad_x, grad_y, partials,
    stride_xb, stride_xn, stride_gb, stride_gn, stride_yb, stride_yn, stride_gate, stride_scale,
    N, rows_per_program,
    C: tl.constexpr, NORM: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx (with NORM; without, it is grad_x_out), dy, and the partials (1 or 3, B, programs a sample, C) of dgate,
    dshift and dscale. x_out is contiguous; stride_x belongs to grad_x_out."""
    programs = tl.cdiv(N, rows_per_program)
    sample = tl.program_id(0) // programs
    first = tl.program_id(0) % programs * rows_per_program
    last = tl.minimum(first + rows_per_program, N)
    place, exists = channels_of_row(C, 1, BLOCK_C)
    gate_row = tl.load(gate + sample.to(tl.int64) * stride_gate + place, mask=exists, other=0.0).to(tl.float32)
    if NORM:
        scale_places = scale + sample.to(tl.int64) * stride_scale + place
        scale_row = tl.load(scale_places, mask=exists, other=0.0).to(tl.float32)

    gate_sum = tl.zeros((1, 1, BLOCK_C), tl.float32)
    shift_sum = tl.zeros((1, 1, BLOCK_C), tl.float32)
    scale_sum = tl.zeros((1, 1, BLOCK_C), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        row_exists = (row < last)[:, None, None]
        mask = row_exists & exists
        out_places = row_starts(sample, row, sample_stride(N, C), C, ALIGN) + place
        grad_x_places = row_starts(sample, row, stride_xb, stride_xn, ALIGN) + place
        dx = tl.load(grad_x_out + grad_x_places, mask=mask, other=0.0).to(tl.float32)
        y_places = row_starts(sample, row, stride_yb, stride_yn, ALIGN) + place
        y_tile = tl.load(y + y_places, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            statistics = (sample.to(tl.int64) * N + row)[:, None, None]
            row_mean = tl.load(mean + statistics, mask=row_exists, other=0.0)
            row_rstd = tl.load(rstd + statistics, mask=row_exists, other=0.0)
            x_tile = tl.load(x_out + out_places, mask=mask, other=0.0).to(tl.float32)
            grad_places = row_starts(sample, row, stride_gb, stride_gn, ALIGN) + place
            grad_tile = tl.load(grad_out + grad_places, mask=mask, other=0.0).to(tl.float32)
            norm_dx, x_hat = normalize_backward(grad_tile, x_tile, row_mean, row_rstd, scale_row, exists, C)
            dx += norm_dx
            shift_sum += tl.sum(grad_tile, axis=0, keep_dims=True)
            scale_sum += tl.sum(grad_tile * x_hat, axis=0, keep_dims=True)
            tl.store(grad_x + out_places, dx.to(grad_x.dtype.element_ty), mask=mask)
        gate_sum += tl.sum(dx * y_tile, axis=0, keep_dims=True)
        tl.store(grad_y + out_places, (gate_row * dx).to(grad_y.dtype.element_ty), mask=mask)

    partial = tl.program_id(0).to(tl.int64) * C + place
    quantity = tl.num_programs(0).to(tl.int64) * C
    tl.store(partials + partial, gate_sum, mask=exists)
    if NORM:
        tl.store(partials + quantity + partial, shift_sum, mask=exists)
        tl.store(partials + 2 * quantity + partial, scale_sum, mask=exists)
