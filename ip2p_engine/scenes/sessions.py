"""Sessions of several turns on scenes, where the truth after every turn is known."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..evaluate.sessions import NOTHING, OTHER, Walk
from .grammar import Edit, edits_from, instructions_for, scenes_of
from .judge import judge_edit
from .world import render

__all__ = ["UNCLEAR", "UNDONE", "SceneWalk", "sample_sessions"]

UNDONE, UNCLEAR = "an earlier change undone", "no scene is seen"


@dataclass(frozen=True, kw_only=True)
class SceneWalk(Walk):
    """A session of scenes."""

    edits: tuple[Edit, ...]

    def picture(self, turn: int) -> Image.Image:
        """The true one before a turn."""
        return render(self.edits[turn].source)

    def judge(self, turn: int, picture: Image.Image) -> tuple[bool, float, str]:
        """(right, PSNR in dB, else what is wrong if the turn began at the right scene)."""
        edit, verdict = self.edits[turn], judge_edit(self.edits[turn], picture)
        read = verdict.reading.scene
        if not verdict.reading.clear:
            why = UNCLEAR
        elif not verdict.asked:
            why = NOTHING if read == edit.source else OTHER
        else:
            name = next(iter(read.differs(edit.target)), "")
            undone = name and getattr(read, name) == getattr(self.edits[0].source, name)
            why = UNDONE if undone else f"asked done, but another {name}"
        return verdict.success, verdict.psnr, why


def sample_sessions(count: int, turns: int, *, seed: int = 7, held_out: bool = True) -> list[SceneWalk]:
    """Held-out scenes, and so many instructions, one after another, of which none leads to a scene that there was.

    ``held_out``: in phrasings that training has not seen.
    """
    draw = random.Random(seed)
    return [_sample(draw, turns, seed + 1 + 1000 * n, held_out) for n in range(count)]


def _sample(draw: random.Random, turns: int, seed: int, held_out: bool) -> SceneWalk:
    scene, edits, seen = draw.choice(scenes_of(held_out=True)), [], set()
    for _ in range(turns):
        seen.add(scene)
        options: dict[str, list[Any]] = {}
        for kind, target in edits_from(scene):
            if target not in seen:
                options.setdefault(kind, []).append(target)
        kind = draw.choice(sorted(options))
        target = draw.choice(options[kind])
        text = draw.choice(instructions_for(kind, scene, target, held_out=held_out))
        edits.append(Edit(kind=kind, source=scene, target=target, instruction=text))
        scene = target
    return SceneWalk(edits=tuple(edits), seed=seed)
