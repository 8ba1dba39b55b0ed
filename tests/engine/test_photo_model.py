"""The photo model's stages on a handful of edits, and its files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from ip2p_engine import InstructPix2Pix
from ip2p_engine.errors import ConfigError, Interrupted
from ip2p_engine.hooks import Hooks
from ip2p_engine.photos import latents
from ip2p_engine.photos.exam import exam_sheet, exam_table, examine, judge_round_trips
from ip2p_engine.photos.recipe import export_photos, train_stage
from ip2p_engine.photos.stages import EditStage, TextStage, make_autoencoder, make_unet
from ip2p_engine.photos.texts import words_in_use
from ip2p_engine.photos.world import sample_edits
from ip2p_engine.train.miniature import compact_text_encoder

from .test_photos import DemoPool


def test_stages_follow_one_another(tmp_path):
    with pytest.raises(ConfigError, match="choose one of"):
        train_stage("else", tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="train the stage 'autoencoder' first"):
        train_stage("latents", tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="photos train latents"):
        EditStage(tmp_path, compact_text_encoder(words_in_use()).state_dict())


def test_the_edit_stage_learns_from_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "CHUNKS", {128: (6, 1), 256: (2, 1)})
    monkeypatch.setattr(latents, "PhotoPool", lambda *_, **__: DemoPool())
    torch.manual_seed(0)
    latents.make_chunks(make_autoencoder().eval(), tmp_path, tmp_path)
    table = latents.Chunks(tmp_path, 128)
    assert table.refresh() == 6 and table.table["source"].shape == (6, 4, 16, 16)
    stage = EditStage(tmp_path, compact_text_encoder(words_in_use()).state_dict())
    batch = stage.draw(0, torch.Generator().manual_seed(1))
    again = stage.draw(0, torch.Generator().manual_seed(1))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert batch["weight"].mean() == pytest.approx(1, abs=1e-4)
    loss, figures = stage.loss({name: value[:2] for name, value in batch.items()}, 0)
    loss.backward()
    assert loss.isfinite() and set(figures) == {"high_noise", "low_noise"}


def test_the_text_stage_reads_facts(monkeypatch):
    monkeypatch.setattr("ip2p_engine.photos.stages.EDITS", 22)
    stage = TextStage()
    loss, figures = stage.loss(stage.draw(0, torch.Generator().manual_seed(0)), 0)
    assert loss.isfinite() and 0 <= figures["right"] <= 1


def test_a_stopped_stage_is_saved_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr("ip2p_engine.photos.stages.EDITS", 22)
    with pytest.raises(Interrupted, match="stopped after step 1"):
        train_stage("text", tmp_path, tmp_path, steps=2, hooks=Hooks(should_stop=lambda: True))
    assert (tmp_path / "text" / "checkpoints" / "step-00000001.pt").exists()
    train_stage("text", tmp_path, tmp_path, steps=2)
    assert (tmp_path / "text.safetensors").exists()


def test_exported_files_load_edit_and_are_judged(tmp_path):
    torch.manual_seed(0)
    edit = {"text": compact_text_encoder(words_in_use()), "unet": make_unet()}
    save_file(make_autoencoder().state_dict(), tmp_path / "autoencoder.safetensors")
    save_file(torch.nn.ModuleDict(edit).state_dict(), tmp_path / "edit.safetensors")
    export_photos(tmp_path, tmp_path / "model")
    assert sum(path.stat().st_size for path in (tmp_path / "model").rglob("*")) < 24e6
    editor = InstructPix2Pix.load(tmp_path / "model", device="cpu")
    assert editor.model.spec.name == "photos" and editor.model.spec.prediction == "v"
    edits = sample_edits(DemoPool(), 1, seed=1, held_out=True)
    for examination in (examine(editor, edits, config=None), judge_round_trips(editor, edits)):
        assert len(examination.verdicts) == 1 and "night" in exam_table(examination)
    exam_sheet(examination, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").exists()
