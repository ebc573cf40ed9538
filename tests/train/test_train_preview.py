import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from matplotlib.image import imread
from PIL import ImageDraw
from training_runs import small_config, write_moments

from edt import EDTTransformer2DModel
from edt.data import pictures
from edt.data.digits import to_uint8
from edt.data.vae import decode, load_decoder
from edt.diffusion.sampler import NotFiniteError
from edt.train.config import TrainConfig
from edt.train.preview import draw_grid, save_grid
from edt.train.randomness import keyed_generator
from edt.train.trainer import train

SMALL = {
    "hidden_sizes": (16, 16, 16, 16, 16),
    "num_attention_heads": (2, 2, 2, 2, 2),
    "depths": (1, 1, 1, 1, 1),
    "sample_size": 8,
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, latent_channels=4,
                        scaling_factor=0.5, shift_factor=0.25)  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return vae.eval(), folder


@pytest.mark.parametrize(
    ("num_classes", "count", "labels"),
    [(5, 10, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]), (1000, 4, [0, 250, 500, 750]), (0, 3, [0, 0, 0])],
)
def test_classes_are_spread_evenly(tmp_path, num_classes, count, labels):
    model = EDTTransformer2DModel(**SMALL, num_classes=num_classes).eval()
    config = TrainConfig(data=tmp_path, sample_count=count, num_inference_steps=2)
    latents, drawn = draw_grid(model, config, keyed_generator("cpu", 0))
    assert latents.shape == (count, 4, 8, 8)
    assert drawn.tolist() == labels
    again, _ = draw_grid(model, config, keyed_generator("cpu", 0))
    assert torch.equal(latents, again)


def test_latents_that_are_not_finite_end_no_training(tmp_path):
    model = EDTTransformer2DModel(**SMALL, num_classes=5).eval()
    torch.nn.init.constant_(model.final_layer.linear.bias, torch.nan)
    config = TrainConfig(data=tmp_path, sample_count=5, num_inference_steps=2)
    latents, _ = draw_grid(model, config, keyed_generator("cpu", 0))
    assert latents.isnan().all()


@torch.no_grad()
def test_decode_undoes_the_scaling(vae):
    model, _ = vae
    latents = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(decode((latents - 0.25) * 0.5, model), model.decode(latents).sample)


def test_load_decoder(tmp_path, vae):
    _, folder = vae
    assert not load_decoder(str(folder), 4).training
    with pytest.raises(ValueError, match="has latents of 4 channels; 3 are needed here"):
        load_decoder(str(folder), 3)
    with pytest.raises(ValueError, match=r"vae is '.*nowhere', which cannot be loaded"):
        load_decoder(str(tmp_path / "nowhere"), 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("scaling_factor", x) for x in (None, "0.18", float("nan"), 0, True)), ("shift_factor", "0"),
     ("shift_factor", float("inf"))],
)  # fmt: skip
def test_a_vae_with_an_odd_scaling(tmp_path, vae, name, value):
    shutil.copytree(vae[1], tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ValueError, match=rf"^vae is '.*vae', with a {name} of "):
        load_decoder(str(tmp_path / "vae"), 4)


def test_pictures_that_are_not_finite_are_not_drawn(tmp_path, vae):
    file = tmp_path / "grid.png"
    with pytest.raises(NotFiniteError, match="vae makes pictures that are not finite"):
        save_grid(file, torch.full((2, 4, 8, 8), 1e38), np.array([0, 1]), "step 7", vae[0])
    assert not file.exists()
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(np.full((1, 1, 2, 2), np.nan))


@pytest.mark.usefixtures("_tiny_training")
def test_a_vae_that_overflows_ends_no_training(tmp_path, vae, capsys):
    model = AutoencoderKL.from_pretrained(vae[1])
    torch.nn.init.constant_(model.decoder.conv_out.bias, torch.inf)
    model.save_pretrained(tmp_path / "vae")
    data = write_moments(tmp_path / "data")
    fields = {"steps": 2, "sample_every": 1, "num_inference_steps": 1, "vae": str(tmp_path / "vae")}
    train(small_config(data, tmp_path / "run", **fields))
    said = "step {}: vae makes pictures that are not finite; no grid is drawn"
    out = capsys.readouterr().out
    assert all(said.format(step) in out for step in (1, 2))
    assert not (tmp_path / "run" / "samples").exists()


@pytest.mark.usefixtures("_tiny_training")
def test_the_classes_of_the_data_are_named(tmp_path, monkeypatch):
    texts, write = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *a, **k: texts.append(a[2]) or write(*a, **k))
    fields = {"steps": 1, "sample_every": 1, "sample_steps": 1, "sample_count": 4}
    train(small_config(write_moments(tmp_path / "data"), tmp_path / "run", **fields))
    assert texts == ["step 1", "latents; --vae decodes", "a", "b", "c"]


@pytest.mark.parametrize(
    ("labels", "shape"), [([0, 0, 1, 1], "grid"), ([0, 5, 7, 9], "mosaic"), ([0] * 4, "mosaic")]
)
def test_what_is_drawn(tmp_path, monkeypatch, vae, labels, shape):
    drawn = []
    for name in ("save_label_grid", "save_mosaic"):
        save = getattr(pictures, name)
        monkeypatch.setattr(
            pictures, name, lambda *a, name=name, save=save, **k: drawn.append((name, a)) or save(*a, **k)
        )
    for kind, latents, folder in (
        ("pixels", torch.randn(4, 3, 8, 8), None),
        ("decoded", torch.randn(4, 4, 8, 8), vae[0]),
        ("latents", torch.randn(4, 4, 8, 8), None),
    ):
        save_grid(tmp_path / "samples" / f"{kind}.png", latents, np.array(labels), "step 7", folder)
        assert imread(tmp_path / "samples" / f"{kind}.png").std() > 0.05
    assert {name for name, _ in drawn} == {"save_label_grid" if shape == "grid" else "save_mosaic"}
    assert [arguments[1].shape[1:] for _, arguments in drawn] == [(8, 8, 3), (16, 16, 3), (8, 8, 3)]
    assert [arguments[-1] for _, arguments in drawn] == ["step 7", "step 7", "step 7\nlatents; --vae decodes"]
