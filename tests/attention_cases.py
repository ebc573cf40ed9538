"""Cases of `amm_attention`: inputs, outputs and gradients, and the check of them against float64."""

import dataclasses

import torch
from layouts import lay_out

import edt_kernels
from benchmarks.budget import assert_within_budget
from edt_kernels.amm_attention.reference import expand_offset_table


@dataclasses.dataclass(frozen=True)
class Case:
    grid: tuple[int, int]
    head_dim: int = 52
    batch_size: int = 2
    heads: int = 2
    extra: tuple[int, int] = (0, 0)
    bias: bool = True
    modulation: str | None = "shared"  # or "per head"; or "fixed": shared, without gradient
    layout: str = "dense"  # of q, k and v; dense are the parts of a packed (B, N, 3, heads, D)
    grad_layout: str = "dense"  # of the upstream gradient
    tables: torch.dtype = torch.float32  # of bias and modulation
    scale: float | None = None

    @property
    def num_tokens(self) -> int:
        return self.extra[0] + self.grid[0] * self.grid[1] + self.extra[1]

    def __str__(self):
        parts = [f"{self.grid[0]}x{self.grid[1]}", f"D{self.head_dim}", f"B{self.batch_size}", f"h{self.heads}"]
        parts += [f"extra{self.extra[0]}+{self.extra[1]}"] if any(self.extra) else []
        parts += [] if self.bias else ["no-bias"]
        parts += [] if self.modulation == "shared" else [f"{self.modulation or 'no'} modulation"]
        parts += [] if self.layout == "dense" else [self.layout]
        parts += [] if self.grad_layout == "dense" else [f"grad {self.grad_layout}"]
        parts += [] if self.tables == torch.float32 else [f"tables {self.tables}".replace("torch.", "")]
        parts += [] if self.scale is None else [f"scale{self.scale}"]
        return "-".join(parts).replace(" ", "-")


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    B, N, h, D = case.batch_size, case.num_tokens, case.heads, case.head_dim
    offsets = (2 * case.grid[0] - 1, 2 * case.grid[1] - 1)
    inputs = {"qkv": randn(B, N, 3, h, D).to(dtype), "grad": randn(B, N, h, D).to(dtype)}
    if case.bias:
        inputs["rel_pos_bias"] = randn(offsets[0] * offsets[1], h).to(case.tables)
    if case.modulation is not None:
        shape = (h, *offsets) if case.modulation == "per head" else offsets
        inputs["modulation"] = (0.3 + randn(*shape).abs()).to(case.tables)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def run(attention, case: Case, inputs: dict, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The output and the gradient of every input; with `dtype`, everything converted to it first."""
    inputs = {name: (t if dtype is None else t.to(dtype)) for name, t in inputs.items()}
    grad_out = inputs.pop("grad")
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    tables = {name: t for name, t in leaves.items() if name != "qkv"}
    if case.modulation == "fixed":
        tables["modulation"] = leaves.pop("modulation").detach()
    qkv = [lay_out(t, case.layout) for t in leaves["qkv"].unbind(2)]
    out = attention(*qkv, grid=case.grid, num_extra_tokens=case.extra, scale=case.scale, **tables)
    grads = torch.autograd.grad(out, list(leaves.values()), lay_out(grad_out, case.grad_layout))
    results = {f"grad of {name}": grad for name, grad in zip(leaves, grads)}
    # Judged apart: each has its own scale.
    packed = results.pop("grad of qkv")
    results |= {f"grad of {name}": t for name, t in zip("qkv", packed.unbind(2))}
    return {"out": out.detach(), **results}


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a result is judged by: see `benchmarks.budget.error_and_budget`."""

    exact: torch.Tensor
    eager: torch.Tensor
    slack: float = 0.0


def references(case: Case, dtype: torch.dtype, inputs: dict, logsumexp: float = 0.0) -> dict[str, Reference]:
    """`logsumexp` is the rows' magnitude of it. Backward restores probabilities from it; its rounding, which eager
    does not have, shows in float32 gradients of few numbers."""
    all_exact = run(edt_kernels.reference.amm_attention, case, inputs, torch.float64)
    eager = run(edt_kernels.reference.amm_attention, case, inputs)
    found = {}
    for name, exact in all_exact.items():
        slack = 0.0 if name == "out" else logsumexp * torch.finfo(torch.float32).eps * exact.norm().item()
        if case.num_tokens == 1 and name in ("grad of v", "grad of modulation"):
            # The probability is 1; eager has it exactly, the kernel as exp of two logits of up to 4 or so. The
            # table's gradient is a sum of dO·v, which cancel.
            terms = exact
            if name == "grad of modulation":
                terms = (inputs["grad"].double() * inputs["qkv"][:, :, 2].double()).sum(-1)
            slack = 4 * torch.finfo(torch.float32).eps * terms.norm().item()
        elif case.num_tokens == 1 and case.batch_size > 0 and name != "out":
            # The exact gradient of a constant softmax is 0, the kernel's dO·v − dO·O, with O rounded.
            terms = (inputs["grad"].double() * all_exact["out"]).sum(-1).norm().item()
            slack = torch.finfo(dtype).eps * terms * inputs["qkv"].abs().max().item()
        found[name] = Reference(exact, eager[name], slack)
    return found


def check(case: Case, dtype: torch.dtype, device: str, logsumexp: float = 0.0) -> None:
    inputs = make_inputs(case, dtype, device)
    result = run(edt_kernels.amm_attention, case, inputs)
    for name, judge in references(case, dtype, inputs, logsumexp).items():
        assert_within_budget(name, result[name], judge.exact, judge.eager, judge.slack)


def slack_of_saturated_rows(case: Case, inputs: dict, dtype: torch.dtype) -> dict[str, float]:
    """How far gradients may be off beyond the budget where one key takes nearly all of a row.

    dS = P·(dP − delta) cancels there. An error of delta is P times it in dS, and from there in dq, dk and dbias.
    delta has the rounding of O, a rounding step of `dtype` for each term of ΣO·dO; P that of logits, a rounding
    step of float32 of the largest.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in inputs["qkv"].double().unbind(2))
    grad_out = inputs["grad"].double().transpose(1, 2)
    logits = (q @ k.mT) * case.head_dim**-0.5
    p = torch.softmax(logits, -1)
    weights = p
    if case.modulation is not None:
        weights = p * expand_offset_table(inputs["modulation"].double(), case.grid, case.extra, 1.0)
    step = torch.finfo(torch.float32).eps * (1 + logits.abs().max())
    terms = (weights @ v * grad_out).abs().sum(-1, keepdim=True)
    of_delta = (torch.finfo(dtype).eps + step) * terms + step * (weights * (grad_out @ v.mT)).abs().sum(-1, True)
    of_logits = p * of_delta * case.head_dim**-0.5
    return {
        "out": step * (weights @ v.abs()).norm().item(),
        "grad of q": (of_logits @ k.abs()).norm().item(),
        "grad of k": (of_logits.mT @ q.abs()).norm().item(),
        "grad of v": step * (weights.mT @ grad_out.abs()).norm().item(),
        "grad of modulation": step * (p * (grad_out @ v.mT).abs()).norm().item() * case.num_tokens**0.5,
    }
