"""What a training step does, and what does not change it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from image_folders import save_vae
from training_runs import (
    ROOT,
    TINY,
    differing,
    newest,
    run_to_end,
    small_arguments,
    small_config,
    state_of,
    tensors,
    write_moments,
)

from edt import load_checkpoint
from edt.cli import main
from edt.data.dataset import open_dataset, write_dataset
from edt.interrupt import StopRequest
from edt.model.transformer import EDTTransformer2DModel
from edt.runs.checkpoint import list_checkpoints
from edt.runs.log import read_metrics
from edt.train import start
from edt.train import trainer as train_module
from edt.train.config import recipe
from edt.train.state import TrainState
from edt.train.trainer import Trainer, train

pytestmark = pytest.mark.usefixtures("_tiny_training")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_moments(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def plain_run(_tiny_training, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("plain") / "run"
    train(small_config(data, output))
    return output


@pytest.fixture(scope="module")
def trained(_tiny_training, data, tmp_path_factory):
    """A checkpoint after some steps at a high rate: the zeros of the initial weights are gone."""
    config = small_config(data, tmp_path_factory.mktemp("trained") / "run", steps=5, learning_rate=1e-2)
    return train(config)


def make_trainer(config) -> Trainer:
    return Trainer(config, train_module.Accelerator(cpu=True, project_dir=config.output), StopRequest())


def metrics(output) -> list[dict]:
    return read_metrics(output / "metrics.jsonl")


def assert_close(one, other, part: str, relative: float) -> None:
    """Tensors of a part of two checkpoints, by the largest of each."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    compared = [name for name, tensor in first.items() if name.startswith(part) and tensor.ndim]
    assert len(compared) > 100
    for name in compared:
        assert (first[name] - second[name]).abs().max() <= relative * first[name].abs().max(), name


# What does not change the weights


@pytest.mark.parametrize(
    "fields",
    [
        {"sample_every": 2, "sample_count": 5, "num_inference_steps": 3, "guidance_scale": 1.5},
        {"log_every": 1},
        {"checkpoint_every": 1, "keep_checkpoints": 1},
        {"num_workers": 2},
        {"trackers": ("tensorboard",)},
        {"verify_data": False, "peak_tflops": 1.0, "max_skipped_steps": 1},
        {"max_grad_norm": 1e6},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_not_disturbed_by(data, plain_run, tmp_path, fields):
    train(small_config(data, tmp_path / "run", **fields))
    assert differing(newest(tmp_path / "run"), newest(plain_run)) == []
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == (3 if "sample_every" in fields else 0)
    if "trackers" in fields:
        assert list((tmp_path / "run" / "edt").rglob("events.out.tfevents*"))


def test_the_seed_decides(data, plain_run, tmp_path):
    torch.manual_seed(99)  # the global one does not
    for seed in (0, 1):
        train(small_config(data, tmp_path / str(seed), seed=seed))
    assert differing(newest(tmp_path / "0"), newest(plain_run)) == []
    assert len(differing(newest(tmp_path / "1"), newest(plain_run))) > 400


def test_averaged_weights_are_lent(data, tmp_path, trained):
    """In place, also where what is done with them fails."""
    trainer = make_trainer(small_config(data, tmp_path / "run", resume=str(trained)))
    model, averages = trainer.model, load_checkpoint(trained / "ema")
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    shadows = [average.clone() for average in trainer.state.ema.shadow_params]

    def use(fail: bool):
        with trainer.state.averaged_weights():
            assert not model.training
            for name, average in averages.named_parameters():
                assert torch.equal(model.get_parameter(name), average)
            assert len(set(before) - {n for n, p in model.named_parameters() if torch.equal(p, before[n][1])}) > 50
            if fail:
                raise KeyboardInterrupt

    use(fail=False)
    with pytest.raises(KeyboardInterrupt):
        use(fail=True)
    assert model.training
    for name, parameter in model.named_parameters():
        address, value = before[name]
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)
    assert all(map(torch.equal, trainer.state.ema.shadow_params, shadows))


# Steps


def test_it_learns(tmp_path):
    """A few images by heart."""
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 2, 2), dtype=np.uint8).repeat(4, 2).repeat(4, 3)
    write_dataset(tmp_path / "data", images, np.arange(4))
    train(small_config(tmp_path / "data", tmp_path / "run", steps=60, log_every=15, learning_rate=3e-3,
                       batch_size=16))  # fmt: skip
    losses = [line["full_loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < 0.6 * losses[0]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(("masking", "fields"), [(True, {}), (False, {}), (True, {"precision": "bf16"})])
def test_figures_and_samples_of_a_step(data, tmp_path, monkeypatch, trained, masking, fields):
    """Of passes: their number; of each sample: both losses, added up, at its timestep."""
    seen = []
    forward = EDTTransformer2DModel.forward

    def record(model, latents, *args, **kwargs):
        seen.append(len(latents))
        return forward(model, latents, *args, **kwargs)

    monkeypatch.setattr(EDTTransformer2DModel, "forward", record)
    train(small_config(data, tmp_path / "run", steps=1, masking=masking, log_every=1, init_from=trained / "model",
                       replace_head=False, **fields))  # fmt: skip
    assert seen[-1] == (16 if masking else 8)
    (line,) = metrics(tmp_path / "run")
    names = {"step", "full_loss", "gradient_norm", "learning_rate", "skipped_steps", "images_per_second",
             "peak_memory_gib", "tflops"}  # fmt: skip
    assert set(line) == names | ({"masked_loss"} if masking else set())
    saved = tensors(newest(tmp_path / "run"))
    counts, losses = (saved[f"training timestep_sampler/{name}"] for name in ("counts", "losses"))
    assert counts.sum() == 8
    # Each timestep is as likely at the start, and weights are 1.
    mean = (line["full_loss"] + line.get("masked_loss", 0)) * 8
    assert losses.sum().item() == pytest.approx(mean, rel=1e-6)
    assert all(tensor.dtype == torch.float32 for name, tensor in saved.items() if "timestep" not in name)


@pytest.mark.parametrize("warmup", [False, True])
def test_averages(data, tmp_path, warmup):
    train(small_config(data, tmp_path / "run", steps=3, checkpoint_every=1, ema_warmup=warmup))
    saved = [tensors(folder) for _, folder in list_checkpoints(tmp_path / "run" / "checkpoints")]
    decays = [0.9, 0.9] if not warmup else [2 / 11, 3 / 12]
    for before, after, decay in zip(saved, saved[1:], decays):
        for name in (name for name in before if name.startswith("ema ")):
            weights = after[name.replace("ema", "model", 1)]
            torch.testing.assert_close(after[name], decay * before[name] + (1 - decay) * weights)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_batch(data, tmp_path, trained, parts):
    """To rounding: float32 sums of 8 samples in another order, hence 1e-5 of a tensor's largest.

    Compared are gradients, as AdamW's mean of them has them after one step: updates are quotients of size 1 even
    where a gradient is rounding alone.
    """
    for number in (1, parts):
        train(small_config(data, tmp_path / str(number), steps=1, gradient_accumulation_steps=number,
                           optimizer="adamw", init_from=trained / "model", replace_head=False,
                           log_every=1))  # fmt: skip
    assert_close(newest(tmp_path / "1"), newest(tmp_path / str(parts)), "optimizer", 1e-5)
    (one,), (other,) = (metrics(tmp_path / str(number)) for number in (1, parts))
    for name in ("full_loss", "masked_loss", "gradient_norm"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)


def test_gradient_checkpointing_changes_nothing_but_memory(data, tmp_path, trained):
    for name in (False, True):
        train(small_config(data, tmp_path / str(name), steps=1, gradient_checkpointing=name, optimizer="adamw",
                           init_from=trained / "model", replace_head=False))  # fmt: skip
    assert_close(newest(tmp_path / "False"), newest(tmp_path / "True"), "optimizer", 1e-5)


def test_bfloat16_stays_near_float32(data, tmp_path, trained):
    for precision in ("fp32", "bf16"):
        train(small_config(data, tmp_path / precision, steps=1, precision=precision, log_every=1,
                           init_from=trained / "model", replace_head=False))  # fmt: skip
    (one,), (other,) = (metrics(tmp_path / precision) for precision in ("fp32", "bf16"))
    for name in ("full_loss", "gradient_norm"):
        assert one[name] == pytest.approx(other[name], rel=0.02)
        assert one[name] != other[name]


def test_large_gradients_are_scaled_down(data, tmp_path, monkeypatch, trained):
    """To the given norm, in their direction; smaller ones are left."""
    applied = []
    apply = TrainState.apply_gradients

    def record(state, learning_rate):
        applied.append(torch.cat([shard.grad.flatten() for shard in state.shards.values()]))
        apply(state, learning_rate)

    monkeypatch.setattr(TrainState, "apply_gradients", record)
    for norm in (None, 0.01):
        train(small_config(data, tmp_path / str(norm), steps=1, max_grad_norm=norm, log_every=1,
                           init_from=trained / "model", replace_head=False))  # fmt: skip
    whole, clipped = applied
    assert whole.norm() > 0.02
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-5)
    torch.testing.assert_close(clipped, whole * (0.01 / whole.norm()))
    for norm in (None, 0.01):  # the figure is that before
        assert metrics(tmp_path / str(norm))[0]["gradient_norm"] == pytest.approx(whole.norm().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("EDT-S/2", {0: 1e-3, 200_000: 5.25e-4, 400_000: 5e-5, 500_000: 5e-5}),
        ("EDT-B/2", {0: 1e-3, 400_000: 5e-5}),
        ("EDT-XL/2", {0: 5e-4, 200_000: 2.75e-4, 400_000: 5e-5, 500_000: 5e-5}),
    ],
)
def test_the_published_learning_rate(name, rates):
    config = recipe(name, data="data")
    assert (config.batch_size, config.optimizer, config.weight_decay) == (256, "adan", 0)
    for step, rate in rates.items():
        assert config.learning_rate_at(step) == pytest.approx(rate, rel=1e-12)


def test_the_learning_rate_warms_up_and_is_applied(data, tmp_path):
    fields = {"learning_rate": 1e-2, "final_learning_rate": 0.0, "decay_steps": 10, "warmup_steps": 4}
    train(small_config(data, tmp_path / "run", steps=6, log_every=1, **fields))
    expected = [min((step + 1) / 4, 1) * 1e-2 * (1 - step / 10) for step in range(6)]
    assert [line["learning_rate"] for line in metrics(tmp_path / "run")] == pytest.approx(expected, rel=1e-12)
    (group,) = state_of(newest(tmp_path / "run"))["optimizer"]["groups"]
    assert group["lr"] == pytest.approx(expected[-1], rel=1e-12)
    train(
        small_config(data, tmp_path / "still", steps=3, learning_rate=1e-2, warmup_steps=10**9, checkpoint_every=1)
    )
    weights = [tensors(folder) for _, folder in list_checkpoints(tmp_path / "still" / "checkpoints")]
    for name in (name for name in weights[0] if name.startswith("model")):
        torch.testing.assert_close(weights[0][name], weights[2][name], atol=1e-9, rtol=0)


# Models and data


def test_without_labels(data, tmp_path):
    train(small_config(data, tmp_path / "run", steps=2, unconditional=True, sample_every=2, num_inference_steps=2))
    assert load_checkpoint(newest(tmp_path / "run") / "ema").config.num_classes == 0
    unlabelled = tmp_path / "unlabelled"
    write_dataset(unlabelled, np.random.default_rng(0).normal(size=(9, 4, 8, 8)).astype(np.float32))
    train(small_config(unlabelled, tmp_path / "other", steps=1))
    assert load_checkpoint(newest(tmp_path / "other") / "model").config.num_classes == 0


def test_rectangular_latents(tmp_path):
    data = write_moments(tmp_path / "data", size=(8, 16))
    train(small_config(data, tmp_path / "run", steps=2, sample_every=2, num_inference_steps=2, sample_count=3))
    model = load_checkpoint(newest(tmp_path / "run") / "ema")
    assert tuple(model.config.sample_size) == (8, 16)
    assert (model.config.in_channels, model.config.out_channels, model.config.num_classes) == (4, 8, 3)


def test_fine_tuning_on_other_classes(data, tmp_path, trained, capsys):
    other = write_moments(tmp_path / "five", classes=5)
    config = small_config(other, tmp_path / "run", steps=1, learning_rate=1e-12, init_from=trained / "ema")
    train(config)
    assert "new are label_embedding.weight, final_layer." in capsys.readouterr().out
    before, after = (
        dict(load_checkpoint(f).named_parameters()) for f in (trained / "ema", newest(config.output) / "model")
    )
    assert after["label_embedding.weight"].shape[0] == 6
    same = [name for name in before if not name.startswith(("label_embedding", "final_layer"))]
    for name in same:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)
    assert after["final_layer.linear.weight"].abs().max() < 1e-6
    # It goes on from its own weights, not from those it started with.
    weights = tensors(newest(config.output))
    train(small_config(other, tmp_path / "run", steps=2, learning_rate=1e-12, init_from=trained / "ema"))
    assert "goes on from" in capsys.readouterr().out
    assert state_of(newest(config.output))["ema_steps"] == 2
    assert torch.equal(
        tensors(newest(config.output))["model label_embedding.weight"], weights["model label_embedding.weight"]
    )


def test_task_routing(data, plain_run, tmp_path):
    train(small_config(data, tmp_path / "run", task_routing=(0.5, 4.0)))
    assert list(load_checkpoint(newest(tmp_path / "run") / "ema").config.task_routing) == [0.5, 4.0]
    assert metrics(tmp_path / "run")[-1]["full_loss"] != metrics(plain_run)[-1]["full_loss"]


ENCODER = """
import torch
def tiny():
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 6, 4, stride=4)
"""


def pixels(folder):
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
    write_dataset(folder, images, np.arange(12) % 3, mirror=True)


def grey_pixels(folder):
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
    write_dataset(folder, images, np.arange(12) % 3)


def latents_with_images(folder):
    random = np.random.default_rng(0)
    latents = random.normal(size=(12, 2, 4, 8, 8)).astype(np.float32)
    images = random.integers(0, 256, (12, 3, 16, 16), dtype=np.uint8)
    write_dataset(folder, latents, np.arange(12) % 3, images=images)


@pytest.mark.parametrize("write", [pixels, grey_pixels, latents_with_images])
def test_alignment(tmp_path, monkeypatch, write):
    """Logged; the head is trained, saved beside the model, and restored."""
    (tmp_path / "tiny_encoders.py").write_text(ENCODER)
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path / "data")
    fields = {"alignment_encoder": "tiny_encoders:tiny", "alignment_weight": 2.0, "checkpoint_every": 3,
              "learning_rate": 1e-2}  # fmt: skip
    for output, ends in (("whole", (6,)), ("parts", (3, 6))):
        for steps in ends:
            train(small_config(tmp_path / "data", tmp_path / output, steps=steps, **fields))
    assert differing(newest(tmp_path / "whole"), newest(tmp_path / "parts")) == []
    lines = metrics(tmp_path / "whole")
    assert [line["alignment_loss"] for line in lines] == [
        line["alignment_loss"] for line in metrics(tmp_path / "parts")
    ]
    assert lines[-1]["alignment_loss"] < lines[0]["alignment_loss"]
    first, second = (tensors(folder) for _, folder in list_checkpoints(tmp_path / "whole" / "checkpoints"))
    heads = [name for name in first if name.startswith("training alignment.mlp")]
    assert len(heads) == 6
    assert not any(torch.equal(first[name], second[name]) for name in heads)
    assert not any("encoder" in name for name in first)
    assert any(name.startswith("optimizer alignment.mlp") for name in first)
    load_checkpoint(newest(tmp_path / "whole") / "ema")  # is the model alone
    # Without the alignment it is another run, not one with parameters left over.
    with pytest.raises(ValueError, match=r"has alignment\.mlp.*, which this run's model has not"):
        train(small_config(tmp_path / "data", tmp_path / "whole", steps=7))


def test_alignment_sees_the_images_of_its_samples(tmp_path, monkeypatch):
    """Of the same items, mirrored as they are, on the scale −1 to 1."""
    pixels(tmp_path / "data")
    seen = {"latents": [], "images": []}
    draw = train_module.draw
    monkeypatch.setattr(start, "load_image_encoder", lambda spec: torch.nn.Conv2d(3, 6, 4, stride=4))
    encode = train_module.encode
    for module in (start, train_module):
        monkeypatch.setattr(module, "encode", lambda e, images: seen["images"].append(images) or encode(e, images))
    monkeypatch.setattr(
        train_module,
        "draw",
        lambda m, s, latents, *args: seen["latents"].append(latents) or draw(m, s, latents, *args),
    )
    train(small_config(tmp_path / "data", tmp_path / "run", steps=3, alignment_encoder="any:one"))
    assert len(seen["latents"]) == 3
    assert all(map(torch.equal, seen["latents"], seen["images"][1:]))  # the first was for the features' shape


def test_grids(data, tmp_path):
    """At intervals and after the last step; the same noise each time."""
    train(small_config(data, tmp_path / "run", steps=5, sample_every=2, sample_count=6, num_inference_steps=2))
    grids = sorted((tmp_path / "run" / "samples").iterdir())
    assert [grid.name for grid in grids] == [f"step-{step:08d}.png" for step in (2, 4, 5)]
    assert all(grid.read_bytes()[:4] == b"\x89PNG" for grid in grids)


def test_the_command_line_says_what_it_does(data, tmp_path, capsys):
    assert main(small_arguments(data, tmp_path / "run", steps=3)) == 0
    said = capsys.readouterr().out
    count = sum(p.numel() for p in load_checkpoint(newest(tmp_path / "run") / "ema").parameters())
    assert f"tiny: {count:,} parameters" in said
    assert "20 images (4, 8, 8), 3 classes" in said
    assert "1 × cpu, one process, float32, reference path (plain torch)" in said
    assert "memory, estimated: " in said
    assert [step in said for step in (f"memory, measured until step {i}: " for i in (1, 2, 3))] == [
        True,
        True,
        False,
    ]
    # The command it ends with works.
    command = said.splitlines()[-1].split()
    assert command[:2] == ["edt", "sample"]
    command += ["--steps", "2", "--num-per-class", "1", "--output", str(tmp_path / "samples")]
    assert main(command[1:]) == 2
    assert "such as --vae stabilityai/sd-vae-ft-ema" in capsys.readouterr().err  # these data name none
    save_vae(tmp_path / "vae")
    assert main([*command[1:], "--vae", str(tmp_path / "vae")]) == 0
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (3, 16, 16, 3)


def test_checkpoints_load_as_models(data, plain_run):
    saved = newest(plain_run)
    weights = tensors(saved)
    for part in ("model", "ema"):
        model = load_checkpoint(saved / part)
        assert model.config.num_classes == 3
        assert tuple(model.config.hidden_sizes) == TINY["hidden_sizes"]
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[f"{part} {name}"])
    assert json.loads((saved / "state.json").read_text())["run"]["batch_size"] == 8
    assert open_dataset(data).num_classes == 3


@pytest.mark.slow  # Inductor takes minutes
def test_compiled_steps_agree_with_eager_ones(data, tmp_path, monkeypatch, trained):
    """Losses of three steps to 1e-3: the second and third are after updates that divide by gradients."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    for compiled in (False, True):
        arguments = small_arguments(data, tmp_path / str(compiled), steps=3, log_every=1, compile=compiled,
                                    init_from=trained / "model", replace_head=False, sample_every=2,
                                    num_inference_steps=2)  # fmt: skip
        run_to_end(arguments, tmp_path / "log", timeout=900)
    first, second = (metrics(tmp_path / str(compiled)) for compiled in (False, True))
    for one, other in zip(first, second, strict=True):
        for name in ("full_loss", "masked_loss", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)


# What a user set of float32 products, in a process of its own: torch has no way back from it.
SET_BY_USERS = {
    "nothing": "pass",
    "new": "torch.backends.fp32_precision = 'tf32'",
    "new, of convolutions": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "legacy": "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.allow_tf32 = False",
    "legacy of products": "torch.set_float32_matmul_precision('high')",
}
USE_TF32 = """
import torch
from edt.devices import tf32
{how}
cudnn = torch.backends.cudnn
def now():
    return [backend.fp32_precision for backend in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)]
def legacy():
    try:
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32
    except RuntimeError:
        return "mixed"
before, legacy_before = now(), legacy()
for allowed in (True, False):
    try:
        with tf32(allowed):
            assert now() == ["tf32" if allowed else "ieee"] * 3
            raise KeyError
    except KeyError:
        pass
    assert (now(), legacy()) == (before, legacy_before)
{then}
assert (now(), legacy()) == (before, legacy_before)
"""


@pytest.mark.parametrize("how", SET_BY_USERS)
def test_what_a_user_set_of_tf32_is_as_it_was(data, tmp_path, how):
    """And a run trains, whichever of torch's two switches it was."""
    config = small_config(data, tmp_path / "run", steps=1, precision="tf32")
    then = (
        "from pathlib import PosixPath\nfrom edt.model import PRESETS\nfrom edt.train import TrainConfig, train\n"
        f"PRESETS['tiny'] = {TINY}\ntrain({config})"
    )
    code = USE_TF32.format(how=SET_BY_USERS[how], then=then if how == "new" else "")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
