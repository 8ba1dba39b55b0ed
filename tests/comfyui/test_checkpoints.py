"""What we export is what stock ComfyUI and diffusers load: one denoising step agrees in all three.

ComfyUI rounds a sigma to the nearest of the 1000 timesteps where the original and diffusers take a fractional one, so
the comparison is made at a sigma of the ladder. There it is fp32 on one CPU against fp32 on one CPU: the three differ
in the order of sums alone (attention kernels, fused projections).
"""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ip2p_engine import InstructPix2Pix
from ip2p_engine.checkpoint.spec import recommended
from ip2p_engine.checkpoint.write import ldm_state, save_diffusers, save_ldm
from ip2p_engine.diffusion.guidance import DualGuidance
from ip2p_engine.diffusion.noise import SampleNoise
from ip2p_engine.diffusion.sampling import sample
from ip2p_engine.diffusion.schedule import DiscreteSchedule, make_sigmas
from ip2p_engine.networks.conditioning import Conditioning, TextEmbedding, encode_image, encode_text, size_ids
from ip2p_engine.networks.denoiser import BranchDenoiser, input_scale
from ip2p_engine.networks.model import Model, ModelSpec, convert, load_model

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
SIGMA = float(DiscreteSchedule.stable_diffusion().sigmas[500])
STEP_TOLERANCE = 1e-4
XL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
KNOWN_AS = {
    "sd1": ("SD15_instructpix2pix", "EPS"),
    "sd2": ("SD20", "EPS"),
    "sdxl": ("SDXL_instructpix2pix", "EPS"),
    "cosxl": ("SDXL_instructpix2pix", "V_PREDICTION_EDM"),
}


def spec_of(family: str, channels: int = 8) -> ModelSpec:
    edm = family == "cosxl"
    kind = {"prediction": "v" if edm else "eps", "schedule": "edm" if edm else "ddpm"}
    return ModelSpec(family=family, in_channels=channels, **kind, **recommended(family, channels))


def autoencoder_of(family: str, widths=(128, 256, 512, 512), layers=2) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=layers,
        scaling_factor=spec_of(family).latent_scale,
    )


def clip_of(width: int, layers: int, act: str, kind=CLIPTextModel, **more):
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return kind(CLIPTextConfig(**sizes, num_attention_heads=width // 64, hidden_act=act, projection_dim=width, **more))


def full_size(family: str, channels: int = 8) -> Model:
    """An edit model of the published size."""
    texts = (clip_of(768, 12, "quick_gelu"),)
    if family == "sd1":
        unet = UNet2DConditionModel(in_channels=channels, cross_attention_dim=768, attention_head_dim=8)
    elif family == "sd2":
        heads = {"attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
        unet = UNet2DConditionModel(in_channels=8, cross_attention_dim=1024, **heads)
        texts = (clip_of(1024, 23, "gelu"),)
    else:
        unet = UNet2DConditionModel(
            in_channels=8,
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            **XL_BLOCKS,
        )
        texts = (*texts, clip_of(1280, 32, "gelu", CLIPTextModelWithProjection))
    return Model(spec=spec_of(family, channels), unet=unet, autoencoder=autoencoder_of(family), text_encoders=texts)


def narrow(family: str) -> Model:
    """SDXL's structure with heads of 64, as ComfyUI's SDXL classes have them, and little else."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=8,
        block_out_channels=(64, 128, 128),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        layers_per_block=1,
        cross_attention_dim=128,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 64,
        **XL_BLOCKS,
    )
    words = {"vocab_size": 600, "bos_token_id": 598, "eos_token_id": 599}
    texts = (clip_of(64, 2, "quick_gelu", **words), clip_of(64, 2, "gelu", CLIPTextModelWithProjection, **words))
    autoencoder = autoencoder_of(family, widths=(32, 32, 32, 32), layers=1)
    return Model(spec=spec_of(family), unet=unet, autoencoder=autoencoder, text_encoders=texts)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A randomly initialised model of SD1.5's size: (folder, the single file that `convert` makes of it)."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("minutes and 8 GB; set COMFYUI_PATH to a ComfyUI checkout to run it")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd15") / "folder"
    save_diffusers(full_size("sd1"), folder, torch.float16)
    return folder, convert(folder, folder.parent / "model.safetensors", to="ldm")


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(1, 4, 32, 32, generator=generator) * SIGMA,
        "sigma": torch.tensor([SIGMA]),
        "pixels": torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1,
    }


def largest(ours, theirs) -> float:
    return (ours - theirs).abs().max().item()


@torch.inference_mode()
def our_step(file, inputs) -> dict[str, torch.Tensor]:
    """Denoised, text, image condition and t by our loader; the model is let go before the next loader's turn."""
    model = load_model(file, dtype=torch.float32)
    image, text = encode_image(model, inputs["pixels"]), encode_text(model, ["turn him into a cyborg"])
    cond = Conditioning(text=text, null_text=text, image=image)
    denoiser = DualGuidance(BranchDenoiser(model), 1.0, 1.0)
    denoised = denoiser(inputs["x"], SIGMA, cond)
    return {"denoised": denoised, "text": text.tokens, "image": image, "t": model.timestep(SIGMA)}


@torch.inference_mode()
def diffusers_step(folder, inputs, ours) -> torch.Tensor:
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    scaled = torch.cat([inputs["x"] * input_scale(SIGMA), ours["image"]], dim=1)
    return inputs["x"] - SIGMA * pipe.unet(scaled, ours["t"], ours["text"]).sample


def test_three_loaders_take_one_step_alike(in_comfyui, exported, inputs, tmp_path):
    folder, file = exported
    ours = our_step(file, inputs)
    save_file({**inputs, **ours}, tmp_path / "in.safetensors")
    in_comfyui("one_step.py", file, tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    theirs = load_file(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as written:
        assert written.metadata()["config"] == "SD15_instructpix2pix"
    distances = {f"ComfyUI {name}": largest(ours[name], value) for name, value in theirs.items()}
    distances["diffusers denoised"] = largest(ours["denoised"], diffusers_step(folder, inputs, ours))
    sys.stdout.write(f"{distances}\n")
    assert len(distances) == 4
    assert {name: gap for name, gap in distances.items() if not gap < STEP_TOLERANCE} == {}


@pytest.mark.parametrize(("family", "channels"), [("sd1", 12), ("sd2", 8)])
def test_what_core_takes_for_another_kind_edits_by_our_loader(family, channels, in_comfyui, tmp_path):
    """SD2, and UltraEdit's 12 channels, at full size: told the picture and the mask, one step as headless."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("minutes and 8 GB; set COMFYUI_PATH to a ComfyUI checkout to run it")
    torch.manual_seed(0)
    file = save_ldm(full_size(family, channels), tmp_path / "full.safetensors", torch.float16)
    editor = InstructPix2Pix.load(str(file), device="cpu", dtype=torch.float32)
    picture = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    mask = Image.radial_gradient("L").resize((64, 64))
    with torch.inference_mode():
        condition = editor.condition(picture, "make it snow", masks=mask if channels == 12 else None, size="keep")
    how = {"seeds": 7, "steps": 1, "sampler": "euler", "schedule": "model", "text_cfg": 7.5, "image_cfg": 1.5}
    ours = editor.edit(picture, "make it snow", masks=mask if channels == 12 else None, size="keep", **how)[0].latent
    image, *told = condition.image.split(4, dim=1)
    del editor
    save_file(
        {"image": image.contiguous(), **({"told": told[0].contiguous()} if told else {})}, tmp_path / "in.safetensors"
    )
    in_comfyui("loaded_edit.py", file, tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    theirs = load_file(tmp_path / "out.safetensors")["latent"][0] * spec_of(family).latent_scale
    distance = largest(ours, theirs) / ours.abs().max().item()
    sys.stdout.write(f"{family}, {channels} channels: {distance}\n")
    assert distance < STEP_TOLERANCE


def test_comfyui_knows_the_name_and_shape_of_every_tensor_at_full_size(in_comfyui, tmp_path):
    with torch.device("meta"):
        states = {family: ldm_state(full_size(family)) for family in KNOWN_AS}
    shapes = {family: {name: list(value.shape) for name, value in state.items()} for family, state in states.items()}
    (tmp_path / "shapes.json").write_text(json.dumps(shapes))
    in_comfyui("names.py", tmp_path / "shapes.json", tmp_path / "answer.json")
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert {family: said["faults"] for family, said in answer.items()} == dict.fromkeys(KNOWN_AS, [])
    assert {family: (said["config"], said["type"]) for family, said in answer.items()} == KNOWN_AS


@pytest.mark.parametrize(("family", "sigma", "kind"), [("sdxl", SIGMA, "EPS"), ("cosxl", 7.5, "V_PREDICTION_EDM")])
def test_narrow_sdxl_and_cosxl_step_and_edit_as_in_comfyui(family, sigma, kind, in_comfyui, tmp_path):
    """The scaled condition, EDM's time and v-prediction, the six sizes and the pooled text, by names and shapes."""
    file = save_ldm(narrow(family), tmp_path / "narrow.safetensors")
    model = load_model(file)
    generator = torch.Generator().manual_seed(1)
    texts = {"text": (1, 77, 128), "pooled": (1, 64), "null_text": (1, 77, 128), "null_pooled": (1, 64)}
    draw = {"x": (1, 4, 16, 24), "pixels": (1, 3, 128, 192), **texts}
    given = {name: torch.randn(shape, generator=generator) for name, shape in draw.items()}
    given["x"] *= sigma
    text, null = (
        TextEmbedding(tokens=given[f"{which}text"], pooled=given[f"{which}pooled"]) for which in ("", "null_")
    )
    image = encode_image(model, given["pixels"])
    cond = Conditioning(text=text, null_text=null, image=image, size_ids=size_ids(model, [(192, 128)]))
    sigmas, noise = make_sigmas("model", model.schedule, 4), SampleNoise([7])
    with torch.inference_mode():
        denoiser = DualGuidance(BranchDenoiser(model), 1.0, 1.0)
        ours = {"denoised": denoiser(given["x"], sigma, cond)}
        denoiser = DualGuidance(BranchDenoiser(model), 5.0, 1.5)
        start = noise.draw(image) * float(sigmas[0])
        z = sample("euler_ancestral", denoiser, start, sigmas, cond, noise=noise.draw)
        ours["edited"] = z / model.spec.latent_scale
        latent = model.autoencoder.encode(given["pixels"]).latent_dist.mode()
    save_file({**given, "latent": latent.contiguous(), "sigma": torch.tensor([sigma])}, tmp_path / "in.safetensors")
    in_comfyui("narrow_step.py", file, tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as written:
        assert written.metadata()["type"] == kind
    theirs = load_file(tmp_path / "out.safetensors")
    distances = {name: largest(value, theirs[name]) / value.abs().max().item() for name, value in ours.items()}
    sys.stdout.write(f"{family}: {distances}\n")
    assert max(distances.values()) < STEP_TOLERANCE
