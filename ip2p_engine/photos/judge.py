"""The judge of the photo world: of all true results that an instruction could have had here, which is nearest?

Pictures are compared at half size, where detail that no small autoencoder keeps weighs less. An object that was to be
added may lie anywhere on the grid, so its place is searched for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluate.metrics import BEST_PSNR, psnr
from .edits import Add, Canvas, Operation, apply_all, possible_operations
from .objects import COLOURS, GRID, SHAPES, Thing, colour_of, opacity
from .world import PhotoEdit

__all__ = ["Verdict", "candidates", "distances", "judge_edit"]

UNTOUCHED = 0.02
BORDER = 12
LEAST_UNTOUCHED = 0.25


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the nearest true result is the asked one; PSNRs in dB.

    ``nearest`` to the nearest right answer; ``kept`` to the truth where the edit changes nothing, None for edits of
    nearly the whole picture. ``read`` says what the picture was taken for.
    """

    done: bool
    read: tuple
    count: int
    nearest: float
    kept: float | None


def judge_edit(edit: PhotoEdit, result: Tensor) -> Verdict:
    """Judge a result, RGB in [0, 1], (3, H, W), of the edit's own size."""
    errors = distances(edit, result)
    label = min(errors, key=errors.__getitem__)
    truth = _right_answer(edit, result)
    return Verdict(
        done=label == edit.label,
        read=label,
        count=len(errors),
        nearest=psnr((result - truth).square().mean().item(), BEST_PSNR),
        kept=_kept(edit, result, truth),
    )


def distances(edit: PhotoEdit, result: Tensor) -> dict[tuple, float]:
    """Mean squared difference at half size between a result and each candidate, by the candidate's label."""
    small = _halved(result)
    errors: dict[tuple, float] = {}
    for label, canvas, added in candidates(edit):
        if added is None:
            errors[label] = float((small - _halved(canvas.picture())).square().mean())
        else:
            for (shape, colour), (error, _, _) in _additions(small, canvas, added).items():
                place = (*label, ("add", shape, colour, added))
                errors[place] = error
    return errors


def candidates(edit: PhotoEdit) -> Iterator[tuple[tuple, Canvas, int | None]]:
    """(label, canvas, side of an object to be added anywhere or None): what an instruction could have meant here.

    Nothing, every operation alone, every addition; and for two operations also each with every other second or first
    one of its class.
    """
    yield (), edit.canvas, None
    singles = [_seeded(operation, edit) for operation in possible_operations(edit.canvas)]
    yield from (((one.label,), one.apply(edit.canvas), None) for one in singles)
    added = [operation.thing.size for operation in edit.operations if isinstance(operation, Add)]
    yield (), edit.canvas, (added or [48])[0]
    if len(edit.operations) == 2:
        yield from _pairs(edit, singles)


def _pairs(edit: PhotoEdit, singles: list[Operation]) -> Iterator[tuple[tuple, Canvas, int | None]]:
    first, second = edit.operations
    seen = set()
    middle = first.apply(edit.canvas)
    if isinstance(second, Add):
        yield (first.label,), middle, second.thing.size
    else:
        for other in possible_operations(middle):
            if type(other) is type(second):
                operations = (first, _seeded(other, edit))
                seen.add(tuple(o.label for o in operations))
                yield tuple(o.label for o in operations), apply_all(edit.canvas, operations), None
    for other in singles:
        if type(other) is type(first) and other != first and not isinstance(second, Add):
            operations = (other, second)
            label = tuple(o.label for o in operations)
            if label not in seen and _valid(edit.canvas, operations):
                yield label, apply_all(edit.canvas, operations), None


def _valid(canvas: Canvas, operations: tuple[Operation, ...]) -> bool:
    """Whether the second operation's object is still there after the first one."""
    index = getattr(operations[1], "index", 0)
    return index < max(1, len(operations[0].apply(canvas).things))


def _seeded(operation: Operation, edit: PhotoEdit) -> Operation:
    """The asked operation itself where it is equal, so that chance (flakes of snow) is the truth's."""
    return next((asked for asked in edit.operations if asked == operation), operation)


def _right_answer(edit: PhotoEdit, result: Tensor) -> Tensor:
    """The right answer that is nearest to a result."""
    *before, last = edit.operations
    if not isinstance(last, Add):
        return edit.target
    canvas = apply_all(edit.canvas, tuple(before))
    thing = last.thing
    found = _additions(_halved(result), canvas, thing.size, (thing.shape,), (thing.colour,))
    _, y, x = found[thing.shape, thing.colour]
    return Add(thing=Thing(shape=thing.shape, colour=thing.colour, size=thing.size, y=y, x=x)).apply(canvas).picture()


def _additions(
    small: Tensor,
    canvas: Canvas,
    size: int,
    shapes: tuple[str, ...] = SHAPES,
    colours: tuple[str, ...] = tuple(COLOURS),
) -> dict[tuple[str, str], tuple[float, int, int]]:
    """(error, y, x) at the best place of each object of one size; all arithmetic is at half size.

    Laying colour c with opacity m on b changes the squared error to r by -2 m (r - b)(c - b) + m**2 (c - b)**2, which
    two convolutions sum over every place of the grid.
    """
    base = _halved(canvas.picture())
    masks = torch.stack([_halved(opacity(shape, size)) for shape in shapes])
    left = small - base
    total = left.square().sum()
    found = {}
    for colour in colours:
        towards = colour_of(colour) - base
        cross = F.conv2d((left * towards).sum(0)[None, None], masks, stride=GRID // 2)[0]
        square = F.conv2d(towards.square().sum(0)[None, None], masks.square(), stride=GRID // 2)[0]
        errors = (total - 2 * cross + square) / small.numel()
        for shape, plane in zip(shapes, errors, strict=True):
            place = int(plane.argmin())
            y, x = divmod(place, plane.shape[1])
            found[shape, colour] = float(plane.flatten()[place]), GRID * y, GRID * x
    return found


def _kept(edit: PhotoEdit, result: Tensor, truth: Tensor) -> float | None:
    changed = ((truth - edit.source).abs().amax(0) > UNTOUCHED).float()
    near = F.max_pool2d(changed[None, None], 2 * BORDER + 1, stride=1, padding=BORDER)[0, 0]
    untouched = near == 0
    if untouched.float().mean() < LEAST_UNTOUCHED:
        return None
    return psnr((result - truth)[:, untouched].square().mean().item(), BEST_PSNR)


def _halved(picture: Tensor) -> Tensor:
    return F.avg_pool2d(picture[None], 2)[0]
