"""The language of the embedded world: captions of scenes, and instructions that lead from one scene to another."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

from ..captions.edits import CaptionEdit, Rejected, Request
from .world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, all_scenes

__all__ = [
    "CAPTIONS",
    "EMBEDDED_PAIRS",
    "Edit",
    "GrammarSource",
    "INSTRUCTIONS",
    "KINDS",
    "caption_of",
    "captions_of",
    "edits_drawn",
    "edits_from",
    "instructions_for",
    "is_held_out",
    "parse_caption",
    "sample_captions",
    "sample_edits",
    "scenes_of",
]

EMBEDDED_PAIRS: Mapping[str, Any] = {
    "steps": 8,
    "sampler": "ddim",
    "p2p_range": (0.1, 0.9),
    "cfg_range": (2.0, 4.0),
    "edited_prompt_start": 0.35,
}
"""A PairConfig's settings, measured in docs/pairs.md: w of 7.5 to 15 burns a miniature's colours, and its layout
settles in the first steps."""
HELD_OUT_PERCENT = 10


@dataclass(frozen=True, kw_only=True)
class Phrasings:
    """Ways to ask for one kind of edit; the held-out ones are made of known words and never trained on."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


INSTRUCTIONS = {
    "colour": Phrasings(
        train=(
            "make the {shape} {colour}",
            "make it {colour}",
            "change the colour to {colour}",
            "paint the {shape} {colour}",
            "turn the {shape} {colour}",
            "change the {shape} from {old_colour} to {colour}",
            "it should be {colour}",
        ),
        held_out=("paint it {colour}", "the {shape} should be {colour}"),
    ),
    "background": Phrasings(
        train=(
            "make the background {background}",
            "change the background to {background}",
            "paint the background {background}",
            "put it on a {background} background",
            "change the background from {old_background} to {background}",
        ),
        held_out=("the background should be {background}", "turn the background {background}"),
    ),
    "shape": Phrasings(
        train=(
            "turn the {old_shape} into a {shape}",
            "make it a {shape}",
            "change the {old_shape} to a {shape}",
            "replace the {old_shape} with a {shape}",
            "swap the {old_shape} for a {shape}",
            "it should be a {shape}",
        ),
        held_out=("change the {old_shape} into a {shape}", "turn it into a {shape}"),
    ),
    "enlarge": Phrasings(
        train=("make it bigger", "make the {shape} larger", "enlarge the {shape}", "the {shape} should be bigger"),
        held_out=("make the {shape} bigger", "enlarge it"),
    ),
    "shrink": Phrasings(
        train=("make it smaller", "make the {shape} small", "shrink the {shape}", "the {shape} should be smaller"),
        held_out=("make the {shape} smaller", "shrink it"),
    ),
    "add night": Phrasings(
        train=("make it night", "turn day into night", "change it to night", "what would it look like at night"),
        held_out=("make it look like night", "turn it into night"),
    ),
    "remove night": Phrasings(
        train=("make it day", "turn night into day", "change it to day", "what would it look like by day"),
        held_out=("make it look like day", "turn it into day"),
    ),
    "add snow": Phrasings(
        train=("add snow", "make it snow", "cover it with snow", "what would it look like in the snow"),
        held_out=("put it in the snow", "change it to snow"),
    ),
    "remove snow": Phrasings(
        train=("remove the snow", "take the snow away", "make the snow go away", "it should be without snow"),
        held_out=("make it without snow", "take away the snow"),
    ),
    "add sketch": Phrasings(
        train=(
            "turn it into a pencil sketch",
            "draw it with a pencil",
            "change it to a sketch",
            "what would it look like as a pencil sketch",
        ),
        held_out=("make it a pencil sketch", "make it look like a sketch"),
    ),
    "remove sketch": Phrasings(
        train=(
            "remove the sketch",
            "colour it in",
            "turn the sketch into a painting",
            "it should be without pencil",
            "remove the pencil sketch",
            "change the pencil sketch to a painting",
            "make it a painting",
        ),
        held_out=("take the sketch away", "turn the pencil sketch into a painting"),
    ),
}
KINDS = tuple(INSTRUCTIONS)
CAPTIONS = (
    "a {size} {colour} {shape} on a {background} background",
    "a {size} {colour} {shape} {where} on a {background} background",
    "a {colour} {shape} on {background}, {size}, {where}",
)
STYLE_CAPTIONS = {
    "plain": "{}",
    "night": "{}, at night",
    "snow": "{}, in the snow",
    "sketch": "a pencil sketch of {}",
}


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One true edit: the pictures follow from the scenes, the texts from the grammar."""

    kind: str
    source: Scene
    target: Scene
    instruction: str

    @property
    def caption(self) -> str:
        return caption_of(self.source)

    @property
    def edited_caption(self) -> str:
        return caption_of(self.target)


def captions_of(scene: Scene) -> tuple[str, ...]:
    """Every way in which the grammar describes a scene."""
    where = "in the centre" if scene.place == "centre" else f"at the {scene.place}"
    words = {
        "size": scene.size,
        "colour": scene.colour,
        "shape": scene.shape,
        "background": scene.background,
        "where": where,
    }
    plain = (_with_article(template.format(**words)) for template in CAPTIONS)
    return tuple(STYLE_CAPTIONS[scene.style].format(caption) for caption in plain)


def caption_of(scene: Scene) -> str:
    """The full caption, which says where the object is."""
    return captions_of(scene)[1]


def edits_from(scene: Scene) -> Iterator[tuple[str, Scene]]:
    """Every (kind, target) that the grammar can ask for in this scene."""
    yield from (("colour", scene.with_(colour=c)) for c in COLOURS if c != scene.colour)
    yield from (("background", scene.with_(background=b)) for b in BACKGROUNDS if b != scene.background)
    yield from (("shape", scene.with_(shape=s)) for s in SHAPES if s != scene.shape)
    other_size = next(s for s in SIZES if s != scene.size)
    yield ("enlarge" if other_size == "large" else "shrink"), scene.with_(size=other_size)
    if scene.style == "plain":
        yield from ((f"add {style}", scene.with_(style=style)) for style in ("night", "snow", "sketch"))
    else:
        yield f"remove {scene.style}", scene.with_(style="plain")


def instructions_for(kind: str, source: Scene, target: Scene, *, held_out: bool = False) -> tuple[str, ...]:
    """Every phrasing of one edit."""
    phrasings = INSTRUCTIONS[kind].held_out if held_out else INSTRUCTIONS[kind].train
    words = {
        "shape": target.shape,
        "old_shape": source.shape,
        "colour": target.colour,
        "old_colour": source.colour,
        "background": target.background,
        "old_background": source.background,
    }
    return tuple(_with_article(template.format(**words)) for template in phrasings)


def is_held_out(scene: Scene) -> bool:
    """Whether a scene is kept from all training: one in ten, by a hash of its attributes."""
    return zlib.crc32("/".join(astuple(scene)).encode()) % 100 < HELD_OUT_PERCENT


@lru_cache(maxsize=2)
def scenes_of(*, held_out: bool) -> tuple[Scene, ...]:
    """The scenes of one split."""
    return tuple(scene for scene in all_scenes() if is_held_out(scene) == held_out)


def sample_edits(count: int, *, seed: int, held_out: bool) -> list[Edit]:
    """``count`` edits of ``edits_drawn``."""
    return list(islice(edits_drawn(seed=seed, held_out=held_out), count))


def edits_drawn(*, seed: int, held_out: bool) -> Iterator[Edit]:
    """Edits without end, kinds in turn, scenes and phrasings drawn from one seed.

    The source belongs to the split; a training edit's target does too, so no held-out scene is ever trained on.
    """
    draw = random.Random(seed)
    return (_sample_edit(kind, draw, held_out) for kind in cycle(KINDS))


def _sample_edit(kind: str, draw: random.Random, held_out: bool) -> Edit:
    while True:
        source = draw.choice(scenes_of(held_out=held_out))
        targets = [target for name, target in edits_from(source) if name == kind]
        targets = [target for target in targets if held_out or not is_held_out(target)]
        if targets:
            target = draw.choice(targets)
            instruction = draw.choice(instructions_for(kind, source, target, held_out=held_out))
            return Edit(kind=kind, source=source, target=target, instruction=instruction)


def _with_article(text: str) -> str:
    return text.replace("a orange", "an orange")


class GrammarSource:
    """Edits that the grammar can say, of captions that it wrote; each follows from its request's seed."""

    name, batch = "scenes grammar", 256

    def __init__(self, *, held_out: bool = False) -> None:
        """``held_out`` takes the phrasings that are kept from training, and may lead to scenes that are."""
        self._held_out = held_out

    def propose(self, requests: Sequence[Request]) -> list[CaptionEdit | Rejected]:
        """One edit a request, its kind drawn first, so that all kinds are as frequent; other captions are rejected."""
        return [self._propose(request) for request in requests]

    def _propose(self, request: Request) -> CaptionEdit | Rejected:
        parsed = parse_caption(request.caption)
        if parsed is None:
            return Rejected(reason="unknown caption", text=request.caption)
        scene, wording = parsed
        draw = random.Random(request.seed)
        targets: dict[str, list[Scene]] = {}
        for kind, target in edits_from(scene):
            if self._held_out or not is_held_out(target):
                targets.setdefault(kind, []).append(target)
        if not targets:
            return Rejected(reason="no edit", text=request.caption)
        kind = draw.choice(sorted(targets))
        target = draw.choice(targets[kind])
        instruction = draw.choice(instructions_for(kind, scene, target, held_out=self._held_out))
        edited = captions_of(target)[wording]
        return CaptionEdit(caption=request.caption, instruction=instruction, edited_caption=edited)


def parse_caption(caption: str) -> tuple[Scene, int] | None:
    """The scene that a caption of the grammar describes, and which of its wordings it is; None for any other text.

    A caption that does not say where the object is means the centre.
    """
    return _meanings().get(caption.strip())


@lru_cache(maxsize=1)
def _meanings() -> dict[str, tuple[Scene, int]]:
    meanings: dict[str, tuple[Scene, int]] = {}
    for scene in all_scenes():
        for wording, caption in enumerate(captions_of(scene)):
            if caption not in meanings or scene.place == "centre":
                meanings[caption] = (scene, wording)
    return meanings


def sample_captions(count: int, *, seed: int, held_out: bool = False) -> Iterator[str]:
    """Captions of scenes drawn from one split, in any of their wordings."""
    draw = random.Random(seed)
    scenes = scenes_of(held_out=held_out)
    return (draw.choice(captions_of(draw.choice(scenes))) for _ in range(count))
