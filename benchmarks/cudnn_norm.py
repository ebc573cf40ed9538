"""cuDNN's adaptive LayerNorm, of the package nvidia-cudnn-frontend, as a peer of the norm suites.

y = LN(x)·scale + bias, x (B, N, C), scale and bias (B, 1, C) in float32, forward and backward a cuDNN graph each.
Operations and arguments are those of NVIDIA's samples (cudnn-frontend, samples/python, adaptive_layernorm).
"""

import functools
import importlib

import torch
from torch import Tensor

_X, _SCALE, _BIAS, _EPSILON, _Y, _MEAN, _INV_VARIANCE, _DY, _DX, _DSCALE, _DBIAS = range(1, 12)  # in graphs


def load():
    """The package; raises ImportError. Its handle and graphs are made at the first call."""
    return importlib.import_module("cudnn")


@functools.cache
def _handle(device: torch.device) -> int:
    with torch.cuda.device(device):
        return load().create_handle()


class _Graph:
    """Of one shape, dtype and direction: its tensors by number, and its workspace."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
        cudnn = load()
        self.shape, self.dtype, self.handle = shape, dtype, _handle(device)
        self.graph = cudnn.pygraph(
            handle=self.handle,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )

    def tensor(self, number: int, dims: tuple[int, int, int], dtype: torch.dtype):
        stride = (dims[1] * dims[2], dims[2], 1)
        return self.graph.tensor(name=f"t{number}", dim=dims, stride=stride, data_type=dtype).set_uid(number)

    def output(self, number: int, tensor, dtype: torch.dtype) -> None:
        tensor.set_output(True).set_data_type(dtype).set_uid(number)

    def build(self, device: torch.device) -> None:
        cudnn = load()
        self.graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.workspace = torch.empty(self.graph.get_workspace_size(), device=device, dtype=torch.uint8)

    def __call__(self, tensors: dict[int, Tensor]) -> None:
        x = tensors[_X]
        if x.is_cuda:  # a capture has a stream of its own
            stream = torch.cuda.current_stream(x.device).cuda_stream
            load().set_stream(handle=self.handle, stream=stream)
        self.graph.execute(tensors, self.workspace, handle=self.handle)


@functools.cache
def _forward_graph(shape, dtype: torch.dtype, device: torch.device, eps: float, training: bool):
    cudnn, (B, _, C) = load(), shape
    graph, epsilon = _Graph(shape, dtype, device), torch.full((1, 1, 1), eps)  # on the CPU: passed by value
    phase = cudnn.norm_forward_phase
    y, mean, inv_variance = graph.graph.adalayernorm(
        name="adaln",
        norm_forward_phase=phase.TRAINING if training else phase.INFERENCE,
        input=graph.tensor(_X, shape, dtype),
        scale=graph.tensor(_SCALE, (B, 1, C), torch.float32),
        bias=graph.tensor(_BIAS, (B, 1, C), torch.float32),
        epsilon=graph.graph.tensor_like(epsilon).set_uid(_EPSILON),
    )
    graph.output(_Y, y, dtype)
    if training:
        graph.output(_MEAN, mean, torch.float32)
        graph.output(_INV_VARIANCE, inv_variance, torch.float32)
    graph.build(device)
    return graph, epsilon


@functools.cache
def _backward_graph(shape, dtype: torch.dtype, device: torch.device):
    B, N, C = shape
    graph = _Graph(shape, dtype, device)
    dx, dscale, dbias = graph.graph.adalayernorm_backward(
        name="adaln_backward",
        grad=graph.tensor(_DY, shape, dtype),
        input=graph.tensor(_X, shape, dtype),
        scale=graph.tensor(_SCALE, (B, 1, C), torch.float32),
        mean=graph.tensor(_MEAN, (B, N, 1), torch.float32),
        inv_variance=graph.tensor(_INV_VARIANCE, (B, N, 1), torch.float32),
    )
    graph.output(_DX, dx, dtype)
    graph.output(_DSCALE, dscale, torch.float32)
    graph.output(_DBIAS, dbias, torch.float32)
    graph.build(device)
    return graph


class _AdaLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, bias, eps):
        x, training = x.contiguous(), any(ctx.needs_input_grad)
        graph, epsilon = _forward_graph(tuple(x.shape), x.dtype, x.device, eps, training)
        out = torch.empty_like(x)
        tensors = {_X: x, _SCALE: scale, _BIAS: bias, _EPSILON: epsilon, _Y: out}
        if training:
            mean, inv_variance = (x.new_empty(*x.shape[:2], 1, dtype=torch.float32) for _ in range(2))
            tensors |= {_MEAN: mean, _INV_VARIANCE: inv_variance}
            ctx.save_for_backward(x, scale, mean, inv_variance)
        graph(tensors)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, scale, mean, inv_variance = ctx.saved_tensors
        dx, dscale, dbias = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
        _backward_graph(tuple(x.shape), x.dtype, x.device)({
            _DY: grad.contiguous(), _X: x, _SCALE: scale, _MEAN: mean, _INV_VARIANCE: inv_variance,
            _DX: dx, _DSCALE: dscale, _DBIAS: dbias,
        })  # fmt: skip
        return dx, dscale, dbias, None


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LN(x)·(1 + scale) + shift in x's dtype; x (B, N, C), shift and scale (B, C)."""
    factor, bias = (tensor.float().unsqueeze(1).contiguous() for tensor in (scale, shift))
    return _AdaLayerNorm.apply(x, 1 + factor, bias, eps)
