"""What InstructPix2Pix is known to fail at (the paper, section 5; docs/limits.md), as scenes, and what happens instead.

Each case names the pictures that may come out. A result is the one it is nearest to, or none of them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from ..edit import EditConfig, InstructPix2Pix
from ..evaluate.measure import Row
from ..evaluate.metrics import BEST_PSNR, psnr
from ..evaluate.report import tiled
from ..evaluate.run_folder import Table
from ..evaluate.samples import Sample
from ..strips import strip
from .grammar import scenes_of
from .judge import CLEAR_OBJECT_PSNR
from .world import COLOURS, PLACES, SHAPES, WORLD_SIZE, Scene, render, render_two

__all__ = [
    "CASES",
    "Case",
    "Outcome",
    "compare",
    "confusions",
    "edit_sheet",
    "judged_mean",
    "limit_rows",
    "limit_sheet",
    "limit_table",
    "make_cases",
    "outcomes",
    "side_effects",
    "summary",
    "worst",
]

SHARES, DECIBELS = ("success", "asked", "kept", "clear"), ("psnr", "background_psnr")
COSINES = ("sim_direction", "sim_image")
ASKED, UNCHANGED, NONE = "as asked", "unchanged", "something else"
ZOOM = 1.5
REGION_PSNR = CLEAR_OBJECT_PSNR


@dataclass(frozen=True, kw_only=True)
class Case:
    """A picture, what is asked, and what may come out, by name; "as asked" is among it."""

    kind: str
    source: Image.Image
    instruction: str
    results: dict[str, Image.Image]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an edit of a case came out as."""

    case: Case
    picture: Image.Image
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the edit: its seed, guidance, steps, checkpoint."""


def make_cases(kind: str, count: int, *, seed: int = 7) -> list[Case]:
    """Cases of one kind, from held-out scenes of plain style."""
    draw = random.Random(f"{kind} {seed}")
    plain = [scene for scene in scenes_of(held_out=True) if scene.style == "plain"]
    return [CASES[kind](draw.choice(plain), draw) for _ in range(count)]


def outcomes(
    editor: InstructPix2Pix, cases: Sequence[Case], *, seed: int = 7, config: EditConfig | None = None
) -> list[Outcome]:
    """Edit the cases, each with its own seed, and say what came out."""
    results = editor.edit_each(
        [case.source for case in cases],
        [case.instruction for case in cases],
        seeds=[seed + 1 + n for n in range(len(cases))],
        config=config,
    )
    return [
        Outcome(case=case, picture=result.image, name=_nearest(case, result.image), settings=result.settings)
        for case, result in zip(cases, results, strict=True)
    ]


def _nearest(case: Case, picture: Image.Image) -> str:
    """The nearest result, if it is near where the results differ from each other: elsewhere all of them agree."""
    values = {name: _pixels(result) for name, result in case.results.items()}
    region = np.ptp(np.stack(list(values.values())), axis=0).max(axis=-1) > 0.02
    errors = {name: ((value - _pixels(picture)) ** 2)[region].mean() for name, value in values.items()}
    name = min(errors, key=lambda one: errors[one])
    return name if psnr(errors[name], BEST_PSNR) >= REGION_PSNR else NONE


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.float64) / 255


def _zoom(scene: Scene, draw: random.Random) -> Case:
    scene = scene.with_(place="centre")
    source, side, out = render(scene), round(WORLD_SIZE / ZOOM), draw.random() < 0.5
    if out:
        target = Image.new("RGB", source.size, source.getpixel((0, 0)))
        target.paste(source.resize((side, side), Image.Resampling.LANCZOS), ((WORLD_SIZE - side) // 2,) * 2)
    else:
        edge = (WORLD_SIZE - side) // 2
        target = source.resize(source.size, Image.Resampling.BICUBIC, (edge, edge, edge + side, edge + side))
    words = "zoom out" if out else "zoom in"
    return Case(kind="zoom", source=source, instruction=words, results={UNCHANGED: source, ASKED: target})


def _move(scene: Scene, draw: random.Random) -> Case:
    side = draw.choice(("left", "right"))
    scene = scene.with_(place="centre")
    names = {place: ASKED if place == f"middle {side}" else f"moved to the {place}" for place in PLACES}
    names["centre"] = UNCHANGED
    results = {name: render(scene.with_(place=place)) for place, name in names.items()}
    instruction = f"move the {scene.shape} to the {side}"
    return Case(kind="move", source=results[UNCHANGED], instruction=instruction, results=results)


def _colour_one(scene: Scene, draw: random.Random) -> Case:
    left, right = _two(scene, draw)
    colour = draw.choice([name for name in COLOURS if name not in (left.colour, right.colour)])
    results = {
        UNCHANGED: render_two(left, right),
        ASKED: render_two(left.with_(colour=colour), right),
        "both coloured": render_two(left.with_(colour=colour), right.with_(colour=colour)),
        "the other coloured": render_two(left, right.with_(colour=colour)),
    }
    instruction = f"make the {left.shape} {colour}"
    return Case(kind="colour one of two", source=results[UNCHANGED], instruction=instruction, results=results)


def _swap(scene: Scene, draw: random.Random) -> Case:
    left, right = _two(scene, draw)
    results = {
        UNCHANGED: render_two(left, right),
        ASKED: render_two(right, left),
        "two of one": render_two(left, left),
        "two of the other": render_two(right, right),
    }
    instruction = f"swap the {left.shape} and the {right.shape}"
    return Case(kind="swap places", source=results[UNCHANGED], instruction=instruction, results=results)


def _two(scene: Scene, draw: random.Random) -> tuple[Scene, Scene]:
    """Two objects that differ in shape and colour."""
    shape = draw.choice([name for name in SHAPES if name != scene.shape])
    colour = draw.choice([name for name in COLOURS if name != scene.colour])
    return scene, scene.with_(shape=shape, colour=colour)


CASES: dict[str, Callable[[Scene, random.Random], Case]] = {
    "zoom": _zoom,
    "move": _move,
    "colour one of two": _colour_one,
    "swap places": _swap,
}


def limit_table(results: Sequence[Outcome]) -> Table:
    """How often each kind did what was asked, and what came out instead."""
    rows = []
    for kind in dict.fromkeys(one.case.kind for one in results):
        names = Counter(one.name for one in results if one.case.kind == kind)
        count = sum(names.values())
        failed = f"{100 * (count - names[ASKED]) / count:.0f} %"
        instead = ", ".join(f"{name} {number}" for name, number in names.most_common() if name != ASKED)
        rows.append((kind, count, failed, instead))
    return Table(title="What fails", columns=("asked", "n", "failed", "what came out instead"), rows=rows)


def limit_rows(results: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row an edit: its kind, which of the kind's cases it is, what came out, and its settings."""
    numbers: Counter[str] = Counter()
    rows = []
    for one in results:
        rows.append({"kind": one.case.kind, "case": numbers[one.case.kind], "came_out": one.name, **one.settings})
        numbers[one.case.kind] += 1
    return rows


def limit_sheet(results: Sequence[Outcome], *, each: int = 4) -> Image.Image:
    """Some of each kind: before, after, what was asked."""
    kinds = list(dict.fromkeys(one.case.kind for one in results))
    rows = [[_outcome_cell(one) for one in results if one.case.kind == kind][:each] for kind in kinds]
    return tiled([tiled(row, each) for row in rows])


def _outcome_cell(one: Outcome) -> Image.Image:
    pictures = [one.case.source, one.picture, one.case.results[ASKED]]
    return strip(pictures, [one.case.instruction, one.name, "asked"], height=96)


def summary(rows: Sequence[Row], ceilings: Sequence[Row]) -> Table:
    """One row a kind, then all: shares in per cent, PSNR to the truth in dB beside what the autoencoder reaches."""
    kinds = sorted({row["judged"]["kind"] for row in rows})
    limits = {row["sample"]: row for row in ceilings}
    groups = [(kind, [row for row in rows if row["judged"]["kind"] == kind]) for kind in kinds] + [("all", list(rows))]
    return Table(
        title="By kind of edit",
        columns=("kind", "n", *(f"{name} %" for name in SHARES), *(_of_limit(n) for n in DECIBELS), *COSINES),
        rows=[(kind, len(group), *_cells(group, [limits[row["sample"]] for row in group])) for kind, group in groups],
        note="success: the asked attribute is what was asked, every other is what it was, and the picture is clear. "
        "PSNR in dB to the true edit, and in brackets that of the true edit through the autoencoder: the ceiling.",
    )


def _of_limit(name: str) -> str:
    return f"{name.replace('_', ' ')} (ceiling)"


def _cells(group: Sequence[Row], limits: Sequence[Row]) -> list[str]:
    shares = [f"{100 * judged_mean(group, name):.1f}" for name in SHARES]
    decibels = [f"{judged_mean(group, name):.2f} ({judged_mean(limits, name):.2f})" for name in DECIBELS]
    return [*shares, *decibels, *(f"{fmean(row[name] for row in group):.3f}" for name in COSINES)]


def judged_mean(rows: Sequence[Row], name: str) -> float:
    """Of what the judge says under a name: a share, or decibels."""
    return fmean(float(row["judged"][name]) for row in rows)


def confusions(rows: Sequence[Row]) -> list[Table]:
    """Of each attribute a table of counts: what was asked for (down) and what the judge read (across)."""
    judged = [row["judged"] for row in rows]
    return [_confusion(name, [one for one in judged if one["attribute"] == name]) for name in _attributes(judged)]


def _attributes(judged: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({one["attribute"] for one in judged})


def _confusion(attribute: str, judged: Sequence[dict[str, Any]]) -> Table:
    counts = Counter((one["wanted"], one["read"]) for one in judged)
    wanted, read = sorted({w for w, _ in counts}), sorted({value for pair in counts for value in pair})
    return Table(
        title=f"Asked {attribute} (down) against read {attribute} (across)",
        columns=("asked", *read),
        rows=[(w, *(counts[w, r] or "" for r in read)) for w in wanted],
    )


def side_effects(rows: Sequence[Row]) -> Table:
    """How often an edit of each kind changed what it should have kept, by attribute."""
    judged = [row["judged"] for row in rows]
    kinds = Counter(one["kind"] for one in judged)
    counts = Counter((one["kind"], name) for one in judged for name in one["changed"])
    names = sorted({name for _, name in counts})
    return Table(
        title="What else changed",
        columns=("kind", "n", *names),
        rows=[(kind, kinds[kind], *(counts[kind, name] or "" for name in names)) for kind in sorted(kinds)],
        note="Edits in which the judge reads another value of an attribute that nobody asked to change.",
    )


def compare(groups: Mapping[str, Sequence[Row]]) -> Table:
    """Several ways to choose the settings, on the same samples."""
    columns = (*SHARES, *DECIBELS)
    return Table(
        title="Ways to choose the guidance",
        columns=("settings", "n", *columns, *COSINES),
        rows=[(name, len(rows), *_plain_cells(rows)) for name, rows in groups.items()],
    )


def _plain_cells(rows: Sequence[Row]) -> list[str]:
    shares = [f"{100 * judged_mean(rows, name):.1f} %" for name in SHARES]
    decibels = [f"{judged_mean(rows, name):.2f} dB" for name in DECIBELS]
    return [*shares, *decibels, *(f"{fmean(row[name] for row in rows):.3f}" for name in COSINES)]


def worst(rows: Sequence[Row], count: int) -> list[Row]:
    """Failures first, and those farthest from the truth first."""
    return sorted(rows, key=lambda row: (row["judged"]["success"], row["judged"]["psnr"]))[:count]


def edit_sheet(
    samples: Sequence[Sample], pictures: Sequence[Image.Image], rows: Sequence[Row], *, columns: int = 3
) -> Image.Image:
    """Before, after and truth of some samples, with what was asked and what the judge read."""
    return tiled([_cell(*one) for one in zip(samples, pictures, rows, strict=True)], columns)


def _cell(sample: Sample, picture: Image.Image, row: Row) -> Image.Image:
    judged = row["judged"]
    read = "right" if judged["success"] else f"{judged['attribute']}: {judged['read']}, not {judged['wanted']}"
    if judged["asked"] and judged["changed"]:
        read = f"also changed: {', '.join(judged['changed'])}"
    elif judged["asked"] and not judged["clear"]:
        read = "not clear"
    truth = sample.target or sample.source
    return strip([sample.source, picture, truth], [sample.instruction, read, "truth"], height=128)
