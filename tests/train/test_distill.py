"""Consistency distillation: exact where the answer is known, the guidance folded in, and a run of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ip2p_engine import InstructPix2Pix
from ip2p_engine.cli import main
from ip2p_engine.diffusion.guidance import dual_guidance
from ip2p_engine.errors import CheckpointError, ConfigError
from ip2p_engine.networks.conditioning import TextEmbedding
from ip2p_engine.networks.model import convert, load_model
from ip2p_engine.networks.scales import scales_embedding
from ip2p_engine.scenes.exam import scene_samples
from ip2p_engine.train import TrainConfig, train
from ip2p_engine.train.distill import Distillation, pseudo_huber
from ip2p_engine.train.encoding import Encoded
from ip2p_engine.train.networks import with_scales
from ip2p_engine.train.randomness import draw

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
PAIRS = ((2.0, 1.0), (6.0, 1.0), (2.0, 2.0))
NULL = TextEmbedding(tokens=torch.zeros(1, 77, 24))


def encoded(count):
    condition = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mean = torch.full((count, 4, 8, 8), 2.0)
    text = TextEmbedding(tokens=torch.ones(count, 77, 24))
    return Encoded(mean=mean, std=0 * mean, condition=condition, text=text, size_ids=torch.ones(count, 6))


def chance(levels):
    given = draw(0, 1, range(len(levels)), (4, 8, 8))
    return replace(given, level=torch.tensor(levels, dtype=torch.float64))


class Points:
    """A network that sees one clean picture a branch, whatever the noise: 2 with text, 1 without, 0 without picture."""

    def __init__(self, model, shift=0.0):
        self._model, self._shift, self.seen = model, shift, []

    def __call__(self, inputs, t, tokens, added_cond_kwargs=None):
        x, condition = inputs[:, :4], inputs[:, 4:]
        sigma = self._model.schedule.sigmas[t].view(-1, 1, 1, 1).float()
        root = (sigma**2 + 1).sqrt()
        clean = torch.where(tokens.mean((1, 2)) > 0, 2.0, 1.0).view(-1, 1, 1, 1) * (condition.abs().sum() > 0)
        clean = clean + self._shift
        self.seen.append((t.tolist(), float(clean.mean())))
        if self._model.spec.prediction == "eps":
            return SimpleNamespace(sample=(x * root - clean) / sigma)
        return SimpleNamespace(sample=(x / root - clean) * root / sigma)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_network_that_always_sees_the_same_picture_is_consistent(tiny_model, prediction):
    model = tiny_model()
    model = replace(model, spec=replace(model.spec, prediction=prediction, latent_scale=1.0))
    unet = Points(model)
    distillation = Distillation(model, NULL, TrainConfig(distill=(1.0, 1.0)), unet)
    levels = [0.0, 0.01, 0.5, 0.999]
    assert float(distillation(unet, encoded(4), chance(levels)).max()) < 1e-3
    rungs = [19, 19, 519, 999]
    assert [t for t, _ in unet.seen] == [rungs, rungs, [19, 19, 499, 979]]
    few = Points(model)
    Distillation(model, NULL, TrainConfig(distill=(1.0, 1.0), distill_rungs=4), few)(
        few, encoded(2), chance([0.3, 0.9])
    )
    assert [t for t, _ in few.seen] == [[499, 999], [499, 999], [249, 749]]


def test_the_teacher_is_guided_and_the_last_rung_learns_its_clean_picture(tiny_model):
    """With 2, 1 and 0 for c, i and u, s_T 4 and s_I 1.5 the guided picture is 0 + 1.5 (1 - 0) + 4 (2 - 1) = 5.5."""
    model = tiny_model()
    model = replace(model, spec=replace(model.spec, latent_scale=1.0))
    teacher, student = Points(model), Points(model, shift=1.0)
    config = TrainConfig(distill=(4.0, 1.5))
    (error,) = Distillation(model, NULL, config, teacher)(student, encoded(1), chance([0.0]))
    assert {clean for _, clean in teacher.seen} == {2.0, 1.0, 0.0}
    wanted = dual_guidance({"c": torch.tensor(2.0), "i": torch.tensor(1.0), "u": torch.tensor(0.0)}, 4.0, 1.5)
    assert float(wanted) == 5.5 and float(error) == pytest.approx(5.5 - 3.0, rel=2e-3)
    alone = Points(model)
    Distillation(model, NULL, TrainConfig(distill=(1.0, 1.0)), alone)(student, encoded(1), chance([0.9]))
    assert {clean for _, clean in alone.seen} == {2.0}, "c alone asks the teacher for nothing else"


def test_the_teacher_is_guided_within_an_interval_alone(tiny_model):
    """sigma is 0.12 at the rung of t 19 and 1.6 at that of t 519."""
    model = tiny_model()
    model = replace(model, spec=replace(model.spec, latent_scale=1.0))
    config = TrainConfig(distill=(4.0, 1.5), distill_interval=(1.0, 5.0))
    found = Distillation(model, NULL, config, Points(model))
    branches = {"c": torch.full((2, 1, 1, 1), 2.0), "i": torch.ones(2, 1, 1, 1), "u": torch.zeros(2, 1, 1, 1)}
    assert found._guided(branches, torch.tensor([0.12, 1.6]).view(2, 1, 1, 1), None).flatten().tolist() == [2.0, 5.5]
    for wrong, said in (
        ({"distill_interval": (1.0, 5.0)}, "give distill too"),
        ({"distill": (4.0, 1.5), "distill_interval": (5.0, 1.0)}, "lower first"),
    ):
        with pytest.raises(ConfigError, match=said):
            TrainConfig(**wrong)


def test_scales_between_two_ends_are_drawn_and_told(tiny_model):
    """Of the ends 2 / 1 and 6 / 2 a quarter and a half lead to 3 / 1.5: 1.5 + 3 (2 - 1) = 4.5 of those branches."""
    model = with_scales(tiny_model())
    model = replace(model, spec=replace(model.spec, latent_scale=1.0))
    config = TrainConfig(distill=(2.0, 1.0), distill_to=(6.0, 2.0))
    told = []

    class Told(Points):
        def __call__(self, inputs, t, tokens, added_cond_kwargs=None, timestep_cond=None):
            told.append(timestep_cond)
            return super().__call__(inputs, t, tokens)

    teacher, student = Points(model), Told(model, shift=1.0)
    draws = replace(chance([0.0]), scales=torch.tensor([[0.25, 0.5]]))
    (error,) = Distillation(model, NULL, config, teacher)(student, encoded(1), draws)
    assert float(error) == pytest.approx(4.5 - 3.0, rel=2e-3)
    for one in told:
        torch.testing.assert_close(one, scales_embedding(torch.tensor([[3.0, 1.5]])))
    with pytest.raises(ConfigError, match="give distill too"):
        TrainConfig(distill_to=(6.0, 2.0))
    with pytest.raises(ConfigError, match="adapters have no place"):
        TrainConfig(distill=(2.0, 1.0), distill_to=(6.0, 2.0), lora_rank=4)


def test_a_network_of_many_scales_is_told_them_in_one_branch(store, tmp_path, editor):
    """Untrained it is its base, c alone, whatever it is told; trained it heeds both; files keep it."""
    untold = InstructPix2Pix(with_scales(editor.model))
    source, quick = scene_samples(1)[0][0].source, {"steps": 2, "sampler": "euler", "schedule": "model"}
    (before,) = untold.edit(source, "make it snow", text_cfg=7, image_cfg=2, **quick)
    (alone,) = editor.edit(source, "make it snow", text_cfg=1, image_cfg=1, **quick)
    torch.testing.assert_close(before.latent, alone.latent)
    common = {"batch_size": 2, "resolution": 64, "resize": (64, 64), "workers": 0, "validate_every": 0}
    config = TrainConfig(steps=2, distill=(2.0, 1.0), distill_to=(6.0, 2.0), learning_rate=0.1, ema_decay=0, **common)
    train(config, data=store, base="embedded", out=tmp_path / "run")
    student = InstructPix2Pix.load(tmp_path / "run")
    made = {pair: student.edit(source, "make it snow", text_cfg=pair[0], image_cfg=pair[1]) for pair in PAIRS}
    assert {edit.evaluations for (edit,) in made.values()} == {4}
    first, *others = (edit.latent for (edit,) in made.values())
    assert not any(torch.equal(first, other) for other in others)
    assert (student.model.spec.text_cfg, student.model.spec.image_cfg) == (4.0, 1.5)
    convert(tmp_path / "run", tmp_path / "folder", to="diffusers")
    again = InstructPix2Pix.load(tmp_path / "folder").edit(source, "make it snow", text_cfg=2, image_cfg=1)
    torch.testing.assert_close(again[0].latent, first, atol=1e-2, rtol=1e-3)
    for given in ({"apg": True}, {"guidance_interval": (1.0, 2.0)}):
        with pytest.raises(ConfigError, match="guidance is inside it"):
            student.edit(source, "make it snow", **given)
    with pytest.raises(CheckpointError, match="is told its scales"):
        train(TrainConfig(steps=1, **common), data=store, base=tmp_path / "folder", out=tmp_path / "again")


def test_no_gradient_reaches_what_the_student_agrees_with(tiny_model):
    model = tiny_model()
    weight = torch.nn.Parameter(torch.tensor(0.5))
    calls = []

    def student(inputs, t, tokens, added_cond_kwargs=None):
        calls.append(torch.is_grad_enabled())
        return SimpleNamespace(sample=weight * inputs[:, :4])

    distillation = Distillation(model, NULL, TrainConfig(distill=(1.0, 1.0)), Points(model))
    distillation(student, encoded(2), chance([0.3, 0.7])).sum().backward()
    assert calls == [True, False] and weight.grad is not None


def test_pseudo_huber_is_the_distance_where_it_is_large_and_a_square_where_it_is_small():
    large, small = torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 1e-5)
    assert float(pseudo_huber(large)) == pytest.approx(3.0, rel=1e-3)
    assert float(pseudo_huber(small, c=1e-3)) == pytest.approx(1e-10 / 2e-3, rel=1e-2)


def test_a_run_of_it_recommends_four_steps_and_goes_on_bit_equal(store, tmp_path):
    common = {"batch_size": 2, "resolution": 64, "resize": (64, 64), "workers": 0, "validate_every": 0, "keep": 1}
    common |= {"save_every": 1, "distill": (4.0, 1.5), "learning_rate": 1e-3, "optimizer": "muon"}
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    train(TrainConfig(steps=2, **common), data=store, base="embedded", out=whole)
    train(TrainConfig(steps=1, **common), data=store, base="embedded", out=pieces)
    found = train(TrainConfig(steps=2, **common), data=store, base="embedded", out=pieces)
    weights = [load_file(folder / "ema.safetensors") for folder in (whole, pieces)]
    assert found.finished and all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not torch.equal(weights[0][FIRST], load_model("embedded").unet.conv_in.weight)
    student = InstructPix2Pix.load(whole / "ema.safetensors")
    (edit,) = student.edit(scene_samples(1)[0][0].source, "make it snow")
    told = {name: edit.settings[name] for name in ("text_cfg", "image_cfg", "steps", "sampler", "schedule")}
    assert told == {"text_cfg": 1.0, "image_cfg": 1.0, "steps": 4, "sampler": "lcm", "schedule": "trailing"}
    assert edit.evaluations == 4


def test_what_cannot_be_distilled_is_refused(store, base, tmp_path, capsys):
    for name, value in (("train_text_encoder", True), ("zero_snr", True), ("prediction", "v")):
        with pytest.raises(ConfigError, match=f"and {name} changes it"):
            TrainConfig(distill=(4.0, 1.5), **{name: value})
    with pytest.raises(ConfigError, match="s_T and s_I"):
        TrainConfig(distill=(4.0,))
    with pytest.raises(ConfigError, match="image_cfg is -1"):
        TrainConfig(distill=(4.0, -1))
    with pytest.raises(CheckpointError, match="text to image"):
        train(TrainConfig(distill=(4.0, 1.5), steps=1), data=store, base=base(), out=tmp_path / "run")
    arguments = [
        "--data",
        str(store),
        "--base",
        "embedded",
        "--out",
        str(tmp_path / "b"),
        "--plan",
        "--batch-size",
        "1",
    ]
    assert main(["train", *arguments, "--preset", "embedded", "--distill", "4", "1.5"]) == 0
