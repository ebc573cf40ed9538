"""The modules of `edt_kernels.nn`: equal to the op calls they stand for, and what their arguments promise."""

import copy
import pickle
import re

import pytest
import torch

import edt_kernels
from edt_kernels.nn import AdaLN, AMMAttention, GatedResidualAdaLN, TokenMerge, TokenSplitConcat

GRID, N, C, HEADS = (4, 6), 24, 32, 4


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(num_tokens=N, heads=HEADS):
    return randn(2, num_tokens, 3, heads, 8).unbind(2)


NORMS = {
    "AdaLN": (AdaLN, "adaln", (), [(2, N, C), (2, C), (2, C)]),
    "GatedResidualAdaLN": (
        GatedResidualAdaLN, "gated_residual_adaln", (), [(2, N, C), (2, N, C), (2, C), (2, C), (2, C)],
    ),
    "TokenMerge": (TokenMerge, "token_merge_adaln", (GRID,), [(2, N, C), (2, 4 * C), (2, 4 * C)]),
    "TokenSplitConcat": (
        TokenSplitConcat, "token_split_concat_adaln", (GRID,),
        [(2, N, 4 * C), (2, 4 * N, C), (2, 2 * C), (2, 2 * C)],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, options) for name in NORMS for options in ({}, {"eps": 0.5})),
        *((name, {"out_dtype": torch.bfloat16}) for name in NORMS if name != "TokenSplitConcat"),
    ],
    ids=str,
)
def test_norms_are_their_ops(name, options):
    module, op, grid, shapes = NORMS[name]
    inputs = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    actual = module(*grid, **options)(*inputs)
    expected = getattr(edt_kernels, op)(*inputs, **({"grid": grid[0]} if grid else {}), **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not module(*grid).state_dict()


def test_merge_passes_the_mask_on():
    x, shift, scale = randn(2, N, C), randn(2, 4 * C), randn(2, 4 * C)
    keep = randn(2, N) > 0
    merged = TokenMerge(GRID)(x, shift, scale, keep)
    assert torch.equal(merged, edt_kernels.token_merge_adaln(x, shift, scale, grid=GRID, keep=keep))
    assert not torch.equal(merged, TokenMerge(GRID)(x, shift, scale))


def expected_attention(module, modulated, *tensors):
    return edt_kernels.amm_attention(
        *tensors,
        grid=module.grid,
        modulation=edt_kernels.amm_table(module.grid, form=module.form, radius=module.radius)
        if modulated
        else None,
        rel_pos_bias=module.rel_pos_bias,
        scale=module.scale,
        num_extra_tokens=module.num_extra_tokens,
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"rel_pos_bias": False}, {"form": "cos"}, {"radius": 2.0}, {"scale": 0.3}, {"num_extra_tokens": (1, 2)}],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("amm", ["never", "inference", "always"])
def test_attention_is_its_op(amm, training, options):
    module = AMMAttention(GRID, HEADS, amm=amm, **options).train(training)
    tensors = qkv(N + sum(module.num_extra_tokens))
    modulated = amm == "always" or (amm == "inference" and not training)
    actual = module(*tensors)
    assert torch.equal(actual, expected_attention(module, modulated, *tensors))
    assert not torch.equal(actual, expected_attention(module, not modulated, *tensors))


def test_amm_can_be_set_later():
    module, tensors = AMMAttention(GRID, HEADS).eval(), qkv()
    assert module.amm == "inference"
    on = module(*tensors)
    module.amm = "never"
    off = module(*tensors)
    module.train().amm = "always"
    assert torch.equal(module(*tensors), on)
    assert not torch.equal(off, on)


@pytest.mark.parametrize(("table", "shape"), [("learned", (7, 11)), ("learned_per_head", (HEADS, 7, 11))])
def test_learned_table(table, shape):
    module, tensors = AMMAttention(GRID, HEADS, amm="always", table=table), qkv()
    assert list(module.state_dict()) == ["rel_pos_bias", "modulation"]
    assert torch.equal(module.modulation, edt_kernels.amm_table(GRID).expand(shape))
    assert torch.equal(module(*tensors), expected_attention(module, True, *tensors))
    module(*tensors).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    assert module.modulation.grad.shape == shape
    module.amm = "never"
    assert torch.equal(module(*tensors), expected_attention(module, False, *tensors))


def test_initial_values_and_reset():
    module = AMMAttention((16, 16), 24, table="learned", amm="always")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7.0)
    module.reset_parameters()
    bias = module.rel_pos_bias
    assert bias.shape == (31 * 31, 24)
    assert bias.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(bias.mean().item()) < 1e-3
    assert torch.equal(module.modulation, edt_kernels.amm_table((16, 16)))


def test_the_fixed_table_survives_meta_and_low_precision():
    """It is in no state dict, so nothing may lose it."""
    with torch.device("meta"):
        module = AMMAttention(GRID, HEADS, form="cos")
    assert not list(module.buffers())
    assert torch.equal(module.modulation, edt_kernels.amm_table(GRID, form="cos"))
    module = module.to_empty(device="cpu").bfloat16().float()
    assert torch.equal(module.modulation, edt_kernels.amm_table(GRID, form="cos"))
    module.reset_parameters()
    assert torch.equal(module.modulation, edt_kernels.amm_table(GRID, form="cos"))
    assert 0.01 < module.rel_pos_bias.std() < 0.03


def test_state_dict_has_what_is_learned():
    assert list(AMMAttention(GRID, HEADS).state_dict()) == ["rel_pos_bias"]
    assert not AMMAttention(GRID, HEADS, rel_pos_bias=False).state_dict()
    module, other = AMMAttention(GRID, HEADS), AMMAttention(GRID, HEADS)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(*qkv()), other.eval()(*qkv()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(duplicate):
    module = AMMAttention(GRID, HEADS, amm="always", form="cos", radius=3)
    copied = duplicate(module)
    assert repr(copied) == repr(module)
    assert torch.equal(copied(*qkv()), module(*qkv()))
    copied.amm = "never"
    assert module.amm == "always"
    assert repr(duplicate(AdaLN(eps=1e-3, out_dtype=torch.float16))) == "AdaLN(eps=0.001, out_dtype=torch.float16)"


def test_dtype_conversion_and_autocast():
    module = AMMAttention(GRID, HEADS, amm="always").bfloat16()
    assert module(*(tensor.bfloat16() for tensor in qkv())).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert AMMAttention(GRID, HEADS)(*qkv()).dtype == torch.bfloat16
        assert AdaLN()(randn(2, N, C), randn(2, C), randn(2, C)).dtype == torch.bfloat16


def test_compiles_without_graph_breaks():
    module, tensors = AMMAttention(GRID, HEADS), qkv()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        module.train(training)
        torch.testing.assert_close(compiled(*tensors), module(*tensors))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            AMMAttention(GRID, HEADS),
            "AMMAttention(grid=(4, 6), num_heads=4, amm='inference', table='fixed', form='exp_cos')",
        ),
        (
            AMMAttention([4, 6], HEADS, rel_pos_bias=False, amm="always", table="learned", form="cos", radius=3,
                         scale=0.5, num_extra_tokens=(1, 0)),
            "AMMAttention(grid=(4, 6), num_heads=4, rel_pos_bias=False, amm='always', table='learned', "
            "form='cos', radius=3, scale=0.5, num_extra_tokens=(1, 0))",
        ),
        (AdaLN(), "AdaLN(eps=1e-06)"),
        (GatedResidualAdaLN(out_dtype=torch.bfloat16), "GatedResidualAdaLN(eps=1e-06, out_dtype=torch.bfloat16)"),
        (TokenMerge(GRID, eps=1e-5), "TokenMerge(grid=(4, 6), eps=1e-05)"),
        (TokenSplitConcat(GRID), "TokenSplitConcat(grid=(4, 6), eps=1e-06)"),
    ],
)  # fmt: skip
def test_repr(module, text):
    assert repr(module) == text


def build(module, *args, **kwargs):
    return lambda: module(*args, **kwargs)


def set_amm(value, **kwargs):
    return lambda: setattr(AMMAttention(GRID, HEADS, **kwargs), "amm", value)


CHOICES = "must be one of 'never', 'inference', 'always'"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (build(AMMAttention, 4, HEADS), TypeError, r"grid is 4; it must be a pair of integers \(H, W\)"),
        (build(AMMAttention, (4, 0), HEADS), ValueError, r"grid is \(4, 0\); both sides must be at least 1"),
        (build(AMMAttention, (10**400, 2), HEADS), ValueError, r"grid is \(10+… .*; both sides must be"),
        (build(AMMAttention, (10**6, 10**6), HEADS), ValueError, r"grid is \(1000000, 1000000\); a table of its"),
        (build(AMMAttention, GRID, 10**400), ValueError, r"num_heads is an integer of 1329 bits; tables"),
        (build(AMMAttention, GRID, 4.0), TypeError, r"num_heads is 4\.0; it must be an integer"),
        (build(AMMAttention, GRID, 0), ValueError, r"num_heads is 0; it must be at least 1"),
        (build(AMMAttention, GRID, 4, rel_pos_bias=randn(1)), TypeError, "rel_pos_bias is a Tensor; it must"),
        (build(AMMAttention, GRID, 4, amm="training"), ValueError, f"amm is 'training'; it {CHOICES}"),
        (build(AMMAttention, GRID, 4, amm=None), ValueError, f"amm is None; it {CHOICES}"),
        (build(AMMAttention, GRID, 4, amm=["never"]), ValueError, r"amm is \['never'\]; it"),
        (set_amm(True), ValueError, f"amm is True; it {CHOICES}"),
        (set_amm("inference", amm="always", table="learned"), ValueError, "'inference' with table 'learned'; "),
        (build(AMMAttention, GRID, 4, table="learned"), ValueError, "a learned table must apply in training too"),
        (build(AMMAttention, GRID, 4, table="free"), ValueError, "table is 'free'; .* 'fixed', 'learned'"),
        (build(AMMAttention, GRID, 4, form="sine"), ValueError, "form is 'sine'; it must be 'exp_cos' or 'cos'"),
        (build(AMMAttention, GRID, 4, radius=-1), ValueError, "radius is -1; it must be finite and not negative"),
        (build(AMMAttention, GRID, 4, scale="1"), TypeError, "scale is a str; it must be a number or None"),
        (build(AMMAttention, GRID, 4, scale=float("nan")), ValueError, "scale is nan; it must be finite"),
        (build(AMMAttention, GRID, 4, num_extra_tokens=1), TypeError, "num_extra_tokens is 1; it must be a pair"),
        (build(AdaLN, eps=0), ValueError, "eps is 0; it must be positive and finite"),
        (build(AdaLN, out_dtype=torch.int8), TypeError, "out_dtype is torch.int8; it must be a floating-point"),
        (build(GatedResidualAdaLN, eps="small"), TypeError, "eps is a str; it must be a number"),
        (build(TokenMerge, (4, 5)), ValueError, r"grid is \(4, 5\); both sides must be even to merge 2×2 tokens"),
        (build(TokenMerge, None), TypeError, "grid is None; it must be a pair"),
        (build(TokenSplitConcat, (4, -2)), ValueError, r"grid is \(4, -2\); both sides must be at least 1"),
        (lambda: AMMAttention(GRID, 3)(*qkv()), ValueError, r"rel_pos_bias has shape .* needs \(77, 4\)"),
        (lambda: AMMAttention(GRID, HEADS)(*qkv(16)), ValueError, r"grid \(4, 6\) .* 24 tokens, but q has 16"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_package_lists_the_modules():
    assert "nn" in edt_kernels.__all__
    for name in edt_kernels.nn.__all__:
        assert issubclass(getattr(edt_kernels.nn, name), torch.nn.Module)


def python_examples(text):
    return [re.sub(r"(?m)^ {4}", "", block) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("name", edt_kernels.nn.__all__)
def test_docstring_example_runs_and_its_shapes_are_true(name):
    [example] = python_examples(getattr(edt_kernels.nn, name).__doc__)
    variables = {"torch": torch, **vars(edt_kernels.nn)}
    exec(example, variables)
    stated = re.findall(r"(?m)^(\w+)(?:, (\w+))? = .*# (?:both )?(\(\d.*?\))", example)
    assert stated
    for first, second, shape in stated:
        assert {str(tuple(variables[each].shape)) for each in (first, second) if each} == {shape}
