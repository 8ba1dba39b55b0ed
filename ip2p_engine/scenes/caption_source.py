"""The grammar of the embedded world as a source of edits: exact, free, and for scenes only."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

from ..captions.edits import CaptionEdit, Rejected, Request
from .grammar import captions_of, edits_from, instructions_for, is_held_out, scenes_of
from .world import Scene, all_scenes

__all__ = ["GrammarSource", "parse_caption", "sample_captions"]


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
