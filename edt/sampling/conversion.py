"""`edt convert`: a `.pt` of the released code → the folder of an `EDTPipeline`, and back."""

import argparse
import functools
import itertools
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from ..data.vae import load_decoder
from ..diffusion.process import make_scheduler
from ..files.errors import named_errors
from ..files.outputs import NEW, clear_left, new_output
from ..files.text import parse_json, printable, read_json, read_text
from ..model.checks import NUM_STAGES
from ..model.presets import AMM_PLACEMENTS, PRESETS, published_size
from ..model.transformer import EDTTransformer2DModel
from ..options import check_types
from ..runs.weights import (
    PIPELINE_INDEX,
    check_released_shapes,
    few,
    load_checkpoint,
    load_released_state_dict,
    released_position_tables,
    to_released_state_dict,
    weights_folder,
)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # in safetensors
_AVERAGED, _RAW = "ema", "model"  # in a checkpoint of the released training

# Blocks with AMM at 512², where its form is "cos". Weights were released for S alone: B has as many blocks as S,
# and XL keeps its placement.
_AMM_AT_512 = {
    "EDT-S/2": AMM_PLACEMENTS["EDT-S/2-512"],
    "EDT-B/2": AMM_PLACEMENTS["EDT-S/2-512"],
    "EDT-XL/2": AMM_PLACEMENTS["EDT-XL/2"],
    "EDT-XL/2-paper": AMM_PLACEMENTS["EDT-XL/2"],
}


@dataclass(frozen=True)
class ConvertOptions:
    """Turns a .pt of the released code into the folder of a pipeline; or a folder of weights into such a .pt."""

    checkpoint: Path
    """A .pt of the released code, of weights or a training checkpoint; or a folder: a pipeline, what
    save_pretrained wrote, a run of edt train or one of its checkpoints."""
    output: Path
    """The folder of the pipeline; or the .pt, where --checkpoint is a folder."""
    vae: str | None = None
    """The AutoencoderKL for the pipeline, such as stabilityai/sd-vae-ft-ema or a local folder."""
    labels: Path | None = None
    """The class names for the pipeline: JSON {"0": "tench", ...} or ["tench", ...], or text of a name a line."""
    weights: Literal["ema", "model"] | None = None
    """Which weights of a training checkpoint: averaged (ema, the default where there are) or raw (model)."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """The dtype of the model's weights. By default it is as they are stored."""
    overwrite: bool = False
    """Replace an output that is there: a .pt of edt convert, or a folder with an EDTPipeline's files alone."""


def convert(options: ConvertOptions) -> str:
    """Does it, and returns a summary. The output is there as a whole or, with an exception, as it was before.

    The `.pt` that comes of a folder is one flat dict of tensors under the released names, the fixed position
    tables among them: the released code's loader takes it, and `torch.load` by weights_only. It has no place for
    the configuration, AMM, class names or VAE.

    Raises:
        ValueError: for a file or folder that is not what is needed, options that do not go together, an output
            that is there.
        FileNotFoundError: for a checkpoint that is not there.
    """
    check_types(options)
    if options.checkpoint.is_dir():
        return _to_file(options)
    if options.checkpoint.is_file():
        return _to_pipeline(options)
    raise FileNotFoundError(f"checkpoint {options.checkpoint}: there is no such file or folder")


def _to_pipeline(options: ConvertOptions) -> str:
    from .pipeline import EDTPipeline  # takes seconds, which other commands need not wait for

    file, output = options.checkpoint, options.output
    clear_left(output)
    _check_folder(options)
    state, weights = read_released_file(file, options.weights)
    dtype = _chosen_dtype(options, {tensor.dtype for tensor in state.values()})
    with named_errors(f"checkpoint {file}", "is not one of the released EDT"):
        config = recognize_config(state)
        with torch.device("meta"):  # shapes first: a wrong one may ask for more memory than there is
            check_released_shapes(EDTTransformer2DModel(**config), state)
        model = EDTTransformer2DModel(**config)
        load_released_state_dict(model, state)
    for name, parameter in model.named_parameters():
        parameter.data = _cast(file, name, parameter.data, dtype)
    pipeline = EDTPipeline(
        model.eval(),
        make_scheduler(),
        vae=None if options.vae is None else load_decoder(options.vae, config["in_channels"]),
        id2label=None if options.labels is None else read_labels(options.labels, config["num_classes"]),
    )
    with new_output(output, options.overwrite) as temporary:
        pipeline.save_pretrained(temporary)
        _check_folder(options)  # again: this took minutes

    size = published_size(config) or "of no published size"
    latents = "×".join(map(str, (config["in_channels"], *model.latent_size)))
    blocks = ", ".join(map(str, config["amm_blocks"]))
    amm = f"AMM ({config['amm_form']}) in blocks {blocks}" if blocks else "AMM off, as no placement is published"
    return (
        f"{printable(file)}: {weights}, {size}, latents {latents}, {config['num_classes']} classes, {amm}\n"
        f"a pipeline in {_name(dtype)} is in {printable(output)}"
    )


def _to_file(options: ConvertOptions) -> str:
    folder, output = options.checkpoint, options.output
    for name in ("vae", "labels", "weights"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name} is for a .pt; checkpoint {folder} is a folder, so leave it out")
    if output.suffix == ".safetensors":
        raise ValueError(f"output {output} would be no safetensors file; the released code reads a .pt")
    clear_left(output)
    _check_file(options)
    folder = weights_folder(folder)
    model = load_checkpoint(folder)
    if model.config.task_routing is not None:
        raise ValueError(f"checkpoint {folder} was trained with task_routing, which the released code has not")
    dtype = _chosen_dtype(options, _stored_dtypes(folder))
    state = to_released_state_dict(model)
    state |= {name: table[None] for name, table in released_position_tables(model).items()}
    state = {name: _cast(folder, name, tensor, dtype) for name, tensor in state.items()}
    with new_output(output) as temporary:
        torch.save(state, temporary)
        _check_file(options)

    foreign = model.config.num_classes == 0 or len(set(model.latent_size)) > 1
    return f"{len(state)} tensors in {_name(dtype)} under the released names are in {printable(output)}" + (
        "\nthe released code, which knows classes and squares alone, has no model for them" if foreign else ""
    )


def read_released_file(
    file: Path, weights: Literal["ema", "model"] | None = None
) -> tuple[dict[str, Tensor], str]:
    """The state dict of a `.pt` of the released code, without the prefixes of DDP and torch.compile, and which
    weights it is, in words. It is a mapping of the file.

    The file is such a state dict, or one of a training checkpoint's {"model", "ema", "opt", "args"}. Of pickled
    objects argparse.Namespace alone is let in.

    Raises:
        ValueError: for anything else, or without the weights asked for.
    """
    content = _load_pickle(file)
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {file} has no state dict; it has a {type(content).__name__}")
    found = few(content)
    named = [name for name in (_AVERAGED, _RAW) if isinstance(content.get(name), dict)]
    if named:
        chosen = weights or named[0]
        if chosen not in named:
            raise ValueError(f"checkpoint {file} has no {chosen} weights; it has {found}")
        content = content[chosen]
    elif weights is not None:
        raise ValueError(f"checkpoint {file} has one set of weights, not {weights}; leave out --weights")
    if not (content and all(map(_is_weight, content.items()))):
        raise ValueError(
            f"checkpoint {file} has no state dict; it needs floating-point tensors by name, or such under "
            f"{_AVERAGED} or {_RAW}, and has {few(content) or 'none'}"
        )
    state = {_without_prefixes(name): tensor for name, tensor in content.items()}
    if len(state) < len(content):
        raise ValueError(f"checkpoint {file} has weights twice, with and without a prefix, as module.pos_embed")
    return state, f"{weights} weights" if named else "weights"


def _load_pickle(file: Path):
    expected = "a .pt that torch.save wrote (of PyTorch 1.6 or newer)"
    if not zipfile.is_zipfile(file):
        with open(file, "rb") as opened:
            head = opened.read(16)
        kind = "a truncated .pt" if head.startswith(b"PK") else "another file"
        if file.suffix == ".safetensors":
            kind = "a .safetensors"
        raise ValueError(
            f"checkpoint {file} is {kind} of {file.stat().st_size} bytes that begin with {head!r}; it must be "
            f"{expected}"
        )
    with named_errors(f"checkpoint {file}", f"is damaged or not {expected}"):
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                # torch.load by mmap would take the compressed bytes for numbers.
                raise ValueError(f"checkpoint {file} has compressed members; it must be {expected}")
            if damaged := archive.testzip():  # which torch.load does not
                raise ValueError(f"checkpoint {file} is damaged: {damaged} in it has another checksum")
        with torch.serialization.safe_globals([argparse.Namespace]):
            if objects := torch.serialization.get_unsafe_globals_in_checkpoint(file):
                raise ValueError(
                    f"checkpoint {file} has pickled objects that are not loaded, as they could run code: "
                    f"{few(objects)}; it must be tensors and an argparse.Namespace"
                )
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _is_weight(item) -> bool:
    """Numbers that are in the file: not of another device or layout, nor repeated by a stride of 0."""
    name, tensor = item
    return (
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and (tensor.device.type, tensor.layout) == ("cpu", torch.strided)
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _without_prefixes(name: str) -> str:
    return re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", ""))


def recognize_config(state_dict: dict[str, Tensor]) -> dict:
    """Arguments of `EDTTransformer2DModel`, from the shapes of its weights under the released names.

        stages                     runs of blocks of one width, number of heads and size of bias table
        grid H×W                   H·W rows of the position table, (2H−1)(2W−1) of the bias table
        which side is H            values of the position table; for squares none are read
        AMM, mask inside a stage   as published for that size; AMM nowhere for sizes that are not

    Mask ratios and label dropout show in no weight: they stay at their defaults.

    Raises:
        ValueError: naming the tensor that is missing or does not fit.
    """

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in state_dict or state_dict[name].ndim != ndim or 0 in state_dict[name].shape:
            fault = f"of shape {tuple(state_dict[name].shape)}" if name in state_dict else "missing"
            raise ValueError(f"{name}, a tensor of {ndim} dimensions in EDT, is {fault} among {few(state_dict)}")
        return tuple(state_dict[name].shape)

    def block_shape(i: int) -> tuple[int, int, int, int]:
        width = shape(f"blocks.{i}.attn.proj.weight", 2)[0]
        rows, heads = shape(f"blocks.{i}.attn.rel_pos_bias.relative_position_bias_table", 2)
        return rows, width, heads, shape(f"blocks.{i}.mlp.fc1.weight", 2)[0]

    num_blocks = 1 + max(
        (int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, state_dict) if m), default=-1
    )
    stages = [(key, len(list(run))) for key, run in itertools.groupby(map(block_shape, range(num_blocks)))]
    if len(stages) != NUM_STAGES:
        raise ValueError(f"its {num_blocks} blocks are {len(stages)} runs of one shape, not {NUM_STAGES} stages")
    rows, widths, heads, hidden = zip(*(key for key, _ in stages))
    _, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    H, W = _grid(shape("pos_embed", 3)[1], rows[0], state_dict["pos_embed"])
    conditional = "y_embedder.embedding_table.weight" in state_dict
    config = {
        "sample_size": H * patch_size if H == W else (H * patch_size, W * patch_size),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": shape("final_layer.linear.weight", 2)[0] // patch_size**2,
        "num_classes": shape("y_embedder.embedding_table.weight", 2)[0] - 1 if conditional else 0,
        "hidden_sizes": widths,
        "num_attention_heads": heads,
        "depths": tuple(depth for _, depth in stages),
        "mlp_ratio": max(h / C for h, C in zip(hidden, widths)),  # each stage's is rounded down
        "amm_blocks": (),
        "amm_form": "exp_cos",
        "mid_mask": None,
    }
    size = published_size(config)
    if size is not None:
        preset = PRESETS[size]
        config["mid_mask"] = preset.get("mid_mask")
        if config["sample_size"] == preset.get("sample_size", 32):
            config["amm_blocks"] = preset["amm_blocks"]
        elif config["sample_size"] == 64 and size in _AMM_AT_512:
            config |= {"amm_blocks": _AMM_AT_512[size], "amm_form": "cos"}
    return config


def _grid(num_tokens: int, bias_rows: int, table: Tensor) -> tuple[int, int]:
    """H and W of H·W = num_tokens and (2H−1)(2W−1) = bias_rows, the larger W unless the values of `table`, the
    position table (1, N, C), say otherwise."""
    # (2H−1)(2W−1) = 4·H·W − 2·(H + W) + 1, so the sides are the roots of s² − (H + W)·s + H·W.
    total = (4 * num_tokens + 1 - bias_rows) // 2
    difference = math.isqrt(max(total**2 - 4 * num_tokens, 0))
    H, W = (total - difference) // 2, (total + difference) // 2
    needed = H * W, (2 * H - 1) * (2 * W - 1)
    if needed != (num_tokens, bias_rows):
        raise ValueError(f"no grid has the {num_tokens} tokens of pos_embed and the {bias_rows} rows of its bias")
    if H == W:
        return H, W
    # Token H is in the first row, whose sin(y·ω) are 0, only where W is larger than H.
    third_quarter = slice(table.shape[-1] // 2, table.shape[-1] * 3 // 4)
    return (H, W) if table[0, H, third_quarter].abs().max() < 0.1 else (W, H)


def read_labels(file: Path, num_classes: int) -> dict[int, str]:
    """Class number → name, from JSON {"0": "tench", ...} or ["tench", ...], or a text file of a name a line.

    Raises:
        ValueError: unless it is text (`text_files.read_text`) and has a name for each of `num_classes`.
    """
    if num_classes == 0:
        raise ValueError(f"labels {file} was given for an unconditional model; leave out --labels")
    text, is_json = read_text(file, "labels"), file.suffix.lower() == ".json"
    # Not splitlines, for which U+2028 or a form feed within a name ends it.
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text.rstrip())]
    try:
        names = parse_json(text, file, "labels")
    except ValueError:
        # A first name may be [unused]; but of as many lines as names are needed JSON is not torn.
        if is_json or (text.lstrip().startswith(("{", "[")) and len(lines) != num_classes):
            raise
        names = lines
    if not isinstance(names, (dict, list)):
        if is_json:
            raise ValueError(f"labels {file} is JSON of a {type(names).__name__}; it must be an object or a list")
        names = lines
    if isinstance(names, list):
        names = {str(i): name for i, name in enumerate(names)}
    if set(names) != set(map(str, range(num_classes))):
        raise ValueError(
            f"labels {file} has {len(names)} names, for {few(names)}; the model needs one for each class, 0 to "
            f"{num_classes - 1}"
        )
    wrong = [i for i, name in names.items() if not (isinstance(name, str) and name.strip())]
    if wrong:
        raise ValueError(f"labels {file} has for class {wrong[0]} {names[wrong[0]]!r}; it must be a name")
    return {i: names[str(i)] for i in range(num_classes)}


def _stored_dtypes(folder: Path) -> set:
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return {_STORED_DTYPES.get(name, name) for name in names}


def _chosen_dtype(options: ConvertOptions, stored: set) -> torch.dtype:
    if options.dtype is not None:
        return _DTYPES[options.dtype]
    if not stored <= set(_DTYPES.values()):
        raise ValueError(
            f"checkpoint {options.checkpoint} has weights of {', '.join(map(_name, stored))}; choose one of "
            f"{', '.join(_DTYPES)} by --dtype"
        )
    return functools.reduce(torch.promote_types, stored)


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast(checkpoint: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        raise ValueError(f"checkpoint {checkpoint} has values in {name} that are not finite in {_name(dtype)}")
    return cast


# What `save_pretrained` of a pipeline writes.
_PIPELINE_FILES = re.compile(
    rf"{re.escape(PIPELINE_INDEX)}|pipeline\.py|scheduler/scheduler_config\.json"
    r"|transformer/edt_transformer\.py|(transformer|vae)/config\.json"
    r"|(transformer|vae)/diffusion_pytorch_model[^/]*\.safetensors(\.index[^/]*\.json)?"
)


def _check_folder(options: ConvertOptions) -> None:
    """Raises ValueError unless a pipeline may be written there."""
    output = options.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; of a .pt comes a folder")
    if output.is_dir() and any(output.iterdir()):
        if not options.overwrite:
            raise ValueError(f"output {output} is there already; --overwrite replaces it")
        if options.checkpoint.resolve().is_relative_to(output.resolve()):
            raise ValueError(f"output {output} has the checkpoint in it; --overwrite would delete that")
        _check_is_ours_alone(output)


def _check_file(options: ConvertOptions) -> None:
    """Raises ValueError unless a .pt may be written there."""
    output = options.output
    if output.is_dir():
        raise ValueError(f"output {output} is a folder; of a folder comes a file, such as EDT-S.pt")
    if output.exists():
        if not options.overwrite:
            raise ValueError(f"output {output} is there already; --overwrite replaces it")
        if not _is_ours(output):
            raise ValueError(
                f"output {output} is no .pt that edt convert wrote, so --overwrite does not replace it; move it, "
                "or give another output"
            )


def _check_is_ours_alone(folder: Path) -> None:
    """Raises ValueError unless the folder is an EDTPipeline's, and has no file that its `save_pretrained` does not
    write: those would be deleted with it."""
    kept = "so --overwrite does not replace it"
    if not (folder / PIPELINE_INDEX).is_file():
        raise ValueError(f"output {folder} is not a pipeline's folder, {kept}")
    kind = read_json(folder / PIPELINE_INDEX, "output", dict).get("_class_name")
    if kind not in ("EDTPipeline", ["pipeline", "EDTPipeline"]):
        raise ValueError(f"output {folder} is the folder of another pipeline ({kind}), {kept}")
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _is_folder(path))
    if others := sorted(name for name in names if not _PIPELINE_FILES.fullmatch(name)):
        raise ValueError(f"output {folder} has {few(others)} beside a pipeline's files, {kept}; move them")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_ours(file: Path) -> bool:
    """Whether `edt convert` wrote this .pt."""
    if not file.is_file():
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return False
    return f"{NEW}/data.pkl" in names and all(name.startswith(f"{NEW}/") for name in names)
