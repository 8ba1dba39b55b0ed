"""Rows of a sweep, finished: the plot, the tables, and what can be claimed of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.reading import Pairs, open_pairs
from ..errors import ConfigError, DatasetError
from ..hooks import Hooks
from ..images import save_image
from ..train import TrainConfig, train
from ..train.sources import Chosen, open_source
from .curve import CURVE_NUMBERS, Claim, Point, curve_points, save_plot
from .measure import Row
from .run_folder import Table, save_run
from .samples import in_test_split

__all__ = [
    "Arm",
    "make_arms",
    "points_table",
    "save_trade_off",
    "subset",
    "train_arm",
]


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
    more: Sequence[Table] = (),
    resamples: int = 1000,
) -> list[Point]:
    """Write curve.png, curve.svg, examples.png and run.json of some rows; returns the points.

    The curves named by ``closer`` also get a plot of their own: beside others a short one is a dot. Where no sample has
    a direction there is nothing to plot.
    """
    points = curve_points(rows, resamples=resamples)
    directed = any("sim_direction" in point.means for point in points)
    tables = [points_table(points, resamples), *([_claims_table(claims)] if claims else []), *more]
    pictures = {}
    if directed:
        save_plot(points, folder / "curve", title=title)
        pictures["curve.png"] = title
    if closer and directed:
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
    known = [name for name in CURVE_NUMBERS if any(name in point.means for point in points)]
    names = [*known, *dict.fromkeys(n for p in points for n in p.means if n not in CURVE_NUMBERS)]
    return Table(
        title="Means over the samples",
        columns=("curve", "setting", "n", *names),
        rows=[(point.curve, _words(point.setting), point.count, *_cells(point, names)) for point in points],
        note=f"In brackets the 95 % interval of the bootstrap over samples, {resamples} resamples."
        + _undirected(points),
    )


def _undirected(points: Sequence[Point]) -> str:
    lacking = [point for point in points if point.directed is not None]
    if not lacking:
        return ""
    without = lacking[0].count - (lacking[0].directed or 0)
    return f" {without} of {lacking[0].count} samples have equal captions or none, and so no direction: left out of it."


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


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training of the comparison: its name in the legend and as a folder, and what it is trained on."""

    name: str
    folder: str
    data: Path
    share: float = 1.0


def make_arms(filtered: Path, unfiltered: Path | None, shares: Sequence[float]) -> list[Arm]:
    """An arm a share of the filtered pairs, and one of all unfiltered ones. Raises ConfigError for a share."""
    for share in shares:
        if not 0 < share <= 1:
            raise ConfigError(f"share is {share}; give a part of the pairs, more than 0 up to 1")
    arms = [
        Arm(name=f"{100 * share:g} % of the pairs", folder=f"share-{share:g}", data=filtered, share=share)
        for share in shares
    ]
    return arms + ([Arm(name="without the filter", folder="unfiltered", data=unfiltered)] if unfiltered else [])


def subset(pairs: Pairs, share: float) -> list[int]:
    """Rows of a share of the pairs outside the test split, at least one; a smaller share's are among a larger one's.

    Pairs are ordered by a hash of their key, so the choice does not depend on shards. Raises DatasetError for none.
    """
    columns = pairs.columns("original_prompt", "key")
    rows = [n for n, caption in enumerate(columns["original_prompt"]) if not in_test_split(caption)]
    if not rows:
        raise DatasetError(f"{pairs.folder} has no pairs outside the test split; make more")
    keys = columns["key"]
    rows.sort(key=lambda n: hashlib.sha256(f"{keys[n] or n}".encode()).digest())
    return sorted(rows[: max(1, round(share * len(rows)))])


def train_arm(
    arm: Arm,
    config: TrainConfig,
    base: str,
    folder: Path,
    *,
    device: str | None = None,
    hooks: Hooks | None = None,
) -> Path | None:
    """Train one arm, or go on where it stopped; returns its averaged checkpoint, None if it was asked to stop."""
    rows = subset(open_pairs(arm.data), arm.share)
    config = replace(config, hold_out_test=False)  # subset leaves it out
    result = train(
        config,
        data=Chosen(open_source(arm.data, config), rows),
        base=base,
        out=folder / arm.folder,
        device=device,
        hooks=hooks,
    )
    return result.files["ema"] if result.finished else None
