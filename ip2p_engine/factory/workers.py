"""Who makes the candidates of a run: this process here, a cluster in ``cluster``; both give the same pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..clip.similarity import ClipSimilarity
from ..edit import Hooks, usable_device
from ..p2p.generator import PairConfig, PairGenerator
from ..storage import public_name
from .maker import CandidateMaker, FactoryConfig, MadeCaption, Task

__all__ = ["Crew", "CrewPlan", "LocalCrew", "local_crew", "shifted"]

DEFAULT_OPTIONS = {"weights": "ema"}


class Crew(Protocol):
    """Whoever makes the candidates."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the pictures' origin."""

    def batch_pairs(self) -> int:
        """Pairs in one batch, as many as every worker can hold."""

    def make(self, groups: Sequence[Sequence[Task]], batch_pairs: int, hooks: Hooks) -> Iterator[list[MadeCaption]]:
        """The groups' results in their order; ``hooks.on_progress`` counts candidates of all groups."""


@dataclass(frozen=True, kw_only=True)
class CrewPlan:
    """All that a worker needs to know."""

    checkpoint: str = "embedded-sd"
    options: dict[str, Any] = field(default_factory=dict)
    """More for ``load_model``, such as ``weights`` and ``base``."""
    device: str | None = None
    """None is a GPU if there is one."""
    dtype: torch.dtype | None = None
    pairs: PairConfig = field(default_factory=PairConfig)
    factory: FactoryConfig = field(default_factory=FactoryConfig)

    def maker(self) -> CandidateMaker:
        """Load the networks; raises CheckpointError or ConfigError."""
        device = usable_device(self.device)
        generator = PairGenerator.load(self.checkpoint, self.pairs, device=device, dtype=self.dtype, **self.options)
        scorer = ClipSimilarity.load(self.factory.clip, device=device)
        return CandidateMaker(generator, scorer, self.factory, self.origin())

    def origin(self) -> dict[str, str]:
        """The options that are not the default, for the manifest; one that names none was made with the default."""
        given = {name: value for name, value in self.options.items() if value != DEFAULT_OPTIONS.get(name)}
        return {name: public_name(value) for name, value in given.items()}


class LocalCrew:
    """This process, one group after another."""

    def __init__(self, maker: CandidateMaker) -> None:
        self._maker = maker

    def describe(self) -> dict[str, Any]:
        return self._maker.describe()

    def batch_pairs(self) -> int:
        return self._maker.batch_pairs()

    def make(self, groups: Sequence[Sequence[Task]], batch_pairs: int, hooks: Hooks) -> Iterator[list[MadeCaption]]:
        each, done = self._maker.config.candidates, 0
        total = each * sum(map(len, groups))
        for group in groups:
            yield self._maker.make(group, batch_pairs, shifted(hooks, done, total))
            done += each * len(group)


@contextmanager
def local_crew(plan: CrewPlan) -> Iterator[LocalCrew]:
    """This process as a crew; raises CheckpointError or ConfigError."""
    yield LocalCrew(plan.maker())


def shifted(hooks: Hooks, done: int, total: int) -> Hooks:
    """Progress of one group as progress of all."""
    show = hooks.on_progress
    moved = None if show is None else lambda finished, _: show(done + finished, total)
    return Hooks(on_progress=moved, on_step=hooks.on_step, should_stop=hooks.should_stop)
