import inspect

import pytest
import torch
from pytorch_optimizer import Adan
from torch.utils.flop_counter import FlopCounterMode

from edt import PRESETS, EDTTransformer2DModel
from edt.model.complexity import OPTIMIZER_BUFFERS, cost_table, estimate_memory, meta_model, step_multiply_adds
from edt.model.presets import DEFAULTS

SMALL = {
    "sample_size": (16, 24),
    "in_channels": 3,
    "out_channels": 6,
    "num_classes": 5,
    "hidden_sizes": (16, 24, 40, 24, 16),
    "num_attention_heads": (2, 3, 4, 2, 2),
    "depths": (1, 2, 1, 3, 2),
}


@pytest.mark.parametrize(
    ("preset", "parameters", "giga_multiply_adds"),
    [
        ("EDT-S/2", 38_329_146, 2.667),
        ("EDT-B/2", 152_262_100, 10.218),
        ("EDT-XL/2", 698_523_098, 53.440),
        ("EDT-XL/2-paper", 708_444_968, 51.834),
    ],
)
def test_published_figures(preset, parameters, giga_multiply_adds):
    parts = cost_table(meta_model(PRESETS[preset]))
    assert sum(part.parameters for part in parts) == parameters
    assert round(sum(part.multiply_adds for part in parts) / 1e9, 3) == giga_multiply_adds


@pytest.mark.parametrize("change", [{}, {"mlp_ratio": 2.0}, {"num_classes": 0}, {"patch_size": 1}])
def test_multiply_adds_equal_those_that_run(change):
    model = EDTTransformer2DModel(**{**SMALL, **change}).eval()
    labels = torch.tensor([1]) if model.config.num_classes else None
    with FlopCounterMode(display=False) as counter:  # with gradients: it does not know the CPU's fused attention
        model(torch.randn(1, 3, 16, 24), torch.tensor([7]), labels)
    parts = cost_table(model)
    assert counter.get_total_flops() == 2 * sum(part.multiply_adds for part in parts)
    assert sum(part.parameters for part in parts) == sum(p.numel() for p in model.parameters())


ODD = {"mlp_ratio": 2.3, "patch_size": 1, "sample_size": (4, 12), "task_routing": (0.8, 4.0)}


@pytest.mark.parametrize(
    "config", [*PRESETS.values(), SMALL, SMALL | ODD, {**SMALL, "num_classes": 0}], ids=[*PRESETS, "a", "b", "c"]
)
def test_formulas_count_the_parameters_of_the_layers(config):
    """Part by part; the costs of a configuration are those of its model."""
    model = meta_model(config)
    modules = {"patch embedding": model.patch_embedding, "timestep": model.timestep_embedding,
               "class table": model.label_embedding, "final layer": model.final_layer,
               **{f"{name} {i}": module for name, modules in (("stage", model.stages), ("merge", model.merges),
               ("split", model.splits)) for i, module in enumerate(modules)}}  # fmt: skip
    parts = cost_table(config)
    assert {part.name: part.parameters for part in parts} == {
        name: sum(p.numel() for p in module.parameters()) for name, module in modules.items() if module is not None
    }
    stages = {f"stage {i}": stage.blocks[0].attn.attention.grid for i, stage in enumerate(model.stages)}
    assert {part.name: part.grid for part in parts if part.blocks} == stages
    assert (parts, step_multiply_adds(config)) == (cost_table(model), step_multiply_adds(model))
    cast = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    copies = 2 * sum(p.numel() for module in cast for p in module.parameters())
    memory = estimate_memory(config, 1, precision="bfloat16")
    assert (memory.weights, memory.weight_copies) == (4 * sum(p.numel() for p in model.parameters()), copies)


def test_defaults_are_the_models():
    parameters = inspect.signature(EDTTransformer2DModel.__init__).parameters
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS


def test_arguments_are_the_models_to_check():
    with pytest.raises(ValueError, match="patch_size is 0; it must be at least 1"):
        estimate_memory({**SMALL, "patch_size": 0}, 1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'patches'"):
        cost_table({**SMALL, "patches": 2})


def test_memory_estimate():
    weights = 4 * sum(p.numel() for p in EDTTransformer2DModel(**SMALL).parameters())
    one, four = estimate_memory(SMALL, 1), estimate_memory(SMALL, 4)
    assert one.weights == one.gradients == one.ema == weights
    assert one.optimizer_state == OPTIMIZER_BUFFERS["adan"] * weights
    assert four.inference_activations == 4 * one.inference_activations
    assert four.training_activations == 4 * one.training_activations  # how many: test_activation_memory.py
    # Per block, the softmax that its backward needs: heads · N².
    matrices = sum(d * h * n**2 for d, h, n in zip(SMALL["depths"], (2, 3, 4, 2, 2), (96, 24, 6, 24, 96)))
    assert (one.attention_matrices, four.attention_matrices) == (4 * matrices, 16 * matrices)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_memory_in_16_bits(gradient_checkpointing):
    """How many activations: test_activation_memory.py."""
    full, half, two_pass = (
        estimate_memory(SMALL, 4, gradient_checkpointing=gradient_checkpointing, **options)
        for options in ({}, {"precision": "bfloat16"}, {"precision": "bfloat16", "two_pass": True})
    )
    assert (half.weights, half.gradients, half.ema) == (full.weights, full.gradients, full.ema)
    assert 0 < half.weight_copies < half.weights / 2
    assert half.inference_activations < full.inference_activations
    assert full.training_activations / 2 < half.training_activations < full.training_activations
    assert two_pass.training_activations == 2 * half.training_activations
    assert two_pass.inference == half.inference
    buffers = half.weights + half.weight_copies + half.gradients + half.optimizer_state + half.ema
    assert half.training == buffers + half.training_activations


def test_optimizer_state_is_what_adan_keeps():
    weight = torch.nn.Parameter(torch.zeros(7))
    weight.grad = torch.ones(7)
    optimizer = Adan([weight])
    optimizer.step()
    assert sum(buffer.numel() for buffer in optimizer.state[weight].values()) == OPTIMIZER_BUFFERS["adan"] * 7


def test_batch_size_is_checked():
    with pytest.raises(TypeError, match="batch_size is 'two'; it must be an integer"):
        estimate_memory(PRESETS["EDT-S/2"], "two")
    with pytest.raises(ValueError, match="batch_size is 0"):
        estimate_memory(SMALL, 0)


def test_precision_is_checked():
    with pytest.raises(ValueError, match="precision is 'float16'; it must be one of 'float32', 'bfloat16'"):
        estimate_memory(SMALL, 1, precision="float16")


def test_optimizers_keep_what_they_keep():
    adan, adamw = (estimate_memory(PRESETS["EDT-S/2"], 1, optimizer=name) for name in ("adan", "adamw"))
    assert (adan.optimizer_state, adamw.optimizer_state) == (4 * adan.weights, 2 * adan.weights)
    with pytest.raises(ValueError, match="optimizer is 'lion'; it must be one of 'adan', 'adamw'"):
        estimate_memory(PRESETS["EDT-S/2"], 1, optimizer="lion")
