"""What is guidance worth? s_T x s_I x steps on the photo world, each setting paired with c alone at the same steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..edit import EditConfig, InstructPix2Pix
from ..evaluate.statistics import bootstrap_means, interval
from .exam import Examination, examine
from .world import KINDS, PhotoEdit

__all__ = ["Study", "run_study", "study_table"]

ALONE = (1.0, 1.0)
"""s_T = s_I = 1: the branch c alone, one evaluation a step."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The grid: every pair of scales with every number of steps; c alone is always among them."""

    text_cfg: tuple[float, ...] = (1.0, 2.0, 4.0, 7.5)
    image_cfg: tuple[float, ...] = (1.0, 1.2, 1.5, 2.0)
    steps: tuple[int, ...] = (2, 4, 10, 20)
    sampler: str = "euler_ancestral"

    def settings(self) -> Iterator[tuple[float, float, int]]:
        pairs = dict.fromkeys([ALONE, *product(self.text_cfg, self.image_cfg)])
        yield from ((text, image, steps) for steps in self.steps for text, image in pairs)


def run_study(editor: InstructPix2Pix, edits: Sequence[PhotoEdit], study: Study, log: Path) -> list[dict[str, Any]]:
    """A row a setting, appended to ``log`` (JSON lines) as soon as it is measured; settings there are not run again.

    The log belongs to one checkpoint and one list of edits.
    """
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    done = {(row["text_cfg"], row["image_cfg"], row["steps"]) for row in rows}
    for text, image, steps in study.settings():
        if (text, image, steps) in done:
            continue
        config = EditConfig(text_cfg=text, image_cfg=image, steps=steps, sampler=study.sampler)
        rows.append(
            {"text_cfg": text, "image_cfg": image, "steps": steps, **_measured(examine(editor, edits, config=config))}
        )
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    return rows


def study_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: done and kept with the 95 % interval of their difference to c alone at the same steps."""
    lines = ["| steps | s_T / s_I | done % | against c alone | kept dB | against c alone | nearest dB |"]
    lines.append("|---|---|---|---|---|---|---|")
    alone = {row["steps"]: row for row in rows if (row["text_cfg"], row["image_cfg"]) == ALONE}
    for row in sorted(rows, key=lambda row: (row["steps"], row["text_cfg"], row["image_cfg"])):
        done, kept = (_difference(row, alone[row["steps"]], name) for name in ("done", "kept"))
        lines.append(
            f"| {row['steps']} | {row['text_cfg']:g} / {row['image_cfg']:g} | {100 * _mean(row, 'done'):.1f} "
            f"| {_shown(done, 100)} | {_mean(row, 'kept'):.1f} | {_shown(kept, 1)} | {_mean(row, 'nearest'):.1f} |"
        )
    return "\n".join(lines)


def _measured(examination: Examination) -> dict[str, Any]:
    """Numbers of each edit, in the edits' order, so that settings can be paired."""
    return {
        "kind": [KINDS.index(edit.kind) for edit in examination.edits],
        "done": [float(verdict.done) for verdict in examination.verdicts],
        "kept": [verdict.kept for verdict in examination.verdicts],
        "nearest": [verdict.nearest for verdict in examination.verdicts],
        "seconds": examination.seconds_per_edit,
    }


def _mean(row: dict[str, Any], name: str) -> float:
    values = [value for value in row[name] if value is not None]
    return float(np.mean(values)) if values else float("nan")


def _difference(row: dict[str, Any], other: dict[str, Any], name: str) -> tuple[float, float, float]:
    """Mean of the paired differences, and its interval; not numbers where nothing can be paired."""
    pairs = [(a, b) for a, b in zip(row[name], other[name], strict=True) if a is not None and b is not None]
    if not pairs:
        return (float("nan"),) * 3
    values = np.array([[a - b] for a, b in pairs])
    low, high = interval(bootstrap_means(values))
    return float(values.mean()), float(low[0]), float(high[0])


def _shown(difference: tuple[float, float, float], factor: float) -> str:
    mean, low, high = (factor * value for value in difference)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
