"""An examination of a checkpoint on held-out scenes and held-out phrasings, where the true edit is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from ..edit import EditConfig, EditResult, InstructPix2Pix
from ..images import to_images, to_tensor
from ..networks.conditioning import decode_latents, encode_image
from .grammar import Edit, sample_edits
from .judge import Verdict, judge_edit, read_scenes
from .world import render

__all__ = ["Examination", "Score", "examine"]

BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Score:
    """Fractions and mean PSNRs (dB) over some edits."""

    count: int
    success: float
    asked: float
    kept: float
    clear: float
    psnr: float
    background_psnr: float

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> Score:
        def mean(pick: Callable[[Verdict], float]) -> float:
            return sum(pick(v) for v in verdicts) / len(verdicts)

        return cls(
            count=len(verdicts),
            success=mean(lambda v: v.success),
            asked=mean(lambda v: v.asked),
            kept=mean(lambda v: v.kept),
            clear=mean(lambda v: v.reading.clear),
            psnr=mean(lambda v: v.psnr),
            background_psnr=mean(lambda v: v.background_psnr),
        )


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Scores over all edits and by kind; what the autoencoder alone would reach; time per edit."""

    overall: Score
    by_kind: dict[str, Score]
    ceiling: Score
    seconds_per_edit: float
    settings: dict[str, Any]
    edits: tuple[Edit, ...]
    verdicts: tuple[Verdict, ...]
    pictures: tuple[Image.Image, ...]

    def figures(self) -> dict[str, Any]:
        """The numbers alone, for JSON."""
        return {
            "overall": asdict(self.overall),
            "by_kind": {kind: asdict(score) for kind, score in self.by_kind.items()},
            "autoencoder_ceiling": asdict(self.ceiling),
            "seconds_per_edit": self.seconds_per_edit,
            "settings": self.settings,
        }


def examine(
    editor: InstructPix2Pix,
    *,
    count: int = 1000,
    seed: int = 7,
    config: EditConfig | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Examination:
    """Edit ``count`` held-out scenes, each with its own seed, and judge the results against the truth."""
    edits = sample_edits(count, seed=seed, held_out=True)
    started = time.perf_counter()
    results: list[EditResult] = []
    for start in range(0, count, BATCH):
        results += _edit_together(editor, edits[start : start + BATCH], seed + 1 + start, config)
        if on_progress is not None:
            on_progress(len(results), count)
    seconds = (time.perf_counter() - started) / count
    pictures = [result.image for result in results]
    verdicts = _judge(edits, pictures)
    kinds = sorted({edit.kind for edit in edits})
    return Examination(
        overall=Score.of(verdicts),
        by_kind={k: Score.of([v for v, e in zip(verdicts, edits, strict=True) if e.kind == k]) for k in kinds},
        ceiling=Score.of(_judge(edits, _round_trips(editor, edits))),
        seconds_per_edit=seconds,
        settings={name: results[0].settings[name] for name in ("text_cfg", "image_cfg", "steps", "sampler")},
        edits=tuple(edits),
        verdicts=tuple(verdicts),
        pictures=tuple(pictures),
    )


def _edit_together(
    editor: InstructPix2Pix, edits: Sequence[Edit], first_seed: int, config: EditConfig | None
) -> list[EditResult]:
    return editor.edit_each(
        [render(edit.source) for edit in edits],
        [edit.instruction for edit in edits],
        seeds=[first_seed + n for n in range(len(edits))],
        config=config,
        batch=len(edits),
    )


def _judge(edits: Sequence[Edit], pictures: Sequence[Image.Image]) -> list[Verdict]:
    readings = read_scenes(pictures)
    return [judge_edit(edit, picture, r) for edit, picture, r in zip(edits, pictures, readings, strict=True)]


def _round_trips(editor: InstructPix2Pix, edits: Sequence[Edit]) -> list[Image.Image]:
    """True results through the autoencoder and back: no edit can be nearer to the truth."""
    model, pictures = editor.model, []
    for start in range(0, len(edits), BATCH):
        truth = to_tensor([render(edit.target) for edit in edits[start : start + BATCH]])
        latents = encode_image(model, truth)
        scale = 1.0 if model.spec.scaled_condition else model.spec.latent_scale
        pictures += to_images(decode_latents(model, latents * scale))
    return pictures
