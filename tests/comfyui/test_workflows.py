"""Every shipped workflow runs as it is installed, and its pictures are true: judged by the world they show."""

from __future__ import annotations

import io
import json
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_events import Listener
from comfy_server import succeed
from PIL import Image

from ip2p_engine.photos.pictures import demo_picture, load_pixels
from ip2p_engine.photos.tones import TONES
from ip2p_engine.scenes.grammar import Edit
from ip2p_engine.scenes.judge import judge_edit, read_scenes
from ip2p_engine.scenes.world import Scene

pytestmark = pytest.mark.comfy
FOLDER = Path(__file__).parents[2] / "workflows"
PAGES = sorted(FOLDER.glob("*.json"))


def edited(source: dict, **changes: str):
    scene = Scene(**{"size": "large", **source})
    return Edit(kind="", source=scene, target=scene.with_(**changes), instruction="")


TRUTHS = {
    "2": edited({"shape": "circle", "colour": "yellow", "background": "mint", "place": "top left"}, shape="star"),
    "6": edited({"shape": "square", "colour": "green", "background": "grey", "place": "bottom right"}, style="night"),
    "8": edited({"shape": "heart", "colour": "red", "background": "sky"}, shape="star", size="small", place="top left"),
    "9": edited({"shape": "triangle", "colour": "orange", "background": "lavender"}, colour="green"),
}


def last_preview(listener):
    """The picture that stays below the node that sampled."""
    seen = None
    for kind, data in listener.events():
        seen = data if kind == "preview" else seen
        if kind in ("execution_success", "execution_error", "execution_interrupted"):
            return seen and Image.open(io.BytesIO(seen)).convert("RGB")
    raise ConnectionError("the server closed")


@pytest.fixture(scope="module")
def previews():
    """The last one of each workflow."""
    return {}


@pytest.fixture(scope="module")
def runs(server, previews):
    """Each workflow posted once, as its page would post it."""
    done = {}

    def run(number):
        if number not in done:
            page = next(page for page in PAGES if page.stem.split()[0] == number)
            prompt, client = json.loads((FOLDER / "api" / page.name).read_text()), uuid.uuid4().hex
            with Listener(server.port, client) as listener:
                job = server.submit(prompt, json.loads(page.read_text()), client)
                previews[number] = last_preview(listener)
            done[number] = prompt, succeed(server.wait(job))
        return done[number]

    return run


def pictures(runs, number, title):
    prompt, run = runs(number)
    node = next(name for name, entry in prompt.items() if entry["_meta"]["title"] == title)
    return run.pictures[node]


@pytest.mark.parametrize("number", sorted(TRUTHS))
def test_the_edit_is_the_true_one(runs, number):
    title = {"6": "First edit"}.get(number, "Save Image")
    picture = pictures(runs, number, title)[0]
    assert judge_edit(TRUTHS[number], picture).success


def test_the_photograph_is_edited_as_asked(runs):
    """Of all tones of the moose, and of the moose as it was, the result is nearest to autumn, and as large."""
    source = load_pixels(demo_picture("moose")).float() / 255
    result = torch.from_numpy(np.array(pictures(runs, "1", "Save Image")[0])).permute(2, 0, 1) / 255
    assert result.shape == source.shape
    toned = {name: paint(source, torch.Generator().manual_seed(0)) for name, paint in TONES.items()}
    distances = {name: float((one - result).square().mean()) for name, one in {"none": source, **toned}.items()}
    assert min(distances, key=distances.__getitem__) == "autumn"


@pytest.mark.parametrize("number", ["1", "2", "4", "8", "9"])
def test_the_last_preview_is_the_result(runs, previews, number):
    if number == "4":
        first = [pictures(runs, number, title)[-1] for title in ("Before", "After")]
        result = np.concatenate([np.asarray(one, float) for one in first], axis=1)
    else:
        result = np.asarray(pictures(runs, number, "Save Image")[0], float)
    shown = previews[number].resize(result.shape[1::-1], Image.Resampling.BOX)
    off = abs(np.asarray(shown, float) - result).mean()
    sys.stdout.write(f"workflow {number}: {off:.2f} levels\n")
    assert off <= 6


def test_the_sweep_shows_what_the_guidances_do(runs):
    cells = read_scenes(pictures(runs, "3", "One by one"))
    by_row = [cells[start : start + 3] for start in (0, 3, 6)]  # text_cfg 0, 2, 8
    assert all(reading.scene.style == "sketch" and reading.scene.shape == "star" for reading in by_row[2])
    assert any(reading.scene.style != "sketch" for reading in by_row[0])
    assert pictures(runs, "3", "Save Image")[0].width > 3 * 128


def test_pairs_differ_in_their_captions_words_alone(runs):
    before, after = (read_scenes(pictures(runs, "4", title)) for title in ("Before", "After"))
    assert [reading.scene.colour for reading in before] == ["red"] * 4
    assert sum(a.scene == b.scene.with_(colour="blue") for a, b in zip(after, before, strict=True)) >= 3


def test_the_data_set_is_saved_and_told_about(runs, server):
    _, run = runs("5")
    report = next(texts["text"][0] for texts in run.outputs.values() if "MiB" in str(texts.get("text")))
    assert "my-pairs: " in report and "pairs of" in report
    assert (server.base / "output" / "datasets" / "my-pairs" / "workflow.json").exists()


def test_training_leaves_a_checkpoint_that_loads(runs, server):
    prompt, run = runs("6")
    told = next(texts["text"][0] for texts in run.outputs.values() if "text" in texts)
    assert told == str(Path("ip2p") / "my-edits.safetensors")
    offered = server.get("/object_info/IP2P_LoadCheckpoint")["IP2P_LoadCheckpoint"]["input"]["required"]["checkpoint"]
    assert told in offered[1]["options"]
    assert pictures(runs, "6", "Loss")[0].width > 300


def test_the_curve_is_drawn_and_told(runs):
    _, run = runs("7")
    table = next(texts["text"][0] for texts in run.outputs.values() if "text" in texts)
    assert "embedded model" in table and table.count("\n") >= 3
    assert pictures(runs, "7", "Save Image")[0].width > 500


def test_a_saved_picture_opens_as_its_workflow(runs, server):
    prompt, run = runs("1")
    node = next(name for name, entry in prompt.items() if entry["class_type"] == "SaveImage")
    data = server.raw_picture(run.outputs[node]["images"][0])
    with Image.open(io.BytesIO(data)) as picture:
        saved = json.loads(picture.info["prompt"])
        for entry in saved.values():
            entry.pop("is_changed", None)  # what the node last answered, which ComfyUI notes beside its inputs
        assert saved == prompt
        assert json.loads(picture.info["workflow"]) == json.loads((FOLDER / "1 Edit an image.json").read_text())
