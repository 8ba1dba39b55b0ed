"""Where may an instruction act? The difference that it makes to the denoised picture, over some noises and levels.

As in DiffEdit (Couairon et al. 2023) and Watch Your Steps (Mirzaei et al. 2024): |c - i|, the branches with the
picture, with and without the instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from .guidance import Branches
from .noise import SampleNoise

__all__ = ["NOISES", "SHARE", "SIGMAS", "WHOLE", "area_of", "relevance", "set_back"]

SIGMAS = (2.0, 4.0)
NOISES = 2
# By a study on photographs (docs/evaluation.md): an instruction for an object makes little difference at most places,
# one for the whole picture a third of its largest difference at half of them.
SHARE, WHOLE = 0.3, 0.2
EDITED_SHARE, EDITED_WHOLE = 0.25, 0.3  # of what an edit has changed, by the same study
LARGEST = 0.99


def relevance(
    branches: Branches,
    source: Tensor,
    cond: Any,
    *,
    sigmas: Sequence[float] = SIGMAS,
    noises: int = NOISES,
    draw: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """How much an instruction changes each place: (B, 1, h, w), in the latents' unit, 2 evaluations a noise and level.

    ``source`` (B, C, h, w) is the picture's clean latent. The noises are the same for every row, and for every call, so
    that an area depends on the picture and the instruction alone.
    """
    total = torch.zeros_like(source[:, :1])
    for number in range(noises):
        noise = SampleNoise([number]).draw(source[:1]) if draw is None else draw(number)
        for sigma in sigmas:
            found = branches(source + sigma * noise, sigma, cond, ["c", "i"])
            total = total + (found["c"] - found["i"]).abs().mean(1, keepdim=True)
    return total / (noises * len(sigmas))


def area_of(difference: Tensor, *, share: float = SHARE, whole: float = WHOLE) -> Tensor:
    """1 where an instruction may act and 0 elsewhere, (B, 1, h, w), of what ``relevance`` gives.

    Against each row's largest difference (its 99th percentile): places from ``share`` on and their neighbours. A row
    whose median reaches ``whole`` of it is an edit of the whole picture, and 1 everywhere.
    """
    flat = difference.flatten(1).float()
    largest = flat.quantile(LARGEST, dim=1)
    everywhere = flat.median(dim=1).values >= whole * largest
    near = max_pool2d((difference >= share * largest.view(-1, 1, 1, 1)).to(difference.dtype), 3, stride=1, padding=1)
    return torch.where(everywhere.view(-1, 1, 1, 1), torch.ones_like(near), near)


def set_back(edited: Tensor, source: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """(the edited latents with the source's outside of the area, the area); all (B, C, h, w).

    The area is the given one and, beside it, where the edit has made a change of its own: an object that was added
    where nothing said that it would be is not cut off. No edit is lost by its area, only what it did by the way.
    """
    change = area_of((edited - source).abs().mean(1, keepdim=True), share=EDITED_SHARE, whole=EDITED_WHOLE)
    area = torch.maximum(area, change)
    return torch.where(area > 0, edited, source), area
