"""Attention whose probabilities are multiplied, after softmax, by a table of token offsets."""

import math

import torch
from torch import Tensor

from .. import _checks
from .._backend import checked, select_backend, triton
from .._tracing import signature
from . import reference

if triton is not None:
    from . import autograd

_MAX_HEAD_DIM = 128  # of the Triton kernels
_MAX_TABLE = 2**26  # entries: 4096×4096 tokens; made in float64, they take up to 3 GB


def amm_table(
    grid: tuple[int, int], *, form: str = "exp_cos", radius: float | None = None,
    dtype: torch.dtype = torch.float32, device: torch.device | str | None = None,
) -> Tensor:  # fmt: skip
    """m[Δy, Δx] = ½·exp(cos(f·d)) (`"exp_cos"`) or 1.3·cos(f·d) (`"cos"`) for d ≤ radius, else 0.

    d is the Euclidean distance of two tokens of an H×W grid in token steps, f = π/(2·d_max) with d_max the
    diagonal of the grid. The default radius is the published R = √((max(H, W)−1)² + 4).

    Args:
        grid: (H, W).
        form: "exp_cos", which EDT uses at 256², or "cos", which it uses at 512².
        radius: the distance, in token steps, beyond which the factor is 0.
        dtype, device: of the result; it is computed in float64.

    Returns:
        (2H−1, 2W−1), entry [y_i − y_j + H−1, x_i − x_j + W−1] for query i and key j.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or range, by its name.

    Source: EDT (arXiv 2410.23788), section 3.2, in the form of the released implementation.
    """
    H, W = _checks.check_grid(grid)
    entries = (2 * H - 1) * (2 * W - 1)
    if entries > _MAX_TABLE:
        raise ValueError(f"grid is {(H, W)}; its table would have {entries} entries, of at most {_MAX_TABLE}")
    if not isinstance(form, str) or form not in ("exp_cos", "cos"):
        raise ValueError(f"form is {_checks.shown(form)}; it must be 'exp_cos' or 'cos'")
    if radius is not None:
        given, radius = radius, _checks.check_number("radius", radius, "a number or None")
        if not (math.isfinite(radius) and radius >= 0):
            raise ValueError(f"radius is {_checks.shown(given)}; it must be finite and not negative")
    if dtype is None:
        raise TypeError("dtype is None; it must be a floating-point torch.dtype")
    _checks.check_out_dtype(dtype, "dtype")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch has one class for each of its reasons
        raise ValueError(
            f"device is {_checks.shown(device)}; it must be one that torch has here: {error}"
        ) from error
    dy = torch.arange(1 - H, H, dtype=torch.float64, device=device)[:, None]
    dx = torch.arange(1 - W, W, dtype=torch.float64, device=device)[None, :]
    squared_distance = dy**2 + dx**2  # exact: integers in float64
    squared_radius = (max(H, W) - 1) ** 2 + 4 if radius is None else radius * radius
    diagonal = max(math.hypot(H - 1, W - 1), 1e-9)  # a 1×1 grid has only the distance 0
    cosine = torch.cos(math.pi / (2 * diagonal) * squared_distance.sqrt())
    gain = 0.5 * torch.exp(cosine) if form == "exp_cos" else 1.3 * cosine
    return torch.where(squared_distance <= squared_radius, gain, 0.0).to(dtype)


def amm_attention(
    q: Tensor, k: Tensor, v: Tensor, *, grid: tuple[int, int], modulation: Tensor | None = None,
    rel_pos_bias: Tensor | None = None, scale: float | None = None, num_extra_tokens: tuple[int, int] = (0, 0),
) -> Tensor:  # fmt: skip
    """softmax(q·kᵀ·scale + bias[Δ]) ⊙ m[Δ] · v, not renormalised, over the tokens of an H×W grid.

    Δ = (y_i − y_j, x_i − x_j) for query i and key j, in row-major token order. Gradients flow to all tensors;
    those of the Triton path are deterministic and cannot be differentiated again.

    Args:
        q, k, v: (B, N, heads, D), N = before + H·W + after, of one dtype: float32, bfloat16 or float16
            (the reference path takes float64 too). Any strides; a view with a dense last dimension, such
            as a slice of a packed projection, is read in place. D ≤ 128 for the Triton kernels.
            `t.transpose(1, 2)` makes it of `scaled_dot_product_attention`'s (B, heads, N, D), and back.
            Under autocast they are cast to its dtype, except float64.
        grid: (H, W).
        modulation: m, (2H−1, 2W−1) or (heads, 2H−1, 2W−1), any of the floating dtypes; `amm_table` makes one.
            None is a factor of 1.
        rel_pos_bias: ((2H−1)·(2W−1), heads), row (Δy+H−1)·(2W−1) + (Δx+W−1). None is a bias of 0.
        scale: of the logits; D^−½ by default.
        num_extra_tokens: tokens (before, after) the grid: text, class or register tokens. Pairs with one of
            them have bias 0 and modulation 1.

    Returns:
        (B, N, heads, D) in q's dtype. Softmax and modulation are in float32, on the Triton path logits and
        accumulation too (the reference leaves them to `torch.matmul` in q's dtype). For backward the Triton path
        keeps q, k, v, the tables, the output and one float32 per query row and head (two for float32 inputs).
        Nothing of size N×N is written to device memory but, up to 256 tokens, the tables of each head, for the
        time of the call: in float16 for 16-bit inputs (entries beyond ±65504 become that). Where one key takes
        nearly all of a row longer than a tile, the gradients of q, k and bias cancel down to the rounding of the
        output. A row whose bias is −∞ everywhere is 0 (NaN in the reference), its gradients are NaN.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range, by its name.
        RuntimeError: if the Triton backend was asked for where it cannot run.

    Source: EDT (arXiv 2410.23788), sections 3.2 and A.3; online softmax as in FlashAttention-2 (arXiv 2307.08691).
    """
    autocast_dtype = _checks.enabled_autocast_dtype(q)
    if autocast_dtype is not None:  # float64 stays what it is, as in PyTorch's own ops
        is_cast = [isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 for t in (q, k, v)]
        q, k, v = (t.to(autocast_dtype) if cast else t for t, cast in zip((q, k, v), is_cast))
    tensors = q, k, v, modulation, rel_pos_bias
    known = signature(*tensors)
    backend = checked(_check, known, tensors, grid, scale, num_extra_tokens)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if backend == "reference":
        return reference.amm_attention(
            q, k, v, grid=grid, modulation=modulation, rel_pos_bias=rel_pos_bias, scale=factor,
            num_extra_tokens=num_extra_tokens,
        )  # fmt: skip
    return autograd.amm_attention(known, *tensors, *grid, num_extra_tokens[0], factor)


def _check(q, k, v, modulation, rel_pos_bias, grid, scale, num_extra_tokens) -> str:
    (H, W), extra = _checks.check_grid(grid), _checks.check_extra_tokens(num_extra_tokens)
    _checks.check_floating("q", q)
    if q.ndim != 4 or q.shape[3] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (B, N, heads, D), and D must be at least 1")
    _, N, heads, D = q.shape
    for name, tensor in (("k", k), ("v", v)):
        _checks.check_like(name, tensor, "q", q, tuple(q.shape))
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} is {tensor.dtype}; it must be q's dtype, {q.dtype}")
    if sum(extra) + H * W != N:
        raise ValueError(
            f"grid {(H, W)} with num_extra_tokens {extra} means {sum(extra) + H * W} tokens, but q has {N} "
            f"(shape {tuple(q.shape)}, (B, N, heads, D))"
        )
    offsets = (2 * H - 1, 2 * W - 1)
    if modulation is not None:
        _checks.check_like("modulation", modulation, "q", q, offsets, (heads, *offsets))
    if rel_pos_bias is not None:
        _checks.check_like("rel_pos_bias", rel_pos_bias, "q", q, (offsets[0] * offsets[1], heads))
    _checks.check_scale(scale)
    backend = select_backend(q=q)
    if backend == "triton" and D > _MAX_HEAD_DIM:
        raise ValueError(f"q has a head dim of {D}; the Triton kernels take up to {_MAX_HEAD_DIM}")
    return backend
