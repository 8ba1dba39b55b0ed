"""Training and evaluating in a real ComfyUI: cancelled and resumed, shown on one bar, refused before any work."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from comfy_events import Listener
from comfy_prompts import EVALUATE, LOADER, TRAIN, edit, node
from comfy_server import complaint, succeed
from safetensors.torch import save_file

from ip2p_engine.scenes.demo import DEMO_SCENE
from ip2p_engine.scenes.world import render

pytestmark = pytest.mark.comfy


def training(**changes):
    """Six true edits, saved as a data set, and a run on it."""
    return {
        "scenes": node("IP2P_LoadDataset", name="embedded scenes", count=6, seed=0, preview=1),
        "data": node("IP2P_SaveDataset", pairs=["scenes", 0], name="to-train-on"),
        "train": node("IP2P_Train", pairs=["data", 0], **{**TRAIN, **changes}),
        "report": node("PreviewAny", source=["train", 5]),
    }


def progress_of(listener, until=None):
    """What the node's bar shows, as (value, of), until the run ends or that much is done, and how it ended."""
    values = []
    for kind, data in listener.events():
        if kind == "progress" and data["node"] in ("train", "evaluate"):
            values.append((data["value"], data["max"]))
            if until and data["max"] == until[1] and data["value"] >= until[0]:
                break
        if kind in ("execution_success", "execution_error", "execution_interrupted"):
            break
    return values, kind


def test_a_cancelled_training_goes_on_where_it_was(server):
    prompt, client = training(name="cancelled run", steps=12, batch_size=2), uuid.uuid4().hex
    with Listener(server.port, client) as listener:
        server.submit(prompt, client=client)
        assert (6, 6) in progress_of(listener, until=(4, 12))[0]  # the cache
        server.post("/interrupt", {})
        assert progress_of(listener)[1] == "execution_interrupted"
        again = server.submit(prompt, client=client)
        shown, kind = progress_of(listener)
    steps = [value for value, of in shown if of == 12]
    assert kind == "execution_success" and steps[0] > 4 and steps[-1] == 12
    assert "12 steps" in server.wait(again).texts("report")[0]
    log = (server.base / "output" / "ip2p_training" / "cancelled run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 13))
    assert (server.base / "models" / "checkpoints" / "ip2p" / "cancelled run.safetensors").exists()


def test_cancel_is_heard_within_a_step_of_a_training(server):
    """The step that runs, and messages that wait while it does."""
    client = uuid.uuid4().hex
    with Listener(server.port, client) as listener:
        server.submit(training(name="stopped early", steps=500, batch_size=8), client=client)
        progress_of(listener, until=(3, 500))
        server.post("/interrupt", {})
        after, kind = progress_of(listener)
    assert kind == "execution_interrupted" and len({value for value, _ in after}) <= 3


def test_training_shows_loss_time_left_and_a_sample(server):
    client, lines, samples = uuid.uuid4().hex, [], 0
    with Listener(server.port, client) as listener:
        server.submit(training(name="watched run", steps=11, batch_size=2), client=client)
        for kind, data in listener.events():
            lines += [data[1]] if kind == "text" and data[0] == "train" else []
            samples += kind == "preview"
            if kind in ("execution_success", "execution_error"):
                break
    assert kind == "execution_success" and samples == 2  # after steps 5 and 10
    assert any(re.fullmatch(r"step \d+ of 11, loss 0\.\d{4}, 0:\d\d:\d\d left", line) for line in lines)
    assert all(line.startswith(("encoding pair", "step")) for line in lines)


@pytest.mark.parametrize("name", ["???", "a/b", "-", "a "])
def test_a_name_is_refused_before_training(server, name):
    assert "give a plain name such as my-set" in complaint(server, training(name=name))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_a_missing_package_is_named_before_training(server):
    told = complaint(server, training(preset="one-gpu"))
    assert "pip install bitsandbytes in ComfyUI's Python and restart" in told


def evaluation(**changes):
    networks = {name: ["load", n] for n, name in enumerate(("model", "clip", "vae"))}
    return {
        "load": node("IP2P_LoadCheckpoint", **LOADER),
        "scenes": node("IP2P_LoadDataset", name="embedded scenes", count=9, seed=0, preview=1),
        "evaluate": node("IP2P_Evaluate", pairs=["scenes", 0], **networks, **{**EVALUATE, **changes}),
        "table": node("PreviewAny", source=["evaluate", 1]),
    }


def test_an_evaluation_has_one_bar(server):
    client = uuid.uuid4().hex
    with Listener(server.port, client) as listener:
        server.submit(evaluation(count=9, image_cfgs="1, 1.5"), client=client)
        shown, kind = progress_of(listener)
    assert kind == "execution_success"
    assert shown == sorted(shown) and len(shown) == 8  # two parts, two settings, two steps
    assert {of for _, of in shown} == {36} and shown[-1][0] == 36


def test_an_evaluation_stops_within_a_step(server):
    client = uuid.uuid4().hex
    with Listener(server.port, client) as listener:
        server.submit(evaluation(count=9, steps=200, seed=7), client=client)
        shown, _ = progress_of(listener, until=(27, 9 * 200))
        server.post("/interrupt", {})
        rest, kind = progress_of(listener)
    assert kind == "execution_interrupted"
    # Messages wait in a queue while a step runs, so those that were on their way count too.
    assert len(rest) <= 3


def test_a_label_is_no_reference_s(server):
    assert "is a reference's name; choose another" in complaint(server, evaluation(label="the pairs' own edits"))


@pytest.mark.slow
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_model_exported_on_the_way_edits_as_headless_and_in_diffusers(server, tmp_path, zero_snr):
    """After the first step of a run on the embedded model: the file in ComfyUI, the folder in diffusers."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    from ip2p_engine import InstructPix2Pix
    from ip2p_engine.scenes.grammar import sample_edits
    from ip2p_engine.train import preset, train

    edits = sample_edits(4, seed=3, held_out=False)
    pairs = [(render(one.source), render(one.target), one.instruction) for one in edits]
    settings = {"steps": 2, "batch_size": 2, "export_every": 1, "validate_every": 0, "outputs": ("ema", "diffusers")}
    config = preset("embedded", **settings, zero_snr=zero_snr, cache=False)
    train(config, data=pairs, base="embedded-sd", out=tmp_path / "run", device="cpu")
    exported = tmp_path / "run" / "exports" / "step-00000001"
    name = f"exported-{zero_snr}.safetensors"
    folder = server.base / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(exported / "ema.safetensors", folder / name)
    server.get("/object_info/IP2P_LoadCheckpoint")
    scene = render(DEMO_SCENE)
    server.upload(scene, "exported.png")
    prompt = edit("exported.png")
    prompt["load"]["inputs"]["checkpoint"] = name
    theirs = succeed(server.run(prompt)).pictures["save"][0]
    editor = InstructPix2Pix.load(folder / name, device="cpu")
    assert editor.model.spec.zero_snr == zero_snr
    ours = editor.edit(scene, "make it snow", seeds=1, steps=10, text_cfg=4.0, image_cfg=1.5)[0].image
    far = np.abs(np.asarray(theirs.convert("RGB"), int) - np.asarray(ours.convert("RGB"), int))
    assert far.mean() < 1 and far.max() <= 2
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(exported / "diffusers")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("make it snow", image=scene, num_inference_steps=2).images[0].size == scene.size
    rescaled = getattr(pipeline.scheduler.config, "rescale_betas_zero_snr", False)
    assert (rescaled, pipeline.scheduler.config.timestep_spacing == "trailing") == (zero_snr, zero_snr)


def test_the_trainers_lora_is_the_same_in_core_s_loader_and_headless(server):
    """The file that ``ip2p train --lora`` writes: what core adds to the model is what ``--lora`` adds."""
    from ip2p_engine import InstructPix2Pix
    from ip2p_engine.networks.model import load_model
    from ip2p_engine.train.adapters import lora_state
    from ip2p_engine.train.config import TrainConfig
    from ip2p_engine.train.networks import make_trainable, trained_of

    config = TrainConfig(lora_rank=4, lora_alpha=2.0, lora_conv_rank=2)
    model = make_trainable(load_model("embedded", device="cpu"), config)
    random = torch.Generator().manual_seed(0)
    for parameter in trained_of(model).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=random) * 0.5)
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora_state(model), folder / "trained.safetensors")
    scene = render(DEMO_SCENE)
    server.upload(scene, "lora.png")
    server.get("/object_info/LoraLoaderModelOnly")
    prompt = edit("lora.png")
    plain = succeed(server.run(prompt)).pictures["save"][0]
    prompt["lora"] = node("LoraLoaderModelOnly", model=["load", 0], lora_name="trained.safetensors", strength_model=0.8)
    prompt["edit"]["inputs"]["model"] = ["lora", 0]
    changed = succeed(server.run(prompt)).pictures["save"][0]
    editor = InstructPix2Pix.load("embedded", device="cpu")
    editor.load_lora(folder / "trained.safetensors", 0.8)
    headless = editor.edit(scene, "make it snow", seeds=1, steps=10, text_cfg=4.0, image_cfg=1.5)[0].image
    far, near = (
        np.abs(np.asarray(changed.convert("RGB"), int) - np.asarray(p.convert("RGB"), int)) for p in (plain, headless)
    )
    assert far.mean() > 5 and near.max() <= 1
