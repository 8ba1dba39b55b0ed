"""Equality with the original implementation; tests/data/reference/README.md tells what was run and how near is near."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ip2p_engine import InstructPix2Pix
from ip2p_engine.diffusion.guidance import DualGuidance
from ip2p_engine.images import to_tensor
from ip2p_engine.networks.conditioning import Conditioning, decode_latents, encode_image, encode_text
from ip2p_engine.networks.denoiser import BranchDenoiser
from ip2p_engine.networks.model import load_model

PROMPT = "turn him into a cyborg"
SEED = 1371
RUNS = {
    "run_s10_t7.5_i1.5": ("image_u8", 10, 7.5, 1.5),
    "run_s10_t7.5_i1.0": ("image_u8", 10, 7.5, 1.0),
    "run_s20_t7.5_i1.5": ("image_u8", 20, 7.5, 1.5),
    "run_coffee_s10_t7.5_i1.5": ("coffee_u8", 10, 7.5, 1.5),
}


def distance(ours, theirs):
    return (ours - theirs).abs().max().item()


@pytest.fixture(scope="module", params=["ema", "raw"])
def weights(request):
    return request.param


@pytest.fixture(scope="module")
def model(weights, tiny_ckpt):
    return load_model(tiny_ckpt, weights=weights)


def picture(reference, name="image_u8"):
    return Image.fromarray(reference[name].numpy())


def test_text_embedding(model, reference):
    embedded = encode_text(model, [PROMPT, ""]).tokens
    assert distance(embedded[:1], reference["text_emb"]) < 1e-5
    assert distance(embedded[1:], reference["null_emb"]) < 1e-5


def test_image_condition_is_the_unscaled_mode(model, reference):
    assert distance(encode_image(model, to_tensor([picture(reference)])), reference["c_concat"]) < 5e-5
    coffee = encode_image(model, to_tensor([picture(reference, "coffee_u8")]))
    assert distance(coffee, reference["coffee_c_concat"]) < 5e-5


def test_decoder(model, reference):
    decoded = decode_latents(model, reference["dec_z"])
    assert distance(decoded, reference["dec_out"]) < 5e-5


@pytest.mark.parametrize("level", ["step_hi", "step_lo"])
def test_guided_step(model, weights, reference, level):
    """One call at a fractional time: the three branches and their combination."""
    z, sigma = reference[f"{level}/z"], float(reference[f"{level}/sigma"])
    embedded = encode_text(model, [PROMPT, ""])
    cond = Conditioning(text=embedded.rows([0]), null_text=embedded.rows([1]), image=reference["c_concat"])
    scales = {"c": (1.0, 1.0), "i": (0.0, 1.0), "u": (0.0, 0.0)}
    with torch.inference_mode():
        for row, (text_cfg, image_cfg) in enumerate(scales.values()):
            denoiser = DualGuidance(BranchDenoiser(model), text_cfg, image_cfg)
            branch = denoiser(z, sigma, cond)
            assert denoiser.branches.evaluations == 1
            assert distance(branch, reference[f"{weights}/{level}/denoised"][row]) < 2e-5 * max(1.0, sigma)
        for together in (True, False):
            denoiser = DualGuidance(BranchDenoiser(model, together=together), 7.5, 1.5)
            combined = denoiser(z, sigma, cond)
            assert denoiser.branches.evaluations == 3
            assert distance(combined, reference[f"{weights}/{level}/combined"]) < 1e-3


@pytest.mark.parametrize("run", ["run_s10_t7.5_i1.5", "run_s10_t7.5_i1.0"])
def test_whole_edit(model, weights, reference, run):
    check_whole_edit(model, weights, reference, run)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["run_s20_t7.5_i1.5", "run_coffee_s10_t7.5_i1.5"])
def test_longer_edit(model, weights, reference, run):
    check_whole_edit(model, weights, reference, run)


def check_whole_edit(model, weights, reference, run):
    name, steps, text_cfg, image_cfg = RUNS[run]
    source = picture(reference, name)
    result = InstructPix2Pix(model).edit(
        source, PROMPT, seeds=SEED, steps=steps, text_cfg=text_cfg, image_cfg=image_cfg, size=source.size
    )[0]
    key = f"{weights}/{run}"
    assert distance(result.latent, reference[f"{key}/z"][0]) < 5e-4
    assert result.evaluations == steps * (2 if image_cfg == 1 else 3)
    if f"{key}/image_u8" in reference:
        theirs = reference[f"{key}/image_u8"].numpy().astype(int)
        assert np.abs(np.asarray(result.image).astype(int) - theirs).max() <= 1


@pytest.mark.slow
def test_merged_safetensors_equals_the_ema_of_the_ckpt(tiny_ckpt, tiny_safetensors):
    ema, merged = load_model(tiny_ckpt, weights="ema"), load_model(tiny_safetensors)
    assert (ema.spec.weights, merged.spec.weights) == ("ema", "only")
    for part in ("unet", "autoencoder"):
        ours, theirs = getattr(ema, part).state_dict(), getattr(merged, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
