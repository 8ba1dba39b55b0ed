"""The one loop of every evaluation: methods x settings x samples -> rows with the four CLIP numbers, resumable."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..clip.filter import PairScores
from ..clip.similarity import ClipSimilarity, pair_scores
from ..errors import ConfigError
from ..hooks import Hooks
from ..networks.digest import fingerprint
from .methods import Made, Method, Setting
from .run_folder import NUMBER, OBJECT, Row, row_key, row_log
from .samples import Sample, batches

__all__ = ["Judge", "Row", "measure"]

RESULTS = {**{field.name: NUMBER for field in fields(PairScores)}, "judged": OBJECT}
Judge = Callable[[Sequence[Sample], Sequence[Image.Image]], list[dict[str, Any]]]


def measure(
    samples: Sequence[Sample],
    methods: Sequence[Method],
    clip: ClipSimilarity,
    *,
    resolution: int,
    batch: int = 16,
    folder: Path | None = None,
    judge: Judge | None = None,
    hooks: Hooks | None = None,
) -> list[Row]:
    """Make and score every sample by every method at every setting; returns one row each.

    A row holds the curve, the method's description, the sample's key, texts and seed, the four CLIP numbers (None what
    the captions do not say: of equal ones there is no direction, of missing ones no text to compare with), and under
    "judged" what ``judge(samples, pictures)`` says of each. With a ``folder`` the rows grow in its rows.jsonl, and what
    is there is not made again. Pictures depend on their sample and setting alone, not on the batch.
    Raises ConfigError, DatasetError, or Interrupted once ``hooks.should_stop()``.
    """
    hooks = hooks or Hooks()
    if batch < 1 or not samples or not methods:
        got = f"{len(methods)} methods and {len(samples)} samples in batches of {batch}"
        raise ConfigError(f"{got}; give at least one of each, in batches of at least 1")
    total = len(samples) * sum(len(method.settings) for method in methods)
    found: dict[str, Row] = {}
    scored_by = fingerprint(clip.network)
    with row_log(folder, RESULTS, optional=("judged",)) as (known, append):
        for group in batches(samples, batch, resolution):
            scorer = _Scorer(clip, scored_by, group)
            for method in methods:
                hooks.check_stop(f"stopped with {len(found)} of {total} pictures measured")
                for rows in _missing_rows(method, group, known, scorer, judge):
                    append(rows)
                found |= {key: known[key] for setting in method.settings for key in scorer.keys(method, setting)}
                hooks.progress(len(found), total)
    return list(found.values())


def _missing_rows(
    method: Method, group: Sequence[Sample], known: dict[str, Row], scorer: _Scorer, judge: Judge | None
) -> Iterator[list[Row]]:
    """The rows of one batch, setting by setting, that are not known yet."""
    missing: dict[tuple[int, ...], list[Setting]] = {}
    for setting in method.settings:
        places = tuple(n for n, key in enumerate(scorer.keys(method, setting)) if key not in known)
        missing.setdefault(places, []).append(setting)
    for places, settings in missing.items():
        if not places:
            continue
        samples = [group[n] for n in places]
        prepared = method.prepare(samples)
        for setting in settings:
            made = method.make(samples, prepared, setting)
            # A method that makes its own sources edits other pictures than the samples', so it is not judged by them.
            judged = judge(samples, made.edited) if judge is not None and made.sources is None else None
            extra: list[Row] = [{"judged": one} for one in judged] if judged is not None else [{} for _ in samples]
            yield [
                {**scorer.identity(method, setting, sample), **values, **more}
                for sample, values, more in zip(samples, scorer.score(made, places), extra, strict=True)
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
        pictures = {"picture": _checksum(sample.source), "size": list(sample.source.size)}
        if sample.target is not None:
            pictures["target"] = _checksum(sample.target)
        about = {"sample": sample.key, **pictures, "seed": sample.seed, **texts, "clip": self._name}
        return {"curve": setting.curve, **method.describe(setting), **about}

    def keys(self, method: Method, setting: Setting) -> list[str]:
        """Of the batch's rows, in its order."""
        return [row_key(self.identity(method, setting, sample)) for sample in self._group]

    def score(self, made: Made, places: Sequence[int]) -> list[dict[str, float | None]]:
        """Of the pictures made of the batch's samples at these places; None what its captions do not say."""
        captions = self._clip.text_features([self._group[n].caption for n in places])
        edited_captions = self._clip.text_features([self._group[n].edited_caption for n in places])
        edited, sources = self._clip.image_features(made.edited), self._source_features(made, places)
        scores = pair_scores(sources, edited, captions, edited_captions)
        return [_said(self._group[n], asdict(score)) for n, score in zip(places, scores, strict=True)]

    def _source_features(self, made: Made, places: Sequence[int]) -> Tensor:
        if made.sources is not None:
            return self._clip.image_features(made.sources)
        if self._sources is None:
            self._sources = self._clip.image_features([one.source for one in self._group])
        return self._sources[list(places)]


def _said(sample: Sample, scores: dict[str, float]) -> dict[str, float | None]:
    known = {"sim_0": sample.caption, "sim_1": sample.edited_caption, "sim_direction": sample.has_direction}
    return {name: value if known.get(name, True) else None for name, value in scores.items()}


def _checksum(picture: Image.Image) -> str:
    return f"{zlib.crc32(picture.tobytes()):08x}"
