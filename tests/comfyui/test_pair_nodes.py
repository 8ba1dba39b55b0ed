"""Pairs, the filter and data sets in a real ComfyUI."""

from __future__ import annotations

import io
import json
import random
import shutil
import time
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from comfy_events import Listener
from comfy_prompts import EVALUATE, TRAIN, node
from comfy_server import NOT_OFFERED, ComfyServer, complaint, difference, succeed

from ip2p_engine.data.store import PairStore
from ip2p_engine.data.tools import verify
from ip2p_engine.p2p.generator import PairConfig, PairGenerator
from ip2p_engine.scenes.demo import DEMO_SCENE
from ip2p_engine.scenes.judge import read_scenes
from ip2p_engine.scenes.world import render

pytestmark = pytest.mark.comfy
CAPTIONS = {
    "caption": "a large red heart in the centre on a sky background",
    "edited_caption": "a large blue heart in the centre on a sky background",
    "instruction": "make the heart blue",
}
SETTINGS = {
    "candidates": 2,
    "seed": 3,
    "steps": 10,
    "p2p_min": 0.3,
    "p2p_max": 0.9,
    "cfg_min": 3.0,
    "cfg_max": 6.0,
    "mode": "self",
    "local_blend": False,
    "sampler": "euler_ancestral",
    "resolution": 0,
    "batch": 2,
}
FLOORS = {"min_sim_image": -1.0, "min_sim_direction": -1.0, "min_sim_0": -1.0, "min_sim_1": -1.0}


def pairs(**changes):
    return {
        "load": node("IP2P_LoadCheckpoint", checkpoint="embedded-sd", weights="ema", base="from the file itself"),
        "pairs": node(
            "IP2P_GeneratePairs",
            model=["load", 0],
            clip=["load", 1],
            vae=["load", 2],
            **{**CAPTIONS, **SETTINGS, **changes},
        ),
        "before": node("SaveImage", images=["pairs", 1], filename_prefix="test/before"),
        "after": node("SaveImage", images=["pairs", 2], filename_prefix="test/after"),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampler": "heun", "steps": 4},
        {"caption": "a (large red) heart on a sky background"},
        {"mode": "replace", "local_blend": True},
        {"mode": "refine", "edited_caption": "a large blue heart in the centre on a sky background, at night"},
    ],
    ids=str,
)
def test_same_pairs_as_headless(server, changes):
    run = succeed(server.run(pairs(**changes)))
    values = {**CAPTIONS, **SETTINGS, **changes}
    names = ("steps", "mode", "local_blend", "sampler")
    config = PairConfig(p2p_range=(0.3, 0.9), cfg_range=(3.0, 6.0), **{name: values[name] for name in names})
    generator = PairGenerator.load("embedded-sd", config, device="cpu")
    headless = generator.generate(values["caption"], values["edited_caption"], [3, 4])
    for number, candidate in enumerate(headless):
        assert difference(run.pictures["before"][number], candidate.source_image) <= 1.0
        assert difference(run.pictures["after"][number], candidate.edited_image) <= 1.0


def test_the_pictures_differ_in_what_the_captions_do(server):
    run = succeed(server.run(pairs(steps=20)))
    before, after = read_scenes([run.pictures["before"][0], run.pictures["after"][0]])
    assert (before.scene.colour, after.scene.colour) == ("red", "blue")
    assert before.scene.with_(colour="blue") == after.scene
    assert before.clear and after.clear


def test_conditions_evaluated_apart_give_the_same_pairs(server):
    together = succeed(server.run(pairs()))
    prompt = pairs()
    prompt["watch"] = node("Test_Watch", model=["load", 0], name="pairs apart", apart=True)
    prompt["pairs"]["inputs"]["model"] = ["watch", 0]
    prompt["seen"] = node("Test_Seen", name="pairs apart", after=["pairs", 1])
    prompt["told"] = node("PreviewAny", source=["seen", 0])
    apart = succeed(server.run(prompt))
    assert {tuple(conditions) for _, conditions in json.loads(apart.texts("told")[0])} == {(0,), (1,)}
    for name in ("before", "after"):
        assert difference(together.pictures[name][0], apart.pictures[name][0]) < 0.02


def test_the_model_is_as_before(server):
    prompt = {
        "load": pairs()["load"],
        "text": node("CLIPTextEncode", clip=["load", 1], text=CAPTIONS["caption"]),
        "none": node("CLIPTextEncode", clip=["load", 1], text=""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        "sample": node(
            "KSampler",
            model=["load", 0],
            positive=["text", 0],
            negative=["none", 0],
            latent_image=["empty", 0],
            seed=1,
            steps=6,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test/plain"),
    }
    first = succeed(server.run(prompt))
    succeed(server.run(pairs(mode="replace", seed=99)))
    prompt["repeat"] = node("RepeatLatentBatch", samples=["empty", 0], amount=1)  # so that nothing is cached
    prompt["sample"]["inputs"]["latent_image"] = ["repeat", 0]
    second = succeed(server.run(prompt))
    assert "sample" in second.executed
    assert [difference(*both) for both in zip(first.pictures["save"], second.pictures["save"], strict=True)] == [0, 0]


def shown(listener, count=None):
    """The values of the pairs' progress bar until the run ends or there are ``count``, and what ended it."""
    values = []
    for kind, data in listener.events():
        # Finished pictures come with the value of the last step, and with 1 of 1 where nothing had to be made.
        if kind == "progress" and data["node"] == "pairs" and data["max"] > 1 and values[-1:] != [data["value"]]:
            values.append(data["value"])
        if len(values) == count or kind in ("execution_success", "execution_error", "execution_interrupted"):
            return values, kind
    raise ConnectionError("the server closed")


def cancelled(server, prompt, count):
    """Run, and press Cancel once the bar has shown so many values."""
    client = uuid.uuid4().hex
    with Listener(server.port, client) as listener:
        server.submit(prompt, client=client)
        shown(listener, count)
        server.post("/interrupt", {})
        after, kind = shown(listener)
        assert kind == "execution_interrupted"
    return after


def run_to_the_end(server, prompt):
    """The values that the bar shows."""
    client = uuid.uuid4().hex
    with Listener(server.port, client) as listener:
        server.submit(prompt, client=client)
        values, kind = shown(listener)
    assert kind == "execution_success"
    return values


def test_a_cancelled_run_goes_on_where_it_was(server):
    prompt = pairs(candidates=3, batch=1, steps=30, seed=50)
    cancelled(server, prompt, 35)
    values = run_to_the_end(server, prompt)
    assert min(values) >= 31 and values[-1] == 90  # the first pair was not made again


def test_cancel_is_heard_within_a_step_of_many_pairs(server):
    """As in an edit: the step that runs, and messages that wait while it does."""
    assert len(cancelled(server, pairs(candidates=16, batch=16, steps=200, seed=55), 3)) <= 3


def test_a_cancelled_list_goes_on_in_the_edit_where_it_was(server):
    prompt = pairs(candidates=2, batch=1, steps=30, seed=60)
    prompt["list"] = node("IP2P_SweepGuidance", text_cfgs="2, 3", image_cfgs="1")
    prompt["pairs"]["inputs"]["cfg_min"] = ["list", 0]
    cancelled(server, prompt, 100)  # in the second edit's second pair
    values = run_to_the_end(server, prompt)
    assert min(values) >= 31 and len(values) <= 30  # three of the four pairs were there


def test_a_cancelled_model_s_pairs_are_not_a_patched_one_s(server):
    plain, patched = (pairs(batch=1, seed=70) for _ in range(2))
    patched["patch"] = node("FreeU_V2", model=["load", 0], b1=1.6, b2=1.8, s1=0.5, s2=0.2)
    patched["pairs"]["inputs"]["model"] = ["patch", 0]
    cancelled(server, plain, 12)  # in the second pair
    first, other = (succeed(server.run(prompt)).pictures["after"][0] for prompt in (patched, plain))
    assert difference(first, other) > 1


def leaves(base):
    """Every store of made pairs, by its folder."""
    return {path.parent: PairStore(path.parent) for path in (base / "output" / "ip2p_pairs").rglob("manifest.json")}


def test_more_candidates_are_made_beside_those_that_are_there(server):
    succeed(server.run(pairs(candidates=2, batch=1, seed=80)))
    found = leaves(server.base)
    folder = next(folder for folder, store in found.items() if 80 in store.columns("seed")["seed"])
    values = run_to_the_end(server, pairs(candidates=3, batch=1, seed=79, instruction="another word"))
    assert len(values) == 10  # one pair of ten steps
    assert {79, 80, 81} <= set(PairStore(folder).columns("seed")["seed"])
    assert verify(folder).sound


def test_deleted_pairs_are_made_again(server):
    prompt = pairs(candidates=2, batch=1, seed=85)
    first = succeed(server.run(prompt)).pictures["after"]
    for folder, store in leaves(server.base).items():
        if 85 in store.columns("seed")["seed"]:
            shutil.rmtree(folder)
    again = succeed(server.run(prompt))
    assert "pairs" in again.executed
    assert [difference(*both) for both in zip(first, again.pictures["after"], strict=True)] == [0, 0]


def test_drawing_many_scenes_stops_at_once(server):
    prompt = {"pairs": node("IP2P_LoadDataset", name="embedded scenes", count=100_000, seed=0, preview=1)}
    prompt["told"] = node("PreviewImage", images=["pairs", 1])
    started = time.monotonic()
    cancelled(server, prompt, 3)
    assert time.monotonic() - started < 15  # all of them are many minutes


@pytest.mark.slow
def test_killed_and_cancelled_at_any_moment_only_what_is_missing_is_made(comfyui, tmp_path):
    """Sixty edits of four pairs, as in workflow 5."""
    prompt = pairs(candidates=4, batch=2, steps=2, sampler="ddim", seed=90)
    prompt["captions"] = node("IP2P_Captions", captions="", source="scenes grammar", count=60, seed=9)
    texts = ("caption", "edited_caption", "instruction")
    prompt["pairs"]["inputs"] |= {name: ["captions", n] for n, name in enumerate(texts)}
    moments, made = random.Random(5), [0]
    for ends in (kill, kill, cancel, cancel, None):
        with ComfyServer(comfyui, tmp_path) as server:
            client = uuid.uuid4().hex
            with Listener(server.port, client) as listener:
                server.submit(prompt, client=client)
                count = moments.randrange(10, 55) if ends else None
                values, kind = shown(listener, count)
                if ends:
                    ends(server)
                else:
                    assert kind == "execution_success"
                    assert len(values) == 240 - made[-1]  # batches of two pairs, of two steps each
            time.sleep(1)
        found = leaves(tmp_path)
        assert all(verify(folder).sound for folder in found)
        made.append(sum(map(len, found.values())))
    assert made == sorted(set(made)) and made[-1] == 240


def kill(server):
    server.process.kill()
    server.process.wait()


def cancel(server):
    server.post("/interrupt", {})


def filtered(**changes):
    prompt = pairs()
    values = {"keep": 1, **FLOORS, **changes}
    prompt["filter"] = node("IP2P_ClipFilter", pairs=["pairs", 0], clip_model="embedded", **values)
    prompt["scores"] = node("PreviewAny", source=["filter", 3])
    prompt["kept"] = node("PreviewImage", images=["filter", 1])
    return prompt


def test_the_filter_keeps_the_best_and_tells_why(server):
    run = succeed(server.run(filtered()))
    assert len(run.pictures["kept"]) == 1
    assert "1 of 2 candidates kept" in run.texts("scores")[0]
    strict = succeed(server.run(filtered(min_sim_image=1.0)))
    assert "kept" not in strict.pictures
    assert "0 of 2 candidates kept" in strict.texts("scores")[0]


def test_a_data_set_is_saved_once_and_opened(server):
    prompt = filtered(keep=2)
    name = f"set-{uuid.uuid4().hex[:8]}"
    prompt["data"] = node("IP2P_SaveDataset", pairs=["filter", 0], name=name)
    prompt["report"] = node("PreviewAny", source=["data", 1])
    run = succeed(server.run(prompt, {"nodes": []}))
    assert f"{name}: 2 pairs of 1 captions" in run.texts("report")[0]
    server.post("/free", {"free_memory": True})
    time.sleep(1.5)
    succeed(server.run(prompt))
    folder = server.base / "output" / "datasets" / name
    stored = list(PairStore(folder))
    assert [pair.edit_prompt for pair in stored] == ["make the heart blue"] * 2
    assert all(pair.sim_direction is not None for pair in stored)
    assert json.loads((folder / "workflow.json").read_text()) == {"nodes": []}
    opened = {
        "data": node("IP2P_LoadDataset", name=f"output/{name}", count=1, seed=0, preview=8),
        "after": node("PreviewImage", images=["data", 2]),
        "told": node("PreviewAny", source=["data", 3]),
    }
    run = succeed(server.run(opened))
    assert len(run.pictures["after"]) == 2


def saved(name, **changes):
    """All candidates into a data set, whose report is node "report"."""
    prompt = pairs(**changes)
    prompt["data"] = node("IP2P_SaveDataset", pairs=["pairs", 0], name=name)
    prompt["report"] = node("PreviewAny", source=["data", 1])
    return prompt


def test_other_pictures_of_the_same_captions_and_seed_are_other_pairs(server):
    name = f"set-{uuid.uuid4().hex[:8]}"
    told = [succeed(server.run(saved(name, steps=steps))).texts("report")[0] for steps in (2, 3)]
    assert "2 pairs added, 0 were there" in told[0] and "2 pairs added, 0 were there" in told[1]
    server.post("/free", {"free_memory": True})
    time.sleep(1.5)
    assert "0 pairs added, 2 were there" in succeed(server.run(saved(name, steps=3))).texts("report")[0]
    assert len(PairStore(server.base / "output" / "datasets" / name)) == 4


def foreign(server, sizes):
    """A data set of three columns, as the hub has them, with pictures of some sizes; its name in IP2P Load Data Set."""
    name = f"hub-{uuid.uuid4().hex[:8]}"
    folder = server.base / "input" / "datasets" / name
    folder.mkdir(parents=True)
    rows = [make_png(render(DEMO_SCENE).resize(size)) for size in sizes]
    pictures = {column: [{"bytes": row, "path": None} for row in rows] for column in ("original_image", "edited_image")}
    pq.write_table(pa.table({**pictures, "edit_prompt": ["make it snow"] * len(rows)}), folder / "train.parquet")
    return f"input/{name}"


def make_png(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def test_a_data_set_of_the_hub_is_filtered_and_saved(server):
    name = f"set-{uuid.uuid4().hex[:8]}"
    prompt = {
        "load": node("IP2P_LoadDataset", name=foreign(server, [(64, 64), (80, 48)]), count=1, seed=0, preview=8),
        "filter": node("IP2P_ClipFilter", pairs=["load", 0], clip_model="embedded", keep=9, **FLOORS),
        "kept": node("PreviewImage", images=["filter", 2]),
        "data": node("IP2P_SaveDataset", pairs=["load", 0], name=name),
        "report": node("PreviewAny", source=["data", 1]),
    }
    run = succeed(server.run(prompt))
    assert sorted(picture.size for picture in run.pictures["kept"]) == [(64, 64), (80, 48)]
    assert "2 pairs added" in run.texts("report")[0]
    assert all(pair.key for pair in PairStore(server.base / "output" / "datasets" / name))


@pytest.mark.parametrize("kind", ["IP2P_Train", "IP2P_Evaluate"])
def test_no_pair_is_no_work(server, kind):
    prompt = filtered(min_sim_image=1.0)
    prompt["data"] = node("IP2P_SaveDataset", pairs=["filter", 0], name=f"set-{uuid.uuid4().hex[:8]}")
    prompt["edit"] = node("IP2P_LoadCheckpoint", checkpoint="embedded", weights="ema", base="from the file itself")
    networks = dict(zip(("model", "clip", "vae"), (["edit", n] for n in range(3)), strict=True))
    kinds = {"IP2P_Train": TRAIN, "IP2P_Evaluate": {**EVALUATE, **networks}}
    prompt["end"] = node(kind, pairs=["data", 0], **kinds[kind])
    prompt["told"] = node("PreviewImage", images=["end", 3 if kind == "IP2P_Train" else 0])
    assert "there is no pair; if IP2P CLIP Filter kept none, its scores say" in complaint(server, prompt)


@pytest.mark.parametrize(
    "name", ["../outside", "/tmp/outside", "", "a/../../../outside", "a/b", "nul\0x", "???", "a.", "CON", "lpt1.x"]
)
def test_names_stay_inside_their_folder(server, name):
    prompt = filtered()
    prompt["data"] = node("IP2P_SaveDataset", pairs=["filter", 0], name=name)
    assert "give a plain name such as my-set" in complaint(server, prompt)
    opened = {"data": node("IP2P_LoadDataset", name=f"output/{name}", count=1, seed=0, preview=1)}
    opened["end"] = node("PreviewImage", images=["data", 1])
    told = complaint(server, opened)
    assert "press R in ComfyUI" in told or NOT_OFFERED in told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": ["edit", 0]}, "which takes 4"),
        ({"p2p_min": 0.9, "p2p_max": 0.1}, "the lower and the upper end"),
        ({"mode": "replace", "edited_caption": "a heart"}, "word"),
        ({"local_blend": True, "edited_caption": CAPTIONS["caption"]}, "no word changes; switch it off"),
    ],
)
def test_errors_of_pairs_say_what_to_do(server, change, words):
    prompt = pairs(**{name: value for name, value in change.items() if name != "model"})
    prompt["edit"] = node("IP2P_LoadCheckpoint", checkpoint="embedded", weights="ema", base="from the file itself")
    prompt["pairs"]["inputs"].update(change)
    assert words in complaint(server, prompt)


def test_captions_of_the_grammar_and_none_else(server):
    told = {
        "captions": node("IP2P_Captions", captions="", source="scenes grammar", count=3, seed=1),
        "end": node("PreviewAny", source=["captions", 2]),
    }
    assert succeed(server.run(told)).texts("end")
    told["captions"]["inputs"]["captions"] = "a photograph of a harbour"
    assert "none of 3 answers could be used (unknown caption)" in complaint(server, told)
    told["captions"]["inputs"]["source"] = "server"
    assert "IP2P_CAPTIONS_URL" in complaint(server, told)


def test_no_edit_comes_twice(server):
    told = {
        "captions": node("IP2P_Captions", captions=CAPTIONS["caption"], source="scenes grammar", count=60, seed=1),
        "end": node("PreviewAny", source=["captions", 2]),
    }
    edits = succeed(server.run(told)).texts("end")
    assert 20 < len(edits) == len(set(edits)) < 60
