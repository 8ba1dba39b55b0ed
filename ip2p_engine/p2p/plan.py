"""What happens in which step of a pair's walk: shared self-attention, edited cross-attention, one picture or two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..diffusion.schedule import step_of
from .cross_attention import CrossControl, CrossMix

__all__ = ["PairPlan", "PairStep", "p2p_active", "sharing_rows"]


@dataclass(frozen=True, eq=False)
class PairStep:
    """What happens in one step of a walk, the same in both hosts."""

    early: bool
    """Whether the edited picture still follows the source's caption, so that both are one."""
    active: tuple[bool, ...]
    """Which pairs share their self-attention."""
    mix: CrossMix | None
    """What cross-attention does but attend; None for nothing."""


def p2p_active(step: int, steps: int, p2p_threshold: float) -> bool:
    """Whether a pair shares its self-attention in a step 0 .. steps - 1: while p > i / (n - 1) (the paper's code).

    p = 0 never shares, p = 0.3 shares 3 of 10 steps, p > 1 all. A single step is the first one: it shares if p > 0.
    """
    return p2p_threshold > step / max(1, steps - 1)


def sharing_rows(active: Sequence[bool], halves: int = 2) -> list[int]:
    """For each row of a batch, the row whose queries and keys it uses.

    The batch is ``halves`` blocks (the guidance branches in it), each of the pairs [source, edited, source, edited,
    ...]; ``active[k]`` says whether pair k shares. A source always uses its own.
    """
    block = [row for pair, shares in enumerate(active) for row in (2 * pair, 2 * pair + (not shares))]
    return [half * len(block) + row for half in range(halves) for row in block]


@dataclass(frozen=True, kw_only=True, eq=False)
class PairPlan:
    """What happens when, from the first step of a walk to the last."""

    sigmas: Sequence[float]
    """All n + 1 noise levels of the walk: which step a call belongs to follows from its sigma."""
    p2p_thresholds: Sequence[float]
    """p of each pair."""
    edited_prompt_start: float = 0.0
    """The fraction of the steps in which the edited picture still follows the source's caption."""
    cross_steps: float = 0.0
    """The fraction of the steps in which cross-attention maps are edited."""
    cross: CrossControl = CrossControl()

    def step(self, sigma: float) -> PairStep:
        """What happens at a noise level."""
        step, steps = step_of(sigma, self.sigmas), len(self.sigmas) - 1
        early = step < self.edited_prompt_start * steps
        active = tuple(p2p_active(step, steps, threshold) for threshold in self.p2p_thresholds)
        mix = None if early else self.cross.mix(editing=step < self.cross_steps * steps, watching=True)
        return PairStep(early, active, mix)
