"""Captions for data sets that have none, and better instructions, by a model that sees both pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from ..captions.edits import CaptionEdit, Rejected, Request
from ..captions.server import PictureRequest, SeeingSource
from ..errors import CaptionError, DatasetError, ImageError
from ..hooks import Hooks, passing_over
from ..images import open_image
from .parquet import numbered
from .reading import Reading, open_pairs
from .record import PairRecord
from .store import PairWriter

__all__ = ["Described", "describe"]

SIDE = 512


@dataclass(frozen=True, kw_only=True)
class Described:
    """What became of the pairs of a call."""

    new: int
    rejected: int
    """Pairs that the model said nothing usable of; the same call asks about them again."""


def describe(
    folder: Path | str,
    out: Path | str,
    source: SeeingSource,
    reading: Reading | None = None,
    *,
    instructions: bool = False,
    hooks: Hooks | None = None,
) -> Described:
    """Write a data set's pairs with the captions that ``source`` sees, where they lack one, as a store.

    ``instructions`` replaces the instructions too, and asks about every pair. ``hooks.on_error``, or the log, hears of
    rows that cannot be used and of answers that say nothing usable. A stopped call goes on. Raises DatasetError,
    CaptionError, or Interrupted once ``hooks.should_stop()``.
    """
    hooks, new, rejected = passing_over(hooks), 0, 0
    pairs = open_pairs(folder, reading, hooks=hooks)
    about = {"described": str(folder), "model": source.name, "instructions": instructions}
    with PairWriter(out, manifest={"config": about}) as writer:
        done = writer.done_keys()
        for batch in _batches(numbered(pairs.outcomes()), source.batch):
            hooks.check_stop(f"stopped with {new} new pairs in {out}; the same call goes on")
            named = {n: pair for n, pair in _named(batch, hooks) if pair.key not in done}
            asked = {n: one for n, pair in named.items() if (one := _request(n, pair, instructions, hooks)) is not None}
            answers = dict(zip(asked, source.propose(list(asked.values())), strict=True))
            for n, pair in named.items():
                answer = answers.get(n)
                if isinstance(answer, Rejected):
                    rejected += 1
                    hooks.error(n, CaptionError(f"pair {pair.key}: {answer.reason} ({answer.text[:60]})"))
                elif answer is not None or not _lacks(pair, instructions):
                    writer.write(_told(pair, answer, instructions))
                    new += 1
            hooks.progress(batch[-1][0] + 1, len(pairs))
    return Described(new=new, rejected=rejected)


def _batches(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(rows, size)):
        yield batch


def _named(batch: Sequence[tuple[int, Any]], hooks: Hooks) -> Iterator[tuple[int, PairRecord]]:
    for number, found in batch:
        if isinstance(found, DatasetError):
            hooks.error(number, found)
        else:
            yield number, found if found.key else replace(found, key=f"row/{number}")


def _lacks(pair: PairRecord, instructions: bool) -> bool:
    return instructions or not (pair.original_prompt.strip() and pair.edited_prompt.strip())


def _request(number: int, pair: PairRecord, instructions: bool, hooks: Hooks) -> PictureRequest | None:
    if not _lacks(pair, instructions):
        return None
    try:
        before, after = (_small(data) for data in (pair.original_image, pair.edited_image))
    except ImageError as error:
        hooks.error(number, ImageError(f"pair {pair.key}: {error}"))
        return None
    return PictureRequest(**vars(Request.make(pair.key, 0, 0)), before=before, after=after)


def _small(data: bytes) -> bytes:
    picture, stream = open_image(data), io.BytesIO()
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    picture.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _told(pair: PairRecord, edit: CaptionEdit | None, instructions: bool) -> PairRecord:
    if edit is None:
        return pair
    changed: dict[str, Any] = {"original_prompt": edit.caption, "edited_prompt": edit.edited_caption}
    if instructions:
        return replace(pair, **changed, edit_prompt=edit.instruction, paraphrases=None)
    return replace(pair, **changed)
