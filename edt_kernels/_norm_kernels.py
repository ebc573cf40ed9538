"""All norm-type ops: x' = x + gate·y, LN(x')·(1+scale)+shift, either of them or both; the gradients.

One kernel a pass, of which an op leaves out what it has not: without a gate x' is x, without a scale there is no
norm. Absent tensors and their strides are None, which the compiler sees. Notation, formulas and tiles are those of
`edt_kernels._norm`. x' is rounded to its dtype before it is normalised, so that backward, which reads x' back,
normalises the same numbers. With dx' the sum of the gradient that arrives at x' and the norm's,

    dx = dx'    dy = gate·dx'    dgate = Σ dx'·y

A row is what its SLICES say, all of them read and written where they are; nothing is shuffled in memory:

    1  a token.
    4  the merge: slice s of merged token (y, x) is token (2y + s % 2, 2x + s // 2) of a grid of width W, so slices
       run (0,0), (1,0), (0,1), (1,1) by (row, column) offset; `keep` (bytes) zeroes those of dropped tokens.
    2  the split: slice 0 of fine token (y, x) is run 2·(y % 2) + x % 2 of C channels of x's token (y // 2, x // 2)
       on a coarse grid of width W; slice 1 is the fine token of y, the skip connection.
"""

import triton
import triton.language as tl

from . import _norm as norm


@triton.jit
def merged_tokens(row, slices, W):
    """The four tokens of each merged token. (PARTS, ROWS, LANES, 1)."""
    y, x = row // (W // 2), row % (W // 2)
    return (2 * y + slices % 2) * W + 2 * x + slices // 2


@triton.jit
def coarse_tokens(row, W, C: tl.constexpr):
    """The coarse token that each fine token is a run of, and where the run starts."""
    y, x = row // (2 * W), row % (2 * W)
    return y // 2 * W + x // 2, (2 * (y % 2) + x % 2) * C


@triton.jit
def load_stream(
    x, y, sample, row, place, c, slices, mask, stride_xb, stride_xn, stride_yb, stride_yn, W,
    C: tl.constexpr, SLICES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows of x, and of y in the split."""
    if SLICES == 4:
        return norm.load_rows(x, sample, merged_tokens(row, slices, W), stride_xb, stride_xn, c, mask, ALIGN)
    elif SLICES == 2:
        token, run = coarse_tokens(row, W, C)
        tile = norm.load_rows(x, sample, token, stride_xb, stride_xn, run + c, mask & (slices == 0), ALIGN)
        return tile + norm.load_rows(y, sample, row, stride_yb, stride_yn, c, mask & (slices == 1), ALIGN)
    else:
        return norm.load_rows(x, sample, row, stride_xb, stride_xn, place, mask, ALIGN)


@triton.jit
def store_stream(
    x, y, dx, sample, row, number, place, c, slices, mask, N, W, C: tl.constexpr, SLICES: tl.constexpr
):
    """dx where `load_stream` read, in contiguous gradients."""
    if SLICES == 4:
        norm.store(x + (sample * N * 4 + merged_tokens(row, slices, W)) * C, c, dx, mask)
    elif SLICES == 2:
        token, run = coarse_tokens(row, W, C)
        norm.store(x + ((sample * (N // 4) + token) * 4 * C + run), c, dx, mask & (slices == 0))
        norm.store(y + number * C, c, dx, mask & (slices == 1))
    else:
        norm.store(x + number * C, place, dx, mask)


@triton.jit
def zero_dropped(values, keep, sample, stride_keep, token, row_exists):
    return tl.where(norm.load(keep, sample * stride_keep + token, row_exists) != 0, values, 0.0)


@triton.jit
def forward(
    x, y, gate, shift, scale, keep, x_out, out, statistics,
    stride_xb, stride_xn, stride_yb, stride_yn, stride_gate, stride_shift, stride_scale, stride_keep, N, W, eps,
    C: tl.constexpr, SLICES: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """x' into x_out (with a gate); its modulated norm into out, and its rows' statistics (with a scale). N rows a
    sample."""
    sample, first, last = norm.rows_of_program(N, ROWS)
    place, c, slices, exists = norm.channels_of_row(y if SLICES == 2 else x, C, SLICES, BLOCK_C, LANES)
    row, number, row_exists, mask = norm.rows_of_tile(sample, N, first, last, exists, ROWS)
    tile = load_stream(
        x, y, sample, row, place, c, slices, mask, stride_xb, stride_xn, stride_yb, stride_yn, W, C, SLICES, ALIGN
    )
    if gate is not None:
        y_tile = norm.load_rows(y, sample, row, stride_yb, stride_yn, place, mask, ALIGN)
        gate_row = norm.load_row(gate, sample, stride_gate, place, exists, ROWS)
        x_new = (tile + gate_row * y_tile).to(x_out.dtype.element_ty)
        norm.store(x_out + number * C, place, x_new, mask)
        tile = x_new.to(tl.float32)
    if scale is not None:
        x_hat = norm.normalize(tile, statistics, number, row_exists, exists, eps, SLICES * C)
        result = norm.modulate(x_hat, shift, scale, sample, stride_shift, stride_scale, place, exists, ROWS)
        if keep is not None:
            result = zero_dropped(result, keep, sample, stride_keep, merged_tokens(row, slices, W), row_exists)
        norm.store(out + number * (SLICES * C), place, result, mask)


@triton.jit(do_not_specialize=norm.ANY_VALUE)
def backward(
    grad_x_out, grad_out, x, y, gate, scale, keep, statistics, grad_x, grad_y, partials,
    stride_gxb, stride_gxn, stride_gb, stride_gn, stride_xb, stride_xn, stride_yb, stride_yn,
    stride_gate, stride_scale, stride_keep, N, W, rows_per_program,
    C: tl.constexpr, SLICES: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """dx (with a scale; without, it is grad_x_out), dy (with a gate, or of a split), and the partial sums of those
    that there are of dgate, dshift and dscale, in this order. x is what was normalised: x', if there is a gate."""
    sample, first, last = norm.rows_of_program(N, rows_per_program)
    stream = y if SLICES == 2 else x if scale is not None else grad_x_out
    place, c, slices, exists = norm.channels_of_row(stream, C, SLICES, BLOCK_C, LANES)
    if gate is not None:
        gate_row = norm.load_row(gate, sample, stride_gate, place, exists, ROWS)
        gate_sum = norm.zeros(place, ROWS)
    if scale is not None:
        scale_row = norm.load_row(scale, sample, stride_scale, place, exists, ROWS)
        shift_sum = norm.zeros(place, ROWS)
        scale_sum = norm.zeros(place, ROWS)
    for start in tl.range(
        first, last, ROWS, num_stages=3 if SLICES == 1 and (gate is None or scale is None) else 2
    ):
        row, number, row_exists, mask = norm.rows_of_tile(sample, N, start, last, exists, ROWS)
        if grad_x_out is not None:
            dx = norm.load_rows(grad_x_out, sample, row, stride_gxb, stride_gxn, place, mask, ALIGN)
        if scale is not None:
            tile = load_stream(
                x, y, sample, row, place, c, slices, mask, stride_xb, stride_xn, stride_yb, stride_yn, W,
                C, SLICES, ALIGN,
            )  # fmt: skip
            grad_tile = norm.load_rows(grad_out, sample, row, stride_gb, stride_gn, place, mask, ALIGN)
            if keep is not None:
                token = merged_tokens(row, slices, W)
                grad_tile = zero_dropped(grad_tile, keep, sample, stride_keep, token, row_exists)
            norm_dx, shift_sum, scale_sum = norm.differentiate(
                grad_tile, tile, scale_row, statistics, number, row_exists, shift_sum, scale_sum, SLICES * C
            )
            dx = dx + norm_dx if grad_x_out is not None else norm_dx
            store_stream(grad_x, grad_y, dx, sample, row, number, place, c, slices, mask, N, W, C, SLICES)
        if gate is not None:
            y_tile = norm.load_rows(y, sample, row, stride_yb, stride_yn, place, mask, ALIGN)
            norm.store(grad_y + number * C, place, gate_row * dx, mask)  # pyright: ignore[reportOperatorIssue]
            gate_sum += dx * y_tile
    if gate is not None:
        norm.store_sum(partials, 0, gate_sum, place, exists, C)
    if scale is not None:
        before: tl.constexpr = 0 if gate is None else 1
        norm.store_sum(partials, before, shift_sum, place, exists, SLICES * C)
        norm.store_sum(partials, before + 1, scale_sum, place, exists, SLICES * C)
