"""What strangers send, as entries of the nodes' lists: each ends in a sentence or a result, and the server lives on.

The inputs are those of tests/robustness: spoiled checkpoints and data sets, small files that ask for much.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path

import pytest
from comfy_prompts import LOADER, edit, node
from comfy_server import Refused, complaint, succeed
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "robustness"))
pytestmark = [pytest.mark.comfy, pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")]
SECONDS, BYTES = 60, 1 << 30  # beside other work; a quiet core takes two
SENTENCES = ("CheckpointError", "ConfigError", "DatasetError", "ImageError", "LostRows")
PER_KIND = int(os.environ.get("IP2P_HOSTILE", "1"))
CHECKPOINTS = [
    "safetensors_entry",
    "safetensors_names",
    "safetensors_shapes",
    "safetensors_overlap",
    "safetensors_many",
    "safetensors_text",
    "own_spec",
    "own_architecture",
    "own_architecture_bomb",
    "pickle_code",
    "pickle_bomb",
    "pickle_unfolds",
    "pickle_attributes",
    "pickle_tensors",
    "archive_members",
    "unet_config",
    "text_config",
    "config_bomb",
    "pipeline_files",
    "links_in_folders",
]
DATA_SETS = [
    "parquet_types",
    "parquet_values",
    "parquet_columns",
    "parquet_bytes",
    "parquet_pages",
    "parquet_writers",
    "parquet_bomb",
    "pictures_in_parquet",
    "picture_bombs_in_rows",
    "store_files",
    "manifest",
]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Sound inputs to spoil."""
    from seeds import make_seeds

    import ip2p_engine
    from ip2p_engine.cli import main

    home = tmp_path_factory.mktemp("seeds")
    make_seeds(home, main, Path(ip2p_engine.__file__).parents[1])
    return home


def spoiled(kind: str, number: int, seeds: Path, place: Path) -> Path:
    """The file or folder that a generator of the campaign has made."""
    from hostile_inputs import GENERATORS, Case

    place.mkdir(parents=True)
    GENERATORS[kind](Case(place=place, seeds=seeds, rng=random.Random(f"{kind} {number}")))
    return next(path for path in sorted(place.iterdir()) if path.name != "edits.jsonl")


def tried(server, prompt):
    """What a node says of an entry; it has to end in time, and in one of the engine's sentences if not well."""
    before = server.memory()
    try:
        run = server.run(prompt, fetch=False)
    except Refused as refusal:
        return str(refusal.args[0])
    assert run.status == "success" or run.error["exception_type"].endswith(SENTENCES), run.error
    assert run.seconds < SECONDS
    assert server.memory() - before < BYTES
    return run.message


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_hostile_checkpoint_is_chosen(kind, server, seeds, tmp_path):
    for number in range(PER_KIND):
        found = spoiled(kind, number, seeds, tmp_path / "root" / str(number))
        name = f"hostile-{kind}-{number}{found.suffix if found.is_file() else ''}"
        home = server.base / "models" / ("checkpoints" if found.is_file() else "diffusers")
        home.mkdir(parents=True, exist_ok=True)
        shutil.move(found, home / name)
        inside = "/snapshots/z" if kind == "links_in_folders" else ""
        entry = name if (home / name).is_file() else f"diffusers/{name}{inside}"
        tried(server, {"load": node("IP2P_LoadCheckpoint", **{**LOADER, "checkpoint": entry})} | shown("load", 5))
        (shutil.rmtree if (home / name).is_dir() else os.unlink)(home / name)
    assert not (tmp_path / "root" / "canary").exists()
    assert server.get("/system_stats")


@pytest.mark.parametrize("kind", DATA_SETS)
def test_a_hostile_data_set_is_chosen(kind, server, seeds, tmp_path):
    for number in range(PER_KIND):
        found = spoiled(kind, number, seeds, tmp_path / str(number))
        home = server.base / "output" / "datasets" / f"hostile-{kind}-{number}"
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(found, home)
        opened = node("IP2P_LoadDataset", name=f"output/{home.name}", count=1, seed=0, preview=8)
        tried(server, {"data": opened} | shown("data", 3))
        shutil.rmtree(home)
    assert server.get("/system_stats")


def shown(source: str, output: int) -> dict[str, dict]:
    return {"show": node("PreviewAny", source=[source, output])}


@pytest.mark.parametrize(
    "name", ["../escaped", "..", "a/../../b", "/etc/x", "CON", "nul.txt", "a\nb", "\x1b[2J", "x" * 300, ""]
)
def test_a_workflow_from_elsewhere_names_a_place(name, server):
    loaded = {"data": node("IP2P_LoadDataset", name="embedded scenes", count=1, seed=0, preview=1)}
    said = complaint(server, loaded | {"keep": node("IP2P_SaveDataset", pairs=["data", 0], name=name)})
    assert "plain name" in said or "File name too long" in said
    reading = {"data": node("IP2P_LoadDataset", name=f"output/{name}", count=1, seed=0, preview=1)} | shown("data", 3)
    said = complaint(server, reading)
    assert "is not there" in said or "not in list" in said
    choosing = {"load": node("IP2P_LoadCheckpoint", **{**LOADER, "checkpoint": f"diffusers/{name}"})} | shown("load", 5)
    said = complaint(server, choosing)
    assert "is not there" in said or "not in list" in said


def test_the_server_edits_afterwards(server):
    image = server.upload(Image.new("RGB", (64, 64), "red"), "after.png")
    assert succeed(server.run(edit(image, steps=2))).pictures["save"]
