"""What autograd keeps for backward, counted without running anything."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode


def saved_tensors(
    model: nn.Module, inputs: Callable[[], tuple], autocast: torch.dtype | None = None
) -> list[Tensor]:
    """The tensors that a training-mode forward of `model`, built on the meta device, saves for backward.

    Fake tensors of the CPU stand in for all: shapes, dtypes and storages, but no values and no kernel. Of those
    that share a storage only the first is returned; parameters and buffers are left out.
    """
    kept = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

        def keep(tensor: Tensor) -> Tensor:
            address = tensor.untyped_storage()._cdata
            if address not in own and tensor.numel():  # torch 2.11's checkpoint keeps an empty one
                kept.setdefault(address, tensor)  # held, so that no address recurs
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
        ):
            output = model(*inputs())
        del output
    return list(kept.values())


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
