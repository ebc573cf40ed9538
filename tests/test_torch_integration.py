"""The ops inside what torch wraps around them."""

import pytest
import torch
from calls import OPS, arguments, call, gradients, random_like
from torch.utils.checkpoint import checkpoint

import edt_kernels


@pytest.fixture
def _kernels(monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "triton")


def checkpoints_an_op(op: str, use_reentrant: bool, device: str) -> None:
    tensors = arguments(op, device=device)
    names, leaves = list(tensors), list(tensors.values())

    def forward(*values):
        return call(edt_kernels, op, dict(zip(names, values)))

    outputs = checkpoint(forward, *leaves, use_reentrant=use_reentrant)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # The reentrant form has gradients for .backward() only.
    torch.autograd.backward(outputs, random_like(outputs))
    expected = gradients(call(edt_kernels, op, tensors), tensors)
    for name, leaf in tensors.items():
        assert torch.equal(leaf.grad, expected[name]), name


@pytest.mark.interpreter
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_checkpointing_of_kernels_changes_no_gradient(op, use_reentrant):
    checkpoints_an_op(op, use_reentrant, "cpu")
