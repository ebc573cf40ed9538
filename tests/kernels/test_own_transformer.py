"""The page of the ops, "In your own block": both versions as printed compute the same."""

import itertools

import torch
from pages import blocks, changed

from edt_kernels import amm_table

PARITY = 1e-5
GRID, N, C, HEADS = (3, 5), 15, 24, 2


def block_class(source: str) -> type:
    variables = {}
    exec(source, variables)
    return variables["DiTBlock"]


def ordinary_and_changed():
    """Both versions of the block, with the same weights."""
    before, after = next(
        pair for pair in itertools.pairwise(blocks("edt_kernels/README.md")) if pair[1].language == "diff"
    )
    torch.manual_seed(0)
    sources = before.text, changed(before.text, after.text)
    ordinary, fused = (block_class(source)(C, HEADS) for source in sources)
    fused.load_state_dict(ordinary.state_dict())
    return ordinary, fused


def outcome(forward, block, *more) -> dict[str, torch.Tensor]:
    """Output and gradients of inputs and weights."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x": torch.randn(2, N, C, generator=generator).requires_grad_(),
        "cond": torch.randn(2, C, generator=generator).requires_grad_(),
    }
    leaves = inputs | dict(block.named_parameters())
    out = forward(*inputs.values(), *more)
    grads = torch.autograd.grad(out, list(leaves.values()), torch.randn(out.shape, generator=generator))
    return {"output": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_equal_outcomes(actual, expected):
    for name in expected:
        assert (actual[name] - expected[name]).norm() <= PARITY * expected[name].norm(), name


def test_the_changed_block_computes_what_the_ordinary_one_does():
    ordinary, fused = ordinary_and_changed()
    assert_equal_outcomes(outcome(fused, fused, GRID), outcome(ordinary, ordinary))


def test_the_changed_block_compiles_with_and_without_amm():
    ordinary, fused = ordinary_and_changed()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_equal_outcomes(outcome(compiled, fused, GRID), outcome(ordinary, ordinary))
    table = amm_table(GRID)
    modulated = outcome(fused, fused, GRID, table)
    assert_equal_outcomes(outcome(compiled, fused, GRID, table), modulated)
    assert not torch.allclose(modulated["output"], outcome(fused, fused, GRID)["output"], rtol=1e-3)
