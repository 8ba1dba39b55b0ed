"""How the picture after lies against the picture before: shift and zoom, found beside whatever an edit has changed.

Colours are free (an affine map of RGB, fitted), so that recolouring and restyling move nothing; places are fitted by
Gauss-Newton from several starts (Lucas and Kanade 1981, with truncated weights). What counts is where the fit explains
the picture better than no movement does, against where it does worse: an edit in place gives as much as it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

__all__ = ["Movement", "registered"]

FARTHEST = 0.1
"""Of the longer side; a zoom of at most twice that."""
RIDGE, TRUNCATED, STEADY, ALIKE, FITTED, PAD = 30.0, 24.0, 0.03, 0.1, 3, 24
STILL, ZOOMS = (0.0, 0.0, 0.0), (1.0, 0.92, 1.08)


class _Level(NamedTuple):
    blur: float
    scale: float
    """The error from which a pixel counts little."""
    rounds: int


LEVELS = (_Level(2.0, 24.0, 5), _Level(0.0, 16.0, 4))


@dataclass(frozen=True, kw_only=True)
class Movement:
    """Of the picture after, in pixels of what was compared."""

    x: float
    """Of the middle of what there is to see, to the right."""
    y: float
    zoom: float
    gain: float
    """Share of the picture that it explains and stillness does not."""
    loss: float
    """Share of the picture that stillness explains and it does not."""
    explained: float
    """Share of the difference that it explains."""


def registered(before: Any, after: Any) -> Movement:
    """The best movement of float RGB arrays (H, W, 3) in 0..255 of one size."""
    before, after = before.astype(np.float32), after.astype(np.float32)
    grid, soft = _Grid(before.shape), [_blurred(one, LEVELS[0].blur) for one in (before, after)]
    still = _fits(before, after, soft, STILL)
    best = still
    for start in _starts(before, after):
        for move in _refined(grid, before, after, soft, start) if _cost(best) > ALIKE else ():
            best = min(best, _fits(before, after, soft, move), key=_cost)
    gap, area = still[0].errors - best[0].errors, grid.u.size * TRUNCATED
    x, y = _of_the_middle(grid, best[0])
    gain, loss = float(gap[gap > 0].sum() / area), float(-gap[gap < 0].sum() / area)
    explained = 1 - best[0].cost / max(still[0].cost, 1e-6)
    return Movement(x=x, y=y, zoom=1 + float(best[0].move[2]), gain=gain, loss=loss, explained=explained)


def _of_the_middle(grid: _Grid, fit: _Fit) -> tuple[float, float]:
    """How far the middle of all edges moves: about the picture's middle alone, a zoom looks like a shift."""
    down, across = np.gradient(fit.warped.mean(axis=2))
    energy = np.abs(down) + np.abs(across)
    whole = float(energy.sum()) + 1e-6
    x, y, zoom = (float(one) for one in fit.move)
    return x + zoom * float((grid.u * energy).sum()) / whole, y + zoom * float((grid.v * energy).sum()) / whole


class _Grid:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.height, self.width = shape[:2]
        self.v, self.u = np.mgrid[: self.height, : self.width].astype(np.float32)
        self.v -= (self.height - 1) / 2
        self.u -= (self.width - 1) / 2
        self.reach = FARTHEST * max(shape[:2])


class _Fit:
    """Colours and errors of a move: (x, y, zoom - 1) of the picture after."""

    def __init__(self, before: Any, after: Any, move: Any, scale: float) -> None:
        self.move, self.warped = np.asarray(move, dtype=np.float64), _warped(before, move)
        flat = np.ones((after[..., 0].size, 4), dtype=np.float32)
        flat[:, :3] = self.warped.reshape(-1, 3)
        goal, weights = after.reshape(-1, 3), np.ones(len(flat), dtype=np.float32)
        for _ in range(FITTED):
            self.colours = _colours(flat, goal, weights)
            self.rest = goal - flat @ self.colours
            size = np.abs(self.rest).max(axis=1)
            weights = 1 / (1 + (size / scale) ** 2) ** 2
        self.weights = weights
        self.errors = np.minimum(size, TRUNCATED)
        self.cost = float(self.errors.mean())


def _fits(before: Any, after: Any, soft: Any, move: Any) -> tuple[_Fit, _Fit]:
    """Of the pictures and of the blurred ones: an outline of its own should not be what decides."""
    return _Fit(before, after, move, LEVELS[1].scale), _Fit(soft[0], soft[1], move, LEVELS[1].scale)


def _cost(fits: tuple[_Fit, _Fit]) -> float:
    return sum(fit.cost for fit in fits)


def _colours(flat: Any, goal: Any, weights: Any) -> Any:
    """The affine map (4, 3) of colours, near to none where the picture does not tell."""
    centred = flat * weights[:, None]
    pull = RIDGE * np.diag([1.0, 1.0, 1.0, 0.0])
    square, right = (flat.T @ centred).astype(np.float64), (centred.T @ goal).astype(np.float64)
    return np.linalg.solve(square + pull + 1e-3 * np.eye(4), right + pull[:, :3]).astype(np.float32)


def _refined(grid: _Grid, before: Any, after: Any, soft: Any, start: Any) -> list[Any]:
    """The start, and where Gauss-Newton leads from there, on blurred pictures and then on sharp ones."""
    moves = [np.asarray(start, dtype=np.float64)]
    for level, pictures in zip(LEVELS, (soft, (before, after)), strict=True):
        move = moves[-1]
        for _ in range(level.rounds):
            step = _step(grid, _Fit(pictures[0], pictures[1], move, level.scale))
            move = _bounded(grid, move + step)
            if np.abs(step * (1, 1, grid.width / 2)).max() < STEADY:
                break
        moves.append(move)
    return moves


def _step(grid: _Grid, fit: _Fit) -> Any:
    """One step of Gauss-Newton: the picture after moves against the colours' gradient."""
    down, across = np.gradient(fit.warped, axis=(0, 1))
    slope = fit.colours[:3]
    across, down = (part.reshape(-1, 3) @ slope for part in (across, down))
    radial = across * grid.u.reshape(-1, 1) + down * grid.v.reshape(-1, 1)
    columns = [-across, -down, -radial]
    weights = fit.weights[:, None]
    square = np.array([[float((one * weights * other).sum()) for other in columns] for one in columns])
    right = np.array([float((one * weights * fit.rest).sum()) for one in columns])
    damping = np.diag([1.0, 1.0, (grid.width / 2) ** 2]) * 1e2
    return np.linalg.solve(square + damping, right)


def _bounded(grid: _Grid, move: Any) -> Any:
    most = np.array([grid.reach, grid.reach, 2 * FARTHEST])
    return np.clip(move, -most, most)


def _warped(picture: Any, move: Any) -> Any:
    """The picture moved by (x, y) and enlarged by 1 + zoom about its middle; beyond the edge lies the edge."""
    if not np.any(move):
        return picture
    height, width = picture.shape[:2]
    x, y, scale = float(move[0]), float(move[1]), 1 / (1 + float(move[2]))
    wide = np.pad(picture.clip(0, 255).astype(np.uint8), ((PAD, PAD), (PAD, PAD), (0, 0)), mode="edge")
    # Pillow asks where each pixel comes from, counted from the corner of the padded picture.
    left = width / 2 - scale * (width / 2 + x) + PAD
    top = height / 2 - scale * (height / 2 + y) + PAD
    found = Image.fromarray(wide).transform(
        (width, height), Image.Transform.AFFINE, (scale, 0, left, 0, scale, top), Image.Resampling.BICUBIC
    )
    return np.asarray(found, dtype=np.float32)


def _blurred(picture: Any, radius: float) -> Any:
    soft = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(soft, dtype=np.float32)


def _starts(before: Any, after: Any) -> Iterator[Any]:
    """No movement, and for each zoom where the edges lie best upon each other."""
    yield STILL
    goal = _edges(after)
    for zoom in ZOOMS:
        yield (*_best_shift(_edges(_warped(before, (0.0, 0.0, zoom - 1))), goal), zoom - 1)


def _edges(picture: Any) -> Any:
    """Of the strongest channel, spread a little, with length 1."""
    across = np.abs(np.diff(picture, axis=1, prepend=picture[:, :1])).max(axis=2)
    down = np.abs(np.diff(picture, axis=0, prepend=picture[:1])).max(axis=2)
    edges = np.sqrt(np.minimum(across + down, 96))
    edges = edges - edges.mean()
    length = np.linalg.norm(edges)
    return edges / length if length > 0 else edges


def _best_shift(one: Any, other: Any) -> tuple[float, float]:
    """(x, y): how far ``other`` lies from ``one``."""
    correlation = np.fft.irfft2(np.conj(np.fft.rfft2(one)) * np.fft.rfft2(other), s=one.shape)
    reach = max(2, round(FARTHEST * max(one.shape)))
    shifts = np.arange(-reach, reach + 1)
    near = correlation[np.ix_(shifts % one.shape[0], shifts % one.shape[1])]
    y, x = np.unravel_index(int(near.argmax()), near.shape)
    return float(x - reach), float(y - reach)
