"""How sure a mean is, and which of two curves lies above: the bootstrap over samples (Efron 1979)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..clip.filter import PairScores
from ..errors import ConfigError

__all__ = [
    "AutoPick",
    "Picked",
    "agreement",
    "bootstrap_means",
    "curve_margin",
    "interval",
    "pareto_front",
]


def bootstrap_means(values: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Means of resampled rows: ``values`` (samples, columns) -> (resamples, columns), float64.

    A resample draws as many rows as there are, with replacement, and takes whole rows, so that columns measured on the
    same samples stay paired. Raises ConfigError without samples or resamples.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not len(values) or resamples < 1:
        raise ConfigError(f"values have the shape {values.shape}, resamples is {resamples}; give (samples, columns)")
    count = len(values)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return draws @ values / count


def interval(means: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The percentile interval that holds ``level`` of the resampled means, column by column."""
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}; give a share between 0 and 1, such as 0.95")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def agreement(units: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """(Krippendorff's alpha for interval data, the share of units whose values are all equal) of repeated judgements.

    ``units`` holds the values that each thing was given; units of fewer than two say nothing. Alpha (Krippendorff 2004)
    is 1 for full agreement and 0 for chance; None where no two values differ, or none can be compared.
    """
    pairable = [np.asarray(unit, dtype=np.float64) for unit in units if len(unit) > 1]
    if not pairable:
        return None, None
    equal = sum(bool((unit == unit[0]).all()) for unit in pairable) / len(pairable)
    pooled = np.concatenate(pairable)
    # The sum of (a - b)^2 over the ordered pairs of m values is 2 m^2 times their variance.
    within = sum(2 * len(unit) ** 2 * unit.var() / (len(unit) - 1) for unit in pairable) / len(pooled)
    among = 2 * len(pooled) ** 2 * pooled.var() / (len(pooled) * (len(pooled) - 1))
    return (None if among == 0 else float(1 - within / among)), equal


def curve_margin(curve: np.ndarray, other: np.ndarray) -> float | None:
    """By how much a curve lies above another: the least gain in y over the other's points, at their x or more.

    Curves are points (x, y), shape (points, 2), in the order of the swept value, joined by straight lines; larger is
    better in both. Where the other has less x and more y than all of the curve, or the reverse, it is another part of
    the trade-off and says nothing; None if it is nowhere else. Negative: the other reaches what the curve does not.
    """
    mine, theirs = _dense(np.asarray(curve)), _dense(np.asarray(other))
    (low_x, low_y), (high_x, high_y) = mine.min(axis=0), mine.max(axis=0)
    margins = []
    for x, y in theirs:
        if x > high_x and y >= low_y:
            margins.append(low_y - y)
        elif x <= high_x and (x >= low_x or y <= high_y):
            margins.append(mine[mine[:, 0] >= x, 1].max() - y)
    return float(min(margins)) if margins else None


def _dense(points: np.ndarray, parts: int = 20) -> np.ndarray:
    """Points along the lines between points, the given ones among them."""
    steps = np.linspace(0, 1, parts, endpoint=False)[:, None]
    between = [a + steps * (b - a) for a, b in zip(points[:-1], points[1:], strict=True)]
    return np.concatenate([*between, points[-1:]])


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other beats: none is at least as high in both and higher in one.

    Equal points are all on the front.
    """
    order = sorted(range(len(points)), key=lambda n: points[n], reverse=True)
    front: list[int] = []
    best = float("-inf")
    for n in order:
        x, y = points[n]
        if y > best or (front and points[front[-1]] == (x, y)):
            front.append(n)
            best = y
    return sorted(front)


@dataclass(frozen=True, kw_only=True)
class Picked:
    """The chosen place, and whether any candidate kept the picture at all."""

    index: int
    keeps: bool


@dataclass(frozen=True, kw_only=True)
class AutoPick:
    """Follow the instruction most, among what keeps the picture.

    A result keeps the picture if its image similarity reaches ``min_sim_image``, the paper's own filter for ViT-L/14
    (section 3.1.2). Among those the highest directional similarity wins, the earlier one of equals. If none keeps the
    picture, the one nearest to it in image similarity is taken, and ``Picked.keeps`` is false.
    """

    min_sim_image: float = 0.7

    def __post_init__(self) -> None:
        if not -1 <= self.min_sim_image <= 1:
            raise ConfigError(f"min_sim_image is {self.min_sim_image!r}; give a cosine, -1 to 1")

    def pick(self, scores: Sequence[PairScores]) -> Picked:
        """The best of some candidates. Raises ConfigError without any."""
        if not scores:
            raise ConfigError("nothing to pick from; give at least one candidate")
        keeping = [n for n, one in enumerate(scores) if one.sim_image >= self.min_sim_image]
        if not keeping:
            return Picked(index=max(range(len(scores)), key=lambda n: scores[n].sim_image), keeps=False)
        return Picked(index=max(keeping, key=lambda n: scores[n].sim_direction), keeps=True)
