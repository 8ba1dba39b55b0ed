"""Does a pair differ as an edit model expects? Asked of a model that knows such edits, pair by pair.

The words help to predict the picture after from the picture before: told them, the model's error at a high noise level
is smaller than without (as diffusion models classify, Li et al. 2023). The words of another pair do not help, and
where the pictures are swapped they help from the picture after to the one before. What the model predicts out of noise
alone is what the picture after should be, by which casts and zooms are seen that the edit itself would hide.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..diffusion.noise import SampleNoise
from ..networks.conditioning import Conditioning, clean_latents, decode_pictures
from ..networks.denoiser import BranchDenoiser
from ..networks.model import Model
from .registration import Movement, registered

__all__ = ["Editor", "Expected", "Told", "judged"]

LEVEL, HIGHEST, NOISES, AT_ONCE, SIDE = 8.0, 14.0, 2, 16, 96
FOLLOWED, SHARE = 0.3, 0.5
"""Of the usual gain, below which the words are another's; a model that usually gains less does not know such edits."""
MOST, EXACT, LEAST_CAST, EVEN, ALIKE = 0.7, 3.0, 6.5, 0.5, 3.0
LEAST_GAIN, LEAST_ZOOM, MOST_ZOOM, LEAST_SHIFT = 0.025, 0.03, 0.13, 0.014
"""Between scenes as they are and planted ones, seed 23 of benchmarks/faults.py: casts of 4.5 and 9.2 levels, gains of
.020 and .031, zooms of .011 and .048. ``EXACT``: what the model has to meet for most pairs, or it is not asked."""

log = logging.getLogger(__name__)


class Editor(Protocol):
    """What ``InstructPix2Pix`` is."""

    model: Model

    def condition(self, images: Any, instructions: Any, /) -> Conditioning:
        """A row for each picture with its instruction."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the words gain, -1 to 1: (error without - error with) / their sum; and the picture after beside the one
    that is expected."""

    forth: float
    """Of the picture after, told the picture before."""
    back: float
    """Of the picture before, told the picture after."""
    cast: Any
    """The colour (3,) by which most cells differ, in levels of 255."""
    even: float
    """The share of cells that differ by that."""
    move: Movement
    side: int
    """Pixels of the longer side of what was compared."""


class Expected:
    """Pairs beside what an edit model expects of them, six evaluations each; 200 bytes a pair are kept."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._waiting: list[tuple[int, str, Image.Image, Image.Image]] = []
        self._rows: list[int] = []
        self._told: list[Told] = []

    def add(self, row: int, said: str, before: Image.Image, after: Image.Image) -> None:
        """One more pair, of pictures of one aspect."""
        if self._waiting and (len(self._waiting) >= AT_ONCE or self._waiting[0][2].size != before.size):
            self._ask()
        self._waiting.append((row, said, before, after if after.size == before.size else after.resize(before.size)))

    def compared(self) -> Iterator[tuple[str, int, str]]:
        """(fault, row, what was measured); nothing where the model does not know what is asked for in this set."""
        if self._waiting:
            self._ask()
        yield from ((name, self._rows[n], said) for n, name, said in judged(self._told))

    @torch.inference_mode()
    def _ask(self) -> None:
        rows, texts, before, after = zip(*self._waiting, strict=True)
        self._waiting = []
        one, other = (self._editor.condition(list(side), list(texts)) for side in (before, after))
        gains = zip(self._gain(one, other), self._gain(other, one), strict=True)
        for row, (forth, back), true, seen in zip(rows, gains, self._pictures(one), after, strict=True):
            self._rows.append(row)
            self._told.append(Told(forth=forth, back=back, **_beside(true, seen)))

    def _gain(self, told: Conditioning, wanted: Conditioning) -> list[float]:
        clean = clean_latents(self._editor.model, wanted.image).float()
        noise = SampleNoise([0]).draw(clean[:1])
        found = BranchDenoiser(self._editor.model)(clean + LEVEL * noise, LEVEL, told, ["c", "i"])
        with_words, without = ((found[name] - clean).square().mean((1, 2, 3)) for name in "ci")
        gain: Tensor = (without - with_words) / (without + with_words).clamp(min=1e-6)
        return gain.tolist()

    def _pictures(self, told: Conditioning) -> list[Image.Image]:
        like = torch.zeros_like(clean_latents(self._editor.model, told.image)).float()
        denoiser = BranchDenoiser(self._editor.model)
        drawn = (HIGHEST * SampleNoise([seed]).draw(like[:1]).expand_as(like) for seed in range(NOISES))
        clean = [denoiser(x, HIGHEST, told, ["c"])["c"] for x in drawn]
        return decode_pictures(self._editor.model, torch.stack(clean).mean(dim=0), AT_ONCE)


def _beside(true: Image.Image, seen: Image.Image) -> dict[str, Any]:
    """How a picture differs from what it should be: ``Told``'s last four."""
    scale = min(1.0, SIDE / max(seen.size))
    size = (max(8, round(seen.width * scale)), max(8, round(seen.height * scale)))
    cells = [np.asarray(one.resize((8, 8), Image.Resampling.BOX), dtype=np.float32) for one in (true, seen)]
    gap = (cells[1] - cells[0]).reshape(-1, 3)
    cast = np.median(gap, axis=0)
    even = float((np.abs(gap - cast).max(axis=1) <= ALIKE).mean())
    small = [np.asarray(one.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) for one in (true, seen)]
    return {"cast": cast, "even": even, "move": registered(*small), "side": max(size)}


def judged(told: Sequence[Told]) -> Iterator[tuple[int, str, str]]:
    """(number, fault, what was measured): words that gain less than half the usual, casts and offsets.

    A cast of a dark picture, or a zoom, can take the words' gain away; then both are said. An instruction that asks for
    the way back is a swapped pair: the same two pictures and words.
    Nothing where the model usually gains too little, no casts and offsets where it is usually inexact.
    """
    if not told:
        return
    usual = float(np.median([one.forth for one in told]))
    if usual < FOLLOWED:
        log.warning("the model does not know what this set asks for; it cannot judge its pairs")
        return
    exact = float(np.quantile([np.abs(one.cast).max() for one in told], MOST)) <= EXACT
    steady = float(np.quantile([one.move.gain for one in told], MOST)) < LEAST_GAIN
    for n, one in enumerate(told):
        if one.forth < SHARE * usual:
            name = "swapped" if one.back >= SHARE * usual else "instruction"
            yield n, name, f"its words gain {one.forth:.2f}, usually {usual:.2f}; back {one.back:.2f}"
        if exact and np.abs(one.cast).max() >= LEAST_CAST and one.even >= EVEN:
            yield n, "cast", "red {:+.0f}, green {:+.0f}, blue {:+.0f} against what is expected".format(*one.cast)
        if steady and one.move.gain >= LEAST_GAIN and (said := _moved(one)):
            yield n, "offset", f"{said} against what is expected"


def _moved(one: Told) -> str:
    if abs(one.move.zoom - 1) > MOST_ZOOM:
        return ""
    if abs(one.move.zoom - 1) >= LEAST_ZOOM:
        return f"zoomed by {one.move.zoom:.2f}"
    by = np.array([one.move.x, one.move.y]) / one.side
    return f"shifted by {by[0]:+.1%}, {by[1]:+.1%} of the side" if np.hypot(*by) >= LEAST_SHIFT else ""
