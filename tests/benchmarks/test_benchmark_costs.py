"""The bytes and operations that the benchmarks' floors rest on."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.attention import AttentionCase
from benchmarks.costs import Cost, attention_cost, norm_cost
from benchmarks.measure import Ceilings
from benchmarks.shapes import AttentionShape

B, N, HEADS, D = 2, 16, 3, 8


def test_attention_by_hand():
    """2 samples of 3 tokens, 1 head of 4: 24 elements in q; a 3×1 grid has 5 offsets."""
    q, logits = 24, 2 * 3 * 3
    forward = attention_cost(2, 3, 1, 4, 2, table_offsets=(5, 5))
    assert forward == Cost(2 * 4 * q + 4 * 10, 2 * logits * 4 + 2 * logits * 4)
    both = attention_cost(2, 3, 1, 4, 2, table_offsets=(5, 5), backward=True, gradient_offsets=(5,))
    # q, k, v, o, do; dq, dk, dv; both tables again, one's gradient; the logsumexp of 6 rows, twice.
    assert both.bytes - forward.bytes == 2 * 8 * q + 4 * 10 + 4 * 5 + 2 * 4 * 6
    assert both.operations - forward.operations == 5 * 2 * logits * 4


def test_attention_of_a_case():
    """EDT-XL's first stage: 961 offsets, 18 heads of 52."""
    case = AttentionCase(AttentionShape("EDT-XL/2", (16, 16), 18, 52), 64, "bfloat16", backward=False)
    elements = 64 * 256 * 18 * 52
    assert case.cost == Cost(4 * elements * 2 + 4 * 961 * (18 + 1), 4 * elements * 256)


def _counted(attention) -> tuple[int, int]:
    """Operations that torch counts, forward and with backward."""
    q, k, v = torch.empty(3, B, HEADS, N, D, device="meta", dtype=torch.bfloat16).unbind(0)
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    with FlopCounterMode(display=False) as counter:
        out = attention(q, k, v)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


def test_attention_operations_are_those_of_fused_kernels():
    forward, both = _counted(lambda *qkv: torch.ops.aten._scaled_dot_product_flash_attention(*qkv)[0])
    assert attention_cost(B, N, HEADS, D, 2).operations == forward
    assert attention_cost(B, N, HEADS, D, 2, backward=True).operations == both


def test_eager_saves_the_product_that_fused_kernels_repeat():
    """It keeps the N×N probabilities and so needs four products backward: do·vᵀ, pᵀ·do, ds·k, dsᵀ·q. A kernel that
    keeps no N×N matrix computes q·kᵀ again."""
    forward, both = _counted(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)
    product = 2 * B * HEADS * N * N * D
    assert (forward, both - forward) == (2 * product, 4 * product)
    assert attention_cost(B, N, HEADS, D, 2, backward=True).operations == both + product


E, V, S = 2 * 10 * 8, 2 * 8, 2 * 10  # elements, modulation vector and rows of 2 samples of 10 rows, 8 wide
STREAM, BRANCH = 4, 2  # bytes an element of the residual stream, and of all else


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [
        # x; normed; shift, scale | grad of normed, x; grad of x; scale; grads of shift, scale
        ("adaln", E * 4 + E * 2 + 2 * V * 2, E * 2 + E * 4 + E * 4 + V * 2 + 2 * V * 2),
        ("token_merge_adaln", E * 4 + E * 2 + 2 * V * 2, E * 2 + E * 4 + E * 4 + V * 2 + 2 * V * 2),
        # Half a row is x, the other the skip; normed; shift, scale | the same again, and the gradients
        (
            "token_split_concat_adaln",
            E // 2 * 2 + E // 2 * 4 + E * 2 + 2 * V * 2,
            E * 2 + 2 * (E // 2 * 2 + E // 2 * 4) + V * 2 + 2 * V * 2,
        ),
        # x, y; x'; gate | grad of x', y; grad of y; gate; grad of gate
        ("gated_residual", E * 4 + E * 2 + E * 4 + V * 2, E * 4 + E * 2 + E * 2 + V * 2 + V * 2),
        # x, y; x', normed; gate, shift, scale | grads of x' and normed, x', y; grads of x and y; gate, scale;
        # grads of gate, shift, scale
        (
            "gated_residual_adaln",
            E * 4 + E * 2 + E * 4 + E * 2 + 3 * V * 2,
            E * 4 + E * 2 + E * 4 + E * 2 + E * 4 + E * 2 + 2 * V * 2 + 3 * V * 2,
        ),
    ],
)
def test_norms_by_hand(op, forward, backward):
    sizes = (op, 2, 10, 8, STREAM, BRANCH, BRANCH)
    assert norm_cost(*sizes) == Cost(forward)
    statistics = 0 if op == "gated_residual" else 2 * 8 * S  # mean and 1/σ of a row, written and read
    assert norm_cost(*sizes, backward=True) == Cost(forward + backward + statistics)


def test_a_keep_mask_is_read_in_each_pass():
    """A byte for each of the 4 tokens that are merged into a row."""
    sizes = ("token_merge_adaln", 2, 10, 8, STREAM, BRANCH, BRANCH)
    assert norm_cost(*sizes, has_keep=True).bytes == norm_cost(*sizes).bytes + 4 * S
    both = norm_cost(*sizes, has_keep=True, backward=True)
    assert both.bytes == norm_cost(*sizes, backward=True).bytes + 2 * 4 * S


@pytest.mark.parametrize(("num_bytes", "operations", "ms"), [(3e9, 1e12, 3.0), (1e9, 8e12, 4.0), (1e9, 0, 1.0)])
def test_the_floor_is_the_longer_of_the_two_times(num_bytes, operations, ms):
    ceilings = Ceilings(1e12, 2e15, "bfloat16")
    assert ceilings.floor_ms(num_bytes, operations) == pytest.approx(ms)
