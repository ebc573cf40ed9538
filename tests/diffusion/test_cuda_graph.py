"""Denoising steps as CUDA graphs, against plain calls; on a CPU with a stand-in that runs recorded ops again."""

import contextlib
import math

import pytest
import torch
from released import small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import edt
from edt import GraphedStep, StepCacheConfig
from edt.diffusion.process import predict

CACHES = [None, StepCacheConfig(3), StepCacheConfig(3, reuse="encoder")]


# Batch size and guidance scale of the steps: guidance from step 4 to 8, then another batch.
STEPS = [(2, 1.0)] * 4 + [(2, 3.0)] * 5 + [(3, 1.0)] * 2


def outputs_of(step, device: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for number, (batch_size, scale) in enumerate(STEPS):
        latents = torch.randn(batch_size, 4, 8, 8, generator=generator).to(device, dtype)
        labels = torch.randint(10, (batch_size,), generator=generator).to(device)
        timestep = torch.tensor(950 - 80 * number)  # on the host, as a scheduler's
        outputs.append(step(latents, timestep.to(device) if number % 2 else timestep, labels, scale).clone())
    return outputs


def equal_eager(model, graphed, config, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Twice, so that the second time nothing is captured."""
    if config is not None:
        model.enable_cache(config)
    with torch.no_grad():
        expected = outputs_of(lambda *args: predict(model, *args), device, dtype)
    for _ in range(2):
        model.reset_cache()
        actual = outputs_of(graphed, device, dtype)
        assert [torch.equal(a, e) for a, e in zip(actual, expected, strict=True)] == [True] * len(STEPS)


class RecordedGraph:
    """Runs the ops of a capture again, on the tensors that they read and wrote then."""

    def __init__(self):
        self.calls = []

    def replay(self) -> None:
        for function, args, kwargs, outputs in self.calls:
            results = function(*args, **kwargs)
            for output, result in zip(tree_leaves(outputs), tree_leaves(results), strict=True):
                if isinstance(output, torch.Tensor) and output.data_ptr() != result.data_ptr():
                    output.copy_(result)


class Recording(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is read on the host"
        outputs = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, outputs))
        return outputs


@pytest.fixture
def stand_in(monkeypatch):
    """Returns a GraphedStep of a model on the CPU."""

    class Stream:
        def wait_stream(self, other):
            pass

    for name, value in {
        "CUDAGraph": RecordedGraph,
        "graph": Recording,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # Of labels and timesteps on a CPU the model reads the values, to check them.
    monkeypatch.setattr("edt.model.checks.has_readable_values", lambda tensor: False)

    def build(model):
        graphed = object.__new__(GraphedStep)  # past the check for a GPU
        graphed.model, graphed._captured = model, {}
        return graphed

    return build


@pytest.mark.parametrize("config", CACHES)
def test_replayed_ops_are_the_steps_bit_for_bit(config, stand_in):
    model = small_model()
    graphed = stand_in(model)
    equal_eager(model, graphed, config, "cpu")
    assert len(graphed._captured) == 3
    assert model.is_cache_enabled == (config is not None)


def test_the_stand_in_shows_a_value_that_is_baked_in(stand_in):
    """As a check of the check."""
    graph, x, scale = RecordedGraph(), torch.ones(2), 2.0
    with Recording(graph):
        y = x * scale
    x.fill_(3)
    graph.replay()
    assert y.tolist() == [6, 6]
    with pytest.raises(AssertionError, match="read on the host"), Recording(graph):
        y.sum().item()


def test_caches_may_change_between_calls(stand_in):
    model = small_model()
    graphed = stand_in(model)
    for config in (None, StepCacheConfig(2), StepCacheConfig(4), StepCacheConfig(2, reuse="encoder"), None):
        equal_eager(model, graphed, config, "cpu")
        model.disable_cache()
    assert len(graphed._captured) == 3 * 3  # uncached, deep and encoder


def test_plain_calls_between_are_counted(stand_in):
    model = small_model()
    graphed = stand_in(model)
    model.enable_cache(StepCacheConfig(4))
    latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        full = [predict(model, latents, 500 - step, labels) for step in range(8)][::4]
        model.reset_cache()
        assert torch.equal(graphed(latents, 500, labels), full[0])  # step 0
        predict(model, latents, 499, labels)  # step 1, full as the features are not its own
        reused = predict(model, latents, 498, labels)
        assert torch.equal(graphed(latents, 500, labels), full[0])  # step 3, full again
        assert torch.equal(graphed(latents, 496, labels), full[1])  # step 4 by the schedule
        assert not torch.equal(graphed(latents, 500, labels), full[0])
    assert not torch.equal(reused, full[0])


def test_passes_that_are_cached_apart_go_on_after_a_capture(stand_in):
    model = small_model()
    graphed = stand_in(model)
    model.enable_cache(StepCacheConfig(2))
    latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    for step in range(2):
        for name in ("cond", "uncond"):
            with model.cache_context(name):
                graphed(latents, 500 - step, labels)
    assert [cache.step for cache in model._context_caches.values()] == [2, 2]


def test_a_failed_capture_leaves_the_models_cache(stand_in):
    model = small_model()
    graphed = stand_in(model)
    config = StepCacheConfig(2)
    model.enable_cache(config)
    with pytest.raises(ValueError, match="hidden_states has shape"):
        graphed(torch.zeros(2, 4, 9, 9), 500, torch.tensor([1, 2]))
    assert model._step_cache.config is config
    assert not graphed._captured


def test_errors(stand_in):
    model = small_model()
    with pytest.raises(ValueError, match="model is on cpu; CUDA graphs need it on a GPU"):
        GraphedStep(model)
    with pytest.raises(ValueError, match="model is on cpu"):
        edt.sample(model, torch.tensor([1]), num_inference_steps=2, progress=False, cuda_graph=True)
    with pytest.raises(TypeError, match="model is a Linear; it must be an EDTTransformer2DModel"):
        GraphedStep(torch.nn.Linear(2, 2))
    graphed, latents, labels = stand_in(model), torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"timestep has shape \(2,\); a graph takes one for all samples"):
        graphed(latents, torch.tensor([1, 2]), labels)
    for wrong, error, message in (
        ({"guidance_scale": math.nan}, ValueError, "guidance_scale is nan"),
        ({"guidance_channels": 5}, ValueError, "guidance_channels is 5"),
        ({"latents": None}, TypeError, "latents is a NoneType"),
        ({"timestep": "1"}, TypeError, "timestep is a str"),
        ({"class_labels": [1, 2]}, TypeError, "class_labels is a list"),
    ):
        with pytest.raises(error, match=message):
            graphed(**{"latents": latents, "timestep": 1, "class_labels": labels, **wrong})
    untrained = stand_in(small_model(class_dropout_prob=0.0))
    with pytest.raises(ValueError, match="class_dropout_prob is 0"):
        untrained(latents, 1, labels, 2.0)
    assert not graphed._captured
    model.train()
    with pytest.raises(ValueError, match=r"model is in training mode; call model\.eval\(\) first"):
        graphed(latents, 1, labels)


def test_sampling_again_and_again_captures_once(stand_in):
    model, labels = small_model(), torch.tensor([1, 2])
    graphed = stand_in(model)

    def draw(cuda_graph):
        generator = torch.Generator().manual_seed(0)
        return edt.sample(
            model, labels, num_inference_steps=3, generator=generator, progress=False, cuda_graph=cuda_graph
        )

    expected = draw(False)
    for _ in range(2):
        assert torch.equal(draw(graphed), expected)
    assert len(graphed._captured) == 1
    with pytest.raises(ValueError, match="cuda_graph is a GraphedStep of another model"):
        edt.sample(small_model(), labels, progress=False, cuda_graph=graphed)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_replays_are_the_steps_bit_for_bit(config, dtype):
    model = small_model().to("cuda", dtype)
    equal_eager(model, GraphedStep(model), config, "cuda", dtype)


@pytest.mark.gpu
def test_gpu_replays_under_autocast_outlive_it():
    model = small_model().to("cuda")
    graphed = GraphedStep(model)
    for _ in range(2):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            equal_eager(model, graphed, StepCacheConfig(2), "cuda")
        model.disable_cache()
        torch.cuda.empty_cache()
        torch.full((2**24,), float("nan"), device="cuda")  # over what was freed


@pytest.mark.gpu
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("config", CACHES)
def test_gpu_sampling_with_graphs_is_sampling(config, guidance_scale):
    model = small_model().to("cuda")
    if config is not None:
        model.enable_cache(config)
    labels, options = torch.arange(4), {"num_inference_steps": 10, "guidance_scale": guidance_scale}
    expected, actual = (
        edt.sample(
            model, labels, generator=torch.Generator().manual_seed(0), progress=False, cuda_graph=graph, **options
        )
        for graph in (False, True)
    )
    assert torch.equal(actual, expected)


@pytest.mark.gpu
def test_gpu_replays_of_a_compiled_model():
    model = small_model().to("cuda")
    model.compile()
    equal_eager(model, GraphedStep(model), StepCacheConfig(3), "cuda")
