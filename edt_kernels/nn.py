"""The ops as modules, to be put between a network's own Linears.

Each takes tensors as its op does and owns only what the op cannot be given from outside: the grid, constants and,
for attention, the tables. No module owns a projection.
"""

import math

import torch
from torch import Tensor, nn

from ._checks import (
    check_eps,
    check_even_grid,
    check_extra_tokens,
    check_grid,
    check_out_dtype,
    check_scale,
    shown,
)
from ._tracing import in_func_transform
from .amm_attention import amm_attention, amm_table
from .norms import adaln, gated_residual_adaln, token_merge_adaln, token_split_concat_adaln

__all__ = ["AMMAttention", "AdaLN", "GatedResidualAdaLN", "TokenMerge", "TokenSplitConcat"]

_MAX_ENTRIES = 10**10  # of a table: 40 GB
_AMM_MODES = ("never", "inference", "always")
_TABLES = ("fixed", "learned", "learned_per_head")


class HasConstants(nn.Module):
    """A module with constants: tensors that its arguments make and no state dict brings back.

    They are no buffers. `to_empty` after the meta device loses a buffer's values, and so does offloading to a disk
    where something else than the module's own forward reads it; `.to(bfloat16)` rounds them. A constant keeps its
    values and its dtype, and goes where the module goes, or else where it is used.
    """

    _constants: tuple[str, ...] = ()

    def register_constant(self, name: str, constant: Tensor) -> None:
        """Made on the CPU, explicitly: under `torch.device("meta")` there would be no values."""
        self._constants = (*self._constants, name)
        setattr(self, name, constant)

    def constant_on(self, name: str, device: torch.device) -> Tensor:
        """The constant; moved for good where the module was moved past `_apply`, as FSDP2 does."""
        constant = getattr(self, name)
        if constant.device == device:
            return constant
        if torch.compiler.is_compiling():
            return constant.to(device)
        moved = _moved(constant, device)
        if type(moved) is Tensor and device.type != "meta" and not in_func_transform():
            setattr(self, name, moved)
        return moved

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name in self._constants:
            constant = getattr(self, name)
            device = fn(torch.empty(0, device=constant.device)).device
            if device.type != "meta":
                setattr(self, name, _moved(constant, device))
        return self


def _moved(constant: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # later calls may need gradients
        return constant.to(device)


class AMMAttention(HasConstants):
    """softmax(q·kᵀ·scale + bias[Δ]) ⊙ m[Δ] · v over the tokens of an H×W grid: `edt_kernels.amm_attention`.

    q, k, v (B, N, heads, D) → (B, N, heads, D), N = before + H·W + after.

    ```python
    attention = AMMAttention(grid=(4, 4), num_heads=6)
    q, k, v = torch.randn(2, 16, 3, 6, 52).unbind(2)
    out = attention(q, k, v)  # (2, 16, 6, 52)
    attention.amm = "never"  # no modulation from here on, in either mode
    ```

    Args:
        grid: (H, W).
        num_heads: heads of q, k and v.
        rel_pos_bias: whether there is a learned bias table; else the bias is 0.
        amm: when m applies: "never", "inference" (in evaluation mode only, EDT's best setting) or "always". The
            attribute of that name can be set later.
        table: m: "fixed" by `amm_table`, or initialised with it and trained as one table for all heads ("learned")
            or one for each ("learned_per_head"). A learned table cannot have amm "inference": where it does not
            apply in training it gets no gradient.
        form, radius: see `amm_table`.
        scale: of the logits; D^−½ by default.
        num_extra_tokens: tokens (before, after) the grid; pairs with one of them have bias 0 and modulation 1.

    Parameters:
        rel_pos_bias: ((2H−1)·(2W−1), heads), truncated normal of 0.02; None without.
        modulation: (2H−1, 2W−1) or, per head, (heads, 2H−1, 2W−1). If fixed, no parameter and no buffer but a
            constant in float32, which moves with the module: the arguments make it.

    Raises:
        TypeError, ValueError: for an argument that cannot work; `forward` raises what `amm_attention` does.

    Source: EDT (arXiv 2410.23788), sections 3.2 and A.3.
    """

    rel_pos_bias: nn.Parameter | None
    modulation: Tensor

    def __init__(
        self,
        grid: tuple[int, int],
        num_heads: int,
        *,
        rel_pos_bias: bool = True,
        amm: str = "inference",
        table: str = "fixed",
        form: str = "exp_cos",
        radius: float | None = None,
        scale: float | None = None,
        num_extra_tokens: tuple[int, int] = (0, 0),
    ):
        super().__init__()
        self.grid: tuple[int, int] = check_grid(grid)
        self.num_heads: int = _check_num_heads(num_heads)
        self.table: str = _check_choice("table", table, _TABLES)
        self.amm = amm
        self.form: str = form
        self.radius: float | None = radius
        self.scale: float | None = check_scale(scale)
        self.num_extra_tokens: tuple[int, int] = check_extra_tokens(num_extra_tokens)

        if not isinstance(rel_pos_bias, bool):
            raise TypeError(f"rel_pos_bias is a {type(rel_pos_bias).__name__}; it must be True or False")

        H, W = self.grid
        offsets = (2 * H - 1, 2 * W - 1)
        if math.prod(offsets) > _MAX_ENTRIES:
            raise ValueError(
                f"grid is {self.grid}; a table of its offsets has more than {_MAX_ENTRIES:.0e} entries"
            )
        if num_heads * math.prod(offsets) > _MAX_ENTRIES:
            raise ValueError(
                f"num_heads is {shown(num_heads)}; tables of grid {self.grid} may have {_MAX_ENTRIES:.0e} entries"
            )
        bias = nn.Parameter(torch.empty(math.prod(offsets), num_heads)) if rel_pos_bias else None
        self.register_parameter("rel_pos_bias", bias)
        fixed = amm_table(self.grid, form=form, radius=radius, device="cpu")
        if table == "fixed":
            self.register_constant("modulation", fixed)
        else:
            shape = (num_heads, *offsets) if table == "learned_per_head" else offsets
            self.register_parameter("modulation", nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    @property
    def amm(self) -> str:
        return self._amm

    @amm.setter
    def amm(self, when: str) -> None:
        _check_choice("amm", when, _AMM_MODES)
        if self.table != "fixed" and when == "inference":
            raise ValueError(
                f"amm is 'inference' with table {self.table!r}; a learned table must apply in training too: use "
                "'always', or 'never' to leave it out"
            )
        self._amm = when

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of what is learned."""
        if self.rel_pos_bias is not None:
            nn.init.trunc_normal_(self.rel_pos_bias, std=0.02)
        if self.table != "fixed":
            self.modulation.copy_(amm_table(self.grid, form=self.form, radius=self.radius))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        modulation = None
        if self.amm == "always" or (self.amm == "inference" and not self.training):
            fixed = self.table == "fixed" and isinstance(q, Tensor)
            modulation = self.constant_on("modulation", q.device) if fixed else self.modulation
        return amm_attention(
            q, k, v,
            grid=self.grid,
            modulation=modulation,
            rel_pos_bias=self.rel_pos_bias,
            scale=self.scale,
            num_extra_tokens=self.num_extra_tokens,
        )  # fmt: skip

    def extra_repr(self) -> str:
        parts = [f"grid={self.grid}, num_heads={self.num_heads}"]
        if self.rel_pos_bias is None:
            parts.append("rel_pos_bias=False")
        parts.append(f"amm={self.amm!r}, table={self.table!r}, form={self.form!r}")
        if self.radius is not None:
            parts.append(f"radius={self.radius}")
        if self.scale is not None:
            parts.append(f"scale={self.scale}")
        if any(self.num_extra_tokens):
            parts.append(f"num_extra_tokens={self.num_extra_tokens}")
        return ", ".join(parts)


class _Norm(nn.Module):
    """What the norms share. `grid` is None where they need none, `out_dtype` where the op chooses it."""

    def __init__(self, grid: tuple[int, int] | None, eps: float, out_dtype: torch.dtype | None):
        super().__init__()
        self.grid: tuple[int, int] | None = grid
        self.eps: float = check_eps(eps)
        check_out_dtype(out_dtype)
        self.out_dtype: torch.dtype | None = out_dtype

    def extra_repr(self) -> str:
        parts = [] if self.grid is None else [f"grid={self.grid}"]
        parts.append(f"eps={self.eps:g}")
        if self.out_dtype is not None:
            parts.append(f"out_dtype={self.out_dtype}")
        return ", ".join(parts)


class AdaLN(_Norm):
    """LN(x)·(1+scale)+shift, LN over the channels and without affine: `edt_kernels.adaln`.

    x (B, N, C), shift and scale (B, C) → (B, N, C).

    ```python
    x, cond = torch.randn(2, 16, 312), torch.randn(2, 96)
    shift, scale = torch.nn.Linear(96, 2 * 312)(cond).chunk(2, dim=-1)
    normed = AdaLN()(x, shift, scale)  # (2, 16, 312)
    ```

    Args:
        eps: added to the variance.
        out_dtype: of the result. By default autocast's dtype under autocast, else x's.

    Raises:
        TypeError, ValueError: for an argument that cannot work; `forward` raises what `adaln` does.
    """

    def __init__(self, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None):
        super().__init__(None, eps, out_dtype)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return adaln(x, shift, scale, eps=self.eps, out_dtype=self.out_dtype)


class GatedResidualAdaLN(_Norm):
    """x' = x + gate·y and LN(x')·(1+scale)+shift, both returned: `edt_kernels.gated_residual_adaln`.

    x and y (B, N, C), gate, shift and scale (B, C) → x', normed (B, N, C).

    ```python
    x, y, cond = torch.randn(2, 16, 312), torch.randn(2, 16, 312), torch.randn(2, 96)
    gate, shift, scale = torch.nn.Linear(96, 3 * 312)(cond).chunk(3, dim=-1)
    x, normed = GatedResidualAdaLN()(x, y, gate, shift, scale)  # both (2, 16, 312)
    ```

    Args:
        eps: added to the variance.
        out_dtype: of the norm; x' keeps x's. By default autocast's dtype under autocast, else y's.

    Raises:
        TypeError, ValueError: for an argument that cannot work; `forward` raises what `gated_residual_adaln` does.
    """

    def __init__(self, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None):
        super().__init__(None, eps, out_dtype)

    def forward(self, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return gated_residual_adaln(x, y, gate, shift, scale, eps=self.eps, out_dtype=self.out_dtype)


class TokenMerge(_Norm):
    """keep ⊙ (LN([x₀₀, x₁₀, x₀₁, x₁₁])·(1+scale)+shift), 2×2 tokens into one: `edt_kernels.token_merge_adaln`.

    x (B, H·W, C), shift and scale (B, 4C), keep (B, H·W) bool or None → (B, H·W/4, 4C).

    ```python
    x, shift, scale = torch.randn(2, 16, 312), torch.randn(2, 4 * 312), torch.randn(2, 4 * 312)
    merged = TokenMerge(grid=(4, 4))(x, shift, scale)  # (2, 4, 1248)
    ```

    Args:
        grid: (H, W) of x, both even.
        eps: added to the variance.
        out_dtype: of the result. By default autocast's dtype under autocast, else x's.

    Raises:
        TypeError, ValueError: for an argument that cannot work; `forward` raises what `token_merge_adaln` does.
    """

    grid: tuple[int, int]

    def __init__(self, grid: tuple[int, int], *, eps: float = 1e-6, out_dtype: torch.dtype | None = None):
        super().__init__(check_even_grid(grid), eps, out_dtype)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, keep: Tensor | None = None) -> Tensor:
        return token_merge_adaln(
            x, shift, scale, grid=self.grid, keep=keep, eps=self.eps, out_dtype=self.out_dtype
        )


class TokenSplitConcat(_Norm):
    """LN([shuffle(x), skip])·(1+scale)+shift, one token into 2×2: `edt_kernels.token_split_concat_adaln`.

    x (B, H·W, 4C), skip (B, 4·H·W, C), shift and scale (B, 2C) → (B, 4·H·W, 2C).

    ```python
    x, skip = torch.randn(2, 4, 4 * 312), torch.randn(2, 16, 312)
    shift, scale = torch.randn(2, 2 * 312), torch.randn(2, 2 * 312)
    joined = TokenSplitConcat(grid=(2, 2))(x, skip, shift, scale)  # (2, 16, 624)
    ```

    Args:
        grid: (H, W) of x; the skip's is twice that.
        eps: added to the variance.

    Raises:
        TypeError, ValueError: for an argument that cannot work; `forward` raises what `token_split_concat_adaln`
            does.
    """

    grid: tuple[int, int]

    def __init__(self, grid: tuple[int, int], *, eps: float = 1e-6):
        super().__init__(check_grid(grid), eps, None)

    def forward(self, x: Tensor, skip: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return token_split_concat_adaln(x, skip, shift, scale, grid=self.grid, eps=self.eps)


def _check_choice(name: str, value, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(map(repr, choices))}")
    return value


def _check_num_heads(num_heads) -> int:
    if type(num_heads) is not int:
        raise TypeError(f"num_heads is {shown(num_heads)}; it must be an integer")
    if num_heads < 1:
        raise ValueError(f"num_heads is {shown(num_heads)}; it must be at least 1")
    return num_heads
