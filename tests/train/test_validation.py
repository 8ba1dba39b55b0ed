"""What a run shows of itself: the loss on pairs that stay the same, own pictures, and nothing lost to a kill."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from ip2p_engine.clip.similarity import ClipSimilarity
from ip2p_engine.errors import CheckpointError, ConfigError
from ip2p_engine.hooks import Hooks
from ip2p_engine.networks.model import load_model
from ip2p_engine.train import TrainConfig
from ip2p_engine.train.encoding import Encoder
from ip2p_engine.train.networks import make_trainable, trained_parameters
from ip2p_engine.train.optimizers import Average
from ip2p_engine.train.randomness import draw
from ip2p_engine.train.sources import held_out_rows, open_source
from ip2p_engine.train.validation import ValidationSet, read_own

CONFIG = TrainConfig(resolution=64, resize=(64, 64), flip=0.0, workers=0, validation_pairs=5, validation_count=2)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def trained(base):
    """(a model, its average after the weights moved on)."""
    model = make_trainable(load_model(base(), device="cpu"), CONFIG)
    parameters = trained_parameters(model.unet)
    average = Average(parameters, 0.9)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    average.update(1)
    return model, average


def by_hand(model, records):
    """The mean squared error of the noise, pair by pair, in plain torch."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    encoder, total = Encoder(model), 0.0
    for n, record in enumerate(records):
        import io

        import numpy as np

        pictures = [
            Image.open(io.BytesIO(data)).convert("RGB") for data in (record.original_image, record.edited_image)
        ]
        before, after = (torch.tensor(np.array(p)).permute(2, 0, 1)[None] / 127.5 - 1 for p in pictures)
        draws = draw(0, -1, [n], (4, 8, 8))
        with torch.no_grad():
            condition = model.autoencoder.encode(before).latent_dist.mode()
            posterior = model.autoencoder.encode(after).latent_dist
            z = model.spec.latent_scale * (posterior.mean + posterior.std * draws.posterior)
            t = int((n + 0.5) / len(records) * 1000)
            x = kept[t].sqrt() * z + (1 - kept[t]).sqrt() * draws.noise
            tokens = encoder.text([record.edit_prompt]).tokens
            output = model.unet(torch.cat([x.float(), condition], 1), torch.tensor([t]), tokens).sample
        total += float((output - draws.noise).square().mean())
    return total / len(records)


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_the_loss_is_the_one_by_hand_for_both_weights(trained, records, micro):
    model, average = trained
    source = open_source(records[:5], CONFIG)
    found = ValidationSet(source, CONFIG).losses(model, average, Encoder(model), micro)
    assert found["raw"] == pytest.approx(by_hand(model, records[:5]), abs=1e-5)
    with average.applied():
        assert found["ema"] == pytest.approx(by_hand(model, records[:5]), abs=1e-5)
    assert abs(found["raw"] - found["ema"]) > 1e-4


def test_it_is_measured_on_what_is_held_out(tmp_path):
    class Some:
        held_out, identity = 1, "x"

        def rest(self):
            return "the rest"

    assert held_out_rows(Some()) == "the rest"
    assert held_out_rows(object()) is None


def test_no_pairs_no_loss(trained, records):
    model, average = trained
    none = ValidationSet(open_source(records, CONFIG), replace(CONFIG, validation_pairs=0))
    assert none.losses(model, average, Encoder(model), 2) == {}


def test_clip_scores_edits_as_by_hand_and_costs_nothing_unnamed(trained, records, tmp_path, monkeypatch):
    """Two pairs, the second with equal captions, and two own pictures, the first with captions."""
    model, average = trained
    said = ("a red circle", "a green circle")
    texts = [said, ("the same", "the same ")]
    pairs = [replace(one, original_prompt=a, edited_prompt=b) for one, (a, b) in zip(records, texts, strict=False)]
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    own = tmp_path / "own.csv"
    own.write_text("source,instruction,caption,edited_caption\na.png,x,a red square,a blue square\nb.png,y,,\n")
    config = replace(CONFIG, validate_with=str(own), validation_clip="embedded")
    validation = ValidationSet(open_source(pairs, config), config)
    rows = validation.edit(model, average)
    found, clip = validation.scores(rows), ClipSimilarity.load("embedded")
    before, edited = (clip.image_features([row[n] for row in rows]).double() for n in (0, 1))
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(before, edited, strict=True)]
    assert found["clip_image"] == pytest.approx(sum(cosines) / 4, abs=1e-6)
    texts = [said, ("a red square", "a blue square")]
    directions = []
    for n, both in zip((0, 2), texts, strict=True):
        a, b = clip.text_features(list(both)).double()
        change = edited[n] - before[n]
        directions.append(float(change @ (b - a) / change.norm() / (b - a).norm()))
    assert (
        any(directions)
        and found["clip_direction"] == pytest.approx(sum(directions) / 2, abs=1e-5)
        and found["clip_directions"] == 2
    )
    monkeypatch.setattr(ClipSimilarity, "load", lambda *_: pytest.fail("a CLIP was loaded"))
    assert ValidationSet(open_source(pairs, CONFIG), CONFIG).scores(rows) == {}
    assert ValidationSet(open_source(pairs, config), config, scores=False).scores(rows) == {}
    with pytest.raises(pytest.fail.Exception):
        ValidationSet(open_source(pairs, config), config)


def test_scores_go_where_losses_go(run, tmp_path):
    run("a", steps=2, validate_every=1, validation_count=1, validation_pairs=2, validation_clip="embedded")
    both = lines(tmp_path / "a" / "validation.jsonl")
    assert [row["step"] for row in both] == [1, 2] and all(row.keys() >= {"raw", "ema", "clip_image"} for row in both)
    run("b", steps=2, validate_every=1, validation_count=1, validation_pairs=0, validation_clip="embedded")
    alone = lines(tmp_path / "b" / "validation.jsonl")
    assert [row["clip_image"] for row in alone] == [row["clip_image"] for row in both] and "raw" not in alone[0]
    with pytest.raises(CheckpointError):
        run("c", steps=1, validate_every=1, validation_clip="no/such")
    assert not (tmp_path / "c" / "log.jsonl").read_text()  # before the first step


def test_own_pictures(tmp_path):
    Image.new("RGB", (80, 60), "red").save(tmp_path / "a.png")
    (tmp_path / "own.jsonl").write_text('{"source": "a.png", "instruction": "make it blue"}\n')
    (tmp_path / "own.csv").write_text("source,instruction\na.png,make it blue\n")
    for name in ("own.jsonl", "own.csv"):
        (one,) = read_own(tmp_path / name)
        assert (one.original.size, one.instruction) == ((80, 60), "make it blue")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("own.txt", "", "give a .csv or .jsonl file"),
        ("own.jsonl", "", "has no rows"),
        ("own.jsonl", '{"source": "a.png"}\n', "row 1, has no source or no instruction"),
        ("own.jsonl", '{"source": "gone.png", "instruction": "x"}\n', "row 1: "),
    ],
)
def test_own_pictures_that_are_none(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_own(tmp_path / name)


@pytest.mark.slow
def test_a_run_notes_losses_and_shows_them(run, tmp_path):
    pytest.importorskip("tensorboard")
    Image.new("RGB", (80, 60), "red").save(tmp_path / "a.png")
    (tmp_path / "own.csv").write_text("source,instruction\na.png,make it blue\n")
    settings = {"validate_every": 2, "validation_count": 1, "validate_with": str(tmp_path / "own.csv")}
    run(**settings, tracker="tensorboard", validation_clip="embedded")
    rows = lines(tmp_path / "run" / "validation.jsonl")
    assert [(row["step"], row["held_out"]) for row in rows] == [(2, False), (4, False)]
    assert all(row["raw"] > 0 and row["ema"] > 0 for row in rows)
    picture = Image.open(tmp_path / "run" / "validation" / "step-00000004.png")
    assert picture.height > 2 * 128  # a pair and one's own
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.out*")).parent))
    events.Reload()
    assert "validation" in str(events.Tags()["images"])
    assert [one.value for one in events.Scalars("validation_loss_ema")] == pytest.approx([r["ema"] for r in rows])
    noted = [one.value for one in events.Scalars("validation_clip_image")]
    assert noted == pytest.approx([row["clip_image"] for row in rows]) and len(noted) == 2


@pytest.mark.slow
def test_what_a_kill_took_is_made_when_the_run_goes_on(run, tmp_path):
    """Killed between a checkpoint and what is made of its step."""
    settings = {"validate_every": 2, "validation_count": 1, "save_every": 2, "export_every": 2}
    run("whole", **settings)
    done = [0]
    stop = Hooks(on_result=lambda step, _: done.append(step), should_stop=lambda: done[-1] >= 1)
    run("killed", **settings, hooks=stop)
    folder = tmp_path / "killed"
    picture = folder / "validation" / "step-00000002.png"
    exported = folder / "exports" / "step-00000002" / "ema.safetensors"
    for path in (picture, exported, folder / "validation.jsonl"):
        path.unlink()
    run("killed", **settings)
    same = picture.relative_to(folder)
    assert picture.read_bytes() == (tmp_path / "whole" / same).read_bytes()
    assert exported.exists()
    assert lines(folder / "validation.jsonl") == lines(tmp_path / "whole" / "validation.jsonl")
