"""What must hold of every op for whatever arguments: drawn by hypothesis, the same ones in every run.

Shapes, strides, dtypes, grids, masks and tables are drawn together, so that combinations are met that nobody
thought of. Few examples by default; many are marked slow; a GPU gets real shapes.
"""

import dataclasses
import glob
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import attention_cases
import calls
import norm_cases
import pytest
import torch
from calls import arguments, call, gradients
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, lay_out
from norm_cases import BF16, F16, F32

import edt_kernels
from edt_kernels.amm_attention import autograd

pytestmark = pytest.mark.usefixtures("_triton")

interpreter, gpu, slow = pytest.mark.interpreter, pytest.mark.gpu, pytest.mark.slow
INTERPRETED_DTYPES = (F32, F16)  # the interpreter's products of bfloat16 are wrong
GPU_DTYPES = (BF16, F16, F32)
# Rows that are all alike make sums whose roundings all go one way, and gradients that cancel to nothing:
# `test_a_view_gives_what_its_copy_gives` has them.
UNEQUAL_ROWS = tuple(layout for layout in LAYOUTS if layout != "expanded rows")
# The most numbers of an example on a GPU, in float64 too.
GPU_NUMBERS = 1 << 24


def examples(number: int) -> settings:
    """So many examples, the same in every run; the fixture sets what no example changes."""
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        phases=[
            Phase.generate
        ],  # a smaller case of a broken error budget is one of less error, not of a clearer one
    )


@st.composite
def norm_examples(draw, op: str, dtypes=INTERPRETED_DTYPES, real: bool = False) -> norm_cases.Case:
    """LayerNorm of fewer than four channels is left out: its gradients cancel to nothing."""
    side = st.integers(1, 16 if real else 3) if op == "token_merge_adaln" else st.integers(1, 32 if real else 6)
    step = 2 if op == "token_merge_adaln" else 1
    grid = step * draw(side), step * draw(side)
    edt_widths = st.sampled_from([312, 416, 520, 624, 832, 936, 1040, 1152, 1248, 1560])
    small_widths = st.one_of(st.integers(4, 20), st.integers(4, 80), st.sampled_from([104, 128, 312]))
    channels = draw(st.one_of(edt_widths, st.integers(4, 2048)) if real else small_widths)
    most = max(GPU_NUMBERS // (8 * math.prod(grid) * channels), 1) if real else 4
    dtype = st.sampled_from(dtypes)
    chooses_dtype = op in ("adaln", "gated_residual_adaln", "token_merge_adaln")
    return norm_cases.Case(
        op,
        grid,
        channels,
        batch_size=draw(st.integers(1 if real else 0, min(most, 64))),
        stream=draw(dtype),
        branch=draw(dtype),
        modulation=draw(dtype),
        out_dtype=draw(st.one_of(st.none(), dtype)) if chooses_dtype else None,
        keep=draw(st.booleans()) if op == "token_merge_adaln" else False,
        layout=draw(st.sampled_from(UNEQUAL_ROWS)),
        grad_layout=draw(st.sampled_from(UNEQUAL_ROWS)),
        eps=draw(st.sampled_from([1e-6, 1e-3])),
    )


@st.composite
def attention_examples(draw, dtypes=INTERPRETED_DTYPES, real: bool = False):
    """A case and the dtype of q, k and v.

    Logits stay moderate and tokens are not few, because the gradients of a softmax that is all at one token cancel
    to nothing: of few tokens there are cases in test_amm_attention.py.
    """
    side = st.integers(1, 40 if real else 9)
    grid = draw(st.tuples(side, side).filter(lambda grid: grid[0] * grid[1] >= 9))
    real_dims = st.one_of(st.sampled_from([52, 56, 64, 72, 128]), st.integers(1, 128))
    head_dim = draw(real_dims if real else st.one_of(st.integers(1, 20), st.integers(1, 80), st.integers(65, 128)))
    extra = draw(st.sampled_from([(0, 0), (0, 1), (1, 0), (3, 2), (77, 0) if real else (2, 5)]))
    heads = draw(st.integers(1, 8 if real else 3))
    num_tokens = math.prod(grid) + sum(extra)
    most = max(GPU_NUMBERS // (heads * num_tokens**2), 1) if real else 4
    layouts = st.sampled_from([*UNEQUAL_ROWS, "heads first"])
    factor = draw(st.sampled_from([None, None, 0.0, -1.0, 0.5, 1.5]))
    case = attention_cases.Case(
        grid,
        head_dim=head_dim,
        batch_size=draw(st.integers(1 if real else 0, min(most, 64))),
        heads=heads,
        extra=extra,
        bias=draw(st.booleans()),
        modulation=draw(st.sampled_from([None, "shared", "per head", "fixed"])),
        layout=draw(layouts),
        grad_layout=draw(layouts),
        tables=draw(st.sampled_from(dtypes)),
        scale=None if factor is None else factor * head_dim**-0.5,
    )
    return case, draw(st.sampled_from(dtypes))


@interpreter
@pytest.mark.parametrize("op", norm_cases.OPS)
@examples(15)
@given(data=st.data())
def test_norm_ops_stay_within_the_error_budget(op, data):
    norm_cases.check(data.draw(norm_examples(op)), "cpu")


@slow
@interpreter
@pytest.mark.parametrize("op", norm_cases.OPS)
@examples(400)
@given(data=st.data())
def test_norm_ops_stay_within_the_error_budget_in_many_examples(op, data):
    norm_cases.check(data.draw(norm_examples(op)), "cpu")


@gpu
@pytest.mark.parametrize("op", norm_cases.OPS)
@examples(60)
@given(data=st.data())
def test_gpu_norm_ops_stay_within_the_error_budget(op, data):
    norm_cases.check(data.draw(norm_examples(op, GPU_DTYPES, real=True)), "cuda")


@pytest.mark.long
@interpreter
@pytest.mark.usefixtures("_resident")
@examples(40)
@given(drawn=attention_examples())
def test_attention_stays_within_the_error_budget(drawn):
    case, dtype = drawn
    attention_cases.check(case, dtype, "cpu", logsumexp=math.log(case.num_tokens))


@slow
@interpreter
@pytest.mark.usefixtures("_resident")
@examples(500)
@given(drawn=attention_examples())
def test_attention_stays_within_the_error_budget_in_many_examples(drawn):
    case, dtype = drawn
    attention_cases.check(case, dtype, "cpu", logsumexp=math.log(case.num_tokens))


@gpu
@examples(120)
@given(drawn=attention_examples(GPU_DTYPES, real=True))
def test_gpu_attention_stays_within_the_error_budget(drawn):
    case, dtype = drawn
    attention_cases.check(case, dtype, "cuda", logsumexp=math.log(case.num_tokens))


def same_bits(results, expected) -> None:
    for name in expected:
        assert torch.equal(results[name], expected[name]), name


def gives_what_its_copy_gives(op: str, layout: str, dtype: torch.dtype, device: str) -> None:
    """Strides are no part of the numbers: outputs and gradients have the same bits as those of contiguous copies,
    where arguments and upstream gradients are views."""
    tensors = arguments(op, grid=(2, 6), channels=20, batch_size=3, dtype=dtype, device=device)

    def results(strided: bool) -> dict[str, torch.Tensor]:
        def prepare(tensor):
            view = lay_out(tensor.detach(), layout)
            return view if strided else view.contiguous()

        leaves = {name: prepare(tensor).requires_grad_() for name, tensor in tensors.items()}
        outputs = call(edt_kernels, op, leaves, grid=(2, 6))
        upstream = [prepare(grad) for grad in calls.random_like(outputs)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        return dict(enumerate(outputs)) | dict(zip(leaves, grads))

    same_bits(results(strided=True), results(strided=False))


@interpreter
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("op", calls.CALLS)
def test_a_view_gives_what_its_copy_gives(op, layout):
    gives_what_its_copy_gives(op, layout, F16, "cpu")


@gpu
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("op", calls.CALLS)
def test_gpu_a_view_gives_what_its_copy_gives(op, layout, dtype):
    gives_what_its_copy_gives(op, layout, dtype, "cuda")


@interpreter
@pytest.mark.parametrize("op", norm_cases.OPS)
def test_one_token_of_five_channels(op):
    """The least of everything: one sample, one row, less than any tile."""
    grid = (2, 2) if op == "token_merge_adaln" else (1, 1)
    norm_cases.check(norm_cases.Case(op, grid, 5, batch_size=1), "cpu")


@interpreter
def test_one_channel_has_no_norm():
    """Its LayerNorm is 0 whatever it is: the output is the shift, and no gradient passes."""
    x, shift, scale = tensors = [torch.randn(shape, requires_grad=True) for shape in ((2, 3, 1), (2, 1), (2, 1))]
    out = edt_kernels.adaln(x, shift, scale)
    assert torch.equal(out, shift.unsqueeze(1).expand_as(out))
    grad_x, grad_shift, grad_scale = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert torch.equal(grad_x, torch.zeros_like(x))
    assert torch.equal(grad_shift, torch.full_like(shift, 3))
    assert torch.equal(grad_scale, torch.zeros_like(scale))


@interpreter
@pytest.mark.parametrize("op", calls.CALLS)
def test_results_do_not_depend_on_what_memory_held(op):
    """NaN in one run, what the last call left there in the other."""

    def results() -> dict:
        tensors = arguments(op)
        outputs = call(edt_kernels, op, tensors)
        return dict(enumerate(outputs)) | gradients(outputs, tensors)

    poisoned = results()
    torch.use_deterministic_algorithms(False)
    same_bits(results(), poisoned)


@gpu
@pytest.mark.parametrize("op", norm_cases.OPS)
@examples(8)
@given(data=st.data())
def test_gpu_norm_gradients_have_the_same_bits_in_20_runs(op, data):
    case = data.draw(norm_examples(op, GPU_DTYPES, real=True))
    inputs = norm_cases.make_inputs(case, "cuda")
    first = norm_cases.run(edt_kernels, case, inputs)
    for _ in range(19):
        same_bits(norm_cases.run(edt_kernels, case, inputs), first)


@gpu
@examples(20)
@given(drawn=attention_examples(GPU_DTYPES, real=True))
def test_gpu_attention_gradients_have_the_same_bits_in_20_runs(drawn):
    case, dtype = drawn
    inputs = attention_cases.make_inputs(case, dtype, "cuda")
    first = attention_cases.run(edt_kernels.amm_attention, case, inputs)
    for _ in range(19):
        same_bits(attention_cases.run(edt_kernels.amm_attention, case, inputs), first)


# A head dim of each padded size in the table of tiles.
HEAD_DIMS = (52, 104)
TILES = [(unit, dict(zip((64, 128), HEAD_DIMS))[padded]) for unit, padded in autograd._TILES]
# Sequences shorter than any tile, of one tile, and of more. Short ones without a modulation have a backward kernel
# of their own, long ones kernels that keep a whole head on the chip.
SHORT_AND_LONG = [
    attention_cases.Case((1, 2), batch_size=3, heads=1, modulation=None),
    attention_cases.Case((4, 4), batch_size=5, heads=1, modulation=None),
    attention_cases.Case((4, 4), batch_size=5, heads=1, modulation="per head"),
    attention_cases.Case((5, 5), batch_size=3, heads=1, modulation=None, extra=(2, 1)),
    attention_cases.Case((5, 3), batch_size=3, heads=1, modulation="fixed", extra=(2, 1)),
    attention_cases.Case((8, 8), batch_size=1),
    attention_cases.Case((8, 8), batch_size=1, modulation=None),
    attention_cases.Case((7, 11), batch_size=1, heads=1, modulation=None),
    attention_cases.Case((7, 11), batch_size=1, heads=1),
]


@pytest.fixture
def _resident(monkeypatch):
    """Heads kept on the chip however few they are."""
    monkeypatch.setattr(autograd, "_RESIDENT_HEADS", 1)


@interpreter
@pytest.mark.usefixtures("_resident")
@pytest.mark.parametrize(("unit", "head_dim"), TILES)
@pytest.mark.parametrize("case", [SHORT_AND_LONG[1], *SHORT_AND_LONG[-2:]], ids=str)
def test_every_tile_of_the_attention(case, unit, head_dim, monkeypatch):
    monkeypatch.setattr(autograd, "matrix_unit", lambda _device: unit)
    attention_cases.check(dataclasses.replace(case, head_dim=head_dim), F16, "cpu")


@slow
@interpreter
@pytest.mark.usefixtures("_resident")
@pytest.mark.parametrize(("unit", "head_dim"), TILES)
@pytest.mark.parametrize(
    "case", [*SHORT_AND_LONG, attention_cases.Case((11, 13), batch_size=1, heads=1, extra=(5, 0))], ids=str
)
def test_every_tile_of_the_attention_in_more_cases(case, unit, head_dim, monkeypatch):
    monkeypatch.setattr(autograd, "matrix_unit", lambda _device: unit)
    attention_cases.check(dataclasses.replace(case, head_dim=head_dim), F16, "cpu")


@gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.usefixtures("_resident")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    "case",
    [
        *SHORT_AND_LONG,
        attention_cases.Case((16, 16), heads=6, batch_size=8, modulation="per head"),
        attention_cases.Case((16, 16), heads=6, batch_size=8, modulation=None),
    ],
    ids=str,
)
def test_gpu_every_tile_of_the_attention(case, head_dim, dtype):
    """Those that dispatch can choose on this device: others may not fit it, or are known not to work on it."""
    attention_cases.check(dataclasses.replace(case, head_dim=head_dim), dtype, "cuda")


# A width in each power of two that a row tile can have.
WIDTHS = (7, 25, 40, 100, 130, 312, 624, 1248, 2080, 5000)


@slow
@interpreter
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("op", norm_cases.OPS)
def test_every_row_tile_of_the_norm_ops(op, channels):
    norm_cases.check(norm_cases.Case(op, (6, 10), channels, stream=F16, branch=F16), "cpu")


@gpu
@pytest.mark.parametrize("branch", [BF16, F32], ids=str)
@pytest.mark.parametrize("grid", [(2, 2), (32, 32)])
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("op", norm_cases.OPS)
def test_gpu_every_row_tile_of_the_norm_ops(op, channels, grid, branch):
    norm_cases.check(norm_cases.Case(op, grid, channels, batch_size=3, branch=branch, modulation=branch), "cuda")


def number_of_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def normed_rows(op: str, tensors: dict[str, torch.Tensor]) -> int:
    """Rows that have a mean and a variance; of the attention, rows that have a logsumexp."""
    rows = {
        "adaln": lambda: tensors["x"].shape[:2].numel(),
        "amm_attention": lambda: tensors["q"].shape[:3].numel(),
        "gated_residual": lambda: 0,
        "gated_residual_adaln": lambda: tensors["x"].shape[:2].numel(),
        "token_merge_adaln": lambda: tensors["x"].shape[:2].numel() // 4,
        "token_split_concat_adaln": lambda: tensors["skip"].shape[:2].numel(),
    }
    return rows[op]()


@interpreter
@pytest.mark.parametrize("op", calls.OPS)
def test_no_more_is_kept_for_backward_than_the_docstring_says(op):
    """The arguments that it names and 8 bytes a normed row; for gated_residual_adaln x' instead of x; for the
    attention its output too, and 4 bytes a row and head."""
    tensors = arguments(op, dtype=F16)
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = call(edt_kernels, op, tensors)
    names = {
        "adaln": ("x", "scale"),
        "amm_attention": ("q", "k", "v", "modulation", "rel_pos_bias"),
        "gated_residual": ("y", "gate"),
        "gated_residual_adaln": ("y", "gate", "scale"),
        "token_merge_adaln": ("x", "scale"),
        "token_split_concat_adaln": ("x", "skip", "scale"),
    }[op]
    expected = number_of_bytes(*(tensors[name] for name in names))
    expected += normed_rows(op, tensors) * (4 if op == "amm_attention" else 8)
    if op in ("amm_attention", "gated_residual_adaln"):
        expected += number_of_bytes(outputs[0])
    assert number_of_bytes(*kept.values()) == expected


@gpu
@pytest.mark.parametrize("op", calls.OPS)
def test_gpu_peak_memory(op):
    """Of forward and backward, inputs and upstream gradients apart, at most

    outputs + gradients of all arguments + 8 bytes a normed row (or query row and head) + partial sums + 1 MiB

    where partial sums are in float32: for a vector of a norm op 600 of its width and two a sample; for a table of
    the attention 600 of 64×64, its gradient for every head, and its copy.
    """
    grid = (32, 32)
    tensors = arguments(op, grid=grid, channels=1024, batch_size=16, heads=16, dtype=BF16, device="cuda")
    upstream = calls.random_like(call(edt_kernels, op, tensors, grid))

    def run():
        outputs = call(edt_kernels, op, tensors, grid)
        return outputs, torch.autograd.grad(outputs, list(tensors.values()), upstream)

    # Compile outside the measurement, and keep the NaN that deterministic mode writes out of the peak.
    torch.use_deterministic_algorithms(False)
    results = run()
    bound = number_of_bytes(*results[0], *results[1]) + 8 * normed_rows(op, tensors) + (1 << 20)
    if op == "amm_attention":
        tables = 2, 63 * 63 * 16
        bound += 4 * tables[0] * (600 * 64 * 64 + 3 * tables[1])
    else:
        vectors = [tensor for tensor in tensors.values() if tensor.ndim == 2]
        bound += sum(4 * vector.shape[1] * (600 + 2 * 16) for vector in vectors)
    del results
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= bound, f"{peak} bytes, at most {bound}"


SANITIZED = """
import torch, calls, edt_kernels
for op in calls.CALLS:
    for dtype in (torch.float32, torch.bfloat16):
        for size in ({"grid": (4, 2)}, {"grid": (6, 10), "channels": 104, "batch_size": 3}):
            tensors = calls.arguments(op, dtype=dtype, device="cuda", **size)
            calls.gradients(calls.call(edt_kernels, op, tensors, size["grid"]), tensors)
torch.cuda.synchronize()
"""


def compute_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *sorted(glob.glob("/usr/local/cuda*"))]
    search = os.pathsep.join([os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home)])
    return shutil.which("compute-sanitizer", path=search)


@gpu
@slow  # minutes, and memcheck may report what is none: github.com/NVIDIA/compute-sanitizer-samples/issues/19
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_gpu_compute_sanitizer_finds_nothing(tool):
    """Out-of-bounds accesses, each allocation on its own so that they show, and races in shared memory."""
    sanitizer = compute_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in a CUDA toolkit")
    tests = Path(__file__).parents[1]
    result = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        },
    )
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-2000:]}"
    assert "ERROR SUMMARY: 0 errors" in result.stdout or "0 hazards displayed" in result.stdout, result.stdout
