"""The paper's figures 8 and 10: points with their confidence intervals from rows of ``measure``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError
from .measure import Row
from .statistics import bootstrap_means, curve_margin, interval

__all__ = ["CURVE_NUMBERS", "IMAGE_CFGS", "STRENGTHS", "Claim", "Point", "claims", "curve_points", "table"]

IMAGE_CFGS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
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

    Samples are resampled for all curves together, so a share near 1 means that the claim does not hang on a few of
    them. Raises ConfigError if the curves were not measured on the same samples.
    """
    means, columns = _resampled(rows, resamples, seed)
    found = [
        _claim("image similarity rises with the image guidance", means, _monotone(columns, curve, "sim_image", 1)),
        _claim("direction falls with the image guidance", means, _monotone(columns, curve, "sim_direction", -1)),
    ]
    return found + [_claim(f"{curve} lies above {other}", means, _above(columns, curve, other)) for other in others]


def _resampled(rows: Sequence[Row], resamples: int, seed: int) -> tuple[np.ndarray, dict[tuple, int]]:
    """((1 + resamples, columns) means, the plain ones first; the column of each (curve, setting, number))."""
    values: dict[tuple, dict[str, float]] = {}
    for row in rows:
        for name in ("sim_direction", "sim_image"):
            values.setdefault((row["curve"], tuple(_setting(row).items()), name), {})[row["sample"]] = row[name]
    samples = sorted(next(iter(values.values())))
    if any(sorted(column) != samples for column in values.values()):
        raise ConfigError("the curves were measured on different samples; measure all of them in one run")
    table = np.array([[column[key] for column in values.values()] for key in samples])
    means = np.concatenate([table.mean(axis=0)[None], bootstrap_means(table, resamples=resamples, seed=seed)])
    return means, {key: n for n, key in enumerate(values)}


def _claim(sentence: str, means: np.ndarray, test: Any) -> Claim:
    results = [bool(test(row)) for row in means]
    return Claim(sentence=sentence, holds=results[0], share=sum(results[1:]) / max(1, len(results) - 1))


def _monotone(columns: dict[tuple, int], curve: str, number: str, sign: int) -> Any:
    chosen = sorted(
        (dict(setting).get("image_cfg", 0.0), n) for (c, setting, k), n in columns.items() if (c, k) == (curve, number)
    )
    order = [n for _, n in chosen]
    return lambda row: (np.diff(row[order]) * sign >= 0).all()


def _above(columns: dict[tuple, int], curve: str, other: str) -> Any:
    """At equal direction, more image similarity."""

    def points(row: np.ndarray, name: str) -> list[tuple[float, float]]:
        settings = [setting for c, setting, k in columns if (c, k) == (name, "sim_image")]
        return [(row[columns[name, s, "sim_direction"]], row[columns[name, s, "sim_image"]]) for s in settings]

    def test(row: np.ndarray) -> bool:
        margin = curve_margin(points(row, curve), points(row, other))
        return margin is not None and margin > 0

    return test


def table(points: Sequence[Point]) -> str:
    """The points in words: one row each, means with half the width of the interval."""
    extra = [name for name in points[0].means if name not in CURVE_NUMBERS] if points else []
    names = [*CURVE_NUMBERS, *extra]
    lines = [f"{'curve':28}{'setting':>24}{'n':>6}" + "".join(f"{name:>17}" for name in names)]
    for point in points:
        setting = " ".join(f"{name} {value:g}" for name, value in point.setting.items())
        numbers = "".join(f"{_with_interval(point, name):>17}" for name in names)
        lines.append(f"{point.curve:28}{setting:>24}{point.count:>6}{numbers}")
    return "\n".join(lines)


def _with_interval(point: Point, name: str) -> str:
    if name not in point.means:
        return "-"
    return f"{point.means[name]:.3f} ±{(point.high[name] - point.low[name]) / 2:.3f}"
