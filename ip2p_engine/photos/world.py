"""The photo world: edits of photographs whose true results are known, sampled from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .edits import (
    WAYS,
    Add,
    Canvas,
    Move,
    Operation,
    Recolour,
    Remove,
    Reshape,
    Resize,
    Swap,
    Tint,
    Tone,
    apply_all,
)
from .grammar import JOINTS, wordings
from .objects import COLOURS, GRID, LARGE, REGULAR, SHAPES, Thing
from .pictures import jitter
from .tones import HUES, TONES, colour_share

__all__ = [
    "FLAT_TONES",
    "KINDS",
    "LOCAL_KINDS",
    "VIEW",
    "VISIBLE",
    "PhotoEdit",
    "distinct",
    "lay_things",
    "sample_edit",
    "sample_edits",
    "say",
]

VIEW = 256
LOCAL_KINDS = ("add", "remove", "recolour", "reshape", "enlarge", "shrink", "move", "one of two", "swap")
KINDS = (*TONES, "one colour", *LOCAL_KINDS, "several")
ENOUGH = 0.08
"""Part of the picture that must have a colour before it is asked to change."""
VISIBLE = {"tone": 3e-3, "thing": 4e-4}
"""Mean squared difference between source and target below which nobody would see an edit: of the whole picture, and of
an object (25 and 34 dB)."""
TRIES = 60
FLAT_TONES = ("night", "sunset", "fog", "snow", "painting", "warmer", "colder")
"""Tones after which objects can still be told by their colours."""


class Pool(Protocol):
    """Photographs to take views of, as PhotoPool."""

    @property
    def keys(self) -> Sequence[str]: ...

    @property
    def weights(self) -> Tensor: ...

    def draw_from(self, index: int, size: int, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class PhotoEdit:
    """An edit with exact truth. ``operations`` follow one another; an addition's place is one of many right ones."""

    kind: str
    photo: str
    canvas: Canvas
    operations: tuple[Operation, ...]
    instruction: str

    @cached_property
    def source(self) -> Tensor:
        """RGB in [0, 1], (3, H, W)."""
        return self.canvas.picture()

    @cached_property
    def target(self) -> Tensor:
        """A right answer: the one that was drawn."""
        return apply_all(self.canvas, self.operations).picture()

    @property
    def label(self) -> tuple:
        """What was asked: equal for all right answers."""
        return tuple(operation.label for operation in self.operations)


def sample_edits(pool: Pool, count: int, *, seed: int, held_out: bool, size: int = VIEW) -> list[PhotoEdit]:
    """``count`` edits, kinds in turn, photographs at random; edit n depends on (seed, n) alone."""
    return [
        sample_edit(pool, KINDS[n % len(KINDS)], seed=seed * 1_000_003 + n, held_out=held_out, size=size)
        for n in range(count)
    ]


def sample_edit(
    pool: Pool, kind: str, *, seed: int, held_out: bool, size: int = VIEW, jittered: float = 0.0
) -> PhotoEdit:
    """One edit of a kind on a random view; ``jittered`` is the chance of a recoloured photograph.

    Views on which the edit would not be seen are drawn again.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(TRIES):
        index = int(torch.multinomial(pool.weights, 1, generator=generator))
        view = pool.draw_from(index, size, generator)
        if rng.random() < jittered:
            view = jitter(view, generator)
        found = MAKERS.get(kind, _tone_of(kind))(view, rng)
        if found is None:
            continue
        canvas, operations = found
        edit = PhotoEdit(
            kind=kind,
            photo=pool.keys[index],
            canvas=canvas,
            operations=operations,
            instruction=say(canvas, operations, rng, held_out=held_out),
        )
        visible = VISIBLE["tone" if kind in TONES else "thing"]
        if (edit.source - edit.target).square().mean() > visible:
            return edit
    raise RuntimeError(f"no photograph of this pool shows {kind!r} in {TRIES} views")


def say(canvas: Canvas, operations: tuple[Operation, ...], rng: random.Random, *, held_out: bool) -> str:
    """One wording of one or two operations."""
    spoken = []
    for operation in operations:
        phrasings = wordings(operation, canvas)
        spoken.append(rng.choice(phrasings.held_out if held_out else phrasings.train))
        canvas = operation.apply(canvas)
    if len(spoken) == 1:
        return spoken[0]
    joint = rng.choice(JOINTS.held_out if held_out else JOINTS.train)
    return joint.format(first=spoken[0], second=spoken[1])


Found = tuple[Canvas, tuple[Operation, ...]] | None


def _tone_of(kind: str) -> Callable[[Tensor, random.Random], Found]:
    def make(view: Tensor, rng: random.Random) -> Found:
        things = lay_things(view, rng, count=1) if rng.random() < 0.25 else ()
        return Canvas(base=view, things=things), (Tone(name=kind, seed=rng.randrange(2**31)),)

    return make


def _one_colour(view: Tensor, rng: random.Random) -> Found:
    present = [colour for colour in HUES if colour_share(view, colour) >= ENOUGH]
    if not present:
        return None
    colour = rng.choice(present)
    target = rng.choice([name for name in HUES if name != colour])
    return Canvas(base=view), (Tint(colour=colour, target=target),)


def _add(view: Tensor, rng: random.Random) -> Found:
    """A new object on an empty photograph, or beside another."""
    if rng.random() < 0.65:
        thing = lay_things(view, rng, count=1, size=rng.choice([REGULAR, REGULAR, LARGE]))[0]
        return Canvas(base=view), (Add(thing=thing),)
    first, second = lay_things(view, rng, count=2)
    return Canvas(base=view, things=(first,)), (Add(thing=second),)


def _on_one(make: Callable[[Canvas, random.Random], Operation], sizes: tuple[int, ...] = (REGULAR, LARGE)):
    def found(view: Tensor, rng: random.Random) -> Found:
        canvas = Canvas(base=view, things=lay_things(view, rng, count=1, size=rng.choice(sizes)))
        operation = make(canvas, rng)
        return (canvas, (operation,)) if operation.apply(canvas).has_room() else None

    return found


def _recolour(canvas: Canvas, rng: random.Random, index: int = 0) -> Operation:
    return Recolour(index=index, colour=rng.choice([c for c in COLOURS if c != canvas.things[index].colour]))


def _reshape(canvas: Canvas, rng: random.Random, index: int = 0) -> Operation:
    return Reshape(index=index, shape=rng.choice([s for s in SHAPES if s != canvas.things[index].shape]))


def _one_of_two(view: Tensor, rng: random.Random) -> Found:
    canvas = Canvas(base=view, things=lay_things(view, rng, count=2))
    return canvas, (_simple(canvas, rng, rng.randrange(2)),)


def _swap(view: Tensor, rng: random.Random) -> Found:
    return Canvas(base=view, things=lay_things(view, rng, count=2)), (Swap(),)


def _several(view: Tensor, rng: random.Random) -> Found:
    """A tone then an addition; an object's edit then a tone; two objects' edits; two tones."""
    form = rng.choice(["tone, add", "object, tone", "object, tone", "two objects", "two tones"])
    tone = Tone(name=rng.choice(FLAT_TONES), seed=rng.randrange(2**31))
    if form == "tone, add":
        return Canvas(base=view), (tone, Add(thing=lay_things(view, rng, count=1)[0]))
    if form == "two tones":
        return Canvas(base=view), (Tone(name=rng.choice(["black and white", "sepia", "autumn", "painting"])), tone)
    if form == "object, tone":
        canvas = Canvas(base=view, things=lay_things(view, rng, count=1))
        return canvas, (_simple(canvas, rng, 0), tone)
    canvas = Canvas(base=view, things=lay_things(view, rng, count=2))
    first = _recolour(canvas, rng, 0)
    second = Remove(index=1) if rng.random() < 0.5 else _recolour(canvas, rng, 1)
    return canvas, (first, second)


def _simple(canvas: Canvas, rng: random.Random, index: int) -> Operation:
    return rng.choice([Remove(index=index), _recolour(canvas, rng, index), _reshape(canvas, rng, index)])


def lay_things(view: Tensor, rng: random.Random, *, count: int, size: int = REGULAR) -> tuple[Thing, ...]:
    """Objects of one size that do not overlap and differ in colour or shape."""
    height, width = view.shape[1:]
    while True:
        things = tuple(
            Thing(
                shape=rng.choice(SHAPES),
                colour=rng.choice(list(COLOURS)),
                size=size,
                y=GRID * rng.randint(0, (height - size) // GRID),
                x=GRID * rng.randint(0, (width - size) // GRID),
            )
            for _ in range(count)
        )
        if distinct(things) and Canvas(base=view, things=things).has_room():
            return things


def distinct(things: tuple[Thing, ...]) -> bool:
    """Whether every two objects have different names, and a left and a right one."""
    pairs = [(a, b) for n, a in enumerate(things) for b in things[n + 1 :]]
    return all((a.shape, a.colour) != (b.shape, b.colour) and abs(a.x - b.x) >= 2 * GRID for a, b in pairs)


MAKERS: dict[str, Callable[[Tensor, random.Random], Found]] = {
    "one colour": _one_colour,
    "add": _add,
    "remove": _on_one(lambda canvas, rng: Remove(index=0)),
    "recolour": _on_one(_recolour),
    "reshape": _on_one(_reshape),
    "enlarge": _on_one(lambda canvas, rng: Resize(index=0, size=LARGE), (REGULAR,)),
    "shrink": _on_one(lambda canvas, rng: Resize(index=0, size=REGULAR), (LARGE,)),
    "move": _on_one(lambda canvas, rng: Move(index=0, way=rng.choice(list(WAYS))), (REGULAR,)),
    "one of two": _one_of_two,
    "swap": _swap,
    "several": _several,
}
