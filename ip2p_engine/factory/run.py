"""The pair factory: caption pairs in, a filtered data set out; stopped or killed, the same call goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..captions.edits import CaptionEdit
from ..clip.filter import FilterConfig, FilterReport, filter_candidates
from ..data.ledger import CandidateLog, CaptionCandidates, digest_of, pair_key, read_candidates
from ..data.store import MANIFEST, ROWS_PER_SHARD, PairStore, PairWriter
from ..errors import ConfigError, DatasetError, Interrupted
from ..hooks import Hooks
from ..p2p.cross_attention import check_reweight
from .maker import MadeCaption, Task
from .workers import Workers

__all__ = ["PairRunReport", "Work", "make_pairs", "report_of"]

SAVE_SECONDS = 300.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Work:
    """How a run goes about its work; what it makes depends on none of it."""

    batch_pairs: int | None = None
    """Pairs in one batch; None is what the data set's first run took, and for that what the free memory held."""
    partition: tuple[int, int] = (0, 1)
    """(i, n): this run makes every n-th group of caption pairs, from the i-th."""
    save_seconds: float = SAVE_SECONDS
    """How often unfinished shards are written; so much work a kill can cost."""
    rows_per_shard: int = ROWS_PER_SHARD


@dataclass(frozen=True, kw_only=True)
class PairRunReport:
    """What a data set holds after a run, over all the runs that wrote it."""

    pairs: int
    captions: int
    """Caption pairs that are done."""
    unsuited: int
    """Of these, the ones of which no candidate could be made."""
    filtered: FilterReport | None
    """None without a filter."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "filtered": self.filtered and self.filtered.to_dict()}

    def as_text(self, *, histograms: bool = False) -> str:
        """The same for people."""
        lines = [f"{self.pairs:,} pairs of {self.captions:,} caption pairs"]
        lines += [f"{self.unsuited:,} of them do not suit the mode; the ledger says why"] if self.unsuited else []
        return "\n".join([*lines, *([self.filtered.text(histograms=histograms)] if self.filtered else [])])


def make_pairs(
    edits: Sequence[CaptionEdit],
    out: Path | str,
    workers: Workers,
    *,
    work: Work | None = None,
    hooks: Hooks | None = None,
) -> PairRunReport:
    """Make the pairs of every caption pair that ``out`` does not have yet, and say what it holds then.

    ``hooks.on_progress`` counts candidates. What is finished is on the disk every few minutes and at the end,
    whatever ends the run. Raises ConfigError, DatasetError (another run's folder, changed edits, a full disk), or
    Interrupted once ``hooks.should_stop()``.
    """
    if not edits:
        raise ConfigError("there is no caption pair to make pictures of; give at least one")
    out, work, origin = Path(out), work or Work(), workers.describe()
    config = origin["factory"]["filter"]
    check_reweight(origin["pairs"].get("reweight"), [edit.edited_caption for edit in edits])
    manifest = {"config": origin, "work": {"batch_pairs": work.batch_pairs or workers.batch_pairs()}}
    writer = PairWriter(out, manifest=manifest, partition=work.partition, rows_per_shard=work.rows_per_shard)
    with writer:
        first_batch = _batch_of(writer.work or manifest["work"], out)
        if work.batch_pairs not in (None, first_batch):
            log.warning("%s was begun in batches of %d; other batches round differently", out, first_batch)
        run = _Run(writer, edits, work)
        groups = run.groups(max(1, first_batch // origin["factory"]["candidates"]))
        made = workers.make(groups, work.batch_pairs or first_batch, run.noting(hooks or Hooks()))
        try:
            _take_beside(run, made)
        except Interrupted as error:
            raise Interrupted(f"stopped; what was finished is in {out}, and the same call goes on") from error
        finally:
            run.save()
    return report_of(out, FilterConfig(**config) if config else None)


def _take_beside(run: _Run, made: Iterator[list[MadeCaption]]) -> None:
    """Groups reach the disk in their order, in a thread beside the one that walks, which may be one group ahead."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ip2p-write") as beside:
        taken: Future[None] | None = None
        try:
            for group in made:
                if taken is not None:
                    taken.result()
                taken = beside.submit(run.take, group)
        finally:
            if taken is not None:
                taken.result()


def _batch_of(work: Any, out: Path) -> int:
    """How many pairs at once a data set was begun with, as its manifest says."""
    size = work.get("batch_pairs") if isinstance(work, Mapping) else None
    if type(size) is not int or size < 1:
        raise DatasetError(f"{out / MANIFEST} says {str(work)[:60]!r} of its batches; restore it from a copy")
    return size


def report_of(folder: Path | str, config: FilterConfig | None) -> PairRunReport:
    """What a data set's ledger says under a filter; raises DatasetError."""
    captions = unsuited = 0
    report = None if config is None else filter_candidates([], config).report
    for row in read_candidates(folder):
        captions, unsuited = captions + 1, unsuited + bool(row.unsuited)
        if report is not None and config is not None:
            report += row.judged(config)[1]
    return PairRunReport(pairs=len(PairStore(folder)), captions=captions, unsuited=unsuited, filtered=report)


class _Run:
    """One run on one data set: what it has, what is left, and how results reach the disk."""

    def __init__(self, writer: PairWriter, edits: Sequence[CaptionEdit], work: Work) -> None:
        self._writer, self._work = writer, work
        self._log = CandidateLog(writer.folder, work.partition)
        self._tasks = [Task(number=number, edit=edit) for number, edit in enumerate(edits)]
        self._done = self._known_captions(edits)
        self._pictured = self._captions_with_pictures()
        self._waiting: list[CaptionCandidates] = []
        self._saved = time.monotonic()
        self._kept = self._made = 0

    def _known_captions(self, edits: Sequence[CaptionEdit]) -> set[int]:
        """Rows that are done; raises DatasetError if the edits are not those that were done."""
        done: set[int] = set()
        named: set[str] = set()
        for row in read_candidates(self._writer.folder):
            if row.caption < len(edits) and row.edit != digest_of(edits[row.caption]):
                raise DatasetError(
                    f"{self._writer.folder} was made of other edits: row {row.caption + 1} has changed; "
                    "append new edits at the end, or write to a new folder"
                )
            done.add(row.caption)
            named.update(pair_key(row.caption, seed) for seed in row.kept)
        if lost := named - self._writer.done_keys():
            said = f"{self._writer.folder} has lost pictures: its ledger names {len(lost)} pairs, such as {min(lost)}"
            raise DatasetError(f"{said}, that no shard holds; restore the shard from a copy, or write to a new folder")
        return done

    def _captions_with_pictures(self) -> dict[int, tuple[int, ...]]:
        """Seeds of captions whose pictures are there and whose line is not: the writer was killed in between."""
        found: dict[int, list[int]] = {}
        for key in self._writer.done_keys():
            number, _, seed = key.partition("/")
            if not (number.isdecimal() and seed.isdecimal()):
                raise DatasetError(
                    f"{self._writer.folder} holds pair {key!r}, which no run made; write to a new folder"
                )
            if int(number) not in self._done:
                found.setdefault(int(number), []).append(int(seed))
        return {number: tuple(seeds) for number, seeds in found.items()}

    def groups(self, size: int) -> list[list[Task]]:
        """This partition's groups that are not finished, whole: a picture's last bits may depend on its batch."""
        number, count = self._work.partition
        every = [self._tasks[start : start + size] for start in range(0, len(self._tasks), size)]
        return [group for group in every[number::count] if any(task.number not in self._done for task in group)]

    def take(self, group: Sequence[MadeCaption]) -> None:
        """Hand results to the writer; those that were there before are not written twice."""
        for made in group:
            self._made += len(made.candidates.seeds)
            self._kept += len(made.pairs)
            number = made.candidates.caption
            if number in self._done:
                continue
            if made.candidates.unsuited:
                log.warning("caption %d is passed over: %s", number + 1, made.candidates.unsuited)
            there = self._pictured.get(number)
            if there is None:
                self._writer.write(*made.pairs)
            # A GPU may round differently the second time: what is in the data set counts.
            if there is not None and set(there) != set(made.candidates.kept):
                made = replace(made, candidates=replace(made.candidates, kept=there))
            self._waiting.append(made.candidates)
            self._done.add(number)
        if time.monotonic() - self._saved >= self._work.save_seconds:
            self.save()

    def save(self) -> None:
        """The pictures first: a caption pair is done once its line is in the ledger."""
        self._writer.flush()
        self._log.append(self._waiting)
        self._waiting, self._saved = [], time.monotonic()

    def noting(self, hooks: Hooks) -> Hooks:
        """Progress with the pass rate of this run."""

        def show(done: int, total: int, _: str) -> None:
            rate = f", {self._kept / self._made:.1%} of candidates kept" if self._made else ""
            hooks.progress(done, total, f"{len(self._done)} caption pairs done{rate}")

        return replace(hooks, on_progress=show)
