"""Rows of a sweep, finished: the plot, the tables, and what can be claimed of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..images import save_image
from .curve import CURVE_NUMBERS, Claim, Point, curve_points
from .measure import Row
from .plot import save_plot
from .run_folder import Table, save_run

__all__ = ["points_table", "save_trade_off"]


def save_trade_off(
    folder: Path,
    rows: Sequence[Row],
    *,
    kind: str,
    title: str,
    settings: Mapping[str, Any],
    claims: Sequence[Claim] = (),
    examples: Image.Image | None = None,
    closer: Sequence[str] = (),
    resamples: int = 1000,
) -> list[Point]:
    """Write curve.png, curve.svg, examples.png and run.json of some rows; returns the points.

    The curves named by ``closer`` also get a plot of their own: beside others a short one is a dot.
    """
    points = curve_points(rows, resamples=resamples)
    save_plot(points, folder / "curve", title=title)
    tables = [points_table(points, resamples)]
    if claims:
        tables.append(_claims_table(claims))
    pictures = {"curve.png": title}
    if closer:
        save_plot([point for point in points if point.curve in closer], folder / "closer", title=f"{title}, closer")
        pictures["closer.png"] = "The edits alone"
    if examples is not None:
        save_image(examples, folder / "examples.png")
        pictures["examples.png"] = "Some samples at every setting"
    save_run(
        folder,
        kind,
        settings={**settings, "resamples": resamples},
        tables=tables,
        pictures=pictures,
        figures={"points": [vars(point) for point in points]},
    )
    return points


def points_table(points: Sequence[Point], resamples: int = 1000) -> Table:
    """The points in words: one row each, means with their intervals."""
    names = [*CURVE_NUMBERS, *dict.fromkeys(n for p in points for n in p.means if n not in CURVE_NUMBERS)]
    return Table(
        title="Means over the samples",
        columns=("curve", "setting", "n", *names),
        rows=[(point.curve, _words(point.setting), point.count, *_cells(point, names)) for point in points],
        note=f"In brackets the 95 % interval of the bootstrap over samples, {resamples} resamples.",
    )


def _cells(point: Point, names: Sequence[str]) -> list[str]:
    return [
        f"{point.means[name]:.3f} [{point.low[name]:.3f}, {point.high[name]:.3f}]" if name in point.means else "-"
        for name in names
    ]


def _words(setting: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def _claims_table(claims: Sequence[Claim]) -> Table:
    return Table(
        title="What the curve shows",
        columns=("claim", "of the means", "share of resamples"),
        rows=[(one.sentence, "yes" if one.holds else "no", f"{one.share:.3f}") for one in claims],
    )
