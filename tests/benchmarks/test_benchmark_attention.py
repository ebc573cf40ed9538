"""The peers of the attention suite compute what they say, and the harness finds out those that do not."""

import dataclasses
import functools

import pytest
import torch
from torch.nn.attention import SDPBackend

import edt_kernels
from benchmarks import attention, attention_peers, harness
from benchmarks.attention import AttentionCase, cases
from benchmarks.measure import Budget, Ceilings
from benchmarks.results import OURS
from benchmarks.shapes import AttentionShape

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CEILINGS = Ceilings(1e10, 1e11, "float32")
ONCE = Budget(warmup=0, repeat=0, rounds=2)
EXTRA = pytest.mark.parametrize("extra", [(0, 0), (2, 1)], ids=["grid", "extra"])
DOUBLED_KEYS = attention_peers.DoubledKeys(SDPBackend.MATH)


def tiny(extra=(0, 0), head_dim=20, **options) -> AttentionCase:
    return AttentionCase(AttentionShape("tiny", (4, 3), 2, head_dim, extra), 2, "float32", **options)


def double_inputs(case: AttentionCase) -> dict[str, torch.Tensor]:
    """In float64, with a modulation that is 0 beyond a radius: its logarithm is −∞."""
    inputs = {name: tensor.double() for name, tensor in case.make_inputs(CPU, seed=0).items()}
    if case.has_modulation:
        inputs["modulation"] = edt_kernels.amm_table(case.layer.grid, radius=2.5, dtype=torch.float64)
        assert (inputs["modulation"] == 0).any()
    return inputs


def assert_exact(implementation: harness.Implementation, case: AttentionCase) -> None:
    """Output and gradients, to 1e-10 of float64's."""
    inputs = double_inputs(case)
    computed = implementation.computes(case)
    exact, _ = harness.expected(computed, inputs)
    results = harness.build_call(implementation, computed, inputs)()
    results = implementation.restore(computed, results)
    assert results.keys() == exact.keys()
    for name in exact:
        torch.testing.assert_close(results[name], exact[name], rtol=0, atol=1e-10 * exact[name].norm().item())


def plain_attend(q, k, v, bias):
    """Output and LSE, bias (heads, N·N)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5 + bias.view(-1, *2 * q.shape[-2:-1])
    return (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1)


@EXTRA
@pytest.mark.parametrize("grad_bias", [True, False], ids=["bias", "constant bias"])
@pytest.mark.parametrize(
    "implementation",
    [attention_peers.Eager(), DOUBLED_KEYS, attention_peers.BiasSDPA(SDPBackend.MATH)],
    ids=lambda implementation: implementation.name,
)
def test_peers_are_exact(implementation, grad_bias, extra):
    assert_exact(implementation, tiny(extra, backward=True, grad_bias=grad_bias))


@EXTRA
@pytest.mark.parametrize("grad_bias", [True, False], ids=["bias", "constant bias"])
def test_two_passes_are_exact(grad_bias, extra):
    two_passes = attention_peers.FlexTwoPasses()
    two_passes.attention = functools.partial(attention_peers.two_passes, attend=plain_attend)
    assert_exact(two_passes, tiny(extra, backward=True, grad_bias=grad_bias))


@pytest.mark.parametrize("implementation", [attention_peers.Eager(), DOUBLED_KEYS], ids=["eager", "doubled"])
def test_modulation_alone(implementation):
    assert_exact(implementation, tiny(backward=True, has_bias=False))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@EXTRA
def test_flex_attention_gives_what_two_passes_need(extra):
    """Forward alone: on a CPU it has no gradients."""
    case = tiny(extra, backward=False)
    flex, bias = attention_peers.FlexTwoPasses(), attention_peers.FlexBias()
    flex.attention, bias.attention = attention_peers.flex_two_passes, attention_peers.flex_bias
    assert_exact(flex, case)
    assert_exact(bias, case)


@pytest.fixture
def _eager_compile(monkeypatch):
    """torch.compile without its code generation."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


WORKS = {
    "forward": {"backward": False},
    "with bias gradient": {"backward": True, "grad_bias": True},
    "constant bias": {"backward": True},
    "bias alone": {"backward": True, "grad_bias": True, "has_modulation": False},
    "neither": {"backward": True, "has_bias": False, "has_modulation": False},
}


@pytest.mark.usefixtures("_eager_compile")
@pytest.mark.parametrize("work", WORKS)
def test_every_implementation_runs_or_says_why_not(work):
    case = tiny(extra=(1, 0), **WORKS[work])
    rows = list(
        harness.measure_case("attention", case, attention.implementations("attention"), CPU, CEILINGS, ONCE)
    )
    for row in rows:
        assert row.status in ("ok", "unsupported"), f"{row.implementation}: {row.reason}"
        assert (row.ms is None) == bool(row.reason) == (row.status != "ok")
    ran = {row.implementation for row in rows if row.status == "ok"}
    expected = {OURS, "eager, as released", "torch.compile, dynamic=False", "SDPA flash"}
    expected |= {"doubled keys, SDPA math"} if case.has_modulation else set()
    expected |= {"SDPA with bias, math"} if case.has_bias else set()
    assert ran == expected
    assert rows[0].backend == "reference path, plain torch"


@pytest.mark.slow
def test_compiled_eager():
    case = tiny(backward=True, grad_bias=True)
    rows = list(harness.measure_case("attention", case, [attention_peers.Compiled()], CPU, CEILINGS, ONCE))
    assert rows[0].status == "ok", rows[0].reason


def roles(case: AttentionCase) -> dict[str, str]:
    found = attention.implementations("attention")
    return {implementation.name: harness.role_of(implementation, case) for implementation in found}


def test_roles():
    both = roles(tiny(backward=True, grad_bias=True))
    plain = {"SDPA flash", "SDPA cuDNN", "FlashAttention 4"}
    bounds = plain | {"SDPA with bias, cuDNN", "SDPA with bias, memory-efficient", "SDPA with bias, math"}
    bounds |= {"FlexAttention with bias"}
    assert {name for name, role in both.items() if role == "bound"} == bounds
    assert {name for name, role in both.items() if role == "ours"} == {OURS}
    bias_alone = roles(tiny(backward=True, grad_bias=True, has_modulation=False))
    assert {name for name, role in bias_alone.items() if role == "bound"} == plain
    neither = roles(tiny(backward=True, has_bias=False, has_modulation=False))
    assert "bound" not in neither.values()


def test_cudnn_takes_no_bias_that_needs_a_gradient():
    cudnn = attention_peers.BiasSDPA(SDPBackend.CUDNN_ATTENTION)
    cudnn.check(tiny(backward=True), GPU)
    with pytest.raises(harness.UnavailableError, match="gradient of the bias"):
        cudnn.check(tiny(backward=True, grad_bias=True), GPU)


@pytest.mark.filterwarnings("ignore:Flash attention kernel not used")
def test_a_backend_that_declines_is_unsupported():
    """CPU flash attention, like cuDNN on a GPU, has no gradient of the bias: pinned, SDPA does not fall back."""
    flash = attention_peers.BiasSDPA(SDPBackend.FLASH_ATTENTION)
    case = tiny(backward=True, grad_bias=True)
    row = next(harness.measure_case("attention", case, [flash], CPU, CEILINGS, ONCE))
    assert row.status == "unsupported"
    assert "flash backend does not take this" in row.reason


def test_heads_are_padded_for_sdpa_and_cropped():
    case = tiny(head_dim=52, backward=True, grad_bias=True)
    inputs = case.make_inputs(CPU, seed=0)
    prepared = DOUBLED_KEYS.prepare(case, inputs)
    assert {name: prepared[name].shape[-1] for name in ("q", "k", "v", "grad 0")} == dict.fromkeys(
        ("q", "k", "v", "grad 0"), 56
    )
    assert_exact(DOUBLED_KEYS, case)


class ModulatedBeforeSoftmax(attention.Ours):
    """A bias of log m: renormalises."""

    name = "modulation before softmax"

    def forward(self, case, inputs):
        bias = inputs["rel_pos_bias"] + inputs["modulation"].flatten().clamp(min=1e-9).log().unsqueeze(1)
        plain = dataclasses.replace(case, has_modulation=False)
        return super().forward(plain, inputs | {"rel_pos_bias": bias})


class HalfTheBiasGradient(attention.Ours):
    name = "half the gradient of the bias"

    def forward(self, case, inputs):
        table = inputs["rel_pos_bias"]
        return super().forward(case, inputs | {"rel_pos_bias": table / 2 + table.detach() / 2})


@pytest.mark.parametrize(
    ("implementation", "worst"),
    [(ModulatedBeforeSoftmax(), ""), (HalfTheBiasGradient(), "grad of rel_pos_bias")],
    ids=["output", "gradient"],
)
def test_what_is_wrong_is_not_timed(implementation, worst):
    case = tiny(backward=True, grad_bias=True)
    wrong, right = list(
        harness.measure_case("attention", case, [implementation, attention.Ours()], CPU, CEILINGS, ONCE)
    )
    assert (wrong.status, wrong.ms) == ("wrong", None)
    assert wrong.error_over_budget > 1
    assert wrong.worst in wrong.reason
    assert wrong.worst == (worst or wrong.worst)
    assert right.status == "ok"
    assert right.ms is not None


def test_a_lower_bound_is_judged_by_what_it_computes():
    """SDPA without bias, called a peer of a case with bias, is wrong."""
    flash = attention_peers.PlainSDPA(SDPBackend.FLASH_ATTENTION)
    case = tiny(backward=False)
    assert next(harness.measure_case("attention", case, [flash], CPU, CEILINGS, ONCE)).status == "ok"
    flash.computes = lambda case: case
    assert next(harness.measure_case("attention", case, [flash], CPU, CEILINGS, ONCE)).status == "wrong"


def test_inputs_are_views_of_a_packed_projection():
    case = tiny(backward=True)
    inputs = case.make_inputs(CPU, seed=0)
    assert inputs["q"].shape == (2, 12, 2, 20)
    assert inputs["q"].stride() == inputs["v"].stride() == (12 * 3 * 2 * 20, 3 * 2 * 20, 20, 1)
    assert inputs["rel_pos_bias"].dtype == torch.float32
    torch.testing.assert_close(inputs["modulation"], edt_kernels.amm_table((4, 3)))


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_cases_are_told_apart(device, quick):
    found = cases("attention", device, [], quick)
    assert len({(case.name, case.work) for case in found}) == len(found)
    assert all(case.shape["tokens"] == case.num_tokens for case in found)
    assert {case.dtype for case in found} == {"bfloat16" if device == GPU else "float32"}
    if quick:
        assert len(found) <= 11


def test_the_quick_cases_are_the_targets():
    first, second, third = cases("attention", GPU, [], quick=True)[:3]
    assert first.name == "EDT-XL/2 16x16 18x52 B256, bias and modulation"
    assert [first.work, second.work] == ["forward", "forward+backward"]
    assert (second.name, second.grad_bias) == (first.name, True)
    assert (third.name, third.work) == ("EDT-XL/2 16x16 18x52 B256, bias", "forward+backward")
    quick = cases("attention", GPU, [], quick=True)
    assert (quick[3].name, quick[3].work) == (third.name, "forward")
    assert [case.layer.grid for case in quick[7:]] == 3 * [(8, 8)] + [(32, 32)]
    assert set(quick) <= set(cases("attention", GPU, [], quick=False))


def test_the_full_cases_cover_the_sweeps():
    found = cases("attention", GPU, [], quick=False)
    sweeps = {}
    for case in found:
        sweeps.setdefault(case.sweep, set()).add((case.num_tokens, case.layer.head_dim, case.batch_size))
    assert {tokens for tokens, _, _ in sweeps["tokens"]} == {2**i for i in range(4, 13)}
    assert {tokens * batch for tokens, _, batch in sweeps["tokens"]} == {65536}
    assert {head_dim for _, head_dim, _ in sweeps["head_dim"]} == {52, 64, 72, 128}
    xl = {case.batch_size for case in found if case.layer == AttentionShape("EDT-XL/2", (16, 16), 18, 52)}
    assert xl == {1, 4, 16, 64, 256}
    assert "forward+backward, bias constant" in {case.work for case in found}
    assert {case.work for case in found if not case.has_modulation} == {"forward", "forward+backward"}


def test_mixed_is_bfloat16_here():
    assert {case.dtype for case in cases("attention", CPU, ["mixed", "bfloat16"], quick=True)} == {"bfloat16"}


def test_shapes_are_chosen_by_name():
    found = cases("attention", CPU, [], quick=False)
    chosen = harness.selected(found, ["8x8", "4X4 10"], lambda case: case.name, "shapes")
    assert {case.layer.grid for case in chosen} == {(8, 8), (4, 4)}
    assert harness.selected(found, None, lambda case: case.name, "shapes") == found
    with pytest.raises(ValueError, match="shapes is '7x7', which none of these names contains: EDT-S/2 16x16"):
        harness.selected(found, ["7x7"], lambda case: case.name, "shapes")
