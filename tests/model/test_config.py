"""Presets, placements, and configurations that do not fit."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import edt
from edt_kernels._checks import shown


def on_meta(name, **overrides):
    with torch.device("meta"):
        return edt.load_preset(name, **overrides)


@pytest.mark.parametrize("name", edt.PRESETS)
def test_presets_build(name):
    model = on_meta(name)
    for argument, value in edt.PRESETS[name].items():
        assert model.config[argument] == value


@pytest.mark.parametrize(
    ("name", "channels", "depths"),
    [
        ("EDT-S/2", (312, 416, 520, 416, 312), (2, 2, 2, 3, 3)),
        ("EDT-B/2", (624, 832, 1040, 832, 624), (2, 2, 2, 3, 3)),
        ("EDT-XL/2", (936, 1248, 1560, 1248, 936), (6, 4, 4, 7, 7)),
        ("EDT-XL/2-paper", (936, 1248, 1560, 1248, 936), (6, 6, 4, 6, 6)),
        ("EDT-S/2-512", (312, 416, 520, 416, 312), (2, 2, 2, 3, 3)),
    ],
)
def test_sizes(name, channels, depths):
    model = on_meta(name)
    assert tuple(len(stage.blocks) for stage in model.stages) == depths
    assert tuple(stage.blocks[0].attn.proj.out_features for stage in model.stages) == channels
    assert {
        C // stage.blocks[0].attn.attention.num_heads for C, stage in zip(channels, model.stages, strict=True)
    } == {52}


def test_only_xl_masks_inside_a_stage():
    middle = {name: on_meta(name).config.mid_mask for name in edt.PRESETS}
    assert {name for name, value in middle.items() if value} == {"EDT-XL/2", "EDT-XL/2-paper"}
    assert middle["EDT-XL/2"] == (4, (0.15, 0.25))


@pytest.mark.parametrize(
    ("name", "guidance_scale", "blocks"),
    [
        ("EDT-S/2", 1.0, (7, 10)),
        ("EDT-S/2", 1.5, (7, 10)),
        ("EDT-B/2", 1.25, (7, 10)),
        ("EDT-S/2", 2.0, (8,)),
        ("EDT-B/2", 4.0, (8,)),
        ("EDT-S/2-512", 4.0, (10,)),
        ("EDT-XL/2", 1.0, (23, 25)),
        ("EDT-XL/2", 2.0, (23, 25)),
    ],
)
def test_published_placements(name, guidance_scale, blocks):
    assert edt.published_amm_blocks(name, guidance_scale) == blocks
    model = on_meta(name)
    model.set_amm_blocks(blocks)
    assert model.config.amm_blocks == blocks


def test_512_has_its_form_and_grid():
    model = on_meta("EDT-S/2-512")
    assert model.config.amm_form == "cos"
    assert model.stages[0].blocks[0].attn.attention.grid == (32, 32)


def test_overrides_replace_a_presets_arguments():
    model = on_meta("EDT-S/2", num_classes=7, sample_size=(16, 32), amm_blocks=())
    assert model.config.num_classes == 7
    assert model.latent_size == (16, 32)
    assert model.config.amm_blocks == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sample_size": 33}, "sample_size is 33; each side must be a multiple of 4·patch_size = 8"),
        ({"sample_size": (32, 20)}, r"sample_size is \(32, 20\)"),
        ({"sample_size": 0}, "sample_size is 0"),
        ({"sample_size": (32, 32, 32)}, r"sample_size is \(32, 32, 32\); .*\(height, width\)"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"out_channels": -1}, "out_channels is -1"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"hidden_sizes": (312, 416, 520)}, "hidden_sizes is .* 5 entries of 1 to 1e"),
        ({"hidden_sizes": (314, 416, 520, 416, 312)}, "hidden_sizes has 314 for 6 heads"),
        ({"hidden_sizes": (318, 416, 520, 416, 312)}, "hidden_sizes has 318 .* of 4"),
        ({"hidden_sizes": (312, 416, 520, 416, 624)}, "last two must mirror the first two"),
        ({"num_attention_heads": (6, 8, 10, 8)}, "num_attention_heads is"),
        ({"num_attention_heads": (6, 8, 11, 8, 6)}, "hidden_sizes has 520 for 11 heads"),
        ({"depths": (2, 2, 0, 3, 3)}, "depths is"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob is 1.5"),
        ({"amm_blocks": (12,)}, r"amm_blocks is \(12,\); this model has blocks 0 to 11"),
        ({"amm_form": "sine"}, "form is 'sine'"),
        ({"amm_radius": float("nan")}, "radius is nan"),
        ({"mask_ratios": ((0.4, 0.5),)}, "mask_ratios is"),
        (
            {"mask_ratios": ((0.5, 0.4), (0.1, 0.2))},
            "must be .* ranges \\(low, high\\), 0 ≤ low ≤ high < 1|must be None or \\(block, \\(low, high\\)\\)",
        ),
        (
            {"mask_ratios": ((0.4, 0.5), (0.1, 1.0))},
            "must be .* ranges \\(low, high\\), 0 ≤ low ≤ high < 1|must be None or \\(block, \\(low, high\\)\\)",
        ),
        ({"mid_mask": (2, (0.1, 0.2))}, "mid_mask is before block 2; stage 0 has 2"),
        (
            {"mid_mask": (0, (-0.1, 0.2))},
            "must be .* ranges \\(low, high\\), 0 ≤ low ≤ high < 1|must be None or \\(block, \\(low, high\\)\\)",
        ),
    ],
)
def test_bad_configurations(overrides, message):
    with pytest.raises(ValueError, match=message):
        on_meta("EDT-S/2", **overrides)


NAN, HUGE = float("nan"), 10**400
INTEGERS = ("patch_size", "in_channels", "out_channels", "num_classes")
TUPLES = ("hidden_sizes", "num_attention_heads", "depths")
WRONG = [
    None, True, NAN, float("inf"), -float("inf"), HUGE, -HUGE, 1e308, -1, "1", "", b"1", [], {}, object(), [None],
    (NAN,) * 5, (HUGE,) * 5, (-1,) * 5, ("1",) * 5, (True,) * 5, (HUGE, HUGE), (NAN, NAN), (1, (NAN, NAN)),
    (HUGE, (0.1, 0.2)), (0, 0.1), ((NAN, 0.5), (0.1, 0.2)), ((0.4, HUGE), (0.1, 0.2)), ((0.1, True), (0.1, 0.2)),
    torch.ones(5), torch.ones(1).cfloat(), 1 + 2j, torch.empty((), device="meta"),
    10**5000, (10**5000,), (10**5000,) * 5, (10**5000, (0.1, 0.2)),  # more digits than Python prints
]  # fmt: skip
RIGHT = {  # of the wrong ones
    "mlp_ratio": [], "class_dropout_prob": [], "amm_blocks": [[]], "amm_radius": [None], "mid_mask": [None],
    "task_routing": [None],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["sample_size", *INTEGERS, *TUPLES, "mlp_ratio", "class_dropout_prob", "amm_blocks", "amm_form",
             "amm_radius", "mask_ratios", "mid_mask", "task_routing"],
)  # fmt: skip
def test_every_wrong_value_is_refused_by_name(name):
    for value in WRONG:
        if any(value is right or (isinstance(right, list) and value == right) for right in RIGHT.get(name, [])):
            continue
        with pytest.raises((TypeError, ValueError), match=name):
            on_meta("EDT-digits", **{name: value})


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_classes": 10**12}, {"sample_size": 8 * 10**6}, {"sample_size": (8, 8 * 10**12)},
        {"patch_size": 10**6, "sample_size": 4 * 10**6}, {"in_channels": 10**10}, {"out_channels": 10**10},
        {"hidden_sizes": (10**8,) * 5, "num_attention_heads": (1,) * 5}, {"mlp_ratio": 1e9}, {"mlp_ratio": 1e-9},
        {"depths": (10**9, 1, 1, 1, 1)}, {"depths": (10**8, 1, 1, 1, 1)}, {"amm_radius": 1e308},
        {"amm_radius": 1e200},
    ],
    ids=str,
)  # fmt: skip
def test_amounts_that_no_memory_holds_are_refused_at_once(overrides):
    """A file from elsewhere may ask for them; they are named before anything is allocated."""
    with pytest.raises(ValueError, match=rf"^{next(iter(overrides))} is "):
        edt.load_preset("EDT-digits", **overrides)


@pytest.mark.parametrize(
    "scale",
    [NAN, float("inf"), np.float32("inf"), HUGE, 10**5000, None, "2", True, []],
    ids=lambda scale: shown(scale),
)
def test_placements_need_a_scale(scale):
    with pytest.raises(ValueError, match=r"guidance_scale is .*; it must be a finite number"):
        edt.published_amm_blocks("EDT-S/2", scale)


@pytest.mark.parametrize("name", [None, 3, [], {}, "", "edt-s/2"])
def test_names_that_are_no_preset(name):
    for call in (edt.load_preset, lambda name: edt.published_amm_blocks(name, 1.0)):
        with pytest.raises(ValueError, match=r"(name|preset) is .*; it must be one of EDT-S/2"):
            call(name)


def test_overrides_that_the_model_does_not_know():
    with pytest.raises(TypeError, match="learned_sigma"):
        edt.load_preset("EDT-digits", learned_sigma=True)


@pytest.mark.parametrize("call", [edt.load_preset, lambda name: edt.published_amm_blocks(name, 1.0)])
def test_unknown_preset(call):
    with pytest.raises(ValueError, match="is 'EDT-L/2'; it must be one of EDT-S/2, EDT-B/2"):
        call("EDT-L/2")


def test_presets_need_no_diffusers():
    """The benchmarks of the ops take their shapes from them, also where only torch and Triton are installed."""
    code = "import sys, edt; edt.PRESETS; assert 'diffusers' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(edt.__all__) <= set(dir(edt))
