"""What training keeps for backward on the Triton path: counted by the ops' registered shapes, no kernel runs."""

from collections import Counter

import pytest
import torch
from released import TINY
from saved import num_bytes, saved_tensors

import edt
from benchmarks.plain import PlainEDT
from edt.model.complexity import estimate_memory, meta_model
from edt.model.layers import Block

pytestmark = pytest.mark.interpreter  # elsewhere the Triton path refuses the CPU


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "triton")


def network_bytes(build, batch_size: int, autocast: torch.dtype | None = None) -> int:
    with torch.device("meta"):
        model = build()
    size, channels = (32, 32), 4
    if isinstance(model, edt.EDTTransformer2DModel):
        size, channels = model.latent_size, model.config.in_channels

    def inputs():
        timestep, labels = torch.empty(2, batch_size, dtype=torch.int64).unbind()
        labelled = getattr(model, "label_embedding", True) is not None
        return torch.empty(batch_size, channels, *size), timestep, *[labels] * labelled

    return num_bytes(saved_tensors(model, inputs, autocast))


def per_image(build, autocast: torch.dtype | None = None) -> int:
    """The bytes that grow with the batch: not the weights in autocast's dtype, which both networks keep."""
    two, four = (network_bytes(build, batch_size, autocast) for batch_size in (2, 4))
    assert (four - two) % 2 == 0
    return (four - two) // 2


def test_edt_keeps_at_most_55_percent_of_the_plain_formulas():
    ours = per_image(lambda: edt.load_preset("EDT-S/2", num_classes=0), torch.bfloat16)
    plain = per_image(lambda: PlainEDT(class_dropout_prob=0.0), torch.bfloat16)
    assert ours <= 0.55 * plain, f"{ours / plain:.3f} of the plain formulas' {plain / 1e6:.1f} MB an image"


def test_what_a_block_keeps():
    """The table in `Block`'s docstring: under autocast, between two other blocks."""
    N, C, heads, batch_size = 16, 48, 4, 5
    with torch.device("meta"):
        block = Block(C, heads, 4.0, (4, 4))

    def inputs():
        x, modulation, next_modulation = (torch.empty(batch_size, *s) for s in ((N, C), (6, C), (6, C)))
        normed = torch.empty(batch_size, N, C, dtype=torch.bfloat16)
        return [tensor.requires_grad_() for tensor in (x, modulation, normed, next_modulation)]

    weights = {tuple(p.t().shape) for p in block.parameters() if p.ndim == 2}
    kept = [t for t in saved_tensors(block, inputs, torch.bfloat16) if tuple(t.shape) not in weights]
    numbers = Counter((t.dtype, t.untyped_storage().nbytes() // t.itemsize // batch_size) for t in kept)
    assert numbers == {
        (torch.float32, N * C): 2,  # the residual stream after attention and after the MLP
        (torch.bfloat16, N * C): 5,  # both norms, attention before and after its projection, the MLP's output
        (torch.bfloat16, N * 3 * C): 1,  # q, k, v
        (torch.bfloat16, N * 4 * C): 1,  # into GELU
        (torch.float32, 2 * N): 2,  # mean and 1/σ of two norms
        (torch.float32, N * heads): 1,  # logsumexp
        (torch.float32, 6 * C): 2,  # the modulations, of this block and the next
    }
    assert num_bytes(kept) == batch_size * (N * (32 * C + 16 + 4 * heads) + 48 * C)


def test_gradient_checkpointing_keeps_the_residual_stream_alone():
    """Not the norm beside it, which would be handed from block to block without checkpointing."""

    def build(depth: int) -> edt.EDTTransformer2DModel:
        model = edt.EDTTransformer2DModel(
            **{**TINY, "num_classes": 0, "amm_blocks": (), "depths": (1, 1, depth, 1, 1)}
        )
        model.enable_gradient_checkpointing()
        return model

    tokens, channels = 4, TINY["hidden_sizes"][2]
    more = network_bytes(lambda: build(3), 5) - network_bytes(lambda: build(1), 5)
    assert more == 2 * 4 * 5 * (tokens + 6) * channels  # x and the modulations


PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mlp_ratio": 2.5},
        {"sample_size": (16, 24), "patch_size": 1},
        {"depths": (1, 3, 2, 5, 4)},
        {"task_routing": (0.8, 4.0)},
    ],
)
def test_estimated_activations_are_those_kept(change, precision):
    config = {**TINY, "num_classes": 0, **change}
    estimate = estimate_memory(config, 3, precision=precision)
    per_batch = 3 * per_image(lambda: edt.EDTTransformer2DModel(**config), PRECISIONS[precision])
    assert estimate.training_activations == per_batch


def kept_inside_a_block(config: dict, autocast: torch.dtype | None) -> int:
    """Bytes for an image in a block of stage 4: all but what enters it."""
    (side, _), C = meta_model(config).merges[0].grid, config["hidden_sizes"][4]

    def kept(batch_size: int) -> int:
        def inputs():
            x, modulation = torch.empty(batch_size, side * side, C), torch.empty(batch_size, 6, C, dtype=autocast)
            return x.requires_grad_(), modulation.requires_grad_()

        return num_bytes(saved_tensors(meta_model(config).stages[4].blocks[-1], inputs, autocast))

    entering = C * (4 * side * side + 6 * (autocast or torch.float32).itemsize)
    return (kept(4) - kept(2)) // 2 - entering


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_estimate_of_a_preset(precision, gradient_checkpointing):
    """With gradient checkpointing, what the forward pass keeps and then the backward pass in one block."""
    autocast, options = PRECISIONS[precision], {"gradient_checkpointing": gradient_checkpointing}
    config = {**edt.PRESETS["EDT-S/2"], "num_classes": 0}

    def build() -> edt.EDTTransformer2DModel:
        model = edt.EDTTransformer2DModel(**config)
        if gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    kept = per_image(build, autocast)
    if gradient_checkpointing:
        kept += kept_inside_a_block(config, autocast)
    estimates = [estimate_memory(config, 4, precision=precision, two_pass=two, **options) for two in (False, True)]
    assert [estimate.training_activations for estimate in estimates] == [4 * kept, 8 * kept]


def test_estimate_with_classes(monkeypatch):
    # Fake labels have no values.
    monkeypatch.setattr("edt.model.checks._check_class_labels", lambda *args: None)
    config = {**TINY, "num_classes": 10}
    for precision, autocast in PRECISIONS.items():
        kept = per_image(lambda: edt.EDTTransformer2DModel(**config), autocast)
        labels = 2 * 8  # the timesteps are in the same storage
        assert estimate_memory(config, 1, precision=precision).training_activations == kept - labels


def test_estimated_weight_copies():
    """Autocast holds them to the end of the forward pass; those that backward needs are kept for it, but fc2's."""
    config = {**edt.PRESETS["EDT-S/2"], "num_classes": 0}
    two, four = (network_bytes(lambda: edt.EDTTransformer2DModel(**config), n, torch.bfloat16) for n in (2, 4))
    fc2 = sum(p.numel() for name, p in meta_model(config).named_parameters() if name.endswith("fc2.weight"))
    kept = 2 * two - four + 2 * fc2
    estimate = estimate_memory(config, 1, precision="bfloat16")
    assert kept <= estimate.weight_copies <= 1.02 * kept  # biases and the first Linears
    assert estimate_memory(config, 1).weight_copies == 0
