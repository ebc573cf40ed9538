"""The Triton kernels of `amm_attention`: interpreted on the CPU at small shapes, on a GPU at real ones."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from attention_cases import Case, check, make_inputs, run, slack_of_saturated_rows

import edt_kernels
from benchmarks.budget import assert_within_budget
from edt_kernels.amm_attention import autograd

SMALL_CASES = [
    Case((1, 1), head_dim=16),
    Case((1, 1), batch_size=70, heads=1),
    Case((3, 3)),
    Case((4, 4), batch_size=5, heads=3),
    Case((4, 4), head_dim=16, modulation="per head"),
    Case((4, 4), batch_size=3, modulation="fixed"),
    Case((8, 8), heads=1, modulation="fixed"),
    Case((2, 8), head_dim=72, heads=3),
    Case((3, 11), head_dim=16),
    Case((5, 3), extra=(1, 2), modulation="per head"),
    Case((4, 4), batch_size=3, extra=(0, 1)),
    Case((8, 8)),
    Case((8, 8), heads=1, layout="heads first"),
    Case((5, 7), heads=1, layout="strided", head_dim=20),
    Case((7, 5), bias=False),
    Case((8, 4), modulation=None),
    Case((6, 6), bias=False, modulation=None, head_dim=8),
    Case((9, 9), batch_size=1, heads=1, head_dim=72, extra=(3, 0)),
    Case((9, 7), batch_size=1, modulation="fixed", extra=(2, 0)),
    Case((10, 13), batch_size=1, heads=1),  # more tokens than one tile, tiles cut by the edge of the grid
    Case((16, 16), batch_size=1, heads=1),
    Case((2, 70), batch_size=1, heads=1, head_dim=128),  # a row of the grid longer than a tile
    Case((11, 11), batch_size=1, heads=2, head_dim=32, extra=(7, 5), modulation="per head"),
]


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_interpreted_kernels_stay_within_the_error_budget(case, dtype):
    check(case, dtype, "cpu")


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in SMALL_CASES if case.modulation], ids=str)
def test_tables_gathered_as_those_of_long_sequences(case, dtype, monkeypatch):
    monkeypatch.setattr(autograd, "_MATRIX_TOKENS", 0)
    check(case, dtype, "cpu")


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
def test_a_bias_of_any_size_in_16_bits():
    """Its matrix is in float16: −∞ is −∞, −10⁹ and 10⁵ are finite."""
    case = Case((4, 4), modulation=None)
    inputs = make_inputs(case, torch.float16, "cpu")
    bias = inputs["rel_pos_bias"] = inputs["rel_pos_bias"].float()
    bias[3], bias[5], bias[0] = float("-inf"), -1e9, 1e5
    result = run(edt_kernels.amm_attention, case, inputs)
    exact = run(edt_kernels.reference.amm_attention, case, inputs, torch.float64)
    for name, value in result.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=0.01, atol=0.01)


RESIDENT_CASES = [
    Case((9, 15), batch_size=1, heads=1, modulation=None),
    Case((16, 16), batch_size=1, heads=1, modulation=None),
    Case((16, 16), batch_size=1, heads=2, modulation="per head"),
    Case((11, 11), batch_size=1, heads=2, head_dim=40, extra=(7, 5), modulation=None),
    Case((8, 16), batch_size=1, heads=1, bias=False, modulation=None, layout="heads first"),
    Case((5, 25), batch_size=2, heads=3, extra=(1, 2), modulation=None),
]


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("case", RESIDENT_CASES, ids=str)
def test_whole_heads_on_the_chip(case, monkeypatch):
    monkeypatch.setattr(autograd, "_RESIDENT_HEADS", 1)
    if case.num_tokens > 128:
        monkeypatch.setattr(autograd.kernels, "forward", None)  # the general kernels are not called
    if case.num_tokens in (128, 256) and not case.modulation:
        monkeypatch.setattr(autograd.kernels, "backward_q", None)
    check(case, torch.float16, "cpu")


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("extra", [(0, 0), (2, 1)])
def test_a_program_walks_over_its_share_of_the_batch(extra, monkeypatch):
    """Several steps a program, the last share short."""
    monkeypatch.setattr(autograd, "_SHORT_PROGRAMS", 1)
    check(Case((3, 3), batch_size=23, extra=extra, modulation=None), torch.float16, "cpu")
    check(
        Case((8, 8) if extra == (0, 0) else (7, 8), batch_size=5, extra=extra, modulation=None),
        torch.float16,
        "cpu",
    )


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
def test_an_expanded_upstream_gradient():
    case = Case((3, 5), batch_size=1)
    inputs = make_inputs(case, torch.float32, "cpu")
    inputs["grad"] = torch.ones(1, 1, 1, 1).expand_as(inputs["grad"])  # what .sum().backward() passes
    result = run(edt_kernels.amm_attention, case, inputs)
    exact = run(edt_kernels.reference.amm_attention, case, inputs, torch.float64)
    eager = run(edt_kernels.reference.amm_attention, case, inputs)
    for name in exact:
        assert_within_budget(name, result[name], exact[name], eager[name])


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("grid", [(4, 4), (9, 9)])
def test_tables_without_gradient_cost_no_table_kernel(grid, monkeypatch):
    case = Case(grid)
    inputs = make_inputs(case, torch.float32, "cpu")
    qkv = inputs["qkv"].requires_grad_()
    monkeypatch.setattr(autograd.table_kernels, "backward_tables", None)  # not called
    monkeypatch.setattr(autograd.table_kernels, "reduce_table_partials", None)
    out = edt_kernels.amm_attention(
        *qkv.unbind(2), grid=case.grid, modulation=inputs["modulation"], rel_pos_bias=inputs["rel_pos_bias"]
    )
    out.backward(inputs["grad"])
    assert torch.isfinite(qkv.grad).all()


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
def test_an_empty_batch():
    qkv = torch.empty(0, 16, 3, 2, 52, requires_grad=True)
    bias = torch.zeros(49, 2, requires_grad=True)
    out = edt_kernels.amm_attention(*qkv.unbind(2), grid=(4, 4), rel_pos_bias=bias)
    out.sum().backward()
    assert out.shape == (0, 16, 2, 52)
    assert qkv.grad.shape == qkv.shape
    assert torch.equal(bias.grad, torch.zeros(49, 2))


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
def test_large_logits_do_not_overflow():
    """The row maximum is subtracted before exponentiating, and padding keys must not bring it back."""
    case = Case((3, 3), batch_size=3, heads=1)
    inputs = make_inputs(case, torch.float32, "cpu")
    inputs["rel_pos_bias"] = inputs["rel_pos_bias"] * 10 - 300
    result = run(edt_kernels.amm_attention, case, inputs)
    exact = run(edt_kernels.reference.amm_attention, case, inputs, torch.float64)
    eager = run(edt_kernels.reference.amm_attention, case, inputs)
    for name in exact:
        # Backward restores probabilities from a logsumexp of this magnitude, which eager does not round.
        slack = 300 * torch.finfo(torch.float32).eps * exact[name].norm().item()
        assert_within_budget(name, result[name], exact[name], eager[name], slack)


SATURATED = {
    "one key for all": lambda q, k: (q + 3, 2 * k[..., :1].expand_as(k)),
    "each its own key": lambda q, k: (30 * q, k),
}


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("kind", SATURATED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("grid", "modulation", "within_budget"),
    [
        ((4, 4), "shared", True),  # a tile holds whole rows, which make their own sum and delta
        ((4, 4), None, False),
        ((5, 11), "shared", False),
        ((5, 11), None, False),
    ],
)
def test_rows_that_one_key_takes(grid, modulation, within_budget, dtype, kind):
    """The edge of the error budget: beyond it, gradients have what rounding the output and the logits makes."""
    # One key's gradient is one rounding times many: of eight sequences, that both errors are of several.
    case = Case(grid, head_dim=64, batch_size=8, modulation=modulation, bias=False)
    inputs = make_inputs(case, torch.float32, "cpu")
    q, k, v = inputs["qkv"].unbind(2)
    inputs["qkv"] = torch.stack([*SATURATED[kind](q, k), v], dim=2).to(dtype)
    inputs["grad"] = inputs["grad"].to(dtype)
    result = run(edt_kernels.amm_attention, case, inputs)
    exact = run(edt_kernels.reference.amm_attention, case, inputs, torch.float64)
    eager = run(edt_kernels.reference.amm_attention, case, inputs)
    slack = {} if within_budget else slack_of_saturated_rows(case, inputs, dtype)
    for name in exact:
        assert_within_budget(name, result[name], exact[name], eager[name], slack.get(name, 0.0))


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
def test_a_window_of_minus_infinity_in_the_bias():
    """Whole key tiles of a row may have no finite logit: tokens of a 16×16 grid see near ones only."""
    case = Case((16, 16), batch_size=1, heads=1, modulation=None)
    inputs = make_inputs(case, torch.float32, "cpu")
    far = torch.arange(-15, 16).abs() > 2
    inputs["rel_pos_bias"][(far[:, None] | far).flatten()] = float("-inf")
    result = run(edt_kernels.amm_attention, case, inputs)
    exact = run(edt_kernels.reference.amm_attention, case, inputs, torch.float64)
    eager = run(edt_kernels.reference.amm_attention, case, inputs)
    for name in exact:
        assert_within_budget(name, result[name], exact[name], eager[name])


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_either_precision_api_of_torch(precision):
    """Reading the older flag after the newer was set raises inside torch; in a process of its own."""
    program = (
        "import torch, edt_kernels\n"
        f"torch.backends.fp32_precision = {precision!r}\n"
        "q = torch.randn(1, 4, 1, 16)\n"
        "print(edt_kernels.amm_attention(q, q, q, grid=(2, 2)).isfinite().all().item())\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "True", result.stderr


@pytest.mark.interpreter
@pytest.mark.usefixtures("_triton")
def test_second_derivatives_are_refused_with_a_message():
    q, k, v = torch.randn(3, 1, 4, 1, 16, requires_grad=True).unbind(0)
    (grad,) = torch.autograd.grad(
        edt_kernels.amm_attention(q, k, v, grid=(2, 2)).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="amm_attention's Triton kernels cannot be differentiated twice"):
        torch.autograd.grad(grad.sum(), k)


@pytest.mark.interpreter
@pytest.mark.parametrize("modulation", [None, "shared", "per head"])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(modulation, bias):
    case = Case((2, 3), batch_size=1, modulation=modulation, bias=bias, extra=(1, 0), head_dim=16)
    inputs = make_inputs(case, torch.float32, "cpu")
    tables = [inputs.get(name) for name in ("modulation", "rel_pos_bias")]
    tables = [t if t is None else t.requires_grad_() for t in tables]
    q, k, v = (t.contiguous().requires_grad_() for t in inputs["qkv"].unbind(2))
    arguments = (q, k, v, *tables, *case.grid, case.extra[0], 0.25)
    torch.library.opcheck(torch.ops.edt_kernels.amm_attention.default, arguments)


@pytest.mark.interpreter
def test_compiles_without_a_graph_break(monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "triton")
    case = Case((3, 3), batch_size=1)
    inputs = make_inputs(case, torch.float32, "cpu")
    attention = torch.compile(edt_kernels.amm_attention, fullgraph=True, backend="aot_eager")
    compiled, eager = (run(f, case, inputs) for f in (attention, edt_kernels.amm_attention))
    for name in eager:
        assert torch.equal(compiled[name], eager[name]), name


@pytest.mark.interpreter
def test_float64_and_wide_heads_are_refused_by_the_kernels(monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "triton")
    q = torch.zeros(1, 4, 1, 16)
    with pytest.raises(TypeError, match=r"q is torch\.float64; the Triton kernels take"):
        edt_kernels.amm_attention(*[q.double()] * 3, grid=(2, 2))
    with pytest.raises(ValueError, match="q has a head dim of 144; the Triton kernels take up to 128"):
        edt_kernels.amm_attention(*[torch.zeros(1, 4, 1, 144)] * 3, grid=(2, 2))


def test_autocast_leaves_float64_alone():
    q = torch.randn(1, 4, 1, 16, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert edt_kernels.amm_attention(q, q, q, grid=(2, 2)).dtype == torch.float64
        assert edt_kernels.amm_attention(*[q.float()] * 3, grid=(2, 2)).dtype == torch.bfloat16


def test_meta_tensors_give_shapes():
    q = torch.empty(1, 4, 1, 16, device="meta")
    assert edt_kernels.amm_attention(q, q, q, grid=(2, 2)).shape == q.shape


def test_asking_for_triton_on_the_cpu_raises(monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "triton")
    q = torch.zeros(1, 4, 1, 16)
    with pytest.raises(RuntimeError, match="the Triton kernels run on CUDA or ROCm tensors, not on 'cpu'"):
        edt_kernels.amm_attention(q, q, q, grid=(2, 2))


def test_an_unknown_backend_raises(monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "cuda")
    q = torch.zeros(1, 4, 1, 16)
    with pytest.raises(ValueError, match="EDT_KERNELS_BACKEND is 'cuda'"):
        edt_kernels.amm_attention(q, q, q, grid=(2, 2))


def test_imports_and_runs_where_triton_is_missing():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, edt_kernels\n"
        "q = torch.randn(1, 4, 1, 16)\n"
        "edt_kernels.amm_attention(q, q, q, grid=(2, 2))\n"
        "import os; os.environ['EDT_KERNELS_BACKEND'] = 'triton'\n"
        "try: edt_kernels.amm_attention(q, q, q, grid=(2, 2))\n"
        "except RuntimeError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert "need the package triton, which is not installed" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("unit", "tokens", "head_dim", "heads", "has_modulation", "kernel"),
    [
        ("wgmma", 128, 52, 1024, False, "forward"),  # one program a head anyhow
        ("wgmma", 129, 52, 1024, False, "resident_forward"),
        ("wgmma", 256, 64, 264, False, "resident_forward"),
        ("wgmma", 256, 64, 263, False, "forward"),  # too few heads to fill a device by one program each
        ("wgmma", 256, 52, 1024, True, "resident_forward"),
        ("wgmma", 255, 52, 1024, True, "forward"),  # masks and a modulation
        ("wgmma", 256, 72, 1024, False, "forward"),
        ("wgmma", 256, 32, 1024, False, "forward"),
        ("wgmma", 257, 52, 1024, False, "forward"),
        ("mma", 256, 52, 1024, False, "forward"),
        ("tcgen05", 256, 52, 1024, False, "forward"),
        ("fma", 256, 52, 1024, False, "forward"),
    ],
)
def test_choice_of_the_forward_kernel(unit, tokens, head_dim, heads, has_modulation, kernel):
    assert autograd.choose_forward(unit, tokens, head_dim, heads, has_modulation) == kernel


@pytest.mark.parametrize(
    ("unit", "tokens", "head_dim", "heads", "has_modulation", "kernel"),
    [
        ("wgmma", 16, 52, 8, False, "short_backward"),
        ("wgmma", 64, 52, 8, False, "short_backward"),
        ("wgmma", 64, 52, 8, True, "backward"),
        ("wgmma", 64, 128, 8, False, "backward"),
        ("mma", 64, 52, 8, False, "backward"),
        ("mma", 32, 52, 8, False, "short_backward"),
        ("wgmma", 256, 52, 264, False, "resident_backward"),
        ("wgmma", 128, 64, 264, False, "resident_backward"),
        ("wgmma", 256, 52, 263, False, "backward"),  # too few heads to fill a device
        ("wgmma", 256, 52, 264, True, "backward"),
        ("wgmma", 256, 72, 264, False, "backward"),
        ("wgmma", 256, 32, 264, False, "backward"),
        ("wgmma", 256, 50, 264, False, "backward"),  # rows loaded by two bytes at a time
        ("wgmma", 255, 52, 264, False, "backward"),
        ("mma", 256, 52, 264, False, "backward"),
        ("tcgen05", 256, 52, 264, False, "backward"),
        ("fma", 256, 52, 264, False, "backward"),
    ],
)
def test_choice_of_the_backward_kernel(unit, tokens, head_dim, heads, has_modulation, kernel):
    assert autograd.choose_backward(unit, tokens, head_dim, heads, has_modulation) == kernel


@pytest.mark.parametrize(
    ("tokens", "tile"), [(5, (16, 16, 1, 2)), (17, (32, 32, 2, 2)), (64, (64, 64, 8, 2)), (65, (128, 64, 8, 2))]
)
def test_tiles_of_short_sequences_are_no_larger_than_they(tokens, tile):
    assert dataclasses.astuple(autograd.tiles_of("wgmma", tokens, 52)["forward"]) == tile


# Every attention of EDT-S, B and XL at 256² and 512², with their heads.
EDT_CASES = [
    Case((side, side), heads=heads, batch_size=batch_size)
    for side, all_heads, batch_size in [
        (4, (10, 20, 30), 64),
        (8, (8, 16, 24), 64),
        (16, (6, 12, 18), 16),
        (32, (6,), 2),
    ]
    for heads in all_heads
]
# As EDT trains, and samples outside its AMM blocks; enough heads for the kernels that keep them on the chip.
EDT_CASES += [
    dataclasses.replace(case, modulation=None, batch_size=48 if case.grid == (16, 16) else case.batch_size)
    for case in EDT_CASES
]
OTHER_GPU_CASES = [
    Case((16, 16), head_dim=64, heads=4, batch_size=4),
    Case((16, 16), head_dim=72, heads=16, batch_size=4),
    Case((24, 16), head_dim=128, heads=4, batch_size=2, extra=(77, 3), modulation="per head"),
    Case((64, 64), head_dim=52, heads=1, batch_size=1),
    Case((1, 4096), head_dim=16, heads=1, batch_size=1),
    Case((13, 29), head_dim=40, heads=3, batch_size=3, layout="heads first"),
]


# Every shape is compiled anew: bfloat16 for all, the other dtypes where they decide something.
GPU_CASES = [(case, torch.bfloat16) for case in [*SMALL_CASES, *EDT_CASES, *OTHER_GPU_CASES]]
GPU_CASES += [
    (case, dtype) for case in [*EDT_CASES[::3], *OTHER_GPU_CASES] for dtype in (torch.float16, torch.float32)
]


@pytest.mark.gpu
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize(("case", "dtype"), GPU_CASES, ids=str)
def test_gpu_kernels_stay_within_the_error_budget(case, dtype):
    check(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDT_CASES[::3], ids=str)
def test_gpu_gradients_are_bitwise_deterministic(case):
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    first = run(edt_kernels.amm_attention, case, inputs)
    for _ in range(19):
        again = run(edt_kernels.amm_attention, case, inputs)
        for name in first:
            assert torch.equal(again[name], first[name]), name


@pytest.mark.gpu
def test_gpu_memory_has_no_score_matrix():
    """Forward and backward allocate the output, the gradients, two statistics a row and table partials only."""
    case = Case((32, 32), heads=8, batch_size=8)
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    run(edt_kernels.amm_attention, case, inputs)  # compile outside the measurement
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(edt_kernels.amm_attention, case, inputs)
    peak = torch.cuda.max_memory_allocated() - before
    rows = case.batch_size * case.num_tokens * case.heads
    row_bytes = case.head_dim * 2
    # A program writes two partials a table at most (test_table_programs.py).
    cells = autograd.TABLE_TILES[autograd.matrix_unit(inputs["qkv"].device)].cells
    partials = 2 * 2 * autograd._TABLE_PROGRAMS * cells**2 * 4
    # Leaves' copy, their packed gradient and its three parts (autograd's), out; statistics; partials.
    bound = rows * row_bytes * (3 + 3 + 3 + 1) + rows * 4 * 2 + partials + (1 << 20)
    assert peak <= bound, f"{peak} bytes at most {bound}"
    assert peak < case.batch_size * case.heads * case.num_tokens**2 * 2


@pytest.mark.gpu
@pytest.mark.usefixtures("_much_memory")
@pytest.mark.parametrize(
    ("side", "modulated", "resident"),
    [(8, False, False), (16, False, True), (16, False, False), (16, True, False)],
)
def test_gpu_offsets_beyond_32_bits(side, modulated, resident, monkeypatch):
    """The last batch item lies more than 2³¹ elements after the first, in the inputs and the upstream gradient."""
    monkeypatch.setattr(autograd, "_RESIDENT_HEADS", 1 if resident else 1 << 30)
    N, offsets = side * side, 2 * side - 1
    shape, strides = (2, N, 1, 52), (2**31, 52, 52, 1)

    def far(values):
        base = torch.empty(2**31 + N * 52, dtype=torch.bfloat16, device="cuda")
        return base.as_strided(shape, strides).copy_(values)

    qkv, grad = torch.randn(shape, device="cuda"), torch.randn(shape, device="cuda")
    tables = {"rel_pos_bias": torch.randn(offsets**2, 1, device="cuda", requires_grad=True)}
    if modulated:
        tables["modulation"] = torch.rand(offsets, offsets, device="cuda", requires_grad=True)

    def results(qkv, grad):
        leaf = qkv.detach().requires_grad_()
        out = edt_kernels.amm_attention(leaf, leaf, leaf, grid=(side, side), **tables)
        return out, *torch.autograd.grad(out, [leaf, *tables.values()], grad)

    near = results(qkv.bfloat16(), grad.bfloat16())
    for result, expected in zip(results(far(qkv), far(grad)), near):
        assert torch.equal(result, expected)


@pytest.mark.gpu
def test_gpu_compile_and_graph_capture():
    case = Case((8, 8), heads=4)
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    eager = run(edt_kernels.amm_attention, case, inputs)
    compiled = run(torch.compile(edt_kernels.amm_attention, fullgraph=True), case, inputs)
    for name in eager:
        assert torch.equal(compiled[name], eager[name]), name
    q, k, v = inputs["qkv"].unbind(2)
    tables = {name: inputs[name] for name in ("modulation", "rel_pos_bias")}
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = edt_kernels.amm_attention(q, k, v, grid=case.grid, **tables)
    graph.replay()
    assert torch.equal(out, eager["out"])
