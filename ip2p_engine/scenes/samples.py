"""Held-out scenes as samples of the evaluator, and the judge as its judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..evaluate.samples import Sample
from .grammar import Edit, sample_edits
from .judge import judge_edit, read_scenes
from .world import render

__all__ = ["SceneJudge", "scene_samples"]


def scene_samples(count: int, *, seed: int = 7) -> tuple[list[Sample], SceneJudge]:
    """The edits of ``sample_edits(held_out=True)``, seeded as the examination does, and who judges them."""
    edits = sample_edits(count, seed=seed, held_out=True)
    samples = [_sample(edit, n, seed + 1 + n) for n, edit in enumerate(edits)]
    return samples, SceneJudge({sample.key: edit for sample, edit in zip(samples, edits, strict=True)})


def _sample(edit: Edit, number: int, seed: int) -> Sample:
    return Sample(
        key=f"{number:06d}",
        source=render(edit.source),
        target=render(edit.target),
        instruction=edit.instruction,
        caption=edit.caption,
        edited_caption=edit.edited_caption,
        seed=seed,
    )


class SceneJudge:
    """Says of pictures what the world's judge says: success, its parts, and decibels against the truth."""

    def __init__(self, edits: dict[str, Edit]) -> None:
        self._edits = edits

    def __call__(self, samples: Sequence[Sample], pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
        readings = read_scenes(pictures)
        return [self._verdict(*one) for one in zip(samples, pictures, readings, strict=True)]

    def _verdict(self, sample: Sample, picture: Image.Image, reading: Any) -> dict[str, Any]:
        edit = self._edits[sample.key]
        verdict = judge_edit(edit, picture, reading)
        numbers = {name: getattr(verdict, name) for name in ("success", "asked", "kept", "psnr", "background_psnr")}
        return {"kind": edit.kind, **numbers}
