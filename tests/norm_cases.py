"""Cases of the norm-type ops: inputs, outputs and gradients, and the check of them against float64."""

import dataclasses
import math

import torch
from layouts import lay_out

import edt_kernels
from benchmarks.budget import assert_within_budget

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OPS = ("adaln", "gated_residual", "gated_residual_adaln", "token_merge_adaln", "token_split_concat_adaln")


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at a shape. `grid` is x's; channels are x's, except for the split, where they are the skip's."""

    op: str
    grid: tuple[int, int]
    channels: int
    batch_size: int = 2
    stream: torch.dtype = F32  # of x, or of the skip
    branch: torch.dtype = F32  # of y, or of the split's x
    modulation: torch.dtype = F32
    out_dtype: torch.dtype | None = None
    keep: bool = False
    layout: str = "dense"  # of x, y and skip
    grad_layout: str = "dense"  # of the upstream gradients
    eps: float = 1e-6

    def __str__(self):
        dtypes = [str(d).removeprefix("torch.") for d in (self.stream, self.branch, self.modulation)]
        flags = ["keep"] if self.keep else []
        flags += [self.layout.replace(" ", "-")] if self.layout != "dense" else []
        flags += [f"grad-{self.grad_layout}".replace(" ", "-")] if self.grad_layout != "dense" else []
        flags += [f"eps{self.eps}"] if self.eps != 1e-6 else []
        flags += [f"to-{self.out_dtype}".replace("torch.", "")] if self.out_dtype else []
        grid = "x".join(map(str, self.grid))
        return "-".join([self.op, grid, f"C{self.channels}", f"B{self.batch_size}", *dtypes, *flags])


def input_shapes(case: Case) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Of the floating inputs by argument name, and of the upstream gradients "grad 0", "grad 1" by output."""
    H, W = case.grid
    B, N, C = case.batch_size, H * W, case.channels
    if case.op == "token_merge_adaln":
        shapes, rows, width = {"x": ((B, N, C), case.stream)}, N // 4, 4 * C
    elif case.op == "token_split_concat_adaln":
        shapes = {"x": ((B, N, 4 * C), case.branch), "skip": ((B, 4 * N, C), case.stream)}
        rows, width = 4 * N, 2 * C
    else:
        shapes, rows, width = {"x": ((B, N, C), case.stream)}, N, C
        if case.op != "adaln":
            shapes["y"] = ((B, N, C), case.branch)
    shapes["modulation"] = ((B, 3 * width), case.modulation)
    for i in range(2 if case.op == "gated_residual_adaln" else 1):
        shapes[f"grad {i}"] = ((B, rows, width), F32)
    return shapes


def make_inputs(case: Case, device: str) -> dict[str, torch.Tensor]:
    """Tensors by the names of `input_shapes`, and the mask."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(*shape, generator=generator).to(dtype)
        for name, (shape, dtype) in input_shapes(case).items()
    }
    # One projection makes them all; the ops get views of it, as in a model.
    inputs["modulation"] /= 2
    if case.keep:
        inputs["keep"] = torch.rand(case.batch_size, math.prod(case.grid), generator=generator) < 0.6
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def run(namespace, case: Case, inputs: dict, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Outputs and gradients of every floating input; with `dtype`, everything converted to it first."""

    def convert(t):
        return t if dtype is None or not t.is_floating_point() else t.to(dtype)

    inputs = {name: convert(tensor) for name, tensor in inputs.items()}
    upstream = [inputs.pop(name) for name in sorted(inputs) if name.startswith("grad")]
    keep = inputs.pop("keep", None)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    gate, shift, scale = leaves["modulation"].chunk(3, dim=-1)
    arguments = {name: lay_out(leaf, case.layout) for name, leaf in leaves.items() if name != "modulation"}
    if case.op in ("gated_residual", "gated_residual_adaln"):
        arguments["gate"] = gate
    if case.op != "gated_residual":
        arguments |= {"shift": shift, "scale": scale, "eps": case.eps}
    if case.op in ("token_merge_adaln", "token_split_concat_adaln"):
        arguments["grid"] = case.grid
    if case.op == "token_merge_adaln":
        arguments["keep"] = keep
    if case.out_dtype is not None:
        arguments["out_dtype"] = case.out_dtype if dtype is None else dtype
    outputs = getattr(namespace, case.op)(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [lay_out(g.to(out.dtype), case.grad_layout) for g, out in zip(upstream, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return results | {f"grad of {name}": grad for name, grad in zip(leaves, grads)}


def references(case: Case, inputs: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each result: the exact one in float64, and eager's."""
    eager = run(edt_kernels.reference, case, inputs)
    # The upstream gradients as the outputs' dtypes round them, so that both differentiate the same function.
    rounded = dict(inputs)
    for i in range(2):
        if f"grad {i}" in inputs:
            rounded[f"grad {i}"] = inputs[f"grad {i}"].to(eager[f"output {i}"].dtype)
    exact = run(edt_kernels.reference, case, rounded, torch.float64)
    return {name: (exact[name], eager[name]) for name in exact}


def check(case: Case, device: str) -> None:
    inputs = make_inputs(case, device)
    judges = references(case, inputs)
    result = run(edt_kernels, case, inputs)
    assert result.keys() == judges.keys()
    for name, (exact, eager) in judges.items():
        assert result[name].dtype == eager.dtype, name
        assert_within_budget(name, result[name], exact, eager)
