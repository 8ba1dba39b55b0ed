"""The judge of the embedded world: which scene does a picture show, and is an edit right?

The world is finite, so reading a picture is a search for its nearest render (least squares, at half size). A reading
counts only if the picture is close enough to that render; a blob between two shapes reads as no scene at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from ..evaluate.metrics import BEST_PSNR, psnr
from .grammar import Edit
from .world import WORLD_SIZE, Scene, all_scenes, halved, object_mask, render, world_at_half_size

__all__ = ["Reading", "Verdict", "judge_edit", "read_scenes"]

CLEAR_PSNR = 20.0
CLEAR_OBJECT_PSNR = 17.0
CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The scene nearest to a picture, and how near: PSNR in dB over the whole picture and around the object."""

    scene: Scene
    psnr: float
    object_psnr: float

    @property
    def clear(self) -> bool:
        """Whether the picture shows that scene at all, and not something between two."""
        return self.psnr >= CLEAR_PSNR and self.object_psnr >= CLEAR_OBJECT_PSNR


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an edit did what was asked and nothing else; PSNRs against the true picture in dB."""

    reading: Reading
    asked: bool
    kept: bool
    psnr: float
    background_psnr: float

    @property
    def success(self) -> bool:
        return self.asked and self.kept and self.reading.clear


def read_scenes(pictures: Sequence[Image.Image]) -> list[Reading]:
    """The nearest scene of each picture; a picture of another size is resized to the world's first."""
    sharp = [_pixels(picture) for picture in pictures]
    queries = np.stack([halved(pixels) for pixels in sharp]).reshape(len(sharp), -1)
    templates, norms = _templates()
    nearest = [
        index
        for start in range(0, len(queries), CHUNK)
        for index in (norms - 2 * queries[start : start + CHUNK] @ templates.T).argmin(axis=1)
    ]
    return [_reading(all_scenes()[i], pixels) for i, pixels in zip(nearest, sharp, strict=True)]


def _reading(scene: Scene, pixels: np.ndarray) -> Reading:
    error = (_pixels(render(scene)) - pixels) ** 2
    around = error[_near_object(scene)].mean()
    return Reading(scene=scene, psnr=psnr(error.mean(), BEST_PSNR), object_psnr=psnr(around, BEST_PSNR))


def judge_edit(edit: Edit, picture: Image.Image, reading: Reading | None = None) -> Verdict:
    """Judge an edited picture against the truth."""
    reading = reading or read_scenes([picture])[0]
    asked, wrong = set(edit.source.differs(edit.target)), set(reading.scene.differs(edit.target))
    truth, pixels = _pixels(render(edit.target)), _pixels(picture)
    error = (truth - pixels) ** 2
    background = ~_near_object(edit.source) & ~_near_object(edit.target)
    return Verdict(
        reading=reading,
        asked=not asked & wrong,
        kept=wrong <= asked,
        psnr=psnr(error.mean(), BEST_PSNR),
        background_psnr=psnr(error[background].mean(), BEST_PSNR),
    )


def _near_object(scene: Scene) -> np.ndarray:
    """The object and what lies up to two steps along rows and columns from it."""
    near = np.pad(object_mask(scene) > 0, 2)
    for _ in range(2):
        near[1:-1, 1:-1] |= near[:-2, 1:-1] | near[2:, 1:-1] | near[1:-1, :-2] | near[1:-1, 2:]
    return near[2:-2, 2:-2]


def _pixels(picture: Image.Image) -> np.ndarray:
    """RGB in [0, 1], float32, shape (64, 64, 3)."""
    picture = picture.convert("RGB")
    if picture.size != (WORLD_SIZE, WORLD_SIZE):
        picture = picture.resize((WORLD_SIZE, WORLD_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(picture, dtype=np.float32) / 255


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """(halved renders as rows, their squared norms)."""
    rows = world_at_half_size().reshape(len(all_scenes()), -1)
    return rows, np.einsum("nd,nd->n", rows, rows)
