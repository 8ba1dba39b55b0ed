"""What is usual among the pairs of a data set whose instructions are alike, and which pair differs from it.

Where an edit changes the whole picture, a lone pair cannot tell a colour cast or a shift from the edit. Many pairs of
one instruction can: all of them change alike, save one. Where they do not change alike, nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Box", "casts", "growth", "lone_box", "moved_boxes"]

SAME, NEARLY = 0.7, 0.85
FEWEST, MOST_WORDS, ENOUGH = 5, 12, 200
"""Pairs of a group, at least; words of an instruction, and pairs of a group, that are looked at."""
LONE, GROUND, MARGIN = 0.7, 24.0, 0.75
ALIKE, CELLS, LEAST, MOST = 3.0, 0.45, 4.0, 48.0
STILL, FAR = 0.01, 0.022
SAME_GROWTH, OTHER_GROWTH = 0.015, 0.035


Words = tuple[str, str]
"""(instruction in plain words, kind of edit or nothing)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Rows of like instructions."""

    rows: list[int]
    share: float
    """Of them that have to do the same, before one can be said not to."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """Around all that is not ground, in shares of the longer side; nan where it meets the picture's edge."""

    left: float
    top: float
    right: float
    bottom: float


def lone_box(picture: Any) -> Box | None:
    """Of a picture (H, W, 3) with something on a plain ground; None for any other."""
    ring = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    ground = np.median(ring, axis=0)
    far = np.abs(picture - ground).max(axis=2)
    if (np.abs(ring - ground).max(axis=1) > GROUND).mean() > 0.3 or not 0.02 < (far > GROUND).mean() < LONE:
        return None
    if (far > 3).mean() > LONE:  # a ground with a texture has more to register by
        return None
    cover = np.minimum(far / np.quantile(far[far > GROUND], 0.5), 1)
    side = max(picture.shape[:2])
    profiles = [cover.max(axis=axis) for axis in (0, 1)]
    if any(np.diff(np.flatnonzero(profile >= 0.5)).max(initial=1) > 1 for profile in profiles):
        return None  # several things
    (left, right), (top, bottom) = map(_ends, profiles)
    if np.isnan([left, right, top, bottom]).sum() > 2 or np.isnan([left, right]).all() or np.isnan([top, bottom]).all():
        return None
    return Box(left=left / side, top=top / side, right=right / side, bottom=bottom / side)


def _ends(profile: Any) -> tuple[float, float]:
    """Where it first and last crosses a half, between pixels; nan at the picture's edge."""
    inside = np.flatnonzero(profile >= 0.5)
    first, last = int(inside[0]), int(inside[-1])

    def crossing(out: float, within: float) -> float:
        return (within - 0.5) / max(within - out, 1e-6)

    low = first + 0.5 - crossing(profile[first - 1], profile[first]) if first > 0 else np.nan
    high = last + 0.5 + crossing(profile[last + 1], profile[last]) if last + 1 < len(profile) else np.nan
    return low, high


def moved_boxes(boxes: Sequence[tuple[Box, Box] | None], texts: Sequence[Words]) -> Iterator[tuple[int, str]]:
    """(row, what was measured) of lone objects that are not where, or as large as, the others of the set are.

    Their middles, where those of most others stay; their growth, where most of the same words grow alike.
    """
    rows = [row for row, pair in enumerate(boxes) if pair is not None]
    if len(rows) < FEWEST:
        return
    x, y, grown = np.array([_change(*boxes[row]) for row in rows]).T  # type: ignore[misc]
    by = np.hypot(x, y)
    usual = np.nanquantile(by, SAME) <= STILL
    groups = _groups([texts[row] for row in rows])
    for n, row in enumerate(rows):
        if usual and by[n] > FAR:
            yield row, f"a lone object lies {x[n]:+.1%}, {y[n]:+.1%} of the side away"
        elif (times := _unusual(grown, n, groups)) is not None:
            yield row, f"a lone object is {times:.2f} times as large as with the same words elsewhere"


def _change(one: Box, other: Box) -> tuple[float, float, float]:
    """(middle's x, y, logarithm of the growth); a side that is cut off is taken from the one across."""
    right, down = other.right - one.right, other.bottom - one.bottom
    left, up = other.left - one.left, other.top - one.top
    wide, high = right - left, down - up
    # What is cut off has grown as the other axis has.
    x = _first((right + left) / 2, right - high / 2, left + high / 2)
    y = _first((down + up) / 2, down - wide / 2, up + wide / 2)
    return x, y, growth(one, other)


def growth(one: Box, other: Box) -> float:
    """Its logarithm; nan where neither axis is whole in both."""
    sizes = [(box.right - box.left, box.bottom - box.top) for box in (one, other)]
    grown = [float(np.log(after / before)) for before, after in zip(*sizes, strict=True)]
    return _first(sum(grown) / 2, *grown)


def _first(*values: float) -> float:
    return next((value for value in values if not np.isnan(value)), np.nan)


def _unusual(grown: Any, n: int, groups: Sequence[Sequence[Group]]) -> float | None:
    """How many times as large as the others of its group; None where that is usual, or nothing is."""
    for group in groups[n]:
        others = grown[[one for one in group.rows if one != n]]
        others = others[~np.isnan(others)]
        middle = float(np.median(others)) if len(others) else np.nan
        if len(others) >= FEWEST - 1 and np.quantile(np.abs(others - middle), group.share) <= SAME_GROWTH:
            gap = float(grown[n] - middle)
            return float(np.exp(gap)) if abs(gap) > OTHER_GROWTH else None
    return None


def casts(thumbs: Sequence[Any], texts: Sequence[Words]) -> Iterator[tuple[int, Any]]:
    """(row, colour) of pairs that shift all colours against what their words do to the others of the set.

    ``thumbs`` are (2, 8, 8, 3) or None. What the words do is a gain and an offset of each channel, fitted to the group.
    """
    rows = [row for row, thumb in enumerate(thumbs) if thumb is not None]
    if len(rows) < FEWEST:
        return
    cells = np.stack([thumbs[row] for row in rows]).reshape(len(rows), 2, -1, 3).astype(np.float32)
    maps: dict[int, Any] = {}
    for n, groups in enumerate(_groups([texts[row] for row in rows])):
        for group in groups:
            if id(group) not in maps:
                maps[id(group)] = _map_of(cells[group.rows], group.share)
        line = next((maps[id(group)] for group in groups if maps[id(group)] is not None), None)
        if line is None:
            continue
        rest = cells[n, 1] - _mapped(cells[n, 0], line)
        shift = np.median(rest, axis=0)
        even = (np.abs(rest - shift).max(axis=1) <= ALIKE).mean()
        kept = (np.abs(rest).max(axis=1) <= ALIKE).mean()
        if LEAST < np.abs(shift).max() <= MOST and even >= CELLS and kept < even / 2:
            yield rows[n], shift


def _mapped(colours: Any, line: Any) -> Any:
    return colours * line[0] + line[1]


def _map_of(cells: Any, share: float) -> Any:
    """(gain, offset) of each channel, robustly; None where fewer than ``share`` of the pairs follow it."""
    x, y = (cells[:, side].reshape(-1, 3) for side in (0, 1))
    weights, line = np.ones(len(x)), np.array([[1.0] * 3, [0.0] * 3])
    for turn in range(12):
        total = weights.sum() + 1e-6
        middle, goal = (weights @ x) / total, (weights @ y) / total
        gain = (weights @ ((x - middle) * (y - goal)) + total) / (weights @ (x - middle) ** 2 + total)
        line = np.stack([gain, goal - gain * middle])
        scale = max(ALIKE, 40.0 * 0.7**turn)
        far = np.abs(y - _mapped(x, line)).max(axis=1)
        weights = 1 / (1 + (far / scale) ** 2) ** 2
    follow = (far <= ALIKE).reshape(len(cells), -1).mean(axis=1) >= CELLS
    return line if follow.mean() >= share else None


def _groups(texts: Sequence[Words]) -> list[list[Group]]:
    """Of each text the rows of the same words, then of those but for one word, then of its kind."""
    found: dict[Any, Group] = {}
    names: list[list[Any]] = []
    for row, (text, kind) in enumerate(texts):
        words = tuple(text.split())[:MOST_WORDS]
        names.append([words, *((*words[:n], None, *words[n + 1 :]) for n in range(len(words)) if len(words) > 2)])
        names[-1] += [kind] if kind else []
        for name in names[-1]:
            group = found.setdefault(name, Group(rows=[], share=SAME if name == words else NEARLY))
            if len(group.rows) < ENOUGH:
                group.rows.append(row)
    every = ([found[name] for name in own if len(found[name].rows) >= FEWEST] for own in names)
    return [sorted(own, key=lambda group: (group.share, -len(group.rows))) for own in every]
