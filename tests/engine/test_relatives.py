"""Models that were made after InstructPix2Pix, each edited as its authors do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ip2p_engine import EditConfig, InstructPix2Pix, cli
from ip2p_engine.checkpoint.report import report_card
from ip2p_engine.checkpoint.write import save_ldm
from ip2p_engine.diffusion.guidance import FORMULAS
from ip2p_engine.diffusion.noise import SampleNoise
from ip2p_engine.errors import ConfigError
from ip2p_engine.images import fit, to_tensor
from ip2p_engine.networks.conditioning import encode_text
from ip2p_engine.scenes.world import Scene, render

PICTURE = render(Scene(shape="heart", colour="red", background="sky", size="large"))
ID, QUALITY = "instruct-diffusion", ", image quality is five out of five"
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


def test_instruct_diffusions_formula():
    """0.5 (i + t) + s_T (c - i) + s_I (c - t); a branch of weight 0 is not asked for."""
    generator = torch.Generator().manual_seed(0)
    branches = {name: torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for name in "cit"}
    c, i, t = branches.values()
    formula = FORMULAS["instruct-diffusion"]
    for text_cfg, image_cfg, needed in [
        (5.0, 1.25, "cit"),
        (0.5, 1.25, "ct"),
        (5.0, 0.5, "ci"),
        (0.5, 0.5, "c"),
        (0, 0, "it"),
    ]:
        assert "".join(formula.needed(text_cfg, image_cfg)) == needed
        combined = formula.combine({name: branches[name] for name in needed}, text_cfg, image_cfg)
        expected = 0.5 * (i + t) + text_cfg * (c - i) + image_cfg * (c - t)
        torch.testing.assert_close(combined, expected, atol=1e-12, rtol=1e-12)


@pytest.fixture(scope="module")
def plain(tiny_pair_model):
    return tiny_pair_model(in_channels=8)


def test_instruct_diffusion_by_name_and_by_its_checkpoint(plain):
    """One Euler step against the UNet itself; 5.0 and 1.25 are its own scales; t sees the text and no picture."""
    named = InstructPix2Pix(plain).edit(PICTURE, "make it snow", seeds=3, steps=1, sampler="euler", guidance=ID)[0]
    assert (named.settings["text_cfg"], named.settings["image_cfg"]) == (5.0, 1.25)
    assert (named.settings["guidance"], named.evaluations) == (ID, 3)
    own = replace(plain, spec=replace(plain.spec, guidance=ID, text_cfg=5.0, image_cfg=1.25))
    told = InstructPix2Pix(own).edit(PICTURE, "make it snow", seeds=3, steps=1, sampler="euler")[0]
    assert torch.equal(told.latent, named.latent)
    image, text = latent_of(plain, PICTURE), encode_text(plain, ["make it snow", ""])
    sigma = float(plain.schedule.sigmas[-1])
    noise = SampleNoise([3]).draw(image)
    x = noise * sigma / (sigma**2 + 1) ** 0.5
    c, i, t = (
        plain.unet(torch.cat([x, picture], dim=1), plain.timestep(sigma), text.tokens[[row]]).sample
        for row, picture in ((0, image), (1, image), (0, torch.zeros_like(image)))
    )
    expected = noise * sigma - sigma * (0.5 * (i + t) + 5.0 * (c - i) + 1.25 * (c - t))
    torch.testing.assert_close(named.latent[None], expected, atol=2e-3, rtol=1e-3)
    dual = InstructPix2Pix(own).edit(PICTURE, "make it snow", seeds=3, steps=1, sampler="euler", guidance="dual")[0]
    assert (dual.settings["text_cfg"], dual.settings["image_cfg"]) == (7.5, 1.5)


def test_outside_its_interval_instruct_diffusion_is_c_alone(plain):
    everywhere, nowhere = (
        InstructPix2Pix(plain).edit(PICTURE, "make it snow", steps=2, guidance=ID, guidance_interval=bounds)[0]
        for bounds in (None, (1000.0, 2000.0))
    )
    alone = InstructPix2Pix(plain).edit(PICTURE, "make it snow", steps=2, text_cfg=1.0, image_cfg=1.0)[0]
    assert (everywhere.evaluations, nowhere.evaluations) == (6, 2)
    torch.testing.assert_close(nowhere.latent, alone.latent, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"guidance": "nonesuch"}, "guidance is 'nonesuch'; choose one of dual, instruct-diffusion"),
        ({"guidance": 3}, "guidance is 3; choose one of"),
        ({"guidance": ID, "apg": True}, "apg projects what dual guidance adds"),
    ],
)
def test_guidance_that_does_not_exist(given, words):
    with pytest.raises(ConfigError, match=words):
        EditConfig(**given)


def test_hives_suffix_is_said_after_each_instruction(plain):
    """By the checkpoint, or by hand; the settings keep the instruction as it was written, and the suffix beside it."""
    hive = InstructPix2Pix(replace(plain, spec=replace(plain.spec, suffix=QUALITY)))
    how = {"steps": 2, "seeds": 1}
    told = hive.edit(PICTURE, "make it snow", **how)[0]
    whole = InstructPix2Pix(plain).edit(PICTURE, f"make it snow{QUALITY}", **how)[0]
    asked = InstructPix2Pix(plain).edit(PICTURE, "make it snow", suffix=QUALITY, **how)[0]
    assert torch.equal(told.latent, whole.latent) and torch.equal(told.latent, asked.latent)
    assert (told.settings["instruction"], told.settings["suffix"]) == ("make it snow", QUALITY)
    bare = hive.edit(PICTURE, "make it snow", suffix="", **how)[0]
    assert not torch.equal(bare.latent, told.latent)
    assert hive.edit(PICTURE, " ", **how)[0].image.tobytes() == PICTURE.tobytes()
    assert torch.equal(
        hive.condition(PICTURE, "make it snow").text.tokens, encode_text(plain, [whole.instruction]).tokens
    )


def test_a_written_file_keeps_what_it_recommends(plain, tmp_path):
    save_ldm(plain, tmp_path / "plain.safetensors")
    command = ["convert", str(tmp_path / "plain.safetensors"), str(tmp_path / "own.safetensors"), "--to", "ldm"]
    assert cli.main([*command, "--guidance", ID, "--suffix", QUALITY]) == 0
    card = report_card(tmp_path / "own.safetensors")
    assert (card.guidance, card.text_cfg, card.image_cfg, card.suffix) == (ID, 5.0, 1.25, QUALITY)
    assert f"guidance     {ID}" in str(card) and "suffix       , image quality is five" in str(card)
    assert "guidance" not in str(report_card(tmp_path / "plain.safetensors"))
