"""Rows of judged edits as tables: by kind, with the autoencoder's limit; confusions; what else changed; the worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from PIL import Image

from ..evaluate.examples import tiled
from ..evaluate.measure import Row
from ..evaluate.run_folder import Table
from ..evaluate.samples import Sample
from ..strips import strip

__all__ = ["compare", "confusions", "side_effects", "summary", "worst", "worst_sheet"]

SHARES, DECIBELS, COSINES = (
    ("success", "asked", "kept", "clear"),
    ("psnr", "background_psnr"),
    ("sim_direction", "sim_image"),
)


def summary(rows: Sequence[Row], ceilings: Sequence[Row]) -> Table:
    """One row a kind, then all: shares in per cent, PSNR to the truth in dB beside what the autoencoder reaches."""
    kinds = sorted({row["judged"]["kind"] for row in rows})
    limits = {row["sample"]: row for row in ceilings}
    groups = [(kind, [row for row in rows if row["judged"]["kind"] == kind]) for kind in kinds] + [("all", list(rows))]
    return Table(
        title="By kind of edit",
        columns=("kind", "n", *(f"{name} %" for name in SHARES), *(_of_limit(n) for n in DECIBELS), *COSINES),
        rows=[(kind, len(group), *_cells(group, [limits[row["sample"]] for row in group])) for kind, group in groups],
        note="success: the asked attribute is what was asked, every other is what it was, and the picture is clear. "
        "PSNR in dB to the true edit, and in brackets that of the true edit through the autoencoder: the ceiling.",
    )


def _of_limit(name: str) -> str:
    return f"{name.replace('_', ' ')} (ceiling)"


def _cells(group: Sequence[Row], limits: Sequence[Row]) -> list[str]:
    shares = [f"{100 * _mean(group, name):.1f}" for name in SHARES]
    decibels = [f"{_mean(group, name):.2f} ({_mean(limits, name):.2f})" for name in DECIBELS]
    return [*shares, *decibels, *(f"{fmean(row[name] for row in group):.3f}" for name in COSINES)]


def _mean(rows: Sequence[Row], name: str) -> float:
    return fmean(float(row["judged"][name]) for row in rows)


def confusions(rows: Sequence[Row]) -> list[Table]:
    """Of each attribute a table of counts: what was asked for (down) and what the judge read (across)."""
    judged = [row["judged"] for row in rows]
    return [_confusion(name, [one for one in judged if one["attribute"] == name]) for name in _attributes(judged)]


def _attributes(judged: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({one["attribute"] for one in judged})


def _confusion(attribute: str, judged: Sequence[dict[str, Any]]) -> Table:
    counts = Counter((one["wanted"], one["read"]) for one in judged)
    wanted, read = sorted({w for w, _ in counts}), sorted({value for pair in counts for value in pair})
    return Table(
        title=f"Asked {attribute} (down) against read {attribute} (across)",
        columns=("asked", *read),
        rows=[(w, *(counts[w, r] or "" for r in read)) for w in wanted],
    )


def side_effects(rows: Sequence[Row]) -> Table:
    """How often an edit of each kind changed what it should have kept, by attribute."""
    judged = [row["judged"] for row in rows]
    kinds = Counter(one["kind"] for one in judged)
    counts = Counter((one["kind"], name) for one in judged for name in one["changed"])
    names = sorted({name for _, name in counts})
    return Table(
        title="What else changed",
        columns=("kind", "n", *names),
        rows=[(kind, kinds[kind], *(counts[kind, name] or "" for name in names)) for kind in sorted(kinds)],
        note="Edits in which the judge reads another value of an attribute that nobody asked to change.",
    )


def compare(groups: Mapping[str, Sequence[Row]]) -> Table:
    """Several ways to choose the settings, on the same samples."""
    columns = (*SHARES, *DECIBELS)
    return Table(
        title="Ways to choose the guidance",
        columns=("settings", "n", *columns, *COSINES),
        rows=[(name, len(rows), *_plain_cells(rows)) for name, rows in groups.items()],
    )


def _plain_cells(rows: Sequence[Row]) -> list[str]:
    shares = [f"{100 * _mean(rows, name):.1f} %" for name in SHARES]
    decibels = [f"{_mean(rows, name):.2f} dB" for name in DECIBELS]
    return [*shares, *decibels, *(f"{fmean(row[name] for row in rows):.3f}" for name in COSINES)]


def worst(rows: Sequence[Row], count: int) -> list[Row]:
    """Failures first, and those farthest from the truth first."""
    return sorted(rows, key=lambda row: (row["judged"]["success"], row["judged"]["psnr"]))[:count]


def worst_sheet(
    samples: Sequence[Sample], pictures: Sequence[Image.Image], rows: Sequence[Row], *, columns: int = 3
) -> Image.Image:
    """Before, after and truth of some samples, with what was asked and what the judge read."""
    return tiled([_cell(*one) for one in zip(samples, pictures, rows, strict=True)], columns)


def _cell(sample: Sample, picture: Image.Image, row: Row) -> Image.Image:
    judged = row["judged"]
    read = "right" if judged["success"] else f"{judged['attribute']}: {judged['read']}, not {judged['wanted']}"
    if judged["asked"] and judged["changed"]:
        read = f"also changed: {', '.join(judged['changed'])}"
    elif judged["asked"] and not judged["clear"]:
        read = "not clear"
    truth = sample.target or sample.source
    return strip([sample.source, picture, truth], [sample.instruction, read, "truth"], height=128)
