"""Randomness as an argument: one CPU generator per sample.

A picture then depends on its own seed alone: not on the batch it was made in, not on its device, not on the order, but
for rounding, since networks add up in another order there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError

__all__ = ["MAX_SEED", "SampleNoise", "check_seed"]

MAX_SEED = 2**63 - 1


class SampleNoise:
    """Unit normal noise for a batch, each sample from its own stream.

    The first draw is the start noise, each further one a step's noise, in the order of the paper's code after
    ``torch.manual_seed(seed)`` on a CPU.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        """Raises ConfigError for a seed outside 0 .. 2**63 - 1."""
        self._generators = [torch.Generator().manual_seed(check_seed(seed)) for seed in seeds]

    def draw(self, like: Tensor) -> Tensor:
        """Noise of the shape, device and dtype of ``like`` (B, ...), with B = number of seeds; drawn in float32."""
        return self._rows(like).to(like)

    def ahead(self, steps: int) -> Callable[[Tensor], Tensor]:
        """``draw`` for a walk of so many steps: the first call brings the noise of all of them to the device."""
        drawn: list[Tensor] = []

        def next_of(like: Tensor) -> Tensor:
            if like.device.type == "cpu":
                return self.draw(like)
            if not drawn:
                drawn.extend(torch.stack([self._rows(like) for _ in range(steps)]).to(like).unbind()[::-1])
            return drawn.pop()

        return next_of

    def _rows(self, like: Tensor) -> Tensor:
        return torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in self._generators])


def check_seed(seed: int) -> int:
    """The seed, if a generator can take it; raises ConfigError otherwise."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed is {seed!r}; give a whole number from 0 to {MAX_SEED}")
    return seed
