"""Step caching: which steps are full, what the others compute, what is kept and for how long, what it saves."""

import json
import weakref

import numpy as np
import pytest
import torch
from released import relative_error, small_model
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import edt
import edt_kernels
from benchmarks import report, step_cache
from edt import StepCacheConfig
from edt.model.complexity import cost_table, meta_model, sampling_multiply_adds, step_multiply_adds
from edt.model.presets import PRESETS
from edt.model.task_routing import routing_mask

ROUTING = (0.8, 4.0)
LABELS = torch.tensor([1, 4, 10])


def step_inputs(step: int, batch_size: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps and labels of a denoising step: other latents for each."""
    latents = torch.randn(batch_size, 4, 8, 8, generator=torch.Generator().manual_seed(step))
    return latents, torch.full((batch_size,), 900 - 50 * step), LABELS[:batch_size]


@torch.no_grad()
def run_steps(model, count: int) -> list[torch.Tensor]:
    return [model(*step_inputs(step)).sample for step in range(count)]


def note_stages(model) -> list[str]:
    """A list that grows by the stages that each call computes, such as "01234" or "4"."""
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(""))
    for number, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, number=number: calls.append(calls.pop() + str(number)))
    return calls


def draw(model, config=None, **options) -> torch.Tensor:
    if config is not None:
        model.enable_cache(config)
    options = {"num_inference_steps": 12, "progress": False, **options}
    try:
        return edt.sample(model, torch.arange(4), generator=torch.Generator().manual_seed(0), **options)
    finally:
        model.disable_cache()


# Schedules


def full_steps(config: StepCacheConfig, num_steps: int) -> list[int]:
    return [step for step in range(num_steps) if config.is_full(step)]


def test_uniform_and_explicit_schedules():
    assert full_steps(StepCacheConfig(interval=3), 8) == [0, 3, 6]
    assert full_steps(StepCacheConfig(interval=1), 3) == [0, 1, 2]
    assert full_steps(StepCacheConfig(full_steps=(0, 1, 5)), 8) == [0, 1, 5]


def test_the_published_non_uniform_schedules():
    """What the authors' function gives around 15 of 50 steps, and, from the start, its closed form."""
    config = StepCacheConfig.non_uniform(50, 5)
    assert config == StepCacheConfig(full_steps=(0, 5, 10, 14, 18, 22, 27, 32, 38, 44), num_steps=50)
    assert StepCacheConfig.non_uniform(50, 10, center=15).full_steps == (0, 10, 18, 27, 38)
    from_start = tuple(int((i / 25) ** 1.2 * 250) for i in range(25))
    assert StepCacheConfig.non_uniform(250, 10, center=0).full_steps == from_start


@pytest.mark.parametrize("num_steps", [20, 50, 100, 250, 1000])
@pytest.mark.parametrize("interval", [2, 3, 5, 7])
def test_non_uniform_schedules_have_as_many_full_steps_as_uniform_ones(num_steps, interval):
    config = StepCacheConfig.non_uniform(num_steps, interval, reuse="encoder")
    assert config.reuse == "encoder"
    assert len(config.full_steps) == len(full_steps(StepCacheConfig(interval), num_steps))


def test_non_uniform_schedules_are_densest_around_the_centre():
    for center in (50, 100, 200):
        gaps = np.diff(StepCacheConfig.non_uniform(250, 5, center=center).full_steps)
        middle = round(len(gaps) * center / 250)
        assert gaps[middle - 2 : middle + 2].mean() < min(gaps[:4].mean(), gaps[-4:].mean())


def test_the_published_encoder_schedule():
    """250 steps of DiT."""
    config = StepCacheConfig.faster_diffusion(250)
    assert config.reuse == "encoder"
    reused = set(range(250)) - set(config.full_steps)
    assert reused == {i for i in range(1, 230) if str(i)[-1] in "012345"}
    assert max(set(range(50)) - set(StepCacheConfig.faster_diffusion(50).full_steps)) == 45
    assert StepCacheConfig.faster_diffusion(1).full_steps == (0,)


BAD_CONFIGS = [
    (lambda: StepCacheConfig(), ValueError, "interval is None and full_steps is None; give one"),
    (lambda: StepCacheConfig(2, (0,)), ValueError, r"interval is 2 and full_steps is \(0,\); give one"),
    (lambda: StepCacheConfig(0), ValueError, "interval is 0; it must be 1 to"),
    (lambda: StepCacheConfig(2.0), TypeError, r"interval is 2\.0; it must be an integer"),
    (lambda: StepCacheConfig(True), TypeError, "interval is True"),
    (lambda: StepCacheConfig(2, reuse="skip"), ValueError, "reuse is 'skip'; it must be one of 'deep', 'encoder'"),
    (lambda: StepCacheConfig(2, num_steps=0), ValueError, "num_steps is 0"),
    (lambda: StepCacheConfig(full_steps=[0, 2]), TypeError, r"full_steps is \[0, 2\]; it must be a tuple"),
    (lambda: StepCacheConfig(full_steps=(0, 2.5)), TypeError, "full_steps is"),
    (lambda: StepCacheConfig(full_steps=()), ValueError, r"full_steps is \(\); it must begin with 0"),
    (lambda: StepCacheConfig(full_steps=(1, 2)), ValueError, "it must begin with 0 and increase"),
    (lambda: StepCacheConfig(full_steps=(0, 4, 4)), ValueError, "it must begin with 0 and increase"),
    (lambda: StepCacheConfig(full_steps=(0, 10**5000)), ValueError, "begin with 0 and increase, to below 10000"),
    (lambda: StepCacheConfig(full_steps=(0, 9), num_steps=9), ValueError, "full_steps has 9; of 9 num_steps"),
    (lambda: StepCacheConfig.non_uniform(0, 3), ValueError, "num_steps is 0"),
    (lambda: StepCacheConfig.non_uniform(50, 0), ValueError, "interval is 0"),
    (lambda: StepCacheConfig.non_uniform(50, 3, center=50), ValueError, "center is 50; it must be a step, 0"),
    (lambda: StepCacheConfig.non_uniform(50, 2, center=25), ValueError, "there are no 25 different steps of 50"),
    (lambda: StepCacheConfig.faster_diffusion(2.5), TypeError, r"num_steps is 2\.5"),
    (lambda: StepCacheConfig.faster_diffusion(10**400), ValueError, "num_steps is an integer of 1329 bits"),
    (lambda: StepCacheConfig.non_uniform(10**9, 2), ValueError, "num_steps is 1000000000; it must be 1 to 10000"),
    (lambda: StepCacheConfig(2, reuse=["deep"]), ValueError, r"reuse is \['deep'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "error", "message"), BAD_CONFIGS)
def test_bad_configurations(build, error, message):
    with pytest.raises(error, match=message):
        build()


# Steps


@pytest.mark.parametrize("reuse", ["deep", "encoder"])
def test_full_steps_alone_are_no_caching_bit_for_bit(reuse):
    model = small_model()
    expected = run_steps(model, 3)
    model.enable_cache(StepCacheConfig(interval=1, reuse=reuse))
    assert all(torch.equal(a, e) for a, e in zip(run_steps(model, 3), expected, strict=True))


def composed_step(model, reuse: str, before: tuple, now: tuple) -> torch.Tensor:
    """The step `now` that reuses features of the step `before`, written with the model's layers."""

    def conditioning(timestep, labels):
        return F.silu(model.timestep_embedding(timestep) + model.label_embedding(labels))

    def run_stage(i, x, timestep, cond):
        if model.config.task_routing is None:
            return model.stages[i](x, cond)
        return model.stages[i](x, cond, routing=routing_mask(timestep, x.shape[-1], *ROUTING))

    def join(i, up, skip, cond):
        split = model.splits[i]
        shift, scale = split.modulation(cond).unbind(1)
        joined = edt_kernels.token_split_concat_adaln(up, skip, shift, scale, grid=split.grid)
        return split.fuse(joined) + split.position.table

    latents, timestep, labels = before
    cond = conditioning(timestep, labels)
    tokens = model.patch_embedding(latents) + model.position.table
    skip = model.merges[0](run_stage(0, tokens, timestep, cond), cond)
    middle = run_stage(2, model.merges[1](run_stage(1, skip, timestep, cond), cond), timestep, cond)
    if reuse == "encoder":
        latents, timestep, labels = now
        cond = conditioning(timestep, labels)
    x = run_stage(3, join(0, model.splits[0].expand(middle), skip, cond), timestep, cond)
    up = model.splits[1].expand(x)
    latents, timestep, labels = now
    cond = conditioning(timestep, labels)
    tokens = model.patch_embedding(latents) + model.position.table
    return model.final_layer(run_stage(4, join(1, up, tokens, cond), timestep, cond), cond)


@pytest.mark.parametrize("reuse", ["deep", "encoder"])
@pytest.mark.parametrize("task_routing", [None, ROUTING])
@torch.no_grad()
def test_a_step_that_reuses_features_is_the_composition_of_the_layers(reuse, task_routing):
    model = small_model(task_routing=task_routing)
    model.enable_cache(StepCacheConfig(interval=3, reuse=reuse))
    outputs = run_steps(model, 6)
    for step in (1, 2, 4, 5):
        expected = composed_step(model, reuse, step_inputs(3 * (step // 3)), step_inputs(step))
        assert torch.equal(outputs[step], expected)
        model.disable_cache()
        assert relative_error(outputs[step], model(*step_inputs(step)).sample) > 1e-3
        model.enable_cache(StepCacheConfig(interval=3, reuse=reuse))


@pytest.mark.parametrize(("reuse", "stages"), [("deep", "4"), ("encoder", "34")])
def test_stages_that_are_computed(reuse, stages):
    model = small_model()
    calls = note_stages(model)
    model.enable_cache(StepCacheConfig(full_steps=(0, 1, 4), reuse=reuse))
    run_steps(model, 6)
    assert calls == ["01234", "01234", stages, stages, "01234", stages]


@torch.no_grad()
def test_another_batch_size_is_computed_in_full_and_the_schedule_goes_on():
    model = small_model()
    calls = note_stages(model)
    model.enable_cache(StepCacheConfig(interval=4))
    for step, batch_size in enumerate((3, 3, 2, 2, 2, 2, 3)):
        output = model(*step_inputs(step, batch_size)).sample
        assert output.shape == (batch_size, 8, 8, 8)
    assert calls == ["01234", "4", "01234", "4", "01234", "4", "01234"]


@torch.no_grad()
def test_another_dtype_is_computed_in_full():
    model = small_model()
    calls = note_stages(model)
    model.enable_cache(StepCacheConfig(interval=4))
    model(*step_inputs(0))
    latents, timestep, labels = step_inputs(1)
    model.double()
    assert model(latents.double(), timestep, labels).sample.dtype == torch.float64
    assert calls == ["01234", "01234"]


def test_reset_begins_a_new_sampling():
    model = small_model()
    model.enable_cache(StepCacheConfig(interval=3))
    first = run_steps(model, 5)
    model.reset_cache()
    assert all(torch.equal(a, b) for a, b in zip(run_steps(model, 5), first, strict=True))
    continued = run_steps(model, 2)  # without a reset: step 5 reuses, step 6 is full
    assert not torch.equal(continued[0], first[0])
    small_model().reset_cache()  # nothing to reset


def test_a_step_too_many():
    model = small_model()
    model.enable_cache(StepCacheConfig(full_steps=(0, 2), num_steps=4))
    run_steps(model, 4)
    with pytest.raises(ValueError, match=r"for 4 steps and this is one more; .* reset_cache\(\)"):
        run_steps(model, 1)
    model.reset_cache()
    run_steps(model, 4)


# Enabling


def test_enabled_once_with_a_configuration():
    model = small_model()
    assert not model.is_cache_enabled
    with pytest.raises(TypeError, match=r"config is a int; it must be an edt\.StepCacheConfig"):
        model.enable_cache(3)
    model.enable_cache(StepCacheConfig(3))
    assert model.is_cache_enabled
    with pytest.raises(ValueError, match=r"a cache is enabled, .*interval=3.*; call disable_cache\(\) first"):
        model.enable_cache(StepCacheConfig(2))
    model.disable_cache()
    model.disable_cache()
    assert not model.is_cache_enabled
    model.enable_cache(StepCacheConfig(2))


@pytest.mark.parametrize("name", ["training mode", "gradients enabled", "keep_masks", "return_hidden"])
def test_only_sampling_is_cached(name):
    model = small_model().train(name == "training mode")
    masks = model.draw_keep_masks(3, torch.Generator().manual_seed(0))
    options = {"keep_masks": {"keep_masks": masks}, "return_hidden": {"return_hidden": True}}.get(name, {})
    model.enable_cache(StepCacheConfig(3))
    with torch.set_grad_enabled(name == "gradients enabled"):
        with pytest.raises(ValueError, match=f"a step cache is enabled, and the model is called with {name}"):
            model(*step_inputs(0), **options)
        model.disable_cache()
        model(*step_inputs(0), **options)


@pytest.mark.parametrize("reuse", ["deep", "encoder"])
def test_features_are_let_go(reuse):
    model = small_model()
    kept = []
    outputs = (model.splits[1].expand,) if reuse == "deep" else (model.merges[0], model.stages[2])
    for module in outputs:
        module.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))

    def alive() -> int:
        return sum(reference() is not None for reference in kept)

    config = StepCacheConfig(2, reuse=reuse)
    run_steps(model, 1)
    assert alive() == 0
    model.enable_cache(config)
    run_steps(model, 4)
    assert alive() == len(outputs)  # of the last full step alone
    model.reset_cache()
    assert alive() == 0
    run_steps(model, 1)
    model._reset_stateful_cache()  # as DiffusionPipeline.maybe_free_model_hooks calls it
    assert alive() == 0
    run_steps(model, 1)
    model.disable_cache()
    assert alive() == 0
    draw(model, config)
    assert alive() == 0


def test_no_features_of_the_last_full_step_are_held_through_the_next():
    model = small_model()
    kept = []
    model.splits[1].expand.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    model.enable_cache(StepCacheConfig(2))
    run_steps(model, 2)
    alive = []
    model.stages[0].register_forward_hook(lambda *_: alive.append(kept[0]() is not None))
    run_steps(model, 1)
    assert alive == [False]


def test_checkpoints_know_nothing_of_it(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "before")
    names = set(model.state_dict())
    model.enable_cache(StepCacheConfig(3))
    run_steps(model, 2)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / path.name).read_bytes() == path.read_bytes()
    loaded = edt.load_checkpoint(tmp_path / "after")
    assert not loaded.is_cache_enabled


@pytest.mark.parametrize("reuse", ["deep", "encoder"])
def test_compiled_once_for_full_steps_and_once_for_the_others(reuse):
    model = small_model(depths=(1,) * 5, amm_blocks=())
    model.enable_cache(StepCacheConfig(3, reuse=reuse))
    expected = run_steps(model, 8)
    model.reset_cache()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager")
    run_steps(compiled, 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    model.reset_cache()
    with torch.compiler.set_stance("fail_on_recompile"):
        actual = run_steps(compiled, 8)
    assert max(map(relative_error, actual, expected)) <= 1e-5


# Sampling


@pytest.mark.parametrize("reuse", ["deep", "encoder"])
def test_cached_sampling_is_close_to_full_sampling(reuse):
    model = small_model()
    full = draw(model)
    errors = [
        ((draw(model, StepCacheConfig(n, reuse=reuse)) - full).norm() / full.norm()).item() for n in (1, 2, 4)
    ]
    assert errors[0] == 0
    assert 1e-3 < errors[1] < errors[2] < 0.2, errors


def test_sampling_begins_anew_with_guidance_and_without():
    model = small_model()
    calls = note_stages(model)
    model.enable_cache(StepCacheConfig(interval=5))
    options = {"num_inference_steps": 7, "progress": False}
    samples = [
        edt.sample(
            model, torch.arange(4), guidance_scale=scale, generator=torch.Generator().manual_seed(0), **options
        )
        for scale in (1.0, 3.0, 1.0)
    ]
    assert calls == ["01234", "4", "4", "4", "4", "01234", "4"] * 3
    assert torch.equal(samples[0], samples[2])
    assert not torch.equal(samples[0], samples[1])


@pytest.mark.interpreter
@torch.no_grad()
def test_interpreted_kernels_reuse_features(monkeypatch):
    model = small_model()
    model.enable_cache(StepCacheConfig(interval=2))
    outputs = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("EDT_KERNELS_BACKEND", backend)
        model.reset_cache()
        outputs.append(run_steps(model, 2)[1])
    assert relative_error(*outputs) <= 1e-5


# Costs


@pytest.mark.parametrize("reuse", ["deep", "encoder"])
@pytest.mark.parametrize("change", [{}, {"mlp_ratio": 2.0, "num_classes": 0}])
@torch.no_grad()
def test_multiply_adds_are_those_that_run(reuse, change):
    model = small_model(**change)
    labels = torch.tensor([1]) if model.config.num_classes else None
    costs = step_multiply_adds(model)
    model.enable_cache(StepCacheConfig(2, reuse=reuse))
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused attention
        for kind in ("full", reuse):
            with FlopCounterMode(display=False) as counter:
                model(torch.randn(1, 4, 8, 8), torch.tensor([7]), labels)
            assert counter.get_total_flops() == 2 * costs[kind], kind
    assert costs["full"] == sum(part.multiply_adds for part in cost_table(model))


@pytest.mark.parametrize(
    ("preset", "deep", "encoder", "at_3", "at_5"),
    [
        ("EDT-S/2", 0.403, 0.584, 1.66, 1.91),
        ("EDT-B/2", 0.396, 0.583, 1.67, 1.93),
        ("EDT-XL/2", 0.378, 0.549, 1.71, 1.99),
    ],
)
def test_what_caching_saves(preset, deep, encoder, at_3, at_5):
    model = meta_model(PRESETS[preset])
    costs = step_multiply_adds(model)
    assert costs["deep"] / costs["full"] == pytest.approx(deep, abs=5e-4)
    assert costs["encoder"] / costs["full"] == pytest.approx(encoder, abs=5e-4)
    for interval, factor in ((1, 1), (3, at_3), (5, at_5)):
        cached = sampling_multiply_adds(model, 15 * interval, StepCacheConfig(interval))
        assert sampling_multiply_adds(model, 15 * interval) / cached == pytest.approx(factor, abs=5e-3)
    config = StepCacheConfig(full_steps=(0, 1, 4), reuse="encoder")
    assert sampling_multiply_adds(model, 6, config) == 3 * costs["full"] + 3 * costs["encoder"]


# The benchmark


def test_benchmark_of_few_images(tmp_path, capsys):
    torch.manual_seed(0)
    edt.load_preset("EDT-digits").save_pretrained(tmp_path / "model")
    file = tmp_path / "results" / "step_cache.json"
    arguments = ["--num-images", "20", "--batch-size", "20", "--num-steps", "6", "--out", str(file)]
    step_cache.main(["--checkpoint", str(tmp_path / "model"), *arguments])
    found = json.loads(file.read_text())
    rows = found["schedules"]
    assert list(rows) == list(step_cache.schedules(6))
    assert [rows[f"deep, uniform, n = {n}"]["full_steps"] for n in (1, 2, 3, 5)] == [6, 3, 2, 2]
    assert rows["deep, uniform, n = 1"]["class_accuracy"] == rows["no cache"]["class_accuracy"]
    assert all(row["speedup"] > 0 and row["images"] == 20 for row in rows.values())
    assert rows["deep, uniform, n = 3"]["fewer_multiply_adds"] == pytest.approx(6 / (2 + 4 * 0.4181), rel=1e-3)
    table = step_cache.format_table(found)
    assert table in capsys.readouterr().out
    assert "| deep, uniform, n = 3 | 2 | 1.63× | " in table
    with pytest.raises(SystemExit):
        step_cache.main(["--checkpoint", str(tmp_path), "--num-images", "19"])


def test_readme_has_the_committed_table_alone(tmp_path):
    folder = tmp_path / "cpu"
    folder.mkdir()
    path = folder / "step_cache.json"
    committed = report.RESULTS / step_cache.FILE
    path.write_text(committed.read_text())
    assert (
        report._measured("step_cache", tmp_path, set())
        == "Not yet measured with `python -m benchmarks step_cache`."
    )
    assert report._measured("step_cache", tmp_path, {path.resolve()}) == step_cache.format_table(
        json.loads(path.read_text())
    )
