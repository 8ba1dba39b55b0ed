"""What is asked of an editor: pictures, texts and seeds, laid out in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from .errors import ConfigError, ImageError
from .hooks import Hooks
from .images import Picture, Size, plan_size, upright_size
from .tokenizer import Words, token_chunks

__all__ = ["Job", "Work", "batches_of", "by_row"]


@dataclass(frozen=True)
class Job:
    """One picture to make: its place among the results, rows of the picture and the instruction, and the seed."""

    place: int
    picture: int
    instruction: int
    seed: int


@dataclass(frozen=True)
class Work:
    """Jobs, and the pictures and texts that they point to; pictures that are no Image yet are opened batch by batch."""

    jobs: Sequence[Job]
    pictures: Sequence[Picture]
    texts: Sequence[str]
    masks: Mapping[int, Picture] = field(default_factory=dict)
    """By the row of their picture."""
    controls: Mapping[int, Picture] = field(default_factory=dict)
    """What a ControlNet looks at, by the row of the picture that is edited."""


def by_row(given: Any, pictures: int, what: str, *, every: bool = False) -> dict[int, Picture]:
    """By the row of their picture: one for all, or one a picture. Raises ConfigError for another number."""
    rows = [given] * pictures if given is None or isinstance(given, Picture) else list(given)
    if len(rows) != pictures or (every and given is not None and None in rows):
        raise ConfigError(f"there are {len(rows)} {what} and {pictures} pictures; give one, or one a picture")
    return {row: one for row, one in enumerate(rows) if one is not None}


def batches_of(work: Work, config: Any, words: Words, hooks: Hooks) -> Iterator[tuple[Size | None, list[Job]]]:
    """Jobs of one size and length of text together, at most config.batch; size None: nothing is to do."""
    sizes: dict[int, Size] = {}
    for row in sorted({job.picture for job in work.jobs}):
        picture = work.pictures[row]
        try:
            sizes[row] = picture.size if isinstance(picture, Image.Image) else upright_size(picture)
        except ImageError as error:
            hooks.error(row, error)
    rows = sorted({job.instruction for job in work.jobs})
    chunks = {row: len(token_chunks(f"{work.texts[row]}{config.suffix}", words=words)) for row in rows}
    groups: dict[tuple[Size | None, int], list[Job]] = {(None, 1): []}
    for job in work.jobs:
        if job.picture in sizes:
            busy = work.texts[job.instruction].strip()
            size = plan_size(config.size, *sizes[job.picture], config.resolution) if busy else None
            groups.setdefault((size, chunks[job.instruction]), []).append(job)
    for (size, _), members in groups.items():
        for start in range(0, len(members), config.batch):
            yield size, members[start : start + config.batch]
