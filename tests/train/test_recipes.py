"""Recipes of `edt train`: as published, and the same on one GPU."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from edt.model.complexity import estimate_memory
from edt.model.presets import PRESETS
from edt.train.config import RECIPES, parse, recipe

GIB = 2**30
BUDGETS = {"24GB": 19.5, "80GB": 72}
# What may differ from the published recipe: it changes the memory, not the gradient.
MEMORY_FIELDS = {"gradient_accumulation_steps", "gradient_checkpointing"}
SIZED = [name for name in RECIPES if name.rpartition("-")[2] in BUDGETS]


def estimated_gib(config) -> float:
    estimate = estimate_memory(
        PRESETS[config.model],
        config.batch_size // config.gradient_accumulation_steps,
        precision="bfloat16",  # what auto is on a GPU
        two_pass=config.masking,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    return estimate.training / GIB


def test_recipes_of_one_gpu():
    assert SIZED == ["EDT-S/2-24GB", "EDT-B/2-24GB", "EDT-XL/2-80GB"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses(name):
    config = parse(["--recipe", name, "--data", "latents", "--output", "nowhere"])
    config.check()
    assert replace(config, recipe=None) == recipe(name, data=Path("latents"), output=Path("nowhere"))
    assert config.batch_size % config.gradient_accumulation_steps == 0


@pytest.mark.parametrize("name", SIZED)
def test_a_recipe_of_one_gpu_is_the_published_one_but_for_memory(name):
    published, _, size = name.rpartition("-")
    ours, theirs = (asdict(recipe(each, data=Path())) for each in (name, published))
    assert {field for field in ours if ours[field] != theirs[field]} <= MEMORY_FIELDS
    config = recipe(name, data=Path())
    assert (config.batch_size, config.precision, config.optimizer) == (256, "auto", "adan")
    assert estimated_gib(config) <= BUDGETS[size]
    if config.gradient_accumulation_steps > 1:  # in no more parts than it takes
        fewer = config.gradient_accumulation_steps // 2
        assert estimated_gib(recipe(name, data=Path(), gradient_accumulation_steps=fewer)) > BUDGETS[size]


def test_xl_has_no_recipe_for_24_gb():
    nothing = estimate_memory(PRESETS["EDT-XL/2"], 1, precision="bfloat16")
    assert (nothing.training - nothing.training_activations) / GIB > BUDGETS["24GB"]
