"""The photo world: pictures with licences, edits with exact truth, a language, a judge, and a baseline."""

from __future__ import annotations

import re
import struct
from dataclasses import replace

import pytest
import torch

from ip2p_engine.data.store import PairStore
from ip2p_engine.errors import DatasetError
from ip2p_engine.evaluate.sessions import NOTHING
from ip2p_engine.images import open_image, to_tensor
from ip2p_engine.photos.baseline import ColourTable
from ip2p_engine.photos.edits import Add, Canvas, Move, Recolour, Remove, Swap, Tone, possible_operations
from ip2p_engine.photos.gather import read_qt_resources
from ip2p_engine.photos.grammar import JOINTS, TONE_WORDS, all_words, wordings
from ip2p_engine.photos.judge import distances, judge_edit
from ip2p_engine.photos.objects import COLOURS, LARGE, SHAPES, Thing, opacity
from ip2p_engine.photos.pairs import write_pairs
from ip2p_engine.photos.pictures import (
    FREE_LICENCES,
    catalogue,
    dead_leaves,
    demo_picture,
    find_picture,
    jitter,
    load_pixels,
)
from ip2p_engine.photos.sessions import sample_photo_sessions
from ip2p_engine.photos.texts import FACTS, compact_tokens, facts_of
from ip2p_engine.photos.tones import HUES, TONES, colour_share, tint
from ip2p_engine.photos.world import KINDS, PhotoEdit, sample_edits

DEMO = [photo.key for photo in catalogue() if photo.split == "demo"]


class DemoPool:
    """The four photographs that ship, as a pool of views."""

    def __init__(self) -> None:
        self.keys = DEMO
        self.weights = torch.ones(len(DEMO))
        self.pictures = [load_pixels(demo_picture(key)) for key in DEMO]

    def draw_from(self, index, size, generator):
        picture = self.pictures[index]
        y, x = (int(torch.randint(side - size + 1, (1,), generator=generator)) for side in picture.shape[1:])
        return picture[:, y : y + size, x : x + size].float() / 255


@pytest.fixture(scope="module")
def pool():
    return DemoPool()


@pytest.fixture(scope="module")
def edits(pool):
    return sample_edits(pool, len(KINDS), seed=3, held_out=True)


@pytest.fixture
def view(pool):
    return pool.draw_from(0, 128, torch.Generator().manual_seed(0))


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_training_sees_free_licences_only():
    assert {photo.licence for photo in catalogue() if photo.split == "train"} <= set(FREE_LICENCES)
    assert len({photo.key for photo in catalogue()}) == len(catalogue())
    assert all(photo.author and photo.title for photo in catalogue())


def test_four_public_domain_photographs_ship():
    assert len(DEMO) == 4
    assert {photo.licence for photo in catalogue() if photo.split == "demo"} <= {"public-domain", "CC0-1.0"}
    assert all(min(load_pixels(demo_picture(key)).shape[1:]) >= 256 for key in DEMO)


def test_a_missing_picture_says_how_to_get_it(tmp_path):
    with pytest.raises(DatasetError, match="ip2p photos gather"):
        find_picture(tmp_path, DEMO[0])


def test_qt_resources_are_read():
    def name(text: str) -> bytes:
        return struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")

    names, content = name("a.jpg"), struct.pack(">I", 5) + b"photo"
    tree = struct.pack(">IHIIQ", 0, 2, 1, 1, 0) + struct.pack(">IHHHIQ", 0, 0, 0, 0, 0, 0)
    start = 20
    header = b"qres" + struct.pack(">4I", 2, start, start + len(tree), start + len(tree) + len(content))
    assert list(read_qt_resources(header + tree + content + names)) == [("/a.jpg", b"photo")]
    with pytest.raises(DatasetError, match="qres"):
        list(read_qt_resources(b"else"))


@pytest.mark.parametrize("name", TONES)
def test_tones_are_pictures_and_repeat(name, view):
    first, again = (TONES[name](view, chance()) for _ in range(2))
    assert first.shape == view.shape
    assert first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again)
    assert (first - view).abs().mean() > 0.01 or name == "autumn"


def test_known_tones(view):
    assert torch.equal(TONES["negative"](view, chance()), 1 - view)
    grey = TONES["black and white"](view, chance())
    assert torch.equal(grey[0], grey[2])


def test_tints_change_what_has_the_colour():
    card = torch.cat([torch.tensor(c).view(3, 1, 1).expand(3, 16, 16) for c in ((0.8, 0.1, 0.1), (0.1, 0.1, 0.8))], 2)
    turned = tint(card, "red", "green")
    assert colour_share(card, "red") == pytest.approx(0.5, abs=0.1)
    assert colour_share(turned, "green") == pytest.approx(0.5, abs=0.1)
    assert torch.allclose(turned[:, :, 20:], card[:, :, 20:])
    assert set(HUES) <= set(COLOURS)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_drawn(shape):
    mask = opacity(shape, 48)
    assert mask.shape == (1, 48, 48)
    assert 0.2 < mask.mean() < 0.85
    assert (mask - mask.flip(-1)).abs().mean() < 0.01


def test_operations_change_only_the_object(view):
    thing = Thing(shape="star", colour="red", y=16, x=16)
    other = Thing(shape="circle", colour="blue", y=64, x=72)
    canvas = Canvas(base=view, things=(thing, other))
    assert Remove(index=0).apply(canvas).things == (other,)
    assert Recolour(index=1, colour="green").apply(canvas).things[1].colour == "green"
    assert Move(index=0, way="right").apply(canvas).things[0].x == 64
    swapped = Swap().apply(canvas).things
    assert [(t.shape, t.y, t.x) for t in swapped] == [("star", 64, 72), ("circle", 16, 16)]
    assert thing.resized(LARGE).resized(48) == thing
    changed = (canvas.picture() - view).abs().amax(0) > 0
    assert not changed[:16].any() and changed[16:64, 16:64].any()


def test_held_out_phrasings_are_new_and_of_known_words(view):
    known = {word for text in trained_texts(view) for word in re.findall(r"\w+", text)}
    for phrasings in all_phrasings(view):
        assert not set(phrasings.train) & set(phrasings.held_out)
        for text in phrasings.held_out:
            assert set(re.findall(r"\w+", text)) <= known | set(COLOURS) | set(SHAPES), text


def all_phrasings(view):
    things = (Thing(shape="star", colour="red", y=0, x=0), Thing(shape="circle", colour="blue", y=64, x=72))
    canvas = Canvas(base=view, things=things)
    yield from (wordings(operation, canvas) for operation in possible_operations(canvas))
    yield wordings(Add(thing=replace(things[0], size=LARGE)), canvas)
    yield JOINTS.filled(first="", second="")
    yield from TONE_WORDS.values()


def trained_texts(view):
    return [text for phrasings in all_phrasings(view) for text in phrasings.train]


def test_every_text_is_in_the_vocabulary(view, edits):
    texts = [*trained_texts(view), *(edit.instruction for edit in edits), *all_words(), ""]
    assert compact_tokens(texts).shape == (len(texts), 77)


def test_facts_say_what_is_asked():
    facts = facts_of((Tone(name="night"), Add(thing=Thing(shape="star", colour="red", y=0, x=0))))
    assert {FACTS[n] for n in facts.nonzero()[:, 0]} == {"is Tone", "tone night", "is Add", "to red", "into star"}


def test_edits_repeat(pool, edits):
    again = sample_edits(pool, len(KINDS), seed=3, held_out=True)
    assert [e.instruction for e in again] == [e.instruction for e in edits]
    assert all(torch.equal(a.target, b.target) for a, b in zip(again, edits, strict=True))
    assert [e.kind for e in edits] == list(KINDS)


def test_the_judge_knows_the_truth_and_the_source(edits):
    for edit in edits[::2]:
        verdict = judge_edit(edit, edit.target)
        assert verdict.done and verdict.nearest > 40 and verdict.count >= 30, edit.instruction
        assert not judge_edit(edit, edit.source).done


def test_an_added_object_may_lie_anywhere(view):
    thing = Thing(shape="star", colour="red", y=8, x=8)
    edit = PhotoEdit(kind="add", photo="", canvas=Canvas(base=view), operations=(Add(thing=thing),), instruction="")
    elsewhere = Add(thing=thing.moved(y=48, x=40)).apply(edit.canvas).picture()
    blue = Add(thing=replace(thing, colour="blue")).apply(edit.canvas).picture()
    assert judge_edit(edit, elsewhere).done
    assert judge_edit(edit, elsewhere).kept > 60
    assert not judge_edit(edit, blue).done
    exact = (torch.nn.functional.avg_pool2d((elsewhere - view)[None], 2)).square().mean()
    assert distances(edit, view)[("add", "star", "red", 48),] > 0
    assert float(exact) > 0


def test_a_colour_table_learns_colours_and_no_places(view):
    table = ColourTable()
    table.learn(view, 1 - view)
    assert (table.apply(view) - (1 - view)).abs().mean() < 0.05
    thing = Thing(shape="square", colour="red", y=0, x=0)
    moved = Canvas(base=view, things=(thing.moved(x=48),)).picture()
    table = ColourTable()
    table.learn(Canvas(base=view, things=(thing,)).picture(), moved)
    assert (table.apply(Canvas(base=view, things=(thing,)).picture()) - moved).square().mean() > 0.01


def test_synthetic_pictures_and_jitter_stay_in_range(view):
    for picture in (dead_leaves(64, chance()), jitter(view, chance())):
        assert picture.min() >= 0 and picture.max() <= 1


def test_a_session_on_photographs_goes_from_truth_to_truth(pool):
    """Each turn begins where the one before ends, the judge reads the truth as right, and the turn before as undone."""
    for walk in sample_photo_sessions(pool, 3, 4, seed=1):
        states = [edit.canvas.things for edit in walk.edits]
        assert len(set(states)) == 4 and walk.edits[-1].kind in TONES and len(set(walk.instructions)) == 4
        for before, after in zip(walk.edits, walk.edits[1:], strict=False):
            assert torch.equal(before.target, after.source)
        right, psnr, _ = walk.judge(1, walk.picture(2))
        undone = walk.judge(1, walk.picture(1))
        assert right and psnr > 50 and not undone[0] and undone[2] == NOTHING


def test_true_pairs_of_photographs_are_a_data_set_that_goes_on(pool, tmp_path):
    write_pairs(pool, tmp_path / "some", 2)
    write_pairs(pool, tmp_path / "some", 3)
    write_pairs(pool, tmp_path / "whole", 3)
    some, whole = PairStore(tmp_path / "some"), PairStore(tmp_path / "whole")
    assert [some[n] for n in range(3)] == [whole[n] for n in range(3)] and len(some) == 3
    edit = sample_edits(pool, 2, seed=1, held_out=False)[1]
    assert (some[1].edit_prompt, some[1].kind, some[1].key) == (edit.instruction, KINDS[1], "0000001")
    assert torch.allclose(to_tensor([open_image(some[1].edited_image)])[0] / 2 + 0.5, edit.target, atol=0.51 / 255)
