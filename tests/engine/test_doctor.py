"""The doctor finds what was planted and nothing else; what it drops is a store without it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ip2p_engine.data.agreement import agreement
from ip2p_engine.data.doctor import FAULTS, doctor, drop, show
from ip2p_engine.data.expected import Told, judged
from ip2p_engine.data.record import PairRecord
from ip2p_engine.data.registration import Movement, registered
from ip2p_engine.data.store import PairStore, PairWriter
from ip2p_engine.data.usual import casts
from ip2p_engine.edit import InstructPix2Pix
from ip2p_engine.errors import ConfigError, DatasetError
from ip2p_engine.scenes.grammar import sample_edits
from ip2p_engine.scenes.world import render

SIDE = 96


def encoded(pixels, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(stream, kind, **options)
    return stream.getvalue()


def picture(seed):
    """As busy as a photograph: a smooth ground, some shapes."""
    draw = np.random.default_rng(seed)
    ground = Image.fromarray(draw.integers(60, 190, (7, 7, 3), dtype=np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    brush = ImageDraw.Draw(ground)
    for _ in range(9):
        x, y, w, h = draw.integers(4, 70, 2).tolist() + draw.integers(8, 26, 2).tolist()
        brush.ellipse((x, y, x + w, y + h), fill=tuple(draw.integers(0, 255, 3).tolist()))
    return np.asarray(ground)


def edited(pixels, seed):
    """One more shape."""
    found = Image.fromarray(pixels)
    x, y = np.random.default_rng(seed + 1000).integers(10, 60, 2).tolist()
    ImageDraw.Draw(found).rectangle((x, y, x + 22, y + 18), fill=(250, 240, 20))
    return np.asarray(found)


def shifted(pixels, dx, dy):
    wide = np.pad(pixels, ((8, 8), (8, 8), (0, 0)), mode="edge")
    return wide[8 - dy : 8 - dy + SIDE, 8 - dx : 8 - dx + SIDE]


def zoomed(pixels, factor):
    margin = SIDE * (1 - 1 / factor) / 2
    box = (margin, margin, SIDE - margin, SIDE - margin)
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))


def pair(n, before, after, said="add a yellow box", **more):
    texts = {"original_prompt": f"a street {n}", "edited_prompt": f"a street {n} with a box", "edit_prompt": said}
    pictures = {"original_image": before, "edited_image": after}
    return PairRecord(**{**texts, **pictures, "seed": n, "p": None, "cfg": None, "key": f"k/{n}", **more})


def planted(n):
    """(fault, pair) number n: every second one is sound."""
    before = picture(n)
    after = edited(before, n)
    kinds = {
        1: ("offset", pair(n, encoded(before), encoded(shifted(after, 3, -2)))),
        3: ("offset", pair(n, encoded(before), encoded(zoomed(after, 1.06)))),
        5: ("unchanged", pair(n, encoded(before), encoded(before))),
        7: ("cast", pair(n, encoded(before), encoded((after + np.array([18.0, 0, -14])).clip(0, 255)))),
        9: ("blocks", pair(n, encoded(before), encoded(after, "JPEG", quality=8))),
        11: ("caption", pair(n, encoded(before), encoded(after), f"a street {n} with a box")),
        13: ("caption", pair(n, encoded(before), encoded(after), "a yellow box on a street")),
        15: ("aspect", pair(n, encoded(before), encoded(after[:72]))),
        17: ("tiny", pair(n, encoded(before), encoded(np.zeros((SIDE, SIDE, 3))))),
        19: ("tiny", pair(n, encoded(before[:32, :32]), encoded(after[:32, :32]))),
    }
    return kinds.get(n, ("", pair(n, encoded(before), encoded(after))))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor") / "pairs"
    rows = [planted(n) for n in range(20)]
    again = edited(picture(0), 0)
    rows.append(("duplicate", pair(20, encoded(picture(0), "JPEG", quality=90), encoded(again, "JPEG", quality=90))))
    with PairWriter(folder, manifest={}) as writer:
        writer.write(*(one for _, one in rows))
    return folder, [fault for fault, _ in rows]


def test_what_was_planted_is_found_and_nothing_else(store):
    folder, faults = store
    found = doctor(folder)
    named = {one.row: set(one.faults) - {"split"} for one in found.findings}
    assert {row: {fault} for row, fault in enumerate(faults) if fault} == {
        row: one for row, one in named.items() if one
    }
    assert found.counts()["offset"] == 2
    assert found.pairs == 21
    assert set(found.counts()) == set(FAULTS)
    said = found.as_text()
    assert "shifted by +3, -2 px" in said
    assert "not looked for without a `checkpoint` or a `clip`: instruction, swapped" in said and "swapped  " not in said


def test_a_clean_store_is_written_and_gone_on_with(store, tmp_path):
    folder, faults = store
    found = doctor(folder)
    assert drop(folder, tmp_path / "clean", found) == faults.count("")
    assert doctor(tmp_path / "clean").counts().keys() == found.counts().keys()
    assert not any(set(one.faults) - {"split"} for one in doctor(tmp_path / "clean").findings)
    assert drop(folder, tmp_path / "clean", found) == 0
    assert drop(folder, tmp_path / "some", found, faults=["caption"]) == len(faults) - 2
    with pytest.raises(ConfigError, match="fault 'ugly' is unknown; choose among offset"):
        drop(folder, tmp_path / "other", found, faults=["ugly"])
    with pytest.raises(DatasetError, match="holds pairs of another run"):
        drop(folder, tmp_path / "clean", found, faults=["caption"])
    assert PairStore(tmp_path / "clean")[0].key == "k/0"


def test_the_worst_can_be_looked_at(store, tmp_path):
    folder, faults = store
    found = doctor(folder)
    assert show(folder, tmp_path / "page.html", found) == len(found.findings)
    page = (tmp_path / "page.html").read_text()
    assert 'class="note">unchanged: 0.00% of the pixels differ' in page


def test_rows_that_cannot_be_used_are_broken(tmp_path):
    good = planted(0)[1]
    with PairWriter(tmp_path / "pairs", manifest={}) as writer:
        writer.write(
            good, pair(1, b"no picture", good.edited_image), pair(2, good.original_image, good.edited_image, " ")
        )
    found = {one.key: one.faults for one in doctor(tmp_path / "pairs").findings}
    assert set(found["k/1"]) == {"broken"}
    assert found["k/2"]["caption"] == "there is no instruction"
    with pytest.raises(DatasetError, match="has no pairs yet"):
        with PairWriter(tmp_path / "none", manifest={}):
            pass
        doctor(tmp_path / "none")


def test_a_movement_is_found_beside_an_edit_and_through_other_colours():
    before, after = picture(1).astype(np.float32), shifted(edited(picture(1), 1), 4, -3).astype(np.float32)
    move = registered(before, 0.5 * after + 60)
    assert (move.x, move.y, move.zoom) == pytest.approx((4, -3, 1), abs=0.1)
    assert move.gain > 4 * move.loss
    move = registered(before, zoomed(edited(picture(1), 1), 1.06).astype(np.float32))
    assert move.zoom == pytest.approx(1.06, abs=0.005)
    still = registered(before, edited(picture(1), 1).astype(np.float32))
    assert np.hypot(still.x, still.y) < 0.1 and still.gain < 0.01


def test_a_cast_is_what_the_same_words_do_nowhere_else():
    draw = np.random.default_rng(0)
    before = draw.integers(60, 200, (12, 8, 8, 3)).astype(np.float32)
    after = 0.4 * before + 10
    after[3] += (12, -9, 0)
    thumbs = list(np.stack([before, after], axis=1).round())
    words = [("make it night", "")] * 12
    ((row, shift),) = casts(thumbs, words)
    assert row == 3 and shift == pytest.approx((12, -9, 0), abs=1.5)
    assert not list(casts(thumbs, [(f"say {n} of {n}", "") for n in range(12)]))  # no words that come again


def test_pictures_that_change_otherwise_than_their_words_do_elsewhere():
    draw = np.random.default_rng(0)
    directions = {"add snow": 0, "make it night": 1, "make it red": 2, "make it bigger": 3}
    texts = draw.choice(list(directions), 200).tolist()
    before = draw.normal(0, 0.2, (200, 16))
    after = before + np.eye(16)[[directions[text] for text in texts]]
    sound = agreement(before, after, texts)
    assert np.median(sound) > 0.8
    before[7], after[7] = after[7].copy(), before[7].copy()
    texts[9] = next(text for text in directions if text != texts[9])
    found = agreement(before, after, texts)
    assert found[7] < -0.5 and found[9] < 0.3 and np.quantile(np.delete(found, [7, 9]), 0.02) > 0.3


STILL = {"x": 0.0, "y": 0.0, "zoom": 1.0, "gain": 0.01, "loss": 0.0, "explained": 0.0}


def told(*, forth=0.8, back=-0.5, cast=(1, 0, 0), even=0.9, **move):
    movement = Movement(**{**STILL, **move})
    return Told(forth=forth, back=back, cast=np.array(cast, dtype=np.float32), even=even, move=movement, side=64)


@pytest.mark.parametrize(
    ("within", "beyond", "fault"),
    [
        ({"forth": 0.4}, {"forth": 0.39}, "instruction"),
        ({"forth": 0.4, "back": 0.9}, {"forth": 0.39, "back": 0.4}, "swapped"),
        ({"forth": 0.4}, {"forth": 0.39, "back": 0.39}, "instruction"),
        ({"cast": (0, 6.4, 0)}, {"cast": (0, 6.5, 0)}, "cast"),
        ({"cast": (0, 0, -9), "even": 0.49}, {"cast": (0, 0, -9), "even": 0.5}, "cast"),
        ({"gain": 0.024, "zoom": 1.03}, {"gain": 0.025, "zoom": 1.03}, "offset"),
        ({"gain": 0.05, "zoom": 0.971}, {"gain": 0.05, "zoom": 0.969}, "offset"),
        ({"gain": 0.05, "zoom": 1.131}, {"gain": 0.05, "zoom": 1.129}, "offset"),
        ({"gain": 0.05, "y": -0.89}, {"gain": 0.05, "y": -0.9}, "offset"),
    ],
)
def test_both_sides_of_what_a_model_expects(within, beyond, fault):
    assert list(judged([told()] * 9 + [told(**within)])) == []
    ((row, name, _),) = judged([told()] * 9 + [told(**beyond)])
    assert (row, name) == (9, fault)


def test_a_model_that_does_not_know_a_set_judges_nothing_of_it(caplog):
    bad = [told(forth=-0.5), told(cast=(9, 0, 0)), told(gain=0.2, zoom=1.1)]
    assert len(list(judged([told(forth=0.3)] * 9 + bad))) == 3
    assert list(judged([told(forth=0.29)] * 9 + bad)) == [] and "does not know what this set asks for" in caplog.text
    inexact = [told(cast=(3.1, 0, 0), gain=0.025)] * 9 + bad
    assert [name for _, name, _ in judged(inexact)] == ["instruction"]
    assert list(judged([])) == []


def test_an_edit_model_sees_what_its_own_edits_would_not_be(tmp_path):
    """Scenes and the embedded model: a zoom beside a growing object, a cast of night, another's words, swapped."""
    edits = {edit.kind: edit for edit in sample_edits(11, seed=3, held_out=False)}
    sides = {kind: [np.asarray(render(scene)) for scene in (one.source, one.target)] for kind, one in edits.items()}
    sides["enlarge"][1] = np.asarray(
        Image.fromarray(sides["enlarge"][1]).resize((64, 64), Image.Resampling.BICUBIC, box=(2.5, 2.5, 61.5, 61.5))
    )
    sides["add night"][1] = (sides["add night"][1].astype(int) + (14, -9, 4)).clip(0, 255)
    sides["remove snow"].reverse()
    texts = {kind: one.instruction for kind, one in edits.items()} | {"colour": edits["shape"].instruction}
    with PairWriter(tmp_path / "scenes", manifest={}) as writer:
        for n, (kind, (before, after)) in enumerate(sides.items()):
            writer.write(pair(n, encoded(before), encoded(after), texts[kind], original_prompt="", edited_prompt=""))
    found = doctor(tmp_path / "scenes", editor=InstructPix2Pix.load("embedded", device="cpu"))
    named = {list(sides)[one.row]: set(one.faults) - {"split"} for one in found.findings}
    assert {kind: faults for kind, faults in named.items() if faults} == {
        "enlarge": {"offset"},
        "add night": {"cast", "instruction"},
        "remove snow": {"swapped"},
        "colour": {"instruction"},
    }
