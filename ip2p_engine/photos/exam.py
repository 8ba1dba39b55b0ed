"""An examination on held-out photographs and held-out phrasings, whose true results are known; tables and sheets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..edit import EditConfig, InstructPix2Pix
from ..evaluate.samples import Sample
from ..hooks import Hooks
from ..images import save_image, to_images, to_tensor
from ..networks.conditioning import decode_latents, encode_image
from ..strips import strip
from .baseline import fit_colour_table
from .judge import Verdict, judge_edit
from .tones import TONES
from .world import KINDS, LOCAL_KINDS, PhotoEdit, Pool

__all__ = [
    "Examination",
    "PhotoJudge",
    "Score",
    "exam_sheet",
    "exam_table",
    "examine",
    "judge_colour_tables",
    "judge_round_trips",
    "photo_samples",
]

SHOWN, HEIGHT = 40, 144
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Score:
    """Over some edits: the part done, and mean PSNRs in dB to the nearest right answer and away from the change."""

    count: int
    done: float
    nearest: float
    kept: float | None

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> Score:
        kept = [v.kept for v in verdicts if v.kept is not None]
        return cls(
            count=len(verdicts),
            done=_mean([float(v.done) for v in verdicts]),
            nearest=_mean([v.nearest for v in verdicts]),
            kept=_mean(kept) if kept else None,
        )


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Verdicts on edits, in the edits' order, with the pictures that were judged, (3, H, W) in [0, 1]."""

    edits: tuple[PhotoEdit, ...]
    verdicts: tuple[Verdict, ...]
    pictures: tuple[Tensor, ...]
    seconds_per_edit: float
    settings: dict[str, Any]

    @property
    def by_kind(self) -> dict[str, Score]:
        groups = {kind: [v for v, e in self._pairs() if e.kind == kind] for kind in KINDS}
        return {kind: Score.of(group) for kind, group in groups.items() if group}

    def share_done(self, kinds: Sequence[str] = KINDS) -> float:
        """The part done, every kind counting alike."""
        scores = self.by_kind
        return _mean([scores[kind].done for kind in kinds if kind in scores])

    def figures(self) -> dict[str, Any]:
        """The numbers alone, for JSON."""
        kept = [v.kept for v in self.verdicts if v.kept is not None]
        return {
            "done": self.share_done(),
            "done_whole_picture": self.share_done(tuple(TONES)),
            "done_local": self.share_done(LOCAL_KINDS),
            "worst_kind": min(score.done for score in self.by_kind.values()),
            "kept": _mean(kept) if kept else None,
            "seconds_per_edit": self.seconds_per_edit,
            "settings": self.settings,
            "by_kind": {kind: asdict(score) for kind, score in self.by_kind.items()},
        }

    def _pairs(self) -> list[tuple[Verdict, PhotoEdit]]:
        return list(zip(self.verdicts, self.edits, strict=True))


def examine(
    editor: InstructPix2Pix,
    edits: Sequence[PhotoEdit],
    *,
    seed: int = 8,
    config: EditConfig | None = None,
    hooks: Hooks | None = None,
) -> Examination:
    """Edit each source by its instruction, with its own seed, and judge the results."""
    hooks, started = hooks or Hooks(), time.perf_counter()
    pictures: list[Tensor] = []
    for start in range(0, len(edits), BATCH):
        hooks.check_stop(f"stopped after {start} of {len(edits)} edits")
        some = edits[start : start + BATCH]
        results = editor.edit_each(
            [_image(edit.source) for edit in some],
            [edit.instruction for edit in some],
            seeds=[seed + start + n for n in range(len(some))],
            config=config,
            size="keep",
            batch=BATCH,
        )
        pictures += [_pixels(result.image) for result in results]
        hooks.progress(len(pictures), len(edits))
    seconds = (time.perf_counter() - started) / len(edits)
    settings = {name: results[0].settings[name] for name in ("text_cfg", "image_cfg", "steps", "sampler")}
    return _judged(edits, pictures, seconds, settings)


def judge_round_trips(editor: InstructPix2Pix, edits: Sequence[PhotoEdit]) -> Examination:
    """True results through the autoencoder and back: what no edit can surpass."""
    pictures: list[Tensor] = []
    model, started = editor.model, time.perf_counter()
    for start in range(0, len(edits), BATCH):
        truth = to_tensor([_image(edit.target) for edit in edits[start : start + BATCH]])
        scale = 1.0 if model.spec.scaled_condition else model.spec.latent_scale
        decoded = decode_latents(model, encode_image(model, truth) * scale)
        pictures += [_pixels(image) for image in to_images(decoded)]
    return _judged(edits, pictures, (time.perf_counter() - started) / len(edits), {"picture": "autoencoder of truth"})


def judge_colour_tables(edits: Sequence[PhotoEdit], pool: Pool, *, seed: int = 0) -> Examination:
    """The baseline: a colour table fitted to each instruction on training photographs."""
    started = time.perf_counter()
    pictures = [fit_colour_table(edit, pool, seed=seed + n).apply(edit.source) for n, edit in enumerate(edits)]
    return _judged(edits, pictures, (time.perf_counter() - started) / len(edits), {"picture": "colour table"})


def photo_samples(edits: Sequence[PhotoEdit], *, seed: int = 8) -> tuple[list[Sample], PhotoJudge]:
    """Edits as the evaluations take them, sample n with the seed ``seed`` + n, and who judges them; no captions."""
    samples = [
        Sample(
            key=f"{n:06d}",
            source=_image(edit.source),
            target=_image(edit.target),
            instruction=edit.instruction,
            caption="",
            edited_caption="",
            seed=seed + n,
        )
        for n, edit in enumerate(edits)
    ]
    return samples, PhotoJudge({sample.key: edit for sample, edit in zip(samples, edits, strict=True)})


class PhotoJudge:
    """Says of pictures what the world's judge says."""

    def __init__(self, edits: dict[str, PhotoEdit]) -> None:
        self.edits = edits

    def __call__(self, samples: Sequence[Sample], pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """done, kept, nearest, and the kind of edit."""
        edits = [self.edits[sample.key] for sample in samples]
        verdicts = [judge_edit(edit, _pixels(picture)) for edit, picture in zip(edits, pictures, strict=True)]
        return [
            {"kind": edit.kind, **{name: getattr(verdict, name) for name in ("done", "kept", "nearest")}}
            for edit, verdict in zip(edits, verdicts, strict=True)
        ]


def _judged(edits, pictures: list[Tensor], seconds: float, settings: dict[str, Any]) -> Examination:
    verdicts = [judge_edit(edit, picture) for edit, picture in zip(edits, pictures, strict=True)]
    return Examination(
        edits=tuple(edits),
        verdicts=tuple(verdicts),
        pictures=tuple(pictures),
        seconds_per_edit=seconds,
        settings=settings,
    )


def _image(picture: Tensor):
    return to_images(picture[None] * 2 - 1)[0]


def _pixels(image) -> Tensor:
    return (to_tensor([image])[0] + 1) / 2


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean()) if values else float("nan")


def exam_table(examination: Examination) -> str:
    """A row a kind; every kind counts alike in the last ones."""
    lines = ["| kind | edits | done % | nearest dB | kept dB |", "|---|---|---|---|---|"]
    for kind, score in examination.by_kind.items():
        kept = "" if score.kept is None else f"{score.kept:.1f}"
        lines.append(f"| {kind} | {score.count} | {100 * score.done:.1f} | {score.nearest:.1f} | {kept} |")
    figures = examination.figures()
    count, kept = len(examination.edits), figures["kept"]
    lines.append(f"| **all** | {count} | **{100 * figures['done']:.1f}** | | {'' if kept is None else f'{kept:.1f}'} |")
    for name, kinds in (("whole picture", tuple(TONES)), ("local", LOCAL_KINDS)):
        lines.append(f"| {name} | | {100 * examination.share_done(kinds):.1f} | | |")
    lines.append(f"\n{figures['seconds_per_edit']:.2f} s an edit; {figures['settings']}")
    return "\n".join(lines)


def exam_sheet(examination: Examination, path: Path) -> None:
    """The first 40 results, unselected: source, result and a right answer of each."""
    shown = list(zip(examination.edits, examination.pictures, strict=True))[:SHOWN]
    trios = []
    for edit, picture in shown:
        images = to_images(torch.stack([edit.source, picture, edit.target]) * 2 - 1)
        trios.append(strip(images, ["", edit.instruction, "(truth)"], height=HEIGHT))
    save_image(_grid(trios), path)


def _grid(pictures: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for n, picture in enumerate(pictures):
        grid.paste(picture, (n % columns * width, n // columns * height))
    return grid
