"""Sessions of several turns on photographs with objects, where the truth after every turn is known."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from PIL import Image

from ..evaluate.sessions import NOTHING, OTHER, Walk
from ..images import to_images, to_tensor
from .edits import Canvas, Move, Operation, Recolour, Remove, Reshape, Resize, Swap, Tone, possible_operations
from .judge import judge_edit
from .objects import LARGE
from .world import FLAT_TONES, VIEW, VISIBLE, PhotoEdit, Pool, distinct, lay_things, say

__all__ = ["PhotoWalk", "sample_photo_sessions"]

ON_ONE = (Recolour, Reshape, Resize, Move)
ON_TWO = (Recolour, Reshape, Swap, Remove)
NAMES = {Recolour: "recolour", Reshape: "reshape", Move: "move", Swap: "swap", Remove: "remove"}
TRIES = 60


@dataclass(frozen=True, kw_only=True)
class PhotoWalk(Walk):
    """A session of photographs."""

    edits: tuple[PhotoEdit, ...]

    def picture(self, turn: int) -> Image.Image:
        """The true one before a turn."""
        return to_images(self.edits[turn].source[None] * 2 - 1)[0]

    def judge(self, turn: int, picture: Image.Image) -> tuple[bool, float, str]:
        """(right, PSNR in dB, else what is wrong)."""
        verdict = judge_edit(self.edits[turn], (to_tensor([picture])[0] + 1) / 2)
        return verdict.done, verdict.nearest, NOTHING if verdict.read == () else OTHER


def sample_photo_sessions(
    pool: Pool, count: int, turns: int, *, seed: int = 7, held_out: bool = True
) -> list[PhotoWalk]:
    """Views with one or two objects, edits of these, and at last a tone; no state comes twice.

    A tone is last because objects are part of the photograph after it. Session n depends on (seed, n) alone.
    """
    return [_sample(pool, turns, seed * 1_000_003 + n, seed + 1 + 1000 * n, held_out) for n in range(count)]


def _sample(pool: Pool, turns: int, chance: int, seed: int, held_out: bool) -> PhotoWalk:
    rng, generator = random.Random(chance), torch.Generator().manual_seed(chance)
    for _ in range(TRIES):
        index = int(torch.multinomial(pool.weights, 1, generator=generator))
        view = pool.draw_from(index, VIEW, generator)
        canvas = Canvas(base=view, things=lay_things(view, rng, count=rng.choice([1, 2])))
        edits: list[PhotoEdit] = []
        seen = {canvas.things}
        while len(edits) < turns - 1 and (options := _options(canvas, seen)):
            kind = rng.choice(sorted(options))
            edits.append(_edit(pool.keys[index], kind, canvas, rng.choice(options[kind]), rng, held_out))
            canvas = edits[-1].operations[0].apply(canvas)
            seen.add(canvas.things)
        tone = Tone(name=rng.choice(FLAT_TONES), seed=rng.randrange(2**31))
        edits.append(_edit(pool.keys[index], tone.name, canvas, tone, rng, held_out))
        if len(edits) == turns and all(_visible(edit) for edit in edits):
            return PhotoWalk(edits=tuple(edits), seed=seed)
    raise RuntimeError(f"no photograph of this pool shows {turns} turns in {TRIES} views")


def _options(canvas: Canvas, seen: set) -> dict[str, list[Operation]]:
    """What can be said of the objects, by kind."""
    found: dict[str, list[Operation]] = {}
    for operation in possible_operations(canvas):
        if isinstance(operation, ON_ONE if len(canvas.things) == 1 else ON_TWO):
            after = operation.apply(canvas)
            if after.things not in seen and after.has_room() and distinct(after.things):
                found.setdefault(_kind(operation), []).append(operation)
    return found


def _kind(operation: Operation) -> str:
    if isinstance(operation, Resize):
        return "enlarge" if operation.size == LARGE else "shrink"
    return NAMES[type(operation)]


def _edit(photo: str, kind: str, canvas: Canvas, operation: Operation, rng: random.Random, held_out: bool) -> PhotoEdit:
    text = say(canvas, (operation,), rng, held_out=held_out)
    return PhotoEdit(kind=kind, photo=photo, canvas=canvas, operations=(operation,), instruction=text)


def _visible(edit: PhotoEdit) -> bool:
    least = VISIBLE["tone" if isinstance(edit.operations[0], Tone) else "thing"]
    return bool((edit.source - edit.target).square().mean() > least)
