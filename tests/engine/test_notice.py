"""The embedded models: each edits the pictures of its world, and says so where one is none."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from ip2p_engine import InstructPix2Pix, cli
from ip2p_engine.commands import edit as edit_command
from ip2p_engine.images import fit, open_image, paper_size
from ip2p_engine.photos.pictures import demo_picture
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


def edited(capsys, *words):
    """(rows by their source's name, what stood on stderr) of ``ip2p edit``, one step at 64 px."""
    how = ["--instruction", "make it night", "--steps", "1", "--resolution", "64", "--json"]
    assert cli.main(["edit", *map(str, words), *how]) == 0
    said = capsys.readouterr()
    return {row["source"]: row for row in map(json.loads, said.out.splitlines())}, said.err


def test_each_picture_goes_to_the_model_that_it_is_for(editor, tmp_path, monkeypatch, capsys):
    editors = {"embedded": editor, "embedded-photos": InstructPix2Pix.load("embedded-photos", device="cpu")}
    monkeypatch.setattr(edit_command, "load_editor", lambda options: editors[options.checkpoint])
    for name in ("moose", "coffee"):
        Image.open(demo_picture(name)).resize((96, 96)).save(tmp_path / f"{name}.png")
    scene = render(Scene(shape="heart", colour="red", background="sky", size="large"))
    scene.save(tmp_path / "scene.png")
    rows, said = edited(capsys, tmp_path, "--out", tmp_path / "out")
    assert {name: row["checkpoint"] for name, row in rows.items()} == {
        "scene.png": "embedded",
        "moose.png": "embedded-photos",
        "coffee.png": "embedded-photos",
    }
    assert "notice" not in rows["scene.png"] and rows["moose.png"]["notice"] == rows["coffee.png"]["notice"]
    assert "ip2p fetch" in rows["moose.png"]["notice"] and said.count("no checkpoint was named") == 1
    alone, _ = edited(capsys, tmp_path / "coffee.png", "--checkpoint", "embedded-photos", "--out", tmp_path / "alone")
    assert "notice" not in alone["coffee.png"]
    mixed, one = (np.asarray(Image.open(found["coffee.png"]["file"])).astype(int) for found in (rows, alone))
    assert abs(mixed - one).max() <= 1  # it was made in another batch


def test_a_model_that_was_named_says_what_it_does_not_know(editor, tmp_path, monkeypatch, capsys):
    Image.open(demo_picture("coffee")).resize((96, 96)).save(tmp_path / "coffee.png")
    how = [tmp_path / "coffee.png", "--checkpoint", "embedded", "--out", tmp_path / "out"]
    monkeypatch.setattr(edit_command, "load_editor", lambda options: editor)
    rows, said = edited(capsys, *how)
    assert "the embedded model knows drawn scenes alone" in said and "embedded-photos" in rows["coffee.png"]["notice"]
    other = InstructPix2Pix(editor.model, name="some/checkpoint.safetensors")
    monkeypatch.setattr(edit_command, "load_editor", lambda options: other)
    rows, said = edited(capsys, *how)
    assert "embedded" not in said and "notice" not in rows["coffee.png"]
