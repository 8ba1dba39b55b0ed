"""Which data a checkpoint was trained on, as far as its file says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoint.report import report_card
from ..checkpoint.source import EMBEDDED
from ..data.reading import Pairs, store_identity
from ..data.store import PairStore
from ..files import digest_of_text
from .run_folder import Table

__all__ = ["seen_table"]


def seen_table(checkpoints: Sequence[tuple[str, str]], measured: Pairs | None = None, *, weights: str = "ema") -> Table:
    """What the checkpoints, (name, source), were trained on, and whether the ``measured`` data were among it.

    Raises CheckpointError for a source that is none.
    """
    digest = None if measured is None else digest_of_text(_identity(measured))
    rows = []
    for name, source in checkpoints:
        training = report_card(source, weights=weights).training
        steps = training.get("step", training.get("global_step", ""))
        unknown = "scenes" if source in EMBEDDED else "its file does not say"
        told = (training.get("data", unknown), steps, ", ".join(training.get("licences", ())))
        rows.append((name, *told, _overlap(training, digest)))
    columns = ("checkpoint", "trained on", "steps", "licences", "what is measured here")
    return Table(title="What the checkpoints have seen", columns=columns, rows=rows)


def _identity(pairs: Pairs) -> str:
    return store_identity(pairs) if isinstance(pairs, PairStore) else pairs.identity


def _overlap(training: dict[str, Any], digest: str | None) -> str:
    """Whether the data are the same; other rows or another form of the same data cannot be told from others."""
    if digest is None or "data_digest" not in training:
        return ""
    if training["data_digest"] != digest:
        return "other data, or another part or form of the same"
    held_out = training.get("held_out", 0)
    return f"the same data; {held_out} pairs were held out" if held_out else "the same data: it has seen these pairs"
