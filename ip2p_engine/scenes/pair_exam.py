"""An examination of pairs of pictures: does a pair show what its captions say, and nothing else changed?

The truth is the world's judge, which reads every attribute back from the pixels; CLIP has no say. So it tells how many
pairs are right before the CLIP filter and after it, and where the filter's thresholds belong.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..captions.edits import CaptionEdit
from ..clip.filter import MEASURES, FilterConfig, PairScores, filter_candidates
from ..clip.similarity import ClipSimilarity
from ..data.store import PairRecord, PairStore, PairWriter
from ..errors import DatasetError
from ..evaluate.report import tiled
from ..evaluate.run_folder import Table, text_of
from ..files import AppendLog, json_lines
from ..hooks import Hooks
from ..images import open_image
from ..plots import new_figure, save_figure
from ..strips import strip
from .grammar import captions_of, edits_from, is_held_out, parse_caption, sample_edits
from .judge import Reading, read_scenes
from .world import Scene, all_scenes, render

__all__ = [
    "JudgedPair",
    "PairExamination",
    "Rates",
    "Separation",
    "as_text",
    "copy_without_held_out",
    "draw_curves",
    "examine_pairs",
    "judge_pair",
    "judge_store",
    "kept_pairs",
    "pair_sheet",
    "read_judged",
    "sample_caption_edits",
]

ASKED = {"enlarge": "size", "shrink": "size"} | {
    f"{verb} {style}": "style" for verb in ("add", "remove") for style in ("night", "snow", "sketch")
}
"""What the kinds change whose names are not an attribute's."""
TOGETHER = 256
BINS = 10


@dataclass(frozen=True, kw_only=True)
class JudgedPair:
    """One pair with what is seen in it; one line of the file of judged pairs."""

    key: str
    kind: str
    says_where: bool
    """Whether the captions say where the object is; where they do not, it must stay where it came to be."""
    p: float | None
    cfg: float | None
    scores: PairScores
    before: dict[str, str]
    """The attributes read in the source picture."""
    after: dict[str, str]
    before_right: bool
    """The source picture is clear and shows its caption."""
    after_right: bool
    """The edited picture is clear and shows its caption."""
    stays: bool
    """Every attribute that no caption changes is the same in both, the place included."""

    @property
    def right(self) -> bool:
        return self.before_right and self.after_right and self.stays

    @property
    def caption(self) -> str:
        """What the candidates of one caption pair have in common."""
        return self.key.partition("/")[0]

    def to_row(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> JudgedPair:
        """Raises TypeError or KeyError for a row that is none of ours."""
        return cls(**{**row, "scores": PairScores(**row["scores"])})


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Fractions of some pairs, 0 to 1; all 0 for none."""

    count: int
    right: float
    before_right: float
    after_right: float
    stays: float

    @classmethod
    def of(cls, pairs: Sequence[JudgedPair]) -> Rates:
        names = [field.name for field in fields(cls)][1:]
        return cls(
            count=len(pairs),
            **{name: sum(getattr(pair, name) for pair in pairs) / max(1, len(pairs)) for name in names},
        )


@dataclass(frozen=True, kw_only=True)
class Separation:
    """How well one cosine tells right pairs from wrong ones, and so where its threshold belongs."""

    area: float | None
    """The probability that a right pair has more than a wrong one (area under the ROC curve); None without both."""
    right: tuple[float, ...]
    """What 99, 95 and 50 % of the right pairs reach."""
    wrong: tuple[float, ...]
    """What 50, 5 and 1 % of the wrong pairs reach."""

    @classmethod
    def of(cls, right: Sequence[float], wrong: Sequence[float]) -> Separation:
        return cls(
            area=_area(right, wrong),
            right=tuple(float(np.quantile(right, share)) for share in (0.01, 0.05, 0.5)) if right else (),
            wrong=tuple(float(np.quantile(wrong, share)) for share in (0.5, 0.95, 0.99)) if wrong else (),
        )


def _area(right: Sequence[float], wrong: Sequence[float]) -> float | None:
    if not right or not wrong:
        return None
    ordered = np.sort(wrong)
    wins = np.searchsorted(ordered, right, "left") + np.searchsorted(ordered, right, "right")  # a draw is half a win
    return float(wins.mean() / 2 / len(wrong))


@dataclass(frozen=True, kw_only=True)
class PairExamination:
    """How many pairs are right: all candidates, and those that a filter keeps."""

    before: Rates
    after: Rates
    by_kind: dict[str, tuple[Rates, Rates]]
    by_wording: dict[str, tuple[Rates, Rates]]
    by_p: dict[str, tuple[Rates, Rates]]
    """In ten bins of p; the key is the bin's lower end."""
    interval: tuple[float, float]
    """95 % of ``before.right``, by drawing caption pairs with replacement."""
    interval_after: tuple[float, float]
    captions: int
    captions_kept: int
    """Caption pairs of which at least one candidate is kept."""
    separation: dict[str, Separation]
    """Of each cosine, over all candidates."""
    right_pass: float
    """The fraction of the right pairs that reach every threshold."""
    floors: dict[str, float]
    keep: int

    def figures(self) -> dict[str, Any]:
        """As JSON takes it; each pair of rates is (before, after) the filter."""
        return asdict(self)


def sample_caption_edits(count: int, *, seed: int, held_out: bool) -> list[CaptionEdit]:
    """Caption pairs of the grammar, kinds in turn, in any wording, of one split; the split's phrasings too."""
    draw = random.Random(seed)
    return [_in_some_wording(edit, draw) for edit in sample_edits(count, seed=seed, held_out=held_out)]


def _in_some_wording(edit: Any, draw: random.Random) -> CaptionEdit:
    caption, edited_caption = draw.choice(list(zip(captions_of(edit.source), captions_of(edit.target), strict=True)))
    return CaptionEdit(caption=caption, instruction=edit.instruction, edited_caption=edited_caption)


def judge_store(
    folder: Path | str,
    clip: ClipSimilarity,
    *,
    hooks: Hooks | None = None,
) -> list[JudgedPair]:
    """Judge and score every pair of a data set that was made from the grammar's captions.

    The judged pairs are also lines of a file in the folder, one file a CLIP, so that thresholds can be studied without
    the pictures; what is there is not judged again. Raises DatasetError.
    """
    hooks = hooks or Hooks()
    path = Path(folder) / f"judged-{_fingerprint(clip)}.jsonl"
    log = AppendLog(path, DatasetError)
    known = {pair.key: pair for pair in read_judged(path)}
    store = PairStore(folder)
    waiting = (record for record in store if record.key not in known)
    while records := list(islice(waiting, TOGETHER)):
        hooks.check_stop(f"stopped with {len(known)} of {len(store)} pairs judged")
        found = _judge_records(records, clip)
        log.append(*(pair.to_row() for pair in found))
        known.update((pair.key, pair) for pair in found)
        hooks.progress(len(known), len(store))
    return [known[key] for key in store.columns("key")["key"]]


def _fingerprint(clip: ClipSimilarity) -> str:
    """Eight digits that another CLIP does not have: of its features of one scene and its caption."""
    scene = all_scenes()[0]
    features = torch.cat([clip.text_features(captions_of(scene)), clip.image_features([render(scene)])])
    return hashlib.blake2b(features.mul(1000).round().short().numpy().tobytes(), digest_size=4).hexdigest()


def read_judged(path: Path) -> Iterator[JudgedPair]:
    """Judged pairs of a file; raises DatasetError for a line that is none."""
    for row in json_lines(path, DatasetError):
        try:
            yield JudgedPair.from_row(row)
        except (KeyError, TypeError) as error:
            raise DatasetError(f"{path} has a line that is no judged pair ({error!r}); delete the file") from error


def _judge_records(records: Sequence[PairRecord], clip: ClipSimilarity) -> list[JudgedPair]:
    before = [open_image(record.original_image) for record in records]
    after = [open_image(record.edited_image) for record in records]
    captions, edited = [r.original_prompt for r in records], [r.edited_prompt for r in records]
    scores = clip.score(before, after, captions, edited)
    readings = read_scenes([*before, *after])
    both = zip(readings[: len(records)], readings[len(records) :], strict=True)
    return [judge_pair(r, b, a, s) for r, (b, a), s in zip(records, both, scores, strict=True)]


def judge_pair(record: PairRecord, before: Reading, after: Reading, scores: PairScores) -> JudgedPair:
    """Compare what is seen in both pictures with what the captions say; DatasetError for foreign captions."""
    kind, source, target, says_where = _meaning(record)
    unsaid = set() if says_where else {"place"}
    return JudgedPair(
        key=record.key,
        kind=kind,
        says_where=says_where,
        p=record.p,
        cfg=record.cfg,
        scores=scores,
        before=vars(before.scene),
        after=vars(after.scene),
        before_right=before.clear and unsaid.issuperset(before.scene.differs(source)),
        after_right=after.clear and unsaid.issuperset(after.scene.differs(target)),
        stays=set(source.differs(target)).issuperset(before.scene.differs(after.scene)),
    )


def _meaning(record: PairRecord) -> tuple[str, Scene, Scene, bool]:
    """(kind, source, target, whether the captions say where)."""
    source, target = parse_caption(record.original_prompt), parse_caption(record.edited_prompt)
    if source is not None and target is not None:
        kinds = [kind for kind, scene in edits_from(source[0]) if scene == target[0]]
        if kinds:
            return kinds[0], source[0], target[0], source[1] > 0
    captions = f"{record.original_prompt!r} and {record.edited_prompt!r}"
    raise DatasetError(f"pair {record.key!r} has captions that are no edit of the scenes grammar: {captions}")


def copy_without_held_out(folder: Path | str, judged: Sequence[JudgedPair], out: Path | str) -> int:
    """Copy the pairs that show no held-out scene; a caption that does not say where may lead to one.

    What ``out`` has is not copied again. Returns the number of pairs left out. Raises DatasetError.
    """
    held = {pair.key for pair in judged if is_held_out(Scene(**pair.before)) or is_held_out(Scene(**pair.after))}
    store = PairStore(folder)
    manifest = {"config": {**store.manifest["config"], "left_out": "pairs that show a held-out scene"}}
    with PairWriter(out, manifest=manifest) as writer:
        skipped = held | writer.done_keys()
        for record in store:
            if record.key not in skipped:
                writer.write(record)
    return len(held)


def examine_pairs(judged: Sequence[JudgedPair], config: FilterConfig) -> PairExamination:
    """The rates of all candidates, and of those that the filter keeps of each caption pair."""
    kept = kept_pairs(judged, config)
    right = [pair for pair in judged if pair.right]

    def split(group: Callable[[JudgedPair], str]) -> dict[str, tuple[Rates, Rates]]:
        names = sorted({group(pair) for pair in judged})
        return {
            name: (Rates.of([q for q in judged if group(q) == name]), Rates.of([q for q in kept if group(q) == name]))
            for name in names
        }

    return PairExamination(
        before=Rates.of(judged),
        after=Rates.of(kept),
        by_kind=split(lambda pair: pair.kind),
        by_wording=split(lambda pair: "says where" if pair.says_where else "does not say where"),
        by_p=split(_bin_of) if all(pair.p is not None for pair in judged) else {},
        interval=_interval(judged),
        interval_after=_interval(kept),
        captions=len({pair.caption for pair in judged}),
        captions_kept=len({pair.caption for pair in kept}),
        separation={name: _separation(judged, name) for name in MEASURES},
        right_pass=sum(_passes(pair, config) for pair in right) / max(1, len(right)),
        floors=config.floors(),
        keep=config.keep,
    )


def _separation(judged: Sequence[JudgedPair], measure: str) -> Separation:
    scores = [(pair.right, getattr(pair.scores, measure)) for pair in judged]
    return Separation.of([score for right, score in scores if right], [score for right, score in scores if not right])


def _passes(pair: JudgedPair, config: FilterConfig) -> bool:
    return bool(filter_candidates([pair.scores], config).kept)


def kept_pairs(judged: Sequence[JudgedPair], config: FilterConfig) -> list[JudgedPair]:
    """What the filter keeps, caption pair by caption pair."""
    groups: dict[str, list[JudgedPair]] = {}
    for pair in judged:
        groups.setdefault(pair.caption, []).append(pair)
    return [g[n] for g in groups.values() for n in filter_candidates([pair.scores for pair in g], config).kept]


def _bin_of(pair: JudgedPair) -> str:
    return f"{min(BINS - 1, int((pair.p or 0.0) * BINS)) / BINS:.1f}"


def _interval(pairs: Sequence[JudgedPair], draws: int = 1000) -> tuple[float, float]:
    """95 % of the fraction right: candidates of one caption pair are alike, so whole caption pairs are drawn."""
    groups: dict[str, list[bool]] = {}
    for pair in pairs:
        groups.setdefault(pair.caption, []).append(pair.right)
    if not groups:
        return 0.0, 0.0
    tallies, draw = [(sum(group), len(group)) for group in groups.values()], random.Random(0)
    rates = []
    for _ in range(draws):
        chosen = draw.choices(tallies, k=len(tallies))
        rates.append(sum(right for right, _ in chosen) / sum(count for _, count in chosen))
    rates.sort()
    return rates[round(0.025 * draws)], rates[round(0.975 * draws) - 1]


def as_text(result: PairExamination) -> str:
    """By kind, by wording and by p: all candidates, then those that the filter keeps; then where thresholds belong."""
    by_p = {f"p >= {p}": rates for p, rates in result.by_p.items()}
    groups = {**result.by_kind, **result.by_wording, **by_p, "all": (result.before, result.after)}
    ends = [f"{100 * low:.1f} to {100 * high:.1f} %" for low, high in (result.interval, result.interval_after)]
    rates = Table(
        title="Right pairs",
        columns=("", "n", "right %", "before %", "after %", "stays %", "kept", "right %"),
        rows=[(name, *_cells(*both)) for name, both in groups.items()],
        note=f"right before the filter {ends[0]}, after it {ends[1]} (95 %, over {result.captions} caption pairs)\n"
        f"the filter passes {100 * result.right_pass:.1f} % of the right pairs, and keeps the best {result.keep} of "
        f"each caption pair;\nof {result.captions_kept} caption pairs it keeps something",
    )
    thresholds = Table(
        title="Thresholds",
        columns=("", "area", "right pairs, 99 95 50 %", "wrong pairs, 50 5 1 %"),
        rows=[(f"{name} >= {floor:g}", *_separated(result.separation[name])) for name, floor in result.floors.items()],
    )
    return f"{text_of(rates)}\n\n{text_of(thresholds)}"


def _cells(before: Rates, after: Rates) -> list[Any]:
    fractions = (before.right, before.before_right, before.after_right, before.stays)
    kept = f"{100 * after.right:.1f}" if after.count else "-"
    return [before.count, *(f"{100 * value:.1f}" for value in fractions), after.count, kept]


def _separated(found: Separation) -> list[str]:
    area = "-" if found.area is None else f"{found.area:.3f}"
    return [area, *(" ".join(f"{score:6.3f}" for score in scores) for scores in (found.right, found.wrong))]


def draw_curves(results: Mapping[str, PairExamination], path: Path) -> None:
    """The fraction of right pairs over p, before and after the filter, one colour an examination.

    Raises ConfigError without matplotlib.
    """
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
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
    save_figure(figure, path)


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
    return tiled([_shown(records[pair.key], pair, pair.key in chosen) for pair in drawn], columns)


def _some(pairs: Sequence[JudgedPair], count: int) -> list[JudgedPair]:
    one_each = list({pair.caption: pair for pair in pairs}.values())
    return random.Random(0).sample(one_each, min(count, len(one_each)))


def _records(store: PairStore, keys: set[str]) -> dict[str, PairRecord]:
    places = {key: n for n, key in enumerate(store.columns("key")["key"]) if key in keys}
    return {key: store[n] for key, n in sorted(places.items(), key=lambda item: item[1])}


def _shown(record: PairRecord, pair: JudgedPair, kept: bool) -> Image.Image:
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
