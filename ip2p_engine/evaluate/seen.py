"""Which data a checkpoint was trained on, as far as its file says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoint.report import report_card
from ..data.reading import Pairs, name_of_pairs, store_identity
from ..data.store import PairStore
from ..files import digest_of_text
from .run_folder import Table

__all__ = ["seen_table"]

OWN = {"embedded": "scenes", "embedded-sd": "scenes", "embedded-photos": "free photographs (docs/photos.md)"}


def seen_table(
    checkpoints: Sequence[tuple[str, str]],
    measured: Pairs | None = None,
    *,
    weights: str = "ema",
    held_out: bool = False,
) -> Table:
    """What the checkpoints, (name, source), were trained on, and whether the ``measured`` data were among it.

    ``held_out``: only the pairs that are held out were measured. Raises CheckpointError for a source that is none.
    """
    digests = None if measured is None else (digest_of_text(_identity(measured)), name_of_pairs(measured))
    rows = []
    for name, source in checkpoints:
        training = report_card(source, weights=weights).training
        steps = training.get("step", training.get("global_step", ""))
        unknown = OWN.get(source, "its file does not say")
        told = (training.get("data", unknown), steps, ", ".join(training.get("licences", ())))
        rows.append((name, *told, _overlap(training, digests, held_out)))
    columns = ("checkpoint", "trained on", "steps", "licences", "what is measured here")
    return Table(title="What the checkpoints have seen", columns=columns, rows=rows)


def _identity(pairs: Pairs) -> str:
    return store_identity(pairs) if isinstance(pairs, PairStore) else pairs.identity


def _overlap(training: dict[str, Any], digests: tuple[str, str] | None, alone: bool) -> str:
    """Whether the data, by the digests of these rows and of their set, are the same or among several sets."""
    if digests is None or "data_digest" not in training:
        return ""
    rows, name = digests
    same, held_out = training["data_digest"] == rows, training.get("held_out", 0)
    if not same and name not in (training.get("data_sets") or ()):
        return "other data, or another part or form of the same"
    if held_out and alone:
        return f"the pairs that were held out of {'the same data' if same else 'its data'}"
    if held_out:
        return f"{'the same data' if same else 'among its data'}; {held_out} pairs were held out"
    return "the same data: it has seen these pairs" if same else "among its data: it has seen these pairs, or some"
