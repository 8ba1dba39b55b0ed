"""What captions and edits are, how they are read, and what every source of edits promises."""

from __future__ import annotations

import hashlib
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ..errors import CaptionError, ConfigError
from ..files import AppendLog, check_file, json_lines, locked, text_lines
from ..hooks import Hooks

__all__ = [
    "CaptionEdit",
    "CaptionReport",
    "CaptionSource",
    "Rejected",
    "Request",
    "UnfinishedBatch",
    "in_test_split",
    "is_unicode",
    "make_captions",
    "plain",
    "read_captions",
    "read_edits",
]

log = logging.getLogger(__name__)
MOST_UNFOLDED = 2**26  # bytes of a small Parquet file
CAPTION_NAMES = ("caption", "input", "original_prompt", "text")
INSTRUCTION_NAMES = ("instruction", "edit", "edit_prompt")
EDITED_NAMES = ("edited_caption", "output", "edited_prompt")
TEST_PERCENT = 5


@dataclass(frozen=True, kw_only=True)
class CaptionEdit:
    """A caption, an instruction, and the caption of the picture once it is followed."""

    caption: str
    instruction: str
    edited_caption: str

    @property
    def is_no_op(self) -> bool:
        """Whether nothing is asked for, or nothing changes but case, spaces and punctuation."""
        return not plain(self.instruction) or plain(self.edited_caption) in ("", plain(self.caption))


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """An answer that cannot be used."""

    reason: str
    """Such as "malformed"; rejections are counted by it."""
    text: str = ""
    """What came instead."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A caption to be edited, the ``number``-th time, with randomness from ``seed`` alone."""

    caption: str
    number: int
    seed: int

    @classmethod
    def make(cls, caption: str, number: int, seed: int) -> Request:
        """A request whose seed follows from the run's seed, the caption and the number, so order does not matter."""
        digest = hashlib.blake2b(f"{seed}/{number}/{caption}".encode(), digest_size=7).digest()
        return cls(caption=caption, number=number, seed=int.from_bytes(digest, "big"))


class CaptionSource(Protocol):
    """Something that thinks of edits."""

    name: str
    batch: int
    """How many requests it likes to get at once."""

    def propose(self, requests: Sequence[Request]) -> list[CaptionEdit | Rejected]:
        """One answer a request, in their order; may raise UnfinishedBatch."""


class UnfinishedBatch(CaptionError):
    """Trouble amid a batch, with one answer a request, and None for those that have none."""

    def __init__(self, said: str, answers: Sequence[Any]) -> None:
        super().__init__(said)
        self.answers = answers


def is_unicode(text: str) -> bool:
    """Whether a text can be written down; JSON may hold halves of letters (lone surrogates)."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def plain(text: str) -> str:
    """Words in lower case with single spaces, without punctuation."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def in_test_split(caption: str) -> bool:
    """Whether pairs of a caption belong to the test split: one caption in twenty, by a hash of its text.

    The paper's code takes the last twentieth by position; a hash stays true when a data set grows. Pairs without a
    caption belong to no split.
    """
    return bool(caption.strip()) and zlib.crc32(caption.strip().encode()) % 100 < TEST_PERCENT


def read_captions(path: Path | str, *, column: str | None = None) -> Iterator[str]:
    """The captions of a text file (one a line), a JSON Lines or a Parquet file; empty ones are left out.

    ``column`` defaults to the first of caption, input, original_prompt, text that is there. Raises CaptionError.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".txt":
        yield from filter(None, map(str.strip, text_lines(path, CaptionError)))
        return
    for number, row in enumerate(_rows(path, "a .txt, .jsonl or .parquet file"), start=1):
        caption = _named(row, (column,) if column else CAPTION_NAMES, f"{path}, row {number},").strip()
        if caption:
            yield caption


def read_edits(path: Path | str) -> list[CaptionEdit]:
    """Triplets of a JSON Lines or Parquet file, by our names, the original's or the hub's; raises CaptionError."""
    path = Path(path)
    names = {"caption": CAPTION_NAMES, "instruction": INSTRUCTION_NAMES, "edited_caption": EDITED_NAMES}
    return [
        CaptionEdit(**{field: _named(row, names[field], f"{path}, row {number},") for field in names})
        for number, row in enumerate(_rows(path, "a .jsonl or .parquet file of triplets"), start=1)
    ]


def _rows(path: Path, wanted: str) -> Iterator[Mapping[str, Any]]:
    kind = path.suffix.lower()
    if kind in (".jsonl", ".json"):
        yield from json_lines(path, CaptionError)
    elif kind == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise CaptionError(f"{path} ends in {kind or 'no suffix'}; give {wanted}")


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile, read_schema
    except ImportError as error:
        got = f"{path} needs pyarrow, which is missing"
        raise ConfigError(f"{got}; pip install pyarrow, or give a .jsonl file") from error
    check_file(path, CaptionError)
    try:
        texts = [field.name for field in read_schema(path) if str(field.type) in ("string", "large_string")]
        # As dictionaries and row by row, since a small file can repeat a long text without end.
        with ParquetFile(path, read_dictionary=texts) as file:
            groups = (file.metadata.row_group(n) for n in range(file.num_row_groups))
            if sum(group.total_byte_size for group in groups) > max(MOST_UNFOLDED, 20 * path.stat().st_size):
                raise ValueError("it unfolds to many times its size")
            for batch in file.iter_batches(columns=texts):
                for row in range(batch.num_rows):
                    yield {name: batch.column(name)[row].as_py() for name in texts}
    except (OSError, ValueError) as error:
        raise CaptionError(f"{path} is no Parquet file that can be read ({error}); give another copy") from error


def _named(row: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    for name in names:
        if isinstance(row.get(name), str):
            if not is_unicode(row[name]):
                raise CaptionError(f"{place} has half a letter (a lone surrogate) in {name}; correct or remove the row")
            return row[name]
    raise CaptionError(f"{place} has {', '.join(map(str, row))} and no text in {' or '.join(names)}; name its column")


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
    retry_rejected: bool = False,
    hooks: Hooks | None = None,
) -> CaptionReport:
    """Ask ``source`` for ``per_caption`` edits of each caption and append the good ones to ``out`` (JSON Lines).

    Rejected answers go to a file beside it, with the reason, so a stopped run goes on without asking again; with
    ``retry_rejected`` it asks again about those. ``moderate`` may refuse an edit by returning False. Raises
    CaptionError, ConfigError, or Interrupted once ``hooks.should_stop()``.
    """
    if per_caption < 1:
        raise ConfigError(f"per_caption is {per_caption}; give a whole number of at least 1")
    hooks = hooks or Hooks()
    given = [caption.strip() for caption in captions if caption.strip()]
    unique = list(dict.fromkeys(given))
    if not unique:
        raise CaptionError("there are no captions; give at least one line that is not empty")
    with _Ledger.open(Path(out), moderate) as ledger:
        before = ledger.written
        todo = (Request.make(caption, n, seed) for caption in unique for n in range(per_caption))
        finished = 0
        for requests in _batches(todo, source.batch):
            hooks.check_stop(f"stopped with {ledger.written} edits in {out}; the same call goes on")
            ledger.settle(
                source,
                [request for request in requests if not ledger.knows(request, "" if retry_rejected else source.name)],
            )
            finished += len(requests)
            hooks.progress(finished, len(unique) * per_caption)
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
        except (TypeError, AttributeError) as error:
            raise CaptionError(f"{self._kept.path} has a line that is no edit's; write to another file") from error

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

    def _take(self, source: str, requests: Sequence[Request], answers: Sequence[CaptionEdit | Rejected | None]) -> None:
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

    def _judge(self, answer: CaptionEdit | Rejected) -> CaptionEdit | Rejected:
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
