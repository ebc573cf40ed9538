"""What `amm_attention` and its tables are, in plain torch. Also the path that CPU tensors take."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def amm_table(grid, *, form="exp_cos", radius=None, dtype=torch.float32, device=None) -> Tensor:
    """See `edt_kernels.amm_table`."""
    H, W = grid
    dy = torch.arange(1 - H, H, dtype=torch.float64, device=device)[:, None]
    dx = torch.arange(1 - W, W, dtype=torch.float64, device=device)[None, :]
    squared_distance = dy**2 + dx**2  # exact: integers in float64
    squared_radius = (max(H, W) - 1) ** 2 + 4 if radius is None else radius**2
    diagonal = max(math.hypot(H - 1, W - 1), 1e-9)  # a 1×1 grid has only the distance 0
    cosine = torch.cos(math.pi / (2 * diagonal) * squared_distance.sqrt())
    gain = 0.5 * torch.exp(cosine) if form == "exp_cos" else 1.3 * cosine
    return torch.where(squared_distance <= squared_radius, gain, 0.0).to(dtype)


def expand_offset_table(table: Tensor, grid, num_extra_tokens, fill: float) -> Tensor:
    """(…, 2H−1, 2W−1) indexed by (Δy, Δx) → (…, N, N) indexed by (query token, key token).

    Pairs with a token outside the grid get `fill`.
    """
    H, W = grid
    y = torch.arange(H, device=table.device).repeat_interleave(W)
    x = torch.arange(W, device=table.device).repeat(H)
    index = (y[:, None] - y + H - 1) * (2 * W - 1) + (x[:, None] - x + W - 1)
    # index_select along the last dimension: on a CPU its gradient is 10 to 100 times as fast as that of
    # table[index], embedding or unfold (0.3 ms against 33, 4 and 43 for 6 heads of 16×16 tokens).
    matrix = table.flatten(-2).index_select(-1, index.flatten()).unflatten(-1, index.shape)
    return F.pad(matrix, 2 * tuple(num_extra_tokens), value=fill) if any(num_extra_tokens) else matrix


def amm_attention(
    q, k, v, *, grid, modulation=None, rel_pos_bias=None, scale=None, num_extra_tokens=(0, 0)
) -> Tensor:
    """See `edt_kernels.amm_attention`."""
    H, W = grid
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, heads, N, D)

    logits = (q * scale) @ k.transpose(-1, -2)  # (B, heads, N, N)
    if rel_pos_bias is not None:
        bias = rel_pos_bias.T.unflatten(-1, (2 * H - 1, 2 * W - 1))
        logits = logits + expand_offset_table(bias, grid, num_extra_tokens, fill=0.0)
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    probabilities = torch.softmax(logits, dim=-1, dtype=accumulate)
    if modulation is not None:
        probabilities = probabilities * expand_offset_table(modulation, grid, num_extra_tokens, fill=1.0)
    return (probabilities.to(v.dtype) @ v).transpose(1, 2)
