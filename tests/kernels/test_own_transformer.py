"""README's section "In your own transformer": its examples as printed."""

import re
from pathlib import Path

import diffusers
import torch
from diffusers_models import make

from edt_kernels import amm_table

PARITY = 1e-5
GRID, N, C, HEADS = (3, 5), 15, 24, 2


def blocks_of_code() -> dict[str, list[str]]:
    """Of the section, by language."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.partition("## In your own transformer\n")[2].partition("\n## ")[0]
    return {
        language: re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL) for language in ("python", "diff")
    }


def changed(source: str, diff: str) -> str:
    """The source with each hunk's old lines, which must occur once, replaced by its new ones."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in " " + sign) for sign in "-+")
        assert source.count(old) == 1
        source = source.replace(old, new)
    return source


def block_class(source: str) -> type:
    variables = {}
    exec(source, variables)
    return variables["DiTBlock"]


def ordinary_and_changed():
    """Both versions of the block, with the same weights."""
    [_, source], [diff] = blocks_of_code().values()
    torch.manual_seed(0)
    ordinary, fused = (block_class(each)(C, HEADS) for each in (source, changed(source, diff)))
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


def test_the_lines_for_diffusers_run(monkeypatch):
    model = make("dit", num_layers=28, attention_head_dim=4)
    monkeypatch.setattr(diffusers.DiTTransformer2DModel, "from_pretrained", lambda *_args, **_kwargs: model)
    exec(blocks_of_code()["python"][0], {})
    modulated = [
        i for i, block in enumerate(model.transformer_blocks) if hasattr(block.attn1.processor, "modulation")
    ]
    assert modulated == [15, 17, 19, 22, 24]
    assert type(model.transformer_blocks[0]).__module__ == "edt_kernels.integrations.diffusers.adaln"
