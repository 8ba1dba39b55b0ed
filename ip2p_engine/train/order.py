"""Which examples a step sees: a function of (seed, step) alone, on one process as on many."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from ..errors import DatasetError
from ..hooks import Hooks
from .augment import Size, bucket_shapes, nearest_shape
from .config import TrainConfig
from .randomness import stream
from .sources import Rows, Several, Stream, size_of

__all__ = ["Order", "Place", "make_order"]

LOOK_AHEAD = 16
ASKED_EVERY = 100


@dataclass(frozen=True, kw_only=True)
class Place:
    """One example of a step."""

    step: int
    position: int
    """In the step's whole batch, 0 .. batch_size - 1."""
    size: Size
    candidates: Sequence[Any]
    """What to read: the example, then those that stand in if it is broken."""


class Order(Protocol):
    def walk(self, first: int) -> Iterator[list[Place]]:
        """The whole batch of each step, from step ``first`` on, without end."""
        ...


def make_order(
    source: Any,
    config: TrainConfig,
    broken: Collection[int] = (),
    hooks: Hooks | None = None,
) -> Order:
    """Shuffled epochs, buckets, or a stream.

    Buckets need each picture's size: rows known to be ``broken`` have none. Raises Interrupted if it is to stop then.
    """
    if not hasattr(source, "__len__"):
        return _StreamOrder(source, config)
    if isinstance(source, Several) and source.weights is not None:
        return _WeightedOrder(source, config)
    if config.buckets:
        return _BucketOrder(_buckets(source, config, broken, hooks or Hooks()), config)
    return _ShuffledOrder(len(source), config)


class _ShuffledOrder:
    """Epoch after epoch, each in its own order; a batch may reach into the next one, so none is short."""

    def __init__(self, count: int, config: TrainConfig) -> None:
        self._count, self._config = count, config

    def walk(self, first: int) -> Iterator[list[Place]]:
        step = first
        while True:
            yield [self._place(step, position) for position in range(self._config.batch_size)]
            step += 1

    def _place(self, step: int, position: int) -> Place:
        epoch, number = divmod(step * self._config.batch_size + position, self._count)
        row = int(_shuffled(self._config.seed, epoch, self._count)[number])
        size = (self._config.resolution,) * 2
        return Place(step=step, position=position, size=size, candidates=range(row, row + self._count))


class _WeightedOrder:
    """Of each example first the data set is drawn, then its next row; each set has epochs of its own."""

    def __init__(self, source: Several, config: TrainConfig) -> None:
        self._parts, self._config, self._count = source.parts(), config, len(source)
        self._weights = torch.tensor(source.weights, dtype=torch.float64)

    def walk(self, first: int) -> Iterator[list[Place]]:
        drawn, step = [0] * len(self._parts), 0
        while True:
            generator = stream(self._config.seed, "data set", step)
            sets = torch.multinomial(self._weights, self._config.batch_size, replacement=True, generator=generator)
            places = []
            for position, part in enumerate(sets.tolist()):
                if step >= first:
                    places.append(self._place(step, position, part, drawn[part]))
                drawn[part] += 1
            if step >= first:
                yield places
            step += 1

    def _place(self, step: int, position: int, part: int, number: int) -> Place:
        start, source = self._parts[part]
        epoch, number = divmod(number, len(source))
        row = start + int(_shuffled(self._config.seed, epoch, len(source))[number])
        size = (self._config.resolution,) * 2
        return Place(step=step, position=position, size=size, candidates=range(row, row + self._count))


class _BucketOrder:
    """Each step's batch has one shape; a shape's last batch of an epoch is filled up from its first examples."""

    def __init__(self, bucket: torch.Tensor, config: TrainConfig) -> None:
        self._bucket, self._config, self._shapes = bucket, config, bucket_shapes(config.resolution)

    def walk(self, first: int) -> Iterator[list[Place]]:
        step, epoch = 0, 0
        while True:
            for shape, batch in self._epoch(epoch):
                if step >= first:
                    size = self._shapes[shape]
                    yield [Place(step=step, position=n, size=size, candidates=rows) for n, rows in enumerate(batch)]
                step += 1
            epoch += 1

    def _epoch(self, epoch: int) -> list[tuple[int, list[_Candidates]]]:
        count = len(self._bucket)
        batch, order = self._config.batch_size, _shuffled(self._config.seed, epoch, count)
        batches = []
        for shape in self._bucket.unique().tolist():
            rows = order[self._bucket[order] == shape].tolist()
            for start in range(0, len(rows), batch):
                batches.append((shape, [_Candidates(rows, start + n, count) for n in range(batch)]))
        mixed = torch.randperm(len(batches), generator=stream(self._config.seed, "buckets", epoch))
        return [batches[n] for n in mixed.tolist()]


@dataclass(frozen=True)
class _Candidates(Sequence[Any]):
    """A row of a bucket, then the bucket's others, since cached ones cannot be cut anew; at last all rows."""

    rows: Sequence[int]
    first: int
    total: int

    def __len__(self) -> int:
        return len(self.rows) + self.total

    def __getitem__(self, n: Any) -> Any:
        if n >= len(self):
            raise IndexError(n)
        inside = n < len(self.rows)
        return self.rows[(self.first + n) % len(self.rows)] if inside else n - len(self.rows)


def _buckets(source: Rows, config: TrainConfig, broken: Collection[int], hooks: Hooks) -> torch.Tensor:
    """The number of each row's shape; what cannot be read goes with the commonest, of which others can stand in."""
    shapes, found = bucket_shapes(config.resolution), torch.full((len(source),), -1)
    for row in range(len(source)):
        if row % ASKED_EVERY == 0:
            hooks.check_stop(f"stopped after the sizes of {row} of {len(source)} pictures; the same call goes on")
        try:
            found[row] = -1 if row in broken else nearest_shape(size_of(source[row]), shapes)
        except DatasetError:
            continue
    known = found[found >= 0]
    return torch.where(found < 0, known.mode().values if len(known) else 0, found)


class _StreamOrder:
    """The stream's own order; every process walks all of it and decodes its share."""

    def __init__(self, source: Stream, config: TrainConfig) -> None:
        self._source, self._config = source, config

    def walk(self, first: int) -> Iterator[list[Place]]:
        batch, size = self._config.batch_size, (self._config.resolution,) * 2
        places: list[Place] = []
        for number, candidates in enumerate(self._windows()):
            step, position = divmod(number, batch)
            if step < first:
                continue
            places.append(Place(step=step, position=position, size=size, candidates=candidates))
            if len(places) == batch:
                yield places
                places = []

    def _windows(self) -> Iterator[tuple[Any, ...]]:
        """Each example with those that follow it."""
        window: deque[Any] = deque(maxlen=LOOK_AHEAD)
        for example in self._endless():
            window.append(example)
            if len(window) == LOOK_AHEAD:
                yield tuple(window)

    def _endless(self) -> Iterator[Any]:
        epoch = 0
        while True:
            seed = stream(self._config.seed, "epoch", epoch).initial_seed() % 2**32
            empty = True
            for example in self._source.epoch(seed):
                empty = False
                yield example
            if empty:
                raise DatasetError("the stream has no row; give a data set that has")
            epoch += 1


@lru_cache(maxsize=16)
def _shuffled(seed: int, epoch: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=stream(seed, "epoch", epoch))
