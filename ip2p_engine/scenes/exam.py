"""An examination of a checkpoint on held-out scenes and held-out phrasings, where the true edit is known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from PIL import Image

from ..clip.filter import PairScores
from ..edit import EditConfig, EditResult, InstructPix2Pix
from ..errors import ConfigError
from ..evaluate.measure import Row
from ..evaluate.methods import RoundTrip
from ..evaluate.run_folder import Table, text_of
from ..evaluate.samples import Sample
from ..evaluate.statistics import AutoPick
from ..hooks import Hooks
from .grammar import Edit, captions_of, sample_edits
from .judge import Reading, judge_edit, read_scenes
from .limits import DECIBELS, SHARES, edit_sheet, judged_mean, worst
from .world import render

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
SHOWN = ("text_cfg", "image_cfg", "steps", "sampler")


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
    def of(cls, rows: Sequence[Row]) -> Score:
        """Of rows with what the SceneJudge says under "judged"."""
        names = [field.name for field in fields(cls)][1:]
        return cls(count=len(rows), **{name: judged_mean(rows, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Scores over all edits and by kind; what the autoencoder alone would reach; time per edit."""

    overall: Score
    by_kind: dict[str, Score]
    ceiling: Score
    seconds_per_edit: float
    settings: dict[str, Any]
    samples: tuple[Sample, ...]
    rows: tuple[Row, ...]
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
    hooks: Hooks | None = None,
) -> Examination:
    """Edit ``count`` held-out scenes, each with its own seed, and judge the results against the truth."""
    hooks = hooks or Hooks()
    samples, judge = scene_samples(count, seed=seed)
    groups = [samples[start : start + BATCH] for start in range(0, count, BATCH)]
    started = time.perf_counter()
    results: list[EditResult] = []
    for group in groups:
        hooks.check_stop(f"stopped after {len(results)} of {count} edits")
        sources, texts, seeds = zip(*((one.source, one.instruction, one.seed) for one in group), strict=True)
        results += editor.edit_each(sources, texts, seeds=seeds, config=config, batch=len(group))
        hooks.progress(len(results), count)
    seconds = (time.perf_counter() - started) / count
    limit = RoundTrip(editor.model, name=editor.name)
    ceiling = [picture for group in groups for picture in limit.make(group, None, limit.settings[0]).edited]
    pictures = [result.image for result in results]
    rows = _rows(judge, samples, pictures)
    kinds = sorted({row["judged"]["kind"] for row in rows})
    return Examination(
        overall=Score.of(rows),
        by_kind={kind: Score.of([row for row in rows if row["judged"]["kind"] == kind]) for kind in kinds},
        ceiling=Score.of(_rows(judge, samples, ceiling)),
        seconds_per_edit=seconds,
        settings={name: results[0].settings[name] for name in SHOWN},
        samples=tuple(samples),
        rows=tuple(rows),
        pictures=tuple(pictures),
    )


def _rows(judge: SceneJudge, samples: Sequence[Sample], pictures: Sequence[Image.Image]) -> list[Row]:
    return [{"place": n, "judged": judged} for n, judged in enumerate(judge(samples, pictures))]


def as_text(result: Examination) -> str:
    """A table: one row a kind, then all, then what the autoencoder alone reaches."""
    scores = {**result.by_kind, "all": result.overall, "autoencoder": result.ceiling}
    settings = "  ".join(f"{name} {value}" for name, value in result.settings.items())
    table = Table(
        title="Edits of held-out scenes",
        columns=("kind", "n", *(f"{name} %" for name in SHARES), *(name.replace("_", " ") for name in DECIBELS)),
        rows=[(kind, score.count, *_cells(score)) for kind, score in scores.items()],
        note=f"{result.seconds_per_edit:.2f} s an edit   {settings}",
    )
    return text_of(table)


def _cells(score: Score) -> list[str]:
    shares = [f"{100 * getattr(score, name):.1f}" for name in SHARES]
    return [*shares, *(f"{getattr(score, name):.2f}" for name in DECIBELS)]


def worst_sheet(result: Examination, count: int = 24) -> Image.Image:
    """Failures first, the farthest from the truth on top."""
    return _sheet(result, worst(result.rows, count))


def first_sheet(result: Examination, count: int = 12) -> Image.Image:
    """The first edits of the examination, unselected."""
    return _sheet(result, result.rows[:count])


def _sheet(result: Examination, rows: Sequence[Row]) -> Image.Image:
    places = [row["place"] for row in rows]
    return edit_sheet([result.samples[n] for n in places], [result.pictures[n] for n in places], rows)


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

    def truths(self, samples: Sequence[Sample], pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """The same by the names that ``evaluate.recommend`` has for every world."""
        return [
            {"done": one["success"], "kept": one["background_psnr"], "nearest": one["psnr"], "kind": one["kind"]}
            for one in self(samples, pictures)
        ]

    def _verdict(self, sample: Sample, picture: Image.Image, reading: Reading) -> dict[str, Any]:
        """The verdict's numbers; what was asked and what is read of it; what else changed."""
        edit = self.edits[sample.key]
        verdict = judge_edit(edit, picture, reading)
        (attribute,) = edit.source.differs(edit.target)
        return {
            "kind": edit.kind,
            **{name: getattr(verdict, name) for name in ("success", "asked", "kept", "psnr", "background_psnr")},
            "clear": reading.clear,
            "attribute": attribute,
            "wanted": getattr(edit.target, attribute),
            "read": getattr(reading.scene, attribute),
            "changed": [name for name in reading.scene.differs(edit.target) if name != attribute],
        }


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
