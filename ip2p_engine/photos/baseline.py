"""The baseline of the photo world: a colour table, fitted per instruction, which knows no places."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from .edits import Add, Canvas, Operation, apply_all
from .objects import GRID, Thing
from .world import PhotoEdit, Pool

__all__ = ["ColourTable", "fit_colour_table"]

LEVELS = 16


class ColourTable:
    """For each of 16 x 16 x 16 colours the mean colour that it became; a colour never seen stays."""

    def __init__(self) -> None:
        self._sums = torch.zeros(LEVELS**3, 3)
        self._counts = torch.zeros(LEVELS**3)

    def learn(self, source: Tensor, target: Tensor) -> None:
        """From a true pair, RGB in [0, 1], (3, H, W)."""
        cells = _cells(source).flatten()
        change = (target - source).flatten(1).T
        self._sums.index_add_(0, cells, change)
        self._counts.index_add_(0, cells, torch.ones(len(cells)))

    def apply(self, source: Tensor) -> Tensor:
        """The source with every pixel changed as its colour was."""
        mean = self._sums / self._counts.clamp(min=1)[:, None]
        return (source + mean[_cells(source)].permute(2, 0, 1)).clamp(0, 1)


def fit_colour_table(edit: PhotoEdit, pool: Pool, *, seed: int, examples: int = 8) -> ColourTable:
    """Fitted to the edit's own instruction on other photographs: the same objects elsewhere, the same operations."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    table = ColourTable()
    for _ in range(examples):
        index = int(torch.multinomial(pool.weights, 1, generator=generator))
        view = pool.draw_from(index, edit.source.shape[1], generator)
        canvas, operations = _elsewhere(view, edit, rng)
        table.learn(canvas.picture(), apply_all(canvas, operations).picture())
    return table


def _elsewhere(view: Tensor, edit: PhotoEdit, rng: random.Random) -> tuple[Canvas, tuple[Operation, ...]]:
    while True:
        canvas = Canvas(base=view, things=tuple(_moved(thing, view, rng) for thing in edit.canvas.things))
        operations = tuple(
            replace(one, thing=_moved(one.thing, view, rng)) if isinstance(one, Add) else one for one in edit.operations
        )
        if canvas.has_room() and apply_all(canvas, operations).has_room():
            return canvas, operations


def _moved(thing: Thing, view: Tensor, rng: random.Random) -> Thing:
    height, width = view.shape[1:]
    y, x = (GRID * rng.randint(0, (side - thing.size) // GRID) for side in (height, width))
    return replace(thing, y=y, x=x)


def _cells(picture: Tensor) -> Tensor:
    """The number of each pixel's colour cell, (H, W)."""
    red, green, blue = (picture * LEVELS).long().clamp(0, LEVELS - 1)
    return (red * LEVELS + green) * LEVELS + blue
