"""EDT entirely on the Triton kernels: the released implementation's numbers, interpreted and on a GPU."""

import pytest
import torch
from released import fixture, relative_error, released_model, tiny_model, under

import edt
from benchmarks.budget import assert_within_budget
from edt.runs.weights import to_released_state_dict

PARITY = 1e-5


def parity(device: str) -> None:
    released = {name: tensor.to(device) for name, tensor in fixture("edt_tiny_s").items()}
    inputs = released["in.x"], released["in.t"], released["in.y"]
    model = released_model().to(device).eval()
    with torch.no_grad():
        assert relative_error(model(*inputs).sample, released["out.amm"]) <= PARITY
        model.set_amm_blocks(())
        assert relative_error(model(*inputs).sample, released["out.no_amm"]) <= PARITY
    masks = [released[f"mask.{i}.keep"].bool() for i in range(2)]
    out = model.train()(*inputs, keep_masks=masks).sample
    assert relative_error(out.detach(), released["out.masked_train"]) <= PARITY
    (out * released["grad.weight"]).sum().backward()
    gradients = to_released_state_dict(model, {name: p.grad for name, p in model.named_parameters()})
    for name, expected in under("grad", released).items():
        if name != "weight":
            assert relative_error(gradients[name], expected) <= PARITY, name


@pytest.mark.interpreter
def test_interpreted_kernels_reproduce_the_released_model(monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "triton")
    parity("cpu")


@pytest.mark.gpu
def test_gpu_kernels_reproduce_the_released_model(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    parity("cuda")


def train_step(model, device: str) -> dict[str, torch.Tensor]:
    """Output and all gradients of a masked forward pass, under bfloat16 autocast unless the model is float64."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(4, 4, 16, 16, generator=generator).to(device, model.dtype)
    masks = [mask.to(device) for mask in model.draw_keep_masks(4, generator)]
    labels, timestep = torch.arange(4, device=device), torch.arange(4, device=device) * 250
    with torch.autocast(device, dtype=torch.bfloat16, enabled=model.dtype != torch.float64):
        out = model(latents, timestep, labels, masks).sample
    out.float().square().mean().backward()
    return {"out": out.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.mark.gpu
def test_gpu_kernels_train_as_well_as_eager_under_autocast(monkeypatch):
    def run(backend: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        monkeypatch.setenv("EDT_KERNELS_BACKEND", backend)
        return train_step(tiny_model().to("cuda", dtype).train(), "cuda")

    kernels, eager = run("triton"), run("reference")
    exact = run("reference", torch.float64)
    for name in exact:
        assert_within_budget(name, kernels[name].float(), exact[name].double(), eager[name].float())


@pytest.mark.gpu
def test_gpu_model_compiles_without_a_graph_break():
    model = tiny_model().to("cuda").train()
    eager = train_step(model, "cuda")
    model.zero_grad()
    compiled = train_step(torch.compile(model, fullgraph=True), "cuda")
    compiled = {name.removeprefix("_orig_mod."): tensor for name, tensor in compiled.items()}
    for name in eager:
        assert relative_error(compiled[name].float(), eager[name].float()) <= 3e-2, name


@pytest.mark.gpu
def test_gpu_sampling_runs_on_the_kernels():
    model = tiny_model(class_dropout_prob=0.1).to("cuda").eval()
    latents = edt.sample(model, torch.tensor([1, 2]), num_inference_steps=5, guidance_scale=2.0, progress=False)
    assert latents.shape == (2, 4, 16, 16)
    assert torch.isfinite(latents).all()
