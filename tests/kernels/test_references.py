"""The references against formulas written another way: loops over tokens, in float64."""

import itertools
import math

import pytest
import torch
from released import fixture

import edt_kernels
from edt_kernels import reference
from edt_kernels.amm_attention.reference import expand_offset_table

GRIDS = [(4, 4), (2, 6), (6, 2), (1, 1), (3, 5)]
EVEN_GRIDS = [(4, 4), (2, 6), (6, 2), (2, 2)]


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_same(actual, expected, inputs):
    """Equal values, and equal gradients for every input, in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def normalized(vector, eps):
    centered = vector - vector.sum() / vector.numel()
    return centered / torch.sqrt((centered * centered).sum() / vector.numel() + eps)


def plain_adaln(x, shift, scale, eps):
    rows = [[normalized(token, eps) * (1 + scale[b]) + shift[b] for token in x[b]] for b in range(len(x))]
    return torch.stack([torch.stack(tokens) for tokens in rows])


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_adaln(eps):
    x, shift, scale = inputs = [randn(2, 5, 12), randn(2, 12), randn(2, 12)]
    for tensor in inputs:
        tensor.requires_grad_()
    assert_same(reference.adaln(x, shift, scale, eps=eps), plain_adaln(x, shift, scale, eps), inputs)


def test_gated_residual():
    x, y, gate = inputs = [randn(2, 5, 12), randn(2, 5, 12), randn(2, 12)]
    for tensor in inputs:
        tensor.requires_grad_()
    assert_same(reference.gated_residual(x, y, gate), x + torch.einsum("bnc,bc->bnc", y, gate), inputs)


def test_gated_residual_adaln():
    x, y, gate, shift, scale = inputs = [
        randn(2, 5, 12),
        randn(2, 5, 12),
        randn(2, 12),
        randn(2, 12),
        randn(2, 12),
    ]
    for tensor in inputs:
        tensor.requires_grad_()
    actual = torch.cat(reference.gated_residual_adaln(x, y, gate, shift, scale))
    updated = x + torch.einsum("bnc,bc->bnc", y, gate)
    assert_same(actual, torch.cat([updated, plain_adaln(updated, shift, scale, 1e-6)]), inputs)


@pytest.mark.parametrize("grid", EVEN_GRIDS)
@pytest.mark.parametrize("masked", [False, True])
def test_token_merge_adaln(grid, masked):
    (H, W), B, C = grid, 2, 3
    x, shift, scale = inputs = [randn(B, H * W, C), randn(B, 4 * C), randn(B, 4 * C)]
    for tensor in inputs:
        tensor.requires_grad_()
    keep = torch.rand(B, H * W) < 0.6 if masked else None
    rows = []
    for b, y, column in itertools.product(range(B), range(0, H, 2), range(0, W, 2)):
        # Offsets (row, column) in the released order: down before right.
        tokens = [(y + dy) * W + column + dx for dy, dx in ((0, 0), (1, 0), (0, 1), (1, 1))]
        row = normalized(torch.cat([x[b, n] for n in tokens]), 1e-6) * (1 + scale[b]) + shift[b]
        if masked:
            row = torch.cat([part * keep[b, n] for part, n in zip(row.split(C), tokens, strict=True)])
        rows.append(row)
    expected = torch.stack(rows).view(B, H * W // 4, 4 * C)
    assert_same(reference.token_merge_adaln(x, shift, scale, grid=grid, keep=keep), expected, inputs)


@pytest.mark.parametrize("grid", GRIDS)
def test_token_split_concat_adaln(grid):
    (H, W), B, C = grid, 2, 3
    x, skip, shift, scale = inputs = [randn(B, H * W, 4 * C), randn(B, 4 * H * W, C), *randn(2, B, 2 * C)]
    for tensor in inputs:
        tensor.requires_grad_()
    rows = []
    for b, y, column in itertools.product(range(B), range(2 * H), range(2 * W)):
        source = x[b, (y // 2) * W + column // 2]
        part = 2 * (y % 2) + column % 2
        row = torch.cat([source[part * C : (part + 1) * C], skip[b, y * 2 * W + column]])
        rows.append(normalized(row, 1e-6) * (1 + scale[b]) + shift[b])
    expected = torch.stack(rows).view(B, 4 * H * W, 2 * C)
    assert_same(reference.token_split_concat_adaln(x, skip, shift, scale, grid=grid), expected, inputs)


def test_split_is_not_the_inverse_of_merge():
    """The released order of a merge's four slices is down before right, of a split's right before down."""
    x, zero = torch.arange(4.0).view(1, 4, 1).expand(1, 4, 8), torch.zeros(1, 32)
    merged = reference.token_merge_adaln(x, zero, zero, grid=(2, 2))
    order = merged.view(4, 8)[:, 0].argsort()
    assert order.tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("op", ["adaln", "gated_residual_adaln", "token_merge_adaln"])
def test_output_dtypes(op):
    x, y = randn(2, 4, 8, dtype=torch.float32), randn(2, 4, 8, dtype=torch.bfloat16)
    vector = {"adaln": 8, "gated_residual_adaln": 8, "token_merge_adaln": 32}[op]
    shift, scale = randn(2, 2, vector, dtype=torch.bfloat16)
    call = {
        "adaln": lambda **kwargs: reference.adaln(x, shift, scale, **kwargs),
        "gated_residual_adaln": lambda **kwargs: reference.gated_residual_adaln(
            x, y, shift, shift, scale, **kwargs
        ),
        "token_merge_adaln": lambda **kwargs: reference.token_merge_adaln(x, shift, scale, grid=(2, 2), **kwargs),
    }[op]

    def normed(**kwargs):
        result = call(**kwargs)
        if op != "gated_residual_adaln":
            return result
        assert result[0].dtype == torch.float32  # the residual stream keeps its dtype
        return result[1]

    assert normed().dtype == (torch.bfloat16 if op == "gated_residual_adaln" else torch.float32)  # the branch's
    assert normed(out_dtype=torch.float16).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert normed().dtype == torch.bfloat16


def test_statistics_are_float32_in_half_precision():
    x = (300 + randn(1, 4, 1024, dtype=torch.float32)).half()  # squares overflow float16
    zero = torch.zeros(1, 1024, dtype=torch.float16)
    expected = plain_adaln(x.double(), zero.double(), zero.double(), 1e-6)
    torch.testing.assert_close(reference.adaln(x, zero, zero).double(), expected, rtol=1e-3, atol=1e-3)


def plain_attention(q, k, v, grid, modulation=None, rel_pos_bias=None, scale=None, extra=(0, 0)):
    """One query and key at a time."""
    (H, W), (before, _) = grid, extra
    B, N, heads, D = q.shape
    scale = 1 / math.sqrt(D) if scale is None else scale

    def offset(i, j):
        i, j = i - before, j - before
        if min(i, j) < 0 or max(i, j) >= H * W:
            return None
        return i // W - j // W + H - 1, i % W - j % W + W - 1

    out = []
    for b, i, h in itertools.product(range(B), range(N), range(heads)):
        logits, factors = [], []
        for j in range(N):
            logit, factor, delta = (
                (q[b, i, h] * k[b, j, h]).sum() * scale,
                torch.ones((), dtype=q.dtype),
                offset(i, j),
            )
            if delta is not None and rel_pos_bias is not None:
                logit = logit + rel_pos_bias[delta[0] * (2 * W - 1) + delta[1], h]
            if delta is not None and modulation is not None:
                factor = modulation[delta] if modulation.ndim == 2 else modulation[h][delta]
            logits.append(logit)
            factors.append(factor)
        weights = torch.stack(logits).exp()
        weights = weights / weights.sum() * torch.stack(factors)
        out.append((weights[:, None] * v[b, :, h]).sum(0))
    return torch.stack(out).view(B, N, heads, D)


CASES = {
    "no tables": {"grid": (2, 3)},
    "bias": {"grid": (3, 2), "bias": True},
    "modulation": {"grid": (2, 3), "modulation": "shared"},
    "both": {"grid": (3, 3), "bias": True, "modulation": "shared"},
    "per head": {"grid": (2, 4), "bias": True, "modulation": "per head"},
    "extra tokens": {"grid": (2, 3), "bias": True, "modulation": "shared", "extra": (2, 1)},
    "extra, per head": {"grid": (3, 2), "modulation": "per head", "extra": (0, 3)},
    "extra, bias": {"grid": (3, 2), "bias": True, "extra": (1, 0)},
    "one token": {"grid": (1, 1), "bias": True, "modulation": "shared"},
    "a row": {"grid": (1, 7), "bias": True, "modulation": "shared"},
    "scale": {"grid": (2, 2), "bias": True, "scale": 0.3},
    "strided": {"grid": (2, 3), "bias": True, "modulation": "shared", "strided": True},
}


@pytest.mark.parametrize("name", CASES)
def test_amm_attention(name):
    case = CASES[name]
    (H, W), extra, B, heads, D = case["grid"], case.get("extra", (0, 0)), 2, 2, 4
    N, offsets = H * W + sum(extra), (2 * H - 1, 2 * W - 1)
    if case.get("strided"):
        packed = randn(B, N, 3 * heads * D).requires_grad_()
        q, k, v = packed.view(B, N, 3, heads, D).unbind(2)
        inputs = [packed]
    else:
        q, k, v = inputs = [randn(B, N, heads, D).requires_grad_() for _ in range(3)]
    tables = {}
    if case.get("bias"):
        tables["rel_pos_bias"] = randn(math.prod(offsets), heads).requires_grad_()
    if case.get("modulation"):
        shape = offsets if case["modulation"] == "shared" else (heads, *offsets)
        tables["modulation"] = randn(*shape).requires_grad_()
    inputs += tables.values()
    arguments = {"grid": (H, W), "scale": case.get("scale"), **tables}
    expected = plain_attention(q, k, v, **arguments, extra=extra)
    assert_same(reference.amm_attention(q, k, v, **arguments, num_extra_tokens=extra), expected, inputs)
    with torch.no_grad():  # a path of its own on a CPU
        actual = edt_kernels.amm_attention(q, k, v, **arguments, num_extra_tokens=extra)
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inference", [False, True])
def test_amm_attention_keeps_its_dtype(dtype, inference):
    q, k, v = randn(3, 2, 6, 2, 8, dtype=torch.float32).to(dtype)
    bias = randn(15, 2, dtype=torch.float32)
    with torch.inference_mode(inference):
        out = edt_kernels.amm_attention(q, k, v, grid=(2, 3), rel_pos_bias=bias)
    assert out.dtype == dtype
    expected = reference.amm_attention(q.double(), k.double(), v.double(), grid=(2, 3), rel_pos_bias=bias.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_attention_under_autocast():
    q, k, v = randn(3, 2, 6, 2, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = edt_kernels.amm_attention(q, k, v, grid=(2, 3))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["exp_cos", "cos"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("radius", [None, 0.0, 1.5, 100.0])
def test_amm_table(form, grid, radius):
    H, W = grid
    table = edt_kernels.amm_table(grid, form=form, radius=radius, dtype=torch.float64)
    farthest = math.dist((0, 0), (H - 1, W - 1)) or 1.0
    squared_radius = (max(grid) - 1) ** 2 + 4 if radius is None else radius**2
    for dy, dx in itertools.product(range(1 - H, H), range(1 - W, W)):
        gain = math.cos(math.pi / 2 * math.hypot(dy, dx) / farthest)
        gain = 0.5 * math.exp(gain) if form == "exp_cos" else 1.3 * gain
        expected = gain if dy * dy + dx * dx <= squared_radius else 0.0
        assert table[dy + H - 1, dx + W - 1].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["m256.4", "m256.8", "m256.16", "m512.4", "m512.8"])
def test_amm_table_gives_the_released_matrices(name):
    n = int(name.split(".")[1])
    form = "exp_cos" if name.startswith("m256") else "cos"
    table = edt_kernels.amm_table((n, n), form=form)
    released = fixture("amm_matrices")[name]
    by_token = (
        torch.stack(
            [table[i // n - j // n + n - 1, i % n - j % n + n - 1] for i in range(n * n) for j in range(n * n)]
        )
        if n < 16
        else expand_offset_table(table, (n, n), (0, 0), 0.0).flatten()
    )
    torch.testing.assert_close(by_token.view_as(released), released, rtol=0, atol=1e-6)


def test_published_amm_figures():
    table = edt_kernels.amm_table((16, 16))
    matrix = expand_offset_table(table, (16, 16), (0, 0), 0.0)
    assert matrix.max().item() == pytest.approx(1.359, abs=5e-4)
    assert matrix[matrix > 0].min().item() == pytest.approx(0.773, abs=5e-4)
    assert (matrix > 0).float().mean().item() == pytest.approx(0.957, abs=5e-4)


def test_amm_table_dtype():
    assert edt_kernels.amm_table((2, 2)).dtype == torch.float32
    assert edt_kernels.amm_table((2, 2), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_16_bit_arguments_are_added_up_in_float32(dtype):
    """Each is a sum over up to 1024 tokens or pairs of them, of one sign here. Added up in its own dtype, that of
    the modulation was 18 % off in bfloat16; rounded once, none is off by a rounding step."""
    grid, N, C = (32, 32), 32 * 32, 8
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(1, N, C, generator=generator).to(dtype) for _ in range(2)]
    table = torch.rand(63 * 63, 1, generator=generator).to(dtype)
    vectors = [torch.rand(1, 4 * C, generator=generator).to(dtype) for _ in range(3)]
    q, k, v = torch.rand(3, 1, N, 1, C, generator=generator).unbind(0)

    def attention(modulation, rel_pos_bias):
        qkv = (tensor.to(torch.promote_types(modulation.dtype, torch.float32)) for tensor in (q, k, v))
        return reference.amm_attention(*qkv, grid=grid, modulation=modulation, rel_pos_bias=rel_pos_bias)

    calls = {
        "amm_attention": (attention, (table.unflatten(0, (63, 63)).squeeze(-1), table)),
        "adaln": (reference.adaln, (rows[0], *(t[:, :C] for t in vectors[:2]))),
        "gated_residual": (reference.gated_residual, (*rows, vectors[0][:, :C])),
        "gated_residual_adaln": (reference.gated_residual_adaln, (*rows, *(t[:, :C] for t in vectors))),
        "token_merge_adaln": (lambda *t: reference.token_merge_adaln(*t, grid=grid), (rows[0], *vectors[:2])),
        "token_split_concat_adaln": (
            lambda *t: reference.token_split_concat_adaln(*t, grid=(16, 16)),
            (rows[0].reshape(1, N // 4, 4 * C), rows[1], *(t[:, : 2 * C] for t in vectors[:2])),
        ),
    }
    for op, (function, tensors) in calls.items():
        grads = []
        for cast in (dtype, torch.float64):
            leaves = [tensor.detach().to(cast).requires_grad_() for tensor in tensors]
            out = function(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            grads.append(torch.autograd.grad(out, leaves, [torch.ones_like(t) for t in out]))
        for number, (grad, exact) in enumerate(zip(*grads, strict=True)):
            if exact.norm() > 1e-6 * N:  # LayerNorm has no gradient along ones
                error = (grad.double() - exact).norm() / exact.norm()
                assert error <= torch.finfo(dtype).eps, f"{op}, argument {number}: {error:.1e}"
