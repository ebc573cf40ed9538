"""U-REPA: the middle stage's hidden states aligned with a frozen image encoder's features, beside the diffusion
loss."""

import importlib
import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edt_kernels.nn import HasConstants


class AlignmentLoss(HasConstants):
    """λ·(−mean cos(y, z) + w·mean (S(y) − S(z))²), z = up(MLP(h)), S(z)[i, j] = mean over n of cos(zᵢₙ, zⱼₙ).

    h are the hidden states of the model's middle stage (`return_hidden` of its forward), y an image encoder's
    features of the same images without noise. The MLP (Linear, SiLU, Linear, SiLU, Linear) takes each token to
    the features' width; `up` is bilinear, from the hidden states' grid to the features'. The first mean is over
    samples i and tokens n, the second over all pairs of samples of this process's batch: 0 for a batch of one.

    ```python
    model, images, latents = edt.load_preset("EDT-S/2"), ...
    align = AlignmentLoss(520, (4, 4), 768, (16, 16))
    output = model(noised, timestep, labels, return_hidden=True)
    loss = diffusion_loss + align(output.hidden, encode(encoder, images))
    ```

    Args:
        hidden_channels, hidden_grid: of h: C, and (H, W) of its tokens in row-major order.
        feature_channels, feature_grid: of y: F, and its (H', W').
        weight: λ.
        manifold_weight: w.
        mlp_channels: the MLP's hidden width.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Source: "U-REPA: Aligning Diffusion U-Nets to ViTs" (arXiv 2503.18414), equations 1 to 5: middle stage, MLP
    before up-sampling, w = 3; λ = 0.5 and the MLP are those of REPA (arXiv 2410.06940), whose protocol it follows.
    Not given there and chosen here: the interpolation; and S between whole samples, token by token, rather than
    between their mean tokens, because that keeps what is where in two images. The minus sign of their equation 3
    would drive the similarities apart and is taken for a misprint.
    """

    upsampling: Tensor

    def __init__(
        self,
        hidden_channels: int,
        hidden_grid: tuple[int, int],
        feature_channels: int,
        feature_grid: tuple[int, int],
        *,
        weight: float = 0.5,
        manifold_weight: float = 3.0,
        mlp_channels: int = 2048,
    ):
        super().__init__()
        _check_positive(
            hidden_channels=hidden_channels, feature_channels=feature_channels, mlp_channels=mlp_channels
        )
        _check_grids(hidden_grid=hidden_grid, feature_grid=feature_grid)
        _check_weights(weight=weight, manifold_weight=manifold_weight)
        self.weight = weight
        self.manifold_weight = manifold_weight
        self.mlp = nn.Sequential(
            nn.Linear(hidden_channels, mlp_channels),
            nn.SiLU(),
            nn.Linear(mlp_channels, mlp_channels),
            nn.SiLU(),
            nn.Linear(mlp_channels, feature_channels),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        # As a matrix, because the gradient of F.interpolate on a GPU adds atomically and does not repeat bitwise.
        self.register_constant("upsampling", _bilinear(tuple(hidden_grid), tuple(feature_grid)))

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        """hidden (B, N, C), features (B, N', F), of any floating dtypes → a scalar in float32.

        The MLP follows autocast; up-sampling, similarities and means are in float32. Gradients flow to `hidden`
        and the MLP, not to `features`.

        Raises:
            TypeError, ValueError: for tensors that do not fit.
        """
        self._check_inputs(hidden, features)
        projected = self.mlp(hidden)  # (B, N, F)
        with torch.autocast(hidden.device.type, enabled=False):
            upsampling = self.constant_on("upsampling", projected.device)
            z = F.normalize(upsampling @ projected.float(), dim=-1, eps=1e-6)  # (B, N', F)
            y = F.normalize(features.detach().float(), dim=-1, eps=1e-6)
            token_loss = -(y * z).sum(dim=-1).mean()
            manifold_loss = (_similarities(y) - _similarities(z)).square().mean()
            return self.weight * (token_loss + self.manifold_weight * manifold_loss)

    def _check_inputs(self, hidden, features) -> None:
        num_features, num_hidden = self.upsampling.shape
        needed = {
            "hidden": (hidden, num_hidden, self.mlp[0].in_features),
            "features": (features, num_features, self.mlp[-1].out_features),
        }
        for name, (tensor, tokens, channels) in needed.items():
            _check_floating(name, tensor)
            if tensor.ndim != 3 or tuple(tensor.shape[1:]) != (tokens, channels):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be (B, {tokens}, {channels})")
        if len(hidden) != len(features):
            raise ValueError(
                f"features has {len(features)} samples and hidden {len(hidden)}; they must be as many"
            )


def load_image_encoder(spec: str) -> nn.Module:
    """ "package.module:factory" → factory(), frozen: in evaluation mode, no parameter requiring a gradient.

    The encoder is called with images (B, 3, h, w) in [−1, 1]; resizing and its own normalisation are up to it. It
    returns patch tokens (B, N', F), without class or register tokens, or a map (B, F, H', W'). Keep it out of the
    module that is trained, whose train() would put it into training mode.

    Raises:
        ValueError: if the spec has another form, its module cannot be imported or lacks the factory.
        TypeError: if the factory is none, or returns something else than a module.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"image encoder is {spec!r}; it must be 'package.module:factory'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"image encoder is {spec!r}; {module_name} cannot be imported: {error}. For a file in this folder, "
            "set PYTHONPATH=."
        ) from error
    except Exception as error:  # of the user's code
        raise ValueError(
            f"image encoder is {spec!r}; {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"image encoder is {spec!r}; module {module_name} has no {attribute}")
    factory = getattr(module, attribute)
    if not callable(factory):
        raise TypeError(f"image encoder is {spec!r}; {attribute} is a {type(factory).__name__}, not callable")
    try:
        encoder = factory()
    except Exception as error:  # of the user's code
        raise ValueError(
            f"image encoder is {spec!r}; {attribute}() raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(encoder, nn.Module):
        raise TypeError(
            f"image encoder is {spec!r}; {attribute}() returned a {type(encoder).__name__}; it must return an "
            "nn.Module"
        )
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def encode(encoder: nn.Module, images: Tensor) -> Tensor:
    """images (B, 3, h, w) in [−1, 1] → features (B, N', F) without gradients, in the encoder's dtype.

    A map (B, F, H', W') that the encoder returns becomes its tokens, row by row.

    Raises:
        TypeError, ValueError: for images of another shape or dtype, or an encoder that fails or returns something
            else.
    """
    _check_floating("images", images)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images has shape {tuple(images.shape)}; it must be (B, 3, height, width)")
    try:
        features = encoder(images)
    except (ValueError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the user's code
        raise ValueError(
            f"the image encoder, given images {tuple(images.shape)}, raised {type(error).__name__}: {error}"
        ) from error
    _check_floating("the image encoder's output", features)
    if features.ndim not in (3, 4) or len(features) != len(images):
        raise ValueError(
            f"the image encoder's output has shape {tuple(features.shape)}; for {len(images)} images it must be "
            f"({len(images)}, tokens, channels) or ({len(images)}, channels, height, width)"
        )
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def feature_grid(num_tokens: int, image_size: Sequence[int]) -> tuple[int, int]:
    """(H', W') of an encoder's tokens: of the image's proportions, H'·W' = num_tokens.

    Raises:
        ValueError: where no such grid has as many tokens; class or register tokens may be among them.
    """
    height, width = image_size
    H = max(1, round(math.sqrt(num_tokens * height / width)))
    if num_tokens % H:
        raise ValueError(
            f"the image encoder returns {num_tokens} tokens; images of {height}×{width} need a grid of their "
            "proportions, without class or register tokens"
        )
    return H, num_tokens // H


def _similarities(tokens: Tensor) -> Tensor:
    """Unit tokens (B, N, F) → (B, B): for each two samples, the mean cosine of the tokens at the same place."""
    flat = tokens.flatten(1)
    return flat @ flat.T / tokens.shape[1]


def _bilinear(grid: tuple[int, ...], out_grid: tuple[int, ...]) -> Tensor:
    """Bilinear interpolation of an H×W grid to H'×W', pixels as areas: (H'·W', H·W), times tokens in rows."""
    basis = torch.eye(math.prod(grid), device="cpu").unflatten(1, grid).unsqueeze(1)  # each token's 1 among zeros
    return F.interpolate(basis, size=out_grid, mode="bilinear", align_corners=False).flatten(1).T.contiguous()


def _check_floating(name: str, tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} is {given}; it must be a floating-point tensor")


def _check_positive(**sizes) -> None:
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be a positive integer")


def _check_grids(**grids) -> None:
    for name, grid in grids.items():
        if len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid):
            raise ValueError(f"{name} is {grid!r}; it must be (height, width) in tokens, both positive")


def _check_weights(**weights) -> None:
    for name, weight in weights.items():
        if not (isinstance(weight, Real) and math.isfinite(weight) and not weight < 0):
            raise ValueError(f"{name} is {weight!r}; it must be a finite number, 0 or more")
