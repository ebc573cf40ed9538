import pytest
import torch

from edt import LossSecondMomentSampler, load_preset, training_losses
from edt.diffusion.process import add_noise
from edt.train.objective import TrainingObjective, draw
from edt.train.randomness import keyed_generator, keyed_seed


@pytest.fixture(scope="module")
def model():
    """With weights that are not zero anywhere, so that masks and labels matter."""
    model = load_preset("EDT-digits").train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def step(model):
    """Latents, labels and draws of 6 samples."""
    latents = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    draws = draw(model, LossSecondMomentSampler(), latents, keyed_generator("cpu", 0, 1))
    return latents, torch.arange(6), draws


def test_both_passes_equal_passes_of_their_own(model, step):
    latents, labels, draws = step
    losses, alignment = TrainingObjective(model)(latents, labels, draws)
    assert alignment == 0
    for i, keep_masks in enumerate((None, draws.keep_masks)):
        noised = add_noise(latents, draws.noise[i], draws.timestep)
        dropped = torch.where(draws.label_drops[i], 10, labels)
        no_drops = torch.zeros(6, dtype=torch.bool)
        output = model(noised, draws.timestep, dropped, keep_masks, label_drops=no_drops).sample
        expected = training_losses(output, latents, draws.noise[i], draws.timestep)["loss"]
        torch.testing.assert_close(losses[i], expected)
    assert not torch.allclose(losses[0], losses[1])


def test_parts_of_draws_give_the_losses_of_their_samples(model, step):
    latents, labels, draws = step
    objective = TrainingObjective(model)
    whole, _ = objective(latents, labels, draws)
    parts = [objective(latents[s:t], labels[s:t], draws.part(s, t))[0] for s, t in ((0, 2), (2, 6))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_draws_depend_on_the_generator_alone(model, step):
    latents, _, first = step
    torch.randn(7)  # the global generator is not asked
    again = draw(model, LossSecondMomentSampler(), latents, keyed_generator("cpu", 0, 1))
    other = draw(model, LossSecondMomentSampler(), latents, keyed_generator("cpu", 0, 2))
    for name in ("noise", "timestep", "weight", "label_drops"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert all(map(torch.equal, first.keep_masks, again.keep_masks))
    assert not torch.equal(first.noise, other.noise)
    assert not torch.equal(first.noise[0], first.noise[1])


def test_without_masking_there_is_one_pass(model):
    latents = torch.zeros(4, 1, 8, 8)
    draws = draw(model, LossSecondMomentSampler(), latents, keyed_generator("cpu", 0), masking=False)
    assert draws.keep_masks is None
    losses, _ = TrainingObjective(model)(latents, torch.arange(4), draws)
    assert losses.shape == (1, 4)


def test_unconditional_models_have_no_labels_to_drop():
    model = load_preset("EDT-digits", num_classes=0).train()
    latents = torch.zeros(2, 1, 8, 8)
    draws = draw(model, LossSecondMomentSampler(), latents, keyed_generator("cpu", 0))
    assert draws.label_drops is None
    assert TrainingObjective(model)(latents, None, draws)[0].shape == (2, 2)


def test_losses_are_float32_under_autocast(model, step):
    latents, labels, draws = step
    exact, _ = TrainingObjective(model)(latents, labels, draws)
    rounded, _ = TrainingObjective(model, autocast_dtype=torch.bfloat16)(latents, labels, draws)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_keys_give_unrelated_seeds():
    keys = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 1, 3), (0, 1)]
    assert len({keyed_seed(*key) for key in keys}) == len(keys)
    draws = [torch.rand(1000, generator=keyed_generator("cpu", 0, step)) for step in range(20)]
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(20)
    assert correlations.abs().max() < 0.15
