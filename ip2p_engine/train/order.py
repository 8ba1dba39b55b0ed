"""Which examples a step sees: a function of (seed, step) alone, on one process as on many."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from ..errors import DatasetError
from .config import TrainConfig
from .crops import Size, bucket_shapes, nearest_shape
from .draws import stream
from .sources import Rows, Stream, open_pair

__all__ = ["Order", "Place", "make_order"]

LOOK_AHEAD = 16


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


def make_order(source: Any, config: TrainConfig) -> Order:
    """Shuffled epochs, buckets, or a stream."""
    if not hasattr(source, "__len__"):
        return _StreamOrder(source, config)
    return _BucketOrder(source, config) if config.buckets else _ShuffledOrder(len(source), config)


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


class _BucketOrder:
    """Each step's batch has one shape; a shape's last batch of an epoch is filled up from its first examples."""

    def __init__(self, source: Rows, config: TrainConfig) -> None:
        self._count, self._config, self._shapes = len(source), config, bucket_shapes(config.resolution)
        self._bucket = torch.tensor([self._shape_of(source, row) for row in range(len(source))])

    def walk(self, first: int) -> Iterator[list[Place]]:
        step, epoch = 0, 0
        while True:
            for shape, rows in self._epoch(epoch):
                if step >= first:
                    yield [self._place(step, n, self._shapes[shape], row) for n, row in enumerate(rows)]
                step += 1
            epoch += 1

    def _epoch(self, epoch: int) -> list[tuple[int, list[int]]]:
        batch, order = self._config.batch_size, _shuffled(self._config.seed, epoch, self._count)
        batches = []
        for shape in self._bucket.unique().tolist():
            rows = order[self._bucket[order] == shape].tolist()
            for start in range(0, len(rows), batch):
                chosen = [rows[(start + n) % len(rows)] for n in range(batch)]
                batches.append((shape, chosen))
        mixed = torch.randperm(len(batches), generator=stream(self._config.seed, "buckets", epoch))
        return [batches[n] for n in mixed.tolist()]

    def _place(self, step: int, position: int, size: Size, row: int) -> Place:
        return Place(step=step, position=position, size=size, candidates=range(row, row + self._count))

    def _shape_of(self, source: Rows, row: int) -> int:
        """Of the picture; a broken row, for which another stands in, goes with the squares."""
        side = self._config.resolution
        try:
            return nearest_shape(open_pair(source[row]).original.size, self._shapes)
        except DatasetError:
            return nearest_shape((side, side), self._shapes)


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


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=stream(seed, "epoch", epoch))
