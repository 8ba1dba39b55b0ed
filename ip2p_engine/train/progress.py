"""What a host sees of a run: progress after each step, and what is left at the end."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from ..errors import TrainingError

__all__ = ["Clock", "Progress", "TrainResult", "check_loss", "diverged"]

WINDOW = 20


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is, after a step."""

    step: int
    """Steps that are done."""
    steps: int
    loss: float
    """Mean over the step's whole batch."""
    learning_rate: float
    samples_per_second: float
    """Over the last 20 steps and all processes."""
    seconds_left: float

    @property
    def note(self) -> str:
        """For people, beside the count of steps."""
        return f"loss {self.loss:.4f}, {self.samples_per_second:.1f} samples/s"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run left."""

    step: int
    """Steps that are done; the same call goes on from here."""
    finished: bool
    loss: float
    """Mean of the last 50 steps."""
    checkpoint: Path | None
    """The last one to resume from."""
    curve: Path
    """A PNG of the loss."""
    files: dict[str, Path]
    """Of a finished run: ema and raw (LDM files), diffusers (a folder); with LoRA also lora, and perhaps conv_in."""
    broken: tuple[str, ...]
    """Rows that could not be used, a sentence each; the first 100."""
    broken_count: int


class Clock:
    """Steps a second over the last steps."""

    def __init__(self, steps: int, batch_size: int) -> None:
        self._steps, self._batch_size = steps, batch_size
        self._ticks = deque([time.monotonic()], maxlen=WINDOW + 1)

    def tick(self, step: int, loss: float, learning_rate: float) -> Progress:
        """Progress after a step that is done now."""
        self._ticks.append(time.monotonic())
        rate = (len(self._ticks) - 1) / max(1e-9, self._ticks[-1] - self._ticks[0])
        return Progress(
            step=step,
            steps=self._steps,
            loss=loss,
            learning_rate=learning_rate,
            samples_per_second=rate * self._batch_size,
            seconds_left=(self._steps - step) / rate,
        )


def check_loss(step: int, loss: float, checkpoint: Path | None) -> None:
    """Raises TrainingError for a loss that is not finite, naming what to go on from."""
    if not math.isfinite(loss):
        raise diverged(f"the loss of step {step} is {loss}", checkpoint)


def diverged(what: str, checkpoint: Path | None) -> TrainingError:
    """What to do about a loss or weight that is not finite."""
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written yet"
    return TrainingError(
        f"{what}; {kept}. Go on from there in the same folder with a lower learning_rate, clip_norm 1, or precision "
        "bfloat16"
    )
