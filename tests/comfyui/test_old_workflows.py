"""Workflows of 0.1 as people saved them, pages and API files: they run, and their pictures are the same.

tests/data/workflows-0.1 holds the nine as they were, and what 0.1 made of them in ComfyUI 0.3.75 on a CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfy_server import difference, succeed
from PIL import Image
from workflow_format import to_api

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
FOLDER = Path(__file__).parents[1] / "data" / "workflows-0.1"
NUMBERS = [str(number) for number in range(1, 10)]


@pytest.mark.parametrize("number", NUMBERS)
def test_an_old_workflow_makes_the_same_pictures(server, number):
    run = succeed(server.run(json.loads((FOLDER / "api" / f"{number}.json").read_text())))
    expected = sorted((FOLDER / "pictures").glob(f"{number}-*.png"))
    assert expected
    for path in expected:
        _, node, place = path.stem.split("-")
        with Image.open(path) as picture:
            assert difference(run.pictures[node][int(place)], picture) <= 1, path.name


@pytest.mark.parametrize("number", NUMBERS)
def test_an_old_page_posts_what_it_posted(object_info, number):
    page = json.loads((FOLDER / f"{number}.json").read_text())
    twin = json.loads((FOLDER / "api" / f"{number}.json").read_text())
    posted = to_api(page, object_info)
    assert set(posted) == set(twin)
    for name, node in twin.items():
        inputs = posted[name]["inputs"]
        assert {key: inputs[key] for key in node["inputs"]} == node["inputs"]
        for link in (value for value in inputs.values() if isinstance(value, list)):
            offered = object_info[posted[link[0]]["class_type"]]["output"]
            assert link[1] < len(offered)
