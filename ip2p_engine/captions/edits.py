"""What captions and edits are, how they are read, and what every source of edits promises."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import CaptionError, ConfigError
from ..files import json_lines, text_lines

__all__ = [
    "CaptionEdit",
    "CaptionSource",
    "Rejected",
    "Request",
    "UnfinishedBatch",
    "in_test_split",
    "is_unicode",
    "plain",
    "read_captions",
    "read_edits",
]

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

    def __init__(self, said: str, answers: Sequence[CaptionEdit | Rejected | None]) -> None:
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
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        got = f"{path} needs pyarrow, which is missing"
        raise ConfigError(f"{got}; pip install pyarrow, or give a .jsonl file") from error
    try:
        with ParquetFile(path) as file:
            texts = [field.name for field in file.schema_arrow if str(field.type) in ("string", "large_string")]
            for batch in file.iter_batches(columns=texts):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise CaptionError(f"{path} is no Parquet file that can be read ({error}); give another copy") from error


def _named(row: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    for name in names:
        if isinstance(row.get(name), str):
            if not is_unicode(row[name]):
                raise CaptionError(f"{place} has half a letter (a lone surrogate) in {name}; correct or remove the row")
            return row[name]
    raise CaptionError(f"{place} has {', '.join(map(str, row))} and no text in {' or '.join(names)}; name its column")
