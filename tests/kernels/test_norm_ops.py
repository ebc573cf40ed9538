"""The Triton kernels of the norm-type ops: interpreted on the CPU at small shapes, on a GPU at real ones."""

import dataclasses
import itertools
import math

import pytest
import torch
from norm_cases import BF16, F16, F32, OPS, Case, check, input_shapes, make_inputs, run

import edt_kernels
from edt_kernels.norms import autograd

SMALL_CASES = [
    *(Case(op, (2, 4), 52, batch_size=3) for op in OPS),
    *(Case(op, (2, 2), 32, batch_size=1, layout="transposed") for op in OPS),
    *(Case(op, (6, 10), 36, stream=F32, branch=F16, modulation=F16) for op in OPS),
    *(Case(op, (4, 2), 312, stream=F16, branch=F16, modulation=F32) for op in OPS),
    Case("adaln", (1, 1), 1248),
    Case("adaln", (20, 20), 33, batch_size=1),  # more rows than one program takes, an odd number of channels
    Case("adaln", (3, 5), 8192, batch_size=1),
    Case("adaln", (2, 3), 48, out_dtype=F16),
    Case("gated_residual_adaln", (2, 3), 48, out_dtype=F16),
    Case("gated_residual_adaln", (19, 21), 40, batch_size=1),
    Case("gated_residual", (19, 21), 40, batch_size=1),
    Case("token_merge_adaln", (2, 4), 52, batch_size=3, keep=True),
    Case("token_merge_adaln", (30, 6), 24, keep=True, out_dtype=F16),
    Case("token_split_concat_adaln", (1, 3), 20),
    Case("token_split_concat_adaln", (9, 11), 24, batch_size=1, branch=F16),
]


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_interpreted_kernels_stay_within_the_error_budget(case):
    check(case, "cpu")


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch(op):
    case = Case(op, (2, 2), 32, batch_size=0)
    result = run(edt_kernels, case, make_inputs(case, "cpu"))
    expected = run(edt_kernels.reference, case, make_inputs(case, "cpu"))
    for name in expected:
        assert result[name].shape == expected[name].shape, name


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("unused", [0, 1])
def test_one_output_without_gradient(unused):
    x, y, modulation = torch.randn(2, 4, 32), torch.randn(2, 4, 32), torch.randn(2, 96)

    def grads(namespace):
        leaves = [t.clone().requires_grad_() for t in (x, y, modulation)]
        outputs = namespace.gated_residual_adaln(*leaves[:2], *leaves[2].chunk(3, dim=1))
        return torch.autograd.grad(outputs[1 - unused].square().sum(), leaves)

    for result, expected in zip(grads(edt_kernels), grads(edt_kernels.reference)):
        torch.testing.assert_close(result, expected)


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
def test_float64_is_refused_by_the_kernels():
    x = torch.zeros(1, 4, 8)
    with pytest.raises(TypeError, match=r"scale is torch\.float64; the Triton kernels take"):
        edt_kernels.adaln(x, torch.zeros(1, 8), torch.zeros(1, 8, dtype=torch.float64))


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_are_refused_with_a_message(op):
    case = Case(op, (2, 2), 32, batch_size=1)
    inputs = make_inputs(case, "cpu")
    x = inputs["x"].requires_grad_()
    gate, shift, scale = inputs["modulation"].requires_grad_().chunk(3, dim=-1)
    call = {
        "adaln": lambda: edt_kernels.adaln(x, shift, scale),
        "gated_residual": lambda: edt_kernels.gated_residual(x, x, gate),
        "gated_residual_adaln": lambda: edt_kernels.gated_residual_adaln(x, x, gate, shift, scale)[1],
        "token_merge_adaln": lambda: edt_kernels.token_merge_adaln(x, shift, scale, grid=(2, 2)),
        "token_split_concat_adaln": lambda: edt_kernels.token_split_concat_adaln(
            x, inputs["skip"], shift, scale, grid=(2, 2)
        ),
    }[op]
    (grad,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}'s Triton kernels cannot be differentiated twice"):
        torch.autograd.grad(grad.sum(), inputs["modulation"])


@pytest.mark.interpreter
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    case = Case(op, (2, 2), 32, batch_size=2, keep=op == "token_merge_adaln")
    inputs = make_inputs(case, "cpu")
    width = inputs["modulation"].shape[1] // 3
    gate, shift, scale = (t.clone().requires_grad_() for t in inputs["modulation"].split(width, dim=1))
    x = inputs["x"].requires_grad_()
    arguments = {
        "adaln": (x, None, None, shift, scale, None, 0, 1e-6, F32),
        "gated_residual": (x, inputs.get("y"), gate, None, None, None, 0, 1e-6, F32),
        "gated_residual_adaln": (x, inputs.get("y"), gate, shift, scale, None, 0, 1e-6, F32),
        "token_merge_adaln": (x, None, None, shift, scale, inputs.get("keep"), 2, 1e-6, F32),
        "token_split_concat_adaln": (x, inputs.get("skip"), None, shift, scale, None, 2, 1e-6, F32),
    }[op]
    torch.library.opcheck(getattr(torch.ops.edt_kernels, op).default, arguments)


@pytest.mark.interpreter
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_a_graph_break(op, monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "triton")
    case = Case(op, (2, 2), 32, keep=op == "token_merge_adaln")
    inputs = make_inputs(case, "cpu")

    class Compiled:
        pass

    setattr(
        Compiled, op, staticmethod(torch.compile(getattr(edt_kernels, op), fullgraph=True, backend="aot_eager"))
    )
    compiled, eager = (run(namespace, case, inputs) for namespace in (Compiled, edt_kernels))
    for name in eager:
        assert torch.equal(compiled[name], eager[name]), name


# The norms of every stage of EDT-S, B and XL, in the dtypes of bf16 autocast.
_STAGES = [((16, 16), (312, 624, 936)), ((8, 8), (416, 832, 1248)), ((4, 4), (520, 1040, 1560))]
EDT_CASES = [
    Case(op, grid, channels, batch_size=32, stream=stream, branch=BF16, modulation=BF16, out_dtype=BF16)
    for op in ("adaln", "gated_residual_adaln")
    for grid, widths in _STAGES
    for channels in widths
    for stream in (F32, BF16)
]
EDT_CASES += [
    Case("gated_residual", grid, channels, batch_size=32, stream=F32, branch=BF16, modulation=BF16)
    for grid, widths in _STAGES
    for channels in widths
]
EDT_CASES += [
    Case("token_merge_adaln", grid, channels, batch_size=32, modulation=BF16, out_dtype=BF16, keep=keep)
    for grid, widths in _STAGES[:2]
    for channels in widths
    for keep in (False, True)
]
EDT_CASES += [
    Case("token_split_concat_adaln", grid, channels, batch_size=32, branch=BF16, modulation=BF16)
    for grid, widths in (((4, 4), (416, 832, 1248)), ((8, 8), (312, 624, 936)))
    for channels in widths
]


@pytest.mark.gpu
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("case", [*SMALL_CASES, *EDT_CASES], ids=str)
def test_gpu_kernels_stay_within_the_error_budget(case):
    check(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_gpu_gradients_are_bitwise_deterministic(op):
    case = Case(op, (16, 16), 312, batch_size=64, branch=BF16, modulation=BF16)
    inputs = make_inputs(case, "cuda")
    first = run(edt_kernels, case, inputs)
    for _ in range(19):
        again = run(edt_kernels, case, inputs)
        for name in first:
            assert torch.equal(again[name], first[name]), name


@pytest.mark.gpu
@pytest.mark.usefixtures("_much_memory")
@pytest.mark.parametrize("op", OPS)
def test_gpu_offsets_beyond_32_bits(op):
    """More than 2³¹ elements in each tensor of rows: in the second of two samples, the results of the grid's last
    two rows are those of these rows alone. Only the last row of the output has an upstream gradient, so that the
    sums over a sample's rows are its alone too. 43 GB are allocated at once."""
    if torch.cuda.mem_get_info()[1] < 64 * 2**30:
        pytest.skip("needs a device with 64 GiB")
    grid = (258, 512) if op == "token_split_concat_adaln" else (1026, 512)
    case = Case(op, grid, 2048, stream=BF16, branch=BF16)
    inputs = {}
    for name, (shape, dtype) in input_shapes(case).items():
        if name.startswith("grad"):
            inputs[name] = torch.zeros(shape, dtype=BF16, device="cuda")
            inputs[name][-1, -1].normal_()
        else:
            inputs[name] = torch.randn(shape, dtype=dtype, device="cuda")
        assert name == "modulation" or math.prod(shape) > 2**31

    def last_rows(tensor):
        return tensor[1:, -(2 * tensor.shape[1] // grid[0]) :] if tensor.ndim == 3 else tensor[1:]

    alone = run(
        edt_kernels,
        dataclasses.replace(case, grid=(2, grid[1]), batch_size=1),
        {name: last_rows(tensor).clone() for name, tensor in inputs.items()},
    )
    for name, result in run(edt_kernels, case, inputs).items():
        torch.testing.assert_close(last_rows(result), alone[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("op", "channels"),
    [
        *(("adaln", channels) for channels in (32, 1152, 1536, 8192)),
        ("token_merge_adaln", 312),
        ("token_split_concat_adaln", 936),
    ],
)
def test_tiles_fit_the_shapes_of_any_model(op, channels):
    slices = {"adaln": 1, "token_merge_adaln": 4, "token_split_concat_adaln": 2}[op]
    for samples, rows in itertools.product(
        (1, 2, 8, 24, 32, 64, 96, 200, 256, 1000), (1, 16, 77, 256, 4096 + 333)
    ):
        tokens = torch.empty(channels).expand(samples, rows * (4 if slices == 4 else 1), channels)
        others = (None, tokens) if slices == 2 else (tokens, None)  # x and y
        launch, programs, _ = autograd._plan(*others, *[None] * 4, op, "forward", 2, 1e-6, F32)
        tile_rows = launch.constants["ROWS"]
        assert programs == math.ceil(rows / tile_rows)
        assert launch.programs == samples * programs
        launch, programs, _ = autograd._plan(None, None, *others, *[None] * 3, op, "backward", 2, 0.0, None)
        tile_rows, *_, rows_per_program = launch.constants["ROWS"], *launch.numbers
        assert (programs - 1) * rows_per_program < rows <= programs * rows_per_program
        assert tile_rows * slices * launch.constants["BLOCK_C"] <= 8192
        # At least one program for each multiprocessor, unless there are too few tiles.
        assert launch.programs >= min(samples * math.ceil(rows / tile_rows), 132)
        # About two, unless there are more samples: each sample takes a program.
        assert launch.programs == samples * programs <= max(samples, 352)
