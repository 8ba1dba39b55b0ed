"""What is read of the steps that are done: their losses into the log and to whoever watches, and whether to stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from .checkpoints import latest
from .distributed import Sums, total
from .progress import Clock, Progress, check_loss
from .run_folder import RunFolder

__all__ = ["Watch"]


class Watch:
    """Reads a step's numbers once its device has made them.

    A GPU gets the next step's work before that, so it never waits to be asked; before anything is kept all are read.
    """

    def __init__(self, accelerator: Any, folder: RunFolder, clock: Clock) -> None:
        self.stopped = False
        """Whether somebody has asked to stop."""
        self._accelerator, self._folder, self._clock = accelerator, folder, clock
        self._unread: deque[tuple[int, float, Sums, Mapping[str, float]]] = deque()

    def after(
        self, step: int, loss: Tensor, rate: float, stop: bool, *, keeps: bool, **figures: float
    ) -> list[Progress]:
        """The steps that are read now; ``keeps``: something is to be kept of this one.

        ``loss`` is this process's share. Raises TrainingError for a loss that is not finite.
        """
        sums = total(self._accelerator, loss, float(stop))
        self.stopped |= stop and self._accelerator.num_processes == 1  # several have to agree on the step
        self._unread.append((step, rate, sums, figures))
        found = []
        while self._unread and (keeps or self.stopped or len(self._unread) > self._unread[-1][2].behind):
            found.append(self._read(*self._unread.popleft()))
        return found

    def _read(self, step: int, rate: float, sums: Sums, figures: Mapping[str, float]) -> Progress:
        mean, stops = sums.read()
        check_loss(step, mean, latest(self._folder.checkpoints))
        self.stopped |= stops > 0
        progress = self._clock.tick(step, mean, rate)
        self._folder.append({**asdict(progress), **figures})
        self._accelerator.log({"loss": mean, "learning_rate": rate}, step=step)
        return progress
