"""The randomness of training: every example of every step has streams of its own.

A draw follows from the run's seed, the step and the example's position in the step's whole batch, so results depend
neither on the number of processes nor on the size of micro-batches, and a resumed run draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b

import torch
from torch import Tensor

__all__ = ["Draws", "draw", "stream"]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What chance decides about the noising of a batch of B latents (B, C, h, w)."""

    drop: Tensor
    """r in [0, 1), (B,): which conditions are left out (guidance.conditioning_dropout)."""
    level: Tensor
    """u in [0, 1), (B,), float64: the noise level."""
    posterior: Tensor
    """Unit normal, (B, C, h, w): the sample of the edited picture's posterior."""
    noise: Tensor
    """Unit normal, (B, C, h, w)."""
    offset: Tensor
    """Unit normal, (B, C, 1, 1): of offset noise."""
    scales: Tensor
    """In [0, 1), (B, 2): where between its ends each guidance scale of a distillation lies."""


def stream(seed: int, *place: int | str) -> torch.Generator:
    """An independent CPU generator for a place, such as stream(seed, "noise", step, position)."""
    digest = blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(seed: int, step: int, positions: Sequence[int], shape: Sequence[int]) -> Draws:
    """The draws of some examples of a step; ``shape`` is a latent's (C, h, w)."""
    rows = [_draw_one(stream(seed, "noise", step, position), tuple(shape)) for position in positions]
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return Draws(**dict(zip((field.name for field in fields(Draws)), columns, strict=True)))


def _draw_one(generator: torch.Generator, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    drop, level = torch.rand(2, generator=generator, dtype=torch.float64)
    posterior, noise = torch.randn(2, *shape, generator=generator)
    offset = torch.randn(shape[0], 1, 1, generator=generator)
    return drop.float(), level, posterior, noise, offset, torch.rand(2, generator=generator)
