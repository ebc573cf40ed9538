"""Peers of libraries that need a GPU, with stand-ins that compute what these say: how the adapters call them."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import edt_kernels
from benchmarks import attention_peers, cudnn_norm, harness, norms
from benchmarks.attention import AttentionCase
from benchmarks.shapes import AttentionShape, NormShape

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PEERS = [norms.Cudnn(), norms.LigerModulated(), attention_peers.FlashAttention4()]
MODULES = {
    "cuDNN adaLN": "cudnn",
    "Liger-Kernel modulated RMSNorm": "liger_kernel.ops.modulated_rms_norm",
    "FlashAttention 4": "flash_attn.cute",
}
PACKAGES = {
    "cuDNN adaLN": "nvidia-cudnn-frontend is not installed",
    "Liger-Kernel modulated RMSNorm": "liger-kernel with modulated_rms_norm is not installed",
    "FlashAttention 4": "flash-attn-4 is not installed",
}


def norm_case(op="gated_residual_adaln", dtype="float32", batch_size=2, backward=True) -> norms.NormCase:
    return norms.NormCase(op, NormShape("tiny", (2, 4), 24, False), batch_size, dtype, backward=backward)


def attention_case(head_dim=52, dtype="float16", **options) -> AttentionCase:
    return AttentionCase(AttentionShape("tiny", (4, 3), 2, head_dim), 2, dtype, backward=True, **options)


def install(monkeypatch, name: str, **values) -> None:
    """A module of that name, in packages that need not be there."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    for key, value in values.items():
        setattr(sys.modules[name], key, value)


def assert_right(peer, case) -> None:
    """As the harness judges it."""
    inputs = case.make_inputs(CPU, 0)
    computed = peer.computes(case)
    results = peer.restore(computed, harness.build_call(peer, computed, inputs)())
    role = harness.role_of(peer, case)
    worst = harness.worst_error(results, *harness.expected(computed, inputs), role, harness.coarsest_dtype(inputs))
    assert worst[1] <= 1, worst


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_missing_one_is_skipped_by_name(peer, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULES[peer.name], None)
    case = attention_case() if isinstance(peer, attention_peers.FlashAttention4) else norm_case()
    with pytest.raises(harness.UnavailableError, match=PACKAGES[peer.name]) as error:
        peer.check(case, GPU)
    assert error.value.status == "missing"
    with pytest.raises(harness.UnavailableError, match="need a GPU"):
        peer.check(case, CPU)


def test_they_are_among_the_implementations():
    found = [*norms.implementations("adaln"), *attention_peers.implementations()]
    assert {peer.name for peer in PEERS} <= {one.name for one in found}


@pytest.mark.parametrize("op", ["token_merge_adaln", "gated_residual"])
@pytest.mark.parametrize("peer", PEERS[:2], ids=lambda peer: peer.name)
def test_ops_that_libraries_have_not(peer, op):
    with pytest.raises(harness.UnavailableError, match="has nothing like it"):
        peer.check(norm_case(op), GPU)


def test_flash_attention_4(monkeypatch):
    calls = []

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        calls.append((q.shape, q.dtype, softmax_scale, causal))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=softmax_scale)
        return out.transpose(1, 2), None

    install(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_func)
    peer, case = attention_peers.FlashAttention4(), attention_case(grad_bias=True)
    peer.check(case, GPU)
    assert_right(peer, case)
    # (B, N, heads, D) with D a multiple of 8, and the scale of the head dim as it was.
    assert set(calls) == {((2, 12, 2, 56), torch.float16, 52**-0.5, False)}
    assert harness.role_of(peer, case) == "bound"
    with pytest.raises(harness.UnavailableError, match="takes bfloat16 and float16"):
        peer.check(attention_case(dtype="float32"), GPU)


@pytest.mark.parametrize("op", ["adaln", "gated_residual_adaln"])
@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_ligers_modulated_norm(op, dtype, monkeypatch):
    calls = []

    def apply(x, weight, scale, shift, eps, offset, casting_mode, in_place):
        calls.append((x.shape, weight, scale.shape, shift.shape, scale.dtype == x.dtype, eps))
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return F.rms_norm(x, x.shape[-1:], eps=eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    function = SimpleNamespace(apply=apply)
    install(monkeypatch, "liger_kernel.ops.modulated_rms_norm", LigerModulatedRMSNormFunction=function)
    peer, case = norms.LigerModulated(), norm_case(op, dtype)
    peer.check(case, GPU)
    assert_right(peer, case)
    assert set(calls) == {((2, 8, 24), None, (2, 24), (2, 24), True, 1e-6)}
    assert harness.role_of(peer, case) == "bound"  # RMSNorm computes less


class Described:
    """A tensor of a graph."""

    def __init__(self, dims=None, dtype=None):
        self.dims, self.dtype, self.uid, self.is_output = dims, dtype, None, False

    def set_uid(self, uid):
        self.uid = uid
        return self

    def set_output(self, is_output):
        self.is_output = is_output
        return self

    def set_data_type(self, dtype):
        self.dtype = dtype
        return self


class Graph:
    """cuDNN's, computed by torch."""

    def __init__(self, handle, intermediate_data_type, compute_data_type):
        assert (handle, intermediate_data_type, compute_data_type) == (7, "fp32", "fp32")
        self.inputs, self.outputs = {}, []

    def tensor(self, name, dim, stride, data_type):
        assert stride == (dim[1] * dim[2], dim[2], 1)
        return Described(dim, data_type)

    def tensor_like(self, tensor):
        assert tensor.device == CPU
        return Described(tuple(tensor.shape), tensor.dtype)

    def adalayernorm(self, name, norm_forward_phase, **inputs):
        self.inputs, self.training = inputs, norm_forward_phase == "training"
        self.outputs = [Described() for _ in range(3)]
        return self.outputs

    def adalayernorm_backward(self, name, **inputs):
        self.inputs, self.outputs = inputs, [Described() for _ in range(3)]
        return self.outputs

    def build(self, heuristics):
        assert heuristics == ["A", "FALLBACK"]

    def get_workspace_size(self):
        return 3

    def execute(self, tensors, workspace, handle):
        assert (workspace.numel(), handle) == (3, 7)
        given = {}
        for name, described in self.inputs.items():
            tensor = tensors[described.uid]
            assert (tuple(tensor.shape), tensor.dtype) == (described.dims, described.dtype), name
            assert tensor.is_contiguous(), name
            given[name] = tensor.double()
        x, scale = given["input"], given["scale"]
        if "epsilon" in given:
            mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
            inv_variance = (variance + given["epsilon"]).rsqrt()
            results = ((x - mean) * inv_variance * scale + given["bias"], mean, inv_variance)
            assert [one.is_output for one in self.outputs] == [True, self.training, self.training]
        else:
            normed, grad = (x - given["mean"]) * given["inv_variance"], given["grad"]
            inner = grad * scale
            along = (inner * normed).mean(-1, keepdim=True) * normed
            dx = (inner - inner.mean(-1, keepdim=True) - along) * given["inv_variance"]
            results = dx, (grad * normed).sum(1, keepdim=True), grad.sum(1, keepdim=True)
        for described, result in zip(self.outputs, results, strict=True):
            if described.is_output:
                out = tensors[described.uid]
                assert (out.shape, out.dtype) == (result.shape, described.dtype)
                out.copy_(result)


@pytest.fixture
def _cudnn(monkeypatch):
    values = {
        "pygraph": Graph,
        "data_type": SimpleNamespace(FLOAT="fp32"),
        "heur_mode": SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        "norm_forward_phase": SimpleNamespace(TRAINING="training", INFERENCE="inference"),
    }
    install(monkeypatch, "cudnn", **values)
    monkeypatch.setattr(cudnn_norm, "_handle", lambda device: 7)
    for graphs in (cudnn_norm._forward_graph, cudnn_norm._backward_graph):
        graphs.cache_clear()
    yield
    for graphs in (cudnn_norm._forward_graph, cudnn_norm._backward_graph):
        graphs.cache_clear()


@pytest.mark.usefixtures("_cudnn")
@pytest.mark.parametrize("op", ["adaln", "gated_residual_adaln"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("backward", [True, False])
def test_cudnns_adaln(op, dtype, backward):
    peer, case = norms.Cudnn(), norm_case(op, dtype, backward=backward)
    peer.check(case, GPU)
    assert_right(peer, case)
    assert harness.role_of(peer, case) == "peer"


@pytest.mark.usefixtures("_cudnn")
def test_cudnns_graph_of_a_shape_is_built_once():
    arguments = torch.randn(2, 8, 24), torch.randn(2, 24), torch.randn(2, 24)
    for _ in range(3):
        out = cudnn_norm.adaln(*arguments, 1e-6)
    torch.testing.assert_close(out, edt_kernels.reference.adaln(*arguments))
    assert cudnn_norm._forward_graph.cache_info().misses == 1


def test_the_package_is_not_imported_by_the_benchmarks():
    assert importlib.import_module("benchmarks.norms")
    assert "cudnn" not in sys.modules


# torch.compile of chained modulated norms: github.com/pytorch/pytorch/issues/193061. From torch 2.10 on, where the
# modulation is one row for many tokens (at batch 1, or shared), the gradients of the second norm's are wrong.


class Unwritten(norms.Eager):
    """As compiled code that leaves the gradient of a modulation out."""

    name = "torch.compile, as of the issue"
    compiled = True

    @staticmethod
    def chain(op, grid, dtype, **inputs):
        inputs["shift"] = inputs["shift"] + 0 * inputs["shift"].detach()
        inputs["shift"].register_hook(lambda gradient: torch.zeros_like(gradient))
        return norms.plain_chain(op, grid, dtype, **inputs)


def test_a_compiled_peer_that_is_wrong_at_batch_1_is_not_compared_with():
    from benchmarks.measure import Budget, Ceilings

    ceilings, once = Ceilings(1e10, 1e11, "float32"), Budget(warmup=0, repeat=0, rounds=2)
    case = norm_case(batch_size=1)
    wrong, right = harness.measure_case("adaln", case, [Unwritten(), norms.Eager()], CPU, ceilings, once)
    assert (wrong.status, wrong.worst, wrong.ms) == ("wrong", "grad of shift", None)
    assert right.status == "ok"


@pytest.mark.gpu
def test_gpu_torch_compile_of_chained_modulated_norms_at_batch_1():
    """Whether this torch has the fault; where it has, the suites report its rows at batch 1 as wrong."""

    def chain(x, modulation):
        for shift, scale in modulation.chunk(4, dim=-1)[:2], modulation.chunk(4, dim=-1)[2:]:
            x = x + F.layer_norm(x, x.shape[-1:]) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        return x

    x, modulation = torch.randn(1, 32768, 1024, device="cuda"), torch.randn(1, 4096, device="cuda")
    upstream, gradients = torch.randn_like(x), []
    for function in (chain, torch.compile(chain)):
        leaf = modulation.clone().requires_grad_()
        gradients += torch.autograd.grad(function(x, leaf), leaf, upstream)
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    if error > 1e-3:
        pytest.xfail(f"torch.compile is off by {error:.1e} of the gradient: pytorch issue 193061")
