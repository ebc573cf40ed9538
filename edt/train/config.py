"""What a training run is told: fields for the command line and YAML, and the published recipes."""

import argparse
import math
import types
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import yaml

from ..files.outputs import new_file
from ..files.text import read_text
from ..model.presets import NUM_TRAIN_TIMESTEPS, PRESETS
from ..options import check_types, describe, fits, renamed, shown, today
from ..options import parse as parse_options

CONFIG_FILE = "config.yaml"  # beside the run
_NOT_SAVED = ("recipe", "config", "resume")
_MOST = 1e6  # of what multiplies: beyond it numbers overflow, and nothing is learned or drawn long before
_MOST_WORKERS = 1024  # of a process, each a process itself: more are a slip of the finger that takes the machine


@renamed(flip="flips", sample_steps="num_inference_steps", sample_guidance="guidance_scale")
@dataclass(frozen=True)
class TrainConfig:
    """Trains EDT on a folder that `edt extract` wrote, or goes on where the run in --output stopped.

    Defaults come from --config, else from --recipe, else from the run in --output, else they are those below. The
    command needs pip install 'edt-kernels[train]'.
    """

    data: Path
    """The data folder that edt extract wrote."""
    output: Path = Path("outputs/train")
    """The run's folder: checkpoints, metrics, samples, config.yaml."""
    recipe: str | None = None
    """Defaults come from this recipe, such as EDT-S/2 (as published) or EDT-S/2-24GB (for one GPU of 24 GB)."""
    config: Path | None = None
    """Defaults come from this YAML file of these options, such as the config.yaml of another run."""

    model: str = "EDT-S/2"
    """The preset of the model. Its latent size, channels and number of classes are the data's."""
    unconditional: bool = False
    """Train a model without classes; the data's labels are ignored."""
    class_dropout: float = 0.1
    """The share of labels that become the null class, which classifier-free guidance needs."""
    masking: bool = True
    """Masking training: the loss is that of a full pass and of a masked one."""
    task_routing: tuple[float, float] | None = None
    """Denoising Task Routing: share of active channels, and exponent; 0.8 4 is published. Off by default."""
    init_from: Path | None = None
    """For fine-tuning: the checkpoint to start from. It must have the same sizes; its classes may differ."""
    replace_head: bool = True
    """With --init-from, start with a new final layer, which is zero."""

    steps: int = 400_000
    """Training steps in all, those of earlier calls included."""
    batch_size: int = 256
    """Images in a step, over all processes. Each takes part in both passes."""
    gradient_accumulation_steps: int = 1
    """Parts that a process splits its images into: less memory, the same gradient but of the alignment loss."""
    optimizer: Literal["adan", "adamw"] = "adan"
    """The optimiser. The published one is Adan."""
    learning_rate: float = 1e-3
    """The learning rate at the start. 1e-3 is published, and 5e-4 for XL."""
    final_learning_rate: float = 5e-5
    """The learning rate from --decay-steps on. It falls linearly until then."""
    decay_steps: int = 400_000
    """The step from which the learning rate is the final one."""
    warmup_steps: int = 0
    """The learning rate rises linearly from 0 over this many steps."""
    weight_decay: float = 0.0
    """The optimiser's weight decay. None is published."""
    max_grad_norm: float | None = None
    """Gradients of a larger norm are scaled down to this. No limit is published."""
    ema_decay: float = 0.9999
    """The decay of the averaged weights, for each step."""
    ema_warmup: bool = False
    """For short runs: average with the decay (1 + step)/(10 + step) while that is lower."""
    alignment_encoder: str | None = None
    """For the alignment loss: module:factory of a frozen image encoder. The data must have their images."""
    alignment_weight: float = 0.5
    """The weight of the alignment loss."""
    manifold_weight: float = 3.0
    """Within the alignment loss, the weight of the similarities between samples."""

    precision: Literal["auto", "bfloat16", "tf32", "float32"] = "auto"
    """How exact matrix products are. bfloat16 is autocast, in which norms, softmax, losses and weights stay
    float32; tf32 rounds only what goes into float32 products. auto is bfloat16 on a GPU and float32 on a CPU."""
    gradient_checkpointing: bool = False
    """Compute each block again in the backward pass: much less memory for a third more work."""
    compile: bool = False
    """Compile the model with torch.compile. The first steps then take minutes."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """The device. auto is the GPU if there is one."""
    seed: int = 0
    """The seed of everything random."""
    flips: bool = True
    """Train on mirrored images too, where the data allow it."""
    num_workers: int = 2
    """The number of processes that read data, for each training process."""
    verify_data: bool = True
    """Compare the data with their checksums first."""

    checkpoint_every: int = 10_000
    """A checkpoint is written every so many steps, after the last one, and when the run is interrupted."""
    keep_checkpoints: int = 3
    """This many of the newest checkpoints are kept."""
    keep_every: int | None = None
    """Beside them, checkpoints of steps that are multiples of this are kept for good."""
    resume: str = "latest"
    """latest goes on where --output stopped, never refuses if it could, a checkpoint's folder goes on from it."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl, whose figures are means over them."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Accelerate's trackers that get the figures: tensorboard, wandb, …. Without a name after it there is none."""
    sample_every: int = 10_000
    """Steps between two grids of images, drawn with the averaged weights; 0 draws none."""
    sample_count: int = 16
    """Images in a grid, of classes spread evenly."""
    num_inference_steps: int = 50
    """Denoising steps in drawing a grid."""
    guidance_scale: float = 1.0
    """Classifier-free guidance in drawing a grid; 1 is none."""
    vae: str | None = None
    """The AutoencoderKL that decodes the grids, by folder or name. The data's is not fetched by itself."""
    max_skipped_steps: int = 10
    """Training stops after this many steps in a row whose loss or gradient is not finite."""
    peak_tflops: float | None = None
    """The device's dense matrix rate at this precision, for the FLOP utilisation. It is known for common GPUs."""

    def check(self) -> None:
        """Raises ValueError for a field that cannot work; called before anything is spent."""
        check_types(self)
        if self.model not in PRESETS:
            raise ValueError(f"model is {self.model!r}; it must be one of {', '.join(PRESETS)}")
        at_least = {"steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "decay_steps": 1,
                    "warmup_steps": 0, "num_workers": 0, "checkpoint_every": 1, "keep_checkpoints": 1,
                    "log_every": 1, "sample_every": 0, "sample_count": 1, "num_inference_steps": 1, "seed": 0,
                    "max_skipped_steps": 1, "keep_every": 1}  # fmt: skip
        at_most = {"num_workers": _MOST_WORKERS, "sample_count": 10_000, "seed": 2**63 - 1}
        for name, low in at_least.items():
            value, high = getattr(self, name), at_most.get(name, 2**31 - 1)
            if value is not None and value < low:
                raise ValueError(f"{name} is {shown(value)}; it must be at least {low}")
            if value is not None and value > high:
                raise ValueError(f"{name} is {shown(value)}; it must be at most {high}")
        if self.num_inference_steps > NUM_TRAIN_TIMESTEPS:
            raise ValueError(
                f"num_inference_steps is {self.num_inference_steps}; it must be at most {NUM_TRAIN_TIMESTEPS}"
            )
        for name in ("learning_rate", "max_grad_norm", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        for name in ("final_learning_rate", "weight_decay", "alignment_weight", "manifold_weight",
                     "guidance_scale"):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be finite and not negative")
        for name in ("learning_rate", "final_learning_rate", "weight_decay", "alignment_weight",
                     "manifold_weight", "guidance_scale", "peak_tflops"):  # fmt: skip
            if (getattr(self, name) or 0) > _MOST:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at most {_MOST:.0f}")
        if self.task_routing is not None and not all(map(math.isfinite, self.task_routing)):
            raise ValueError(f"task_routing is {self.task_routing}; it must be two finite numbers")
        if self.sample_every and self.guidance_scale != 1 and not self.class_dropout and not self.unconditional:
            raise ValueError(
                f"guidance_scale is {self.guidance_scale}; with class_dropout 0 no null class is learned, use 1"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout is {self.class_dropout}; it must be 0 to 1")

    def learning_rate_at(self, step: int) -> float:
        """Of the step after `step` steps: linear warm-up times a linear fall to final_learning_rate."""
        fallen = min(step / self.decay_steps, 1)
        warm = min((step + 1) / self.warmup_steps, 1) if self.warmup_steps else 1
        return warm * (self.learning_rate + (self.final_learning_rate - self.learning_rate) * fallen)

    def save(self, path: Path) -> None:
        """YAML of all fields but where defaults and the first weights came from: a run goes on from its own."""
        values = {name: value for name, value in asdict(self.absolute()).items() if name not in _NOT_SAVED}
        values = {name: plain(value) for name, value in values.items()}
        with new_file(path) as temporary:  # a run goes on by it
            temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def absolute(self) -> "TrainConfig":
        """With paths that are the same from any folder: a run may be started again from another."""
        paths: dict = {name: value.absolute() for name, value in vars(self).items() if isinstance(value, Path)}
        if self.vae is not None and Path(self.vae).exists():  # else it is a name
            paths["vae"] = str(Path(self.vae).absolute())
        return replace(self, **paths)


def plain(value):
    """As JSON and YAML have it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(map(plain, value))
    if isinstance(value, float):
        return float(value)  # NumPy's is one too
    return str(value) if isinstance(value, Path) else value


_PUBLISHED = {"steps": 400_000, "batch_size": 256}
# As published, then the same on one GPU of so much memory: a step in as few parts as fit, by
# `edt.model.estimate_memory`, into 19.5 GiB of a 24 GB GPU's 22 or 72 of an 80 GB GPU's 79. The rest is for
# what the estimate leaves out: temporary tensors, fragments, CUDA itself.
RECIPES = {
    "EDT-S/2": {"model": "EDT-S/2", **_PUBLISHED},
    "EDT-B/2": {"model": "EDT-B/2", **_PUBLISHED},
    "EDT-XL/2": {"model": "EDT-XL/2", "learning_rate": 5e-4, **_PUBLISHED},
    "EDT-S/2-512": {"model": "EDT-S/2-512", **_PUBLISHED},
    "EDT-S/2-24GB": {"model": "EDT-S/2", **_PUBLISHED},  # 10.4 GiB
    # 13.6 GiB; in one part 22.9.
    "EDT-B/2-24GB": {"model": "EDT-B/2", **_PUBLISHED, "gradient_accumulation_steps": 2},
    # EDT-XL/2 has none of 24 GB: weights, gradients, Adan's state and EMA are 19.5 GiB before any activation.
    # 52.3 GiB; in one part 85.0, or 33.4 with gradient_checkpointing, which is a third more work.
    "EDT-XL/2-80GB": {
        "model": "EDT-XL/2",
        "learning_rate": 5e-4,
        **_PUBLISHED,
        "gradient_accumulation_steps": 2,
    },
    # Real 8×8 digits in minutes on two CPU cores; what `edt demo` runs.
    "digits": {
        "model": "EDT-digits",
        "steps": 1800,
        "batch_size": 64,
        "learning_rate": 2e-3,
        "final_learning_rate": 0.0,
        "decay_steps": 1800,
        "warmup_steps": 50,
        "ema_decay": 0.995,
        "ema_warmup": True,
        "flips": False,
        "num_workers": 0,
        "checkpoint_every": 600,
        "sample_every": 600,
        "sample_count": 40,
        "log_every": 20,
    },
}


def load_config(path: Path, **overrides) -> TrainConfig:
    """A config from YAML, with any of its fields replaced.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for text that is not a mapping of TrainConfig's fields, or a value of another type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist; it must be a YAML file of edt train's fields")
    text = read_text(path, "config")
    try:
        values = yaml.load(text, Loader=_PlainLoader)
    except Exception as error:  # PyYAML's own, and what its makers of numbers and dates let through
        raise ValueError(f"config {path} is no YAML that edt train reads: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {path} has {type(values).__name__}; it must be a mapping of edt train's fields")
    given, values = values, today(TrainConfig, values)
    if len(values) < len(given):
        raise ValueError(f"config {path} has a field under its name of today and a former one; give it once")
    known = {f.name for f in fields(TrainConfig)} - {"recipe", "config"}
    if unknown := sorted(map(str, set(values) - known)):
        raise ValueError(f"config {path} has {', '.join(unknown)}; edt train has no such field")
    hints = get_type_hints(TrainConfig)
    typed = {name: _typed(path, name, value, hints[name]) for name, value in values.items()}
    if "data" not in {**typed, **overrides}:
        overrides["data"] = _missing()
    return TrainConfig(**{**typed, **overrides})


def _typed(path: Path, name: str, value, hint):
    """A value as YAML gives it → of the field's type: paths from text, tuples from lists, floats from integers."""
    if get_origin(hint) in (types.UnionType,):
        if value is None:
            return None
        hint = next(option for option in get_args(hint) if option is not type(None))
    origin, choices = get_origin(hint), get_args(hint)
    if origin is tuple and isinstance(value, list):
        kinds = choices[:1] * len(value) if choices[-1] is Ellipsis else choices
        if len(kinds) == len(value):
            return tuple(_typed(path, name, item, kind) for item, kind in zip(value, kinds))
    if hint is Path and isinstance(value, str):
        return Path(value)
    if (
        hint is float and isinstance(value, int | float | str) and not isinstance(value, bool)
    ):  # YAML takes 1e-4, without a point, for text
        with suppress(ValueError, OverflowError):
            return float(value)
    if hint is not float and fits(value, hint):
        return value
    raise ValueError(f"config {path} has {shown(value)} for {name}; it must be {describe(hint)}")


class _PlainLoader(yaml.SafeLoader):
    """YAML without what a file of settings never has and what hides a slip or a bomb: aliases, and keys twice."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"it has an alias, *{self.peek_event().anchor}; write the value itself")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise ValueError(f"it has {', '.join(twice)} more than once")
        return super().construct_mapping(node, deep)


def recipe(name: str, **overrides) -> TrainConfig:
    """The config of a recipe (`RECIPES`), with any of its fields replaced.

    Raises:
        ValueError: for a name that is no recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; it must be one of {', '.join(RECIPES)}")
    return TrainConfig(**{"data": _missing(), **RECIPES[name], **overrides})


def _missing():
    import tyro  # the command line's alone: who loads a run's weights need not have it

    return tyro.MISSING


def parse(args: Sequence[str], prog: str = "edt train") -> TrainConfig:
    """The config of a command line: first where defaults come from, then every field given.

    Raises:
        ValueError, FileNotFoundError: for a recipe or a file that is none; SystemExit for an unknown option.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config", type=Path)
    first.add_argument("--output", type=Path, default=_default("output"))
    sources, _ = first.parse_known_args(args)
    if sources.recipe and sources.config:
        raise ValueError("recipe and config were both given; defaults come from one of them")
    saved = sources.output / CONFIG_FILE
    if sources.config:
        default = load_config(sources.config)
    elif sources.recipe:
        default = recipe(sources.recipe)
    elif saved.is_file():
        default = load_config(saved, output=sources.output)
    else:
        default = TrainConfig(data=_missing())
    return parse_options(TrainConfig, args, prog, default)


def _default(name: str):
    return next(f.default for f in fields(TrainConfig) if f.name == name)
