"""What a run begins with: the checkpoint it goes on from, data, model, alignment, and room on the disk."""

import shutil
from collections.abc import Iterable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from edt_kernels._backend import select_backend

from ..data.dataset import LatentDataset, open_dataset
from ..files.text import say
from ..model.complexity import OPTIMIZER_BUFFERS, block_grid
from ..model.presets import PRESETS
from ..model.transformer import EDTTransformer2DModel
from ..runs.checkpoint import CHECKPOINTS, latest_checkpoint, list_checkpoints, verify_checkpoint
from .alignment import AlignmentLoss, encode, feature_grid, load_image_encoder
from .config import TrainConfig, plain
from .processes import together
from .randomness import ALIGNMENT_HEAD, INITIAL_WEIGHTS, keyed_seed
from .state import steps_of

# Fields that change nothing in the weights of a step.
_WITHOUT_EFFECT = {
    "data", "output", "recipe", "config", "resume", "init_from", "replace_head", "steps", "num_workers", "device",
    "verify_data", "checkpoint_every", "keep_checkpoints", "keep_every", "log_every", "trackers", "sample_every",
    "sample_count", "num_inference_steps", "guidance_scale", "vae", "max_skipped_steps", "peak_tflops",
}  # fmt: skip


def find_checkpoint(config: TrainConfig, accelerator: Accelerator) -> Path | None:
    """What to go on from; one process looks, so that all take the same."""
    checkpoints = config.output / CHECKPOINTS
    if config.resume == "never":
        if list_checkpoints(checkpoints):
            raise ValueError(f"output {config.output} has a run, and resume is never; give another output")
        return None
    if config.resume != "latest":
        folder = Path(config.resume)
        if not folder.is_dir():
            raise FileNotFoundError(f"resume is {folder}; it must be latest, never, or a checkpoint's folder")
        verify_checkpoint(folder)
        last = latest_checkpoint(checkpoints, on_damage=lambda text: None)
        if last is not None and steps_of(last) > steps_of(folder):
            raise ValueError(
                f"resume is {folder}; output {config.output} has gone on to {last.name}: give resume latest "
                "to go on from there, or another output"
            )
        return folder
    main = accelerator.is_main_process
    look = partial(latest_checkpoint, checkpoints, on_damage=lambda text: say(f"edt: {text}"))
    found = [together(accelerator, lambda: look() if main else None)]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(found)
    if found[0] is None and list_checkpoints(checkpoints):
        raise ValueError(
            f"output {config.output} has checkpoints, but every one of them is damaged; restore one, or give "
            "another output"
        )
    return found[0]


def open_training_data(config: TrainConfig) -> LatentDataset:
    """With its images where the alignment needs them; those of pixel data are the data."""
    if not config.data.is_dir():
        raise FileNotFoundError(
            f"data folder {config.data}: there is no such folder; edt extract makes one. It was looked for at "
            f"{config.data.absolute()}; --data says where it is now"
        )
    dataset = open_dataset(config.data)
    if config.alignment_encoder is not None and dataset.manifest.kind == "latents":
        dataset = open_dataset(config.data, with_images=True)
    return dataset


def build_model(config: TrainConfig, dataset: LatentDataset) -> EDTTransformer2DModel:
    """The preset, for the data's latents and classes, with weights from the seed."""
    channels, height, width = dataset.latent_shape
    arguments = {
        **PRESETS[config.model],
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": 2 * channels,
        "num_classes": 0 if config.unconditional else dataset.num_classes,
        "class_dropout_prob": config.class_dropout,
        "task_routing": config.task_routing,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(config.seed, INITIAL_WEIGHTS))
        return EDTTransformer2DModel(**arguments)


def build_alignment(
    config: TrainConfig, model: EDTTransformer2DModel, dataset: LatentDataset, device: torch.device
) -> tuple[AlignmentLoss | None, Any]:
    """The alignment loss and its frozen encoder; None, None without."""
    if config.alignment_encoder is None:
        return None, None
    encoder = load_image_encoder(config.alignment_encoder).to(device)
    first = np.zeros(1, dtype=np.int64)
    images = to_images(dataset.read(first, first)).to(device)
    features = encode(encoder, images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(config.seed, ALIGNMENT_HEAD))
        head = AlignmentLoss(
            model.config.hidden_sizes[2],
            block_grid(model.stages[2]),
            features.shape[2],
            feature_grid(features.shape[1], images.shape[2:]),
            weight=config.alignment_weight,
            manifold_weight=config.manifold_weight,
        )
    return head, encoder


def to_images(batch: dict[str, Tensor]) -> Tensor:
    """(B, 3, h, w) on the scale −1 to 1; grey ones in three equal channels."""
    images = batch.get("images", batch["latents"]).float() / 127.5 - 1
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def identity(config: TrainConfig, accelerator: Accelerator, data_digest: str) -> dict:
    """What must be equal for a resumed run to be exactly the one that was not interrupted."""
    names = (field.name for field in fields(TrainConfig) if field.name not in _WITHOUT_EFFECT)
    device = accelerator.device
    gpu = device.type == "cuda"
    return {
        **{name: plain(getattr(config, name)) for name in names},
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu, {torch.get_num_threads()} threads",
        "kernels": select_backend(q=torch.empty(0, device=device)),
        "data": data_digest,
        "torch": torch.__version__,
    }


def check_disk(config: TrainConfig, parameters: Iterable[Tensor]) -> None:
    """A disk too small for a checkpoint is found before the steps are spent."""
    copies = 2 + OPTIMIZER_BUFFERS[config.optimizer]
    needed = 4 * copies * sum(p.numel() for p in parameters)
    place = config.output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            f"output {config.output} has {free / 1e9:.2f} GB free; a checkpoint of this run takes "
            f"{needed / 1e9:.2f} GB, and {config.keep_checkpoints} are kept"
        )
