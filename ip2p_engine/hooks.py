"""What a host may watch and stop: one set of hooks for all long work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import Interrupted

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["QUIET", "Hooks", "OnProgress", "OnStep", "ShouldStop", "passing_over"]

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int, str], None]
OnStep = Callable[[int, int, "Tensor", float, "Tensor"], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a host may watch and stop; whatever is None is not asked."""

    on_progress: OnProgress | None = None
    """Called with (finished, all, note): edits, pairs, training steps, rows; the note is for people, often empty."""
    on_result: Callable[[int, Any], None] | None = None
    """Called with the place and the result of whatever has just been finished."""
    on_error: Callable[[int, Exception], None] | None = None
    """Called with the place and the error of what is broken and left out.

    Where it is None the error is raised, or logged by functions that pass over broken rows.
    """
    on_step: OnStep | None = None
    """Called with (i, n, x, sigma, denoised) once a sampling step, before x moves on."""
    should_stop: ShouldStop | None = None
    """Asked before each step, row or batch; Interrupted is raised as soon as it says yes."""

    def check_stop(self, said: str = "stopped, as asked") -> None:
        """Raises Interrupted, with this sentence, once ``should_stop()``."""
        if self.should_stop is not None and self.should_stop():
            raise Interrupted(said)

    def progress(self, finished: int, total: int, note: str = "") -> None:
        """Say how far the work is, if anybody wants to know."""
        if self.on_progress is not None:
            self.on_progress(finished, total, note)

    def result(self, place: int, result: Any) -> None:
        """Hand on a result, if anybody wants it."""
        if self.on_result is not None:
            self.on_result(place, result)

    def error(self, place: int, error: Exception) -> None:
        """Say what is left out; raises the error if nobody wants to know."""
        if self.on_error is None:
            raise error
        self.on_error(place, error)


QUIET = Hooks(on_error=lambda *_: None)
"""Of those who read once more what they have heard the errors of."""


def passing_over(hooks: Hooks | None) -> Hooks:
    """The hooks of work that leaves out what is broken: an error that nobody hears of goes to the log."""
    hooks = hooks or Hooks()
    if hooks.on_error is not None:
        return hooks
    return replace(hooks, on_error=lambda _, error: log.warning("left out: %s", error))
