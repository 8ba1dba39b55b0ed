"""What each family's network is told: equal to diffusers' own pipelines, part by part and in whole walks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPTokenizer

from ip2p_engine import InstructPix2Pix
from ip2p_engine.checkpoint.write import write_tokenizers
from ip2p_engine.diffusion.noise import SampleNoise
from ip2p_engine.images import to_tensor
from ip2p_engine.networks.conditioning import encode_image, encode_text, size_ids
from ip2p_engine.p2p.generator import PairConfig, PairGenerator

FAMILIES = ("sd1", "sd2", "sdxl", "cosxl")
DOUBLE = ("sdxl", "cosxl")
TEXTS = ["make it snow", "add a small boat, please"]
WIDE = (96, 64)
STEPS = 4  # t = 999, 666, 333, 0: between whole steps diffusers interpolates sigma, and the paper's code its logarithm


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """OpenAI's encoders pad with the end of the text; open_clip's, of SD2 and SDXL's second, with token 0."""
    folder = tmp_path_factory.mktemp("vocabulary")
    write_tokenizers(folder, "sd1", 1)
    return [CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token=pad) for pad in ("<|endoftext|>", "!")]


@pytest.fixture(scope="module")
def both(tiny_pair_model, tokenizers):
    """(our editor, diffusers' pipeline) of the same untrained networks of a family."""
    made = {}

    def pair(family):
        if family not in made:
            model = tiny_pair_model(family, in_channels=8)
            made[family] = InstructPix2Pix(model), theirs(model, tokenizers)
        return made[family]

    return pair


def theirs(model, tokenizers):
    family, (openai, open_clip) = model.spec.family, tokenizers
    parts = {"vae": model.autoencoder, "unet": model.unet, "scheduler": scheduler(model.spec.family)}
    parts |= {"text_encoder": model.text_encoders[0], "tokenizer": open_clip if family == "sd2" else openai}
    if family in DOUBLE:
        parts |= {"text_encoder_2": model.text_encoders[1], "tokenizer_2": open_clip}
        parts |= {"force_zeros_for_empty_prompt": False, "add_watermarker": False}
        edits = model.spec.in_channels == 8
        own = {"is_cosxl_edit": family == "cosxl"} if edits else {}
        pipeline = (StableDiffusionXLInstructPix2PixPipeline if edits else StableDiffusionXLPipeline)(**parts, **own)
    else:
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionInstructPix2PixPipeline(**parts, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scheduler(family):
    if family == "cosxl":
        edges = {"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0}
        return EDMEulerScheduler(**edges, sigma_schedule="exponential", prediction_type="v_prediction")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    return EulerDiscreteScheduler(**betas, timestep_spacing="linspace", prediction_type=prediction)


def start(pipeline, seed):
    """A seed's noise as a pipeline takes it, which scales it by itself."""
    pipeline.scheduler.set_timesteps(STEPS)
    noise = SampleNoise([seed]).draw(torch.empty(1, 4, WIDE[1] // 8, WIDE[0] // 8))
    return noise * (pipeline.scheduler.sigmas[0] / pipeline.scheduler.init_noise_sigma)


def picture():
    """Without plain surfaces, of which an untrained network blows up the rounding."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (WIDE[1], WIDE[0], 3), dtype=np.uint8))


def near(ours, expected):
    assert (ours - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_texts(both, family):
    """Which layer, padded with what; and the pooled text of SDXL's second encoder."""
    editor, pipeline = both(family)
    ours = encode_text(editor.model, [*TEXTS, ""])
    if family in DOUBLE:
        tokens, _, pooled, _ = pipeline.encode_prompt([*TEXTS, ""], do_classifier_free_guidance=False)
        torch.testing.assert_close(ours.pooled, pooled)
    else:
        tokens = pipeline._encode_prompt([*TEXTS, ""], "cpu", 1, False)
        assert ours.pooled is None
    torch.testing.assert_close(ours.tokens, tokens)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_source_picture(both, family):
    """The mode of its posterior; CosXL-Edit's alone is multiplied by the latent scale."""
    editor, pipeline = both(family)
    pixels = pipeline.image_processor.preprocess(picture())
    expected = pipeline.prepare_image_latents(pixels, 1, 1, torch.float32, "cpu", False)
    near(encode_image(editor.model, to_tensor([picture()])), expected)


@pytest.mark.parametrize("family", DOUBLE)
def test_size_ids_name_the_height_first(both, family):
    editor, pipeline = both(family)
    width, height = WIDE
    expected = pipeline._get_add_time_ids((height, width), (0, 0), (height, width), torch.float32, 24)
    assert torch.equal(size_ids(editor.model, [WIDE, WIDE]), expected.repeat(2, 1))


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_only_sdxl_is_told_sizes(both, family):
    assert size_ids(both(family)[0].model, [WIDE]) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_edits(both, family):
    """A picture that is no square, and two instructions in one batch, by Euler steps from the same noise."""
    editor, pipeline = both(family)
    settings = {"steps": STEPS, "sampler": "euler", "size": WIDE, "text_cfg": 5.0, "image_cfg": 1.5}
    ours = editor.edit(picture(), TEXTS, seeds=3, **settings)
    size = {"width": WIDE[0], "height": WIDE[1]} if family in DOUBLE else {}
    for result in ours:
        expected = pipeline(
            result.instruction,
            image=picture(),
            **size,
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            image_guidance_scale=1.5,
            negative_prompt="",
            latents=start(pipeline, 3),
            output_type="latent",
        )
        near(result.latent, expected.images[0])
    assert (ours[0].latent - ours[1].latent).abs().max() > 0.1


def test_how_pixels_lie_in_memory_changes_nothing(editor):
    """Pictures of numpy lie otherwise, and on a CPU torch's group norm is imprecise there."""
    pixels = to_tensor([Image.radial_gradient("L").convert("RGB").resize((64, 64))])
    there = encode_image(editor.model, pixels.contiguous(memory_format=torch.channels_last))
    assert torch.equal(there, encode_image(editor.model, pixels))


def test_the_source_of_a_pair(tiny_pair_model, tokenizers):
    """SDXL from text to picture, wider than high: the source of a pair is what its caption alone gives."""
    model = tiny_pair_model("sdxl")
    pipeline = theirs(model, tokenizers)
    config = PairConfig(steps=STEPS, sampler="euler", size=WIDE, cfg_range=(6.0, 6.0))
    (pair,) = PairGenerator(model, config).generate(*TEXTS, [3])
    expected = pipeline(
        TEXTS[0],
        width=WIDE[0],
        height=WIDE[1],
        num_inference_steps=STEPS,
        guidance_scale=6.0,
        negative_prompt="",
        latents=start(pipeline, 3),
        output_type="latent",
    )
    near(pair.latents[0], expected.images[0])
