"""Models that were made after InstructPix2Pix, each edited as its authors do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ip2p_engine import EditConfig, InstructPix2Pix
from ip2p_engine.diffusion.noise import SampleNoise
from ip2p_engine.images import fit, to_tensor
from ip2p_engine.networks.conditioning import encode_text
from ip2p_engine.scenes.world import Scene, render

PICTURE = render(Scene(shape="heart", colour="red", background="sky", size="large"))
ONE_STEP = EditConfig(steps=1, sampler="euler", text_cfg=7.5, image_cfg=1.5)


@pytest.fixture(scope="module")
def mask():
    mask = Image.new("L", PICTURE.size)
    mask.paste(255, (16, 16, 48, 64))
    return mask


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def masked(request, tiny_pair_model):
    """An UltraEdit of random weights: noise, picture and mask, 12 channels."""
    return InstructPix2Pix(tiny_pair_model(request.param, in_channels=12))


def latent_of(model, picture):
    return model.autoencoder.encode(to_tensor([picture.convert("RGB")])).latent_dist.mode()


def test_ultraedit_is_told_the_mask_after_the_picture(masked, mask):
    """One Euler step to sigma 0 against the UNet itself: eps of noise, picture, mask; neither of the two in u."""
    model = masked.model
    result = masked.edit(PICTURE, "make it snow", seeds=3, masks=mask, config=ONE_STEP)[0]
    told = torch.cat([latent_of(model, PICTURE), latent_of(model, mask)], dim=1)
    text = encode_text(model, ["make it snow", ""])
    sigma = float(model.schedule.sigmas[-1])
    noise = SampleNoise([3]).draw(told[:, :4])
    eps = []
    for row, condition in ((0, told), (1, told), (1, torch.zeros_like(told))):
        chosen = text.rows([row])
        added = None
        if chosen.pooled is not None:
            added = {"text_embeds": chosen.pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
        x = torch.cat([noise * sigma / (sigma**2 + 1) ** 0.5, condition], dim=1)
        eps.append(model.unet(x, model.timestep(sigma), chosen.tokens, added_cond_kwargs=added).sample)
    c, i, u = eps
    expected = noise * sigma - sigma * (u + 1.5 * (i - u) + 7.5 * (c - i))
    torch.testing.assert_close(result.latent[None], expected, atol=2e-3, rtol=1e-3)


def test_ultraedit_without_a_mask_may_change_everything(masked, mask):
    free, white, inside = (
        masked.edit(PICTURE, "make it snow", masks=given, config=ONE_STEP)[0]
        for given in (None, Image.new("L", PICTURE.size, 255), mask)
    )
    assert torch.equal(free.latent, white.latent)
    assert (free.latent - inside.latent).abs().max() > 0.01
    assert free.settings["mask"] is False


def test_outside_ultraedits_mask_the_source_stays_to_the_bit(masked, mask):
    picture = PICTURE.resize((100, 80))
    result = masked.edit(picture, "make it snow", masks=mask, config=ONE_STEP)[0]
    kept = np.asarray(mask.resize(picture.size)) == 0
    assert np.array_equal(np.asarray(result.image)[kept], np.asarray(picture)[kept])
    assert not np.array_equal(np.asarray(result.image), np.asarray(picture))


def test_a_condition_may_have_a_mask(masked, mask):
    condition = masked.condition([PICTURE, PICTURE], ["make it snow"], masks=[mask, None])
    assert condition.image.shape == (2, 8, 8, 8)
    assert torch.equal(condition.image[0, :4], condition.image[1, :4])
    fitted = fit(mask, (64, 64))
    assert torch.allclose(condition.image[0, 4:], latent_of(masked.model, fitted)[0], atol=1e-5)
    assert masked.latents(condition, [1, 2], config=ONE_STEP).shape == (2, 4, 8, 8)
