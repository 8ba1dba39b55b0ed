"""A real photograph through a network of Stable Diffusion 1.5's full size, with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from ip2p_engine import InstructPix2Pix
from ip2p_engine.images import read_settings, save_image
from ip2p_engine.networks.model import Model, ModelSpec

pytestmark = pytest.mark.slow

SD15 = ModelSpec(
    family="sd1",
    in_channels=8,
    prediction="eps",
    scaled_condition=False,
    latent_scale=0.18215,
    text_cfg=7.5,
    image_cfg=1.5,
    resolution=512,
    steps=100,
)
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def editor():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(in_channels=8, cross_attention_dim=768, attention_head_dim=8)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964 + 4 * 320 * 9
    autoencoder = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=SD15.latent_scale,
    )
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    for module in (unet, autoencoder, text):
        module.eval().requires_grad_(False)
    return InstructPix2Pix(Model(spec=SD15, unet=unet, autoencoder=autoencoder, text_encoders=(text,)))


@pytest.mark.parametrize("steps", [1, 2])
def test_size_orientation_and_settings_survive(editor, steps, tmp_path):
    data = pytest.importorskip("skimage.data")
    upright = Image.fromarray(data.coffee())  # 600 x 400
    path = tmp_path / "sideways.jpg"
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # as a phone held upright stores it: turn right to see it
    upright.rotate(90, expand=True).save(path, exif=exif, quality=95)

    result = editor.edit(path, "make it winter", steps=steps, resolution=256, seeds=5)[0]
    assert result.source.size == result.image.size == (600, 400)
    assert np.abs(np.asarray(result.source).astype(int) - np.asarray(upright).astype(int)).mean() < 4
    assert result.settings["edited_at"] == [256, 192]
    assert result.evaluations == 3 * steps

    save_image(result.image, tmp_path / "out.png", result.settings)
    assert read_settings(tmp_path / "out.png")["instruction"] == "make it winter"
    written = Image.open(tmp_path / "out.png")
    assert written.size == (600, 400)
    assert ORIENTATION not in written.getexif()
