"""Launchers, tiles and torch registration of the norm-type ops, on one pair of kernels; above all, how (samples,
rows, channels) are cut into programs."""

import functools
import itertools
import math

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from .. import _launch
from .._tiles import RowLoop, RowTile, choose_tiles
from .._tracing import signature
from . import kernels

# The slices of a row, see `kernels`; how many tensors the backward pass returns: torch cannot map a list of them,
# as the forward pass has it, over batched gradients.
_OPS = {
    "adaln": (1, 2), "gated_residual": (1, 2), "gated_residual_adaln": (1, 3), "token_merge_adaln": (4, 2),
    "token_split_concat_adaln": (2, 3),
}  # fmt: skip
# Programs of a backward pass, whatever the device, so that gradients are the same wherever no table of measured
# tiles says otherwise: two for each multiprocessor of an H100 or H200, as many as may be there at once.
_BACKWARD_PROGRAMS = 264


def choose_row_tile(rows: int, slices: int, channels: int, backward: bool) -> RowTile | RowLoop:
    """What a pass takes without measurement, for samples of `rows` rows of slices·channels channels each."""
    # Backward, a thread holds 8 elements of each array and, over all rows, of three sums: at most 128 registers,
    # so that two programs share a multiprocessor, each with the next tile on its way. Forward holds no sums; 16
    # elements need half as many shuffles. Wider rows take 16 and then 32, which spill: on sm_90 adaln's backward
    # beyond 8192 channels, gated_residual_adaln's beyond 4096, the merge's beyond 4·2048, the split's 2·4096.
    row_elements = slices * next_power_of_2(channels)
    each = 8 if backward and row_elements <= 2048 else 16
    tile_rows = max(min(256 * each // row_elements, next_power_of_2(rows)), 1)
    num_warps = min(max(tile_rows * row_elements // (32 * each), 1), 16)
    return RowLoop(tile_rows, num_warps, _BACKWARD_PROGRAMS) if backward else RowTile(tile_rows, num_warps)


def _rows_of(slices: int, x: Tensor, y: Tensor | None) -> tuple[int, int, int]:
    """Samples, rows of each, channels of a slice, of the op's x and y."""
    B, N, C = (y if slices == 2 else x).shape  # pyright: ignore[reportOptionalMemberAccess]
    return (B, N // 4, C) if slices == 4 else (B, N, C)


def _plan(*arguments) -> tuple[_launch.Launch, int, bool]:
    """The launch of a pass, how many programs a sample has, and whether the tensors can be read as they are.

    A kernel takes tensors of rows (B, N, C), vectors of samples (B, C), other tensors; the strides of the first
    two but for their last, dense, dimension; the number of rows, the width of the grid, eps or, backward, the rows
    of a program. What is absent is None, and so are its strides.
    """
    *given, op, direction, grid_w, eps, _out_dtype = arguments
    tensors = _dense(*given)
    forward, slices = direction == "forward", _OPS[op][0]
    by_row = tensors[: 2 if forward else 4]
    x, y = by_row[-2:]
    samples, rows, channels = _rows_of(slices, y if x is None else x, y)
    wide = any(t is not None and t.dtype == torch.float32 for t in by_row)
    key = {"dtype": "float32" if wide else "16-bit", "rows": rows, "channels": channels}
    heuristic = {direction: choose_row_tile(rows, slices, channels, not forward)}
    tile = choose_tiles(f"{op}.{direction}", key, heuristic)[direction]
    rows_per_program = tile.rows
    if not forward:
        # The nearest number of programs, not the next larger: batches of 32 to 256 then make 256 of them, not 288
        # to 512 with a last wave nearly empty, and a large batch of few rows writes fewer partial sums.
        programs = max(round(tile.programs / max(samples, 1)), 1)
        rows_per_program *= max(cdiv(cdiv(rows, tile.rows), programs), 1)
    # Left alone, NVIDIA's assembler spills 8 bytes to stay within 40, 64 or 80 registers, or takes 172, which is
    # one program a multiprocessor. gated_residual_adaln's backward needs them for rows of more than 2048 channels:
    # with 128 it spills on Triton 3.6. AMD's compiler has no such option.
    is_free = torch.version.hip or (not forward and slices == 1 and channels > 2048)
    strides = [
        [None] * (2 if i < len(by_row) else 1) if t is None else t.stride()[:-1] for i, t in enumerate(tensors)
    ]
    programs = cdiv(rows, rows_per_program)
    launch = _launch.Launch(
        kernels.forward if forward else kernels.backward, samples * programs,
        *itertools.chain(*strides), rows, grid_w, eps if forward else rows_per_program,
        C=channels, SLICES=slices, ALIGN=math.gcd(channels, _launch.common_alignment(*by_row)),
        ROWS=tile.rows, BLOCK_C=next_power_of_2(channels), LANES=max(32 * tile.num_warps // tile.rows, 1),
        num_warps=tile.num_warps, **({} if is_free else {"maxnreg": 128}),
    )  # fmt: skip
    return launch, programs, all(a is b for a, b in zip(tensors, given))


def _dense(*tensors: Tensor | None) -> list:
    """Rows that are dense; masks as bytes."""
    return [_launch.dense_rows(t if t is None or t.dtype != torch.bool else t.view(torch.uint8)) for t in tensors]


def _existing(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple([tensor for tensor in tensors if tensor is not None])


def _empty_outputs(op, x, y, gate, shift, scale, keep, grid_w, eps, out_dtype) -> tuple:
    """x' with a gate; the norm, and mean and rstd of each row, with a scale."""
    x_out = None if gate is None else _launch.dense_like(x)
    if scale is None:
        return x_out, None, None
    slices = _OPS[op][0]
    samples, rows, channels = _rows_of(slices, x, y)
    out = x.new_empty((samples, rows, slices * channels), dtype=out_dtype)
    return x_out, out, x.new_empty((samples, rows, 2), dtype=torch.float32)


def _forward(op, *arguments, signature=None):
    tensors, numbers = arguments[:6], arguments[6:]
    launch, _, are_dense = _launch.planned(_plan, signature, tensors, op, "forward", *numbers)
    tensors = tensors if are_dense else _dense(*tensors)
    outputs = _empty_outputs(op, *tensors, *numbers)
    with _launch.on_device_of(tensors[0]):
        launch(*tensors, *outputs)
    return _existing(*outputs)


def _empty_gradients(x, y, gate, scale, *programs: int) -> tuple:
    """dx with a scale (else it is what arrives), dy where there is a y, the sums of dgate, dshift and dscale."""
    vector, quantities = gate if scale is None else scale, (gate is not None) + 2 * (scale is not None)
    samples, width = vector.shape
    sums = vector.new_empty((quantities, samples, *programs, width), dtype=torch.float32)
    return None if scale is None else _launch.dense_like(x), None if y is None else _launch.dense_like(y), sums


def _backward(op, *arguments, signature=None):
    tensors, statistics, grid_w = arguments[:7], *arguments[7:]
    launch, programs, are_dense = _launch.planned(_plan, signature, tensors, op, "backward", grid_w, 0.0, None)
    tensors = tensors if are_dense else _dense(*tensors)
    _, _, x, y, gate, scale, _ = tensors
    *grads, partials = _empty_gradients(x, y, gate, scale, programs)
    with _launch.on_device_of(partials):
        launch(*tensors, statistics, *grads, partials)
    return _existing(*grads, partials.squeeze(2) if programs == 1 else partials.sum(2))


_REGISTERED = {
    op: (
        _launch.Op(
            op,
            "(Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? keep, int grid_w, "
            "float eps, ScalarType? out_dtype) -> Tensor[]",
            functools.partial(_forward, op),
            lambda *arguments, op=op: _existing(*_empty_outputs(op, *arguments)),
        ),
        _launch.Op(
            f"{op}_backward",
            "(Tensor? grad_x_out, Tensor? grad_out, Tensor? x, Tensor? y, Tensor? gate, Tensor? scale, "
            f"Tensor? keep, Tensor? statistics, int grid_w) -> ({', '.join(['Tensor'] * gradients)})",
            functools.partial(_backward, op),
            lambda *arguments: _existing(*_empty_gradients(*arguments[2:6])),
        ),
    )
    for op, (_, gradients) in _OPS.items()
}


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, known, x, y, gate, shift, scale, keep, grid_w, eps, out_dtype):
        outputs = _REGISTERED[op][0](known, x, y, gate, shift, scale, keep, grid_w, eps, out_dtype)
        ctx.op, ctx.grid_w = op, grid_w
        ctx.dtypes = [None if vector is None else vector.dtype for vector in (gate, shift, scale)]
        outputs, statistics = (outputs, None) if scale is None else (outputs[:-1], outputs[-1])
        normed = None if scale is None else x if gate is None else outputs[0]
        ctx.save_for_backward(normed, y, gate, scale, keep, statistics)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        saved = _, y, gate, scale, _, _ = ctx.saved_tensors  # once: a checkpoint recomputes for one reading
        grad_x_out, grad_out = (None, *grads) if gate is None else (*grads, None)[:2]
        tensors = grad_x_out, grad_out, *saved
        results = iter(_REGISTERED[ctx.op][1](signature(*tensors), *tensors, ctx.grid_w))
        grad_x = grad_x_out if scale is None else next(results)
        grad_y = None if y is None else next(results)
        sums = iter(next(results).unbind(0))
        vectors = [None if dtype is None else next(sums).to(dtype) for dtype in ctx.dtypes]
        return _launch.once_differentiable(ctx.op, tensors, (None, None, grad_x, grad_y, *vectors, *[None] * 4))


def run(op: str, known: tuple | None, *arguments) -> tuple[Tensor, ...]:
    """The outputs of an op by the kernels, of checked x, y (the skip connection of the split), gate, shift, scale,
    keep, the width of the grid, eps and out_dtype. `known` is the signature of the tensors."""
    if _launch.has_gradient(*arguments[:5]):
        return _Function.apply(op, known, *arguments)
    outputs = _REGISTERED[op][0](known, *arguments)
    return tuple(outputs if arguments[4] is None else outputs[:-1])
