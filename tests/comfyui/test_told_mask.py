"""UltraEdit's networks, which are told a mask: loaded by our node, and the same pictures as headless."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfy_prompts import LOADER, edit, guided, node
from comfy_server import complaint, difference, succeed
from PIL import Image

from ip2p_engine import InstructPix2Pix
from ip2p_engine.checkpoint.spec import MASKED_EDIT
from ip2p_engine.checkpoint.write import save_ldm
from ip2p_engine.networks.model import load_model
from ip2p_engine.scenes.demo import DEMO_SCENE
from ip2p_engine.scenes.world import render
from ip2p_engine.train.networks import widened

pytestmark = pytest.mark.comfy
NAME = "ultraedit.safetensors"
HOW = {"steps": 10, "sampler": "euler_ancestral", "text_cfg": 4.0, "image_cfg": 1.5}
SCENE = render(DEMO_SCENE).resize((80, 64))  # the paper's rule crops it


@pytest.fixture(scope="module")
def editor(server):
    """The embedded model with a first convolution that listens to a mask, in ComfyUI's folder and headless."""
    model = widened(load_model("embedded", device="cpu", dtype=torch.float32), MASKED_EDIT)
    noise = torch.randn(model.unet.conv_in.weight[:, 8:].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.unet.conv_in.weight[:, 8:] = 0.05 * noise
    place = server.base / "models" / "checkpoints" / NAME
    save_ldm(model, place)
    return InstructPix2Pix.load(str(place), device="cpu")


@pytest.fixture(scope="module")
def mask():
    """White on the right half."""
    white = Image.new("L", SCENE.size)
    white.paste(255, (40, 0, *SCENE.size))
    return white


def with_mask(server, prompt, place, loader="load"):
    """A prompt whose node ``place`` has the mask that the fixture makes."""
    prompt[loader]["inputs"]["checkpoint"] = NAME
    prompt["blank"] = node("SolidMask", value=0.0, width=SCENE.width, height=SCENE.height)
    prompt["white"] = node("SolidMask", value=1.0, width=40, height=SCENE.height)
    prompt["mask"] = node("MaskComposite", destination=["blank", 0], source=["white", 0], x=40, y=0, operation="add")
    prompt[place]["inputs"]["mask"] = ["mask", 0]
    return prompt


def test_the_same_picture_as_headless(server, editor, mask):
    picture = server.upload(SCENE, "ultraedit.png")
    free = edit(picture)
    free["load"]["inputs"]["checkpoint"] = NAME
    theirs = [succeed(server.run(one)).pictures["save"][0] for one in (free, with_mask(server, edit(picture), "edit"))]
    ours = [editor.edit(SCENE, "make it snow", seeds=1, masks=one, **HOW)[0].image for one in (None, mask)]
    assert [difference(*pair) <= 1 for pair in zip(ours, theirs, strict=True)] == [True, True]
    inside = np.asarray(mask) > 0
    assert np.abs(np.asarray(ours[0], int) - np.asarray(ours[1], int))[inside].mean() > 2  # it listens
    assert np.array_equal(np.asarray(theirs[1].convert("RGB"))[~inside], np.asarray(SCENE)[~inside])


def test_by_the_guider_and_cores_nodes_too(server, editor, mask):
    """The mask's latents go along with the picture's; the sampler is bound by no mask beside them."""
    picture = server.upload(SCENE, "ultraedit.png")
    prompt = with_mask(server, guided(picture, sampler="euler"), "encode")
    prompt["sampler"] = node("Test_Sampler", name="euler", sigmas=["sigmas", 0])
    prompt["whole"] = node("IP2P_RestoreSize", image=["decode", 0], original=["image", 0])
    prompt["save"]["inputs"]["images"] = ["whole", 0]
    theirs = succeed(server.run(prompt)).pictures["save"][0]
    ours = editor.edit(SCENE, "make it snow", seeds=1, masks=mask, **{**HOW, "sampler": "euler"})[0].image
    inside = np.asarray(mask) > 0
    off = np.abs(np.asarray(ours, int) - np.asarray(theirs.convert("RGB"), int))[inside]
    assert off.mean() <= 1


@pytest.mark.parametrize("change", ["find_area", "core_condition"])
def test_what_does_not_go_with_it_is_said(server, editor, change):
    picture = server.upload(SCENE, "ultraedit.png")
    if change == "find_area":
        prompt, words = edit(picture, find_area=True), "told a mask"
    else:
        prompt, words = guided(picture), "IP2P Encode Image"
    prompt["load"] = node("IP2P_LoadCheckpoint", **{**LOADER, "checkpoint": NAME})
    if change == "core_condition":
        pixels = {"vae": ["load", 2], "pixels": ["image", 0]}
        encode = {"positive": ["positive", 0], "negative": ["negative", 0], **pixels}
        prompt["encode"] = node("InstructPixToPixConditioning", **encode)
    assert words in complaint(server, prompt)
