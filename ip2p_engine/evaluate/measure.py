"""The one loop of every evaluation: methods x settings x samples -> rows with the four CLIP numbers, resumable."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..clip_similarity import ClipSimilarity, PairScores, pair_scores
from ..errors import ConfigError, DatasetError
from ..files import AppendLog, disk_errors, locked
from .methods import Made, Method, Setting, fingerprint
from .samples import Sample, batches

__all__ = ["ROWS", "Judge", "Row", "measure"]

ROWS = "rows.jsonl"
RESULTS = (*(field.name for field in fields(PairScores)), "judged")
Row = dict[str, Any]
Judge = Callable[[Sequence[Sample], Sequence[Image.Image]], list[dict[str, Any]]]
OnProgress = Callable[[int, int], None]


def measure(
    samples: Sequence[Sample],
    methods: Sequence[Method],
    clip: ClipSimilarity,
    *,
    resolution: int,
    batch: int = 16,
    folder: Path | None = None,
    judge: Judge | None = None,
    on_progress: OnProgress | None = None,
) -> list[Row]:
    """Make and score every sample by every method at every setting; returns one row each.

    A row holds the curve, the method's description, the sample's key, texts and seed, the four CLIP numbers, and under
    "judged" what ``judge(samples, pictures)`` says of each. With a ``folder`` the rows grow in its rows.jsonl, and what
    is there is not made again. Pictures depend on their sample and setting alone, not on the batch.
    Raises ConfigError, DatasetError.
    """
    if batch < 1 or not samples or not methods:
        got = f"{len(methods)} methods and {len(samples)} samples in batches of {batch}"
        raise ConfigError(f"{got}; give at least one of each, in batches of at least 1")
    total = len(samples) * sum(len(method.settings) for method in methods)
    found: dict[str, Row] = {}
    scored_by = fingerprint(clip.network)
    with _row_log(folder) as (known, append):
        for group in batches(samples, batch, resolution):
            scorer = _Scorer(clip, scored_by, group)
            for method in methods:
                for rows in _missing_rows(method, group, known, scorer, judge):
                    append(rows)
                found |= {key: known[key] for setting in method.settings for key in scorer.keys(method, setting)}
                if on_progress is not None:
                    on_progress(len(found), total)
    return list(found.values())


def _missing_rows(
    method: Method, group: Sequence[Sample], known: dict[str, Row], scorer: _Scorer, judge: Judge | None
) -> Iterator[list[Row]]:
    """The rows of one batch, setting by setting, that are not known yet."""
    missing = [s for s in method.settings if any(key not in known for key in scorer.keys(method, s))]
    if not missing:
        return
    prepared = method.prepare(group)
    for setting in missing:
        made = method.make(group, prepared, setting)
        # A method that makes its own sources edits other pictures than the samples', so it is not judged by them.
        judged = judge(group, made.edited) if judge is not None and made.sources is None else None
        extra: list[Row] = [{"judged": one} for one in judged] if judged is not None else [{} for _ in group]
        scores = scorer.score(made)
        yield [
            {**scorer.identity(method, setting, sample), **values, **more}
            for sample, values, more in zip(group, scores, extra, strict=True)
        ]


class _Scorer:
    """The four CLIP numbers of a batch; sources and captions are encoded once for all methods and settings."""

    def __init__(self, clip: ClipSimilarity, name: str, group: Sequence[Sample]) -> None:
        """``name`` tells this CLIP from others."""
        self._clip, self._name, self._group = clip, name, group
        self._sources: Tensor | None = None

    def identity(self, method: Method, setting: Setting, sample: Sample) -> Row:
        """What makes a row: the same is never measured twice."""
        texts = {name: getattr(sample, name) for name in ("instruction", "caption", "edited_caption")}
        picture = f"{zlib.crc32(sample.source.tobytes()):08x}"
        about = {"sample": sample.key, "picture": picture, "seed": sample.seed, **texts, "clip": self._name}
        return {"curve": setting.curve, **method.describe(setting), **about}

    def keys(self, method: Method, setting: Setting) -> list[str]:
        """Of the batch's rows, in its order."""
        return [_key(self.identity(method, setting, sample)) for sample in self._group]

    def score(self, made: Made) -> list[dict[str, float]]:
        captions = self._clip.text_features([one.caption for one in self._group])
        edited_captions = self._clip.text_features([one.edited_caption for one in self._group])
        edited = self._clip.image_features(made.edited)
        return [asdict(score) for score in pair_scores(self._source_features(made), edited, captions, edited_captions)]

    def _source_features(self, made: Made) -> Tensor:
        if made.sources is not None:
            return self._clip.image_features(made.sources)
        if self._sources is None:
            self._sources = self._clip.image_features([one.source for one in self._group])
        return self._sources


def _key(identity: Row) -> str:
    return json.dumps(identity, sort_keys=True)


@contextmanager
def _row_log(folder: Path | None) -> Iterator[tuple[dict[str, Row], Callable[[list[Row]], None]]]:
    """(rows by key, how to add more): in memory, or in a folder's file, locked against a second writer."""
    known: dict[str, Row] = {}

    def remember(rows: list[Row]) -> None:
        known.update((_row_key(row), row) for row in rows)

    if folder is None:
        yield known, remember
        return
    with disk_errors(folder, "written", DatasetError):
        folder.mkdir(parents=True, exist_ok=True)
    refusal = f"{folder} is being written by another evaluation; wait for it, or give another folder"
    with locked(folder / ".rows.lock", refusal, DatasetError):
        log = AppendLog(folder / ROWS, DatasetError)
        remember(list(log))

        def append(rows: list[Row]) -> None:
            log.append(*rows)
            remember(rows)

        yield known, append


def _row_key(row: Row) -> str:
    return _key({name: value for name, value in row.items() if name not in RESULTS})
