"""What the transformer takes: its arguments, and those of a forward pass."""

import math
from numbers import Real

import torch
from torch import Tensor, nn

from edt_kernels._checks import shown
from edt_kernels._tracing import in_func_transform

from .presets import is_number
from .task_routing import check_task_routing

NUM_STAGES = 5
NUM_MERGES = 2
_MAX_NUMBERS = 10**11  # in the weights or tables that one argument makes; EDT-XL has 7·10⁸ in all


def has_readable_values(tensor: Tensor) -> bool:
    """Whether a check may look at the values: they are there, and reading them neither waits nor breaks a graph.

    That is on a CPU in plain eager mode. A GPU would be waited for; a graph of `torch.compile` or `torch.export`
    cannot branch on them; a transform of `torch.func` has none for one sample; fake and meta tensors have none.
    """
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not in_func_transform()
        and type(tensor) in (Tensor, nn.Parameter)  # no fake one, no other subclass
        and tensor.numel() > 0
    )


def check_block_numbers(name: str, blocks, num_blocks: int) -> None:
    if not all(type(b) is int and 0 <= b < num_blocks for b in blocks) or len(set(blocks)) != len(blocks):
        raise ValueError(
            f"{name} is {shown(tuple(blocks))}; this model has blocks 0 to {num_blocks - 1}, each at most once"
        )


def _is_range(pair) -> bool:
    return (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and all(map(is_number, pair))
        and 0 <= pair[0] <= pair[1] < 1
    )


def check_config(config) -> None:
    """Raises TypeError or ValueError, naming the argument, for a configuration that does not fit together."""
    for name in ("patch_size", "in_channels", "out_channels", "num_classes"):
        if type(getattr(config, name)) is not int:
            raise TypeError(f"{name} is {shown(getattr(config, name))}; it must be an integer")
    for name in ("patch_size", "in_channels", "out_channels"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {shown(getattr(config, name))}; it must be at least 1")
    for name in ("hidden_sizes", "num_attention_heads", "depths", "amm_blocks"):
        values = getattr(config, name)
        if not isinstance(values, (tuple, list)) or not all(type(value) is int for value in values):
            raise TypeError(f"{name} is {shown(values)}; it must be a tuple of integers")
    sides = config.sample_size if isinstance(config.sample_size, (tuple, list)) else [config.sample_size] * 2
    if not all(type(side) is int for side in sides):
        raise TypeError(
            f"sample_size is {shown(config.sample_size)}; it must be an integer, or two (height, width)"
        )
    if len(sides) != 2:
        raise ValueError(f"sample_size is {shown(config.sample_size)}; it must be one side, or (height, width)")
    for name in ("mlp_ratio", "class_dropout_prob", "amm_radius"):
        value = getattr(config, name)
        if isinstance(value, bool) or not (isinstance(value, Real) or (value is None and name == "amm_radius")):
            raise TypeError(f"{name} is {shown(value)}; it must be a number")
    if not is_number(config.mlp_ratio) or config.mlp_ratio <= 0:
        raise ValueError(f"mlp_ratio is {shown(config.mlp_ratio)}; it must be positive and finite")
    height, width = sides
    multiple = 4 * config.patch_size
    if height < multiple or width < multiple or height % multiple or width % multiple:
        raise ValueError(
            f"sample_size is {shown(config.sample_size)}; each side must be a multiple of 4·patch_size = "
            f"{shown(multiple)}, because tokens are merged 2×2 twice"
        )
    for name in ("hidden_sizes", "num_attention_heads", "depths"):
        values = getattr(config, name)
        if len(values) != NUM_STAGES or min(values) < 1 or max(values) > _MAX_NUMBERS:
            raise ValueError(
                f"{name} is {shown(tuple(values))}; it must have {NUM_STAGES} entries of 1 to {_MAX_NUMBERS:.0e}"
            )
    for channels, heads in zip(config.hidden_sizes, config.num_attention_heads):
        if channels % heads or channels % 4:
            raise ValueError(
                f"hidden_sizes has {shown(channels)} for {heads} heads; it must be a multiple of "
                "num_attention_heads and of 4"
            )
        if int(min(channels * config.mlp_ratio, _MAX_NUMBERS)) < 1:
            raise ValueError(
                f"mlp_ratio is {shown(config.mlp_ratio)}; of {channels} channels it leaves the MLP no hidden one"
            )
    sizes = tuple(config.hidden_sizes)
    if sizes[:2] != sizes[:2:-1]:
        raise ValueError(
            f"hidden_sizes is {shown(sizes)}; the last two must mirror the first two, because skips join "
            "their stages"
        )
    if config.num_classes < 0:
        raise ValueError(f"num_classes is {shown(config.num_classes)}; it must be 0 (unconditional) or more")
    if not 0 <= config.class_dropout_prob <= 1:
        raise ValueError(f"class_dropout_prob is {shown(config.class_dropout_prob)}; it must be 0 to 1")
    check_block_numbers("amm_blocks", config.amm_blocks, sum(config.depths))
    if config.amm_form not in ("exp_cos", "cos"):
        raise ValueError(f"amm_form is {shown(config.amm_form)}; it must be 'exp_cos' or 'cos'")
    radius = config.amm_radius
    if radius is not None and not (is_number(radius) and 0 <= radius < _MAX_NUMBERS):
        raise ValueError(f"amm_radius is {shown(radius)}; it must be None, or 0 or more token steps, finite")
    ratios, mid_mask = config.mask_ratios, config.mid_mask
    if not isinstance(ratios, (tuple, list)) or len(ratios) != NUM_MERGES or not all(map(_is_range, ratios)):
        raise ValueError(
            f"mask_ratios is {shown(ratios)}; it must be {NUM_MERGES} ranges (low, high), 0 ≤ low ≤ high < 1"
        )
    if mid_mask is not None and not (
        isinstance(mid_mask, (tuple, list))
        and len(mid_mask) == 2
        and type(mid_mask[0]) is int
        and _is_range(mid_mask[1])
    ):
        raise ValueError(
            f"mid_mask is {shown(mid_mask)}; it must be None or (block, (low, high)), 0 ≤ low ≤ high < 1"
        )
    if mid_mask is not None and not 0 <= config.mid_mask[0] < config.depths[0]:
        raise ValueError(f"mid_mask is before block {shown(mid_mask[0])}; stage 0 has {config.depths[0]} blocks")
    check_task_routing(config.task_routing)
    _check_amounts(config, height, width)


def _check_amounts(config, height: int, width: int) -> None:
    """Raises ValueError for what memory would end over, naming the argument; a file may ask for anything."""
    patch, width_of_cond = config.patch_size**2, config.hidden_sizes[0]
    tokens = height * width // patch
    stages = list(zip(config.hidden_sizes, config.num_attention_heads, config.depths, strict=True))
    amounts = {  # of numbers, to within a small factor
        "patch_size": patch * width_of_cond,
        "in_channels": patch * config.in_channels * width_of_cond,
        "out_channels": patch * config.out_channels * width_of_cond,
        "num_classes": (config.num_classes + 1) * width_of_cond,
        "sample_size": tokens * max(width_of_cond, 4 * max(config.num_attention_heads)),
        "hidden_sizes": max(4 * C * max(C, width_of_cond) for C, _, _ in stages),
        "mlp_ratio": max(2 * C * C for C, _, _ in stages) * config.mlp_ratio,
        # A block's modules take about as much memory as 2¹⁴ numbers.
        "depths": sum(depth * (4 * C * C + 6 * C * width_of_cond + 2**14) for C, _, depth in stages),
    }
    for name, amount in amounts.items():
        if amount > _MAX_NUMBERS:
            raise ValueError(
                f"{name} is {shown(getattr(config, name))}, which means {float(min(amount, 1e300)):.0e} numbers; "
                f"at most {_MAX_NUMBERS:.0e} are taken"
            )


def check_inputs(model, hidden_states, timestep, class_labels, keep_masks, label_drops) -> None:
    """Raises TypeError or ValueError for arguments of `model.forward` that do not fit the model."""
    if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
        given = hidden_states.dtype if isinstance(hidden_states, Tensor) else type(hidden_states).__name__
        raise TypeError(f"hidden_states is {given}; it must be a floating-point tensor")
    latent_shape = (model.config.in_channels, *model.latent_size)
    if hidden_states.ndim != 4 or tuple(hidden_states.shape[1:]) != latent_shape:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)}; this model needs (B, "
            f"{', '.join(map(str, latent_shape))})"
        )
    batch_size = hidden_states.shape[0]
    _check_timestep(timestep, hidden_states)
    _check_class_labels(class_labels, model.config.num_classes, hidden_states)
    _check_label_drops(label_drops, model.config.num_classes, hidden_states)
    if keep_masks is None:
        return
    if not isinstance(keep_masks, (tuple, list)):
        raise TypeError(f"keep_masks is {type(keep_masks).__name__}; it must be a list of bool tensors")
    merges = [math.prod(merge.grid) for merge in model.merges]
    needed = merges if model.config.mid_mask is None else [merges[0], *merges]
    if not all(isinstance(mask, Tensor) for mask in keep_masks):
        raise TypeError(f"keep_masks has {[type(mask).__name__ for mask in keep_masks]}; it must be bool tensors")
    if [tuple(mask.shape) for mask in keep_masks] != [(batch_size, n) for n in needed]:
        shapes = [tuple(mask.shape) for mask in keep_masks]
        raise ValueError(
            f"keep_masks has shapes {shapes}; this model needs (B, N) with B = {batch_size} and N = {needed}"
        )
    if any(mask.dtype != torch.bool for mask in keep_masks):
        raise TypeError(f"keep_masks has dtypes {[mask.dtype for mask in keep_masks]}; they must be bool")
    for mask in keep_masks:
        _check_device("keep_masks", mask, hidden_states)


def _check_timestep(timestep, hidden_states: Tensor) -> None:
    batch_size = hidden_states.shape[0]
    if not isinstance(timestep, Tensor):
        if not isinstance(timestep, Real) or isinstance(timestep, bool):
            raise TypeError(f"timestep is a {type(timestep).__name__}; it must be a tensor or a number")
        if not (is_number(timestep) and abs(timestep) < 2**63):  # pyright: ignore[reportOperatorIssue] - float32 holds it, and int64
            raise ValueError(f"timestep is {shown(timestep)}; it must be finite, and below 2⁶³")
        return
    if timestep.dtype == torch.bool or timestep.is_complex():
        raise TypeError(f"timestep is {timestep.dtype}; it must be of real numbers")
    if timestep.ndim > 1 or (timestep.ndim == 1 and timestep.shape[0] not in (batch_size, 1)):
        raise ValueError(
            f"timestep has shape {tuple(timestep.shape)}; it must be a scalar or ({batch_size},), as "
            f"hidden_states has {batch_size} samples"
        )
    # Not is_meta, which is a graph of its own when this is compiled.
    if timestep.device.type == "meta" and hidden_states.device.type != "meta":
        raise ValueError(f"timestep is on meta; it must have values, as hidden_states on {hidden_states.device}")
    if has_readable_values(timestep) and not timestep.float().isfinite().all():
        raise ValueError("timestep has values that are not finite in float32")


def _check_class_labels(class_labels, num_classes: int, hidden_states: Tensor) -> None:
    if num_classes == 0:
        if class_labels is not None:
            raise ValueError("class_labels was given to an unconditional model (num_classes 0); it must be None")
        return
    if not isinstance(class_labels, Tensor) or class_labels.dtype not in (torch.int64, torch.int32):
        given = class_labels.dtype if isinstance(class_labels, Tensor) else type(class_labels).__name__
        raise TypeError(
            f"class_labels is {given}; a model of {num_classes} classes needs an int64 or int32 tensor"
        )
    _check_one_each("class_labels", class_labels, hidden_states)
    if has_readable_values(class_labels):
        low, high = class_labels.min().item(), class_labels.max().item()
        if low < 0 or high > num_classes:
            raise ValueError(
                f"class_labels has values from {low} to {high}; they must be 0 to {num_classes} "
                f"({num_classes} is the null class)"
            )


def _check_label_drops(label_drops, num_classes: int, hidden_states: Tensor) -> None:
    if label_drops is None:
        return
    if num_classes == 0:
        raise ValueError("label_drops was given to an unconditional model (num_classes 0); it must be None")
    if not isinstance(label_drops, Tensor) or label_drops.dtype != torch.bool:
        given = label_drops.dtype if isinstance(label_drops, Tensor) else type(label_drops).__name__
        raise TypeError(f"label_drops is {given}; it must be a bool tensor")
    _check_one_each("label_drops", label_drops, hidden_states)


def _check_one_each(name: str, tensor: Tensor, hidden_states: Tensor) -> None:
    batch_size = hidden_states.shape[0]
    if tensor.ndim != 1 or tensor.shape[0] != batch_size:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({batch_size},)")
    _check_device(name, tensor, hidden_states)


def _check_device(name: str, tensor: Tensor, hidden_states: Tensor) -> None:
    if tensor.device != hidden_states.device:
        raise ValueError(
            f"{name} is on {tensor.device}; it must be on hidden_states' device, {hidden_states.device}"
        )
