"""Training losses, sampling scheduler and timestep sampler against the released numbers and plain loops."""

import math

import numpy as np
import pytest
import torch
from released import fixture, relative_error, tiny_model

import edt
from edt.diffusion.process import (
    LossSecondMomentSampler,
    add_noise,
    guide,
    make_scheduler,
    predict,
    training_losses,
)


@pytest.fixture(scope="module")
def released():
    return fixture("diffusion")


def training_arguments(released):
    names = ("model_output", "x0", "noise", "t")
    return [released[f"train.{name}"] for name in names]


def test_noised_latents(released):
    _, x_start, noise, timestep = training_arguments(released)
    assert relative_error(add_noise(x_start, noise, timestep), released["train.x_t"]) <= 1e-5


@pytest.mark.parametrize("term", ["mse", "vb", "loss"])
def test_training_losses(released, term):
    actual = training_losses(*training_arguments(released))[term]
    assert (actual / released[f"train.{term}"] - 1).abs().max() <= 1e-5  # sample by sample: they span decades


def test_variational_term_trains_only_the_variance(released):
    model_output, x_start, noise, timestep = training_arguments(released)
    model_output = model_output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        training_losses(model_output, x_start, noise, timestep)["vb"].sum(), model_output
    )
    of_noise, of_variance = gradient.chunk(2, dim=1)
    assert not of_noise.any()
    assert of_variance.abs().flatten(1).max(dim=1).values.all()


def test_losses_are_float32_in_bfloat16(released):
    model_output, x_start, noise, timestep = training_arguments(released)
    losses = training_losses(model_output.bfloat16(), x_start.bfloat16(), noise.bfloat16(), timestep)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize("steps", [250, 20])
def test_scheduler_timesteps(released, steps):
    assert torch.equal(make_scheduler(steps).timesteps.flip(0), released[f"sample{steps}.timesteps"])


@pytest.mark.parametrize("steps", [250, 20])
@pytest.mark.parametrize("row", range(6))
def test_scheduler_step(released, monkeypatch, steps, row):
    expected = {name: released[f"sample{steps}.{name}"][row] for name in ("mean", "log_variance", "pred_xstart")}
    timestep, index = released[f"sample{steps}.timestep"][row], released[f"sample{steps}.index"][row]
    assert released[f"sample{steps}.timesteps"][index] == timestep
    x_t, model_output = released["train.x0"][row][None], released["train.model_output"][row][None]

    scheduler = make_scheduler(steps)
    noise = torch.zeros_like(x_t)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: noise, raising=True
    )
    step = scheduler.step(model_output, timestep, x_t)
    assert relative_error(step.pred_original_sample[0], expected["pred_xstart"]) <= 1e-4
    assert relative_error(step.prev_sample[0], expected["mean"]) <= 1e-4
    if timestep == 0:  # the last step adds no noise
        return
    noise = torch.ones_like(x_t)
    std = scheduler.step(model_output, timestep, x_t).prev_sample[0] - step.prev_sample[0]
    predicted_variance = model_output[:, 4:]
    log_variance = scheduler._get_variance(timestep, predicted_variance=predicted_variance)[0]
    assert relative_error(log_variance, expected["log_variance"]) <= 1e-4
    assert relative_error(std, (0.5 * expected["log_variance"]).exp()) <= 1e-4


@pytest.mark.parametrize("steps", [1, 2, 999, 1000])
def test_scheduler_takes_any_number_of_steps(steps):
    timesteps = make_scheduler(steps).timesteps.tolist()
    assert len(timesteps) == len(set(timesteps)) == steps
    assert timesteps == sorted(timesteps, reverse=True)


def test_guide():
    conditional, unconditional = torch.randn(2, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    for channels in (1, 3, 8):
        guided = guide(conditional, unconditional, 4.0, channels)
        expected = unconditional + 4.0 * (conditional - unconditional)
        torch.testing.assert_close(guided[:, :channels], expected[:, :channels])
        assert torch.equal(guided[:, channels:], conditional[:, channels:])
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)


class ShiftingHistory:
    """What `LossSecondMomentSampler` computes, one loss at a time: a list per timestep, the oldest dropped."""

    def __init__(self, history, uniform_share):
        self.history, self.uniform_share = history, uniform_share
        self.losses = [[] for _ in range(1000)]

    def update(self, timesteps, losses):
        for timestep, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            self.losses[timestep] = [*self.losses[timestep], loss][-self.history :]

    def probabilities(self):
        if any(len(losses) < self.history for losses in self.losses):
            return torch.full((1000,), 1e-3, dtype=torch.float64)
        moments = [math.sqrt(sum(loss**2 for loss in losses) / self.history) for losses in self.losses]
        weights = torch.tensor(moments, dtype=torch.float64) / sum(moments)
        return weights * (1 - self.uniform_share) + self.uniform_share / 1000


@pytest.mark.parametrize(("history", "uniform_share"), [(10, 0.001), (3, 0.1), (1, 1.0)])
def test_timestep_sampler_against_a_loop(history, uniform_share):
    generator = torch.Generator().manual_seed(0)
    sampler, loop = LossSecondMomentSampler(history, uniform_share), ShiftingHistory(history, uniform_share)
    uniform = torch.full((1000,), 1e-3, dtype=torch.float64)
    batches = [torch.arange(1000) for _ in range(history - 1)]  # one loss short of warm
    batches += [torch.randint(0, 40, (400,), generator=generator)]  # each about as often as a history is long
    batches += [torch.tensor([7] * (2 * history + 3) + [3, 7, 3])]
    for timestep in batches:
        losses = torch.rand(len(timestep), generator=generator)
        sampler.update(timestep, losses)
        loop.update(timestep, losses)
        if history > 1:
            assert torch.equal(sampler.probabilities(), uniform)
    batches = [torch.arange(999, -1, -1)] + [torch.randint(0, 1000, (300,), generator=generator) for _ in range(5)]
    batches += [torch.randint(0, 5, (64,), generator=generator)]
    for timestep in batches:
        losses = 10 * torch.rand(len(timestep), generator=generator)
        sampler.update(timestep, losses)
        loop.update(timestep, losses)
        torch.testing.assert_close(sampler.probabilities(), loop.probabilities(), rtol=1e-12, atol=0)
    if uniform_share < 1:
        assert not torch.allclose(sampler.probabilities(), uniform)


def warm_sampler():
    sampler = LossSecondMomentSampler(history=2)
    for _ in range(2):
        sampler.update(torch.arange(1000), torch.linspace(0.1, 2, 1000))
    return sampler


def test_timestep_weights_are_unbiased():
    """E over p of f(t)·weight(t) is the plain mean of f; drawn frequencies follow p."""
    sampler = warm_sampler()
    timestep, weight = sampler.sample(200_000, torch.Generator().manual_seed(0))
    assert timestep.dtype == torch.int64
    assert weight.dtype == torch.float32
    probabilities = sampler.probabilities()
    torch.testing.assert_close(weight, (1e-3 / probabilities[timestep]).float())
    frequencies = timestep.bincount(minlength=1000).double() / len(timestep)
    assert (frequencies - probabilities).abs().sum() < 0.08  # 1000 bins of 200 draws: 0.056 expected
    f = torch.linspace(0, 1, 1000, dtype=torch.float64)
    assert (f[timestep] * weight).mean().item() == pytest.approx(f.mean().item(), rel=0.01)


def test_timestep_sampler_follows_the_generator():
    first, second, other = (warm_sampler().sample(64, torch.Generator().manual_seed(s))[0] for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_timestep_sampler_state_round_trip():
    sampler, restored = warm_sampler(), LossSecondMomentSampler(history=2)
    sampler.update(torch.tensor([5, 5, 5, 9]), torch.tensor([3.0, 4.0, 5.0, 6.0]))
    restored.load_state_dict({name: tensor.clone() for name, tensor in sampler.state_dict().items()})
    for each in (sampler, restored):  # the same slot is overwritten next
        each.update(torch.tensor([5]), torch.tensor([7.0]))
    assert torch.equal(sampler.probabilities(), restored.probabilities())
    assert sampler.losses[5].sort().values.tolist() == [5.0, 7.0]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample(guidance_scale, dtype):
    model = tiny_model(class_dropout_prob=0.1).eval().to(dtype)
    steps = []

    def draw(seed):
        return edt.sample(
            model,
            torch.tensor([1, 2]),
            num_inference_steps=3,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            progress=False,
            on_step=lambda i, latents: steps.append(i),
        )

    first = draw(0)
    assert first.shape == (2, 4, 16, 16)
    assert first.isfinite().all()
    assert steps == [0, 1, 2]
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))


def test_sample_without_classes():
    latents = edt.sample(tiny_model(num_classes=0).eval(), batch_size=3, num_inference_steps=2, progress=False)
    assert latents.shape == (3, 4, 16, 16)


X, OUTPUT, T = torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 8, 8), torch.tensor([0, 999])
LOSS_ARGUMENTS = {"model_output": OUTPUT, "x_start": X, "noise": X, "timestep": T}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model_output": X}, ValueError, r"model_output has shape \(2, 4, 8, 8\).*\(2, 8, 8, 8\)"),
        ({"model_output": OUTPUT.long()}, TypeError, "model_output is torch.int64"),
        ({"x_start": X.long()}, TypeError, "x_start is torch.int64"),
        ({"noise": X.int()}, TypeError, "noise is torch.int32"),
        ({"noise": X[:1]}, ValueError, r"noise has shape \(1, 4, 8, 8\)"),
        ({"timestep": T.float()}, TypeError, "timestep is torch.float32"),
        ({"timestep": T > 0}, TypeError, "timestep is torch.bool"),
        ({"timestep": T[:1]}, ValueError, r"timestep has shape \(1,\)"),
        ({"timestep": torch.tensor([0, 1000])}, ValueError, "timestep has values from 0 to 1000"),
        ({"timestep": torch.tensor([-1, 5])}, ValueError, "timestep has values from -1"),
    ],
)
def test_bad_loss_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        training_losses(**{**LOSS_ARGUMENTS, **changed})


BAD_CALLS = {
    "noise timestep": (lambda: add_noise(X, X, torch.tensor([0, 1000])), ValueError, "timestep has values"),
    "no steps": (lambda: make_scheduler(0), ValueError, "num_inference_steps is 0"),
    "many steps": (lambda: make_scheduler(1001), ValueError, "num_inference_steps is 1001"),
    "history": (lambda: LossSecondMomentSampler(history=0), ValueError, "history is 0"),
    "huge history": (
        lambda: LossSecondMomentSampler(history=10**400),
        ValueError,
        "history is an integer of 1329",
    ),
    "part of history": (lambda: LossSecondMomentSampler(history=1.5), TypeError, "history is 1.5"),
    "truth for a share": (
        lambda: LossSecondMomentSampler(uniform_share=True),
        ValueError,
        "uniform_share is True",
    ),
    "no draws": (lambda: warm_sampler().sample(0), ValueError, "batch_size is 0"),
    "seed for a generator": (lambda: warm_sampler().sample(1, 3), TypeError, "generator is a int"),
    "whole losses": (lambda: warm_sampler().update(T, T), TypeError, "losses is torch.int64"),
    "state of nothing": (lambda: warm_sampler().load_state_dict(None), TypeError, "state is a NoneType"),
    "guide what": (lambda: guide(OUTPUT, None, 2.0), TypeError, "unconditional is a NoneType"),
    "guide in another dtype": (
        lambda: guide(OUTPUT, OUTPUT.half(), 2.0),
        TypeError,
        "unconditional is torch.float16",
    ),
    "huge guide scale": (lambda: guide(OUTPUT, OUTPUT, 10**400), ValueError, "scale is an integer of 1329 bits"),
    "guide scale beyond float32": (
        lambda: guide(OUTPUT, OUTPUT, 1e39),
        ValueError,
        r"scale is 1e\+39; it must be",
    ),
    "truth for channels": (lambda: guide(OUTPUT, OUTPUT, 2.0, True), ValueError, "guidance_channels is True"),
    "noise of another shape": (lambda: add_noise(X, X[:1], T), ValueError, r"noise has shape \(1, 4, 8, 8\)"),
    "noise of nothing": (lambda: add_noise(X, None, T), TypeError, "noise is a NoneType"),
    "timestep elsewhere": (lambda: add_noise(X, X, T.to("meta")), ValueError, "timestep is on meta"),
    "predict by nothing": (lambda: predict(None, X, 1), TypeError, "model is a NoneType"),
    "predict at no time": (lambda: predict(tiny_model(), X, math.nan), ValueError, "timestep is nan"),
    "predict for nothing": (lambda: predict(tiny_model(), 3, 1), TypeError, "latents is a int"),
    "truth for steps": (lambda: make_scheduler(True), ValueError, "num_inference_steps is True"),
    "share": (lambda: LossSecondMomentSampler(uniform_share=0.0), ValueError, "uniform_share is 0.0"),
    "losses": (lambda: warm_sampler().update(T, torch.zeros(3)), ValueError, r"losses has shape \(3,\)"),
    "loss timestep": (
        lambda: warm_sampler().update(torch.tensor([-1]), torch.zeros(1)),
        ValueError,
        "timestep has values from -1",
    ),
    "state": (lambda: warm_sampler().load_state_dict({}), ValueError, "nothing for 'losses'"),
    "state shape": (
        lambda: warm_sampler().load_state_dict(LossSecondMomentSampler(3).state_dict()),
        ValueError,
        r"\(1000, 3\) for 'losses'",
    ),
    "guide shape": (lambda: guide(OUTPUT, X, 2.0), ValueError, "unconditional has shape"),
    "guide scale": (lambda: guide(OUTPUT, OUTPUT, math.nan), ValueError, "scale is nan"),
    "guide channels": (lambda: guide(OUTPUT, OUTPUT, 2.0, 9), ValueError, "guidance_channels is 9"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("overrides", "arguments", "error", "message"),
    [
        ({}, {}, ValueError, "class_labels is None"),
        ({}, {"class_labels": torch.tensor([10])}, ValueError, "class_labels has values from 10 to 10"),
        ({}, {"class_labels": torch.tensor([-1])}, ValueError, "class_labels has values from -1"),
        ({}, {"class_labels": torch.tensor([0.5])}, TypeError, "class_labels is torch.float32"),
        ({}, {"class_labels": torch.tensor([1]), "batch_size": 2}, ValueError, "batch_size is 2"),
        ({}, {"class_labels": torch.tensor([1]), "guidance_scale": math.inf}, ValueError, "guidance_scale is inf"),
        ({}, {"class_labels": torch.tensor([1]), "guidance_channels": 5}, ValueError, "guidance_channels is 5"),
        ({}, {"class_labels": torch.tensor([1]), "guidance_channels": 0}, ValueError, "guidance_channels is 0"),
        (
            {},
            {"class_labels": torch.tensor([1]), "num_inference_steps": 0},
            ValueError,
            "num_inference_steps is 0",
        ),
        ({"out_channels": 4}, {"class_labels": torch.tensor([1])}, ValueError, "model has 4 out_channels"),
        ({"num_classes": 0}, {}, ValueError, "class_labels is None; .* batch_size"),
        ({"num_classes": 0}, {"batch_size": 1, "guidance_scale": 2.0}, ValueError, "guidance_scale is 2.0"),
    ],
)
def test_bad_sample_arguments(overrides, arguments, error, message):
    with pytest.raises(error, match=message):
        edt.sample(tiny_model(**overrides).eval(), progress=False, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": None}, TypeError, "model is a NoneType"),
        ({"class_labels": [1]}, TypeError, "class_labels is list"),
        ({"class_labels": torch.tensor([True])}, TypeError, "class_labels is torch.bool"),
        ({"class_labels": torch.tensor([1], device="meta")}, ValueError, "class_labels is on meta"),
        ({"generator": 0}, TypeError, "generator is a int"),
        ({"generator": [torch.Generator()]}, TypeError, "generator is a list"),
        ({"on_step": 1}, TypeError, "on_step is a int"),
        ({"cuda_graph": None}, TypeError, "cuda_graph is None"),
        ({"guidance_scale": None}, TypeError, "guidance_scale is None"),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale is -1.0"),
        ({"guidance_scale": 1e39}, ValueError, r"guidance_scale is 1e\+39; it must be finite in float32"),
        ({"guidance_scale": np.float32("inf")}, ValueError, "guidance_scale is .*inf.*; it must be finite"),
        ({"guidance_scale": 2.0}, ValueError, "class_dropout_prob is 0"),
        ({"num_inference_steps": 1.0}, ValueError, "num_inference_steps is 1.0"),
        ({"batch_size": 10**400}, ValueError, "batch_size is an integer of"),
    ],
)
def test_arguments_that_are_none(arguments, error, message):
    with pytest.raises(error, match=message):
        edt.sample(
            **{"model": tiny_model().eval(), "class_labels": torch.tensor([1]), "progress": False, **arguments}
        )


def test_a_scale_that_overflows_is_named():
    model = tiny_model(class_dropout_prob=0.1).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    with pytest.raises(ValueError, match=r"are its weights, latents or guidance_scale 1e\+38, sound\?"):
        edt.sample(model, torch.tensor([1]), num_inference_steps=2, guidance_scale=1e38, progress=False)


def test_sampling_from_a_model_in_training_mode():
    with pytest.raises(ValueError, match="model is in training mode"):
        edt.sample(tiny_model().train(), torch.tensor([1]), progress=False)


def test_sampling_guides_as_many_channels_as_there_are():
    """One grey channel: the default of three would not fit."""
    model = tiny_model(in_channels=1, out_channels=2, class_dropout_prob=0.1).eval()
    latents = edt.sample(model, torch.tensor([1]), num_inference_steps=2, guidance_scale=2.0, progress=False)
    assert latents.shape == (1, 1, 16, 16)
