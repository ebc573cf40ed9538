"""`EDTPipeline` against the released sampling procedure written out, and as diffusers' users know pipelines."""

import builtins
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from released import fixture, relative_error, tiny_model

import edt
from benchmarks import schedulers, step_cache
from edt import EDTPipeline, EDTTransformer2DModel, GraphedStep, load_preset, make_scheduler
from edt.cli import main
from edt.data.digits import to_uint8
from edt.demo.run import DemoOptions, run_demo
from edt.diffusion.process import predict
from edt.model.step_cache import NOTHING, StepCacheConfig
from edt.runs.checkpoint import write_checkpoint
from edt.train.config import TrainConfig

SCHEDULERS = [
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pipeline(vae=None, id2label=None, **overrides):
    model = tiny_model(**{"class_dropout_prob": 0.1, **overrides}).eval()  # a null class to guide by
    return quiet(EDTPipeline(model, make_scheduler(), vae, id2label))


def grey_pipeline(**overrides):
    return make_pipeline(**{"in_channels": 1, "out_channels": 2, **overrides})


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                         up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, latent_channels=4,
                         scaling_factor=0.18215).eval()  # fmt: skip


def released_procedure(model, noise, labels, steps, guidance_scale, random):
    """Ancestral sampling on evenly respaced steps, from spec.md's and improved diffusion's formulas, in float64
    but for the network."""
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    alphas_bar = torch.cumprod(1 - betas, 0)
    used = [round(i * 999 / (steps - 1)) for i in range(steps)]
    x = noise.double()
    for i in reversed(range(steps)):
        bar, previous = alphas_bar[used[i]], alphas_bar[used[i - 1]] if i else torch.ones((), dtype=torch.float64)
        beta = 1 - bar / previous
        timestep = torch.full((len(x),), used[i])
        output = model(x.float(), timestep, labels).sample.double()
        epsilon, v = output[:, :4], output[:, 4:]
        if guidance_scale != 1:
            null = model(x.float(), timestep, torch.full_like(labels, 10)).sample.double()[:, :3]
            epsilon = torch.cat([null + guidance_scale * (epsilon[:, :3] - null), epsilon[:, 3:]], 1)
        start = (x - (1 - bar).sqrt() * epsilon) / bar.sqrt()
        mean = beta * previous.sqrt() / (1 - bar) * start + (1 - previous) * (1 - beta).sqrt() / (1 - bar) * x
        if i == 0:
            return mean
        posterior = beta * (1 - previous) / (1 - bar)
        log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * posterior.log()
        draw = torch.randn(x.shape, generator=random)
        x = mean + (0.5 * log_variance).exp() * draw


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_twenty_steps_are_the_released_procedure(guidance_scale):
    pipe = make_pipeline()
    labels = torch.tensor([1, 7])
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 20}
    drawn = pipe(labels, generator=generator(), output_type="latent", **options).images
    random = generator()
    noise = torch.randn(2, 4, 16, 16, generator=random)
    expected = released_procedure(pipe.transformer, noise, labels, 20, guidance_scale, random)
    assert relative_error(drawn.double(), expected) <= 1e-4
    # the plain function is the same procedure
    plain = edt.sample(pipe.transformer, labels, generator=generator(), progress=False, **options)
    assert torch.equal(drawn, plain)


@pytest.mark.parametrize("row", range(6))
def test_single_steps_are_the_released_ones(monkeypatch, row):
    """A network that returns the fixture's output, set down at the fixture's latents and timestep."""
    released = fixture("diffusion")
    x_t, output = released["train.x0"][row][None], released["train.model_output"][row][None]
    step = 19 - int(released["sample20.index"][row])
    pipe = make_pipeline(sample_size=x_t.shape[-1])
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a: type("Output", (), {"sample": output}))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: torch.zeros_like(x_t))
    seen = []

    def set_down(pipe, i, timestep, tensors):
        seen.append((int(timestep), tensors["latents"]))
        return {"latents": x_t} if i == step - 1 else {}

    pipe([0], num_inference_steps=20, latents=x_t, output_type="latent", callback_on_step_end=set_down)
    timestep, mean = seen[step]
    assert timestep == released["sample20.timestep"][row]
    assert relative_error(mean[0], released["sample20.mean"][row]) <= 1e-4


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("out_channels", [4, 8])
def test_schedulers(scheduler, out_channels):
    """From the released one's configuration, as users switch; with a learned variance, and without."""
    pipe = make_pipeline(out_channels=out_channels)
    variance = {"variance_type": "fixed_small"} if out_channels == 4 and scheduler is DDPMScheduler else {}
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **variance)
    draws = [
        pipe([1, 2], 2.0, num_inference_steps=4, generator=generator(seed), output_type="latent").images
        for seed in (0, 0, 1)
    ]
    assert draws[0].shape == (2, 4, 16, 16)
    assert draws[0].isfinite().all()
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("scheduler", SCHEDULERS[1:])
def test_back_to_the_released_scheduler(scheduler):
    """With its learned variance, which the other one did not take."""
    pipe = make_pipeline()
    options = {"num_inference_steps": 3, "output_type": "latent"}
    expected = pipe([1, 2], generator=generator(), **options).images
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe([1, 2], generator=generator(), **options)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(pipe([1, 2], generator=generator(), **options).images, expected)


def test_the_parallel_scheduler_is_the_released_one():
    pipe = make_pipeline()
    options = {"num_inference_steps": 3, "output_type": "latent"}
    expected = pipe([1, 2], generator=generator(), **options).images
    pipe.scheduler = DDPMParallelScheduler.from_config(pipe.scheduler.config)
    assert relative_error(pipe([1, 2], generator=generator(), **options).images, expected) <= 1e-6


@pytest.mark.parametrize("scheduler", SCHEDULERS[1:])
def test_solvers_reach_what_the_noise_says(scheduler, monkeypatch):
    """A perfect network, whose noise leads to one picture from wherever it is: every scheduler must find it."""
    pipe = make_pipeline()
    target = torch.randn(1, 4, 16, 16, generator=generator(5))
    alphas_bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)

    def forward(x, timestep, labels):
        bar = alphas_bar[round(float(timestep))].float()
        noise = (x - bar.sqrt() * target) / (1 - bar).sqrt()
        return type("Output", (), {"sample": torch.cat([noise, noise], 1)})

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    drawn = pipe([0], num_inference_steps=25, generator=generator(), output_type="latent").images
    assert relative_error(drawn, target) <= 0.02


def test_images_of_every_kind():
    pipe = grey_pipeline()
    options = {"num_inference_steps": 2, "latents": torch.randn(2, 1, 16, 16, generator=generator(1))}

    def draw(kind, **more):
        return pipe([3, 4], output_type=kind, generator=generator(), **options, **more)

    latents, pt, array, pil = (draw(kind).images for kind in ("latent", "pt", "np", "pil"))
    torch.testing.assert_close(pt, (latents / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(array, pt.numpy().transpose(0, 2, 3, 1))
    assert [image.size for image in pil] == [(16, 16)] * 2
    assert np.array_equal(np.stack([np.asarray(image) for image in pil])[..., None], to_uint8(latents.numpy()))
    assert torch.equal(draw("latent", return_dict=False)[0], latents)


def test_latents_are_decoded(vae):
    pipe = make_pipeline(vae)
    options = {"num_inference_steps": 2, "num_images_per_prompt": 3}
    latents = pipe(7, generator=generator(), output_type="latent", **options).images
    images = pipe(7, generator=generator(), output_type="pt", **options).images
    with torch.no_grad():
        expected = (vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(pipe(7, generator=generator(), output_type="pt", **options).images, images)
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 8, 16
    pipe.vae.enable_tiling()
    assert pipe(7, generator=generator(), output_type="pt", **options).images.shape == images.shape
    pipe.vae.disable_tiling()
    pipe.vae.disable_slicing()


def test_rectangular_and_unconditional():
    pipe = grey_pipeline(sample_size=(16, 32), num_classes=0)
    images = pipe(num_inference_steps=2, num_images_per_prompt=3, generator=generator(), output_type="np").images
    assert images.shape == (3, 16, 32, 1)


def test_a_generator_for_each_image():
    """An image then depends on its own generator alone."""
    pipe = grey_pipeline()
    options = {"num_inference_steps": 3, "output_type": "latent"}
    together = pipe([1, 2, 3], 1.5, generator=[generator(s) for s in (5, 6, 7)], **options).images
    alone = pipe([2], 1.5, generator=[generator(6)], **options).images
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.equal(together[0], together[1])


def test_the_order_of_images_per_prompt():
    pipe = grey_pipeline()
    noise = torch.randn(4, 1, 16, 16, generator=generator())
    options = {"num_inference_steps": 2, "output_type": "latent", "latents": noise}
    twice = pipe([3, 8], num_images_per_prompt=2, generator=generator(), **options).images
    assert torch.equal(twice, pipe([3, 3, 8, 8], generator=generator(), **options).images)


def test_guidance_interval():
    """Guided exactly at the noise levels inside, which save the second pass elsewhere."""
    pipe = make_pipeline()
    batches = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    pipe([1], 3.0, num_inference_steps=20, guidance_interval=(0.3, 10.0), output_type="latent")
    hook.remove()
    alphas_bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
    levels = ((1 - alphas_bar) / alphas_bar).sqrt()[make_scheduler(20).timesteps]
    assert batches == [2 if 0.3 < level <= 10 else 1 for level in levels.tolist()]
    assert {1, 2} == set(batches)


def test_guidance_of_the_first_channels():
    pipe = make_pipeline()
    one = {"num_inference_steps": 1, "output_type": "latent", "generator": generator()}
    draws = {c: pipe([1], 4.0, **{**one, "generator": generator()}, guidance_channels=c).images for c in (1, 3, 4)}
    plain = pipe([1], 1.0, **{**one, "generator": generator()}).images
    for channels, drawn in draws.items():
        guided = [not torch.allclose(drawn[:, c], plain[:, c], atol=1e-4) for c in range(4)]
        assert guided == [c < channels for c in range(4)]
    default = pipe([1], 4.0, **{**one, "generator": generator()}).images
    assert torch.equal(default, draws[3])


def test_step_caching():
    """Each call begins with a full step, and leaves no features behind."""
    pipe = grey_pipeline()
    options = {"num_inference_steps": 5, "output_type": "latent"}
    plain = pipe([1, 2], 2.0, generator=generator(), **options).images
    pipe.transformer.enable_cache(StepCacheConfig(interval=2))
    cached = [pipe([1, 2], 2.0, generator=generator(), **options).images for _ in range(2)]
    assert torch.equal(*cached)
    assert 0 < relative_error(cached[0], plain) < 0.5
    assert pipe.transformer._step_cache.features == NOTHING
    pipe.transformer.disable_cache()
    assert torch.equal(pipe([1, 2], 2.0, generator=generator(), **options).images, plain)


def test_an_exception_leaves_no_features_behind():
    pipe = grey_pipeline()
    pipe.transformer.enable_cache(StepCacheConfig(interval=2))
    with pytest.raises(ZeroDivisionError):
        pipe([1], num_inference_steps=3, callback_on_step_end=lambda *a: 1 / 0)
    assert pipe.transformer._step_cache.features == NOTHING


def test_step_caching_in_a_guidance_interval():
    """Where the batch changes from B to 2B and back, the step is full."""
    pipe = grey_pipeline()
    stages = pipe.transformer.stages
    full, batches = [], []
    stages[0].register_forward_hook(lambda module, args, output: full.append(len(output)))
    stages[4].register_forward_hook(lambda module, args, output: batches.append(len(output)))
    pipe.transformer.enable_cache(StepCacheConfig(interval=20))
    pipe([1], 3.0, num_inference_steps=20, guidance_interval=(0.3, 10.0), output_type="latent")
    assert len(batches) == 20
    assert full == [batch for batch, _ in itertools.groupby(batches)] == [1, 2, 1]


def test_callbacks_and_interruption():
    pipe = grey_pipeline()
    seen = []

    def stop_after_three(pipe, i, timestep, tensors):
        seen.append((i, int(timestep), tuple(tensors["latents"].shape)))
        pipe._interrupt = i == 2
        return {"latents": tensors["latents"].clamp(-1, 1)}

    images = pipe([1], num_inference_steps=5, callback_on_step_end=stop_after_three, output_type="latent").images
    assert [i for i, *_ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == make_scheduler(5).timesteps[:3].tolist()
    assert images.abs().max() <= 1
    assert pipe.num_timesteps == 5
    assert pipe.guidance_scale == 1


def test_guidance_changed_by_a_callback():
    pipe = grey_pipeline()
    scales, network = [], pipe.transformer.forward
    pipe.transformer.forward = lambda x, *args: scales.append(len(x)) or network(x, *args)

    def end_guidance(pipe, i, timestep, tensors):
        pipe._guidance_scale = 1.0 if i == 1 else pipe.guidance_scale
        return tensors

    pipe([1], 3.0, num_inference_steps=4, callback_on_step_end=end_guidance, output_type="latent")
    assert scales == [2, 2, 1, 1]


def test_names_of_classes(tmp_path):
    names = {0: "zero, nought", 3: "three"}
    pipe = grey_pipeline(id2label=names)
    assert pipe.labels == {"zero, nought": 0, "zero": 0, "nought": 0, "three": 3}
    options = {"num_inference_steps": 2, "output_type": "latent"}
    by_name = pipe(["three", "nought", np.int64(5)], generator=generator(), **options).images
    assert torch.equal(by_name, pipe([3, 0, 5], generator=generator(), **options).images)
    pipe.save_pretrained(tmp_path)
    assert EDTPipeline.from_pretrained(tmp_path).id2label == names


def test_names_of_several_classes():
    """As ImageNet has them."""
    pipe = grey_pipeline(id2label={1: "crane", 2: "crane", 6: "missile", 7: "projectile, missile"})
    assert pipe.labels == {"missile": 6, "projectile": 7, "projectile, missile": 7}
    with pytest.raises(ValueError, match=r"'crane', a name of classes \[1, 2\]; give the number"):
        pipe("crane", num_inference_steps=1)


@pytest.mark.parametrize("kind", ["own class", "any pipeline", "shards", "variant", "with a VAE"])
def test_saved_pipelines_draw_the_same_pixels(tmp_path, monkeypatch, vae, kind):
    pipe = make_pipeline(vae) if kind == "with a VAE" else grey_pipeline(id2label={3: "three"})
    variant = {"variant": "fp16"} if kind == "variant" else {}
    pipe.save_pretrained(tmp_path / "pipe", max_shard_size="100kB" if kind == "shards" else None, **variant)
    files = [file.name for file in (tmp_path / "pipe" / "transformer").glob("*.safetensors")]
    assert not list((tmp_path / "pipe").rglob("*.bin"))
    assert len(files) > 1 if kind == "shards" else len(files) == 1
    assert all(("fp16" in file) == (kind == "variant") for file in files)
    if kind == "any pipeline":
        monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(tmp_path / "pipe")
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True)
    else:
        loaded = EDTPipeline.from_pretrained(tmp_path / "pipe", **variant)
    assert type(loaded) is EDTPipeline
    assert type(loaded.transformer) is edt.EDTTransformer2DModel
    assert loaded.id2label == pipe.id2label
    images = [
        each([3, 5], 2.0, num_inference_steps=3, generator=generator(), output_type="np").images
        for each in (pipe, quiet(loaded))
    ]
    assert np.array_equal(*images)


def test_what_a_folder_says_of_itself(tmp_path):
    """The installed classes load without running code of the folder; others are told where its code is."""
    pipe = grey_pipeline()
    pipe.save_config(tmp_path)
    assert (tmp_path / "transformer" / "edt_transformer.py").is_file()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "EDTPipeline"]
    assert index["transformer"] == ["edt_transformer", "EDTTransformer2DModel"]
    (tmp_path / "pipeline.py").write_text("raise RuntimeError('run')")
    (tmp_path / "transformer" / "edt_transformer.py").unlink()
    EDTPipeline.from_pretrained(tmp_path)


def test_a_configuration_goes_to_a_hub_with_its_code(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(
        "diffusers.configuration_utils.create_repo", lambda *_, **__: SimpleNamespace(repo_id="us")
    )
    monkeypatch.setattr(
        EDTPipeline, "_upload_folder", lambda _, folder, *__, **___: sent.extend(Path(folder).rglob("*.*"))
    )
    monkeypatch.setattr(EDTTransformer2DModel, "_upload_folder", EDTPipeline._upload_folder)
    pipe = grey_pipeline()
    for name, part in (("pipe", pipe), ("model", pipe.transformer)):
        part.save_config(str(tmp_path / name), push_to_hub=True)
    assert sorted(str(path.relative_to(tmp_path)) for path in sent) == [
        "model/config.json", "model/edt_transformer.py", "pipe/model_index.json", "pipe/pipeline.py",
        "pipe/transformer/edt_transformer.py",
    ]  # fmt: skip


def test_casting_the_whole_pipeline(vae):
    """The latents stay float32."""
    pipe = make_pipeline(vae).to(torch.bfloat16)
    try:
        latents = pipe([1], num_inference_steps=2, output_type="latent", generator=generator()).images
        images = pipe([1], num_inference_steps=2, output_type="pt", generator=generator()).images
    finally:
        vae.float()
    assert latents.dtype == torch.float32
    assert (images.dtype, images.isfinite().all()) == (torch.bfloat16, True)


def test_layerwise_casting():
    """Weights stored in 8 bits, cast for each layer's call."""
    pipe = grey_pipeline()
    options = {"num_inference_steps": 2, "output_type": "latent"}
    expected = pipe([1], generator=generator(), **options).images
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    drawn = pipe([1], generator=generator(), **options).images
    assert 0 < relative_error(drawn, expected) < 0.1


def test_progress_bar(capsys):
    pipe = grey_pipeline()
    pipe.set_progress_bar_config(desc="drawing")
    pipe([1], num_inference_steps=3, output_type="latent")
    assert "drawing: 100%" in capsys.readouterr().err


def test_overflow_is_named():
    """Of the network at a step, whose latents would become black pictures; none is returned, of no kind."""
    pipe, calls = grey_pipeline(), []
    network = pipe.transformer.forward

    def overflow(x, *args):
        calls.append(len(x))
        output = network(x, *args)
        output.sample[-1] = torch.inf if len(calls) == 3 else 0
        return output

    pipe.transformer.forward = overflow
    for kind in ("pil", "latent"):
        calls.clear()
        with pytest.raises(
            ValueError, match=r"latents are not finite from step 3 of 5 \(timestep 500\) on; .*float32"
        ):
            pipe([1, 2], num_inference_steps=5, output_type=kind)
    calls.clear()
    with pytest.raises(ValueError, match="latents are not finite from step 3 of 5"):
        edt.sample(pipe.transformer, torch.tensor([1, 2]), num_inference_steps=5, progress=False)


def test_no_black_pictures_are_written(tmp_path, capsys):
    model = load_preset("EDT-digits")
    torch.nn.init.constant_(model.final_layer.linear.bias, math.nan)
    model.save_pretrained(tmp_path / "model")
    command = ["sample", "--checkpoint", str(tmp_path / "model"), "--labels", "3", "--num-per-class", "2"]
    assert main([*command, "--steps", "2", "--device", "cpu", "--output", str(tmp_path / "drawn")]) == 2
    assert "latents are not finite from step 1 of 2 (timestep 999) on" in capsys.readouterr().err
    assert not list((tmp_path / "drawn").rglob("*.png"))


def test_pictures_that_overflow_in_the_vae_are_named(vae, monkeypatch):
    pipe = make_pipeline(vae)
    monkeypatch.setattr(
        vae, "decode", lambda z: type("Output", (), {"sample": torch.full((1, 3, 32, 32), torch.nan)})
    )
    with pytest.raises(ValueError, match="vae makes pictures that are not finite, in float32"):
        pipe([1], num_inference_steps=1)
    pipe([1], num_inference_steps=1, output_type="latent")


def test_a_scale_of_zero_is_unconditional():
    """On the guided channels, whatever the label is."""
    pipe = make_pipeline()
    options = {"num_inference_steps": 3, "output_type": "latent", "guidance_channels": 4}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    draws = [pipe([label], 0.0, generator=generator(), **options).images for label in (1, 2)]
    assert relative_error(*draws) <= 1e-4
    null = pipe.transformer.label_embedding.weight
    with torch.no_grad():
        null[1] = null[10]
    unguided = pipe([1], generator=generator(), **options).images
    assert relative_error(unguided, draws[0]) <= 1e-4


@pytest.mark.parametrize("scale", [math.nan, None, -1.0, "2", True])
def test_a_callback_that_sets_no_scale(scale):
    pipe = grey_pipeline()

    def change(pipe, i, timestep, tensors):
        pipe._guidance_scale = scale

    with pytest.raises((ValueError, TypeError), match="guidance_scale is "):
        pipe([1], 3.0, num_inference_steps=3, callback_on_step_end=change, output_type="latent")


def test_a_callback_ends_guidance_at_zero_or_begins_it():
    pipe = grey_pipeline()
    batches, network = [], pipe.transformer.forward
    pipe.transformer.forward = lambda x, *args: batches.append(len(x)) or network(x, *args)

    def change(pipe, i, timestep, tensors):
        pipe._guidance_scale = {0: 0.0, 1: 2}.get(i, 1.0)

    pipe([1], 1.0, num_inference_steps=4, callback_on_step_end=change, output_type="latent")
    assert batches == [1, 2, 2, 1]


def test_guidance_needs_a_trained_null_class():
    """By every way in, also where a callback or an interval begins it."""
    model = tiny_model(in_channels=1, out_channels=2, class_dropout_prob=0.0).eval()
    pipe = quiet(EDTPipeline(model, make_scheduler()))
    latents, labels = torch.zeros(1, 1, 16, 16), torch.tensor([1])

    def begin(pipe, i, timestep, tensors):
        pipe._guidance_scale = 2.0

    options = {"num_inference_steps": 3, "output_type": "latent"}
    ways = [
        lambda: pipe([1], 2.0, **options),
        lambda: pipe([1], 0.0, **options),
        lambda: pipe([1], 2.0, guidance_interval=(0.1, 0.2), **options),
        lambda: pipe([1], callback_on_step_end=begin, **options),
        lambda: edt.sample(model, labels, guidance_scale=2.0, progress=False),
        lambda: predict(model, latents, 5, labels, 2.0),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=r"guidance_scale is [02]\.0; this model's class_dropout_prob is 0"):
            way()
    assert pipe([1], 1.0, **options).images.shape == (1, 1, 16, 16)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ("latents", TypeError, "callback_on_step_end returned a str"),
        ({"latents": None}, ValueError, "returned latents that are a NoneType"),
        ({"latents": torch.zeros(1, 1, 8, 8)}, ValueError, r"latents that are torch.float32 \(1, 1, 8, 8\)"),
        ({"latents": torch.zeros(1, 1, 16, 16, dtype=torch.int64)}, ValueError, "latents that are torch.int64"),
        ({"latents": torch.full((1, 1, 16, 16), math.nan)}, ValueError, "not finite from step 1"),
    ],
)
def test_bad_latents_of_a_callback(returned, error, message):
    with pytest.raises(error, match=message):
        grey_pipeline()([1], num_inference_steps=2, callback_on_step_end=lambda *a: returned)


def test_latents_of_a_callback_stay_float32():
    images = grey_pipeline()(
        [1],
        num_inference_steps=2,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, timestep, tensors: {"latents": tensors["latents"].half()},
    ).images
    assert images.dtype == torch.float32


def test_numbers_and_names_that_are_numbers():
    """A string is a name, also of digits; an integer is the class's number."""
    pipe = grey_pipeline(id2label={0: "0", 1: "1", 2: "10", 3: "2"})
    options = {"num_inference_steps": 1, "output_type": "latent"}

    def drawn(label):
        return pipe(label, generator=generator(), **options).images

    assert torch.equal(drawn(["10"]), drawn([2]))
    assert not torch.equal(drawn(["2"]), drawn([2]))
    labels = ["10", 2, np.int64(2), torch.tensor(2)]
    assert all(
        torch.equal(drawn(label), drawn([2])) for label in (labels[0], *labels[1:3], np.array([2]), range(2, 3))
    )
    assert drawn(labels).shape[0] == 4
    with pytest.raises(
        ValueError, match=r"class_labels has '7'; .* names 0, 1, 10, 2, and for class number 7 give the integer"
    ):
        drawn("7")
    with pytest.raises(ValueError, match=r"has '10'; .* none: it has no id2label, and for class number 10 give"):
        grey_pipeline()("10", **options)
    named = grey_pipeline(id2label={0: "tench", 1: "goldfish", 2: "great white shark"})
    with pytest.raises(ValueError, match=r"class_labels has 'tensch'; this pipeline knows the names tench$"):
        named("tensch", **options)


def test_a_base_install_draws(tmp_path):
    """Without what the extras of the package bring; a folder loads with its own code too."""
    program = """
import sys
ABSENT = {"tyro", "accelerate", "matplotlib", "sklearn", "datasets", "pytorch_optimizer", "tensorboard", "scipy"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch, edt
from diffusers import DiffusionPipeline
for name in edt.__all__:
    getattr(edt, name)
edt.load_preset("EDT-digits")
edt.load_checkpoint(sys.argv[1] + "/transformer")
from edt.sampling.pipeline import load_pipeline
for pipe in (load_pipeline(sys.argv[1]), load_pipeline(sys.argv[2]), edt.EDTPipeline.from_pretrained(sys.argv[1]),
             DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)):
    pipe([1], num_inference_steps=1)
edt.sample(pipe.transformer, torch.tensor([1]), num_inference_steps=1, progress=False)
print("drawn")
"""
    grey_pipeline().save_pretrained(tmp_path / "pipe")
    run = tmp_path / "run"
    write_checkpoint(
        run / "checkpoints", 1, lambda folder: grey_pipeline().transformer.save_pretrained(folder / "ema"), 1
    )
    TrainConfig(data=tmp_path / "data").save(run / "config.yaml")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "pipe"), str(run)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert found.stdout.endswith("drawn\n"), found.stderr[-2000:]


@pytest.mark.parametrize(("missing", "error"), [("edt", ImportError), ("einops", ModuleNotFoundError)])
def test_a_folder_says_which_package_is_missing(tmp_path, monkeypatch, missing, error):
    """Only this one is called by its name in pip; another's absence is its own."""
    grey_pipeline().save_pretrained(tmp_path)

    def absent(name, *args, **kwargs):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    for file in ("pipeline.py", "transformer/edt_transformer.py"):
        code = compile((tmp_path / file).read_text(), file, "exec")
        with pytest.raises(error, match="edt-kernels" if missing == "edt" else "einops"):
            exec(code, {"__builtins__": {**vars(builtins), "__import__": absent}})


def test_lora_weights_go_to_the_transformer(monkeypatch):
    """What finds no weights there is an error; diffusers says so to a log only."""
    pipe, seen = grey_pipeline(), []

    def load(source, **options):
        seen.append((source, options))
        if options.get("prefix", "transformer") is None:
            pipe.transformer.peft_config = {"default": None}

    monkeypatch.setattr(pipe.transformer, "load_lora_adapter", load, raising=False)
    with pytest.raises(ValueError, match=r"source has no LoRA weights with the prefix 'transformer'.*prefix=None"):
        pipe.load_lora_weights("folder")
    pipe.load_lora_weights("folder", prefix=None)
    safe = {"use_safetensors": True}
    assert seen == [("folder", safe), ("folder", {**safe, "prefix": None})]


def foreign(scheduler=DDIMScheduler, **config):
    pipe = grey_pipeline()
    pipe.scheduler = scheduler(**config)
    return pipe


BAD = {
    "no labels": (grey_pipeline, {"class_labels": []}, ValueError, "class_labels is empty"),
    "truth for a label": (grey_pipeline, {"class_labels": [True]}, TypeError, "class_labels has True"),
    "number for a generator": (grey_pipeline, {"generator": 3}, TypeError, "generator is 3"),
    "word for the noise": (grey_pipeline, {"latents": "x"}, TypeError, "latents is a str"),
    "no label": (grey_pipeline, {"class_labels": None}, ValueError, "class_labels is None"),
    "null label": (grey_pipeline, {"class_labels": [10]}, ValueError, "class_labels has 10; they must be 0 to 9"),
    "float label": (grey_pipeline, {"class_labels": [1.5]}, TypeError, r"class_labels has 1\.5"),
    "float labels": (grey_pipeline, {"class_labels": torch.rand(2)}, TypeError, "class_labels is torch.float32"),
    "unknown name": (grey_pipeline, {"class_labels": "cat"}, ValueError, "'cat'.*it has no id2label"),
    "scale": (grey_pipeline, {"guidance_scale": math.nan}, ValueError, "guidance_scale is nan"),
    "word for a scale": (grey_pipeline, {"guidance_scale": "4"}, TypeError, "guidance_scale is '4'"),
    "channels": (grey_pipeline, {"guidance_channels": 3}, ValueError, "guidance_channels is 3; .* 1 to 1"),
    "steps": (grey_pipeline, {"num_inference_steps": 1001}, ValueError, "num_inference_steps is 1001"),
    "images": (grey_pipeline, {"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt is 0"),
    "truth for steps": (grey_pipeline, {"num_inference_steps": True}, ValueError, "num_inference_steps is True"),
    "parts of steps": (grey_pipeline, {"num_inference_steps": 2.5}, ValueError, "num_inference_steps is 2.5"),
    "nested labels": (grey_pipeline, {"class_labels": [[1, 2]]}, TypeError, r"class_labels has \[1, 2\]"),
    "a set of labels": (grey_pipeline, {"class_labels": {1}}, TypeError, r"class_labels has \{1\}"),
    "infinite label": (grey_pipeline, {"class_labels": [math.inf]}, TypeError, "class_labels has inf"),
    "huge label": (grey_pipeline, {"class_labels": [10**400]}, ValueError, "has an integer of 1329 bits"),
    "meta labels": (
        grey_pipeline,
        {"class_labels": torch.ones(1, dtype=torch.int64, device="meta")},
        ValueError,
        "class_labels is on meta",
    ),
    "huge scale": (grey_pipeline, {"guidance_scale": 10**400}, ValueError, "guidance_scale is an integer of"),
    "negative scale": (grey_pipeline, {"guidance_scale": -1.0}, ValueError, "guidance_scale is -1.0"),
    "truth for a scale": (grey_pipeline, {"guidance_scale": True}, TypeError, "guidance_scale is True"),
    "whole noise": (
        grey_pipeline,
        {"latents": torch.zeros(1, 1, 16, 16, dtype=torch.int64)},
        TypeError,
        "latents is torch.int64",
    ),
    "no noise": (
        grey_pipeline,
        {"latents": torch.full((1, 1, 16, 16), math.nan)},
        ValueError,
        "latents has values that are not finite",
    ),
    "callback that is none": (
        grey_pipeline,
        {"callback_on_step_end": 3},
        TypeError,
        "callback_on_step_end is a int",
    ),
    "tuple wanted": (grey_pipeline, {"return_dict": None}, TypeError, "return_dict is None"),
    "graph wanted": (grey_pipeline, {"cuda_graph": "yes"}, TypeError, "cuda_graph is 'yes'"),
    "open interval": (
        grey_pipeline,
        {"guidance_interval": (math.nan, 1)},
        ValueError,
        r"guidance_interval is \(nan, 1\)",
    ),
    "output": (grey_pipeline, {"output_type": "jpeg"}, ValueError, "output_type is 'jpeg'"),
    "interval": (grey_pipeline, {"guidance_interval": (3, 1)}, ValueError, r"guidance_interval is \(3, 1\)"),
    "generators": (grey_pipeline, {"generator": [generator()] * 2}, ValueError, "2 generators for 1 images"),
    "noise": (grey_pipeline, {"latents": torch.zeros(1, 4, 16, 16)}, ValueError, "latents has shape"),
    "callback": (
        grey_pipeline,
        {"callback_on_step_end_tensor_inputs": ["prompt"]},
        ValueError,
        r"has \['prompt'\]; it takes \['latents'\]",
    ),
    "latents without a VAE": (make_pipeline, {}, ValueError, "no vae for its latents of 4 channels"),
    "guided unconditional": (
        lambda: grey_pipeline(num_classes=0),
        {"class_labels": None, "guidance_scale": 2.0},
        ValueError,
        "guidance_scale is 2.0; an unconditional",
    ),
    "labelled unconditional": (lambda: grey_pipeline(num_classes=0), {}, ValueError, "class_labels was given"),
    "prediction": (lambda: foreign(prediction_type="v_prediction"), {}, ValueError, "'v_prediction'"),
    "timesteps": (lambda: foreign(num_train_timesteps=500), {}, ValueError, "num_train_timesteps 500"),
    "noise levels": (
        lambda: foreign(beta_schedule="scaled_linear"),
        {},
        ValueError,
        "DDIMScheduler with other noise",
    ),
    "flow": (
        lambda: foreign(FlowMatchEulerDiscreteScheduler),
        {},
        ValueError,
        "with other noise levels than EDT's",
    ),
    "variance": (lambda: foreign(DDPMScheduler, variance_type="learned"), {}, ValueError, "'learned_range'"),
    "no variance": (lambda: grey_pipeline(out_channels=1), {}, ValueError, "take 'fixed_small'"),
    "graph on a CPU": (grey_pipeline, {"cuda_graph": True}, ValueError, "model is on cpu; CUDA graphs need"),
    "training": (
        lambda: quiet(EDTPipeline(tiny_model().train(), make_scheduler())),
        {},
        ValueError,
        "transformer is in training mode",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name):
    make, arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()(**{"class_labels": [1], "num_inference_steps": 2, **arguments})


def test_bad_parts(vae):
    for names, error in (
        ({10: "ten"}, ValueError), ({0: 5}, ValueError), (["zero"], TypeError), ({1.5: "one"}, TypeError),
        ({1: "one", "1": "uno"}, ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match="id2label"):
            grey_pipeline(id2label=names)
    with pytest.raises(ValueError, match="latents of 4 channels; 1 are needed"):
        grey_pipeline(vae=vae)
    parts = {"transformer": tiny_model().eval(), "scheduler": make_scheduler()}
    for name, wrong in (("transformer", None), ("transformer", vae), ("scheduler", None), ("vae", "folder")):
        with pytest.raises(TypeError, match=f"{name} is a "):
            EDTPipeline(**{**parts, name: wrong})


@pytest.mark.slow  # trains the demo
def test_faster_sampling_draws_digits(tmp_path):
    """By the demo's model at 25 steps every scheduler's, and step caching loses nothing that the judge sees."""
    run_demo(DemoOptions(output=tmp_path / "demo", num_per_class=2, sampling_steps=2, device="cpu"))
    schedulers.main(["--checkpoint", str(tmp_path / "demo"), "--out", str(tmp_path / "schedulers.json")])
    rows = json.loads((tmp_path / "schedulers.json").read_text())["rows"]
    accuracies = {row["name"]: row["class_accuracy"] for row in rows if row["steps"] == 25}
    assert len(accuracies) == len(SCHEDULERS)
    assert min(accuracies.values()) >= 0.9
    step_cache.main(["--checkpoint", str(tmp_path / "demo"), "--out", str(tmp_path / "step_cache.json")])
    rows = json.loads((tmp_path / "step_cache.json").read_text())["schedules"]
    cached, full = rows["deep, uniform, n = 3"], rows["no cache"]
    assert cached["speedup"] >= 1.4
    assert cached["class_accuracy"] >= full["class_accuracy"] - 0.02


def test_benchmark_of_schedulers(tmp_path, capsys):
    load_preset("EDT-digits").save_pretrained(tmp_path / "model")
    arguments = ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "results" / "schedulers.json")]
    schedulers.main([*arguments, "--num-images", "20"])
    found = json.loads((tmp_path / "results" / "schedulers.json").read_text())
    assert [(row["scheduler"], row["steps"]) for row in found["rows"]] == [
        (scheduler.__name__, steps) for scheduler in SCHEDULERS for steps in schedulers.STEPS
    ]
    table = schedulers.format_table(found)
    assert table in capsys.readouterr().out
    assert len(table.splitlines()) == 2 + len(found["rows"]) + 2
    with pytest.raises(SystemExit):
        schedulers.main(["--checkpoint", str(tmp_path), "--num-images", "19"])


def test_offloading_hooks(vae):
    """The hooks of `enable_model_cpu_offload`, with the CPU for the accelerator: twice, as they are set anew."""
    options = {"num_inference_steps": 2, "output_type": "np"}
    expected = make_pipeline(vae)([1], generator=generator(), **options).images
    pipe = make_pipeline(vae)
    pipe.enable_model_cpu_offload(device="cpu")
    try:
        for _ in range(2):
            assert np.array_equal(pipe([1], generator=generator(), **options).images, expected)
    finally:
        pipe.remove_all_hooks()


@pytest.mark.gpu
def test_model_offload(vae):
    """The transformer on the GPU, then the VAE; the same pixels as with both there."""
    pipe = make_pipeline(vae).to("cuda")
    options = {"num_inference_steps": 3, "output_type": "np"}
    expected = pipe([1], generator=generator(), **options).images
    offloaded = make_pipeline(vae.cpu())
    offloaded.enable_model_cpu_offload()
    assert np.array_equal(offloaded([1], generator=generator(), **options).images, expected)
    assert {p.device.type for p in itertools.chain(vae.parameters(), offloaded.transformer.parameters())} == {
        "cpu"
    }


@pytest.mark.gpu
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_on_a_gpu(scheduler):
    pipe = make_pipeline().to("cuda")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    options = {"num_inference_steps": 4, "output_type": "latent"}
    drawn = pipe([1, 2], 2.0, generator=generator(), **options).images.cpu()
    pipe.to("cpu")
    assert relative_error(drawn, pipe([1, 2], 2.0, generator=generator(), **options).images) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("cached", [False, True])
def test_cuda_graphs(scheduler, cached):
    """With guidance in an interval, which takes two shapes; multistep schedulers keep what a step returned."""
    pipe = make_pipeline().to("cuda")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    if cached:
        pipe.transformer.enable_cache(StepCacheConfig(interval=3))
    options = {"num_inference_steps": 9, "guidance_interval": (0.3, 10.0), "output_type": "latent"}
    graphs = GraphedStep(pipe.transformer)
    draws = [
        pipe([1, 2], 2.0, generator=generator(), cuda_graph=graph, **options).images
        for graph in (False, True, graphs, graphs)
    ]
    assert all(torch.equal(drawn, draws[0]) for drawn in draws)
