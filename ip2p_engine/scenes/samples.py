"""Held-out scenes as samples of the evaluator, and the judge as its judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..errors import ConfigError
from ..evaluate.samples import Sample
from .grammar import Edit, captions_of, sample_edits
from .judge import Reading, judge_edit, read_scenes
from .world import Scene, render

__all__ = ["SceneJudge", "scene_samples"]

CAPTIONS = {"full": 1, "short": 0}
"""Which of the grammar's wordings."""


def scene_samples(count: int, *, seed: int = 7, captions: str = "full") -> tuple[list[Sample], SceneJudge]:
    """The edits of ``sample_edits(held_out=True)``, seeded as the examination does, and who judges them.

    ``captions``: full ones say everything, so that a picture can be painted from its caption alone; short ones leave
    the place out, as captions of photographs leave most things out. Raises ConfigError for another kind.
    """
    if captions not in CAPTIONS:
        raise ConfigError(f"captions are {captions!r}; choose one of {', '.join(CAPTIONS)}")
    edits = sample_edits(count, seed=seed, held_out=True)
    samples = [_sample(edit, n, seed + 1 + n, CAPTIONS[captions]) for n, edit in enumerate(edits)]
    return samples, SceneJudge({sample.key: edit for sample, edit in zip(samples, edits, strict=True)})


def _sample(edit: Edit, number: int, seed: int, wording: int) -> Sample:
    return Sample(
        key=f"{number:06d}",
        source=render(edit.source),
        target=render(edit.target),
        instruction=edit.instruction,
        caption=captions_of(edit.source)[wording],
        edited_caption=captions_of(edit.target)[wording],
        seed=seed,
    )


class SceneJudge:
    """Says of pictures what the world's judge says: success, its parts, and decibels against the truth."""

    def __init__(self, edits: dict[str, Edit]) -> None:
        self.edits = edits

    def __call__(self, samples: Sequence[Sample], pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
        readings = read_scenes(pictures)
        return [self._verdict(*one) for one in zip(samples, pictures, readings, strict=True)]

    def _verdict(self, sample: Sample, picture: Image.Image, reading: Reading) -> dict[str, Any]:
        """The verdict's numbers; what was asked and what is read of it; what else changed."""
        edit = self.edits[sample.key]
        verdict = judge_edit(edit, picture, reading)
        attribute = next(n for n, before in vars(edit.source).items() if getattr(edit.target, n) != before)
        return {
            "kind": edit.kind,
            **{name: getattr(verdict, name) for name in ("success", "asked", "kept", "psnr", "background_psnr")},
            "clear": reading.clear,
            "attribute": attribute,
            "wanted": getattr(edit.target, attribute),
            "read": getattr(reading.scene, attribute),
            "changed": [n for n in vars(edit.source) if n != attribute and _differs(n, reading.scene, edit.target)],
        }


def _differs(attribute: str, scene: Scene, other: Scene) -> bool:
    return getattr(scene, attribute) != getattr(other, attribute)
