"""No step of a walk in ComfyUI makes the host wait for the device, but for the preview, which shows what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfy
PREVIEW = "_picture"  # of the embedded model, whose preview is its own small decoder's; core's does not wait


def test_no_step_waits(in_comfyui, tmp_path):
    file = tmp_path / "counted.json"
    in_comfyui("waiting.py", Path(__file__).parents[2], file)
    seen = json.loads(file.read_text())
    counted = seen["waits"]
    assert seen["doubles"] == []
    assert len(counted) == 10
    for walk, rows in counted.items():
        previews = {(what, often) for what, place, often in rows if place.endswith(PREVIEW)}
        assert previews == (set() if "core's" in walk else {("_to_copy", 1)}), walk
        assert [row for row in rows if not row[1].endswith(PREVIEW)] == [], walk
