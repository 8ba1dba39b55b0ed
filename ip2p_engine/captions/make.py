"""The caption workflow: ask a source for edits, keep the good ones, and never ask twice."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from ..errors import CaptionError, ConfigError, Interrupted
from ..files import AppendLog, locked
from .edits import CaptionEdit, CaptionSource, Rejected, Request, UnfinishedBatch, plain

__all__ = ["CaptionReport", "make_captions"]

log = logging.getLogger(__name__)
Answer = CaptionEdit | Rejected


@dataclass(frozen=True, kw_only=True)
class CaptionReport:
    """What a file of edits holds after a run, over all the runs that wrote it."""

    written: int
    new: int
    """Of these, the ones of this run."""
    rejected: dict[str, int]
    """By reason: malformed, no-op, duplicate, moderated, and what a source adds."""
    repeated_captions: int
    """Captions of this run's input that had come before in it."""

    def as_text(self) -> str:
        """The same for people."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.rejected.items())) or "none"
        return f"{self.written:,} edits ({self.new:,} new); rejected: {reasons}"


def make_captions(
    captions: Iterable[str],
    source: CaptionSource,
    out: Path | str,
    *,
    per_caption: int = 1,
    seed: int = 0,
    moderate: Callable[[CaptionEdit], bool] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> CaptionReport:
    """Ask ``source`` for ``per_caption`` edits of each caption and append the good ones to ``out`` (JSON Lines).

    Rejected answers go to a file beside it, with the reason, so a stopped run goes on without asking again.
    ``moderate`` may refuse an edit by returning False. Raises CaptionError, ConfigError, or Interrupted.
    """
    if per_caption < 1:
        raise ConfigError(f"per_caption is {per_caption}; give a whole number of at least 1")
    given = [caption.strip() for caption in captions if caption.strip()]
    unique = list(dict.fromkeys(given))
    if not unique:
        raise CaptionError("there are no captions; give at least one line that is not empty")
    with _Ledger.open(Path(out), moderate) as ledger:
        before = ledger.written
        todo = (Request.make(caption, n, seed) for caption in unique for n in range(per_caption))
        finished = 0
        for requests in _batches(todo, source.batch):
            if should_stop is not None and should_stop():
                raise Interrupted(f"stopped with {ledger.written} edits in {out}; the same command goes on")
            ledger.settle(source, [request for request in requests if not ledger.knows(request, source.name)])
            finished += len(requests)
            if on_progress is not None:
                on_progress(finished, len(unique) * per_caption)
        return CaptionReport(
            written=ledger.written,
            new=ledger.written - before,
            rejected=dict(ledger.rejected),
            repeated_captions=len(given) - len(unique),
        )


def _batches(requests: Iterator[Request], size: int) -> Iterator[list[Request]]:
    while batch := list(islice(requests, size)):
        yield batch


class _Ledger:
    """The two files of a run, and what is in them."""

    def __init__(self, out: Path, moderate: Callable[[CaptionEdit], bool] | None) -> None:
        self._moderate = moderate
        self._kept = AppendLog(out, CaptionError)
        self._refused = AppendLog(out.with_suffix(f".rejected{out.suffix}"), CaptionError)
        self._lock = ExitStack()
        self._answered: set[tuple[str, int]] = set()
        self._rejected_of: set[tuple[str, int, str]] = set()
        self._edits: set[tuple[str, ...]] = set()
        self.written, self.rejected = 0, Counter[str]()

    @classmethod
    def open(cls, out: Path, moderate: Callable[[CaptionEdit], bool] | None) -> _Ledger:
        """Lock the files first, so that nobody cuts off another writer's unfinished line."""
        if out.suffix.lower() != ".jsonl":
            raise ConfigError(f"the output is {out}; give a name that ends in .jsonl")
        with ExitStack() as stack:
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CaptionError(f"{out.parent} cannot be made ({error.strerror}); check the path") from error
            refusal = f"{out} is being written by another process; wait for it, or write to another file"
            stack.enter_context(locked(out.with_name(f".{out.name}.lock"), refusal, CaptionError))
            ledger = cls(out, moderate)
            ledger._load()
            ledger._lock = stack.pop_all()
        return ledger

    def _load(self) -> None:
        try:
            for row in self._kept:
                self._answered.add((row["caption"], row["number"]))
                self._edits.add(
                    _identity(CaptionEdit(**{name: row[name] for name in CaptionEdit.__dataclass_fields__}))
                )
                self.written += 1
            for row in self._refused:
                self._rejected_of.add((row["caption"], row["number"], row["source"]))
                self.rejected[row["reason"]] += 1
        except KeyError as error:
            raise CaptionError(f"{self._kept.path} has a line without {error}; write to another file") from error

    def __enter__(self) -> _Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def knows(self, request: Request, source: str) -> bool:
        """Whether there is an edit, or this source's answer was rejected; another source may do better."""
        asked = (request.caption, request.number)
        return asked in self._answered or (*asked, source) in self._rejected_of

    def settle(self, source: CaptionSource, requests: Sequence[Request]) -> None:
        """Ask, judge and write one batch, or what a source finished of it before it gave up."""
        if not requests:
            return
        try:
            self._take(source.name, requests, source.propose(requests))
        except UnfinishedBatch as error:
            self._take(source.name, requests, error.answers)
            raise

    def _take(self, source: str, requests: Sequence[Request], answers: Sequence[Answer | None]) -> None:
        kept, refused = [], []
        for request, answer in zip(requests, answers, strict=True):
            if answer is None:
                continue
            verdict = self._judge(answer)
            row = {"caption": request.caption, "number": request.number, "seed": request.seed, "source": source}
            if isinstance(verdict, Rejected):
                self.rejected[verdict.reason] += 1
                refused.append({**row, **asdict(verdict)})
            else:
                kept.append({**asdict(verdict), **row})
        if refused:
            self._refused.append(*refused)
        if kept:
            self._kept.append(*kept)
        self.written += len(kept)

    def _judge(self, answer: Answer) -> Answer:
        if isinstance(answer, Rejected):
            return answer
        text = f"{answer.instruction} -> {answer.edited_caption}"
        if answer.is_no_op:
            return Rejected(reason="no-op", text=text)
        if _identity(answer) in self._edits:
            return Rejected(reason="duplicate", text=text)
        if self._moderate is not None and not self._moderate(answer):
            return Rejected(reason="moderated", text=text)
        self._edits.add(_identity(answer))
        return answer


def _identity(edit: CaptionEdit) -> tuple[str, ...]:
    return plain(edit.caption), plain(edit.instruction), plain(edit.edited_caption)
