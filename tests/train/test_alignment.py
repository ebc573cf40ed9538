"""The alignment loss against numpy, and the image encoders that users name."""

import numpy as np
import pytest
import torch
from released import tiny_model
from torch import nn

from edt.train.alignment import AlignmentLoss, encode, load_image_encoder

HIDDEN_GRID, FEATURE_GRID = (2, 3), (5, 6)
SIZES = {"hidden_channels": 8, "feature_channels": 12, "mlp_channels": 16}


def alignment_loss(**overrides):
    torch.manual_seed(0)
    return AlignmentLoss(**{**SIZES, "hidden_grid": HIDDEN_GRID, "feature_grid": FEATURE_GRID, **overrides})


def draw(batch_size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch_size, 6, 8, generator=generator)
    return hidden, torch.randn(batch_size, 30, 12, generator=generator)


def interpolated(tokens, grid, out_grid):
    """Bilinear, output by output: position (i + ½)·n/n' − ½, held inside the grid, between its two neighbours."""
    image = tokens.reshape(*grid, -1)

    def neighbours(i, n, n_out):
        position = min(max((i + 0.5) * n / n_out - 0.5, 0), n - 1)
        low = int(position)
        return low, min(low + 1, n - 1), position - low

    out = np.empty((*out_grid, image.shape[-1]))
    for y, x in np.ndindex(out_grid):
        top, bottom, down = neighbours(y, grid[0], out_grid[0])
        left, right, along = neighbours(x, grid[1], out_grid[1])
        upper = (1 - along) * image[top, left] + along * image[top, right]
        lower = (1 - along) * image[bottom, left] + along * image[bottom, right]
        out[y, x] = (1 - down) * upper + down * lower
    return out.reshape(-1, image.shape[-1])


def by_numpy(loss, hidden, features, grid, out_grid, weight, manifold_weight):
    parameters = [p.detach().double().numpy() for p in loss.mlp.parameters()]
    z = hidden.double().numpy()
    for i in range(0, 6, 2):
        z = z @ parameters[i].T + parameters[i + 1]
        z = z / (1 + np.exp(-z)) if i < 4 else z
    z = np.stack([interpolated(sample, grid, out_grid) for sample in z])
    y = features.double().numpy()
    z, y = (t / np.linalg.norm(t, axis=-1, keepdims=True) for t in (z, y))
    tokens = -np.mean([np.dot(y[b, n], z[b, n]) for b, n in np.ndindex(y.shape[:2])])

    def similarities(t):
        return np.array([[np.mean([u @ v for u, v in zip(a, b)]) for b in t] for a in t])

    manifold = np.mean((similarities(y) - similarities(z)) ** 2)
    return weight * (tokens + manifold_weight * manifold)


@pytest.mark.parametrize(("weight", "manifold_weight"), [(0.5, 3.0), (2.0, 0.0), (1.0, 100.0)])
@pytest.mark.parametrize("out_grid", [FEATURE_GRID, HIDDEN_GRID, (1, 2)])
def test_formula(out_grid, weight, manifold_weight):
    loss = alignment_loss(feature_grid=out_grid, weight=weight, manifold_weight=manifold_weight)
    hidden, features = draw()
    features = features[:, : out_grid[0] * out_grid[1]]
    expected = by_numpy(loss, hidden, features, HIDDEN_GRID, out_grid, weight, manifold_weight)
    actual = loss(hidden, features)
    assert (actual.shape, actual.dtype) == ((), torch.float32)
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_perfect_alignment():
    loss = alignment_loss(feature_grid=HIDDEN_GRID)
    hidden, _ = draw()
    assert loss(hidden, 7 * loss.mlp(hidden)).item() == pytest.approx(-0.5)


def test_gradients_flow_to_hidden_and_mlp_but_not_to_features():
    loss = alignment_loss()
    hidden, features = (tensor.requires_grad_() for tensor in draw())
    loss(hidden, features).backward()
    assert hidden.grad.abs().sum() > 0
    assert features.grad is None
    assert all(p.grad.abs().sum() > 0 for p in loss.mlp.parameters())


def test_gradient_of_the_formula():
    loss = alignment_loss()
    hidden, features = draw(2)
    step = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).double() * 1e-3
    hidden.requires_grad_()
    loss(hidden, features).backward()
    with torch.no_grad():
        difference = [
            by_numpy(loss, hidden + sign * step, features, HIDDEN_GRID, FEATURE_GRID, 0.5, 3.0) for sign in (1, -1)
        ]
    assert (hidden.grad * step).sum().item() == pytest.approx((difference[0] - difference[1]) / 2, rel=1e-3)


def test_weight_of_zero():
    loss = alignment_loss(weight=0.0)
    hidden, features = draw()
    value = loss(hidden.requires_grad_(), features)
    value.backward()
    assert value.item() == 0
    assert not hidden.grad.any()


def test_a_single_sample_has_no_manifold_term():
    hidden, features = draw(1)
    with_term, without = (alignment_loss(manifold_weight=w)(hidden, features).item() for w in (1e6, 0.0))
    assert with_term == pytest.approx(without, abs=1e-5)  # S is 1 to rounding, squared


def test_autocast_keeps_the_similarities_in_float32():
    loss = alignment_loss()
    hidden, features = draw()
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss(hidden, features.bfloat16())
        projected = loss.mlp(hidden)
    assert projected.dtype == torch.bfloat16
    assert actual.dtype == torch.float32
    loss.mlp = nn.Sequential(nn.Linear(8, 1), *[nn.Identity()] * 3, nn.Linear(1, 12))  # for the check of shapes
    loss.mlp.forward = lambda _: projected.float()
    assert actual.item() == loss(hidden, features.bfloat16().float()).item()


def test_trains_with_the_model():
    model = tiny_model().train()
    loss = AlignmentLoss(64, (2, 2), 12, FEATURE_GRID, mlp_channels=16)
    inputs = torch.randn(3, 4, 16, 16), torch.tensor([0, 500, 999]), torch.tensor([1, 2, 3])
    loss(model(*inputs, return_hidden=True).hidden, draw(3)[1]).backward()
    assert model.stages[2].blocks[0].mlp.fc1.weight.grad.any()
    assert model.stages[3].blocks[0].mlp.fc1.weight.grad is None  # after the middle


def test_compiles_without_graph_breaks():
    loss, inputs = alignment_loss(), draw()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert compiled(*inputs).item() == pytest.approx(loss(*inputs).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, y: (h[:, 1:], y), ValueError, r"hidden has shape \(4, 5, 8\); it must be \(B, 6, 8\)"),
        (lambda h, y: (h[..., 1:], y), ValueError, r"hidden has shape \(4, 6, 7\)"),
        (lambda h, y: (h[0], y), ValueError, r"hidden has shape \(6, 8\)"),
        (lambda h, y: (h, y[:, 1:]), ValueError, r"features has shape \(4, 29, 12\); it must be \(B, 30, 12\)"),
        (lambda h, y: (h[1:], y), ValueError, r"features has 4 samples and hidden 3"),
        (lambda h, y: (h, y.long()), TypeError, "features is torch.int64"),
        (lambda h, y: (h.tolist(), y), TypeError, "hidden is list"),
    ],
)
def test_wrong_tensors(change, error, message):
    with pytest.raises(error, match=message):
        alignment_loss()(*change(*draw()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_channels": 0}, "hidden_channels is 0"),
        ({"mlp_channels": 2.5}, r"mlp_channels is 2\.5"),
        ({"feature_grid": (4,)}, r"feature_grid is \(4,\); it must be \(height, width\)"),
        ({"hidden_grid": (4, 0)}, r"hidden_grid is \(4, 0\)"),
        ({"weight": -1.0}, r"weight is -1\.0; it must be a finite number"),
        ({"manifold_weight": float("inf")}, "manifold_weight is inf"),
    ],
)
def test_wrong_arguments(overrides, message):
    with pytest.raises(ValueError, match=message):
        alignment_loss(**overrides)


ENCODERS = """
import torch
from torch import nn

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 5, 4, stride=4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.patches(images))

class Tokens(Encoder):
    def forward(self, images):
        return super().forward(images).flatten(2).mT

not_callable = 3
not_a_module = lambda: (lambda images: images)
"""


@pytest.fixture
def encoders(tmp_path, monkeypatch):
    (tmp_path / "some_encoders.py").write_text(ENCODERS)
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_missing")
    (tmp_path / "wrong_syntax.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("encoders")
@pytest.mark.parametrize("name", ["Encoder", "Tokens"])
def test_encode(name):
    encoder = load_image_encoder(f"some_encoders:{name}")
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    images = torch.rand(2, 3, 8, 12, requires_grad=True)
    features = encode(encoder, images)
    assert not features.requires_grad
    assert features.shape == (2, 6, 5)
    patch = images[1, :, 4:, 4:8]  # token (1, 1)
    expected = (encoder.patches.weight * patch).sum(dim=(1, 2, 3)) + encoder.patches.bias
    torch.testing.assert_close(features[1, 4], expected)


@pytest.mark.usefixtures("encoders")
@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("some_encoders", ValueError, "image encoder is 'some_encoders'; it must be 'package.module:factory'"),
        (":Encoder", ValueError, "it must be 'package.module:factory'"),
        ("no_such_module:f", ValueError, "no_such_module cannot be imported: No module named 'no_such_module'"),
        ("needs_more:f", ValueError, "needs_more cannot be imported: No module named 'a_package_that_is_missing'"),
        ("wrong_syntax:f", ValueError, "wrong_syntax cannot be imported: SyntaxError: "),
        ("no..module:f", ValueError, r"no\.\.module cannot be imported: "),
        (".relative:f", ValueError, r"\.relative cannot be imported: TypeError: "),
        ("some_encoders:Nobody", ValueError, "module some_encoders has no Nobody"),
        ("torch:zeros", ValueError, r"zeros\(\) raised TypeError: "),
        ("some_encoders:not_callable", TypeError, "not_callable is a int, not callable"),
        (
            "some_encoders:not_a_module",
            TypeError,
            r"not_a_module\(\) returned a function; it must return an nn.Mod",
        ),
    ],
)
def test_encoders_that_cannot_be_loaded(spec, error, message):
    with pytest.raises(error, match=message):
        load_image_encoder(spec)


def test_an_encoder_that_fails():
    with pytest.raises(
        ValueError, match=r"given images \(2, 3, 8, 8\), raised RuntimeError: mat1 and mat2 shapes"
    ):
        encode(nn.Sequential(nn.Flatten(), nn.Linear(5, 5)), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (
            torch.zeros(2, 5),
            ValueError,
            r"output has shape \(2, 5\); for 2 images it must be \(2, tokens, channels\)",
        ),
        (torch.zeros(1, 6, 5), ValueError, r"output has shape \(1, 6, 5\)"),
        (torch.zeros(2, 6, 5).long(), TypeError, "output is torch.int64"),
        ({"x": torch.zeros(2, 6, 5)}, TypeError, "output is dict; it must be a floating-point tensor"),
    ],
)
def test_wrong_output_of_an_encoder(output, error, message):
    encoder = nn.Identity()
    encoder.forward = lambda images: output
    with pytest.raises(error, match=message):
        encode(encoder, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 8, 8), torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8).byte()])
def test_wrong_images(images):
    with pytest.raises((ValueError, TypeError), match="images "):
        encode(nn.Identity(), images)
