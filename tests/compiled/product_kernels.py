"""Triton kernels that validate the machine: simple enough that the result is beyond doubt."""

import triton
import triton.language as tl


@triton.jit
def softmax(x, y, n, stride, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + i, mask=i < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(values - tl.max(values, 0))
    tl.store(y + row * stride + i, (e / tl.sum(e, 0)).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def product(
    a, b, c, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c = a·b."""
    tiles = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a_mask, b_mask = (m < M)[:, None] & (k < K)[None, :], (k < K)[:, None] & (n < N)[None, :]
        a_tile = tl.load(a + m[:, None] * stride_am + k[None, :] * stride_ak, mask=a_mask, other=0.0)
        b_tile = tl.load(b + k[:, None] * stride_bk + n[None, :] * stride_bn, mask=b_mask, other=0.0)
        accumulator = tl.dot(a_tile, b_tile, accumulator, input_precision=PRECISION)
    tl.store(c + m[:, None] * stride_cm + n[None, :], accumulator, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def chained(a, b, c, out, K, M: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(a·bᵀ/4)·c, or with TRANSPOSED (a·bᵀ/4)ᵀ·a: the first product feeds the second, as in attention."""
    m, d = tl.arange(0, M), tl.arange(0, D)
    a_tile = tl.load(a + m[:, None] * D + d[None, :])
    accumulator = tl.zeros((M, D), tl.float32)
    for start in range(0, K, BLOCK):
        rows = (start + tl.arange(0, BLOCK))[:, None] * D + d[None, :]
        c_tile = tl.load(c + rows)
        p = (tl.dot(a_tile, tl.trans(tl.load(b + rows))) * 0.25).to(c_tile.dtype)
        if TRANSPOSED:
            tl.store(out + rows, tl.dot(tl.trans(p), a_tile))
        else:
            accumulator = tl.dot(p, c_tile, accumulator)
    if not TRANSPOSED:
        tl.store(out + m[:, None] * D + d[None, :], accumulator)


@triton.jit
def product_by_descriptors(a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c = a·b, of dense matrices, by the tensor memory accelerator."""
    a_tiles = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b_tiles = tl.make_tensor_descriptor(b, [K, N], [N, 1], [BLOCK_K, BLOCK_N])
    c_tiles = tl.make_tensor_descriptor(c, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        accumulator = tl.dot(a_tiles.load([m, k]), b_tiles.load([k, n]), accumulator)
    c_tiles.store([m, n], accumulator.to(c.dtype.element_ty))
