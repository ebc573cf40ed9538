"""What one would use instead of `amm_attention`: exact emulations, and calls that compute less, as lower bounds.

No mainstream attention multiplies after softmax; with m the modulation and b the bias, matrices over (query, key):

    doubled keys   m' = m / max m; over 2N keys [k; k] and values [v; 0], one attention with the bias
                   [b + log m', b + log(1 − m')], times max m
    two passes     Attn(s + b + log m) · exp(LSE(s + b + log m) − LSE(s + b))

Where the bias has no gradient, all that does not depend on q, k and v is made in `prepare`, which is not timed:
the matrices of bias and modulation, and their logarithms. That is in the peer's favour, for the released model
gathers its bias in every call; so are the padded inputs, see `_SDPA`. Where the bias has a gradient, its matrix is
gathered from the table inside the call, so that the gradient reaches the table.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from .harness import Implementation, UnavailableError


def offset_index(grid: tuple[int, int], num_extra_tokens: tuple[int, int], device: torch.device) -> Tensor:
    """(N·N,), for each pair of query and key its row in a table of offsets, one past the last for pairs with a
    token outside the grid."""
    H, W = grid
    rows, columns = torch.arange(H, device=device), torch.arange(W, device=device)
    row_offsets = rows[:, None] - rows + H - 1
    column_offsets = columns[:, None] - columns + W - 1
    index = row_offsets[:, None, :, None] * (2 * W - 1) + column_offsets[None, :, None, :]
    index = index.reshape(H * W, H * W)
    return F.pad(index, 2 * num_extra_tokens, value=(2 * H - 1) * (2 * W - 1)).flatten()


def pairs(table: Tensor, index: Tensor, num_extra_tokens: tuple[int, int], fill: float) -> Tensor:
    """(…, offsets) → (…, N·N) by `offset_index`; `fill` for pairs with a token outside the grid."""
    if any(num_extra_tokens):
        table = F.pad(table, (0, 1), value=fill)
    return table.index_select(-1, index)


def _square(matrix: Tensor) -> Tensor:
    """(…, N·N) → (…, N, N)"""
    return matrix.unflatten(-1, (math.isqrt(matrix.shape[-1]),) * 2)


def _modulation(case, inputs: dict[str, Tensor]) -> Tensor:
    """(N·N,)"""
    layer = case.layer
    index = offset_index(layer.grid, layer.num_extra_tokens, inputs["q"].device)
    return pairs(inputs["modulation"].flatten(), index, layer.num_extra_tokens, 1.0)


def _bias_inputs(case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `_bias` needs: the table and an index, which is a buffer of the released model too, or what it returns,
    zeros where the case has no bias."""
    layer, q = case.layer, inputs["q"]
    if not case.has_bias:
        return {"bias": q.new_zeros(layer.heads, case.num_tokens**2, dtype=torch.float32)}
    table, index = inputs["rel_pos_bias"], offset_index(layer.grid, layer.num_extra_tokens, q.device)
    if case.grad_bias:
        return {"rel_pos_bias": table, "index": index}
    return {"bias": pairs(table.T, index, layer.num_extra_tokens, 0.0)}


def _bias(case, inputs: dict[str, Tensor]) -> Tensor:
    """(heads, N·N) in float32."""
    if not case.grad_bias:
        return inputs["bias"]
    return pairs(inputs["rel_pos_bias"].T, inputs["index"], case.layer.num_extra_tokens, 0.0)


def _check_modulation(case) -> None:
    if not case.has_modulation:
        raise UnavailableError("without modulation there is nothing to emulate")


def _check_bias(case) -> None:
    if not case.has_bias:
        raise UnavailableError("the case has no bias")


# The algebra, apart from who computes the attention. q, k, v (B, N, heads, D).


def released_attention(q, k, v, table, index, modulation, num_extra_tokens: tuple[int, int]) -> Tensor:
    """Operation by operation as released, with autocast's dtypes: logits and p·v in the inputs' dtype, bias,
    softmax and modulation in float32. `table` (offsets, heads) and `modulation` (N, N), or None."""
    scale = q.shape[-1] ** -0.5
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    attention = (q * scale) @ k.transpose(-2, -1)
    if table is not None:
        bias = _square(table[index].T).contiguous().unsqueeze(0)
        if any(num_extra_tokens):
            bias = F.pad(bias, 2 * num_extra_tokens)
        attention = attention + bias
    attention = attention.softmax(dim=-1, dtype=torch.promote_types(attention.dtype, torch.float32))
    if modulation is not None:
        attention = attention * modulation
    return (attention.to(v.dtype) @ v).transpose(1, 2).contiguous()


def doubled_logs(modulation: Tensor) -> tuple[Tensor, Tensor]:
    """[log m', log(1 − m')] (N, 2N), and max m. Where m is 0, and where it is largest, a logarithm is −∞."""
    largest = modulation.max()
    fraction = modulation / largest
    return torch.cat([fraction.log(), torch.log1p(-fraction)], dim=-1), largest


def doubled_bias(bias: Tensor, logs: Tensor) -> Tensor:
    return torch.cat([bias, bias], dim=-1) + logs


def doubled_keys(q, k, v, zeros, bias, largest, attend: Callable) -> Tensor:
    """`zeros` are like v; bias (heads, N, 2N) as of `doubled_bias`."""
    out = attend(q, torch.cat([k, k], dim=1), torch.cat([v, zeros], dim=1), bias)
    return out * largest


def two_passes(q, k, v, bias, modulated_bias, attend: Callable) -> Tensor:
    """`attend(q, k, v, bias)` returns output and LSE (B, heads, N); `modulated_bias` is b + log m."""
    out, modulated_lse = attend(q, k, v, modulated_bias)
    # Of the second pass only the LSE is wanted. 16 channels of values are the fewest that FlexAttention takes.
    _, lse = attend(q, k, v[..., :16].detach(), bias)
    return (out * (modulated_lse - lse).exp().transpose(1, 2).unsqueeze(-1)).to(out.dtype)


class Eager(Implementation):
    """As released: with the gather of the bias in every call."""

    name = "eager, as released"
    backend = "PyTorch"

    def prepare(self, case, inputs):
        prepared = {name: inputs[name] for name in ("q", "k", "v", "grad 0")}
        if case.has_bias:
            prepared["rel_pos_bias"] = inputs["rel_pos_bias"]
            prepared["index"] = offset_index(case.layer.grid, (0, 0), inputs["q"].device)
        if case.has_modulation:
            prepared["modulation"] = _square(_modulation(case, inputs))
        return prepared

    def forward(self, case, inputs):
        arguments = (inputs.get(name) for name in ("q", "k", "v", "rel_pos_bias", "index", "modulation"))
        return (self.attention(*arguments, case.layer.num_extra_tokens),)

    attention = staticmethod(released_attention)


def _compile(function: Callable) -> Callable:
    """For one shape at a time. Too many of them are an error, not a quiet return to eager: fullgraph."""
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, 1024)
    config.accumulated_cache_size_limit = max(config.accumulated_cache_size_limit, 8192)
    return torch.compile(function, dynamic=False, fullgraph=True)


class Compiled(Eager):
    name = "torch.compile, dynamic=False"
    backend = "Inductor"
    compiled = True

    def __init__(self):
        self.attention = _compile(released_attention)


_BACKENDS = {
    SDPBackend.CUDNN_ATTENTION: ("cuDNN", ("cuda",)),
    SDPBackend.EFFICIENT_ATTENTION: ("memory-efficient", ("cuda",)),
    SDPBackend.FLASH_ATTENTION: ("flash", ("cuda", "cpu")),
    # On a GPU it is eager once more.
    SDPBackend.MATH: ("math", ("cpu",)),
}


class _SDPA(Implementation):
    """Attention of `torch.nn.functional`, pinned to one backend.

    q, k, v and the upstream gradient are padded with zeros to a multiple of 8 channels beforehand: with D = 52 the
    memory-efficient kernel would silently give way to plain matrix products, the others would pad in every call.
    Outputs and gradients are cropped afterwards. Neither is timed.
    """

    def __init__(self, sdp_backend: SDPBackend):
        self.sdp_backend = sdp_backend
        self.title, self.devices = _BACKENDS[sdp_backend]
        self.backend = f"SDPA, {sdp_backend.name} alone enabled"

    def check(self, case, device):
        if device.type not in self.devices:
            raise UnavailableError(f"SDPA's {self.title} backend is not timed on a {device.type} device")
        if self.sdp_backend == SDPBackend.CUDNN_ATTENTION and self.computes(case).grad_bias:
            raise UnavailableError("cuDNN attention has no gradient of the bias")

    def prepare(self, case, inputs):
        padding = -case.layer.head_dim % 8
        names = ("q", "k", "v", "grad 0")
        return {name: F.pad(inputs[name], (0, padding)) if padding else inputs[name] for name in names}

    def restore(self, case, results):
        of_heads = ("output 0", "grad of q", "grad of k", "grad of v")
        return {
            name: tensor[..., : case.layer.head_dim] if name in of_heads else tensor
            for name, tensor in results.items()
        }

    def attend(self, case, q, k, v, bias: Tensor | None) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        try:
            with sdpa_kernel(self.sdp_backend):
                # The scale is that of the head dim before padding.
                scale = case.layer.head_dim**-0.5
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        except RuntimeError as error:
            # "No available kernel" on a GPU, "No viable backend" on a CPU; the reason is among the warnings.
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                raise UnavailableError(f"SDPA's {self.title} backend does not take this: {error}") from error
            raise
        return out.transpose(1, 2)


def _as_mask(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, heads, N, keys) in q's dtype: a float32 mask beside bfloat16 can be misread."""
    return bias.to(dtype).unsqueeze(0)


class DoubledKeys(_SDPA):
    def __init__(self, sdp_backend: SDPBackend):
        super().__init__(sdp_backend)
        self.name = f"doubled keys, SDPA {self.title}"

    def check(self, case, device):
        _check_modulation(case)
        super().check(case, device)

    def prepare(self, case, inputs):
        prepared = super().prepare(case, inputs) | _bias_inputs(case, inputs)
        logs, largest = doubled_logs(_square(_modulation(case, inputs)))
        prepared |= {"zeros": torch.zeros_like(prepared["v"]), "largest": largest}
        if case.grad_bias:
            return prepared | {"logs": logs}
        return prepared | {"bias": _as_mask(doubled_bias(_square(prepared["bias"]), logs), inputs["q"].dtype)}

    def forward(self, case, inputs):
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        bias = _bias(case, inputs)
        if case.grad_bias:
            bias = _as_mask(doubled_bias(_square(bias), inputs["logs"]), q.dtype)

        def attend(q, k, v, bias):
            return self.attend(case, q, k, v, bias)

        return (doubled_keys(q, k, v, inputs["zeros"], bias, inputs["largest"], attend),)


class BiasSDPA(_SDPA):
    """A lower bound where there is modulation."""

    def __init__(self, sdp_backend: SDPBackend):
        super().__init__(sdp_backend)
        self.name = f"SDPA with bias, {self.title}"

    def computes(self, case):
        return replace(case, has_modulation=False)

    def check(self, case, device):
        _check_bias(case)
        super().check(case, device)

    def prepare(self, case, inputs):
        prepared = super().prepare(case, inputs) | _bias_inputs(case, inputs)
        if not case.grad_bias:
            prepared["bias"] = _as_mask(_square(prepared["bias"]), inputs["q"].dtype)
        return prepared

    def forward(self, case, inputs):
        q, bias = inputs["q"], _bias(case, inputs)
        if case.grad_bias:
            bias = _as_mask(_square(bias), q.dtype)
        return (self.attend(case, q, inputs["k"], inputs["v"], bias),)


class PlainSDPA(_SDPA):
    """A lower bound where there is bias or modulation: on a GPU, flash attention takes neither; cuDNN, a constant
    bias."""

    def __init__(self, sdp_backend: SDPBackend):
        super().__init__(sdp_backend)
        self.name = f"SDPA {self.title}"

    def computes(self, case):
        return replace(case, has_bias=False, has_modulation=False, grad_bias=False)

    def forward(self, case, inputs):
        return (self.attend(case, inputs["q"], inputs["k"], inputs["v"], None),)


class FlashAttention4(PlainSDPA):
    """A lower bound where there is bias or modulation: it takes neither as a tensor. Padded as SDPA's inputs."""

    name = "FlashAttention 4"
    backend = "flash_attn.cute"
    compiled = True  # by its own compiler

    def __init__(self):
        pass

    def check(self, case, device):
        if device.type != "cuda":
            raise UnavailableError("its kernels need a GPU")
        if case.dtype not in ("bfloat16", "float16"):
            raise UnavailableError("FlashAttention 4 takes bfloat16 and float16")
        try:
            from flash_attn.cute import flash_attn_func
        except ImportError as error:
            raise UnavailableError("flash-attn-4 is not installed", "missing") from error
        self.attention = flash_attn_func

    def attend(self, case, q, k, v, bias):
        out = self.attention(q, k, v, softmax_scale=case.layer.head_dim**-0.5)
        return out[0] if isinstance(out, tuple) else out  # and the logsumexp


def _flex(q, k, v, bias: Tensor, aux: AuxRequest | None = None):
    """bias (heads, N·N). As a view (heads, N, N) it would lose its gradient with some of torch.compile's backends
    (aot_eager in torch 2.13), and a copy would cost."""
    num_tokens = q.shape[1]

    def add_bias(score, batch, head, query, key):
        return score + bias[head, query * num_tokens + key]

    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return flex_attention(q, k, v, score_mod=add_bias, return_aux=aux)


def flex_attend(q, k, v, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, N, heads, D) and LSE (B, heads, N)."""
    out, aux = _flex(q, k, v, bias, AuxRequest(lse=True))
    return out.transpose(1, 2), aux.lse


def flex_two_passes(q, k, v, bias: Tensor, modulated_bias: Tensor) -> Tensor:
    return two_passes(q, k, v, bias, modulated_bias, flex_attend)


def flex_bias(q, k, v, bias: Tensor) -> Tensor:
    return _flex(q, k, v, bias).transpose(1, 2)


class _Flex(Implementation):
    """FlexAttention under torch.compile, the bias read from a matrix: published figures for an H100 are 474–496
    TFLOP/s so, and 344–386 with a look-up in the table. It stays in float32, in which its gradient is summed over
    the batch. Nothing is padded: the kernels round a head dim up to a power of two themselves (since torch 2.6).
    """

    backend = "Inductor, FlexAttention"
    compiled = True

    def check(self, case, device):
        if device.type == "cpu":
            raise UnavailableError("on a CPU, compiled FlexAttention has neither gradients nor log-sum-exps")
        if case.layer.head_dim < 16:
            raise UnavailableError("FlexAttention takes head dims of 16 and more")

    def prepare(self, case, inputs):
        return {name: inputs[name] for name in ("q", "k", "v", "grad 0")} | _bias_inputs(case, inputs)


class FlexTwoPasses(_Flex):
    name = "two passes, FlexAttention"

    def __init__(self):
        self.attention = _compile(flex_two_passes)

    def check(self, case, device):
        _check_modulation(case)
        super().check(case, device)

    def prepare(self, case, inputs):
        prepared = super().prepare(case, inputs)
        log_modulation = _modulation(case, inputs).log()
        if case.grad_bias:
            return prepared | {"log modulation": log_modulation}
        return prepared | {"modulated bias": prepared["bias"] + log_modulation}

    def forward(self, case, inputs):
        bias = _bias(case, inputs)
        modulated_bias = bias + inputs["log modulation"] if case.grad_bias else inputs["modulated bias"]
        return (self.attention(inputs["q"], inputs["k"], inputs["v"], bias, modulated_bias),)


class FlexBias(_Flex):
    """A lower bound where there is modulation."""

    name = "FlexAttention with bias"

    def __init__(self):
        self.attention = _compile(flex_bias)

    def computes(self, case):
        return replace(case, has_modulation=False)

    def check(self, case, device):
        _check_bias(case)
        super().check(case, device)

    def forward(self, case, inputs):
        return (self.attention(inputs["q"], inputs["k"], inputs["v"], _bias(case, inputs)),)


def implementations() -> list[Implementation]:
    cudnn, efficient = SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    flash, math_ = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
    return [
        Eager(),
        Compiled(),
        *(DoubledKeys(backend) for backend in (cudnn, efficient, math_)),
        FlexTwoPasses(),
        *(BiasSDPA(backend) for backend in (efficient, cudnn, math_)),
        PlainSDPA(flash),
        PlainSDPA(cudnn),
        FlashAttention4(),
        FlexBias(),
    ]
