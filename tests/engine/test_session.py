"""Sessions: a turn edits the last turn's latents, what has not changed stays, and nothing that was said is lost."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ip2p_engine import cli
from ip2p_engine.edit import EditConfig, InstructPix2Pix
from ip2p_engine.errors import ConfigError, DatasetError
from ip2p_engine.evaluate.run_folder import text_of
from ip2p_engine.evaluate.sessions import NOTHING, OTHER, WAYS, _judged, cause_table, session_rows, session_table
from ip2p_engine.images import open_image, read_settings
from ip2p_engine.networks.conditioning import clean_latents
from ip2p_engine.scenes.grammar import Edit
from ip2p_engine.scenes.sessions import UNCLEAR, UNDONE, SceneWalk, sample_sessions
from ip2p_engine.scenes.world import Scene, render
from ip2p_engine.session import SHARE, WHOLE, Session, held, take_turn

SCENE = render(Scene(shape="heart", colour="red", background="sky", size="small", place="top left"))
QUICK = EditConfig(text_cfg=1, image_cfg=1, steps=1)


def moved_by(value, rest, side=16):
    change = torch.full((1, 4, side, side), rest)
    change[..., 4:8, 4:8] = value
    return change


@pytest.mark.parametrize(
    ("rest", "changed"), [(SHARE - 0.01, 36), (0.05, 36), (WHOLE - 0.01, 256), (WHOLE + 0.01, 256)]
)
def test_what_a_turn_has_not_changed_is_set_back(rest, changed):
    before = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    after, area, drift = held(before, before + moved_by(1.0, rest))
    assert float(area.sum()) == changed
    kept = (area == 0).expand_as(before)
    assert torch.equal(after[kept], before[kept]) and torch.equal(after[~kept], (before + moved_by(1.0, rest))[~kept])
    assert float(drift) == pytest.approx(rest if changed < 256 else 0.0, rel=1e-3)
    loose, _, same = held(before, before + moved_by(1.0, rest), hold=False)
    assert torch.equal(loose, before + moved_by(1.0, rest)) and torch.equal(same, drift)


@torch.inference_mode()
def test_the_first_turn_is_the_edit(editor):
    condition = editor.condition(SCENE, "make it night")
    first = clean_latents(editor.model, condition.image)
    made, area, _ = take_turn(editor, first, ["make it night"], [7], config=QUICK, hold=False)
    torch.testing.assert_close(made, editor.latents(condition, 7, config=QUICK))
    assert area.shape == (1, 1, 8, 8)


def test_a_session_is_said_undone_and_branched(editor, tmp_path):
    source = SCENE.resize((90, 64))
    session = Session.start(source, tmp_path / "s", resolution=64)
    with pytest.raises(ConfigError, match="no turn to undo"):
        session.undo()
    first = session.say(editor, "make it night", config=QUICK)
    second = session.say(editor, "paint it blue", seed=3, config=QUICK)
    assert (first.parent, second.parent, session.current) == (0, 1, 2) and second.changed >= first.changed > 0
    assert Image.open(session.picture_path()).size == (90, 64)
    assert session.undo() == 1 and Session(tmp_path / "s").current == 1
    third = session.say(editor, "make it snow", config=QUICK)
    assert (third.number, third.parent) == (3, 1) and [turn.number for turn in session.line()] == [1, 3]
    session.branch(2)
    again = Session(tmp_path / "s")
    assert again.turns == session.turns and again.current == 2
    said = read_settings(session.picture_path(3))["session"]
    assert [turn["instruction"] for turn in said] == ["make it night", "make it snow"]
    assert np.array_equal(again.original, source)
    with pytest.raises(ConfigError, match="no turn 4"):
        again.branch(4)
    with pytest.raises(ConfigError, match="is empty"):
        again.say(editor, " ")


def test_an_untouched_place_is_the_originals_after_all_turns(editor, tmp_path):
    """The second turn of a session of which the first has changed a corner."""
    session = Session.start(SCENE, tmp_path / "s", resolution=64)
    latents = clean_latents(editor.model, editor.condition(SCENE, "-").image)[0].clone()
    area = torch.zeros(1, 8, 8)
    area[:, :2, :2] = 1
    from ip2p_engine.session import Turn

    session._keep(editor, Turn(number=1, parent=0, instruction="x", seed=0), latents, area, detail=False)
    result = np.asarray(Image.open(session.picture_path(1)))
    assert np.array_equal(result[24:], np.asarray(SCENE)[24:]) and not np.array_equal(result, SCENE)


def test_a_start_that_was_cut_off_is_made_again(tmp_path):
    """Only where nothing else stands: the same picture, in the same way, and no turn yet."""
    folder = tmp_path / "s"
    Session.start(SCENE, folder, resolution=64)
    before = (folder / "session.json").read_bytes()
    assert Session.start(SCENE, folder, resolution=64).turns == []
    (folder / "session.json").unlink()
    Session.start(SCENE, folder, resolution=64)
    assert (folder / "session.json").read_bytes() == before
    for picture, size in ((SCENE.transpose(Image.Transpose.FLIP_TOP_BOTTOM), 64), (SCENE, 128)):
        with pytest.raises(DatasetError, match="is not empty"):
            Session.start(picture, folder, resolution=size)
    (folder / "more.txt").write_text("")
    with pytest.raises(DatasetError, match="is not empty"):
        Session.start(SCENE, folder, resolution=64)


def test_what_is_no_session_is_refused(editor, tmp_path):
    with pytest.raises(DatasetError, match="holds no session"):
        Session(tmp_path)
    (tmp_path / "session.json").write_text('{"turns": 3}')
    with pytest.raises(DatasetError, match="is no session's"):
        Session(tmp_path)
    with pytest.raises(DatasetError, match="is not empty"):
        Session.start(SCENE, tmp_path)
    one = Session.start(SCENE, tmp_path / "s", resolution=64)
    other = Session(tmp_path / "s")
    other.say(editor, "make it night", config=QUICK)
    with pytest.raises(DatasetError, match="has gone on elsewhere"):
        one.say(editor, "make it snow", config=QUICK)


def test_the_first_turns_model_says_the_size(editor, tmp_path):
    session = Session.start(SCENE.resize((96, 128)), tmp_path / "s")
    assert session.size is None and Session(tmp_path / "s").size is None
    session.say(editor, "make it night", config=QUICK)
    assert editor.model.spec.resolution == 64 and session.size == Session(tmp_path / "s").size == (64, 64)
    with pytest.raises(ConfigError, match="resolution"):
        Session.start(SCENE, tmp_path / "t", resolution=0)


def test_detail_is_the_originals(editor, tmp_path):
    """A turn's picture with detail is what the edit's would be: the session's first turn edits the same."""
    picture = SCENE.resize((256, 256), Image.Resampling.LANCZOS)
    session = Session.start(picture, tmp_path / "s", resolution=64)
    session.say(editor, "make it night", config=QUICK, detail=True)
    (edit,) = editor.edit(picture, "make it night", seeds=0, config=QUICK, detail=True)
    made = np.asarray(Image.open(session.picture_path())).astype(int)
    assert session.turns[0].changed == 1 and np.abs(made - np.asarray(edit.image)).max() <= 1


def test_a_turn_by_another_autoencoder_begins_at_the_picture(editor, tmp_path):
    """Latents of one autoencoder mean nothing to another: the photographs' edits what the scenes' has made."""
    one = Session.start(SCENE, tmp_path / "s", resolution=64)
    one.say(editor, "make it night", config=QUICK)
    photos = InstructPix2Pix.load("embedded-photos", device="cpu")
    encoded = clean_latents(photos.model, photos.condition(open_image(one.picture_path()), "-", size=(64, 64)).image)[0]
    before, area = one._state(photos, (64, 64))
    assert torch.equal(before, encoded) and torch.equal(area, one._state(editor, (64, 64))[1])
    own, _ = one._state(editor, (64, 64))
    assert torch.equal(own, load_file(one._latents_path(1))["latents"])


def test_commands(tmp_path, capsys):
    SCENE.save(tmp_path / "a.png")
    folder = str(tmp_path / "s")
    quick = ["--steps", "1", "--text-cfg", "1", "--image-cfg", "1"]
    assert cli.main(["session", "start", str(tmp_path / "a.png"), folder, "--resolution", "64"]) == 0
    assert cli.main(["session", "say", folder, "make it night", "paint it blue", *quick]) == 0
    assert "turn-002.png" in capsys.readouterr().out
    assert cli.main(["session", "undo", folder]) == 0 and cli.main(["session", "branch", folder, "0"]) == 0
    capsys.readouterr()
    assert cli.main(["session", "history", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "* 0 the original" and lines[2].startswith("  2 paint it blue")
    assert cli.main(["session", "history", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["current"] == 0
    assert cli.main(["session", "undo", folder]) == 2 and "original" in capsys.readouterr().err


def test_why_a_session_went_wrong():
    """Red to blue, then large: what is wrong with the second picture, by what it shows."""
    small = Scene(shape="heart", colour="red", background="sky", size="small", place="top left")
    blue, large = small.with_(colour="blue"), small.with_(colour="blue", size="large")
    edits = (Edit(kind="colour", source=small, target=blue, instruction=""),)
    walk = SceneWalk(edits=(*edits, Edit(kind="enlarge", source=blue, target=large, instruction="")), seed=0)
    grey = Image.new("RGB", (64, 64), "grey")
    shown = [render(scene) for scene in (large, blue, large.with_(colour="red"), large.with_(shape="star"), small)]
    rows = []
    for picture in (*shown, grey):
        rows.append({"way": "held", **_judged(walk, [render(blue), picture])})
    causes = [row["cause"] for row in rows]
    assert causes == [None, NOTHING, UNDONE, "asked done, but another shape", OTHER, UNCLEAR]
    assert [row["kind"] for row in rows] == [None, *["enlarge"] * 5] and rows[1]["right"] == [True, False]
    table = cause_table(rows)
    assert len(table.rows) == 5 and all(line[2:] == (1, 1) for line in table.rows) and table.columns[3:] == ("enlarge",)


def test_sr_at_k_counts_sessions_that_are_right_so_far(editor, tmp_path, capsys):
    walks = sample_sessions(3, 4)
    for walk in walks:
        assert all(a.target == b.source for a, b in zip(walk.edits, walk.edits[1:], strict=False))
        assert len({walk.edits[0].source, *(edit.target for edit in walk.edits)}) == 5
    rows = [
        {"way": "held", "right": [True, False, True], "psnr": [30.0, 20.0, 30.0]},
        {"way": "held", "right": [True, True, True], "psnr": [30.0, 30.0, 34.0]},
    ]
    line = session_table(rows).rows[0]
    assert line[:5] == ("held", 2, "100.0", "50.0", "50.0") and line[-1] == "32.0"
    for way in WAYS:
        (row,) = session_rows(editor, walks[:1], way, QUICK)
        assert len(row["right"]) == 4 and "SR@4" in text_of(session_table([row]))
    with pytest.raises(ConfigError, match="one of pictures"):
        session_rows(editor, walks, "telepathy", QUICK)
    asked = ["--n", "1", "--turns", "2", "--steps", "1", "--out", str(tmp_path / "r")]
    assert cli.main(["evaluate", "session", *asked]) == 0 and "SR@2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [("parent", 1), ("parent", 7), ("parent", -1), ("parent", 0.0), ("number", 2), ("seed", "x"), ("instruction", 3)]
    + [("changed", "x"), ("drift", float("inf")), ("settings", [])],
)
def test_a_stranger_s_session_of_turns_that_none_took(name, value, tmp_path):
    """Turns that come from themselves would be followed without end."""
    Image.new("RGB", (64, 64)).save(tmp_path / "original.png")
    turn = {"number": 1, "parent": 0, "instruction": "snow", "seed": 0, "changed": 0.5, "drift": 0.0, "settings": {}}
    state = {"version": 1, "size": [64, 64], "current": 1, "turns": [turn]}
    (tmp_path / "session.json").write_text(json.dumps(state))
    assert [one.number for one in Session(tmp_path).line()] == [1]
    (tmp_path / "session.json").write_text(json.dumps({**state, "turns": [{**turn, name: value}]}))
    with pytest.raises(DatasetError, match="is no session's"):
        Session(tmp_path)
