"""ControlNet, mask and textual inversion: headless the same pictures as core's nodes around ours make."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfy_prompts import edit, guided, node
from comfy_server import difference, succeed
from PIL import Image
from safetensors.torch import save_file

from ip2p_engine import InstructPix2Pix
from ip2p_engine.checkpoint.recognise import EMBEDDED_FOLDER
from ip2p_engine.scenes.demo import DEMO_SCENE
from ip2p_engine.scenes.world import Scene, render

pytestmark = pytest.mark.comfy
SKETCH = EMBEDDED_FOLDER / "control" / "scenes-sketch.safetensors"
WHERE = render(Scene(shape="star", colour="red", background="grey", size="small", style="sketch", place="top left"))
HOW = {"seeds": 1, "steps": 10, "sampler": "euler", "text_cfg": 4.0, "image_cfg": 1.5}


@pytest.fixture(scope="module")
def editor():
    return InstructPix2Pix.load("embedded", device="cpu", control=SKETCH)


def controlled(server, picture, hint, *, strength=1.0, mask=None, size=(64, 64), instruction="turn it into a star"):
    """The picture that core's Apply ControlNet on both conditions makes with our guider."""
    server.upload(picture, "controlled.png")
    server.upload(hint, "hint.png")
    encode = {"resolution": max(size)}
    extra = {}
    if mask is not None:
        x, width = mask
        extra = {
            "blank": node("SolidMask", value=0.0, width=picture.width, height=picture.height),
            "white": node("SolidMask", value=1.0, width=width, height=picture.height),
            "mask": node("MaskComposite", destination=["blank", 0], source=["white", 0], x=x, y=0, operation="add"),
        }
        encode["mask"] = ["mask", 0]
    prompt = guided("controlled.png", sampler="euler", encode=encode, positive={"text": instruction}, **extra)
    prompt["hint"] = node("LoadImage", image="hint.png")
    prompt["net"] = node("ControlNetLoader", control_net_name="scenes-sketch.safetensors")
    prompt["apply"] = node(
        "ControlNetApplyAdvanced",
        positive=["encode", 0],
        negative=["encode", 1],
        control_net=["net", 0],
        image=["hint", 0],
        strength=strength,
        start_percent=0.0,
        end_percent=1.0,
    )
    prompt["sampler"] = node("Test_Sampler", name="euler", sigmas=["sigmas", 0])
    prompt["guider"]["inputs"].update(positive=["apply", 0], negative=["apply", 1])
    return succeed(server.run(prompt)).pictures["save"][0]


def gap(ours, theirs, where=None):
    """(mean, largest) difference in levels, where a mask says."""
    off = np.abs(np.asarray(ours.convert("RGB"), int) - np.asarray(theirs.convert("RGB"), int))
    off = off if where is None else off[where]
    return off.mean(), off.max()


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_controlnet_is_the_same_headless(server, editor, strength):
    picture = render(DEMO_SCENE)
    theirs = controlled(server, picture, WHERE, strength=strength)
    ours, plain = (
        editor.edit(picture, "turn it into a star", control_images=hint, control_weight=strength, **HOW)[0].image
        for hint in (WHERE, None)
    )
    mean, most = gap(ours, theirs)
    assert mean <= 1 and most <= 4 and gap(plain, theirs)[0] > 5


def test_a_hint_of_another_shape_is_cropped_alike(server, editor):
    picture = render(DEMO_SCENE)
    hint = WHERE.resize((150, 96))
    theirs = controlled(server, picture, hint)
    ours = editor.edit(picture, "turn it into a star", control_images=hint, **HOW)[0].image
    mean, most = gap(ours, theirs)
    assert mean <= 1 and most <= 4


def test_mask_and_controlnet_are_the_same_headless(server, editor):
    picture, hint = render(DEMO_SCENE).resize((128, 128)), WHERE.resize((128, 128))
    theirs = controlled(server, picture, hint, mask=(0, 80), size=(128, 128), instruction="make it night")
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 80, 128))
    how = {**HOW, "resolution": 128}
    ours = editor.edit(picture, "make it night", masks=mask, control_images=hint, **how)[0].image
    inside = np.asarray(mask) > 0
    mean, most = gap(ours, theirs, inside)
    assert mean <= 1 and most <= 4 and gap(ours, picture, inside)[0] > 20
    assert np.array_equal(np.asarray(ours)[~inside], np.asarray(picture)[~inside])


def test_a_word_of_textual_inversion_is_the_same_headless(server, editor):
    table = editor.model.text_encoders[0].get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    vectors = table[[736, 1579]] + 0.02 * torch.randn(2, table.shape[1], generator=generator)
    folder = server.base / "models" / "embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": vectors.clone()}, folder / "rouge.safetensors")
    picture = server.upload(render(DEMO_SCENE), "scene.png")
    text = "paint it embedding:rouge, please"
    theirs = succeed(server.run(edit(picture, instruction=text))).pictures["save"][0]
    plain = succeed(server.run(edit(picture, instruction="paint it , please"))).pictures["save"][0]
    knowing = InstructPix2Pix.load("embedded", device="cpu", embeddings=[folder / "rouge.safetensors"])
    how = {**HOW, "sampler": "euler_ancestral"}
    ours = knowing.edit(render(DEMO_SCENE), text, **how)[0].image
    assert difference(ours, theirs) <= 1 < difference(ours, plain)
