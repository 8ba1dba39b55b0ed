"""What a method is measured on: pictures with their instruction, captions and seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from PIL import Image

from ..captions.edits import in_test_split
from ..data.reading import Reading, open_pairs
from ..data.record import PairRecord
from ..data.split import test_rows
from ..errors import ConfigError, DatasetError
from ..images import fit, open_image, plan_size

__all__ = ["Sample", "StoreSamples", "batches", "in_test_split"]

SPLITS = ("test", "all")
"""The product's own; other names are the set's."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One edit to measure, RGB pictures, with the seed that every method gives it."""

    key: str
    source: Image.Image
    instruction: str
    caption: str
    edited_caption: str
    seed: int
    target: Image.Image | None = None
    """What the edit should look like, where that is known."""

    @property
    def has_direction(self) -> bool:
        """Whether its captions say a change: both are there, and they differ."""
        before, after = self.caption.strip(), self.edited_caption.strip()
        return bool(before and after) and before != after


class StoreSamples(Sequence[Sample]):
    """Samples of a data set, read when they are asked for; the pair's edited picture is the target."""

    def __init__(
        self,
        folder: Path | str,
        reading: Reading | None = None,
        *,
        split: str = "test",
        count: int | None = None,
        seed: int = 0,
    ) -> None:
        """``count`` samples spread evenly over the split (None: all); sample n has the seed ``seed`` + n.

        ``split``: test, one caption in twenty; all; or the name of one that the set itself has.
        Raises ConfigError for no samples, DatasetError where there is nothing to measure.
        """
        if count is not None and count < 1:
            raise ConfigError(f"{count} samples were asked for; give a whole number of at least 1")
        reading = reading or Reading()
        reading = reading if split in SPLITS else replace(reading, split=split)
        self._store, self._seed = open_pairs(folder, reading), seed
        self.pairs, self.split = self._store, split
        columns = self._store.columns("original_prompt", "edited_prompt")
        captions = columns["original_prompt"]
        rows = list(range(len(captions)))
        if split == "test":
            rows = test_rows(self._store, [text or "" for text in captions])[1]
        if not rows:
            got = f"{folder} has no pairs in its {split} split ({len(captions)} in all)"
            raise DatasetError(f"{got}; bring more, or give split all, which measures on what was trained on too")
        wanted = min(len(rows) if count is None else count, len(rows))
        self._rows = [rows[n * len(rows) // wanted] for n in range(wanted)]
        texts = [[(column[n] or "").strip() for column in columns.values()] for n in self._rows]
        self.captioned = sum(all(both) for both in texts)
        """How many have both captions."""

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        row = self._rows[index]
        return _sample(self._store[row], row, self._seed + index % len(self))


def _sample(pair: PairRecord, row: int, seed: int) -> Sample:
    return Sample(
        key=pair.key or f"row/{row}",
        source=open_image(pair.original_image),
        target=open_image(pair.edited_image),
        instruction=pair.edit_prompt,
        caption=pair.original_prompt,
        edited_caption=pair.edited_prompt,
        seed=seed,
    )


def batches(samples: Sequence[Sample], size: int, resolution: int) -> Iterator[list[Sample]]:
    """At most ``size`` samples of one picture size at a time, fitted by the paper's 64 rule."""
    for start in range(0, len(samples), size):
        by_size: dict[tuple[int, int], list[Sample]] = {}
        for sample in samples[start : start + size]:
            by_size.setdefault(plan_size("paper", *sample.source.size, resolution), []).append(sample)
        yield from ([_fitted(sample, planned) for sample in group] for planned, group in by_size.items())


def _fitted(sample: Sample, size: tuple[int, int]) -> Sample:
    target = None if sample.target is None else fit(sample.target, size)
    return replace(sample, source=fit(sample.source, size), target=target)
