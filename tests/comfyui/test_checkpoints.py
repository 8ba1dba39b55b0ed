"""What we export is what stock ComfyUI and diffusers load: one denoising step agrees in all three.

Needs a ComfyUI checkout: COMFYUI_PATH=... pytest tests/comfyui
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from ip2p_engine.conditioning import Conditioning, encode_image, encode_text
from ip2p_engine.denoiser import guided_denoiser, input_scale
from ip2p_engine.model import Model, ModelSpec, convert, load_model

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
SCRIPT = Path(__file__).with_name("one_step.py")
SIGMA = 2.345
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


@pytest.fixture(scope="module")
def comfyui():
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("set COMFYUI_PATH to a ComfyUI checkout")
    return Path(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A randomly initialised model of SD1.5's size: (folder, the single file that `convert` makes of it)."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(in_channels=8, cross_attention_dim=768, attention_head_dim=8)
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
    from ip2p_engine.checkpoint.export import save_diffusers

    folder = tmp_path_factory.mktemp("sd15") / "folder"
    model = Model(spec=SD15, unet=unet, autoencoder=autoencoder, text_encoders=(text,))
    save_diffusers(model, folder, torch.float16)
    return folder, convert(folder, folder.parent / "model.safetensors", to="ldm")


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(1, 4, 32, 32, generator=generator) * SIGMA,
        "sigma": torch.tensor([SIGMA]),
        "pixels": torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1,
    }


def test_three_loaders_take_one_step_alike(comfyui, exported, inputs, tmp_path):
    folder, file = exported
    model = load_model(file, dtype=torch.float32)
    image, text = encode_image(model, inputs["pixels"]), encode_text(model, ["turn him into a cyborg"])
    cond = Conditioning(text=text, null_text=text, image=image)
    with torch.inference_mode(), guided_denoiser(model, 1.0, 1.0) as denoiser:
        ours = denoiser(inputs["x"], SIGMA, cond)

    save_file({**inputs, "image": image, "text": text.tokens}, tmp_path / "in.safetensors")
    subprocess.run(
        [sys.executable, str(SCRIPT), str(file), str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")],
        cwd=comfyui,
        check=True,
    )
    theirs = load_file(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as written:
        assert written.metadata()["config"] == "SD15_instructpix2pix"

    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.inference_mode():
        scaled = torch.cat([inputs["x"] * input_scale(SIGMA), image], dim=1)
        eps = pipe.unet(scaled, model.timestep(SIGMA), text.tokens).sample
        diffusers_step = inputs["x"] - SIGMA * eps

    # fp32 on one CPU; the three differ in the order of sums (attention kernels, fused projections) alone
    distances = {
        "diffusers step": (ours - diffusers_step).abs().max().item(),
        "ComfyUI step": (ours - theirs["denoised"]).abs().max().item(),
        "ComfyUI text": (text.tokens - theirs["text"]).abs().max().item(),
        "ComfyUI image": (image - theirs["image"]).abs().max().item(),
    }
    sys.stdout.write(f"{distances}\n")
    assert distances["diffusers step"] < 1e-4
    assert distances["ComfyUI step"] < 1e-4
    assert distances["ComfyUI text"] < 1e-3
    assert distances["ComfyUI image"] < 1e-3
