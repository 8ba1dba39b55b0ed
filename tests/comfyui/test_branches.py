"""What the guider asks of a MODEL: which branches, under which indices, and with other packs' patches in place."""

from __future__ import annotations

import json

import pytest
import torch
from comfy_prompts import edit, guided, node
from comfy_server import difference, succeed
from safetensors.torch import save_file

from ip2p_engine.scenes.demo import DEMO_SCENE
from ip2p_engine.scenes.world import render

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def scene(server):
    return server.upload(render(DEMO_SCENE), "scene.png")


def watched(prompt, name, consumer, *, apart=False):
    prompt["watch"] = node("Test_Watch", model=["load", 0], name=name, apart=apart)
    prompt[consumer]["inputs"]["model"] = ["watch", 0]
    image = [*prompt["save"]["inputs"]["images"]]
    prompt["seen"] = node("Test_Seen", name=name, after=image)
    prompt["told"] = node("PreviewAny", source=["seen", 0])
    return prompt


@pytest.mark.parametrize(
    ("text_cfg", "image_cfg", "rows"),
    [
        (4.0, 1.5, [[2, [1, 0]], [1, [1]]]),
        (4.0, 1.0, [[2, [1, 0]]]),
        (1.5, 1.5, [[1, [0]], [1, [1]]]),
        (0.0, 1.5, [[1, [1]], [1, [1]]]),
        (1.0, 1.0, [[1, [0]]]),
        (0.0, 0.0, [[1, [1]]]),
    ],
)
def test_only_needed_branches_are_evaluated_under_indices_0_and_1(server, scene, text_cfg, image_cfg, rows):
    name = f"branches {text_cfg} {image_cfg}"
    prompt = guided(scene, guider={"text_cfg": text_cfg, "image_cfg": image_cfg}, sigmas={"steps": 1})
    run = succeed(server.run(watched(prompt, name, "guider")))
    assert json.loads(run.texts("told")[0]) == rows


@pytest.mark.parametrize(
    ("text_cfg", "image_cfg", "rows"),
    [(4.0, 1.5, 3), (4.0, 1.0, 2), (1.5, 1.5, 2), (0.0, 1.5, 2), (1.0, 1.0, 1), (0.0, 0.0, 1)],
)
def test_without_a_patch_a_step_is_one_call(server, scene, text_cfg, image_cfg, rows):
    name = f"calls {text_cfg} {image_cfg}"
    prompt = watched(
        guided(scene, guider={"text_cfg": text_cfg, "image_cfg": image_cfg}, sigmas={"steps": 2}), name, "guider"
    )
    prompt["watch"] = node("Test_Count", model=["load", 0], name=name)
    run = succeed(server.run(prompt))
    assert [found for found, _ in json.loads(run.texts("told")[0])] == [rows] * 2


def test_the_guider_equals_core_s(server, scene):
    ours, theirs = guided(scene), guided(scene)
    theirs["guider"] = node(
        "DualCFGGuider",
        model=["load", 0],
        cond1=["encode", 0],
        cond2=["encode", 1],
        negative=["negative", 0],
        cfg_conds=4.0,
        cfg_cond2_negative=1.5,
        style="regular",
    )
    first, second = (succeed(server.run(prompt)).pictures["save"][0] for prompt in (ours, theirs))
    assert difference(first, second) == 0


def test_branches_one_by_one_give_the_same_picture(server, scene):
    together = succeed(server.run(edit(scene, steps=4)))
    apart = succeed(server.run(watched(edit(scene, steps=4), "apart", "edit", apart=True)))
    assert {rows for rows, _ in json.loads(apart.texts("told")[0])} == {1}
    assert difference(together.pictures["save"][0], apart.pictures["save"][0]) < 0.02


def test_a_lora_counts_by_its_strength(server, scene):
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v"
    save_file(
        {
            f"{name}.lora_up.weight": torch.randn(64, 4, generator=generator),
            f"{name}.lora_down.weight": torch.randn(4, 64, generator=generator),
        },
        folder / "random.safetensors",
    )
    server.get("/object_info/LoraLoaderModelOnly")
    pictures = [succeed(server.run(edit(scene))).pictures["save"][0]]
    for strength in (0.0, 1.0):
        prompt = edit(scene)
        prompt["lora"] = node(
            "LoraLoaderModelOnly", model=["load", 0], lora_name="random.safetensors", strength_model=strength
        )
        prompt["edit"]["inputs"]["model"] = ["lora", 0]
        pictures.append(succeed(server.run(prompt)).pictures["save"][0])
    assert difference(pictures[0], pictures[1]) == 0
    assert difference(pictures[0], pictures[2]) > 1
