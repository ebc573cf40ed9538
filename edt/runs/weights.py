"""Reading weights: folders of `save_pretrained` and of training runs, and state dicts under the released names."""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.errors import named_errors
from ..files.text import printable, read_json
from ..model.transformer import EDTTransformer2DModel
from .checkpoint import CHECKPOINTS, latest_checkpoint, list_checkpoints, verify_checkpoint

# (our name, released name) of modules outside the blocks; {i} is the module's number.
_RELEASED_MODULES = (
    ("patch_embedding.", "x_embedder."),
    ("timestep_embedding.fc1.", "t_embedder.mlp.0."),
    ("timestep_embedding.fc2.", "t_embedder.mlp.2."),
    ("label_embedding.", "y_embedder.embedding_table."),
    ("final_layer.modulation.linear.", "final_layer.adaLN_modulation.1."),
    ("final_layer.linear.", "final_layer.linear."),
    *((f"merges.{i}.modulation.linear.", f"down_blocks.{i}.adaLN_modulation.1.") for i in (0, 1)),
    *((f"merges.{i}.reduction.", f"down_blocks.{i}.reduction.") for i in (0, 1)),
    *((f"splits.{i}.expand.", f"up_blocks.{i}.expand.") for i in (0, 1)),
    *((f"splits.{i}.modulation.linear.", f"concat_blocks.{i}.adaLN_modulation.1.") for i in (0, 1)),
    *((f"splits.{i}.fuse.", f"concat_blocks.{i}.cat.") for i in (0, 1)),
)
_RELEASED_IN_BLOCK = (("attn.attention.rel_pos_bias", "attn.rel_pos_bias.relative_position_bias_table"),)

_TABLE_DRIFT = 5e-4  # of the released position tables, over twice what their averaging leaves

_CONFIG = "config.json"
PIPELINE_INDEX = "model_index.json"
_TRANSFORMER = "transformer"  # in a pipeline's folder
_WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.([^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors")
_AVERAGED = "ema/"  # in a run's checkpoint


def to_released_state_dict(
    model: EDTTransformer2DModel, tensors: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Tensors under our parameters' names, such as their gradients, under the released names; by default the
    parameters themselves. They are views: our Linear for the modulations of a stage is one of each block there."""
    tensors = model.state_dict() if tensors is None else tensors
    names = _released_names(model)
    return {
        released: part
        for name, tensor in tensors.items()
        for released, part in zip(names[name], tensor.chunk(len(names[name])), strict=True)
    }


def _released_names(model: EDTTransformer2DModel) -> dict[str, list[str]]:
    """Our parameter names → the released names of its equal parts along dimension 0, of which most have one."""
    prefixes = [(ours, [released]) for ours, released in _RELEASED_MODULES]
    number = 0
    for s, stage in enumerate(model.stages):
        blocks = [f"blocks.{number + b}." for b in range(len(stage.blocks))]
        prefixes.append((f"stages.{s}.modulation.linear.", [f"{block}adaLN_modulation.1." for block in blocks]))
        for b, block in enumerate(blocks):
            ours = f"stages.{s}.blocks.{b}."
            prefixes += [(ours + a, [block + r]) for a, r in _RELEASED_IN_BLOCK]
            prefixes.append((ours, [block]))
        number += len(blocks)
    names = {}
    for name in model.state_dict():
        ours, released = next(pair for pair in prefixes if name.startswith(pair[0]))
        names[name] = [prefix + name.removeprefix(ours) for prefix in released]
    return names


def released_position_tables(model: EDTTransformer2DModel) -> dict[str, Tensor]:
    """The fixed tables (N, C) of a model under the released names, where they are (1, N, C)."""
    tables = {"pos_embed": model.position.table}
    for i in (0, 1):
        tables[f"down_blocks.{i}.pos_embed"] = model.merges[i].position.table
        tables[f"concat_blocks.{i}.pos_embed"] = model.splits[i].position.table
    return tables


def load_released_state_dict(model: EDTTransformer2DModel, state_dict: dict[str, Tensor]) -> None:
    """Loads weights under the released key names, strictly: every key must be there, none may be left over.

    The fixed position tables among them are compared with the model's own, which stay (their absence is an error
    too). They may be a little off: the released training averages them with the weights, and by rounding the
    averages of a constant drift from it, by 2·10⁻⁴ within 10 000 steps.

    Raises:
        ValueError: naming missing, unexpected or misshapen keys, or position tables that differ.
    """
    check_released_shapes(model, state_dict)
    for released, table in released_position_tables(model).items():
        given = state_dict[released].to(table).squeeze(0)
        tolerance = _TABLE_DRIFT + torch.finfo(state_dict[released].dtype).eps
        if given.shape != table.shape or not torch.allclose(given, table, rtol=0, atol=tolerance):
            raise ValueError(
                f"state_dict has a position table {released} that is not this model's; is sample_size right?"
            )
    with torch.no_grad():
        for released, parameter in to_released_state_dict(model).items():
            parameter.copy_(state_dict[released])


def check_released_shapes(model: EDTTransformer2DModel, state_dict: dict[str, Tensor]) -> None:
    """Raises ValueError unless the state dict has all released names of this model, which may be on the meta
    device, no others, and parameters of its shapes."""
    parameters = to_released_state_dict(model)
    tables = released_position_tables(model)
    expected = {*parameters, *tables}
    missing, unexpected = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
    if missing or unexpected:
        raise ValueError(
            f"state_dict does not have the released names of this model: {_shorten('missing', missing)}; "
            f"{_shorten('unexpected', unexpected)}"
        )
    for released, parameter in parameters.items():
        if state_dict[released].shape != parameter.shape:
            raise ValueError(
                f"state_dict has {released} of shape {tuple(state_dict[released].shape)}; this model needs "
                f"{tuple(parameter.shape)}"
            )


def weights_folder(folder: str | Path) -> Path:
    """The folder with the config.json and the weights of a checkpoint, by what kind of folder it is:

        a model's save_pretrained        itself
        a pipeline's save_pretrained     its transformer
        a training run's                 the averaged weights of its newest checkpoint where these are undamaged
        one of its checkpoints, step-…   its averaged weights

    Of damaged checkpoints that were passed over stderr is told.

    Raises:
        FileNotFoundError: where the folder is none of these.
        ValueError: where the averaged weights of the checkpoint, or of all the run's, are damaged, or an index of
            a pipeline is no JSON object.
    """
    folder = Path(folder)
    if (folder / PIPELINE_INDEX).is_file():
        read_json(folder / PIPELINE_INDEX, "checkpoint", dict)
        folder = folder / _TRANSFORMER
    checkpoints = folder / CHECKPOINTS
    if (folder / _CONFIG).is_file():
        return folder
    if list_checkpoints(checkpoints):
        newest = latest_checkpoint(
            checkpoints, lambda text: print(f"edt: {printable(text)}", file=sys.stderr), _AVERAGED
        )
        if newest is None:
            raise ValueError(f"checkpoint {folder} is a run whose checkpoints are all damaged; restore one")
        folder = newest / _AVERAGED
    elif (folder / _AVERAGED).is_dir():
        verify_checkpoint(folder, _AVERAGED)
        folder = folder / _AVERAGED
    if not (folder / _CONFIG).is_file():
        found = "the folder has none" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(
            f"checkpoint {folder} needs a {_CONFIG} written by save_pretrained, or a run's {CHECKPOINTS}; {found}"
        )
    return folder


def weights_variant(folder: Path) -> str | None:
    """The variant of a folder's weights, such as fp16, where it has no others.

    Raises:
        ValueError: for weights of several variants, and none without.
    """
    matches = [_WEIGHTS.fullmatch(file.name) for file in folder.glob("*.safetensors")]
    variants = {match[1] for match in matches if match}
    if None in variants or not variants:
        return None
    if len(variants) > 1:
        raise ValueError(
            f"checkpoint {folder} has weights of the variants {', '.join(sorted(variants))}; keep one"
        )
    return variants.pop()


def load_checkpoint(folder: str | Path, **kwargs: Any) -> EDTTransformer2DModel:
    """The model of a folder that `save_pretrained` of it or of its pipeline wrote, or of a training run
    (`weights_folder`), in evaluation mode.

    Raises:
        FileNotFoundError: if the folder or a file in it is missing.
        ValueError: if the weights are truncated, damaged, no safetensors file, or not those of the config's model.
    """
    folder = weights_folder(folder)
    if not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"checkpoint {folder} has a {_CONFIG} but no .safetensors weights")
    name = EDTTransformer2DModel.__name__
    kind = read_json(folder / _CONFIG, "checkpoint", dict).get("_class_name", name)
    if not str(kind).endswith(name):  # FSDP puts its own before it
        raise ValueError(f"checkpoint {folder} is of a {kind}; it must be of an {name}")
    with named_errors(f"checkpoint {folder}", "is damaged, or has weights or a config that do not fit"):
        model, loading = EDTTransformer2DModel.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues] - a pair
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **{"variant": weights_variant(folder), **kwargs},
        )
    missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if missing or unexpected:  # diffusers only warns, and leaves what is missing at random
        raise ValueError(
            f"checkpoint {folder} is not one of its config's model: {_shorten('missing', missing)}; "
            f"{_shorten('unexpected', unexpected)}"
        )
    return model.eval()


_LABEL_TABLE = "label_embedding.weight"


def initialize_from(
    model: EDTTransformer2DModel,
    folder_or_model: str | Path | EDTTransformer2DModel,
    *,
    replace_head: bool = True,
) -> list[str]:
    """Copies trained weights into a freshly built model, to fine-tune it on other classes.

    Every weight is copied but these, which stay as they are in `model`. The label table where the numbers of
    classes differ, except that the row of the null class becomes the trained one; between a conditional and an
    unconditional model, the whole table. And the final layer, whose zero initialisation makes the first prediction
    zero: with `replace_head`, else where it has another shape there, as with other out_channels.

    Args:
        model: what to copy into; its dtype and device stay.
        folder_or_model: a folder as for `load_checkpoint`, or a model.

    Returns:
        The names of the parameters that were not, or not wholly, copied.

    Raises:
        ValueError: naming weights that do not fit, with both shapes, or for another task_routing or a grid
            turned over, which no shape shows; nothing is copied then.
        FileNotFoundError, ValueError: as `load_checkpoint`.
    """
    source = folder_or_model
    if not isinstance(source, EDTTransformer2DModel):
        source = load_checkpoint(source)
    old, new = dict(source.named_parameters()), dict(model.named_parameters())
    other_classes = source.config.num_classes != model.config.num_classes
    unshaped = {  # what shapes do not show: the tables of 8×16 tokens have those of 16×8
        "task_routing": [tuple(each.config.task_routing or ()) for each in (source, model)],
        "sample_size": [each.latent_size for each in (source, model)],
    }
    misfits = [f"{name} is {a} there and {b} in the model" for name, (a, b) in unshaped.items() if a != b]
    fresh = []
    for name in {**new, **old}:
        there, here = (tuple(weights[name].shape) if name in weights else None for weights in (old, new))
        head_is_fresh = name.startswith("final_layer.") and (replace_head or there != here)
        if head_is_fresh or (other_classes and name == _LABEL_TABLE):
            fresh.append(name)
        elif there != here:
            misfits.append(f"{name} is {there or 'missing'} there and {here or 'missing'} in the model")
    if misfits:
        raise ValueError(f"the trained weights do not fit the model: {_shorten('', misfits).lstrip()}")
    with torch.no_grad():
        for name in new.keys() - set(fresh):
            new[name].copy_(old[name])
        if other_classes and _LABEL_TABLE in old and _LABEL_TABLE in new:
            new[_LABEL_TABLE][-1].copy_(old[_LABEL_TABLE][-1])
    return [name for name in fresh if name in new]


def _shorten(what: str, keys: list[str]) -> str:
    return f"{what} {few(keys, 5) or 'none'}"


def few(names, limit: int = 3) -> str:
    """The first of the names, and how many more there are, for an error."""
    names = [names] if isinstance(names, str) else list(names)
    return ", ".join(map(str, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")
