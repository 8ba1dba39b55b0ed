"""What is finding the area of an edit worth? Edits with and without it, paired, and the area beside the true change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..edit import EditConfig, InstructPix2Pix
from ..errors import ConfigError
from ..hooks import Hooks
from .recommend import UNTOUCHED, Judge, about_sample, network_of
from .run_folder import FLAG, NUMBER, TEXT, Row, Table, row_key, row_log
from .samples import Sample
from .statistics import bootstrap_means, interval

__all__ = ["area_tables", "measure_areas"]

WHOLE_CHANGE, WHITE = 0.6, 128
JUDGED = {"done": FLAG, "kept": NUMBER}
RESULTS = {"without": JUDGED, "with": JUDGED, "kind": TEXT} | dict.fromkeys(("iou", "covered", "white", "change"), FLAG)


def measure_areas(
    editor: InstructPix2Pix,
    samples: Sequence[Sample],
    judge: Judge,
    config: EditConfig,
    *,
    folder: Path | None = None,
    batch: int = 16,
    hooks: Hooks | None = None,
) -> list[Row]:
    """A row a sample: the judge's verdict without and with ``auto_mask``, and how the area meets the true change.

    ``iou`` and ``covered`` (the part of the change that is white) are of pixels that differ by more than 2 % in some
    channel. In a ``folder`` the rows grow in rows.jsonl, and none is measured twice. Raises ConfigError for samples
    without a target.
    """
    if not samples:
        raise ConfigError("there are no pictures to measure on; give at least one")
    hooks, network = hooks or Hooks(), network_of(editor)
    how = {name: getattr(config, name) for name in ("text_cfg", "image_cfg", "steps", "sampler")}
    rows = [{"network": network, **how, **about_sample(sample)} for sample in samples]
    with row_log(folder, RESULTS) as (known, append):
        missing = [n for n, row in enumerate(rows) if row_key(row) not in known]
        for start in range(0, len(missing), batch):
            places = missing[start : start + batch]
            found = _paired(editor, [samples[n] for n in places], judge, config, hooks)
            append([{**rows[n], **one} for n, one in zip(places, found, strict=True)])
            hooks.progress(len(samples) - len(missing) + start + len(places), len(samples))
        return [known[row_key(row)] for row in rows]


def area_tables(rows: Sequence[Row]) -> list[Table]:
    """By kind, and for edits that change most of the picture and those that do not: area, done and kept."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["kind"], []).append(row)
        groups.setdefault("~ most of it changes" if row["change"] > WHOLE_CHANGE else "~ a part changes", []).append(
            row
        )
    groups["~~ all"] = list(rows)
    lines = [(name.lstrip("~ "), *_line(group)) for name, group in sorted(groups.items())]
    columns = "kind|n|IoU|covered %|white %|right without|with|difference|kept dB without|with|difference"
    return [Table(title="The found area, and edits without and with it", columns=columns.split("|"), rows=lines)]


def _paired(
    editor: InstructPix2Pix, samples: Sequence[Sample], judge: Judge, config: EditConfig, hooks: Hooks
) -> list[dict[str, Any]]:
    made = {}
    for name, auto in (("without", False), ("with", True)):
        given: Any = {"config": config, "auto_mask": auto, "batch": len(samples)}
        results = editor.edit_each(
            [one.source for one in samples],
            [one.instruction for one in samples],
            seeds=[one.seed for one in samples],
            hooks=Hooks(should_stop=hooks.should_stop),
            **given,
        )
        made[name] = judge(samples, [result.image for result in results])
        areas = [result.area for result in results]
    return [
        {
            **{name: {n: made[name][k][n] for n in ("done", "kept", "nearest")} for name in made},
            **_overlap(sample, area),
            "kind": made["with"][k]["kind"],
        }
        for k, (sample, area) in enumerate(zip(samples, areas, strict=True))
    ]


def _overlap(sample: Sample, area: Image.Image | None) -> dict[str, float]:
    if sample.target is None or area is None:
        raise ConfigError(f"sample {sample.key} has no true result or was not edited; give pairs with instructions")
    source, target = (
        np.asarray(one.resize(area.size), dtype=np.float32) / 255 for one in (sample.source, sample.target)
    )
    changed, white = np.abs(target - source).max(axis=2) > UNTOUCHED, np.asarray(area) >= WHITE
    both, either = float((changed & white).sum()), float((changed | white).sum())
    return {
        "iou": both / max(either, 1.0),
        "covered": both / max(float(changed.sum()), 1.0),
        "white": float(white.mean()),
        "change": float(changed.mean()),
    }


def _line(group: Sequence[Row]) -> tuple[Any, ...]:
    mean = {name: f"{np.mean([row[name] for row in group]):.2f}" for name in ("iou", "covered", "white")}
    done = [(float(row["without"]["done"]), float(row["with"]["done"])) for row in group]
    both = [(row["without"]["kept"], row["with"]["kept"]) for row in group]
    kept = [pair for pair in both if None not in pair]
    percent = [f"{100 * float(mean[name]):.0f}" for name in ("covered", "white")]
    return (len(group), mean["iou"], *percent, *_compared(done, 100), *_compared(kept, 1))


def _compared(pairs: Sequence[tuple[float, float]], factor: float) -> tuple[str, str, str]:
    """(mean without, mean with, their paired difference with its interval)."""
    if not pairs:
        return "", "", ""
    values = factor * np.array(pairs)
    difference = values[:, [1]] - values[:, [0]]
    low, high = interval(bootstrap_means(difference))
    means = [f"{value:.1f}" for value in values.mean(axis=0)]
    return means[0], means[1], f"{difference.mean():+.1f} ({low[0]:+.1f} to {high[0]:+.1f})"
