"""A model of SD1.5's size, with random weights, takes one step through a workflow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfy_prompts import edit
from comfy_server import succeed
from PIL import Image

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module")
def checkpoint(server):
    """One LDM file of the released checkpoint's shape; 2.1 GB in half precision, so it goes again afterwards."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from ip2p_engine.checkpoint.write import save_ldm
    from ip2p_engine.networks.model import Model, ModelSpec

    torch.manual_seed(0)
    spec = ModelSpec(
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
    autoencoder = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=spec.latent_scale,
    )
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    unet = UNet2DConditionModel(in_channels=8, cross_attention_dim=768, attention_head_dim=8)
    model = Model(spec=spec, unet=unet, autoencoder=autoencoder, text_encoders=(text,))
    path = server.base / "models" / "checkpoints" / "full-size.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_ldm(model, path, torch.float16)
    yield path
    path.unlink()
    server.post("/free", {"unload_models": True, "free_memory": True})


def test_a_full_size_model_takes_one_step(server, checkpoint):
    ramp = np.linspace(0, 255, 192, dtype=np.uint8)
    photo = Image.fromarray(np.stack([np.tile(ramp, (160, 1))] * 3, axis=-1))
    server.upload(photo, "ramp.png")
    prompt = edit("ramp.png", steps=1, text_cfg=7.5, resolution=192)
    prompt["load"]["inputs"]["checkpoint"] = checkpoint.name
    server.get("/object_info/IP2P_LoadCheckpoint")  # what pressing R does
    run = succeed(server.run(prompt))
    picture = run.pictures["save"][0]
    assert picture.size == (192, 160)
    assert np.asarray(picture.convert("RGB")).std() > 1
