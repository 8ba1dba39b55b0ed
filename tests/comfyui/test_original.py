"""In ComfyUI as in the original: a .ckpt with two sets of weights gives the pictures of the authors' code."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from comfy_prompts import edit
from comfy_server import succeed
from PIL import Image

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_checkpoint_of_the_authors_gives_their_picture(server, tiny_ckpt, reference, weights):
    folder = server.base / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tiny_ckpt, folder / "original.ckpt")
    server.upload(Image.fromarray(reference["image_u8"].numpy()), "astronaut.png")
    server.get("/object_info/IP2P_LoadCheckpoint")
    prompt = edit(
        "astronaut.png", instruction="turn him into a cyborg", text_cfg=7.5, steps=10, seed=1371, resolution=128
    )
    prompt["load"]["inputs"].update(checkpoint="original.ckpt", weights=weights)
    picture = np.asarray(succeed(server.run(prompt)).pictures["save"][0].convert("RGB"), float)
    theirs = reference[f"{weights}/run_s10_t7.5_i1.5/image_u8"].numpy().astype(float)
    # The original truncates where we round, so up to one level, and half a level on average.
    assert np.abs(picture - theirs).max() <= 2
    assert abs((picture - theirs).mean()) <= 0.6
