"""What a training run holds and saves: weights, optimiser, averaged weights, timestep sampler, position."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from pytorch_optimizer import Adan
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..diffusion.process import LossSecondMomentSampler
from ..files.errors import named_errors
from ..files.text import read_json
from .config import TrainConfig, plain
from .objective import TrainingObjective

WEIGHTS = "diffusion_pytorch_model.safetensors"  # what `from_pretrained` looks for
_MODEL_PREFIX = "model."  # of the network's parameters in the objective
_SAMPLER_PREFIX = "timestep_sampler/"
_COUNTS = ("steps", "samples_seen", "skipped_steps", "skipped_in_a_row", "ema_steps")  # in state.json
_KINDS = {int: "a count", dict: "an object"}


def build_optimizer(config: TrainConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Of the library, over all parameters in few kernels (foreach or fused)."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    return Adan(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, weight_decouple=False)


class TrainState:
    """The state of a run on one process; under FSDP each process has its shard of every tensor.

    A checkpoint has whole tensors under the parameters' names, so that any number of processes reads it:

        model/, ema/             weights and averaged weights, as `save_pretrained` writes them
        optimizer.safetensors    <parameter>/<buffer>
        training.safetensors     the timestep sampler's losses and counts, the alignment's head
        state.json               position, counts, the optimiser's numbers
    """

    def __init__(self, objective: TrainingObjective, config: TrainConfig, device: torch.device, main: bool):
        self.model, self.device, self.main = objective.model, device, main
        self.optimizer_name = config.optimizer
        # Under FSDP parameters are DTensors. Optimiser and EMA, which act on each number by itself, take the plain
        # tensors that this process holds of them: foreach operations know no DTensors.
        self.parameters = dict(objective.named_parameters())
        # They require gradients as parameters do, or EMAModel would take them for frozen.
        self.shards = {name: _local(parameter).requires_grad_() for name, parameter in self.parameters.items()}
        self.optimizer = build_optimizer(config, list(self.shards.values()))
        self.ema = EMAModel(
            self._of_model(self.shards).values(),
            decay=config.ema_decay,
            min_decay=0.0 if config.ema_warmup else config.ema_decay,  # by default EMAModel warms up
            foreach=True,
        )
        self.timestep_sampler = LossSecondMomentSampler(device=device)
        self.steps = self.samples_seen = self.skipped_steps = self.skipped_in_a_row = 0

    def _of_model(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Those of the network, under its own names."""
        ours = (name for name in tensors if name.startswith(_MODEL_PREFIX))
        return {name.removeprefix(_MODEL_PREFIX): tensors[name] for name in ours}

    # In a step

    def take_gradients(self) -> list[Tensor]:
        """Hands the optimiser this process's part of the gradients, and returns those there are."""
        for parameter, shard in zip(self.parameters.values(), self.shards.values()):
            shard.grad = _local(parameter.grad)
        return [shard.grad for shard in self.shards.values() if shard.grad is not None]

    def clear_gradients(self) -> None:
        for parameter, shard in zip(self.parameters.values(), self.shards.values()):
            parameter.grad = shard.grad = None

    def apply_gradients(self, learning_rate: float) -> None:
        """A step of the optimiser and of the averages."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.ema.step(self._of_model(self.shards).values())

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model, in evaluation mode, has the averaged weights within.

        They are exchanged in place, one tensor after the other: the model is not copied, and compiled code and
        graphs find the addresses they know.
        """
        self._swap_averages()
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()
            self._swap_averages()

    @torch.no_grad()
    def _swap_averages(self) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # after a forward without backward it still has whole weights, and would use them
        for shard, average in zip(self._of_model(self.shards).values(), self.ema.shadow_params):
            kept = shard.clone()
            shard.copy_(average)
            average.copy_(kept)

    # Saving

    def save(self, folder: Path | None, run: dict) -> None:
        """Writes the files into `folder` on the main process; the others, with None, take part in gathering.

        Args:
            run: what `load` compares, in state.json.
        """
        for name, tensors in self._files():  # one at a time: no more is held on the CPU
            if folder is not None:
                (folder / name).parent.mkdir(exist_ok=True)
                save_file(tensors, folder / name, metadata={"format": "pt"})
        if folder is None:
            return
        for part in ("model", "ema"):
            self.model.save_config(folder / part)
        groups = [
            {k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups
        ]  # fmt: skip
        state = {
            "format": 1,
            "steps": self.steps,
            "samples_seen": self.samples_seen,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "ema_steps": self.ema.optimization_step,
            "optimizer": {"name": self.optimizer_name, "groups": groups},
            "run": run,
        }
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    def _files(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        parameters, network = self.parameters, self._of_model(self.parameters)
        yield f"model/{WEIGHTS}", self._whole(network, self._of_model(self.shards))
        yield f"ema/{WEIGHTS}", self._whole(network, dict(zip(network, self.ema.shadow_params)))
        buffers = {
            f"{name}/{key}": (parameters[name], value)
            for name, shard in self.shards.items()
            for key, value in self.optimizer.state.get(shard, {}).items()
        }
        likes, values = ({name: pair[i] for name, pair in buffers.items()} for i in (0, 1))
        yield "optimizer.safetensors", self._whole(likes, values)
        others = {f"{_SAMPLER_PREFIX}{k}": v.cpu() for k, v in self.timestep_sampler.state_dict().items()}
        heads = {name: p for name, p in parameters.items() if not name.startswith(_MODEL_PREFIX)}
        yield "training.safetensors", others | self._whole(heads, {name: self.shards[name] for name in heads})

    def _whole(self, parameters: Mapping[str, Any], shards: Mapping[str, Any]) -> dict[str, Tensor]:
        """Shards → whole tensors on the CPU of the main process; all take part."""
        whole = {}
        for name, value in shards.items():
            value, like = value.detach(), parameters[name]
            if isinstance(like, DTensor) and value.ndim > 0:  # a count of steps is the same everywhere
                value = DTensor.from_local(
                    value,
                    like.device_mesh,
                    like.placements,
                    run_check=False,
                    shape=like.shape,
                    stride=like.stride(),
                ).full_tensor()
            if self.main:
                whole[name] = value.cpu()
        return whole

    # Loading

    def load(self, folder: Path) -> dict:
        """Everything that `save` wrote, on any number of processes; returns the `run` it was given.

        Raises:
            ValueError: for a checkpoint of another model or optimiser.
        """
        state = _read_state(folder)
        if state["optimizer"].get("name") != self.optimizer_name:
            raise ValueError(
                f"optimizer is {self.optimizer_name!r}; checkpoint {folder} was trained with "
                f"{state['optimizer'].get('name')!r}"
            )
        self._check_config(folder)
        training = _read_tensors(folder / "training.safetensors")
        weights = {f"{_MODEL_PREFIX}{k}": v for k, v in _read_tensors(folder / "model" / WEIGHTS).items()}
        weights |= {name: v for name, v in training.items() if not name.startswith(_SAMPLER_PREFIX)}
        self._check_fit(folder, weights, self.parameters)
        averages = {f"{_MODEL_PREFIX}{k}": v for k, v in _read_tensors(folder / "ema" / WEIGHTS).items()}
        self._check_fit(
            folder, averages, {k: v for k, v in self.parameters.items() if k.startswith(_MODEL_PREFIX)}
        )
        with torch.no_grad():
            for name, shard in self.shards.items():
                shard.copy_(self._shard(name, weights[name]))
            for name, average in zip(self._of_model(self.shards), self.ema.shadow_params):
                average.copy_(self._shard(f"{_MODEL_PREFIX}{name}", averages[f"{_MODEL_PREFIX}{name}"]))
        sampler = {
            k.removeprefix(_SAMPLER_PREFIX): v for k, v in training.items() if k.startswith(_SAMPLER_PREFIX)
        }
        try:
            self._load_optimizer(_read_tensors(folder / "optimizer.safetensors"), state["optimizer"]["groups"])
            self.timestep_sampler.load_state_dict(sampler)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"checkpoint {folder} has a state of the optimizer or the timestep sampler that does not fit: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.steps, self.samples_seen = state["steps"], state["samples_seen"]
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        self.ema.optimization_step = state["ema_steps"]
        return state["run"]

    def _load_optimizer(self, buffers: dict[str, Tensor], groups: list[dict]) -> None:
        numbers = {name: number for number, name in enumerate(self.shards)}
        state = {}
        for key, value in buffers.items():
            name, buffer = key.rsplit("/", 1)
            if value.ndim and value.shape != self.parameters[name].shape:
                raise ValueError(f"{key} has shape {tuple(value.shape)}")
            state.setdefault(numbers[name], {})[buffer] = self._shard(name, value) if value.ndim else value
        # What the config sets is as it is now; the rest, such as Adan's count of steps, as it was.
        groups = [
            {**saved, **{k: group[k] for k in self.optimizer.defaults}, "params": list(numbers.values())}
            for saved, group in zip(groups, self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _check_config(self, folder: Path) -> None:
        """What no tensor's shape shows."""
        then, now = read_json(folder / "model" / "config.json", "config", dict), self.model.config
        for name in ("task_routing", "patch_size", "amm_form"):
            if plain(then.get(name)) != plain(now[name]):
                raise ValueError(
                    f"checkpoint {folder} has {name} {then.get(name)}; this run's model has {now[name]}"
                )

    def _check_fit(self, folder: Path, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            given = tuple(weights[name].shape) if name in weights else "nothing"
            if given != tuple(parameter.shape):
                raise ValueError(
                    f"checkpoint {folder} has {given} for {name}; this run needs {tuple(parameter.shape)}: "
                    "it was of another model, or of other data"
                )
        if extra := sorted(set(weights) - set(parameters)):
            raise ValueError(f"checkpoint {folder} has {', '.join(extra[:5])}, which this run's model has not")

    def _shard(self, name: str, whole: Tensor) -> Tensor:
        """What this process holds of a whole tensor of a parameter's shape."""
        parameter, whole = self.parameters[name], whole.to(self.device)
        if not isinstance(parameter, DTensor):
            return whole
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local()


def steps_of(folder: Path) -> int:
    """Of a checkpoint."""
    return _read_state(folder)["steps"]


def _read_state(folder: Path) -> dict:
    """state.json of a checkpoint, after a check that `save` wrote such a one."""
    file = folder / "state.json"
    state = read_json(file, "state", dict)
    kinds = {**dict.fromkeys(_COUNTS, int), "optimizer": dict, "run": dict}
    for name, kind in kinds.items():
        value = state.get(name)
        if type(value) is not kind or (kind is int and not 0 <= value < 2**63):
            raise ValueError(f"state {file} has no {name} as edt train writes it, which is {_KINDS[kind]}")
    if state.get("format") != 1:
        raise ValueError(f"state {file} is of format {state.get('format')}; this code reads 1")
    if not isinstance(groups := state["optimizer"].get("groups"), list) or not all(
        type(g) is dict for g in groups
    ):
        raise ValueError(f"state {file} has no groups of the optimizer as edt train writes them")
    return state


def _read_tensors(file: Path) -> dict[str, Tensor]:
    with named_errors(f"checkpoint file {file}", "is truncated or no safetensors file"):
        return load_file(file)


def names_not_finite(state: TrainState) -> list[str]:
    """Parameters whose gradient, on this process, is not finite."""
    gradients = ((name, shard.grad) for name, shard in state.shards.items())
    return [name for name, gradient in gradients if gradient is not None and not gradient.isfinite().all()]


def _local(tensor: Any) -> Any:
    """The plain tensor that this process holds of a DTensor, sharing its storage; any other tensor itself."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor
