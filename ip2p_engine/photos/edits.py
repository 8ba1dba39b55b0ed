"""Edits of a canvas, a photograph with objects on it: each operation says what it does and what it is called."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .objects import COLOURS, LARGE, REGULAR, SHAPES, Thing, draw_things
from .tones import HUES, TONES, colour_share, tint

__all__ = [
    "WAYS",
    "Add",
    "Canvas",
    "Move",
    "Operation",
    "Recolour",
    "Remove",
    "Reshape",
    "Resize",
    "Swap",
    "Tint",
    "Tone",
    "apply_all",
    "possible_operations",
]

WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Signs of a move in (y, x)."""
PRESENT = 0.04


@dataclass(frozen=True, kw_only=True, eq=False)
class Canvas:
    """A photograph, (3, H, W) in [0, 1], and the objects on it."""

    base: Tensor
    things: tuple[Thing, ...] = ()

    def picture(self) -> Tensor:
        return draw_things(self.base, self.things)

    def with_thing(self, index: int, thing: Thing) -> Canvas:
        things = (*self.things[:index], thing, *self.things[index + 1 :])
        return replace(self, things=things)

    def has_room(self) -> bool:
        """Whether every object lies inside, and none on another."""
        height, width = self.base.shape[1:]
        inside = all(thing.fits(height, width) for thing in self.things)
        pairs = [(a, b) for n, a in enumerate(self.things) for b in self.things[n + 1 :]]
        return inside and not any(a.overlaps(b) for a, b in pairs)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One edit. Two operations that are equal have the same right answers."""

    def apply(self, canvas: Canvas) -> Canvas:
        raise NotImplementedError

    @property
    def label(self) -> Hashable:
        return self


@dataclass(frozen=True, kw_only=True)
class Tone(Operation):
    """The whole picture, with the objects on it, changes as ``TONES`` says."""

    name: str
    seed: int = field(default=0, compare=False)

    def apply(self, canvas: Canvas) -> Canvas:
        generator = torch.Generator().manual_seed(self.seed)
        return Canvas(base=TONES[self.name](canvas.picture(), generator))


@dataclass(frozen=True, kw_only=True)
class Tint(Operation):
    """What has one colour gets another."""

    colour: str
    target: str

    def apply(self, canvas: Canvas) -> Canvas:
        return Canvas(base=tint(canvas.picture(), self.colour, self.target))


@dataclass(frozen=True, kw_only=True)
class Add(Operation):
    """A new object, anywhere: all places are right."""

    thing: Thing

    def apply(self, canvas: Canvas) -> Canvas:
        return replace(canvas, things=(*canvas.things, self.thing))

    @property
    def label(self) -> Hashable:
        return ("add", self.thing.shape, self.thing.colour, self.thing.size)


@dataclass(frozen=True, kw_only=True)
class Remove(Operation):
    index: int

    def apply(self, canvas: Canvas) -> Canvas:
        return replace(canvas, things=canvas.things[: self.index] + canvas.things[self.index + 1 :])


@dataclass(frozen=True, kw_only=True)
class Recolour(Operation):
    index: int
    colour: str

    def apply(self, canvas: Canvas) -> Canvas:
        return canvas.with_thing(self.index, replace(canvas.things[self.index], colour=self.colour))


@dataclass(frozen=True, kw_only=True)
class Reshape(Operation):
    index: int
    shape: str

    def apply(self, canvas: Canvas) -> Canvas:
        return canvas.with_thing(self.index, replace(canvas.things[self.index], shape=self.shape))


@dataclass(frozen=True, kw_only=True)
class Resize(Operation):
    index: int
    size: int

    def apply(self, canvas: Canvas) -> Canvas:
        return canvas.with_thing(self.index, canvas.things[self.index].resized(self.size))


@dataclass(frozen=True, kw_only=True)
class Move(Operation):
    """By the object's own side."""

    index: int
    way: str

    def apply(self, canvas: Canvas) -> Canvas:
        thing = canvas.things[self.index]
        y, x = WAYS[self.way]
        return canvas.with_thing(self.index, thing.moved(y=y * thing.size, x=x * thing.size))


@dataclass(frozen=True, kw_only=True)
class Swap(Operation):
    """Two objects of one size change places."""

    def apply(self, canvas: Canvas) -> Canvas:
        first, second = canvas.things
        moved = replace(first, y=second.y, x=second.x), replace(second, y=first.y, x=first.x)
        return replace(canvas, things=moved)


def apply_all(canvas: Canvas, operations: tuple[Operation, ...]) -> Canvas:
    """One after another."""
    for operation in operations:
        canvas = operation.apply(canvas)
    return canvas


def possible_operations(canvas: Canvas) -> Iterator[Operation]:
    """Every operation that fits a canvas, but additions: they have a place as well."""
    yield from (Tone(name=name) for name in TONES)
    picture = canvas.picture()
    for colour in HUES:
        if colour_share(picture, colour) >= PRESENT:
            yield from (Tint(colour=colour, target=target) for target in HUES if target != colour)
    for index in range(len(canvas.things)):
        yield from _operations_on(canvas, index)
    if len(canvas.things) == 2 and canvas.things[0].size == canvas.things[1].size:
        yield Swap()


def _operations_on(canvas: Canvas, index: int) -> Iterator[Operation]:
    thing = canvas.things[index]
    yield Remove(index=index)
    yield from (Recolour(index=index, colour=colour) for colour in COLOURS if colour != thing.colour)
    yield from (Reshape(index=index, shape=shape) for shape in SHAPES if shape != thing.shape)
    other = LARGE if thing.size == REGULAR else REGULAR
    for operation in (Resize(index=index, size=other), *(Move(index=index, way=way) for way in WAYS)):
        if operation.apply(canvas).has_room():
            yield operation
