"""The paper's figures 8 and 10: points with their confidence intervals from rows of ``measure``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from .measure import Row
from .statistics import bootstrap_means, curve_margin, interval

__all__ = ["CURVE_NUMBERS", "Claim", "Point", "claims", "curve_points"]

CURVE_NUMBERS = ("sim_direction", "sim_image", "sim_1", "sim_0")
SWEPT = ("text_cfg", "image_cfg", "strength")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A setting's means over the samples, and their intervals, by the names of the numbers."""

    curve: str
    setting: dict[str, float]
    count: int
    means: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]


def curve_points(rows: Iterable[Row], *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> list[Point]:
    """One point a curve and setting, in the order of the rows; intervals by the bootstrap over samples."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["curve"], *_setting(row).items()), []).append(row)
    return [_point(group, resamples, level, seed) for group in groups.values()]


def _setting(row: Row) -> dict[str, float]:
    return {name: row[name] for name in SWEPT if name in row}


def _numbers(row: Row) -> dict[str, float]:
    judged = {name: float(value) for name, value in row.get("judged", {}).items() if isinstance(value, float | bool)}
    return {**{name: row[name] for name in CURVE_NUMBERS}, **judged}


def _point(group: Sequence[Row], resamples: int, level: float, seed: int) -> Point:
    numbers = [_numbers(row) for row in group]
    names = list(numbers[0])
    values = np.array([[one[name] for name in names] for one in numbers])
    low, high = interval(bootstrap_means(values, resamples=resamples, seed=seed), level)
    return Point(
        curve=group[0]["curve"],
        setting=_setting(group[0]),
        count=len(group),
        means=dict(zip(names, values.mean(axis=0).tolist(), strict=True)),
        low=dict(zip(names, low.tolist(), strict=True)),
        high=dict(zip(names, high.tolist(), strict=True)),
    )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence about the curves, whether it holds for the means, and in how many of the resamples."""

    sentence: str
    holds: bool
    share: float


def claims(
    rows: Sequence[Row], curve: str, others: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> list[Claim]:
    """What figure 8 claims of a curve swept over s_I: both numbers are monotone, and it lies above the other curves.

    Above: whatever the other reaches, the curve reaches with at least the same direction and more image similarity;
    points that keep more and follow less than all of the curve, or the reverse, are another part of the trade-off.
    Samples are resampled for all curves together, so a share near 1 means that a claim does not hang on a few of them.
    Raises ConfigError if the curves were not measured on the same samples.
    """
    lines = _resampled_lines(rows, (curve, *others), resamples, seed)
    steps = np.diff(lines[curve], axis=1)
    found = [
        _claim("image similarity rises with the image guidance", np.all(steps[..., 1] >= 0, axis=1)),
        _claim("direction falls as the image guidance rises", np.all(steps[..., 0] <= 0, axis=1)),
    ]
    for other in others:
        margins = [curve_margin(mine, theirs) for mine, theirs in zip(lines[curve], lines[other], strict=True)]
        above = np.array([margin is not None and margin > 0 for margin in margins])
        found.append(_claim(f"{curve} lies above {other}", above))
    return found


def _claim(sentence: str, holds: np.ndarray) -> Claim:
    """Of the plain means (the first) and the resampled ones."""
    return Claim(sentence=sentence, holds=bool(holds[0]), share=float(holds[1:].mean()))


def _resampled_lines(rows: Sequence[Row], curves: Sequence[str], resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Points (direction, image) of each curve by the swept value, (1 + resamples, points, 2); the plain means first."""
    values: dict[tuple, dict[str, tuple[float, float]]] = {}
    for row in rows:
        if row["curve"] in curves:
            place = (row["curve"], tuple(_setting(row).values()))
            values.setdefault(place, {})[row["sample"]] = (row["sim_direction"], row["sim_image"])
    samples = sorted(next(iter(values.values()), {}))
    if {curve for curve, _ in values} != set(curves) or any(sorted(one) != samples for one in values.values()):
        raise ConfigError(f"{', '.join(curves)} were not measured on the same samples; measure them in one run")
    order = sorted(values)
    table = np.array([[values[place][sample] for place in order] for sample in samples])
    means = bootstrap_means(table.reshape(len(samples), -1), resamples=resamples, seed=seed)
    stacked = np.concatenate([table.mean(axis=0)[None], means.reshape(resamples, *table.shape[1:])])
    return {curve: stacked[:, [n for n, (name, _) in enumerate(order) if name == curve]] for curve in curves}
