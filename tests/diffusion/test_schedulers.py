"""Every scheduler that `EDTPipeline` takes goes through the noise levels of its own timesteps, however many.

The network is replaced by the best one there can be, for data of which that is known: a single picture, for which
every scheduler must be exact, and N(0, 0.5²), for which the ODE's solution is known.
"""

import inspect
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from released import tiny_model

import edt
from edt.diffusion.sampler import ANCESTRAL, SOLVERS, check_scheduler, set_timesteps
from edt.sampling.sample_set import SCHEDULERS as COMMAND_LINE

pytestmark = pytest.mark.filterwarnings("error:torch.searchsorted")

STEPS = (1, 2, 3, 7, 25, 61)  # of 61, diffusers' "trailing" has 62 timesteps, the last of them -1
DDPM = [each.__name__ for each in ANCESTRAL]
STOCHASTIC = {*DDPM, "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "SASolverScheduler"}
SECOND_ORDER = {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
ENDS_AT_THE_FIRST_LEVEL = {"DEISMultistepScheduler", "SASolverScheduler"}  # 0.01, others at none
STD = 0.5
ALPHAS_BAR = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
LEVELS = ((1 - ALPHAS_BAR) / ALPHAS_BAR).sqrt()


def alpha_bar(timestep) -> float:
    """Between two timesteps, where some schedulers ask, as they do: of the level's logarithm."""
    below = int(timestep)
    above = min(below + 1, 999)
    level = torch.lerp(LEVELS[below].log(), LEVELS[above].log(), float(timestep) - below).exp()
    return 1 / (1 + level.item() ** 2)


def from_released(name: str, **settings):
    return getattr(diffusers, name).from_config(edt.make_scheduler().config, **settings)


@pytest.fixture(scope="module")
def pipe():
    pipe = edt.EDTPipeline(tiny_model(in_channels=1, out_channels=2).eval(), edt.make_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, scheduler, steps, noise_of, batch_size=16):
    """The latents that a perfect network leads to, and [(timestep, its noise)] of each call of the network."""
    asked, forward = [], pipe.transformer.forward

    def perfect(x, timestep, labels=None):
        noise = noise_of(x.double(), alpha_bar(timestep))
        asked.append((float(timestep), noise))
        return SimpleNamespace(sample=torch.cat([noise, torch.full_like(noise, -1.0)], 1).float())

    pipe.scheduler, pipe.transformer.forward = scheduler, perfect
    try:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": steps, "output_type": "latent", "generator": generator}
        return pipe([0] * batch_size, **options).images.double(), asked
    finally:
        pipe.transformer.forward = forward


PICTURE = torch.randn(1, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def noise_in_picture(x, alpha):
    return (x - math.sqrt(alpha) * PICTURE) / math.sqrt(1 - alpha)


def noise_in_gaussian(x, alpha):
    return math.sqrt(1 - alpha) * x / (alpha * STD**2 + 1 - alpha)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", [*DDPM, *SOLVERS])
def test_every_level_is_that_of_its_timestep(pipe, name, steps):
    """The noise that the network sees in one picture is N(0, 1) at each call, with deterministic ones the same at
    each, and none at the end."""
    if name in DDPM and steps == 1:
        pytest.skip("the released single step begins at timestep 0")
    drawn, asked = run(pipe, from_released(name), steps, noise_in_picture)
    assert len(asked) == (2 * steps - 1 if name in SECOND_ORDER else steps)
    assert asked[0][0] == 999
    assert asked[-1][0] >= 0
    first = asked[0][1]
    for _, noise in asked:
        if name in STOCHASTIC:
            assert noise.std().item() == pytest.approx(1, abs=0.06)
        else:
            assert (noise - first).square().mean().sqrt() <= 0.01
    left = 0.01 if name in ENDS_AT_THE_FIRST_LEVEL else 0.0
    assert (drawn - PICTURE).square().mean().sqrt().item() == pytest.approx(left, abs=1e-3)


def ode_solution(timestep: float) -> float:
    """The factor from pure noise at a timestep to N(0, 0.5²)."""
    return STD / math.sqrt(alpha_bar(timestep) * STD**2 + 1 - alpha_bar(timestep))


@pytest.mark.parametrize("name", SOLVERS)
def test_more_steps_come_nearer_to_the_distribution(pipe, name):
    deviations = {}
    for steps in (1, 2, 5, 25, 50):
        drawn, asked = run(pipe, from_released(name), steps, noise_in_gaussian)
        deviations[steps] = drawn.std().item() - ode_solution(asked[0][0])
    assert -STD <= deviations[1] <= -0.4  # one step draws the mean
    assert deviations[1] < deviations[2] < deviations[5] <= 0
    assert abs(deviations[25]) <= 0.1
    assert abs(deviations[50]) <= 0.06


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMParallelScheduler"])
@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 61, 300, 600, 999])
def test_ddim_by_hand(pipe, name, spacing, steps):
    """Over the timesteps at which the network was asked, and from the last of them to no noise."""
    scheduler = from_released(name, timestep_spacing=spacing)
    drawn, asked = run(pipe, scheduler, steps, noise_in_gaussian, batch_size=1)
    factor, timesteps = 1.0, [int(timestep) for timestep, _ in asked]
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert len(timesteps) == steps
    assert timesteps[0] >= 500
    for timestep, following in zip(timesteps, [*timesteps[1:], None]):
        a, b = ALPHAS_BAR[timestep].item(), 1.0 if following is None else ALPHAS_BAR[following].item()
        noise = noise_in_gaussian(1.0, a)
        factor *= math.sqrt(b) * (1 - math.sqrt(1 - a) * noise) / math.sqrt(a) + math.sqrt(1 - b) * noise
    first = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(drawn, factor * first, rtol=1e-3, atol=1e-4)
    assert scheduler.config.timestep_spacing == spacing
    assert scheduler.config.num_train_timesteps == 1000


@pytest.mark.parametrize("name", [*DDPM, *SOLVERS])
def test_any_number_of_steps(name):
    """Whole lists; the released one's as released."""
    scheduler = from_released(name)
    counts = range(1, 1001) if name == "DDIMScheduler" else (1, 2, 61, 103, 999, 1000)
    for steps in counts:
        set_timesteps(scheduler, steps)
        timesteps = scheduler.timesteps.tolist()
        if name in DDPM:
            assert timesteps == np.linspace(0, 999, steps).round()[::-1].tolist()
        else:
            assert timesteps[0] == 999
            assert min(timesteps) >= 0
            assert len(timesteps) == (2 * steps - 1 if name in SECOND_ORDER else steps)
            assert torch.isfinite(scheduler.timesteps).all()


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
                                  "DEISMultistepScheduler", "SASolverScheduler"])  # fmt: skip
def test_a_step_for_each_timestep(pipe, name):
    """With "linspace", two of DPM-Solver's timesteps would be the same, and its latents NaN."""
    drawn, _ = run(pipe, from_released(name), 1000, noise_in_gaussian, batch_size=4)
    assert drawn.std().item() == pytest.approx(STD, abs=0.03)


def test_the_command_line_has_none_but_these():
    assert set(COMMAND_LINE.values()) <= {*DDPM, *SOLVERS}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "euler_at_final": True}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
        ("DEISMultistepScheduler", {"use_karras_sigmas": True}),
        ("DDIMScheduler", {"set_alpha_to_one": False}),
    ],
)
def test_settings_that_keep_the_levels(pipe, name, settings):
    drawn, asked = run(pipe, from_released(name, **settings), 25, noise_in_picture)
    assert all(noise.std().item() == pytest.approx(1, abs=0.05) for timestep, noise in asked if timestep >= 5)
    assert (drawn - PICTURE).square().mean().sqrt() <= 0.1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "noise levels that are not theirs"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "noise levels that are not theirs|flow"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "other noise levels"),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}, "EDT predicts epsilon"),
        ("DDIMInverseScheduler", {}, "goes from images to noise"),
        ("DPMSolverMultistepInverseScheduler", {}, "goes from images to noise"),
        ("RePaintScheduler", {}, "filling in"),
        ("LCMScheduler", {}, "distilled"),
        ("TCDScheduler", {}, "distilled"),
        ("PNDMScheduler", {}, "steps of 1000 // num_inference_steps"),
    ],
)
def test_what_cannot_keep_them_is_refused(pipe, name, settings, message):
    with pytest.raises(ValueError, match=f"scheduler (is|has) .*({message})"):
        run(pipe, from_released(name, **settings), 10, noise_in_picture)


def test_unknown_schedulers_are_refused(pipe):
    """That of another package may have EDT's noise levels, and step through others."""
    other = type("OtherScheduler", (diffusers.SchedulerMixin, diffusers.ConfigMixin), {"config_name": "x"})()
    other.register_to_config(num_train_timesteps=1000)
    other.alphas_cumprod = edt.make_scheduler().alphas_cumprod
    with pytest.raises(ValueError, match="scheduler is OtherScheduler; it must be one of DDPMScheduler, "):
        check_scheduler(other, pipe.transformer.config)
    mine = type("MyScheduler", (diffusers.DDIMScheduler,), {}).from_config(edt.make_scheduler().config)
    check_scheduler(mine, pipe.transformer.config)


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_latents_are_not_clipped(setting):
    """Pixels may be, which are on the scale −1 to 1."""
    scheduler = from_released("DDIMScheduler", **{setting: True})
    for channels in (1, 4):
        model = tiny_model(in_channels=channels, out_channels=2 * channels).eval()
        pipe = edt.EDTPipeline(model, scheduler)
        pipe.set_progress_bar_config(disable=True)
        if channels == 1:
            assert pipe([1], num_inference_steps=3, output_type="latent").images.abs().max() <= 1
        else:
            with pytest.raises(ValueError, match=f"scheduler has {setting}, which cuts latents off"):
                pipe([1], num_inference_steps=3, output_type="latent")


def test_saved_and_loaded_schedulers(pipe, tmp_path):
    """What was set for the time of a call is in no file, and is not handed on."""
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"):
        scheduler = from_released(name)
        before = dict(scheduler.config)
        expected, _ = run(pipe, scheduler, 7, noise_in_gaussian)
        assert dict(scheduler.config) == before
        pipe.save_pretrained(tmp_path / name)
        loaded = edt.EDTPipeline.from_pretrained(tmp_path / name)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(run(loaded, loaded.scheduler, 7, noise_in_gaussian)[0], expected)
        back = diffusers.DDPMScheduler.from_config(loaded.scheduler.config)
        set_timesteps(back, 5)
        assert back.timesteps.tolist() == edt.make_scheduler(5).timesteps.tolist()


def test_all_that_diffusers_has_is_known(pipe):
    """One of a newer diffusers, which might pass the check of noise levels, is refused until it is looked at."""
    fit = []
    for name in dir(diffusers):
        if not name.endswith("Scheduler") or not inspect.isclass(getattr(diffusers, name)):
            continue
        try:
            check_scheduler(from_released(name), pipe.transformer.config)
        except (ValueError, TypeError, AttributeError, ImportError):
            continue
        fit.append(name)
    assert sorted(fit) == sorted([*DDPM, *SOLVERS])
