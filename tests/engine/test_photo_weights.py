"""embedded-photos, as it ships: its size, its card, and what it does to photographs that it has never seen."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ip2p_engine import InstructPix2Pix, cli
from ip2p_engine.checkpoint.recognise import EMBEDDED_FOLDER, PHOTOS_FOLDER
from ip2p_engine.checkpoint.write import ldm_state
from ip2p_engine.networks.model import load_model
from ip2p_engine.photos.exam import examine
from ip2p_engine.photos.recipe import PHOTOS_SPEC
from ip2p_engine.photos.world import KINDS, sample_edits

from .test_photos import DemoPool


@pytest.fixture(scope="module")
def photo_editor():
    return InstructPix2Pix.load("embedded-photos", device="cpu")


def test_everything_embedded_is_small():
    files = [path for folder in (EMBEDDED_FOLDER, PHOTOS_FOLDER) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 64e6


def test_the_card_is_the_measured_one(photo_editor):
    spec = photo_editor.model.spec
    assert (spec.text_cfg, spec.image_cfg, spec.steps, spec.guidance_low, spec.guidance_high) == (2, 1, 4, 0.5, 5)
    assert spec.name == PHOTOS_SPEC.name == "photos" and spec.resolution == 256


@pytest.mark.parametrize("lone", [False, True])
def test_a_file_without_settings_is_recognised(photo_editor, tmp_path, lone):
    """As ComfyUI's own Save Checkpoint writes it: shapes do not tell the heads, the groups and the v-prediction."""
    state = {name: value.contiguous() for name, value in ldm_state(photo_editor.model).items()}
    if lone:
        state = {name: value for name, value in state.items() if name.startswith("model.diffusion_model.")}
    save_file(state, tmp_path / "saved.safetensors")
    again = load_model(tmp_path / "saved.safetensors", base="embedded-photos" if lone else None, device="cpu")
    assert again.spec.prediction == "v" and again.unet.config == photo_editor.model.unet.config
    x, told = torch.randn(1, 8, 8, 8), torch.randn(1, 77, 96)
    with torch.inference_mode():
        outputs = [model.unet(x, 500, told).sample for model in (again, photo_editor.model)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def right(editor, count):
    """Verdicts on edits of the four photographs that ship, asked for in phrasings that training never saw."""
    return examine(editor, sample_edits(DemoPool(), count, seed=5, held_out=True), config=None).verdicts


def test_tones_of_unseen_photographs_are_right(photo_editor):
    assert sum(verdict.done for verdict in right(photo_editor, 5)) >= 4


@pytest.mark.slow
def test_most_edits_of_unseen_photographs_are_right(photo_editor):
    assert sum(verdict.done for verdict in right(photo_editor, 2 * len(KINDS))) >= 0.8 * 2 * len(KINDS)


def test_the_demo_edits_a_photograph(photo_editor, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ip2p_engine.commands.edit.load_editor", lambda options: photo_editor)
    assert cli.main(["demo", "--out", str(tmp_path / "demo.png")]) == 0
    assert "4 edits" in capsys.readouterr().out
    with Image.open(tmp_path / "demo.png") as strip:
        assert strip.width > 4 * strip.height
