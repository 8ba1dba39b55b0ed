"""Filter a data set again, by the scores that are kept: other thresholds without generating again."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ..clip.filter import MEASURES, FilterConfig, FilterReport, PairScores, filter_candidates
from ..clip.similarity import ClipSimilarity, rounded
from ..data.ledger import CandidateLog, CaptionCandidates, has_candidates, pair_key, read_candidates
from ..data.parquet import numbered
from ..data.reading import Pairs, Reading, open_pairs
from ..data.record import IMAGE_COLUMNS, PairRecord
from ..data.store import MANIFEST, PairWriter
from ..errors import DatasetError, ImageError
from ..hooks import Hooks
from ..images import open_image

__all__ = ["RefilterReport", "clip_of", "refilter", "rescored"]

AT_ONCE = 64

log = logging.getLogger(__name__)
Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class RefilterReport:
    """What a filter makes of a data set."""

    filtered: FilterReport
    missing: tuple[str, ...]
    """Keys of pairs that pass now and have no pictures, because the first filter dropped them."""
    below: int = 0
    """Pairs whose score by another judge is below its least value, or missing; CLIP's filter did not see them."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"filtered": self.filtered.to_dict(), "missing": list(self.missing), "below": self.below}

    def as_text(self, *, histograms: bool = True) -> str:
        """The same for people."""
        text = self.filtered.text(histograms=histograms)
        if self.below:
            text = f"{text}\n{self.below:,} pairs were left out before, by their scores"
        if not self.missing:
            return text
        lost = f"{len(self.missing):,} of them have no pictures, since the first filter dropped them; to have them"
        return f"{text}\n{lost}, make the pairs again with these thresholds, or once without a filter"


def refilter(
    folder: Path | str,
    out: Path | str | None,
    config: FilterConfig,
    reading: Reading | None = None,
    *,
    scores: Mapping[str, PairScores] | None = None,
    clip: str | None = None,
    least: Mapping[str, float] | None = None,
    hooks: Hooks | None = None,
) -> RefilterReport:
    """Say what a filter keeps of a data set and, given ``out``, write that as a data set of its own.

    By the ledger where there is one and all is read, else by the scores in the rows, or by ``scores`` that ``rescored``
    took with ``clip``; without a ledger, a caption pair is what has the same texts. ``least`` holds the least value of
    scores that other judges gave the pairs (``scores`` of their rows); pairs below it are left out first, and the
    ledger, which does not know these scores, is not used. A stopped call goes on. Raises DatasetError for pairs without
    scores, and for an ``out`` that holds something else.
    """
    pairs = open_pairs(folder, reading)
    out_of_reach = _below(pairs, least or {})
    by_ledger = scores is None and has_candidates(folder) and not least and not (reading and reading.chooses)
    judged = _by_ledger(pairs, config) if by_ledger else _by_rows(pairs, scores, config, out_of_reach)
    there = set(_names(pairs))
    if out is not None:
        source = _config_of(pairs)
        filtered = {"source": str(folder), "filter": asdict(config), "clip": clip or _rescored_by(source)}
        filtered |= (reading or Reading()).in_manifest()
        filtered |= {"least": dict(least)} if least else {}
        writer = PairWriter(out, manifest={"config": {**source, "filtered": filtered}})
        with writer:
            _copy(pairs, judged.wanted, scores or {}, writer, hooks or Hooks())
            _copy_lines(pairs, judged.captions, config, there, writer)
    missing = tuple(sorted(judged.wanted - there))
    return RefilterReport(filtered=judged.report, missing=missing, below=len(out_of_reach))


def _below(pairs: Pairs, least: Mapping[str, float]) -> set[str]:
    """The pairs whose scores do not reach their least values. Raises DatasetError for a score that no pair has."""
    if not least:
        return set()
    given = [one or {} for one in pairs.columns("scores")["scores"]]
    known = sorted({name for one in given for name in one})
    for name in set(least) - set(known):
        raise DatasetError(f"no pair of {pairs.folder} has a score {name!r}; there are {', '.join(known) or 'none'}")
    reached = [all(one.get(name, -math.inf) >= value for name, value in least.items()) for one in given]
    return {name for name, good in zip(_names(pairs), reached, strict=True) if not good}


def clip_of(pairs: Pairs) -> str:
    """The CLIP that took the scores of a data set; empty where its manifest does not say. Raises DatasetError."""
    config = _config_of(pairs)
    return _rescored_by(config) or _part(config, "factory").get("clip", "")


def _config_of(pairs: Pairs) -> dict[str, Any]:
    return dict(_part(pairs.manifest, "config")) if (pairs.folder / MANIFEST).exists() else {}


def _rescored_by(config: Mapping[str, Any]) -> str | None:
    return _part(config, "filtered").get("clip")


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name, {})
    if not isinstance(part, Mapping):
        raise DatasetError(f"{MANIFEST} has the {name} {part!r}; restore it from a copy")
    return part


def rescored(pairs: Pairs, scorer: ClipSimilarity, *, hooks: Hooks | None = None) -> dict[str, PairScores]:
    """The scores of every pair whose pictures can be read by another CLIP, by key. Raises DatasetError."""
    found: dict[str, PairScores] = {}
    hooks = hooks or Hooks()
    bare = sum(not (text or "").strip() for text in pairs.columns("original_prompt")["original_prompt"])
    if bare:
        log.warning("%d of %d pairs have no captions; of their scores only sim_image means anything", bare, len(pairs))
    for batch in _batches(_seen(pairs)):
        hooks.check_stop()
        names, texts, pictures = zip(*batch, strict=True)
        scores = scorer.score(*map(list, zip(*pictures, strict=True)), *map(list, zip(*texts, strict=True)))
        found.update(zip(names, map(rounded, scores), strict=True))
        hooks.progress(len(found), len(pairs))
    if len(pairs) and not found:
        raise DatasetError(f"no pair of {pairs.folder} has pictures that can be read; look with ip2p dataset verify")
    return found


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """What a filter says of a whole data set."""

    report: FilterReport
    wanted: set[str]
    """Keys of the pairs to keep."""
    captions: set[int] = field(default_factory=set)
    """The caption pairs that the ledger had; a writer at work may add more."""


def _by_ledger(pairs: Pairs, config: FilterConfig) -> _Judged:
    """Line by line: the ledger of a large data set does not fit into memory."""
    wanted: set[str] = set()
    captions, total = set(), filter_candidates([], config).report
    for line in read_candidates(pairs.folder):
        row, report = line.judged(config)
        wanted.update(pair_key(row.caption, seed) for seed in row.kept)
        captions.add(row.caption)
        total += report
    return _Judged(report=total, wanted=wanted, captions=captions)


def _by_rows(pairs: Pairs, scores: Mapping[str, PairScores] | None, config: FilterConfig, without: set[str]) -> _Judged:
    if not len(pairs):
        raise DatasetError(f"{pairs.folder} has no pairs to filter; give the folder of a data set")
    columns = pairs.columns("original_prompt", "edit_prompt", "edited_prompt", *MEASURES)
    groups: dict[tuple[str, ...], list[tuple[str, PairScores]]] = {}
    for number, name in enumerate(_names(pairs)):
        if name in without or (scores is not None and name not in scores):
            continue
        one = scores[name] if scores is not None else _score_of(pairs, columns, number)
        texts = tuple(columns[text][number] for text in ("original_prompt", "edit_prompt", "edited_prompt"))
        groups.setdefault(texts, []).append((name, one))
    results = [(group, filter_candidates([one for _, one in group], config)) for group in groups.values()]
    wanted = {group[n][0] for group, result in results for n in result.kept}
    return _Judged(report=_sum((result.report for _, result in results), config), wanted=wanted)


def _score_of(pairs: Pairs, columns: Mapping[str, list[Any]], number: int) -> PairScores:
    values = {name: columns[name][number] for name in MEASURES}
    if None in values.values():
        raise DatasetError(f"pair {number + 1} of {pairs.folder} has no scores; take them with a `clip`")
    return PairScores(**values)


def _copy(
    pairs: Pairs,
    wanted: set[str],
    scores: Mapping[str, PairScores],
    writer: PairWriter,
    hooks: Hooks,
) -> None:
    done = writer.done_keys()
    for number, pair in _numbered(pairs):
        hooks.check_stop(f"stopped after {number} of {len(pairs)} pairs")
        name = _name(pair.key, number)
        if name in wanted and name not in done:
            writer.write(_with_scores(replace(pair, key=name), scores.get(name)))
        hooks.progress(number + 1, len(pairs))


def _numbered(pairs: Pairs) -> Iterator[tuple[int, PairRecord]]:
    """(number, pair); what cannot be used is named and passed over."""
    for number, pair in numbered(pairs.outcomes()):
        if isinstance(pair, DatasetError):
            log.warning("left out: %s", pair)
        else:
            yield number, pair


def _with_scores(pair: PairRecord, scores: PairScores | None) -> PairRecord:
    return pair if scores is None else replace(pair, **asdict(scores))


def _copy_lines(pairs: Pairs, captions: set[int], config: FilterConfig, there: set[str], writer: PairWriter) -> None:
    """The ledger goes along, so that the new data set can be filtered again; the pictures first, as always."""
    if not captions:
        return
    writer.flush()
    new = captions - {row.caption for row in read_candidates(writer.folder)}
    log = CandidateLog(writer.folder, (0, 1))
    lines = (line.filtered(config) for line in read_candidates(pairs.folder) if line.caption in new)
    for batch in _batches(lines):
        log.append([replace(row, kept=_pictured(row, there)) for row in batch])


def _pictured(row: CaptionCandidates, there: set[str]) -> tuple[int, ...]:
    return tuple(seed for seed in row.kept if pair_key(row.caption, seed) in there)


def _names(pairs: Pairs) -> list[str]:
    return [_name(key, number) for number, key in enumerate(pairs.columns("key")["key"])]


def _name(key: str | None, number: int) -> str:
    """A pair's key, or its place in a foreign data set."""
    return key or f"row/{number}"


def _seen(pairs: Pairs) -> Iterator[tuple[str, tuple[str, str], list[Image.Image]]]:
    """(name, captions, pictures before and after) of the pairs that can be looked at."""
    for number, pair in _numbered(pairs):
        name = _name(pair.key, number)
        try:
            pictures = [open_image(getattr(pair, one), name=f"the {one} of pair {name}") for one in IMAGE_COLUMNS]
        except ImageError as error:
            log.warning("left out: %s", error)
        else:
            yield name, (pair.original_prompt, pair.edited_prompt), pictures


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    waiting = iter(rows)
    while batch := list(islice(waiting, AT_ONCE)):
        yield batch


def _sum(reports: Iterable[FilterReport], config: FilterConfig) -> FilterReport:
    total = filter_candidates([], config).report
    for report in reports:
        total += report
    return total
