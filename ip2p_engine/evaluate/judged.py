"""What a judge's scores amount to: ranks, means and intervals of checkpoints, and how far its votes agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..errors import DatasetError
from ..files import json_lines
from .judge import Judgement
from .rubrics import Rubric
from .run_folder import ROWS, Row, Table
from .statistics import agreement, bootstrap_means, interval

__all__ = ["judged_rows", "judgement_tables", "rows_by_others"]

WHO = ("rubric", "version", "prompts", "model")
"""What makes scores compare."""
APART = "By other prompts or another judge, so they do not compare"


def judged_rows(judgement: Judgement) -> list[Row]:
    """One row an edit: who judged, the marks (None without a whole vote), and how many votes they are the mean of."""
    rubric = judgement.rubric
    who = dict(zip(WHO, (rubric.name, rubric.version, rubric.prompts, judgement.model), strict=True))
    found = []
    for verdict in judgement.verdicts:
        edit = verdict.edit
        marks = verdict.marks(rubric) or dict.fromkeys(rubric.names)
        about = {"checkpoint": edit.label, "edited": edit.name, "instruction": edit.instruction, "kind": edit.kind}
        votes = {"votes": len(verdict.votes), "rejected": list(verdict.rejected)}
        found.append({**about, **who, **marks, **votes, "reasoning": verdict.reasons[0] if verdict.reasons else ""})
    return found


def rows_by_others(folder: Path, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of a folder by the same rubric that another judge, or other prompts, scored: by checkpoint and judge."""
    if not (folder / ROWS).exists():
        return {}
    me = _who(rows[0])
    old = [row for row in json_lines(folder / ROWS, DatasetError) if row.get("rubric") == rows[0]["rubric"]]
    found: dict[str, list[Row]] = {}
    for row in old:
        if _who(row) != me:
            name = f"{row['checkpoint']}, by {row['model']}, prompts {row['version']} ({row['prompts']})"
            found.setdefault(name, []).append(row)
    return found


def _who(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in WHO)


def judgement_tables(judgement: Judgement, rows: Sequence[Row], others: Mapping[str, Sequence[Row]]) -> list[Table]:
    """Checkpoints by rank, then by kind of edit, then the votes' agreement.

    A mean is, as in both benchmarks, that of the means of the kinds. ``others`` are rows by another judge or other
    prompts; they and the published marks stand below a line. Raises DatasetError where no edit has a mark.
    """
    rubric = judgement.rubric
    scored = _by_label(rows)
    if not scored:
        first = next((v for v in judgement.verdicts if v.rejected), None)
        raise DatasetError(
            f"no edit has a score; the judge's answers were {', '.join(first.rejected) if first else ''}"
        )
    order = sorted(scored, key=lambda label: (-(_mean(scored[label], "overall") or 0.0), label))
    columns = ("checkpoint", "rank", "n", *rubric.names, "95 %", "above the next")
    means = [_mean(scored[label], "overall") for label in order]
    lines = [
        (label, 1 + means.index(means[n]), *_numbers(scored[label], rubric), _interval(scored[label]))
        + (_above(scored, order, n + 1),)
        for n, label in enumerate(order)
    ]
    below = [(label, "", *_numbers(known, rubric), "", "") for label, known in others.items() if known]
    blank = [""] * (len(rubric.names) - 1)
    below += [(name, "", "", *blank, f"{mark:.2f}", "", "") for name, mark in rubric.published.items()]
    made = f"{judgement.model}, prompts {rubric.version} ({rubric.prompts})"
    main = Table(
        title=f"{rubric.title} by {made}",
        columns=columns,
        rows=lines,
        note=_note(judgement),
        apart=f"{APART}; without n: published, by {rubric.published_by}",
        rows_apart=below,
    )
    return [main, *_kinds(scored, order, rubric), *_agreement(judgement)]


def _by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("overall") is not None:
            found.setdefault(row["checkpoint"], []).append(row)
    return found


def _by_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.get("kind") or ""):
        found.setdefault(row.get("kind") or "", []).append(row)
    return found


def _mean(rows: Sequence[Row], name: str) -> float | None:
    kinds = [[row[name] for row in some if row.get(name) is not None] for some in _by_kind(rows).values()]
    return fmean(fmean(values) for values in kinds if values) if any(kinds) else None


def _numbers(rows: Sequence[Row], rubric: Rubric) -> list[Any]:
    means = [_mean(rows, name) for name in rubric.names]
    return [len(rows), *("" if mean is None else f"{mean:.2f}" for mean in means)]


def _resampled(rows: Sequence[Row], name: str = "overall") -> np.ndarray:
    """Means of 1,000 resamples of the edits, drawn within each kind, (1000,)."""
    kinds = enumerate(_by_kind(rows).values())
    return np.mean([bootstrap_means(np.array([[row[name]] for row in some]), seed=n) for n, some in kinds], axis=0)[
        :, 0
    ]


def _interval(rows: Sequence[Row]) -> str:
    low, high = interval(_resampled(rows)[:, None])
    return f"{low[0]:.2f} to {high[0]:.2f}"


def _above(scored: Mapping[str, Sequence[Row]], order: Sequence[str], rank: int) -> str:
    """In which share of the resamples of the edits that both have a checkpoint lies above the next."""
    if rank == len(order):
        return ""
    mine, theirs = ({row["edited"]: row for row in scored[label]} for label in order[rank - 1 : rank + 1])
    both = [
        {**mine[name], "overall": mine[name]["overall"] - theirs[name]["overall"]} for name in mine if name in theirs
    ]
    return f"{float((_resampled(both) > 0).mean()):.1%}" if both else ""


def _note(judgement: Judgement) -> str:
    """What was left out, and why."""
    if not judgement.rejected:
        return ""
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(judgement.rejected.items()))
    lost = sum(not verdict.votes for verdict in judgement.verdicts)
    return f"Answers that could not be used: {counts}; {lost} edits have no score and are left out."


def _kinds(scored: Mapping[str, Sequence[Row]], order: Sequence[str], rubric: Rubric) -> list[Table]:
    kinds = {label: _by_kind(scored[label]) for label in order}
    if len({kind for some in kinds.values() for kind in some}) < 2:
        return []
    lines = [(label, kind, *_numbers(some, rubric)) for label in order for kind, some in kinds[label].items()]
    return [Table(title=f"{rubric.title}, by kind", columns=("checkpoint", "kind", "n", *rubric.names), rows=lines)]


def _agreement(judgement: Judgement) -> list[Table]:
    """Of the votes, criterion by criterion."""
    rubric, verdicts = judgement.rubric, judgement.verdicts
    if all(len(verdict.votes) < 2 for verdict in verdicts):
        return []
    lines = []
    for part in rubric.parts(None, ""):
        for place, criterion in enumerate(part.criteria):
            units = [[vote[part.name][place] for vote in verdict.votes] for verdict in verdicts]
            lines.append((criterion, sum(len(unit) > 1 for unit in units), *_agreed(units)))
    overall = [[rubric.marks(vote)["overall"] for vote in verdict.votes] for verdict in verdicts]
    lines.append(("overall", sum(len(unit) > 1 for unit in overall), *_agreed(overall)))
    columns = ("of", "n", "Krippendorff's alpha", "all votes equal")
    return [Table(title="Agreement of the votes", columns=columns, rows=lines)]


def _agreed(units: Sequence[Sequence[float]]) -> tuple[str, str]:
    alpha, equal = agreement(units)
    return "" if alpha is None else f"{alpha:.3f}", "" if equal is None else f"{equal:.1%}"
