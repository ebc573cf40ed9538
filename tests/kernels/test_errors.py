"""Every refusal: its type, and a message that names the argument, what came and what is needed."""

import ast
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import GRID, OPS, arguments

import edt_kernels
from edt_kernels import _backend, _launch
from edt_kernels._checks import shown

Q = torch.zeros(1, 6, 2, 4)
ATTENTION = {"q": Q, "k": Q, "v": Q, "grid": (2, 3)}
NAN, INFINITY = math.nan, math.inf

BAD_ATTENTION = [
    ({"grid": (2, 2)}, ValueError, r"grid \(2, 2\) .* means 4 tokens, but q has 6"),
    ({"grid": (0, 6)}, ValueError, r"grid is \(0, 6\)"),
    ({"grid": 6}, TypeError, "grid is 6"),
    ({"grid": (2, 3, 1)}, TypeError, r"grid is \(2, 3, 1\)"),
    ({"grid": (2.0, 3)}, TypeError, r"grid is \(2\.0, 3\)"),
    ({"grid": (10**5000, 1)}, ValueError, "grid is a tuple; both sides must be at least 1 and at most 2147483647"),
    (
        {"k": Q.to_sparse()},
        TypeError,
        "k is a tensor of layout sparse_coo; it must be a floating-point tensor that",
    ),
    ({"v": Q.to(torch.float8_e4m3fn)}, TypeError, "v is torch.float8_e4m3fn; .* of 16, 32 or 64 bits"),
    ({"q": Q.long()}, TypeError, "q is torch.int64"),
    ({"k": Q.int()}, TypeError, "k is torch.int32"),
    ({"v": Q > 0}, TypeError, "v is torch.bool"),
    ({"v": [0.0]}, TypeError, "v is list"),
    ({"k": Q.half()}, TypeError, "k is torch.float16; it must be q's dtype, torch.float32"),
    ({"v": Q.double()}, TypeError, "v is torch.float64; it must be q's dtype"),
    ({"k": Q[:, :, :1]}, ValueError, r"k has shape \(1, 6, 1, 4\)"),
    ({"v": Q[:, :5]}, ValueError, r"v has shape \(1, 5, 2, 4\)"),
    ({"v": Q[..., :2]}, ValueError, r"v has shape \(1, 6, 2, 2\)"),
    ({"q": Q[0]}, ValueError, r"q has shape \(6, 2, 4\)"),
    ({"q": Q[..., :0], "k": Q[..., :0], "v": Q[..., :0]}, ValueError, "q has shape .* D must be at least 1"),
    ({"k": Q.to("meta")}, ValueError, "k is on meta"),
    ({"modulation": torch.ones(2, 3)}, ValueError, r"modulation has shape \(2, 3\); .*\(3, 5\) or \(2, 3, 5\)"),
    ({"modulation": torch.ones(3, 3, 5)}, ValueError, r"modulation has shape \(3, 3, 5\)"),
    ({"modulation": torch.ones(3, 5).long()}, TypeError, "modulation is torch.int64"),
    ({"modulation": torch.ones(3, 5).to("meta")}, ValueError, "modulation is on meta"),
    ({"rel_pos_bias": torch.zeros(15, 3)}, ValueError, r"rel_pos_bias has shape \(15, 3\); .*\(15, 2\)"),
    ({"rel_pos_bias": torch.zeros(9, 2)}, ValueError, r"rel_pos_bias has shape \(9, 2\)"),
    ({"rel_pos_bias": torch.zeros(15, 2).int()}, TypeError, "rel_pos_bias is torch.int32"),
    ({"rel_pos_bias": 0.0}, TypeError, "rel_pos_bias is float"),
    ({"scale": NAN}, ValueError, "scale is nan"),
    ({"scale": -INFINITY}, ValueError, "scale is -inf"),
    ({"scale": 1e39}, ValueError, r"scale is 1e\+39; it must be finite in float32"),
    (
        {"scale": -(10**400)},
        ValueError,
        "scale is an integer of 1329 bits; it must be within the range of a float",
    ),
    ({"scale": True}, TypeError, "scale is a bool"),
    ({"scale": "1"}, TypeError, "scale is a str"),
    ({"scale": torch.ones(1)}, TypeError, "scale is a Tensor"),
    ({"num_extra_tokens": (1, 0)}, ValueError, r"num_extra_tokens \(1, 0\) means 7 tokens"),
    ({"num_extra_tokens": (True, 0)}, TypeError, r"num_extra_tokens is \(True, 0\)"),
    ({"num_extra_tokens": (-1, 1)}, ValueError, r"num_extra_tokens is \(-1, 1\)"),
    ({"num_extra_tokens": 1}, TypeError, "num_extra_tokens is 1"),
]

BAD_TABLE = [
    ({"grid": (0, 4)}, ValueError, r"grid is \(0, 4\)"),
    ({"grid": 4}, TypeError, "grid is 4"),
    ({"grid": (4, 4), "form": "sin"}, ValueError, "form is 'sin'"),
    ({"grid": (4, 4), "radius": "2"}, TypeError, "radius is a str; it must be a number or None"),
    ({"grid": (4, 4), "radius": -1.0}, ValueError, r"radius is -1\.0"),
    ({"grid": (4, 4), "radius": NAN}, ValueError, "radius is nan"),
    ({"grid": (4, 4), "radius": INFINITY}, ValueError, "radius is inf"),
    (
        {"grid": (4, 4), "radius": 10**400},
        ValueError,
        "radius is an integer of 1329 bits; it must be within the range",
    ),
    ({"grid": (4, 4), "dtype": torch.int32}, TypeError, "dtype is torch.int32"),
    ({"grid": (4, 4), "dtype": None}, TypeError, "dtype is None"),
    ({"grid": (4, 4), "device": "abacus"}, ValueError, "device is 'abacus'; it must be one that torch has here"),
    ({"grid": (10**6, 10**6)}, ValueError, r"its table would have 3999996000001 entries, of at most 67108864"),
]


def bad_calls(op: str):
    """(argument, value, error, message) for what the norm-type ops check, one argument wrong at a time."""
    tensors = arguments(op)
    x_shape = tuple(tensors["x"].shape)
    for name, tensor in tensors.items():
        yield name, [0.0], TypeError, f"{name} is list; it must be a floating-point tensor"
        yield name, tensor.long(), TypeError, f"{name} is torch.int64; it must be a floating-point tensor"
        if name == "x":
            yield name, tensor[0], ValueError, f"x has shape {x_shape[1:]}; it must be (B, N, C)"
            yield name, tensor[..., :0], ValueError, f"x has shape {(*x_shape[:2], 0)}; it must be (B, N, C)"
        else:
            needed = f"{name} has shape (9, 9); x of shape {x_shape} needs {tuple(tensor.shape)}"
            yield name, torch.zeros(9, 9), ValueError, needed
            yield name, tensor.to("meta"), ValueError, f"{name} is on meta; it must be on x's device, cpu"
    if op != "gated_residual":
        yield "eps", "1", TypeError, "eps is a str; it must be a number"
        yield "eps", True, TypeError, "eps is a bool; it must be a number"
        for eps in (0.0, -1.0, 1e-40, 1e39, NAN, INFINITY):
            yield "eps", eps, ValueError, f"eps is {eps}; it must be positive and finite in float32"
    if op in ("adaln", "gated_residual_adaln", "token_merge_adaln"):
        needed = "it must be a floating-point torch.dtype of 16, 32 or 64 bits or None"
        yield "out_dtype", torch.int8, TypeError, f"out_dtype is torch.int8; {needed}"
        yield "out_dtype", "float16", TypeError, f"out_dtype is 'float16'; {needed}"
    if op in ("token_merge_adaln", "token_split_concat_adaln"):
        for grid in (8, (2, 2, 2), (4.0, 2), (True, 8)):
            yield "grid", grid, TypeError, f"grid is {grid!r}; it must be a pair of integers (H, W)"
        yield "grid", (0, 8), ValueError, "grid is (0, 8); both sides must be at least 1 and at most 2147483647"
        yield "grid", (4, 4), ValueError, f"grid (4, 4) means 16 tokens, but x has 8 (shape {x_shape})"
    if op == "token_merge_adaln":
        yield "grid", (8, 1), ValueError, "grid is (8, 1); both sides must be even to merge 2×2 tokens"
        yield "keep", torch.ones(2, 8), TypeError, "keep is torch.float32; it must be a bool tensor or None"
        yield "keep", [True], TypeError, "keep is list; it must be a bool tensor or None"
        keep = torch.ones(2, 7, dtype=torch.bool)
        yield "keep", keep, ValueError, "keep has shape (2, 7) on cpu; x needs (2, 8) on cpu"
        keep = torch.ones(2, 8, dtype=torch.bool, device="meta")
        yield "keep", keep, ValueError, "keep has shape (2, 8) on meta; x needs (2, 8) on cpu"
    if op == "token_split_concat_adaln":
        needed = "x has 22 channels; they must be four times the skip's, to split into 2×2 tokens"
        yield "x", torch.zeros(2, 8, 22), ValueError, needed


NORM_OPS = [op for op in OPS if op != "amm_attention"]
BAD_NORMS = [(op, *case) for op in NORM_OPS for case in bad_calls(op)]


def call_with(op: str, **changed):
    grid = {"grid": GRID} if op in ("amm_attention", "token_merge_adaln", "token_split_concat_adaln") else {}
    return getattr(edt_kernels, op)(**{**arguments(op), **grid, **changed})


class Subclass(torch.Tensor):
    pass


class Unprintable:
    def __repr__(self):
        raise OSError


def foreign_values(right) -> list:
    """Values of every kind that no argument was meant for, and a few that some accept."""
    scalars = [
        None,
        True,
        0,
        -1,
        1.5,
        NAN,
        INFINITY,
        10**400,
        -(10**5000),
        1j,
        "1",
        b"",
        torch.float16,
        torch.int8,
    ]
    scalars += [[], (), {}, object(), Unprintable(), lambda: 0, np.float32(1), np.zeros(3), torch.tensor(1.0)]
    pairs = [(4,), (4, 2, 1), (4.0, 2), ("4", "2"), (True, 8), (0, 8), (-4, -2), (10**400, 1), (10**6, 10**6)]
    if not isinstance(right, torch.Tensor):
        return [*scalars, *pairs]
    right = right.detach()
    dtypes = (torch.int64, torch.bool, torch.complex64, torch.float64, torch.float16, torch.float8_e4m3fn)
    tensors = [right.to(dtype) for dtype in dtypes]
    for dim in range(right.ndim):
        tensors += [torch.cat([right, right.narrow(dim, 0, 1)], dim), right.narrow(dim, 0, 0)]
        tensors += [right.narrow(dim, 0, 1), right.transpose(dim, dim - 1)]
    tensors += [right.flatten()[0], right[None], right[0], right.flatten(), right.to("meta"), right.to_sparse()]
    tensors += [
        right.float().to_mkldnn(),
        torch.nested.nested_tensor([right[0], right[0]]),
        right.as_subclass(Subclass),
    ]
    return [*scalars, *pairs, *tensors, right.numpy(), right.tolist(), right.flatten()[0].expand(right.shape)]


def all_arguments(op: str) -> dict:
    arrangement = {} if op in NORM_OPS[:3] else {"grid": GRID}
    if op == "amm_table":
        return {**arrangement, "form": "exp_cos", "radius": None, "dtype": torch.float32, "device": None}
    if op == "amm_attention":
        return {**arguments(op), **arrangement, "scale": None, "num_extra_tokens": (0, 0)}
    if op == "token_merge_adaln":
        arrangement["keep"] = torch.ones(2, 8, dtype=torch.bool)
    arrangement |= {} if op == "gated_residual" else {"eps": 1e-6}
    takes_dtype = op in ("adaln", "gated_residual_adaln", "token_merge_adaln")
    return {**arguments(op), **arrangement, **({"out_dtype": None} if takes_dtype else {})}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", [*OPS, "amm_table"])
def test_a_foreign_value_is_accepted_or_refused_by_name(op):
    """In each argument in turn."""
    right, refusals = all_arguments(op), []
    for name in right:
        for value in foreign_values(right[name]):
            try:
                out = getattr(edt_kernels, op)(**{**right, name: value})
            except (ValueError, TypeError) as error:
                refusals.append((name, shown(value), str(error)))
            else:
                tensors = out if isinstance(out, tuple) else (out,)
                assert all(tensor.is_floating_point() for tensor in tensors), (name, shown(value))
    for name, value, message in refusals:
        said = re.search(rf"\b{name}\b", message) and re.search(r"\b(must|needs?|means|of at most)\b", message)
        assert said, (name, value, message)
        assert len(message) < 500, (name, value)
    assert len(refusals) > 15 * len(right)


def pretend_kernels_run(monkeypatch) -> None:
    """What is refused before a launch can be seen where no kernel runs."""
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(_backend, "_INTERPRETED", True)


def ask_for_an_unknown_backend(monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "cuda")
    call_with("adaln")


def ask_for_triton_where_it_is_missing(monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(_backend, "triton", None)
    call_with("adaln")


def ask_for_triton_on_the_cpu(monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(_backend, "_INTERPRETED", False)
    call_with("adaln")


def give_kernels_float64(monkeypatch):
    pretend_kernels_run(monkeypatch)
    call_with("gated_residual", y=arguments("gated_residual")["y"].double())


def give_kernels_wide_heads(monkeypatch):
    pretend_kernels_run(monkeypatch)
    q = torch.zeros(1, 4, 1, 144)
    edt_kernels.amm_attention(q, q, q, grid=(2, 2))


def differentiate_kernels_twice(_monkeypatch):
    leaf = torch.ones(2, requires_grad=True)
    (gradient,) = _launch.once_differentiable("adaln", (leaf,), (torch.ones(2),))
    gradient.sum().backward()


REFUSALS = [
    (ask_for_an_unknown_backend, ValueError, "EDT_KERNELS_BACKEND is 'cuda'; it must be 'triton', 'reference'"),
    (ask_for_triton_where_it_is_missing, RuntimeError, "need the package triton, which is not installed; install"),
    (ask_for_triton_on_the_cpu, RuntimeError, "run on CUDA or ROCm tensors, not on 'cpu' tensors; set"),
    (give_kernels_float64, TypeError, "y is torch.float64; the Triton kernels take float32, bfloat16 or float16"),
    (give_kernels_wide_heads, ValueError, "q has a head dim of 144; the Triton kernels take up to 128"),
    (differentiate_kernels_twice, RuntimeError, "adaln's Triton kernels cannot be differentiated twice"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_ATTENTION)
def test_bad_attention_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        edt_kernels.amm_attention(**{**ATTENTION, **changed})


@pytest.mark.parametrize(("changed", "error", "message"), BAD_TABLE)
def test_bad_table_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        edt_kernels.amm_table(**changed)


@pytest.mark.parametrize(
    ("op", "name", "value", "error", "message"), BAD_NORMS, ids=[f"{op}-{name}" for op, name, *_ in BAD_NORMS]
)
def test_bad_arguments_of_norm_ops(op, name, value, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call_with(op, **{name: value})


@pytest.mark.parametrize(("refused", "error", "message"), REFUSALS)
def test_refusals(refused, error, message, monkeypatch):
    with pytest.raises(error, match=re.escape(message)):
        refused(monkeypatch)


def test_no_raise_is_without_a_case(monkeypatch):
    """A new refusal in an op, its checks or its dispatch needs a case in the tables above."""
    package = Path(edt_kernels.__file__).parent
    raises = {
        (str(path), node.lineno)
        for path in [*package.glob("_*.py"), *package.glob("norms/*.py"), *package.glob("amm_attention/*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
    }
    calls = [lambda _, changed=changed: edt_kernels.amm_attention(**{**ATTENTION, **changed})
             for changed, _, _ in BAD_ATTENTION]  # fmt: skip
    calls += [lambda _, changed=changed: edt_kernels.amm_table(**changed) for changed, _, _ in BAD_TABLE]
    calls += [
        lambda _, op=op, changed={name: value}: call_with(op, **changed) for op, name, value, *_ in BAD_NORMS
    ]
    calls += [refused for refused, _, _ in REFUSALS]
    for refused in calls:
        with monkeypatch.context() as patch, pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            refused(patch)
        raises -= {(str(entry.path), entry.lineno + 1) for entry in caught.traceback}
    assert len(raises) == 0, f"no test reaches the raise of {sorted(raises)}"
