"""The paper's figures 8 and 10: points with their confidence intervals from rows of ``measure``."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ConfigError
from ..plots import DPI, new_figure, save_figure
from .measure import Row
from .statistics import bootstrap_means, curve_margin, interval

__all__ = [
    "CURVE_NUMBERS",
    "Claim",
    "Point",
    "claims",
    "curve_points",
    "save_plot",
    "trade_off_plot",
]

LABELS = {"text_cfg": "$s_T$", "image_cfg": "$s_I$", "strength": "strength"}
AXES = ("sim_direction", "sim_image")
COLOURS = ("#1b4f9c", "#d1495b", "#edae49", "#3c8d53", "#7b4b94", "#00798c", "#8d6a4f", "#444444")
MARKERS = "osD^vPX*"
WIDTH, HEIGHT = 7.2, 5.2
LABEL_ROOM = 40
"""Points (1/72 inch) between the ends of a curve, below which their labels would lie on each other."""
SIDES = ((5, 5), (-5, 5), (5, -5), (-5, -5))
"""Where a label may stand beside its point, in points."""
CURVE_NUMBERS = ("sim_direction", "sim_image", "sim_1", "sim_0")
SWEPT = ("text_cfg", "image_cfg", "strength")
RISES = "image similarity rises with the image guidance"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A setting's means over the samples, and their intervals, by the names of the numbers."""

    curve: str
    setting: dict[str, float]
    count: int
    means: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    directed: int | None = None
    """How many of the samples have captions that differ, and so a direction; None means all."""


def curve_points(rows: Iterable[Row], *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> list[Point]:
    """One point a curve and setting, in the order of the rows; intervals by the bootstrap over samples."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["curve"], *_setting(row).items()), []).append(row)
    return [_point(group, resamples, level, seed) for group in groups.values()]


def _setting(row: Row) -> dict[str, float]:
    return {name: row[name] for name in SWEPT if name in row}


def _numbers(row: Row) -> dict[str, float | None]:
    judged = {name: float(value) for name, value in row.get("judged", {}).items() if isinstance(value, float | bool)}
    return {**{name: row[name] for name in CURVE_NUMBERS}, "sim_direction": _direction(row), **judged}


def _direction(row: Row) -> float | None:
    """None where the captions say no change; rows of 0.1 have a number there."""
    texts = [(row.get(name) or "").strip() for name in ("caption", "edited_caption")]
    return None if "caption" in row and texts[0] == texts[1] else row["sim_direction"]


def _point(group: Sequence[Row], resamples: int, level: float, seed: int) -> Point:
    """The means of what the samples have; a number that some lack is resampled over those that have it."""
    numbers = [_numbers(row) for row in group]
    names = [name for name in numbers[0] if any(one[name] is not None for one in numbers)]
    means: dict[str, float] = {}
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    for some in _together(numbers, names):
        values = np.array([[one[name] for name in some] for one in numbers if one[some[0]] is not None])
        low, high = interval(bootstrap_means(values, resamples=resamples, seed=seed), level)
        means |= dict(zip(some, values.mean(axis=0).tolist(), strict=True))
        lows |= dict(zip(some, low.tolist(), strict=True))
        highs |= dict(zip(some, high.tolist(), strict=True))
    directed = sum(one["sim_direction"] is not None for one in numbers)
    return Point(
        curve=group[0]["curve"],
        setting=_setting(group[0]),
        count=len(group),
        means={name: means[name] for name in names},
        low={name: lows[name] for name in names},
        high={name: highs[name] for name in names},
        directed=None if directed == len(group) else directed,
    )


def _together(numbers: Sequence[dict[str, float | None]], names: Sequence[str]) -> list[list[str]]:
    """Names of numbers that the same samples have."""
    groups: dict[tuple[bool, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(one[name] is not None for one in numbers), []).append(name)
    return list(groups.values())


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
    Samples without a direction are left out; where none has one, image similarity is all that is claimed of.
    Raises ConfigError if the curves were not measured on the same samples.
    """
    directed = [row for row in rows if _direction(row) is not None]
    if not directed:
        bare = _resampled_lines([{**row, "sim_direction": 0.0} for row in rows], (curve,), resamples, seed)
        return [_claim(RISES, np.all(np.diff(bare[curve], axis=1)[..., 1] >= 0, axis=1))]
    lines = _resampled_lines(directed, (curve, *others), resamples, seed)
    steps = np.diff(lines[curve], axis=1)
    found = [
        _claim(RISES, np.all(steps[..., 1] >= 0, axis=1)),
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


def trade_off_plot(points: Sequence[Point], *, title: str = "", level: float = 0.95) -> Image.Image:
    """The plot as an RGB picture. Raises ConfigError without points, or without matplotlib."""
    with io.BytesIO() as stream:
        _figure(points, title, level).savefig(stream, format="png", dpi=DPI)
        return Image.open(stream).convert("RGB")


def save_plot(points: Sequence[Point], stem: Path, *, title: str = "", level: float = 0.95) -> list[Path]:
    """Write stem.png and stem.svg; returns both. Raises as ``trade_off_plot``, and ConfigError for the path."""
    figure = _figure(points, title, level)
    written = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    for path in written:
        save_figure(figure, path)
    return written


def _figure(points: Sequence[Point], title: str, level: float) -> Any:
    if not points:
        raise ConfigError("no points to plot; measure at least one setting")
    points = [point for point in points if "sim_direction" in point.means]
    if not points:
        raise ConfigError("no sample has two captions that differ, so there is no direction to plot; give captions")
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.add_subplot()
    lines = _lines(points)
    for number, line in enumerate(lines.values()):
        _draw(axes, line, number)
    axes.set_xlabel("directional similarity: the change fits the change of caption →")
    axes.set_ylabel("image similarity: the picture is kept →")
    axes.set_title(title or " ", parse_math=False)
    axes.grid(alpha=0.25)
    # Names are written in afterwards: matplotlib leaves out labels that begin with _, and reads mathematics into $.
    legend = axes.legend(frameon=False, fontsize=9)
    for text, name in zip(legend.get_texts(), lines, strict=True):
        text.set(text=name, parse_math=False)
    count = points[0].count
    figure.supxlabel(f"CLIP cosines; means of {count} edits, {level:.0%} bootstrap intervals", fontsize=8, color="0.4")
    figure.draw_without_rendering()  # settles where everything lies
    _label_lines(axes, list(lines.values()))
    return figure


def _lines(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points that one line joins, by its name: a curve's, or of a grid those of one s_T."""
    lines: dict[str, list[Point]] = {}
    for point in points:
        name = point.curve
        swept = [{p.setting.get(value) for p in points if p.curve == name} for value in ("text_cfg", "image_cfg")]
        if all(len(values) > 1 for values in swept):
            name += f", s_T {point.setting['text_cfg']:g}"
        lines.setdefault(name, []).append(point)
    return lines


def _draw(axes: Any, points: Sequence[Point], number: int) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    x, y = ([point.means[name] for point in points] for name in AXES)
    spread = [
        [[p.means[name] - p.low[name] for p in points], [p.high[name] - p.means[name] for p in points]] for name in AXES
    ]
    line = "-" if len(points) > 1 else "none"
    axes.errorbar(
        x, y, xerr=spread[0], yerr=spread[1], color=colour, marker=marker, markersize=5, linestyle=line,
        linewidth=1.4, elinewidth=0.7, label=f"{number}",
    )  # fmt: skip


def _label_lines(axes: Any, lines: Sequence[Sequence[Point]]) -> None:
    marks = axes.transData.transform([_place(point) for line in lines for point in line])
    coloured = [(line, COLOURS[number % len(COLOURS)]) for number, line in enumerate(lines)]
    _write(axes, [(*label, colour) for line, colour in coloured for label in _label_ends(axes, line).items()], marks)


def _label_ends(axes: Any, points: Sequence[Point]) -> dict[tuple[float, ...], str]:
    """The swept value at both ends of a line, by their places; where these are close, one label for the range."""
    texts = [point_label(point, points) for point in points]
    if not texts[0]:
        return {}
    places = [_place(point) for point in points]
    first, last = axes.transData.transform([places[0], places[-1]])
    if hypot(*(last - first)) * 72 / axes.figure.dpi < LABEL_ROOM:
        return {places[-1]: f"{texts[0]} to {texts[-1]}"}
    return {places[0]: texts[0], places[-1]: texts[-1]}


def _write(axes: Any, labels: Sequence[tuple[tuple[float, ...], str, str]], marks: Any) -> None:
    """Each label (place, text, colour) on the side of its point where it covers the fewest marks and other labels."""
    inside = axes.get_window_extent()
    taken: list[Any] = []
    backing = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    for place, text, colour in labels:
        note = axes.annotate(
            text, place, xytext=SIDES[0], textcoords="offset points", fontsize=7, color=colour, bbox=backing
        )
        tried = []
        for n, side in enumerate(SIDES):
            box = _stand(note, side)
            outside = box.x0 < inside.x0 or box.x1 > inside.x1
            tried.append((100 * outside + 10 * box.count_overlaps(taken) + box.count_contains(marks), n))
        taken.append(_stand(note, SIDES[min(tried)[1]]))


def _stand(note: Any, side: tuple[int, int]) -> Any:
    """Put a label on a side of its point; returns the box that it covers."""
    note.set(position=side, ha="left" if side[0] > 0 else "right", va="bottom" if side[1] > 0 else "top")
    return note.get_window_extent()


def _place(point: Point) -> tuple[float, ...]:
    return tuple(point.means[name] for name in AXES)


def point_label(point: Point, points: Sequence[Point]) -> str:
    """The values in which the points of a curve differ."""
    swept = [name for name in point.setting if len({other.setting[name] for other in points}) > 1]
    return " ".join(f"{LABELS[name]} {point.setting[name]:g}" for name in swept)
