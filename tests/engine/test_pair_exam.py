"""Pairs of the embedded world judged by truth: what is right, what the filter keeps; nothing is judged twice."""

from __future__ import annotations

import io
import json

import pytest

from ip2p_engine.cli import build_parser, main
from ip2p_engine.clip.filter import FilterConfig, PairScores
from ip2p_engine.clip.similarity import ClipSimilarity
from ip2p_engine.commands.pairs import _pair_config
from ip2p_engine.data.store import PairRecord, PairStore, PairWriter
from ip2p_engine.errors import DatasetError
from ip2p_engine.hooks import Hooks
from ip2p_engine.scenes.grammar import EMBEDDED_PAIRS, captions_of, edits_from, is_held_out, parse_caption, scenes_of
from ip2p_engine.scenes.judge import read_scenes
from ip2p_engine.scenes.pair_exam import (
    JudgedPair,
    Rates,
    Separation,
    as_text,
    copy_without_held_out,
    draw_curves,
    examine_pairs,
    judge_pair,
    judge_store,
    kept_pairs,
    pair_sheet,
    sample_caption_edits,
)
from ip2p_engine.scenes.world import Scene, render

HEART = Scene(shape="heart", colour="red", background="sky", size="large", place="top left")
STAR = HEART.with_(shape="star")
SCORES = PairScores(sim_0=0.9, sim_1=0.9, sim_direction=0.5, sim_image=0.8)


def png(scene):
    stream = io.BytesIO()
    render(scene).save(stream, "PNG")
    return stream.getvalue()


def record(before, after, *, wording=1, asked=(HEART, STAR), key="0000000/1", p=0.5):
    captions = [captions_of(scene)[wording] for scene in asked]
    return PairRecord(
        original_image=png(before),
        edited_image=png(after),
        edit_prompt="turn the heart into a star",
        original_prompt=captions[0],
        edited_prompt=captions[1],
        seed=1,
        p=p,
        cfg=3.0,
        key=key,
    )


def judged(before, after, **options):
    return judge_pair(record(before, after, **options), *read_scenes([render(before), render(after)]), SCORES)


@pytest.mark.slow
def test_the_true_pair_is_right():
    pair = judged(HEART, STAR)
    assert (pair.kind, pair.says_where, pair.right) == ("shape", True, True)
    assert (pair.before, pair.after) == (vars(HEART), vars(STAR))


@pytest.mark.parametrize(
    ("before", "after", "wording", "faults"),
    [
        (HEART.with_(colour="blue"), STAR, 1, {"before_right", "stays"}),
        (HEART, STAR.with_(colour="blue"), 1, {"after_right", "stays"}),
        (HEART, HEART, 1, {"after_right"}),
        (HEART, STAR.with_(place="centre"), 1, {"after_right", "stays"}),
        (HEART, STAR.with_(place="centre"), 0, {"stays"}),
        (HEART.with_(place="centre"), STAR.with_(place="centre"), 1, {"before_right", "after_right"}),
        (HEART.with_(place="centre"), STAR.with_(place="centre"), 0, set()),
    ],
)
def test_each_fault_has_its_name(before, after, wording, faults):
    """A caption that does not say where leaves the place open, and the edited picture must keep it all the same."""
    pair = judged(before, after, wording=wording)
    assert {name for name in ("before_right", "after_right", "stays") if not getattr(pair, name)} == faults
    assert pair.right is (not faults)


@pytest.mark.slow
def test_every_kind_of_edit_is_recognised():
    for kind, target in edits_from(HEART):
        assert judged(HEART, target, asked=(HEART, target)).kind == kind


def test_foreign_captions_are_refused():
    with pytest.raises(DatasetError, match="no edit of the scenes grammar"):
        judged(HEART, HEART, asked=(HEART, HEART))


def pair_of(caption, *, right, direction=0.5, p=0.5):
    scores = PairScores(sim_0=0.9, sim_1=0.9, sim_direction=direction, sim_image=0.8)
    flags = {"before_right": True, "after_right": right, "stays": True}
    return JudgedPair(
        key=f"{caption}/{direction}/{p}",
        kind="shape",
        says_where=True,
        p=p,
        cfg=3.0,
        scores=scores,
        before=vars(HEART),
        after=vars(STAR),
        **flags,
    )


def test_rates_before_and_after_a_filter():
    """The filter takes the best of each caption pair, so a caption pair of bad ones does not push out a good one."""
    pairs = [
        pair_of("a", right=True, direction=0.9, p=0.05),
        pair_of("a", right=True, direction=0.8, p=1.0),
        pair_of("a", right=False, direction=0.3),
        pair_of("b", right=False, direction=0.1),
    ]
    result = examine_pairs(pairs, FilterConfig(keep=2))
    assert (result.before.count, result.before.right) == (4, 0.5)
    assert (result.after.count, result.after.right) == (2, 1.0)
    assert (result.captions, result.captions_kept) == (2, 1)
    assert result.right_pass == 1.0
    assert {p: rates.count for p, (rates, _) in result.by_p.items()} == {"0.0": 1, "0.5": 2, "0.9": 1}
    assert result.interval[0] <= 0.5 <= result.interval[1]
    assert json.loads(json.dumps(result.figures()))["after"]["right"] == 1.0
    assert "of 1 caption pairs it keeps something" in as_text(result)


def test_separation_is_the_chance_that_a_right_pair_scores_higher():
    right, wrong = [0.9, 0.5, 0.5], [0.5, 0.1]
    wins = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
    found = Separation.of(right, wrong)
    assert found.area == pytest.approx(wins / 6)
    assert found.right[-1] == pytest.approx(0.5)
    assert Separation.of(right, []).area is None


def test_nothing_kept_is_no_error():
    result = examine_pairs([pair_of("a", right=False, direction=-0.5)], FilterConfig())
    assert result.after == Rates.of([])
    assert result.interval_after == (0.0, 0.0)
    assert as_text(result)


def test_sampled_caption_pairs_keep_to_their_split():
    held, training = (sample_caption_edits(66, seed=3, held_out=split) for split in (True, False))
    assert held == sample_caption_edits(66, seed=3, held_out=True)
    for edit in training:
        scenes = [parse_caption(text) for text in (edit.caption, edit.edited_caption)]
        assert all(scene is not None for scene in scenes)
        assert scenes[0][1] == scenes[1][1]
        assert scenes[0][1] == 0 or not any(is_held_out(scene) for scene, _ in scenes)
    assert {parse_caption(edit.caption)[1] for edit in held} == {0, 1, 2}


@pytest.fixture(scope="module")
def clip():
    return ClipSimilarity.load("embedded")


@pytest.fixture
def folder(tmp_path):
    moved = STAR.with_(place="bottom right")
    with PairWriter(tmp_path / "set", manifest={"config": {}}) as writer:
        writer.write(record(HEART, STAR, key="0000000/1"), record(HEART, moved, wording=0, key="0000001/2", p=0.1))
    return tmp_path / "set"


def test_a_data_set_is_judged_once(folder, clip):
    calls = []
    hooks = Hooks(on_progress=lambda done, total, _: calls.append((done, total)))
    first = judge_store(folder, clip, hooks=hooks)
    assert [pair.right for pair in first] == [True, False]
    assert [pair.says_where for pair in first] == [True, False]
    again = judge_store(folder, clip, hooks=hooks)
    assert again == first
    assert calls == [(2, 2)]


def test_what_shows_a_held_out_scene_is_not_trained_on(tmp_path, clip):
    held = next(scene for scene in scenes_of(held_out=True) if scene.shape == "heart")
    circles = (scene for scene in scenes_of(held_out=False) if scene.shape == "circle")
    known = next(scene for scene in circles if not is_held_out(scene.with_(shape="star")))
    with PairWriter(tmp_path / "set", manifest={"config": {"seed": 1}}) as writer:
        for number, scene in enumerate((held, known)):
            asked = (scene, scene.with_(shape="star"))
            writer.write(record(*asked, asked=asked, key=f"{number:07d}/1"))
    judged = judge_store(tmp_path / "set", clip)
    for _ in range(2):
        assert copy_without_held_out(tmp_path / "set", judged, tmp_path / "copy") == 1
        assert PairStore(tmp_path / "copy").keys() == {"0000001/1"}


def test_the_clip_sees_a_moved_object(folder, clip):
    stayed, moved = judge_store(folder, clip)
    assert stayed.scores.sim_image > moved.scores.sim_image + 0.1
    assert stayed.scores.sim_direction > moved.scores.sim_direction + 0.1


@pytest.mark.slow
def test_sheet_and_curves_are_drawn(folder, clip, tmp_path):
    pairs = judge_store(folder, clip)
    kept = kept_pairs(pairs, FilterConfig(min_sim_image=-1.0, min_sim_direction=-1.0, min_sim_0=-1.0, min_sim_1=-1.0))
    sheet = pair_sheet(PairStore(folder), pairs, kept)
    assert sheet.width > 256
    assert sheet.height > 128
    pytest.importorskip("matplotlib")
    draw_curves({"one": examine_pairs(pairs, FilterConfig())}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


@pytest.mark.slow
def test_command_generates_judges_and_goes_on(tmp_path, capsys):
    """Two caption pairs of two candidates in two steps; the second run finds everything there."""
    arguments = ["scenes", "pairs", str(tmp_path / "set"), "--n", "2", "--candidates", "2", "--steps", "2", "--json"]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["before"]["count"] == 4
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert main([*arguments[:3], "--judge-only", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first


@pytest.mark.parametrize(
    ("arguments", "steps", "cfg_range"),
    [
        ([], EMBEDDED_PAIRS["steps"], EMBEDDED_PAIRS["cfg_range"]),
        (["--steps", "3", "--cfg", "5"], 3, (5.0, 5.0)),
        (["--checkpoint", "other.safetensors"], 100, (7.5, 15.0)),
    ],
)
def test_pairs_of_the_embedded_model_have_its_settings_unless_told(arguments, steps, cfg_range):
    config = _pair_config(build_parser().parse_args(["pairs", "edits.jsonl", "--out", "x", *arguments]))
    assert (config.steps, config.cfg_range) == (steps, cfg_range)
