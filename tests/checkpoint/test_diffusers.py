"""diffusers itself loads the folders we write, without the hub."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from ip2p_engine.checkpoint.write import save_diffusers
from ip2p_engine.tokenizer import END_OF_TEXT, tokenize

pytestmark = pytest.mark.slow
PIPELINES = {
    ("sd1", 8): "StableDiffusionInstructPix2PixPipeline",
    ("sd1", 4): "StableDiffusionPipeline",
    ("sd2", 8): "StableDiffusionInstructPix2PixPipeline",
    ("sdxl", 8): "StableDiffusionXLInstructPix2PixPipeline",
    ("cosxl", 8): "StableDiffusionXLInstructPix2PixPipeline",
}


@pytest.mark.parametrize(("family", "in_channels"), PIPELINES)
def test_the_pipeline_has_our_networks_tokenizers_and_schedule(family, in_channels, make_model, tmp_path):
    model = make_model(family, in_channels)
    pipe = DiffusionPipeline.from_pretrained(save_diffusers(model, tmp_path / "folder"), local_files_only=True)
    assert type(pipe).__name__ == PIPELINES[family, in_channels]
    networks = [(pipe.unet, model.unet), (pipe.vae, model.autoencoder), (pipe.text_encoder, model.text_encoders[0])]
    if family in ("sdxl", "cosxl"):
        networks.append((pipe.text_encoder_2, model.text_encoders[1]))
    for theirs, ours in networks:
        state, loaded = ours.state_dict(), theirs.state_dict()
        assert state.keys() == loaded.keys()
        assert all(torch.equal(value, loaded[name]) for name, value in state.items())
    paddings = {"tokenizer": 0 if family == "sd2" else END_OF_TEXT, "tokenizer_2": 0}
    for name, pad in paddings.items():
        if tokenizer := getattr(pipe, name, None):
            found = tokenizer("make it snow", padding="max_length", max_length=77, return_tensors="pt").input_ids
            assert torch.equal(found, tokenize(["make it snow"], pad=pad))
    if family == "cosxl":
        assert pipe.is_cosxl_edit
        assert (pipe.scheduler.config.sigma_min, pipe.scheduler.config.sigma_max) == (0.002, 120.0)
    else:
        pipe.scheduler.set_timesteps(10)
        assert float(pipe.scheduler.sigmas[0]) == pytest.approx(model.schedule.sigma_max, rel=1e-5)
