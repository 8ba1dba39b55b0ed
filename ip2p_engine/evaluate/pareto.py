"""Which settings are worth having, and which one to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..clip.similarity import PairScores
from ..errors import ConfigError

__all__ = ["AutoPick", "Picked", "pareto_front"]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other beats: none is at least as high in both and higher in one.

    Equal points are all on the front.
    """
    order = sorted(range(len(points)), key=lambda n: points[n], reverse=True)
    front: list[int] = []
    best = float("-inf")
    for n in order:
        x, y = points[n]
        if y > best or (front and points[front[-1]] == (x, y)):
            front.append(n)
            best = y
    return sorted(front)


@dataclass(frozen=True, kw_only=True)
class Picked:
    """The chosen place, and whether any candidate kept the picture at all."""

    index: int
    keeps: bool


@dataclass(frozen=True, kw_only=True)
class AutoPick:
    """Follow the instruction most, among what keeps the picture.

    A result keeps the picture if its image similarity reaches ``min_sim_image``, the paper's own filter for ViT-L/14
    (section 3.1.2). Among those the highest directional similarity wins, the earlier one of equals. If none keeps the
    picture, the one nearest to it in image similarity is taken, and ``Picked.keeps`` is false.
    """

    min_sim_image: float = 0.7

    def __post_init__(self) -> None:
        if not -1 <= self.min_sim_image <= 1:
            raise ConfigError(f"min_sim_image is {self.min_sim_image!r}; give a cosine, -1 to 1")

    def pick(self, scores: Sequence[PairScores]) -> Picked:
        """The best of some candidates. Raises ConfigError without any."""
        if not scores:
            raise ConfigError("nothing to pick from; give at least one candidate")
        keeping = [n for n, one in enumerate(scores) if one.sim_image >= self.min_sim_image]
        if not keeping:
            return Picked(index=max(range(len(scores)), key=lambda n: scores[n].sim_image), keeps=False)
        return Picked(index=max(keeping, key=lambda n: scores[n].sim_direction), keeps=True)
