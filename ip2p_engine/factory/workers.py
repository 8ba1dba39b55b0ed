"""Who makes the candidates of a run: this process or a Ray cluster, which give the same pairs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from ..clip.similarity import ClipSimilarity
from ..devices import usable_device
from ..errors import ConfigError, IP2PError, first_line
from ..files import public_name
from ..hooks import Hooks
from ..p2p.generator import PairConfig, PairGenerator
from .maker import CandidateMaker, FactoryConfig, MadeCaption, Task

__all__ = [
    "Workers",
    "WorkerPlan",
    "LocalWorkers",
    "RayWorkers",
    "local_workers",
    "ray_workers",
    "shifted",
]

# Groups that a worker may be ahead of the one that is to be written next; what is ahead is lost when a run is stopped.
AHEAD = 3
RETRIES = 3
POLL_SECONDS = 0.5
CONNECT_SECONDS = 5
DEFAULT_OPTIONS = {"weights": "ema"}


class Workers(Protocol):
    """Whoever makes the candidates."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the pictures' origin."""

    def batch_pairs(self) -> int:
        """Pairs in one batch, as many as every worker can hold."""

    def make(self, groups: Sequence[Sequence[Task]], batch_pairs: int, hooks: Hooks) -> Iterator[list[MadeCaption]]:
        """The groups' results in their order; ``hooks.on_progress`` counts candidates of all groups."""


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
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


class LocalWorkers:
    """This process, one group after another; on a GPU the pictures of one are finished while the next one walks."""

    def __init__(self, maker: CandidateMaker) -> None:
        self._maker = maker

    def describe(self) -> dict[str, Any]:
        return self._maker.describe()

    def batch_pairs(self) -> int:
        return self._maker.batch_pairs()

    def make(self, groups: Sequence[Sequence[Task]], batch_pairs: int, hooks: Hooks) -> Iterator[list[MadeCaption]]:
        each, done = self._maker.config.candidates, 0
        total = each * sum(map(len, groups))
        walked: Future[list[MadeCaption]] | None = None
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ip2p-pairs") as beside:
            for group in groups:
                try:
                    begun = self._maker.begin(group, batch_pairs, beside, shifted(hooks, done, total))
                except (Exception, KeyboardInterrupt):
                    if walked is not None:  # finished work is not lost with what stops the next
                        yield walked.result()
                    raise
                if walked is not None:
                    yield walked.result()
                walked = begun
                done += each * len(group)
                if not self._maker.overlaps:
                    yield walked.result()
                    walked = None
            if walked is not None:
                yield walked.result()


@contextmanager
def local_workers(plan: WorkerPlan) -> Iterator[LocalWorkers]:
    """This process as the only worker; raises CheckpointError or ConfigError."""
    yield LocalWorkers(plan.maker())


def shifted(hooks: Hooks, done: int, total: int) -> Hooks:
    """Progress of one group as progress of all."""
    return replace(hooks, on_progress=lambda finished, _, note: hooks.progress(done + finished, total, note))


class _Worker:
    """What runs in an actor; it loads when it is first asked, so that its errors come back as they are."""

    def __init__(self, plan: WorkerPlan) -> None:
        self._plan = plan

    @cached_property
    def _maker(self) -> CandidateMaker:
        return self._plan.maker()

    def describe(self) -> tuple[dict[str, Any], int, int]:
        """(what the manifest says, pairs in one batch, the process's id)."""
        return self._maker.describe(), self._maker.batch_pairs(), os.getpid()

    def make(self, group: Sequence[Task], batch_pairs: int) -> list[MadeCaption]:
        return self._maker.make(group, batch_pairs)


class RayWorkers:
    """The actors of a cluster."""

    def __init__(self, ray: Any, workers: list[Any], plan: WorkerPlan) -> None:
        self._ray, self._workers, self._plan = ray, workers, plan

    @cached_property
    def _described(self) -> list[tuple[dict[str, Any], int, int]]:
        return [self._get(reference) for reference in [worker.describe.remote() for worker in self._workers]]

    @property
    def processes(self) -> list[int]:
        """The workers' process ids when the run began."""
        return [process for _, _, process in self._described]

    def describe(self) -> dict[str, Any]:
        """Raises ConfigError if the workers would make different pairs, such as on CPUs and GPUs."""
        first, *others = (origin for origin, _, _ in self._described)
        for other in others:
            if other != first:
                differing = [name for name in first if first[name] != other.get(name)]
                raise ConfigError(f"the workers differ in {', '.join(differing)}; give `device` and `dtype`")
        return first

    def batch_pairs(self) -> int:
        return min(count for _, count, _ in self._described)

    def make(self, groups: Sequence[Sequence[Task]], batch_pairs: int, hooks: Hooks) -> Iterator[list[MadeCaption]]:
        """Whoever is free takes the next group; results are handed on in order."""
        each = self._plan.factory.candidates
        total, finished, begun, handed = each * sum(map(len, groups)), 0, 0, 0
        free, running, waiting = list(self._workers), {}, {}
        while handed < len(groups):
            hooks.check_stop()
            while free and begun < min(len(groups), handed + AHEAD * len(self._workers)):
                worker = free.pop()
                running[worker.make.remote(groups[begun], batch_pairs)] = (begun, worker)
                begun += 1
            for reference in self._ray.wait(list(running), timeout=POLL_SECONDS)[0]:
                number, worker = running.pop(reference)
                waiting[number] = self._get(reference)
                free.append(worker)
                finished += each * len(groups[number])
                hooks.progress(finished, total)
            while handed in waiting:
                yield waiting.pop(handed)
                handed += 1

    def _get(self, reference: Any) -> Any:
        """A result, or the worker's own error; a worker that dies again and again ends the run."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, IP2PError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            reason = first_line(error)
            advice = "see to the cluster, then repeat the same call"
            raise ConfigError(f"a worker was lost {RETRIES + 1} times ({reason}); {advice}") from error


@contextmanager
def ray_workers(plan: WorkerPlan, address: str, *, workers: int | None = None) -> Iterator[RayWorkers]:
    """Actors on the cluster at ``address``, or on this machine for "local"; one a GPU, without GPUs one a CPU.

    Raises ConfigError without ray, for an address where no cluster answers, or if its workers are busy elsewhere.
    """
    _refuse_silent(address)
    ray = _ray()
    try:
        ray.init(
            address=None if address == "local" else address,
            num_cpus=workers if address == "local" else None,
            include_dashboard=False if address == "local" else None,
            logging_level="ERROR",
            log_to_driver=False,
        )
    except Exception as error:  # ray raises nearly every class when it cannot start or connect
        reason = first_line(error)
        raise ConfigError(f'no Ray cluster at {address!r} ({reason}); start one, or give `cluster` "local"') from error
    try:
        gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
        needs = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
        count = workers or max(1, gpus or cpus)
        actor = ray.remote(_Worker).options(**needs, max_restarts=-1, max_task_retries=RETRIES)
        yield RayWorkers(ray, [actor.remote(plan) for _ in range(count)], plan)
    finally:
        ray.shutdown()


def _refuse_silent(address: str) -> None:
    """Ray tries an address for minutes; of host:port, the usual form, one connection tells whether anybody is there."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f'no Ray cluster at {address!r} ({error}); start one, or give `cluster` "local"') from error


def _ray() -> Any:
    # Nobody asked for reports of what is done here.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigError("`cluster` needs ray, which is missing; pip install 'ray[default]'") from error
    return ray
