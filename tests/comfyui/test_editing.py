"""Editing in a real ComfyUI: the engine's pictures, the artist's errors, and what the pack owes its host."""

from __future__ import annotations

import io
import time
import uuid
from dataclasses import replace

import numpy as np
import pytest
import torch
from comfy_events import Listener
from comfy_prompts import edit, guided, node
from comfy_server import NOT_OFFERED, Refused, complaint, difference, succeed
from PIL import Image
from safetensors.torch import load_file, save_file

from ip2p_engine import InstructPix2Pix
from ip2p_engine.checkpoint.write import ldm_state, save_diffusers, save_ldm
from ip2p_engine.diffusion.sampling import sample
from ip2p_engine.diffusion.schedule import make_sigmas
from ip2p_engine.edit import EditConfig
from ip2p_engine.networks.conditioning import clean_latents
from ip2p_engine.networks.model import load_model
from ip2p_engine.photos.pictures import demo_picture
from ip2p_engine.scenes.demo import DEMO_SCENE
from ip2p_engine.scenes.grammar import Edit
from ip2p_engine.scenes.judge import judge_edit
from ip2p_engine.scenes.world import render
from ip2p_engine.session import take_turn

pytestmark = pytest.mark.comfy
SNOW = Edit(kind="add snow", source=DEMO_SCENE, target=DEMO_SCENE.with_(style="snow"), instruction="make it snow")


@pytest.fixture(scope="module")
def scene(server):
    return server.upload(render(DEMO_SCENE), "scene.png")


@pytest.fixture(scope="module")
def editor():
    return InstructPix2Pix.load("embedded", device="cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampler": "dpmpp_2m", "schedule": "karras", "steps": 7},
        {"sampler": "heun", "steps": 3},
        {"sampler": "dpmpp_2m_sde", "seed": 2**40},
        {"sampler": "ddim", "schedule": "exponential", "image_cfg": 1.0},
        {"text_cfg": 1.5, "image_cfg": 1.5},
        {"text_cfg": 0.5, "image_cfg": 0.7, "steps": 1},
        {"instruction": "make it ‘night’ &amp; cold"},
    ],
    ids=str,
)
def test_same_picture_as_headless(server, scene, editor, changes):
    run = succeed(server.run(edit(scene, **changes)))
    options = {"text_cfg": 4.0, "image_cfg": 1.5, "steps": 10, "sampler": "euler_ancestral", "schedule": "model"}
    given = {"seed": 1, "instruction": "make it snow", **options, **changes}
    headless = editor.edit(render(DEMO_SCENE), given.pop("instruction"), seeds=given.pop("seed"), **given)[0].image
    # Both run float32 on this CPU; the promise is a mean of one level.
    assert difference(run.pictures["save"][0], headless) <= 1.0


def test_a_photograph_by_embedded_photos_is_the_same_headless(server):
    """Widths that are no whole multiples of the first, norms of 8 groups, no attention at the finest level."""
    given = {"text_cfg": 2.0, "image_cfg": 1.0, "steps": 4}
    prompt = edit("-", **given, instruction="make it autumn", detail=True, guidance_low=0.5, guidance_high=5.0)
    prompt["image"] = node("IP2P_ExamplePhoto", photo="moose")
    prompt["load"]["inputs"]["checkpoint"] = "embedded-photos"
    run = succeed(server.run(prompt))
    photos = InstructPix2Pix.load("embedded-photos", device="cpu")
    (headless,) = photos.edit(str(demo_picture("moose")), "make it autumn", seeds=1, detail=True)  # by its card
    assert difference(run.pictures["save"][0], headless.image) <= 1.0


LONG = " ".join(["make it a pencil sketch and make it night and"] * 10) + " make it snow"  # 103 tokens


def test_long_instructions_are_the_same_headless(server, scene, editor):
    """To their end, in two chunks: by our node, and by core's CLIP Text Encode, the guider and an Euler sampler."""
    run = succeed(server.run(edit(scene, instruction=LONG)))
    how = {"text_cfg": 4.0, "image_cfg": 1.5, "steps": 10}
    headless, first = (editor.edit(render(DEMO_SCENE), text, seeds=1, **how)[0].image for text in (LONG, LONG[:-13]))
    assert difference(run.pictures["save"][0], headless) <= 1.0
    assert difference(headless, first) > 1.0
    with torch.inference_mode():
        condition = editor.condition(render(DEMO_SCENE), LONG)
        sigmas = make_sigmas("model", editor.model.schedule, 10)
        noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(1)) * float((1 + sigmas[0] ** 2).sqrt())
        z = sample("euler", editor.denoiser(**how), noise, sigmas, condition)
    prompt = guided(scene, sampler="euler", positive={"text": LONG})
    assert difference(succeed(server.run(prompt)).pictures["save"][0], editor.pictures(z)[0]) <= 1.0


def test_a_relative_edits_as_headless(server, scene, editor):
    """Its formula and its suffix come with the checkpoint."""
    model, how = editor.model, {"seeds": 1, "steps": 10, "text_cfg": 3.0, "image_cfg": 1.25}
    own = {"guidance": "instruct-diffusion", "suffix": ", make it night"}
    relative = replace(model, spec=replace(model.spec, **own))
    save_ldm(relative, server.base / "models" / "checkpoints" / "own.safetensors")
    prompt = edit(scene, text_cfg=3.0, image_cfg=1.25)
    prompt["load"]["inputs"]["checkpoint"] = "own.safetensors"
    run = succeed(server.run(prompt))
    headless, without = (editor.edit(render(DEMO_SCENE), "make it snow", **how, **more)[0].image for more in (own, {}))
    assert difference(run.pictures["save"][0], headless) <= 1.0
    assert difference(headless, without) > 1.0


def test_published_checkpoints_are_offered_and_asked_for(server, scene, editor):
    """One that is not fetched says the command; a fetched one edits with what its authors recommend."""
    prompt = edit(scene, text_cfg=3.0, image_cfg=1.25)
    prompt["load"]["inputs"]["checkpoint"] = "published/instruct-diffusion"
    told = complaint(server, prompt)
    assert "instruct-diffusion is not on this disk yet" in told and "ip2p fetch instruct-diffusion" in told
    file = server.base / "cache" / "checkpoints" / "instruct-diffusion.ckpt"
    torch.save({"state_dict": ldm_state(editor.model)}, file)
    prompt["edit"]["inputs"]["seed"] = 2  # or the failed run's node is not asked again
    run = succeed(server.run(prompt))
    how = {"seeds": 2, "steps": 10, "text_cfg": 3.0, "image_cfg": 1.25, "guidance": "instruct-diffusion"}
    assert difference(run.pictures["save"][0], editor.edit(render(DEMO_SCENE), "make it snow", **how)[0].image) <= 1.0


def test_detail_is_the_same_headless(server, editor):
    smooth = np.asarray(render(DEMO_SCENE).resize((300, 260))).astype(int)
    grain = np.random.default_rng(0).integers(-20, 21, smooth.shape)
    picture = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
    server.upload(picture, "large.png")
    how = {"instruction": "make it night", "resolution": 128}
    run = succeed(server.run(edit("large.png", detail=True, **how)))
    options = {"seeds": 1, "steps": 10, "text_cfg": 4.0, "image_cfg": 1.5, "resolution": 128}
    ours, plain = (editor.edit(picture, "make it night", detail=detail, **options)[0].image for detail in (True, False))
    off = difference(run.pictures["save"][0], ours)
    assert off <= 1.0 and off < 0.3 * difference(ours, plain)


def test_the_embedded_model_says_what_it_knows(server, scene, editor):
    """On the node, of a picture that is no scene; and no other checkpoint says it."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    server.upload(Image.fromarray(noise), "noise.png")
    told = succeed(server.run(edit("noise.png", steps=1))).texts("edit")
    assert len(told) == 1 and "ip2p fetch instruct-pix2pix" in told[0]
    assert succeed(server.run(edit(scene, steps=1))).texts("edit") == []
    save_ldm(editor.model, server.base / "models" / "checkpoints" / "other.safetensors")
    other = edit("noise.png", steps=1)
    other["load"]["inputs"]["checkpoint"] = "other.safetensors"
    assert succeed(server.run(other)).texts("edit") == []


def test_odd_sizes_come_back(server, editor):
    picture = render(DEMO_SCENE).resize((150, 110))
    server.upload(picture, "odd.png")
    run = succeed(server.run(edit("odd.png", resolution=128)))
    headless = editor.edit(picture, "make it snow", seeds=1, steps=10, text_cfg=4.0, resolution=128)[0].image
    assert run.pictures["save"][0].size == (150, 110)
    assert difference(run.pictures["save"][0], headless) <= 1.0


def test_a_batch_is_its_pictures(server, scene):
    server.upload(render(DEMO_SCENE.with_(colour="green")), "second.png")
    prompt = edit(scene)
    prompt["second"] = node("LoadImage", image="second.png")
    prompt["batch"] = node("ImageBatch", image1=["image", 0], image2=["second", 0])
    prompt["edit"]["inputs"]["image"] = ["batch", 0]
    together = succeed(server.run(prompt)).pictures["save"]
    alone = [succeed(server.run(edit(name))).pictures["save"][0] for name in (scene, "second.png")]
    assert [difference(*pair) for pair in zip(together, alone, strict=True)] == pytest.approx([0, 0], abs=0.02)


def latents(server, prompt, *outputs):
    """The latents that a workflow gives at some of its outputs."""
    places = {f"latent {n}": f"{uuid.uuid4().hex}/latent" for n in range(len(outputs))}
    for (name, place), output in zip(places.items(), outputs, strict=True):
        prompt[name] = node("SaveLatent", samples=output, filename_prefix=place)
    succeed(server.run(prompt))
    folders = [(server.base / "output" / place).parent for place in places.values()]
    return [load_file(next(folder.glob("*.latent")))["latent_tensor"] for folder in folders]


def test_outside_the_mask_nothing_changes(server, scene):
    prompt = edit(scene, instruction="make it night")
    prompt["blank"] = node("SolidMask", value=0.0, width=64, height=64)
    prompt["half"] = node("SolidMask", value=1.0, width=32, height=64)
    prompt["mask"] = node("MaskComposite", destination=["blank", 0], source=["half", 0], x=0, y=0, operation="add")
    prompt["edit"]["inputs"]["mask"] = ["mask", 0]
    prompt["source"] = node("VAEEncode", pixels=["image", 0], vae=["load", 2])
    edited, kept = latents(server, prompt, ["edit", 1], ["source", 0])
    # The embedded decoder mixes all places, so the promise is looked at where it is made: in the latent.
    assert (edited - kept)[..., 4:].abs().max() < 1e-4 < 0.5 < (edited - kept)[..., :4].abs().max()


def masked(image, *, x, width, frame):
    """An edit whose mask is white in ``width`` columns from x on."""
    prompt = edit(image, instruction="make it night", resolution=128)
    prompt["blank"] = node("SolidMask", value=0.0, width=frame[0], height=frame[1])
    prompt["white"] = node("SolidMask", value=1.0, width=width, height=frame[1])
    prompt["mask"] = node("MaskComposite", destination=["blank", 0], source=["white", 0], x=x, y=0, operation="add")
    prompt["edit"]["inputs"]["mask"] = ["mask", 0]
    return prompt


@pytest.mark.parametrize(("x", "width"), [(0, 16), (24, 48)])
def test_a_mask_lies_where_it_was_drawn_on_a_picture_that_is_cropped(server, x, width):
    picture = render(DEMO_SCENE).resize((152, 112))  # the rule cuts 20 columns off on both sides
    server.upload(picture, "wide.png")
    edited = succeed(server.run(masked("wide.png", x=x, width=width, frame=picture.size))).pictures["save"][0]
    changed = np.abs(np.asarray(edited, float) - np.asarray(picture, float)).mean(axis=(0, 2))
    assert changed[: max(0, x - 1)].max(initial=0) == changed[x + width + 1 :].max() == 0
    assert x == 0 or changed[x : x + width].min() > 10


def test_encode_image_crops_the_mask_as_the_picture(server):
    server.upload(render(DEMO_SCENE).resize((152, 112)), "wide.png")
    given = masked("wide.png", x=20, width=28, frame=(152, 112))  # a quarter of what the crop leaves, from its left
    masks = {name: given[name] for name in ("blank", "white", "mask")}
    prompt = guided("wide.png", encode={"mask": ["mask", 0], "resolution": 128}, **masks)
    edited, kept = latents(server, prompt, ["sample", 0], ["encode", 2])
    assert (edited - kept)[..., 5:].abs().max() < 1e-4 < 0.5 < (edited - kept)[..., :3].abs().amax(dim=(0, 1, 2)).min()


def test_masks_are_one_or_one_a_picture(server, scene):
    prompt = edit(scene)
    prompt["mask"] = node("SolidMask", value=1.0, width=64, height=64)
    prompt["pictures"] = node("RepeatImageBatch", image=["image", 0], amount=3)
    prompt["white"] = node("MaskToImage", mask=["mask", 0])
    prompt["two"] = node("RepeatImageBatch", image=["white", 0], amount=2)
    prompt["masks"] = node("ImageToMask", image=["two", 0], channel="red")
    prompt["edit"]["inputs"].update(image=["pictures", 0], mask=["masks", 0])
    assert "2 masks and 3 pictures; give one mask, or one a picture" in complaint(server, prompt)


def test_an_empty_instruction_gives_the_picture_back(server, scene):
    run = succeed(server.run(edit(scene, instruction=" ")))
    assert difference(run.pictures["save"][0], render(DEMO_SCENE)) == 0


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "uni_pc", "euler_cfg_pp", "heun"])
def test_the_guider_edits_with_stock_samplers(server, scene, sampler):
    run = succeed(server.run(guided(scene, sampler=sampler)))
    assert judge_edit(SNOW, run.pictures["save"][0]).success


def test_the_negative_condition_may_lack_the_picture(server, scene):
    whole = succeed(server.run(guided(scene)))
    lacking = succeed(server.run(guided(scene, guider={"negative": ["negative", 0]})))
    assert difference(whole.pictures["save"][0], lacking.pictures["save"][0]) == 0


def test_cfg_hooks_are_honoured(server, scene):
    def picture(kind, text_cfg):
        hook = node("Test_Hook", model=["load", 0], change=kind)
        run = server.run(guided(scene, guider={"model": ["hook", 0], "text_cfg": text_cfg}, hook=hook))
        return succeed(run).pictures["save"][0]

    plain, without_text = picture("none", 4.0), picture("none", 0.0)
    assert difference(plain, without_text) > 5
    # The same algebra in another order of sums, so equal but for rounding.
    assert difference(plain, picture("pre: nothing", 4.0)) < 0.5
    assert difference(plain, picture("post: nothing", 4.0)) < 0.5
    assert difference(without_text, picture("pre: text like no text", 4.0)) < 0.5
    assert difference(plain, picture("post: zero", 4.0)) > 5


def test_a_mask_with_nothing_painted_is_none(server, scene):
    """Load Image gives a black one of 64 x 64 for a picture without any."""
    plain, blank = edit(scene), edit(scene)
    blank["edit"]["inputs"]["mask"] = ["image", 1]
    blank["mask"] = node("MaskPreview", mask=["image", 1])
    first, second = (succeed(server.run(prompt)).pictures["save"][0] for prompt in (plain, blank))
    assert difference(first, second) == 0
    wired = guided(scene, encode={"mask": ["image", 1]})
    first, second = (succeed(server.run(prompt)).pictures["save"][0] for prompt in (guided(scene), wired))
    assert difference(first, second) == 0


def test_resolution_comes_from_the_checkpoint(server, scene):
    wired = guided(scene, encode={"resolution": ["load", 6]})
    first, second = (succeed(server.run(prompt)).pictures["save"][0] for prompt in (guided(scene), wired))
    assert difference(first, second) == 0


@pytest.mark.parametrize("place", ["somebody/embedded", "models--somebody--embedded/snapshots/0123"])
def test_diffusers_folders_at_any_depth(server, scene, place):
    folder = server.base / "models" / "diffusers" / place
    save_diffusers(load_model("embedded"), folder)
    server.get("/object_info/IP2P_LoadCheckpoint")
    prompt = edit(scene)
    prompt["load"]["inputs"]["checkpoint"] = f"diffusers/{place}"
    first, second = (succeed(server.run(one)).pictures["save"][0] for one in (edit(scene), prompt))
    assert difference(first, second) < 0.5


def test_runs_are_bit_equal_and_unchanged_graphs_are_not_run(server, scene):
    prompt = edit(scene, seed=77)
    first = succeed(server.run(prompt))
    again = succeed(server.run(prompt))
    assert "edit" not in again.executed and "load" not in again.executed
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
    fresh = succeed(server.run(prompt))
    assert "edit" in fresh.executed
    assert difference(first.pictures["save"][0], fresh.pictures["save"][0]) == 0


def test_progress_previews_and_cancel_within_a_step(server, scene):
    client, values, previews, stopped_at = uuid.uuid4().hex, [], [], None
    with Listener(server.port, client) as listener:
        job = server.submit(edit(scene, steps=1000, seed=5), client=client)
        for kind, data in listener.events():
            if kind == "preview":
                previews.append(data)
            elif kind == "progress" and data.get("prompt_id") == job:
                values.append(data["value"])
                if len(values) == 5:
                    stopped_at = data["value"]
                    server.post("/interrupt", {})
            elif kind in ("execution_interrupted", "execution_success", "execution_error"):
                break
    assert kind == "execution_interrupted"
    # Messages wait in a queue while a step runs, so the one that was on its way counts too.
    assert max(values) <= stopped_at + 3
    assert values == sorted(values) and previews
    with Image.open(io.BytesIO(previews[-1])) as preview:
        assert preview.format == "JPEG"
    assert succeed(server.run(edit(scene, seed=6))).pictures["save"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (lambda s: guided(s, guider={"positive": ["positive", 0]}), "wire it through IP2P Encode Image"),
        (
            lambda s: guided(s, model=("sd", 0), sd=node("IP2P_LoadCheckpoint", **SD)),
            "takes 4 input channels, and an InstructPix2Pix takes 8",
        ),
        (lambda s: edit(s, resolution=32), "resolution"),
        (lambda s: {**edit(s), "grid": GRID, "end": node("PreviewImage", images=["grid", 0])}, "one line a picture"),
        (lambda s: {**SWEEP, "end": node("PreviewAny", source=["sweep", 0])}, "give numbers divided by commas"),
    ],
)
def test_errors_say_what_to_do_in_their_first_line(server, scene, prompt, words):
    assert words in complaint(server, prompt(scene))


SD = {"checkpoint": "embedded-sd", "weights": "ema", "base": "from the file itself"}
GRID = node("IP2P_LabelledGrid", images=["edit", 0], labels="one\ntwo", columns=4, height=64)
SWEEP = {"sweep": node("IP2P_SweepGuidance", text_cfgs="much", image_cfgs="1")}


@pytest.mark.parametrize("changes", [{"steps": 0}, {"text_cfg": -1.0}, {"seed": 2**63}])
def test_values_out_of_range_are_refused_before_running(server, scene, changes):
    with pytest.raises(Refused) as refusal:
        server.submit(edit(scene, **changes))
    errors = refusal.value.args[0]["node_errors"]["edit"]["errors"]
    assert next(iter(changes)) in str(errors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("edit", "sampler", "nonesuch"), "choose one of euler_ancestral"),
        (("load", "checkpoint", "../../secret.safetensors"), "press R in ComfyUI to refresh"),
        (("load", "base", "/etc/passwd"), "press R in ComfyUI to refresh"),
    ],
)
def test_choices_that_are_not_offered(server, scene, change, words):
    name, widget, value = change
    prompt = edit(scene)
    prompt[name]["inputs"][widget] = value
    told = complaint(server, prompt)
    assert words in told or NOT_OFFERED in told


def test_the_report_says_what_the_base_gave(server):
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    state = ldm_state(load_model("embedded"))
    save_file(
        {name: state[name] for name in state if name.startswith("model.diffusion_model.")}, folder / "lone.safetensors"
    )
    server.get("/object_info/IP2P_LoadCheckpoint")

    def told(checkpoint):
        prompt = {"load": node("IP2P_LoadCheckpoint", checkpoint=checkpoint, weights="ema", base="embedded-sd")}
        return succeed(server.run({**prompt, "told": node("PreviewAny", source=["load", 5])})).texts("told")[0]

    assert "autoencoder, text_encoder from embedded-sd" in told("diffusion_models/lone.safetensors")
    assert "embedded-sd is not used: the file is whole" in told("embedded")


@pytest.mark.slow
def test_three_hundred_edits_keep_memory_flat(server, scene):
    for seed in range(5):
        succeed(server.run(edit(scene, seed=1000 + seed, steps=2), fetch=False))
    jobs = [server.submit(edit(scene, seed=2000 + seed, steps=2)) for seed in range(300)]
    succeed(server.wait(jobs[29], fetch=False))
    early = server.memory()
    for job in jobs:
        assert server.wait(job, fetch=False).status == "success"
    assert server.memory() <= 1.02 * early


def test_a_mask_is_the_same_headless(server, editor):
    """Inside the mask a mean of one level and no pixel beyond four; outside both are the source."""
    picture = render(DEMO_SCENE).resize((128, 96))
    server.upload(picture, "masked.png")
    run = succeed(server.run(masked("masked.png", x=40, width=50, frame=(128, 96))))
    mask = Image.new("L", (128, 96))
    mask.paste(255, (40, 0, 90, 96))
    how = {"seeds": 1, "steps": 10, "text_cfg": 4.0, "image_cfg": 1.5, "resolution": 128}
    headless = editor.edit(picture, "make it night", masks=mask, **how)[0].image
    ours, theirs = (np.asarray(one.convert("RGB"), int) for one in (headless, run.pictures["save"][0]))
    inside = np.asarray(mask) > 0
    off = np.abs(ours - theirs)
    assert not off[~inside].any() and off[inside].mean() <= 1 and off.max() <= 4
    assert np.abs(ours - np.asarray(picture, int))[inside].mean() > 20


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"guidance_low": 0.5, "guidance_high": 5.0}, {"guidance_interval": (0.5, 5.0)}),
        ({"rescale": 0.7}, {"guidance_rescale": 0.7}),
        ({"apg": True, "text_cfg": 6.0}, {"apg": True, "text_cfg": 6.0}),
        ({"find_area": True, "instruction": "turn the heart into a star"}, {"auto_mask": True}),
    ],
    ids=str,
)
def test_options_of_guidance_and_the_area_are_the_same_headless(server, scene, editor, changes, options):
    run = succeed(server.run(edit(scene, **changes)))
    how = {"text_cfg": 4.0, "image_cfg": 1.5, "steps": 10, **options}
    text = changes.get("instruction", "make it snow")
    headless = editor.edit(render(DEMO_SCENE), text, seeds=1, **how)[0].image
    assert difference(run.pictures["save"][0], headless) <= 1.0


def test_a_second_instruction_takes_the_first_ones_latent(server, scene, editor):
    """As a session does: its condition is the latent as it is, which no picture has rounded."""
    prompt = edit(scene, instruction="make it night")
    second = {
        **prompt["edit"]["inputs"],
        "image": ["edit", 0],
        "last_latent": ["edit", 1],
        "instruction": "paint it blue",
    }
    prompt["second"] = {"class_type": "IP2P_Sample", "inputs": second}
    prompt["save"]["inputs"]["images"] = ["second", 0]
    run = succeed(server.run(prompt))
    how = EditConfig(text_cfg=4.0, image_cfg=1.5, steps=10)
    latents = clean_latents(editor.model, editor.condition(render(DEMO_SCENE), "-").image)
    for text in ("make it night", "paint it blue"):
        latents = take_turn(editor, latents, [text], [1], config=how, hold=False)[0]
    assert difference(run.pictures["save"][0], editor.pictures(latents)[0]) <= 1.0
