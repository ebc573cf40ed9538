"""The ops and the model inside what torch wraps around them: compile, autocast, checkpoints, DDP, CUDA graphs."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import CALLS, OPS, arguments, call, gradients, random_like
from released import relative_error, tiny_model
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import edt_kernels

interpreter, gpu, slow = pytest.mark.interpreter, pytest.mark.gpu, pytest.mark.slow

PARITY = 1e-5  # the largest relative error that another order of float32 operations may make


@pytest.fixture
def _kernels(monkeypatch):
    monkeypatch.setenv("EDT_KERNELS_BACKEND", "triton")


def small_model(**overrides):
    """One block a stage, to be compiled and interpreted in seconds."""
    sizes = {"hidden_sizes": (16, 24, 32, 24, 16), "num_attention_heads": (2, 3, 4, 3, 2), "depths": (1,) * 5}
    return tiny_model(**{**sizes, "amm_blocks": (4,), "sample_size": 8, "patch_size": 1, **overrides})


def model_inputs(model, seed: int, batch_size: int = 2, device="cpu"):
    """Latents, timesteps, labels and keep masks, of other contents for another seed."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch_size, 4, *model.latent_size, generator=generator)
    timestep = torch.randint(1000, (batch_size,), generator=generator)
    labels = torch.randint(10, (batch_size,), generator=generator)
    masks = model.draw_keep_masks(batch_size, generator)
    return [*(tensor.to(device) for tensor in (latents, timestep, labels)), [mask.to(device) for mask in masks]]


def train_step(forward, model, inputs) -> dict[str, torch.Tensor]:
    """The output and all gradients of the model, for a random upstream gradient."""
    model.zero_grad()
    (sample,) = forward(*inputs, return_dict=False)
    sample.backward(*random_like((sample,)))
    return {"sample": sample.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def compiles(backend: str, device: str, modes=("train", "sample"), **sizes) -> None:
    model = small_model(**sizes).to(device)
    inputs, others = (model_inputs(model, seed, device=device) for seed in (0, 1))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    if "train" in modes:
        train_step(compiled, model.train(), inputs)
        with torch.compiler.set_stance("fail_on_recompile"):
            actual = train_step(compiled, model, others)
        expected = train_step(model, model, others)
        for name in expected:
            assert relative_error(actual[name], expected[name]) <= PARITY, name
    if "sample" in modes:  # with AMM
        model.eval()
        with torch.no_grad():
            compiled(*inputs[:3])
            with torch.compiler.set_stance("fail_on_recompile"):
                actual = compiled(*others[:3]).sample
            assert relative_error(actual, model(*others[:3]).sample) <= PARITY


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler on the CPU")


@pytest.mark.parametrize(
    ("backend", "mode"),
    [
        ("aot_eager", "train"),
        ("aot_eager", "sample"),
        pytest.param("inductor", "train", marks=[pytest.mark.long, needs_compiler]),
        pytest.param("inductor", "sample", marks=[slow, needs_compiler]),
    ],
)
def test_the_model_compiles_once_whatever_the_batch_holds(backend, mode):
    alike = {"hidden_sizes": (16,) * 5, "num_attention_heads": (2,) * 5, "depths": (1,) * 5, "amm_blocks": (3,)}
    # g++ takes a second for each shape, of which there are 90.
    compiles(backend, "cpu", [mode], **(alike if backend == "inductor" else {}))


@interpreter
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    ("backend", "mode"),
    [
        ("aot_eager", "train"),
        pytest.param("aot_eager", "sample", marks=slow),
        pytest.param("inductor", "train", marks=[slow, needs_compiler]),
    ],
)
def test_the_model_on_kernels_compiles_once_whatever_the_batch_holds(backend, mode):
    compiles(backend, "cpu", [mode])


@gpu
def test_gpu_the_model_on_kernels_compiles_once_whatever_the_batch_holds(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    compiles("inductor", "cuda")


def normed_dtype_under_autocast(dtype: torch.dtype, device: str) -> None:
    for op in OPS:
        tensors = arguments(op, device=device)
        with torch.autocast(device, dtype=dtype):
            outputs = call(edt_kernels, op, tensors)
        stream = {"gated_residual": (torch.float32,), "gated_residual_adaln": (torch.float32, dtype)}
        assert tuple(out.dtype for out in outputs) == stream.get(op, (dtype,)), op
        for name, grad in gradients(outputs, tensors).items():
            assert grad.dtype == tensors[name].dtype, f"{op}: {name}"
            assert torch.isfinite(grad).all(), f"{op}: {name}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_norms_its_dtype_and_leaves_the_stream(dtype):
    normed_dtype_under_autocast(dtype, "cpu")


@interpreter
@pytest.mark.usefixtures("_kernels")
def test_autocast_of_kernels_gives_norms_its_dtype_and_leaves_the_stream():
    normed_dtype_under_autocast(torch.float16, "cpu")


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_autocast_gives_norms_its_dtype_and_leaves_the_stream(dtype):
    normed_dtype_under_autocast(dtype, "cuda")


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


def checkpoints_the_model(use_reentrant: bool, device: str) -> None:
    model = small_model().to(device).train()
    inputs = model_inputs(model, 0, device=device)
    expected = train_step(model, model, inputs)
    model.enable_gradient_checkpointing(
        lambda block, *values: checkpoint(block.__call__, *values, use_reentrant=use_reentrant)
    )
    actual = train_step(model, model, inputs)
    for name in expected:
        if use_reentrant:  # adds the gradients of the conditioning in another order
            assert relative_error(actual[name], expected[name]) <= PARITY, name
        else:
            assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(use_reentrant):
    for op in OPS:
        checkpoints_an_op(op, use_reentrant, "cpu")
    checkpoints_the_model(use_reentrant, "cpu")


@interpreter
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_checkpointing_of_kernels_changes_no_gradient(op, use_reentrant):
    checkpoints_an_op(op, use_reentrant, "cpu")


@interpreter
@pytest.mark.usefixtures("_kernels")
def test_checkpointing_of_the_model_on_kernels_changes_no_gradient():
    checkpoints_the_model(use_reentrant=False, device="cpu")


@gpu
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gpu_checkpointing_changes_no_gradient(use_reentrant):
    torch.use_deterministic_algorithms(True, warn_only=True)  # of torch's own ops around ours
    try:
        for op in CALLS:
            checkpoints_an_op(op, use_reentrant, "cuda")
        checkpoints_the_model(use_reentrant, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_model_takes_func_transforms():
    model = small_model().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    latents, timestep, labels, _ = model_inputs(model, 0)

    def loss(parameters):
        arguments = (latents, timestep, labels)
        return torch.func.functional_call(model, parameters, arguments).sample.square().mean()

    grads = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(loss(dict(model.named_parameters())), list(model.parameters()))
    for (name, grad), other in zip(grads.items(), expected, strict=True):
        torch.testing.assert_close(grad, other, msg=name)


def first_output(op: str, tensors: dict):
    """The op as a function of its first argument."""
    name, *_ = tensors
    others = {key: tensor.detach() for key, tensor in tensors.items() if key != name}
    return tensors[name].detach(), lambda value: call(edt_kernels, op, {name: value, **others})[-1]


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "grad": lambda f, x: torch.func.grad(lambda value: f(value).sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
}


def forward_mode(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


FORWARD_MODES = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "dual tensors": forward_mode,
    "dual tensors that require gradients": lambda f, x: forward_mode(f, x.clone().requires_grad_()),
}


@interpreter
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_func_transforms_of_kernels_are_refused(op, transform):
    x, function = first_output(op, arguments(op))
    with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch transforms"):
        TRANSFORMS[transform](function, x)


@interpreter
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("transform", FORWARD_MODES)
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_of_kernels_is_refused(op, transform):
    x, function = first_output(op, arguments(op))
    with pytest.raises(RuntimeError, match=r"autograd\.Function"):
        FORWARD_MODES[transform](function, x)


@interpreter
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("op", OPS)
def test_kernels_read_values_that_are_stored_negated(op):
    """As torch keeps the imaginary part of a conjugate."""
    x, function = first_output(op, arguments(op))
    assert torch.equal(function(torch._neg_view(-x)), function(x))


@interpreter
@pytest.mark.usefixtures("_kernels")
def test_kernels_run_in_a_dual_level_that_does_not_concern_them():
    x, function = first_output("adaln", arguments("adaln"))
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(function(x), function(x.clone()))


@interpreter
@pytest.mark.usefixtures("_kernels")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", OPS)
def test_batched_upstream_gradients_are_those_one_by_one(op):
    tensors = arguments(op)
    outputs = call(edt_kernels, op, tensors)[-1:]
    upstream = torch.randn(3, *outputs[0].shape)
    leaves = list(tensors.values())
    batched = torch.autograd.grad(outputs, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(upstream):
        for actual, expected in zip(batched, torch.autograd.grad(outputs, leaves, grad, retain_graph=True)):
            assert torch.equal(actual[i], expected)


@pytest.mark.parametrize("op", OPS)
def test_the_reference_takes_func_transforms(op):
    x, function = first_output(op, arguments(op, dtype=torch.float64))
    weight = torch.randn_like(function(x))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf, weight)
    grad = torch.func.grad(lambda value: (function(value) * weight).sum())(x)
    torch.testing.assert_close(grad, expected)
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(function, (x,), (direction,))
    torch.testing.assert_close((tangent * weight).sum(), (expected * direction).sum())


@pytest.mark.parametrize("op", OPS)
def test_the_reference_maps_over_all_arguments(op):
    tensors = {name: tensor.detach() for name, tensor in arguments(op).items()}
    several = {name: torch.randn(3, *tensor.shape) for name, tensor in tensors.items()}
    mapped = torch.func.vmap(functools.partial(call, edt_kernels, op))(several)
    for i in range(3):
        expected = call(edt_kernels, op, {name: tensor[i] for name, tensor in several.items()})
        for actual, out in zip(mapped, expected, strict=True):
            torch.testing.assert_close(actual[i], out)


@pytest.mark.parametrize("op", CALLS)
def test_the_reference_maps_over_each_argument_alone(op):
    tensors = {name: tensor.detach() for name, tensor in arguments(op).items()}
    for name, tensor in tensors.items():
        several = torch.randn(3, *tensor.shape)
        mapped = torch.func.vmap(lambda value, name=name: call(edt_kernels, op, {**tensors, name: value}))(several)
        for i in range(3):
            expected = call(edt_kernels, op, {**tensors, name: several[i]})
            for actual, out in zip(mapped, expected, strict=True):
                torch.testing.assert_close(actual[i], out)


def test_the_reference_has_a_forward_mode_without_gradients():
    """Where else torch's own attention computes it, which has none."""
    x, function = first_output("amm_attention", arguments("amm_attention, bias alone"))
    expected = torch.func.jvp(function, (x,), (x,))
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jvp(function, (x,), (x,)), expected)


THREADS = """
import sys, threading, torch, edt_kernels
from calls import CALLS, arguments, call, gradients

def results(op):
    tensors = arguments(op, grid=(2, 2), channels=8)
    outputs = call(edt_kernels, op, tensors, (2, 2))
    return [*outputs, *gradients(outputs, tensors).values()]

expected, wrong = {op: results(op) for op in CALLS}, []

def work(first):
    for op in (*CALLS[first:], *CALLS[:first]):
        wrong.extend(op for a, b in zip(results(op), expected[op], strict=True) if not torch.equal(a, b))

threading.excepthook = lambda raised: wrong.append(repr(raised.exc_value)[:200])
threads = [threading.Thread(target=work, args=(first,)) for first in range(len(CALLS))]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
sys.exit(f"wrong: {wrong}" if wrong else 0)
"""


@interpreter
@pytest.mark.usefixtures("_kernels")
def test_interpreted_kernels_take_several_threads():
    """The interpreter has one running program for all: without a lock results are wrong, or memory is corrupted.
    Hence a process of its own."""
    here = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    result = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]


def runs_in_deterministic_mode(device: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for op in CALLS:
            tensors = arguments(op, device=device)
            gradients(call(edt_kernels, op, tensors), tensors)
    finally:
        torch.use_deterministic_algorithms(False)


@interpreter
@pytest.mark.usefixtures("_kernels")
def test_kernels_run_in_strict_deterministic_mode():
    runs_in_deterministic_mode("cpu")


@gpu
def test_gpu_kernels_run_in_strict_deterministic_mode():
    runs_in_deterministic_mode("cuda")


@gpu
@pytest.mark.parametrize("op", CALLS)
def test_gpu_graph_capture_of_forward_and_backward(op):
    """What a replay computes from other contents is what a plain call computes from them."""
    tensors = arguments(op, dtype=torch.bfloat16, device="cuda")
    upstream = random_like(call(edt_kernels, op, tensors))

    def step():
        outputs = call(edt_kernels, op, tensors)
        return (*outputs, *torch.autograd.grad(outputs, list(tensors.values()), upstream))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile outside the capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in (*tensors.values(), *upstream):
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


def joined_by_gloo(worker, folder) -> list[dict[str, torch.Tensor]]:
    """What `worker(rank)` returns in each of two processes."""
    multiprocessing.spawn(_join_and_run, (worker, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _join_and_run(rank: int, worker, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=2)
    try:
        torch.save(worker(rank), os.path.join(folder, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()


def loss_and_gradients(model, forward, inputs, part=slice(None)) -> dict[str, torch.Tensor]:
    latents, timestep, labels, masks = inputs
    sample = forward(latents[part], timestep[part], labels[part], [mask[part] for mask in masks]).sample
    loss = sample.square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    whole = {
        name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in gradients.items()
    }
    return {"loss": loss.detach()} | whole


def _ddp_steps(rank: int) -> dict[str, torch.Tensor]:
    model = small_model().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(rank)  # the first process's are broadcast
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    inputs, part = model_inputs(model, 0, batch_size=4), slice(2 * rank, 2 * rank + 2)
    wrapped(*inputs).sample.sum().backward()  # the next step fails where a parameter got no gradient in this one
    model.zero_grad()
    return loss_and_gradients(model, wrapped, inputs, part)


def _fsdp_step(rank: int) -> dict[str, torch.Tensor]:
    model = small_model().train()
    mesh = init_device_mesh("cpu", (2,))
    for stage in model.stages:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    part = slice(2 * rank, 2 * rank + 2)
    return loss_and_gradients(model, model, model_inputs(model, 0, batch_size=4), part)


def _ddp_and_fsdp_steps(rank: int) -> dict[str, torch.Tensor]:
    """One after the other, because starting the processes takes most of the time."""
    return {
        f"{kind} {name}": tensor
        for kind, step in (("ddp", _ddp_steps), ("fsdp", _fsdp_step))
        for name, tensor in step(rank).items()
    }


def is_one_process_with_the_joined_batch(results: list[dict[str, torch.Tensor]], kinds) -> None:
    model = small_model().train()
    expected = loss_and_gradients(model, model, model_inputs(model, 0, batch_size=4))
    for kind in kinds:
        losses = [rank[f"{kind} loss"].item() for rank in results]
        assert sum(losses) / 2 == pytest.approx(expected["loss"].item(), rel=1e-6), kind
        for name, _ in model.named_parameters():
            for rank in results:
                assert relative_error(rank[f"{kind} {name}"], expected[name]) <= PARITY, f"{kind}: {name}"


def test_two_processes_train_as_one_with_the_joined_batch(tmp_path):
    results = joined_by_gloo(_ddp_and_fsdp_steps, tmp_path)
    is_one_process_with_the_joined_batch(results, ("ddp", "fsdp"))


@slow
@interpreter
@pytest.mark.usefixtures("_kernels")
def test_two_processes_on_kernels_train_as_one_with_the_joined_batch(tmp_path):
    results = joined_by_gloo(_ddp_and_fsdp_steps, tmp_path)
    is_one_process_with_the_joined_batch(results, ("ddp", "fsdp"))
