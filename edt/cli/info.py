"""`edt info`: what a model costs. Of a preset by formulas alone, without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..model.complexity import OPTIMIZER_BUFFERS, cost_table, estimate_memory, meta_model, step_multiply_adds
from ..model.presets import PRESETS
from ..options import check_count, parse

_CACHED_STEPS, _CACHE_INTERVALS = 250, (2, 3, 5)


@dataclass(frozen=True)
class Info:
    """Prints parameters, multiply-adds stage by stage, and a memory estimate."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A preset, such as EDT-XL/2, or the folder of a checkpoint or a run."""
    batch_size: int = 32
    """The number of images that the activations are of."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """The precision. bfloat16 is autocast: weights, their gradients and the residual stream stay float32."""
    gradient_checkpointing: bool = False
    """In training, compute each block again in the backward pass instead of keeping its activations."""


def run_info(args: list[str]) -> None:
    options = parse(Info, args, "edt info")
    if options.model in PRESETS:
        config = PRESETS[options.model]
    elif Path(options.model).is_dir():
        config = _config_of(options.model)
    else:
        raise ValueError(
            f"model is {options.model!r}; it must be a checkpoint folder or one of {', '.join(PRESETS)}"
        )
    check_count("batch_size", options.batch_size)
    parts = cost_table(config)
    memory = estimate_memory(
        config,
        options.batch_size,
        precision=options.precision,
        gradient_checkpointing=options.gradient_checkpointing,
    )

    print(f"{options.model}\n")
    print(f"{'':16} {'grid':>8} {'channels':>9} {'blocks':>7} {'parameters':>13} {'multiply-adds':>15}")
    for part in parts:
        grid = "×".join(map(str, part.grid)) if part.grid else ""
        print(f"{part.name:16} {grid:>8} {part.channels:>9} {part.blocks or '':>7} {_spaced(part.parameters):>13} "
              f"{_giga(part.multiply_adds):>15}".rstrip())  # fmt: skip
    total = sum(part.parameters for part in parts), sum(part.multiply_adds for part in parts)
    print(f"{'total':16} {'':26} {_spaced(total[0]):>13} {_giga(total[1]):>15}")

    batch = f"batch {options.batch_size}"
    rows = [
        ("weights", memory.weights),
        *([("their 16-bit copies", memory.weight_copies)] if memory.weight_copies else []),
        ("gradients", memory.gradients),
        (f"Adan's state ({OPTIMIZER_BUFFERS['adan']} buffers)", memory.optimizer_state),
        ("EMA", memory.ema),
        (f"activations, {batch}", memory.training_activations),
        (f"training, {batch}", memory.training),
        (f"inference, {batch}", memory.inference),
    ]
    checkpointing = ", gradient checkpointing" if options.gradient_checkpointing else ""
    print(f"\nmemory, {options.precision}{checkpointing}, estimated for the Triton kernels")
    for name, size in rows:
        print(f"{name:28} {size / 2**30:>10.2f} GiB")
    print(
        "In training, attention without its kernel keeps matrices of "
        f"{memory.attention_matrices / 2**30:.2f} GiB more."
    )

    costs = step_multiply_adds(config)
    print(f"\nstep caching, every n-th of {_CACHED_STEPS} steps in full: times fewer multiply-adds")
    print(f"{'':28}" + "".join(f"{f'n = {n}':>8}" for n in _CACHE_INTERVALS))
    for reuse in ("deep", "encoder"):
        print(f"{f'{reuse} features reused':28}" + "".join(_saving(costs, reuse, n) for n in _CACHE_INTERVALS))


def _saving(costs: dict[str, int], reuse: str, interval: int) -> str:
    full_steps = -(-_CACHED_STEPS // interval)
    cost = full_steps * costs["full"] + (_CACHED_STEPS - full_steps) * costs[reuse]
    return f"{_CACHED_STEPS * costs['full'] / cost:>7.2f}×"


def _config_of(folder: str) -> dict:
    """The arguments of a checkpoint's model; as it is loaded, those that it does not know are left out."""
    from ..files.errors import named_errors
    from ..files.text import read_json
    from ..model.transformer import EDTTransformer2DModel
    from ..runs.weights import weights_folder

    weights = weights_folder(folder)
    read_json(weights / "config.json", "checkpoint", dict)
    with named_errors(f"checkpoint {weights}", "has a config that does not fit"):
        config = EDTTransformer2DModel.load_config(weights, local_files_only=True)
        config, *_ = EDTTransformer2DModel.extract_init_dict(config)
        meta_model(config)
    return config


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _giga(multiply_adds: int) -> str:
    if multiply_adds == 0:
        return ""
    return f"{multiply_adds / 1e9:.3f} G" if multiply_adds >= 1e7 else f"{multiply_adds / 1e6:.3f} M"
