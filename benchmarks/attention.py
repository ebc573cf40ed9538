"""`amm_attention` against the attention that one would build it from, or settle for: suite `attention`.

Bias and modulation are tables of token offsets; the gradient of the bias is taken or not, the modulation is fixed,
as in EDT. What the peers do is in `attention_peers.py`.
"""

import math
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

import edt_kernels

from . import attention_peers
from .costs import Cost, attention_cost
from .harness import Implementation, kernels_backend
from .results import OURS
from .shapes import ATTENTION_256, ATTENTION_512, OTHER_ATTENTION, AttentionShape


@dataclass(frozen=True)
class AttentionCase:
    layer: AttentionShape
    batch_size: int
    dtype: str
    backward: bool
    has_bias: bool = True
    has_modulation: bool = True
    grad_bias: bool = False  # the bias is a parameter whose gradient is taken
    sweep: str = field(default="stage", compare=False)  # which plot it is a point of

    @property
    def name(self) -> str:
        parts = [name for name, has in (("bias", self.has_bias), ("modulation", self.has_modulation)) if has]
        return f"{self.layer} B{self.batch_size}, {' and '.join(parts) or 'plain'}"

    @property
    def work(self) -> str:
        if not self.backward:
            return "forward"
        return "forward+backward" + (", bias constant" if self.has_bias and not self.grad_bias else "")

    @property
    def num_tokens(self) -> int:
        return math.prod(self.layer.grid) + sum(self.layer.num_extra_tokens)

    @property
    def num_offsets(self) -> int:
        return math.prod(2 * length - 1 for length in self.layer.grid)

    @property
    def shape(self) -> dict[str, object]:
        return {
            "model": self.layer.model, "grid": list(self.layer.grid), "tokens": self.num_tokens,
            "heads": self.layer.heads, "head_dim": self.layer.head_dim, "batch_size": self.batch_size,
            "has_bias": self.has_bias, "has_modulation": self.has_modulation, "grad_bias": self.grad_bias,
            "sweep": self.sweep,
        }  # fmt: skip

    @property
    def cost(self) -> Cost:
        bias = self.num_offsets * self.layer.heads
        tables = (bias,) * self.has_bias + (self.num_offsets,) * self.has_modulation
        return attention_cost(
            self.batch_size, self.num_tokens, self.layer.heads, self.layer.head_dim, self.torch_dtype.itemsize,
            table_offsets=tables, backward=self.backward, gradient_offsets=(bias,) * self.grad_bias,
        )  # fmt: skip

    @property
    def reference_bytes(self) -> int:
        return 8 * 8 * self.layer.heads * self.num_tokens**2

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def make_inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """q, k and v are views of a packed projection (B, N, 3, heads, D), as attention layers have them."""
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape):
            return torch.randn(shape, device=device, generator=generator)

        B, N, heads, D = self.batch_size, self.num_tokens, self.layer.heads, self.layer.head_dim
        q, k, v = randn(B, N, 3, heads, D).to(self.torch_dtype).unbind(2)
        inputs = {"q": q, "k": k, "v": v, "grad 0": randn(B, N, heads, D).to(self.torch_dtype)}
        if self.has_bias:
            inputs["rel_pos_bias"] = randn(self.num_offsets, heads)
        if self.has_modulation:
            inputs["modulation"] = edt_kernels.amm_table(self.layer.grid, device=device)
        return inputs

    def differentiated(self) -> tuple[str, ...]:
        return ("q", "k", "v", "rel_pos_bias") if self.grad_bias else ("q", "k", "v")

    def batched(self, name: str) -> bool:
        return name not in ("rel_pos_bias", "modulation")

    def reference(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return _call(edt_kernels.reference, self, inputs)


def _call(ops, case: AttentionCase, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The op of `edt_kernels`, or of its reference. Inputs may have more than a lower bound's case."""
    out = ops.amm_attention(
        inputs["q"], inputs["k"], inputs["v"],
        grid=case.layer.grid, num_extra_tokens=case.layer.num_extra_tokens,
        rel_pos_bias=inputs["rel_pos_bias"] if case.has_bias else None,
        modulation=inputs["modulation"] if case.has_modulation else None,
    )  # fmt: skip
    return (out,)


class Ours(Implementation):
    name = OURS

    def check(self, case, device):
        self.backend = kernels_backend(device)

    def forward(self, case, inputs):
        return _call(edt_kernels, case, inputs)


def implementations(suite: str) -> list[Implementation]:
    return [Ours(), *attention_peers.implementations()]


_SWEEP_GRIDS = [(4, 4), (8, 4), (8, 8), (16, 8), (16, 16), (32, 16), (32, 32), (64, 32), (64, 64)]


def _token_sweep(grid: tuple[int, int]) -> tuple[AttentionShape, int, str]:
    """65536 tokens in all, so that every point of the sweep moves the same bytes."""
    return AttentionShape("sweep", grid, 16, 64), 65536 // math.prod(grid), "tokens"


def cases(suite: str, device: torch.device, dtypes: list[str], quick: bool) -> list[AttentionCase]:
    """The most telling first. On a GPU: EDT-XL's first two stages at batch 256 and 64, every stage of EDT at 64,
    EDT-XL over batch sizes, 16 heads over numbers of tokens and over head dims, other transformers at batch 16.
    Quick: the former and one longer sequence. On a CPU, where ours is the reference path: EDT-S at 4.

    Each forward, forward and backward with the gradient of the bias, the same without modulation (as EDT trains,
    and computes most blocks), and forward and backward with a constant bias. Quick leaves the last one out, and
    forward without modulation but for the first layer."""
    on_gpu = device.type == "cuda"
    # "mixed" is a matter of residual streams; attention then is in bfloat16.
    dtypes = ["bfloat16" if dtype == "mixed" else dtype for dtype in dtypes]
    if on_gpu:
        first, second = ATTENTION_256[-3:-1]  # EDT-XL's
        layers = [(first, 256, "batch"), (first, 64, "stage"), (second, 256, "stage")]
        if not quick:
            layers += [(layer, 64, "stage") for layer in [*ATTENTION_256[::-1], *ATTENTION_512[::-1]]]
            layers += [(first, batch_size, "batch") for batch_size in (1, 4, 16)]
            layers += [_token_sweep(grid) for grid in _SWEEP_GRIDS]
            layers += [
                (AttentionShape("sweep", (16, 16), 16, head_dim), 64, "head_dim") for head_dim in (52, 64, 72, 128)
            ]
            layers += [(layer, 16, "stage") for layer in OTHER_ATTENTION]
    else:
        layers = [(layer, 4, "stage") for layer in ATTENTION_256 if layer.model == "EDT-S/2"]
        layers = layers[:2] if quick else layers
    found = []
    for dtype in dtypes or (["bfloat16"] if on_gpu else ["float32"]):
        for layer, batch_size, sweep in layers:
            found += [
                AttentionCase(layer, batch_size, dtype, backward=False, sweep=sweep),
                AttentionCase(layer, batch_size, dtype, backward=True, grad_bias=True, sweep=sweep),
                AttentionCase(
                    layer, batch_size, dtype, backward=True, has_modulation=False, grad_bias=True, sweep=sweep
                ),
            ]
            if not quick or (layer, batch_size) == layers[0][:2]:
                found.append(
                    AttentionCase(layer, batch_size, dtype, backward=False, has_modulation=False, sweep=sweep)
                )
            if not quick:
                found.append(AttentionCase(layer, batch_size, dtype, backward=True, sweep=sweep))
        if on_gpu and quick:
            layer, batch_size, sweep = _token_sweep((32, 32))
            found.append(AttentionCase(layer, batch_size, dtype, backward=False, sweep=sweep))
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    from .__main__ import main as command

    sys.exit(command(["attention", *sys.argv[1:]]))
