"""What 0.1 saved goes on: tests/data/made-by-0.1, where README.md says how each was made.

Nearly everything goes through ``ip2p``, as its owner would, so that a move of the modules leaves these tests alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ip2p_engine import cli
from ip2p_engine.images import read_settings

MADE = Path(__file__).parent / "data" / "made-by-0.1"
ENDED = MADE / "ended"
PINNED = json.loads((Path(__file__).parent / "comfyui" / "nodes.json").read_text())
WORKFLOWS = sorted((MADE / "workflows").glob("*.json"))
PICTURES = ("original_image", "edited_image")
SCORES = ("sim_0", "sim_1", "sim_image", "sim_direction")
# JPEG turns one level of difference into a few.
LEVELS = {"PNG": 1, "JPEG": 4}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A copy of the folder, as its owner has it: a place to work in."""
    shutil.copytree(MADE, tmp_path / "home", ignore=shutil.ignore_patterns("ended", "workflows"))
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def ip2p(capsys):
    """Runs a command that must end well; returns what it prints."""

    def run(*words):
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        out, complaint = capsys.readouterr()
        assert code == 0, complaint
        return out

    return run


@pytest.fixture
def one_thread():
    """Sums are split among threads, and a float sum depends on how."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def command(name):
    """The words of a command that README.md shows, by what stands after its ``--out``."""
    lines = [line for line in (MADE / "README.md").read_text().splitlines() if line.startswith("ip2p ")]
    found = [line for line in lines if re.search(rf"--out {re.escape(name)}( |$)", line)]
    assert len(found) == 1, (name, found)
    return shlex.split(found[0])[1:]


def rows_of(folder):
    return [
        row for shard in sorted((folder / "data").glob("*.parquet")) for row in parquet.read_table(shard).to_pylist()
    ]


def picture(data):
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as opened:
        return np.asarray(opened.convert("RGB"), int), opened.format


def assert_same_picture(one, two):
    (pixels, kind), (others, _) = picture(one), picture(two)
    assert pixels.shape == others.shape
    assert np.abs(pixels - others).max() <= LEVELS.get(kind, 1)


def rounding():
    """How this machine rounds: a digest of one gradient of a small network, by torch alone."""
    random = torch.Generator().manual_seed(0)
    shapes = ((4, 32, 16, 16), (32, 32, 3, 3), (32, 32))
    pixels, kernel, square = (torch.randn(*shape, generator=random) for shape in shapes)
    kernel.requires_grad_(True)
    rows = torch.nn.functional.group_norm(torch.nn.functional.conv2d(pixels, kernel, padding=1), 4).flatten(2).mT
    (torch.softmax(rows @ square @ rows.mT / 9, -1) @ rows).square().mean().backward()
    return hashlib.sha256(f"torch {torch.__version__}".encode() + kernel.grad.numpy().tobytes()).hexdigest()[:16]


# Data sets


@pytest.mark.parametrize(("name", "pairs"), [("pairs", 6), ("replaced", 1)])
def test_a_store_opens(home, ip2p, name, pairs):
    assert json.loads(ip2p("dataset", "info", name, "--json"))["pairs"] == pairs
    found = json.loads(ip2p("dataset", "verify", name, "--json"))
    assert (found["pairs"], found["faults"]) == (pairs, [])
    ip2p("dataset", "copy", name, "copied")
    assert rows_of(home / "copied") == rows_of(MADE / name)
    ip2p("dataset", "export", name, "--out", "exported")
    assert len(list((home / "exported").rglob("*_1.jpg"))) == pairs
    ip2p("dataset", "sheet", name, "--out", "sheet.html")


def test_the_ledger_is_filtered_again(home, ip2p):
    for limit, kept in (("0.8", 6), ("0.9", 3)):
        options = ("--keep", 2, "--min-sim-direction", limit, "--out", f"over-{limit}", "--json")
        found = json.loads(ip2p("filter", "pairs", *options))["filtered"]
        assert (found["candidates"], found["kept"]) == (12, kept)
    loose, strict = ({row["key"] for row in rows_of(home / name)} for name in ("over-0.8", "over-0.9"))
    assert strict < loose == {row["key"] for row in rows_of(MADE / "pairs")}


@pytest.mark.parametrize("name", ["pairs", pytest.param("replaced", marks=pytest.mark.slow)])
def test_the_factory_goes_on(home, ip2p, name):
    """What was there stays, to the byte; what comes is what 0.1 itself made when it went on."""
    ip2p(*command(name))
    old, ended, new = (rows_of(folder / name) for folder in (MADE, ENDED, home))
    assert [{column: row[column] for column in old[0]} for row in new[: len(old)]] == old
    assert [row["key"] for row in new] == [row["key"] for row in ended] and len(new) > len(old)
    for row, wanted in zip(new, ended, strict=True):
        for column, value in wanted.items():
            if column in PICTURES:
                assert_same_picture(row[column]["bytes"], value["bytes"])
            else:
                assert row[column] == (pytest.approx(value, abs=1e-3) if column in SCORES else value)
    before, after, now = (ledger(folder / name) for folder in (MADE, ENDED, home))
    assert now.startswith(before)
    for line, wanted in zip(map(json.loads, now.splitlines()), map(json.loads, after.splitlines()), strict=True):
        assert {key: value for key, value in line.items() if key in wanted and key not in SCORES} == {
            key: value for key, value in wanted.items() if key not in SCORES
        }


def ledger(folder):
    return (folder / "candidates" / "00000-of-00001.jsonl").read_text()


# Training


@pytest.mark.parametrize(
    ("name", "files"), [("run", ["ema"]), ("lora-run", ["lora", "conv_in"])], ids=["muon, cached", "LoRA, crops"]
)
def test_a_stopped_run_goes_on(home, ip2p, one_thread, name, files):
    """Every loss and the last weights are 0.1's: to the bit where the machine rounds as that one did."""
    ip2p(*command(name))
    same = rounding() == json.loads((ENDED / "digests.json").read_text())["rounding"]
    for file in files:
        found, wanted = (plain(load_file(folder / name / f"{file}.safetensors")) for folder in (home, ENDED))
        assert found.keys() == wanted.keys()
        for tensor, value in wanted.items():
            assert torch.allclose(found[tensor], value, rtol=0, atol=1e-6), tensor
            assert not same or torch.equal(found[tensor], value), tensor
    losses, known = ([row["loss"] for row in log(folder / name)] for folder in (home, ENDED))
    assert losses == (known if same else pytest.approx(known, abs=1e-5))
    assert log(home / name)[: len(log(MADE / name))] == log(MADE / name)


def plain(tensors):
    """By names that 0.1's adapters and today's share: theirs were diffusers', these are kohya's, with an alpha each."""
    kept = {name: value for name, value in tensors.items() if not name.endswith(".alpha")}
    return {re.sub(r"^(lora_unet_|unet\.)", "", name).replace(".", "_"): value for name, value in kept.items()}


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_changed_setting_is_still_refused(home, capsys):
    assert cli.main([*command("run"), "--seed", "1"]) == 2
    assert "holds a run with seed 0 and now it is 1" in capsys.readouterr().err


def test_a_trained_checkpoint_tells_what_it_is(ip2p):
    card = json.loads(ip2p("inspect", ENDED / "run" / "ema.safetensors", "--json"))
    assert (card["task"], card["base"], card["in_channels"]) == ("InstructPix2Pix", "SD1.5", 8)
    assert (card["training"]["step"], card["training"]["config"]["optimizer"]) == (24, "muon")


@pytest.mark.slow
def test_a_trained_checkpoint_edits(home, ip2p):
    checkpoint = ENDED / "run" / "ema.safetensors"
    row = json.loads(
        ip2p(
            "edit", "scene.jpg", "--instruction", "make it snow", "--checkpoint", checkpoint, "--size", "keep", "--json"
        )
    )
    assert row["steps"] == 2 and row["edited_at"] == [64, 64]


# Edited pictures


EDITED = {
    "edited.png": {"instruction": "make it snow", "seed": 5, "steps": 20, "sampler": "euler_ancestral"},
    "edited.jpg": {"instruction": "paint it blue", "seed": 7, "steps": 8, "sampler": "heun", "edited_at": [80, 64]},
    "edited.webp": {"instruction": "turn the heart into a star", "seed": 6, "image_cfg": 1.2, "schedule": "karras"},
}


@pytest.mark.parametrize("name", EDITED)
def test_the_settings_of_a_picture_are_read(name):
    settings = read_settings(MADE / name)
    assert {key: settings[key] for key in EDITED[name]} == EDITED[name]
    assert settings["ip2p_engine"] == "0.1.0" and settings["source"] == "scene.jpg"


@pytest.mark.slow
def test_an_edit_gives_the_same_picture_and_settings(home, ip2p):
    assert (
        hashlib.sha256(picture(MADE / "edited.png")[0].astype(np.uint8).tobytes()).hexdigest()
        == (json.loads((ENDED / "digests.json").read_text())["edited.png"])
    )
    before = read_settings(MADE / "edited.png")
    (home / "edited.png").unlink()
    ip2p(*command("edited.png"))
    assert_same_picture(home / "edited.png", MADE / "edited.png")
    after, versions = read_settings(home / "edited.png"), ("ip2p_engine", "torch")
    assert {name: after[name] for name in before if name not in versions} == {
        name: value for name, value in before.items() if name not in versions
    }


# Evaluations


def test_old_evaluations_are_reported(home, ip2p):
    ip2p("evaluate", "report", "evaluated")
    page = (home / "evaluated" / "report.html").read_text()
    for run in (MADE / "evaluated").iterdir():
        tables = json.loads((run / "run.json").read_text())["tables"]
        assert tables and all(table["title"] in page for table in tables)
    assert page.count("data:image/png") >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scenes", "curve"])
def test_an_evaluation_goes_on(home, ip2p, name):
    """Rows may be measured again, and then they say the same."""
    before = json.loads((home / "evaluated" / name / "run.json").read_text())
    ip2p(*command(f"evaluated/{name}"))
    after = json.loads((home / "evaluated" / name / "run.json").read_text())
    assert [table["rows"] for table in after["tables"][:1]] == [table["rows"] for table in before["tables"][:1]]


# Workflows, by what nodes.json pins; tests/comfyui/test_made_by_0_1.py asks a real ComfyUI


@pytest.mark.parametrize("page", WORKFLOWS, ids=lambda page: page.stem)
def test_a_workflow_fits_the_nodes(page):
    prompt = json.loads((page.parent / "api" / page.name).read_text())
    for number, node in prompt.items():
        if not node["class_type"].startswith("IP2P_"):
            continue
        inputs = {given["name"]: given for given in PINNED[node["class_type"]]["inputs"]}
        place = f"{page.stem}, node {number}"
        assert node["inputs"].keys() <= inputs.keys(), place
        assert {name for name, given in inputs.items() if not given["optional"]} <= node["inputs"].keys(), place
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source = prompt[value[0]]["class_type"]
                if source in PINNED:
                    assert PINNED[source]["outputs"][value[1]]["type"] == inputs[name]["type"], place
            else:
                assert value in inputs[name].get("choices", [value]), place
                assert inputs[name].get("min", value) <= value <= inputs[name].get("max", value), place


@pytest.mark.parametrize("page", WORKFLOWS, ids=lambda page: page.stem)
def test_a_page_s_widgets_stand_where_they_stood(page):
    """A page holds its widgets' values by position, so a new widget may only come after them."""
    prompt = json.loads((page.parent / "api" / page.name).read_text())
    for node in json.loads(page.read_text())["nodes"]:
        if node["type"] in PINNED:
            widgets = [given for given in PINNED[node["type"]]["inputs"] if "default" in given]
            names = [name for given in widgets for name in [given["name"], *(["control"] if is_seed(given) else [])]]
            values = dict(zip(names, node["widgets_values"], strict=False))
            given = prompt[str(node["id"])]["inputs"]
            typed = {name: value for name, value in given.items() if not isinstance(value, list)}
            assert values.keys() - {"control"} <= given.keys() and typed.items() <= values.items()


def is_seed(given):
    return given["type"] == "INT" and given["name"] == "seed"
