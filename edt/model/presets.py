"""Named configurations: model sizes as released and as published, and where AMM goes."""

import math
from numbers import Real

NUM_TRAIN_TIMESTEPS = 1000

# 0-based numbers of the blocks with AMM, counted over all stages; as released, by model and guidance scale.
AMM_PLACEMENTS = {
    "EDT-S,B/2 guidance 1-1.5": (7, 10),
    "EDT-S,B/2 guidance 2-": (8,),
    "EDT-S/2-512": (10,),
    "EDT-XL/2": (23, 25),
    "DiT-XL/2": (15, 17, 19, 22, 24),
    "DiT-S/2": (8, 10),
    "MDTv2-S/2": (8,),
}

_S = {
    "hidden_sizes": (312, 416, 520, 416, 312),
    "num_attention_heads": (6, 8, 10, 8, 6),
    "depths": (2, 2, 2, 3, 3),
    "amm_blocks": AMM_PLACEMENTS["EDT-S,B/2 guidance 1-1.5"],
}
_B = {
    "hidden_sizes": (624, 832, 1040, 832, 624),
    "num_attention_heads": (12, 16, 20, 16, 12),
    "depths": (2, 2, 2, 3, 3),
    "amm_blocks": AMM_PLACEMENTS["EDT-S,B/2 guidance 1-1.5"],
}
_XL = {
    "hidden_sizes": (936, 1248, 1560, 1248, 936),
    "num_attention_heads": (18, 24, 30, 24, 18),
    "depths": (6, 4, 4, 7, 7),
    "amm_blocks": AMM_PLACEMENTS["EDT-XL/2"],
    "mid_mask": (4, (0.15, 0.25)),
}

# Arguments of `EDTTransformer2DModel`, by name.
PRESETS = {
    "EDT-S/2": _S,
    "EDT-B/2": _B,
    "EDT-XL/2": _XL,
    # Table 5 of the paper; no weights were published for it, nor a placement, so AMM keeps the released one.
    "EDT-XL/2-paper": {**_XL, "depths": (6, 6, 4, 6, 6)},
    "EDT-S/2-512": {
        **_S,
        "sample_size": 64,
        "amm_form": "cos",
        "amm_blocks": AMM_PLACEMENTS["EDT-S/2-512"],
    },
    # 8×8 grey digits in pixel space, small enough to train on two CPU cores. Patches of one pixel (and 48 to 160
    # channels) took 54 s of CPU for 100 steps of 128 images instead of 32, and learned no more by a step.
    "EDT-digits": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 2,
        "num_classes": 10,
        "hidden_sizes": (96, 128, 160, 128, 96),
        "num_attention_heads": (3, 4, 5, 4, 3),
        "depths": (1, 1, 1, 2, 2),
        "amm_blocks": (3, 5),
    },
}


# Arguments that presets leave out, as `EDTTransformer2DModel` takes them by default.
DEFAULTS = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_classes": 1000,
    "hidden_sizes": _S["hidden_sizes"],
    "num_attention_heads": _S["num_attention_heads"],
    "depths": _S["depths"],
    "mlp_ratio": 4.0,
    "task_routing": None,
}
# What makes a published size.
_SIZE = ("patch_size", "in_channels", "out_channels", "hidden_sizes", "num_attention_heads", "depths", "mlp_ratio")


def published_amm_blocks(preset: str, guidance_scale: float) -> tuple[int, ...]:
    """The blocks with AMM that the authors use for a preset at a guidance scale.

    EDT-S and B were published for scales 1 to 1.5 and from 2 on; scales between take the nearer range.

    Raises:
        ValueError: for a name that is no preset, or a scale that is no finite number.
    """
    if not is_number(guidance_scale):
        from edt_kernels._checks import shown  # imports torch, which this plain data needs for errors alone

        raise ValueError(f"guidance_scale is {shown(guidance_scale)}; it must be a finite number")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; it must be one of {', '.join(PRESETS)}")
    if preset in ("EDT-S/2", "EDT-B/2") and guidance_scale >= 1.75:
        return AMM_PLACEMENTS["EDT-S,B/2 guidance 2-"]
    return PRESETS[preset]["amm_blocks"]


def published_size(config) -> str | None:
    """The preset of the same widths, heads and blocks, whatever the resolution and the classes, or None."""
    for name, preset in PRESETS.items():
        if all(_plain((DEFAULTS | preset)[key]) == _plain(config[key]) for key in _SIZE):
            return name
    return None


def amm_placement(config, guidance_scale: float) -> tuple[int, ...]:
    """The blocks with AMM of a model's configuration, but at a guidance scale for which the authors publish others
    those. A model that was given blocks of its own keeps them."""
    own, preset = tuple(config["amm_blocks"]), published_size(config)
    if preset is None or _plain(config["sample_size"]) not in (32, (32, 32)):
        return own
    published = [published_amm_blocks(preset, scale) for scale in (1.0, 2.0)]
    return published_amm_blocks(preset, guidance_scale) if own in published else own


def is_number(value) -> bool:
    """Whether it is a finite real number of float's range; True and False are none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _plain(value):
    """JSON turns tuples into lists."""
    return tuple(value) if isinstance(value, list) else value
