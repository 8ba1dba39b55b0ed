"""An examination of a checkpoint on held-out scenes and held-out phrasings, where the true edit is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from PIL import Image

from ..clip.filter import PairScores
from ..edit import EditConfig, EditResult, InstructPix2Pix
from ..errors import ConfigError
from ..evaluate.measure import Row
from ..evaluate.report import tiled
from ..evaluate.samples import Sample
from ..evaluate.statistics import AutoPick
from ..images import strip, to_images, to_tensor
from ..networks.conditioning import decode_latents, encode_image
from .grammar import Edit, captions_of, sample_edits
from .judge import Reading, Verdict, judge_edit, read_scenes
from .world import Scene, render

__all__ = [
    "Examination",
    "SCENES_MIN_IMAGE",
    "SceneJudge",
    "Score",
    "as_text",
    "choices",
    "examine",
    "first_sheet",
    "scene_samples",
    "worst_sheet",
]

CAPTIONS = {"full": 1, "short": 0}
"""Which of the grammar's wordings."""
SCENES_MIN_IMAGE = 0.45
"""The embedded CLIP gives true edits an image similarity of 0.47 and more; the paper's 0.7 is for ViT-L/14."""
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


def as_text(result: Examination) -> str:
    """A table: one row a kind, then all, then what the autoencoder alone reaches."""
    head = f"{'':16}{'n':>6}{'success':>9}{'asked':>8}{'kept':>8}{'clear':>8}{'PSNR':>8}{'background':>12}"
    rows = [_row(kind, score) for kind, score in result.by_kind.items()]
    settings = "  ".join(f"{name} {value}" for name, value in result.settings.items())
    foot = f"{result.seconds_per_edit:.2f} s an edit   {settings}"
    return "\n".join([head, *rows, _row("all", result.overall), _row("autoencoder", result.ceiling), foot])


def worst_sheet(result: Examination, count: int = 24) -> Image.Image:
    """Failures first, the farthest from the truth on top: source, edit, truth, and the instruction."""
    order = sorted(range(len(result.edits)), key=lambda n: (result.verdicts[n].success, result.verdicts[n].psnr))
    return _sheet(result, order[:count])


def first_sheet(result: Examination, count: int = 12) -> Image.Image:
    """The first edits of the examination, unselected: source, edit, truth, and the instruction."""
    return _sheet(result, range(min(count, len(result.edits))))


def _sheet(result: Examination, numbers: Sequence[int], columns: int = 3) -> Image.Image:
    return tiled([_cell(result, n) for n in numbers], columns)


def _row(name: str, score: Score) -> str:
    fractions = "".join(f"{100 * value:>8.1f}" for value in (score.asked, score.kept, score.clear))
    decibels = f"{score.psnr:>8.2f}{score.background_psnr:>12.2f}"
    return f"{name:16}{score.count:>6}{100 * score.success:>9.1f}{fractions}{decibels}"


def _cell(result: Examination, n: int) -> Image.Image:
    edit = result.edits[n]
    pictures = [render(edit.source), result.pictures[n], render(edit.target)]
    return strip(pictures, [edit.caption, edit.instruction, "truth"], height=128)


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


def choices(rows: Sequence[Row], auto: AutoPick, fixed: tuple[float, float]) -> dict[str, list[Row]]:
    """The rows that each way takes, one a sample: the fixed (s_T, s_I), the best pair on average, and the pick.

    The best on average is chosen with hindsight, on these very samples: what a fixed pair could reach at most. Raises
    ConfigError if the fixed pair is not in the grid.
    """
    by_sample: dict[str, list[Row]] = {}
    by_pair: dict[tuple[float, float], list[Row]] = {}
    for row in rows:
        by_sample.setdefault(row["sample"], []).append(row)
        by_pair.setdefault((row["text_cfg"], row["image_cfg"]), []).append(row)
    if fixed not in by_pair:
        raise ConfigError(f"{fixed} is not in the grid; add it, to compare with")
    best = max(by_pair, key=lambda pair: sum(row["judged"]["success"] for row in by_pair[pair]))
    return {
        "fixed {:g} / {:g}".format(*fixed): by_pair[fixed],
        "best fixed, in hindsight: {:g} / {:g}".format(*best): by_pair[best],
        f"automatic, image similarity >= {auto.min_sim_image:g}": [
            group[auto.pick([_scores(row) for row in group]).index] for group in by_sample.values()
        ],
    }


def _scores(row: Row) -> PairScores:
    return PairScores(**{field.name: row[field.name] for field in fields(PairScores)})
