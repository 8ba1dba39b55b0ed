"""An examination of pairs in words, as curves over p, and as a contact sheet."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.store import PairRecord, PairStore
from ..errors import ConfigError
from ..evaluate.examples import tiled
from ..images import open_image
from ..strips import strip
from .pair_exam import BINS, JudgedPair, PairExamination, Rates, Separation

__all__ = ["as_text", "draw_curves", "pair_sheet"]

ASKED = {"enlarge": "size", "shrink": "size"} | {
    f"{verb} {style}": "style" for verb in ("add", "remove") for style in ("night", "snow", "sketch")
}
"""What the kinds change whose names are not an attribute's."""
HEAD = f"{'':20}{'n':>7}{'right':>8}{'before':>8}{'after':>8}{'stays':>8}   {'kept':>6}{'right':>8}"


def as_text(result: PairExamination) -> str:
    """Tables by kind, by wording and by p: all candidates, then those that the filter keeps."""
    groups = [result.by_kind, result.by_wording, {f"p >= {p}": rates for p, rates in result.by_p.items()}]
    lines = [HEAD]
    for group in groups:
        lines += [*(_row(name, *rates) for name, rates in group.items()), ""]
    floors = [_threshold(name, floor, result.separation[name]) for name, floor in result.floors.items()]
    passed = f"{100 * result.right_pass:.1f}"
    ends = [f"{100 * low:.1f} to {100 * high:.1f} %" for low, high in (result.interval, result.interval_after)]
    return "\n".join(
        [
            *lines,
            _row("all", result.before, result.after),
            f"right before the filter {ends[0]}, after it {ends[1]} (95 %, over {result.captions} caption pairs)",
            f"the filter passes {passed} % of the right pairs, and keeps the best {result.keep} of each caption pair;",
            f"of {result.captions_kept} caption pairs it keeps something",
            f"{'threshold':24}{'area':>7}   {'right pairs, 99 95 50 %':26}{'wrong pairs, 50 5 1 %':26}",
            *floors,
        ]
    )


def _row(name: str, before: Rates, after: Rates) -> str:
    parts = (before.right, before.before_right, before.after_right, before.stays)
    fractions = "".join(f"{100 * value:>8.1f}" for value in parts)
    kept = f"{100 * after.right:>8.1f}" if after.count else f"{'-':>8}"
    return f"{name:20}{before.count:>7}{fractions}   {after.count:>6}{kept}"


def _threshold(name: str, floor: float, found: Separation) -> str:
    right, wrong = (" ".join(f"{score:6.3f}" for score in scores) for scores in (found.right, found.wrong))
    area = "-" if found.area is None else f"{found.area:.3f}"
    return f"{f'{name} >= {floor:g}':24}{area:>7}   {right:26}{wrong:26}".rstrip()


def draw_curves(results: Mapping[str, PairExamination], path: Path) -> None:
    """The fraction of right pairs over p, before and after the filter, one colour an examination.

    Raises ConfigError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("curves need matplotlib, which is missing; pip install matplotlib") from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    for number, (name, result) in enumerate(results.items()):
        for which, label in enumerate(("all candidates", "after the filter")):
            places = [(float(p) + 0.5 / BINS, rates[which]) for p, rates in result.by_p.items() if rates[which].count]
            axes.plot(
                [p for p, _ in places],
                [100 * rates.right for _, rates in places],
                color=f"C{number}",
                linestyle="-" if which else "--",
                marker="o" if which else "",
                label=f"{name}, {label}",
            )
    axes.set(xlabel="p: fraction of the steps that share self-attention", ylabel="right pairs, %", xlim=(0, 1))
    axes.set_ylim(top=101)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def pair_sheet(
    store: PairStore, judged: Sequence[JudgedPair], kept: Sequence[JudgedPair], *, rows: int = 4, columns: int = 3
) -> Image.Image:
    """Pairs drawn at random, one caption pair once: right ones on top, wrong ones that the filter rejects, wrong ones
    that it keeps, each with what the judge says."""
    chosen = {pair.key for pair in kept}
    groups = [
        [pair for pair in judged if pair.right and pair.key in chosen],
        [pair for pair in judged if not pair.right and pair.key not in chosen],
        [pair for pair in judged if not pair.right and pair.key in chosen],
    ]
    counts = (rows // 2 * columns, (rows - rows // 2) * columns, columns)
    drawn = [pair for group, count in zip(groups, counts, strict=True) for pair in _some(group, count)]
    records = _records(store, {pair.key for pair in drawn})
    return tiled([_cell(records[pair.key], pair, pair.key in chosen) for pair in drawn], columns)


def _some(pairs: Sequence[JudgedPair], count: int) -> list[JudgedPair]:
    one_each = list({pair.caption: pair for pair in pairs}.values())
    return random.Random(0).sample(one_each, min(count, len(one_each)))


def _records(store: PairStore, keys: set[str]) -> dict[str, PairRecord]:
    places = {key: n for n, key in enumerate(store.columns("key")["key"]) if key in keys}
    return {key: store[n] for key, n in sorted(places.items(), key=lambda item: item[1])}


def _cell(record: PairRecord, pair: JudgedPair, kept: bool) -> Image.Image:
    pictures = [open_image(record.original_image), open_image(record.edited_image)]
    verdict = f"{'RIGHT' if pair.right else 'WRONG'}, {'kept' if kept else 'rejected'}: {_fault(pair)}"
    return strip(pictures, [record.original_prompt, f"{record.edited_prompt}  [{verdict}]"], height=128)


def _fault(pair: JudgedPair) -> str:
    """What is wrong, or the scores of a right pair."""
    if pair.right:
        return f"p {pair.p or 0:.2f}, direction {pair.scores.sim_direction:.2f}, image {pair.scores.sim_image:.2f}"
    if not pair.before_right:
        return "the source does not show its caption"
    if not pair.after_right:
        return "the edited picture does not show its caption"
    asked = ASKED.get(pair.kind, pair.kind)
    moved = [name for name in pair.before if pair.before[name] != pair.after[name] and name != asked]
    return f"changed as well: {', '.join(moved)}"
