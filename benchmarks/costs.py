"""Bytes and operations of each op: the least that any implementation moves and computes.

Every array that goes in or comes out is counted once, in the dtype it has; what an implementation writes and reads
between is its own affair. Operations are of matrix products alone, two for a multiply-add, at the true head dim.
Over the ceilings measured in the same run (`measure.Ceilings`) they give the floor: the longer of the two times.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    bytes: int
    operations: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.operations + other.operations)


def attention_cost(
    batch_size: int,
    num_tokens: int,
    heads: int,
    head_dim: int,
    itemsize: int,
    *,
    table_offsets: tuple[int, ...] = (),
    backward: bool = False,
    gradient_offsets: tuple[int, ...] = (),
) -> Cost:
    """With E = B·N·h·D elements, and tables of float32, `table_offsets` elements each:

    forward   E·4·itemsize (q, k, v in; o out) + 4·Σ offsets;         4·B·h·N²·D operations: q·kᵀ, p·v
    backward  E·8·itemsize (q, k, v, o, do in; dq, dk, dv out) + 4·(Σ offsets + Σ gradient offsets)
              + 8·B·h·N (the logsumexp, which forward writes and backward reads);
              10·B·h·N²·D operations: q·kᵀ again, do·vᵀ, dsᵀ·q, ds·k, pᵀ·do

    `backward` counts both passes.
    """
    elements = batch_size * num_tokens * heads * head_dim
    product = 2 * elements * num_tokens
    tables = 4 * sum(table_offsets)
    cost = Cost(4 * elements * itemsize + tables, 2 * product)
    if backward:
        statistics = 8 * batch_size * heads * num_tokens
        gradients = 4 * sum(gradient_offsets)
        cost += Cost(8 * elements * itemsize + tables + gradients + statistics, 5 * product)
    return cost


def norm_cost(
    op: str, batch_size: int, rows: int, channels: int, stream: int, branch: int, modulation: int, *,
    backward: bool = False, has_keep: bool = False,
) -> Cost:  # fmt: skip
    """Of `rows` output rows a sample, `channels` wide; element sizes in bytes: s of the stream (x), b of the
    branch (y, the normed output), m of the modulation. With E = B·rows·channels and V = B·channels:

    adaln                     forward  E·(s + b) + 2·V·m            backward  E·(b + 2s) + 3·V·m
    token_merge_adaln         the same, + B·4·rows for `keep` in each pass
    token_split_concat_adaln  forward  E·(b + s)/2 + E·b + 2·V·m    backward  E·b + E·(b + s) + 3·V·m
    gated_residual            forward  E·(2s + b) + V·m             backward  E·(s + 2b) + 2·V·m
    gated_residual_adaln      forward  E·(2s + 2b) + 3·V·m          backward  E·(3s + 3b) + 5·V·m

    Backward reads the upstream gradients, the inputs that they depend on (x' instead of x), scale and gate, and
    writes the gradients of everything. (x' of gated_residual passes its gradient on as x's, which costs nothing.)
    Row statistics, where there is a norm: 8·B·rows bytes are written forward and read backward, counted with
    `backward` alone. `backward` counts both passes.
    """
    elements, vector = batch_size * rows * channels, batch_size * channels
    s, b, m = stream, branch, modulation
    halves = (b + s) / 2  # a row of the split is half of x, in the branch's dtype, and half of the skip
    forward, back = {
        "adaln": (elements * (s + b) + 2 * vector * m, elements * (b + 2 * s) + 3 * vector * m),
        "token_merge_adaln": (elements * (s + b) + 2 * vector * m, elements * (b + 2 * s) + 3 * vector * m),
        "token_split_concat_adaln": (
            elements * (halves + b) + 2 * vector * m,
            elements * (b + 2 * halves) + 3 * vector * m,
        ),
        "gated_residual": (elements * (2 * s + b) + vector * m, elements * (s + 2 * b) + 2 * vector * m),
        "gated_residual_adaln": (
            elements * (2 * s + 2 * b) + 3 * vector * m,
            elements * (3 * s + 3 * b) + 5 * vector * m,
        ),
    }[op]
    mask = 4 * batch_size * rows if has_keep else 0
    statistics = 0 if op == "gated_residual" else 8 * batch_size * rows
    total = forward + mask
    if backward:
        total += back + mask + 2 * statistics
    return Cost(round(total))
