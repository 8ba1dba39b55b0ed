"""A result made again: ``--like``, and ``--verify``, which says what differs if it does not come out equal."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ip2p_engine import InstructPix2Pix, cli
from ip2p_engine.checkpoint.merge import with_weights
from ip2p_engine.commands import edit as edit_command
from ip2p_engine.files import base_name
from ip2p_engine.images import read_settings
from ip2p_engine.scenes.world import Scene, render

OLD = Path(__file__).parents[1] / "data" / "made-by-0.1"
HEART = render(Scene(shape="heart", colour="red", background="sky", size="large"))
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"


def run(*arguments):
    return cli.main(["edit", *map(str, arguments)])


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture(autouse=True)
def one_editor(editor, monkeypatch):
    def load(options):
        chosen = InstructPix2Pix(editor.model, name=options.checkpoint)
        for text in options.lora:
            path, _, weight = text.rpartition(":")
            chosen.load_lora(path, float(weight))
        return chosen

    monkeypatch.setattr(edit_command, "load_editor", load)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder with a picture, a LoRA and a result of the two."""
    monkeypatch.chdir(tmp_path)
    HEART.resize((90, 64)).save("scene.png")
    save_file(
        {f"{LAYER}.lora_down.weight": torch.ones(1, 96), f"{LAYER}.lora_up.weight": torch.ones(128, 1) * 0.05},
        "style.safetensors",
    )
    how = ["--steps", 2, "--seed", 5, "--text-cfg", 3, "--sampler", "heun", "--lora", "style.safetensors:0.5"]
    assert run("scene.png", "--instruction", "make it snow", *how, "--out", "result.png") == 0
    return tmp_path


def test_like_makes_it_again_and_any_option_is_replaced(made, capsys):
    assert run("--like", "result.png", "--out", "again.png") == 0
    assert np.array_equal(pixels("again.png"), pixels("result.png"))
    first, again = read_settings("result.png"), read_settings("again.png")
    assert first == again and first["loras"][0]["weight"] == 0.5
    assert run("--like", "result.png", "--instruction", "make it night", "--lora", "style.safetensors:0.0",
               "--steps", "3", "--seed", "6", "--size", "keep", "--out", "other.png") == 0  # fmt: skip
    other = read_settings("other.png")
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {"instruction", "loras", "steps", "seed", "size"}
    assert run("--like", "result.png", "--seeds", "2", "--out", "several") == 0
    assert [read_settings(path)["seed"] for path in sorted(Path("several").iterdir())] == [5, 6]


def test_the_source_beside_it_or_given(made, capsys):
    folder = made / "elsewhere"
    folder.mkdir()
    shutil.copy("result.png", folder)
    shutil.move("scene.png", folder)
    shutil.move("style.safetensors", folder)
    assert run("--like", folder / "result.png", "--out", "again.png") == 0
    assert np.array_equal(pixels("again.png"), pixels("result.png"))
    assert run("--like", "result.png", "--out", "x.png") == 2
    assert "'scene.png', which is neither beside it nor here; give it as IMAGE" in capsys.readouterr().err
    assert run(folder / "scene.png", "--like", "result.png", "--out", "x.png") == 2
    assert "'style.safetensors', which is neither beside it nor here; give it as --lora" in capsys.readouterr().err
    HEART.save("scene.png")
    assert run("--like", "result.png", "--lora", f"{folder / 'style.safetensors'}:0.5", "--out", "x.png") == 2
    assert "scene.png has the name of the source of result.png and other pixels" in capsys.readouterr().err
    assert not Path("x.png").exists()


def test_verify_says_equal_by_its_code(made, capsys):
    assert run("--verify", "result.png") == 0
    assert "result.png comes out again, pixel for pixel" in capsys.readouterr().out
    for name in ("result.jpg", "result.webp"):
        assert run("--like", "result.png", "--out", name) == 0 and run("--verify", name) == 0


@pytest.mark.parametrize("what", ["source", "checkpoint", "settings", "versions"])
def test_verify_says_what_differs(what, made, editor, monkeypatch, capsys):
    given = []
    if what == "source":
        HEART.transpose(Image.Transpose.ROTATE_90).resize((90, 64)).save("turned.png")
        given = ["turned.png"]
    elif what == "checkpoint":
        state = {name: value * 1.01 for name, value in editor.model.unet.state_dict().items()}
        other = replace(editor.model, unet=with_weights(editor.model.unet, state))
        monkeypatch.setattr(edit_command, "load_editor", lambda options: InstructPix2Pix(other, name="embedded"))
        given = ["--lora", "style.safetensors:0.5"]
    elif what == "settings":
        given = ["--steps", "3"]
    else:
        monkeypatch.setattr("ip2p_engine.edit.__version__", "9.9")
    code = run(*given, "--verify", "result.png", "--json")
    report = json.loads(capsys.readouterr().out)
    expected = {"source": ["source_sha256"], "settings": ["steps"], "versions": ["ip2p_engine"]}
    if what == "checkpoint":
        assert set(report["differs"]["checkpoint"]) >= {"checkpoint_digest"} and set(report["differs"]) == {what}
    else:
        assert report["differs"] == {what: expected[what]}
    assert (code, report["equal"]) == ((0, True) if what == "versions" else (1, False))


def test_what_0_1_made(tmp_path, monkeypatch, capsys):
    for name in ("scene.jpg", "edited.png", "edited.webp", "edited.jpg"):
        shutil.copy(OLD / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run("--like", "edited.png", "--out", "again.png") == 0
    assert "edited.png does not say source_sha256 and checkpoint_digest" in capsys.readouterr().err
    assert np.abs(pixels("again.png") - pixels("edited.png")).max() <= 1
    for name in ("edited.webp", "edited.jpg"):
        run("--verify", name, "--json")
        report = json.loads(capsys.readouterr().out)
        assert report["largest"] <= 4 and report["lacking"] == ["source_sha256", "checkpoint_digest"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--like", "scene.png"], "carries no ip2p settings"),
        (["--like", "absent.png"], "does not exist"),
        (["--like", "result.png", "--verify", "result.png"], "give one of them"),
        (["--verify", "result.png", "--table", "t.csv"], "give one of them"),
        (["scene.png", "scene.png", "--verify", "result.png"], "2 are given"),
    ],
)
def test_refusals(arguments, words, made, capsys):
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err


def test_no_name_is_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "c.safetensors").touch()
    names = ["~/c.safetensors", "runs/mine", "runs/mine@100", str(tmp_path / "c.safetensors"), "owner/name"]
    assert [base_name(name) for name in names] == ["c.safetensors", "mine", "mine@100", "c.safetensors", "owner/name"]
