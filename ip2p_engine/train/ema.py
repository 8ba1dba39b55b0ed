"""The moving average of the weights, as the original keeps it (ldm/modules/ema.py): float32, with a warm-up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Average", "decay_at"]


def decay_at(updates: int, highest: float) -> float:
    """min(highest, (1 + n) / (10 + n)) for the n-th update, counted from 1: the first one has 2/11."""
    return min(highest, (1 + updates) / (10 + updates))


class Average:
    """Averages of some parameters. On a GPU it is updated on a stream of its own, beside the next step's work."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], highest: float) -> None:
        self._parameters, self._highest = dict(parameters), highest
        self.values: dict[str, Tensor] = {name: p.detach().clone().float() for name, p in parameters.items()}
        first = next(iter(self._parameters.values()))
        self._stream = torch.cuda.Stream(first.device) if first.is_cuda else None

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the parameters; ``updates`` counts this one. Call ``wait`` before the parameters change."""
        weight = 1 - decay_at(updates, self._highest)
        if self._stream is None:
            self._move(weight)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._move(weight)

    def wait(self) -> None:
        """Let what follows on the GPU come after the last update."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in the parameters' place until the block ends."""
        self.wait()
        raw = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._assign(self.values)
            yield
        finally:
            self._assign(raw)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def _move(self, weight: float) -> None:
        averages, current = list(self.values.values()), [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(averages, current, weight)
