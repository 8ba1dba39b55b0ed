"""The embedded model says what it is: where a picture is none of its world, and only there."""

from __future__ import annotations

import io
import json
import random

import pytest
from PIL import Image

from ip2p_engine import InstructPix2Pix, cli
from ip2p_engine.commands import edit as edit_command
from ip2p_engine.images import fit, open_image, paper_size
from ip2p_engine.scenes.notice import is_scene
from ip2p_engine.scenes.world import Scene, all_scenes, render

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "moon", "retina", "grass", "gravel", "cat")


def encoded(picture, quality):
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality)
    return Image.open(data)


def seen(picture):
    """As the model sees it, by which it is judged: the whole picture is not opened again."""
    return fit(open_image(picture), paper_size(*picture.size, 64))


@pytest.mark.slow
def test_scenes_are_told_from_photographs():
    draw, scenes = random.Random(0), list(all_scenes())
    wrong = 0
    for number in range(500):
        side = draw.choice([64, 96, 128, 200, 256, 512])
        method = draw.choice([Image.Resampling.BICUBIC, Image.Resampling.NEAREST, Image.Resampling.LANCZOS])
        scene = render(draw.choice(scenes)).resize((side, side), method)
        wrong += not is_scene(seen(encoded(scene, draw.choice([60, 75, 95])) if number % 2 else scene))
    assert wrong <= 5
    data = pytest.importorskip("skimage.data")
    wrong = 0
    for number in range(200):
        photo = Image.fromarray(getattr(data, PHOTOS[number % len(PHOTOS)])()).convert("RGB")
        side = draw.randint(min(photo.size) // 3, min(photo.size))
        left, top = draw.randint(0, photo.width - side), draw.randint(0, photo.height - side)
        wrong += is_scene(seen(photo.crop((left, top, left + side, top + side))))
    assert wrong <= 2


def test_the_notice_is_said_once_and_in_json(editor, tmp_path, monkeypatch, capsys):
    data = pytest.importorskip("skimage.data")
    for name in ("cat", "coffee"):
        Image.fromarray(getattr(data, name)()).resize((96, 96)).save(tmp_path / f"{name}.png")
    render(Scene(shape="heart", colour="red", background="sky", size="large")).save(tmp_path / "scene.png")
    monkeypatch.setattr(edit_command, "load_editor", lambda options: editor)
    how = ["--instruction", "make it snow", "--steps", "1", "--json", "--out", str(tmp_path / "out")]
    assert cli.main(["edit", str(tmp_path), *how]) == 0
    said = capsys.readouterr()
    rows = {row["source"]: row.get("notice") for row in map(json.loads, said.out.splitlines())}
    assert rows["scene.png"] is None and all("ip2p fetch" in rows[f"{name}.png"] for name in ("cat", "coffee"))
    assert said.err.count("the embedded model knows drawn scenes alone") == 1
    other = InstructPix2Pix(editor.model, name="some/checkpoint.safetensors")
    monkeypatch.setattr(edit_command, "load_editor", lambda options: other)
    assert cli.main(["edit", str(tmp_path / "cat.png"), *how]) == 0
    said = capsys.readouterr()
    assert "embedded" not in said.err and "notice" not in json.loads(said.out)
