"""From places in the order to tensors: this process's share of each step, in micro-batches, decoded by workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import ConfigError, DatasetError
from ..networks.conditioning import even
from .augment import crop_mask, crop_pair, draw_crop, size_ids
from .config import TrainConfig
from .order import Order, Place
from .randomness import Draws, draw, stream
from .sources import Example, open_pair

__all__ = ["Batch", "PictureReader", "Reader", "Sample", "Share", "batches", "drawn_instruction", "outlive_signals"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One example as a row of Batch's tensors."""

    instruction: str
    tensors: dict[str, Tensor]


class Reader(Protocol):
    """How a candidate becomes a sample."""

    def read(self, candidate: Any, place: Place) -> Sample:
        """Raises DatasetError for a broken row."""
        ...

    def latent_shape(self, place: Place) -> tuple[int, int, int]: ...


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of each step's batch this process computes, and in how large pieces."""

    rank: int
    world: int
    micro: int

    @classmethod
    def of(cls, config: TrainConfig, rank: int, world: int) -> Share:
        """Raises ConfigError if the batch cannot be shared evenly."""
        if config.batch_size % world:
            raise ConfigError(f"batch_size is {config.batch_size} and {world} processes share it; give a multiple")
        return cls(rank=rank, world=world, micro=config.micro_batch or config.batch_size // world)

    def cut(self, places: Sequence[Place]) -> list[Sequence[Place]]:
        """This process's micro-batches of a step."""
        own = places[self.rank :: self.world]
        return [own[start : start + self.micro] for start in range(0, len(own), self.micro)]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch of n examples.

    ``tensors`` holds pixels, uint8 (n, 2, 3, H, W), before and after; or, from a cache, mean, std and condition
    (n, 4, h, w) and tokens (n, 77 chunks, width); and for both size_ids (n, 6). Where the run asks for masks also mask,
    white (255) where a picture was edited: uint8 (n, 1, H, W), from a cache its means over the latent's places.
    """

    instructions: tuple[str, ...]
    tensors: dict[str, Tensor]
    draws: Draws
    broken: tuple[str, ...]
    """What was wrong with rows that others stand in for, a sentence each."""

    def __len__(self) -> int:
        return len(self.instructions)

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on a device; copies from pinned memory do not wait.

        Noise levels stay: they are float64, which many devices have not.
        """
        tensors = {name: value.to(device, non_blocking=True) for name, value in self.tensors.items()}
        draws = {name: value for name, value in vars(self.draws).items() if name != "level"}
        moved = {name: value.to(device, non_blocking=True) for name, value in draws.items()}
        return replace(self, tensors=tensors, draws=Draws(**moved, level=self.draws.level))

    def pin_memory(self) -> Batch:
        """Called by DataLoader."""
        tensors = {name: value.pin_memory() for name, value in self.tensors.items()}
        draws = Draws(**{name: value.pin_memory() for name, value in vars(self.draws).items()})
        return replace(self, tensors=tensors, draws=draws)


class PictureReader:
    """Decodes, crops and mirrors; the crop follows from the example's place."""

    def __init__(self, source: Any, config: TrainConfig, *, masks: bool = False) -> None:
        self._source, self._config, self._masks = source, config, masks

    def read(self, candidate: Any, place: Place) -> Sample:
        example = candidate if isinstance(candidate, Example) else self._source[candidate % len(self._source)]
        drawn = drawn_instruction(example, self._config.seed, place.step, place.position)
        pair = open_pair(example, drawn, masks=self._masks)
        generator = stream(self._config.seed, "crop", place.step, place.position)
        crop = draw_crop(pair.original.size, place.size, self._config, generator)
        tensors = {"pixels": crop_pair((pair.original, pair.edited), crop), "size_ids": size_ids(crop)}
        tensors |= {"mask": crop_mask(pair.mask, crop)} if self._masks else {}
        return Sample(instruction=pair.instruction, tensors=tensors)

    def latent_shape(self, place: Place) -> tuple[int, int, int]:
        return (4, place.size[1] // 8, place.size[0] // 8)


def drawn_instruction(example: Example, *seed: Any) -> int:
    """Which of an example's instructions is taken; it follows from the example's place."""
    if not isinstance(example.instruction, tuple):
        return 0
    return int(torch.randint(2**31, (), generator=stream(seed[0], "instruction", *seed[1:])))


def batches(reader: Reader, order: Order, config: TrainConfig, share: Share, first: int) -> Iterator[Batch]:
    """This process's micro-batches in order, from step ``first`` on; raises DatasetError if no row can be read."""
    loader = DataLoader(
        _MicroBatches(reader, order, config, share, first),
        batch_size=None,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or it would draw a seed for its workers from the global one
        worker_init_fn=outlive_signals,
    )
    return map(_checked, loader)


def outlive_signals(worker: int) -> None:
    """Leave Ctrl-C, the terminal's end and the first SIGTERM, which reach a whole group, to the process that saves."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # A second one is that process's own at its end, which waits for the worker.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _checked(made: Batch | DatasetError) -> Batch:
    if isinstance(made, DatasetError):
        raise made
    return made


class _MicroBatches(IterableDataset):
    """Worker w of W makes micro-batches w, w + W, ...; DataLoader takes them in turn, so their order is kept."""

    def __init__(self, reader: Reader, order: Order, config: TrainConfig, share: Share, first: int) -> None:
        self._reader, self._order, self._config, self._share, self._first = reader, order, config, share, first

    def __iter__(self) -> Iterator[Batch | DatasetError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            for places in islice(self._cut(), number, None, workers):
                yield self._make(places)
        except DatasetError as error:  # raised in a worker it would arrive as the text of its traceback
            yield error

    def _cut(self) -> Iterator[Sequence[Place]]:
        steps = self._config.steps - self._first
        for places in islice(self._order.walk(self._first), steps):
            yield from self._share.cut(places)

    def _make(self, places: Sequence[Place]) -> Batch:
        broken: list[str] = []
        samples = [_first_good(self._reader, place, broken) for place in places]
        names = samples[0].tensors
        rows = {name: [sample.tensors[name] for sample in samples] for name in names}
        tensors = {name: torch.stack(even(of) if name == "tokens" else of) for name, of in rows.items()}
        shape = self._reader.latent_shape(places[0])
        draws = draw(self._config.seed, places[0].step, [place.position for place in places], shape)
        instructions = tuple(sample.instruction for sample in samples)
        return Batch(instructions=instructions, tensors=tensors, draws=draws, broken=tuple(broken))


def _first_good(reader: Reader, place: Place, broken: list[str]) -> Sample:
    for candidate in place.candidates:
        try:
            return reader.read(candidate, place)
        except DatasetError as error:
            broken.append(str(error))
    raise DatasetError(f"{len(place.candidates)} rows one after the other cannot be read; the last: {broken[-1]}")
