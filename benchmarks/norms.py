"""The norm-type ops against what one would write without them: suites `adaln`, `merge` and `split`.

Dtypes: one of torch's for everything, or "mixed": a residual stream in float32, all else in bfloat16, as EDT
trains under autocast. The peers normalise in float32 in all of them, as autocast does.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import edt_kernels

from . import cudnn_norm
from .costs import Cost, norm_cost
from .harness import Implementation, UnavailableError, build_call, kernels_backend
from .results import OURS
from .shapes import NORMS_256, NORMS_512, OTHER_NORMS, NormShape

SUITE_OPS = {
    "adaln": ("gated_residual_adaln", "adaln", "gated_residual"),
    "merge": ("token_merge_adaln",),
    "split": ("token_split_concat_adaln",),
}
_EPS = 1e-6


@dataclass(frozen=True)
class NormCase:
    op: str
    layer: NormShape  # for the split, of what comes out of it
    batch_size: int
    dtype: str
    backward: bool
    has_keep: bool = False  # a mask of the merge, as in training
    rms: bool = False  # of a lower bound: RMSNorm, which subtracts no mean, in place of LayerNorm

    @property
    def name(self) -> str:
        keep = ", keep mask" if self.has_keep else ""
        return f"{self.op} {self.layer} B{self.batch_size}{keep}"

    @property
    def work(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def rows(self) -> int:
        """Of the normed output, for one sample."""
        return math.prod(self.layer.grid) // (4 if self.op == "token_merge_adaln" else 1)

    @property
    def width(self) -> int:
        """Channels that are normalised."""
        factor = {"token_merge_adaln": 4, "token_split_concat_adaln": 2}.get(self.op, 1)
        return factor * self.layer.channels

    @property
    def shape(self) -> dict[str, object]:
        return {
            "op": self.op, "model": self.layer.model, "grid": list(self.layer.grid),
            "channels": self.layer.channels, "batch_size": self.batch_size, "rows": self.batch_size * self.rows,
            "width": self.width,
        }  # fmt: skip

    @property
    def cost(self) -> Cost:
        stream, branch = (dtype.itemsize for dtype in self.dtypes)
        return norm_cost(
            self.op, self.batch_size, self.rows, self.width, stream, branch, branch,
            backward=self.backward, has_keep=self.has_keep,
        )  # fmt: skip

    @property
    def reference_bytes(self) -> int:
        return 12 * 8 * self.rows * self.width

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the residual stream, and of branches, modulation and the normed output."""
        if self.dtype == "mixed":
            return torch.float32, torch.bfloat16
        return (getattr(torch, self.dtype),) * 2

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        stream, branch = self.dtypes
        B, C, rows, width = self.batch_size, self.layer.channels, self.rows, self.width
        out, vector = ((B, rows, width), branch), ((B, width), branch)
        norm = {"shift": vector, "scale": vector}
        if self.op == "token_merge_adaln":
            return {"x": ((B, 4 * rows, C), stream), **norm, "grad 0": out}
        if self.op == "token_split_concat_adaln":
            x, skip = ((B, rows // 4, 4 * C), branch), ((B, rows, C), stream)
            return {"x": x, "skip": skip, **norm, "grad 0": out}
        x, y = ((B, rows, C), stream), ((B, rows, C), branch)
        if self.op == "adaln":
            return {"x": x, **norm, "grad 0": out}
        if self.op == "gated_residual":
            return {"x": x, "y": y, "gate": vector, "grad 0": x}
        return {"x": x, "y": y, "gate": vector, **norm, "grad 0": x, "grad 1": out}

    def make_inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        inputs = {
            name: torch.randn(shape, device=device, generator=generator).to(dtype)
            for name, (shape, dtype) in self._shapes().items()
        }
        if self.has_keep:
            tokens = (self.batch_size, 4 * self.rows)
            inputs["keep"] = torch.rand(tokens, device=device, generator=generator) < 0.55
        return inputs

    def differentiated(self) -> tuple[str, ...]:
        return tuple(name for name in self._shapes() if not name.startswith("grad"))

    def batched(self, name: str) -> bool:
        return True

    @property
    def input_grid(self) -> tuple[int, int]:
        """Of x: `layer` is what comes in, but for the split."""
        H, W = self.layer.grid
        return (H // 2, W // 2) if self.op == "token_split_concat_adaln" else (H, W)

    def reference(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if self.rms:
            dtype = torch.float64 if inputs["x"].dtype == torch.float64 else self.dtypes[1]
            return _gated(self, inputs, _rms_norm, dtype)
        return _call(edt_kernels.reference, self, inputs)


def _rms_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=_EPS)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _gated(case: NormCase, inputs: dict[str, Tensor], norm, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """`adaln` or `gated_residual_adaln` by somebody's `norm(x, shift, scale)`, the rest of it in torch."""
    x, outputs = inputs["x"], ()
    if case.op == "gated_residual_adaln":
        x = x + inputs["gate"].unsqueeze(1) * inputs["y"]
        outputs = (x,)
    return *outputs, norm(x, inputs["shift"], inputs["scale"]).to(dtype)


def _call(ops, case: NormCase, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The op of `edt_kernels`, or of its reference."""
    arguments = dict(inputs)
    if case.op in ("token_merge_adaln", "token_split_concat_adaln"):
        arguments["grid"] = case.input_grid
    if case.op not in ("gated_residual", "token_split_concat_adaln") and inputs["x"].dtype != torch.float64:
        arguments["out_dtype"] = case.dtypes[1]  # what autocast would choose
    outputs = getattr(ops, case.op)(**arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


class Ours(Implementation):
    name = OURS

    def check(self, case, device):
        self.backend = kernels_backend(device)

    def forward(self, case, inputs):
        return _call(edt_kernels, case, inputs)


def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """In float32, as autocast runs LayerNorm."""
    normed = F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=_EPS)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _gather(x: Tensor, grid: tuple[int, int]) -> Tensor:
    x = x.unflatten(1, grid)
    parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return torch.cat(parts, dim=-1).flatten(1, 2)


def plain_chain(
    op: str, grid: tuple[int, int], dtype: torch.dtype, x, shift=None, scale=None, y=None, gate=None, skip=None,
    keep=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op as the released implementation has it, operation by operation; `dtype` is of the next Linear's input,
    to which autocast converts."""
    if op == "adaln":
        return (_norm(x, shift, scale).to(dtype),)
    if op == "gated_residual":
        return (x + gate.unsqueeze(1) * y,)
    if op == "gated_residual_adaln":
        x = x + gate.unsqueeze(1) * y
        return x, _norm(x, shift, scale).to(dtype)
    if op == "token_merge_adaln":
        merged = _norm(_gather(x, grid), shift, scale)
        if keep is not None:
            mask = _gather(keep.unsqueeze(-1).to(merged.dtype), grid)
            merged = merged * mask.repeat_interleave(x.shape[-1], dim=-1)
        return (merged.to(dtype),)
    (H, W), C = grid, skip.shape[-1]
    up = x.view(-1, H, W, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4 * H * W, C)
    return (_norm(torch.cat([up, skip], dim=-1), shift, scale).to(dtype),)


class Eager(Implementation):
    name = "eager"
    backend = "PyTorch"

    def forward(self, case, inputs):
        return self.chain(case.op, case.input_grid, case.dtypes[1], **inputs)

    chain = staticmethod(plain_chain)


class CompiledStatic(Eager):
    """fullgraph: too many recompilations are an error, not a quiet return to eager."""

    name = "torch.compile, dynamic=False"
    backend = "Inductor"
    compiled = True

    def __init__(self):
        self.chain = torch.compile(plain_chain, dynamic=False, fullgraph=True)


class Compiled(Eager):
    """As a run whose last batch was smaller has it: Inductor's code for any batch size."""

    name = "torch.compile"
    backend = "Inductor"
    compiled = True

    def __init__(self):
        self.chain = torch.compile(plain_chain, fullgraph=True)

    def prepare(self, case, inputs):
        fewer = Eager()
        fewer.chain = self.chain
        build_call(fewer, case, {name: tensor[: case.batch_size // 2] for name, tensor in inputs.items()})()
        return inputs


class _Library(Implementation):
    """Somebody's norm with the modulation, where it has one; gate and residual in torch."""

    def check(self, case, device):
        if case.op not in ("adaln", "gated_residual_adaln"):
            raise UnavailableError(f"{self.backend} has nothing like it")
        if device.type != "cuda":
            raise UnavailableError("its kernels need a GPU")
        try:
            self.load()
        except ImportError as error:
            raise UnavailableError(f"{self.package} is not installed", "missing") from error

    def forward(self, case, inputs):
        norm = partial(self.norm, inputs) if self.affine else self.norm
        return _gated(case, inputs, norm, case.dtypes[1])

    affine = False


class Liger(_Library):
    """Its LayerNorm kernel, the modulation in torch: Liger-Kernel has no adaptive one."""

    name = "Liger-Kernel LayerNorm + torch"
    backend = "Liger-Kernel"
    package = "liger-kernel"
    affine = True

    def load(self):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        self.layer_norm = LigerLayerNormFunction.apply

    def prepare(self, case, inputs):
        ones = inputs["x"].new_ones(case.width)
        return inputs | {"weight": ones, "bias": torch.zeros_like(ones)}

    def norm(self, inputs, x, shift, scale):
        normed = self.layer_norm(x, inputs["weight"], inputs["bias"], _EPS)
        return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class LigerModulated(_Library):
    """A lower bound: modulated, but RMSNorm."""

    name = "Liger-Kernel modulated RMSNorm"
    backend = "Liger-Kernel"
    package = "liger-kernel with modulated_rms_norm"

    def load(self):
        from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction

        self.modulated = LigerModulatedRMSNormFunction.apply

    def computes(self, case):
        return replace(case, rms=True)

    def norm(self, x, shift, scale):
        # No weight, no offset, statistics in float32; not in place, for the upstream gradient is the benchmark's.
        return self.modulated(x, None, scale.to(x.dtype), shift.to(x.dtype), _EPS, 0.0, "llama", False)


class Cudnn(_Library):
    name = "cuDNN adaLN"
    backend = "cuDNN frontend"
    package = "nvidia-cudnn-frontend"

    def load(self):
        cudnn_norm.load()

    def norm(self, x, shift, scale):
        return cudnn_norm.adaln(x, shift, scale, _EPS)


def implementations(suite: str) -> list[Implementation]:
    return [Ours(), Eager(), CompiledStatic(), Compiled(), Liger(), Cudnn(), LigerModulated()]


def cases(suite: str, device: torch.device, dtypes: list[str], quick: bool) -> list[NormCase]:
    """The most telling first. On a GPU: EDT's stages at batch 64 and 256, quick: EDT-XL's first two at 64. On a
    CPU, where ours is the reference path: EDT-S at 4."""
    on_gpu = device.type == "cuda"
    dtypes = dtypes or (["mixed", "bfloat16"] if on_gpu else ["float32"])
    if not on_gpu:
        layers = [layer for layer in NORMS_256 if layer.model == "EDT-S/2"]
    elif quick:
        layers, dtypes = [layer for layer in NORMS_256 if layer.model == "EDT-XL/2"][:2], dtypes[:1]
    else:
        layers = [*NORMS_256[::-1], *NORMS_512[::-1], *OTHER_NORMS]  # EDT-XL first
    if suite != "adaln":
        layers = [layer for layer in layers if layer.resizes][: 1 if quick else None]
    batch_sizes = (64,) if quick else (64, 256)
    found = []
    for dtype in dtypes:
        for batch_size in batch_sizes if on_gpu else (4,):
            for layer in layers:
                for op in SUITE_OPS[suite]:
                    if quick and on_gpu and op in ("adaln", "gated_residual"):
                        continue
                    case = NormCase(op, layer, batch_size, dtype, backward=True, has_keep=suite == "merge")
                    found += [case, replace(case, backward=False, has_keep=False)]
    return found


if __name__ == "__main__":
    from .__main__ import main as command

    sys.exit(command(["norms", *sys.argv[1:]]))
