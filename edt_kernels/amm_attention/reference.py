"""What `amm_attention` is, in plain torch. Also the path that CPU tensors take."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from .._tracing import add_in_place, in_func_transform


def expand_offset_table(table: Tensor, grid: tuple[int, int], extra: tuple[int, int], fill: float) -> Tensor:
    """(…, 2H−1, 2W−1) indexed by (Δy, Δx) → (…, N, N) indexed by (query token, key token); `fill` for pairs with
    an extra token, which is outside the grid."""
    H, W = grid
    rows = torch.arange(H, device=table.device)[:, None] * (2 * W - 1)
    position = (rows + torch.arange(W, device=table.device)).flatten()  # (N,), in a table's row-major order
    index = (position + (H - 1) * (2 * W - 1) + W - 1)[:, None] - position
    # index_select along the last dimension: on a CPU its gradient is 10 to 100 times as fast as that of
    # table[index], embedding or unfold (0.3 ms against 33, 4 and 43 for 6 heads of 16×16 tokens).
    matrix = table.flatten(-2).index_select(-1, index.flatten()).unflatten(-1, index.shape)
    return F.pad(matrix, 2 * tuple(extra), value=fill) if any(extra) else matrix


def amm_attention(
    q: Tensor, k: Tensor, v: Tensor, *, grid: tuple[int, int], modulation: Tensor | None = None,
    rel_pos_bias: Tensor | None = None, scale: float | None = None, num_extra_tokens: tuple[int, int] = (0, 0),
) -> Tensor:  # fmt: skip
    """See `edt_kernels.amm_attention`."""
    H, W = grid
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, heads, N, D)
    is_plain, bias = _is_plain_inference(q, modulation, rel_pos_bias), None
    if rel_pos_bias is not None:
        table = rel_pos_bias.T.unflatten(-1, (2 * H - 1, 2 * W - 1))
        table = table if is_plain else _widened(table)
        bias = expand_offset_table(table, grid, num_extra_tokens, fill=0.0).unsqueeze(0)
    if is_plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=factor).transpose(1, 2)
    logits = (q * factor) @ k.transpose(-1, -2)  # (B, heads, N, N)
    logits = _widened(logits)
    if bias is not None:
        logits = add_in_place(logits, bias)  # a second B·heads·N² tensor costs more than the addition
    probabilities = torch.softmax(logits, dim=-1)
    if modulation is not None:
        factor = expand_offset_table(_widened(modulation), grid, num_extra_tokens, fill=1.0)
        probabilities = probabilities * factor
    return (probabilities.to(v.dtype) @ v).transpose(1, 2)


def _widened(tensor: Tensor) -> Tensor:
    """In float32 at least. A table is, before it is expanded: an entry's gradient is a sum over up to N pairs of
    tokens, which would be added up in the table's own dtype (18 % off in bfloat16 at 32×32 tokens)."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _is_plain_inference(q, modulation, rel_pos_bias) -> bool:
    """Whether PyTorch's own attention computes this, and faster: on a CPU without modulation and gradients
    (3.1 ms against 3.9 for 4×6 heads of 16×16 tokens; with gradients the matrix form wins, 12.7 against 14.2). It
    has no forward-mode derivative, and is slow under vmap."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or in_func_transform():
        return False
    one_dtype = rel_pos_bias is None or rel_pos_bias.dtype == q.dtype
    return modulation is None and one_dtype and q.device.type == "cpu"
