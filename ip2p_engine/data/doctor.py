"""What in a data set will hurt training: measured pair by pair, summed, shown, and left out on wish.

offset      the after picture is shifted or zoomed against the before one (edges correlated within 8 % of the side)
unchanged   hardly a pixel differs
cast        a colour shift of most of the picture
blocks      JPEG's grid of 8 x 8 stands out of the after picture
duplicate   both pictures and the instruction are near to an earlier pair's
caption     a caption stands in place of the instruction, or nothing does
aspect      the pictures have different aspects
tiny        a side of less than 48 pixels, or a picture of one colour
broken      a row that cannot be used
split       the source picture is near to one on the other side of the test split
instruction the pictures do not differ as this instruction says; swapped: as backwards. Looked for with an edit model
            that knows such edits (expected; it sees casts and offsets too), or with a CLIP in sets of 100 pairs and
            more that follow their words (agreement)
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..captions.edits import plain
from ..errors import ConfigError, DatasetError
from ..hooks import QUIET, Hooks
from ..images import encoded
from .agreement import FEWEST, agreement
from .parquet import LostRows, numbered
from .reading import Reading, open_pairs
from .record import PairRecord
from .registration import registered
from .sheet import write_page
from .split import near_groups, picture_hash, test_rows
from .store import PairWriter
from .usual import Box, Words, casts, growth, lone_box, moved_boxes

if TYPE_CHECKING:
    from .expected import Editor

__all__ = ["FAULTS", "Doctored", "Finding", "doctor", "drop", "show"]

FAULTS = (
    *("offset", "unchanged", "cast", "blocks", "duplicate", "caption", "aspect", "tiny", "broken", "split"),
    *("instruction", "swapped"),
)
JUDGED = ("instruction", "swapped")
UNFIT = {"unchanged", "aspect", "tiny", "broken", "blocks"}
KEPT_FAULTS = ("split",)
"""Not a reason to leave a pair out."""
SIDE, NEAREST, LEAST_ZOOM, MOST_ZOOM = 96, 0.014, 0.03, 0.13
LEAST_GAIN, GAIN_OF_LOSS, ALL_EXPLAINED, MOST_EXPLAINED, PART_EXPLAINED = 0.012, 1.6, 0.9, 0.58, 0.4
SAME_GROWTH = 0.02
CHANGED, FEW, LITTLE = 12, 0.002, 2.0
LEAST_CAST, MOST_CAST, ALIKE, MOST_OF_IT, ALL_OF_IT = 5.0, 48.0, 6.0, 0.5, 0.93
SMALL_PART, PLAIN, KEPT = 0.03, 0.75, 0.02
BLOCKY, VISIBLE, FEWEST_LINES = 1.35, 0.3, 5
SMALLEST, FLAT, SAME_ASPECT, NEAR = 48, 1.0, 0.02, 3.0
ARTICLES = ("a", "an", "the", "this", "there", "two", "three", "photo", "photograph", "picture", "image", "painting")
ASKS = re.compile(r"\b(should|must|make|turn|change|replace|add|remove|become|be|put|swap|have|let|convert|edit)\b")
GROUNDS = re.compile(r"\b(background|backdrop|ground|behind|sky)\b")
LOOKS = re.compile(
    r"\b(style|look\w*|sketch\w*|draw\w*|paint\w*|pencil|photo\w*|picture|image|scene|"
    r"snow\w*|winter|summer|autumn|spring|night|day\w*|evening|morning|sun\w*|dark\w*|bright\w*|light\w*|black|sepia|"
    r"vintage|colou?r it|tone\w*|warm\w*|cold\w*|fog\w*|rain\w*|weather|season)\b"
)
"""Instructions that ask for another look or ground may well shift the colours of most of the picture."""
SHOWN, AT_ONCE = 40, 64
FOLLOWED, MOST_ASKED, BACKWARDS = 0.7, 0.3, 0.45

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong with one pair."""

    row: int
    key: str
    faults: dict[str, str]
    """{fault: what was measured}."""


@dataclass(frozen=True, kw_only=True)
class Doctored:
    """What the doctor found."""

    pairs: int
    findings: tuple[Finding, ...]
    split_rule: str = ""
    changed: dict[str, float] = field(default_factory=dict)
    """Quartiles of the share of pixels that an edit changes."""
    judged: bool = False
    """Whether instructions were judged, by an edit model or a CLIP."""

    def counts(self) -> dict[str, int]:
        """How many pairs have each fault."""
        found = Counter(name for one in self.findings for name in one.faults)
        return {name: found[name] for name in FAULTS}

    def as_text(self) -> str:
        """The same for people."""
        lines = [f"{self.pairs:,} pairs, {len(self.findings):,} with a fault"]
        for name, count in self.counts().items():
            if name in JUDGED and not self.judged:
                continue
            examples = [one for one in self.findings if name in one.faults][:2]
            shown = "; ".join(f"{one.key}: {one.faults[name]}" for one in examples)
            lines.append(f"{name:>10} {count:7,}  {count / max(1, self.pairs):6.1%}  {shown}".rstrip())
        if not self.judged:
            lines.append(f"not looked for without a `checkpoint` or a `clip`: {', '.join(JUDGED)}")
        if self.changed:
            lines.append("pixels changed: " + ", ".join(f"{name} {value:.1%}" for name, value in self.changed.items()))
        return "\n".join(lines)


def doctor(
    folder: Path | str,
    reading: Reading | None = None,
    *,
    clip: str | None = None,
    editor: Editor | None = None,
    hooks: Hooks | None = None,
) -> Doctored:
    """Look at every pair of a data set of any layout, 10 to 80 ms each. Raises DatasetError.

    To look for wrong instructions and swapped pictures too: ``editor``, an InstructPix2Pix that knows such edits, which
    finds more casts and zooms as well; or ``clip``, what ``ClipSimilarity.load`` takes.
    """
    judges: list[Any] = [_Features(clip)] if clip else []
    if editor is not None:
        from .expected import Expected

        judges.append(Expected(editor))
    pairs, hooks = open_pairs(folder, reading, hooks=hooks), hooks or Hooks()
    if not len(pairs):
        raise DatasetError(f"{folder} has no pairs yet; the doctor needs at least one")
    seen = _Seen()
    for row, pair in numbered(pairs.outcomes()):
        hooks.check_stop()
        if isinstance(pair, DatasetError):
            for lost in range(pair.rows if isinstance(pair, LostRows) else 1):
                seen.add(_Look(faults={"broken": str(pair)}), f"row {row + lost + 1}")
        else:
            look = _look(pair)
            seen.add(look, pair.key or f"row/{row}")
            if judges and not UNFIT & look.faults.keys():
                _tell(judges, row, pair)
        hooks.progress(row + 1, len(pairs))
    rule, test = test_rows(pairs, [text or "" for text in pairs.columns("original_prompt")["original_prompt"]])
    for name, row, said in seen.compared(set(test)):
        seen.faults[row].setdefault(name, said)
    for judge in judges:
        for name, row, said in judge.compared():
            if "caption" not in seen.faults[row]:
                seen.faults[row].setdefault(name, said)
    findings = (Finding(row=row, key=seen.keys[row], faults=faults) for row, faults in enumerate(seen.faults) if faults)
    told: Any = {"split_rule": rule, "changed": _quartiles(seen.shares), "judged": bool(judges)}
    return Doctored(pairs=len(seen.keys), findings=tuple(findings), **told)


def _tell(judges: Sequence[Any], row: int, pair: PairRecord) -> None:
    before, after = (_opened(data) for data in (pair.original_image, pair.edited_image))
    for judge in judges:
        judge.add(row, pair.edit_prompt, before, after)


def show(folder: Path | str, out: Path, doctored: Doctored, reading: Reading | None = None) -> int:
    """A page (``sheet``) of up to 40 pairs of each fault, to look at; returns how many. Raises DatasetError."""
    chosen: dict[int, str] = {}
    counted: Counter[str] = Counter()
    for one in doctored.findings:
        if "broken" not in one.faults and any(counted[name] < SHOWN for name in one.faults):
            counted.update(one.faults.keys())
            chosen[one.row] = "; ".join(f"{name}: {said}" for name, said in one.faults.items())
    pairs = open_pairs(folder, reading, hooks=QUIET)
    name, faulty = Path(folder).resolve().name, len(doctored.findings)
    shown = [(row, pairs[row]) for row in sorted(chosen)]
    return write_page(shown, out, lambda count: f"{name}: {count} of {faulty:,} pairs with a fault", notes=chosen)


def drop(
    folder: Path | str,
    out: Path | str,
    doctored: Doctored,
    reading: Reading | None = None,
    *,
    faults: Sequence[str] = (),
) -> int:
    """Write the pairs without a fault (all but split, or those named) as a store; returns the new pairs.

    A stopped call goes on. Raises ConfigError for an unknown fault, DatasetError for a folder with something else.
    """
    if unknown := [name for name in faults if name not in FAULTS]:
        raise ConfigError(f"fault {unknown[0]!r} is unknown; choose among {', '.join(FAULTS)}")
    left_out = set(faults or [name for name in FAULTS if name not in KEPT_FAULTS])
    bad = {one.row for one in doctored.findings if left_out & set(one.faults) or "broken" in one.faults}
    pairs, count = open_pairs(folder, reading, hooks=QUIET), 0
    chosen = (reading or Reading()).in_manifest()
    manifest = {"config": {"doctored": str(folder), "without": sorted(left_out), **chosen}}
    with PairWriter(out, manifest=manifest) as writer:
        done = writer.done_keys()
        for row, pair in numbered(pairs.outcomes()):
            if row in bad or isinstance(pair, DatasetError):
                continue
            key = pair.key or f"row/{row}"
            if key not in done:
                writer.write(pair if pair.key else PairRecord(**{**vars(pair), "key": key}))
                count += 1
    return count


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What one look at a pair gives; without pictures the rest is None."""

    faults: dict[str, str]
    words: Words = ("", "")
    hashed: int | None = None
    """Of the source picture."""
    thumbs: Any = None
    """Small versions of both pictures."""
    share: float | None = None
    """Of the pixels that are changed."""
    boxes: tuple[Box, Box] | None = None
    """Of a lone object in both pictures."""


def _look(pair: PairRecord) -> _Look:
    found: dict[str, str] = {}
    words = (plain(pair.edit_prompt), pair.kind or "")
    if said := _caption_fault(pair):
        found["caption"] = said
    pictures = [_opened(data) for data in (pair.original_image, pair.edited_image)]
    before, after = pictures
    if before is None or after is None:
        return _Look(faults={**found, "broken": "a picture cannot be decoded"}, words=words)
    hashed = picture_hash(pair.original_image)
    for name, picture in (("before", before), ("after", after)):
        small = np.asarray(picture.resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
        if min(picture.size) < SMALLEST:
            found["tiny"] = f"{name} is {picture.width} x {picture.height}"
        elif small.std(axis=(0, 1)).max() < FLAT:
            found["tiny"] = f"{name} is of one colour"
    if abs(before.width * after.height / (before.height * after.width) - 1) > SAME_ASPECT:
        sizes = f"{before.width} x {before.height}, {after.width} x {after.height}"
        return _Look(faults={**found, "aspect": sizes}, words=words, hashed=hashed, thumbs=_thumbs(before, after))
    grid = _blockiness(after)
    if grid > BLOCKY:
        found["blocks"] = f"steps at the grid are {grid:.1f} times those within"
    scale = min(1.0, SIDE / max(before.size))
    size = (max(8, round(before.width * scale)), max(8, round(before.height * scale)))
    arrays = [np.asarray(one.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) for one in pictures if one]
    difference, asked = arrays[1] - arrays[0], bool(LOOKS.search(pair.edit_prompt.lower()))
    share = float((np.abs(difference).max(axis=2) > CHANGED).mean())
    if share < FEW and np.abs(difference).mean() < LITTLE:
        found["unchanged"] = f"{share:.2%} of the pixels differ"
    elif (shift := _cast(arrays[0], difference, asked=asked)) is not None:
        found["cast"] = _colour(shift)
    one, other = lone_box(arrays[0]), lone_box(arrays[1])
    boxes = None if one is None or other is None else (one, other)
    more: Any = {"alone": None if boxes is None else growth(*boxes), "asked": asked}
    if "unchanged" not in found and (moved := _offset(arrays[0], arrays[1], before.width / size[0], **more)):
        found["offset"] = moved
    return _Look(faults=found, words=words, hashed=hashed, thumbs=_thumbs(before, after), share=share, boxes=boxes)


def _opened(data: bytes) -> Image.Image | None:
    try:
        with encoded(data) as picture:
            return picture.convert("RGB")
    except Exception:  # decoders raise nearly every class of exception on broken data
        return None


def _caption_fault(pair: PairRecord) -> str:
    said = plain(pair.edit_prompt)
    if not said:
        return "there is no instruction"
    for name in ("original_prompt", "edited_prompt"):
        if said == plain(getattr(pair, name)):
            return f"it is the {name}"
    first = said.split()[0]
    return f"it begins with {first!r}" if first in ARTICLES and not ASKS.search(said) else ""


def _thumbs(before: Image.Image, after: Image.Image) -> Any:
    small = [np.asarray(one.resize((8, 8), Image.Resampling.BOX), dtype=np.uint8) for one in (before, after)]
    return np.stack(small)


def _blockiness(picture: Image.Image) -> float:
    """Steps in brightness at every eighth line against those within, of the whole lines and columns."""
    grey = np.asarray(picture.convert("L"), dtype=np.float32)
    worst = 0.0
    for lines in (grey, grey.T):
        second = np.abs(lines[:, 3:] - 3 * lines[:, 2:-1] + 3 * lines[:, 1:-2] - lines[:, :-3])
        steps = np.minimum(second, 24).mean(axis=0)
        where = (np.arange(len(steps)) + 2) % 8 == 0
        if where.sum() < FEWEST_LINES:
            return 0.0
        worst = max(worst, float(steps[where].mean() / (steps[~where].mean() + VISIBLE)))
    return worst


def _cast(before: Any, difference: Any, *, asked: bool) -> Any:
    """The colour by which what is kept of the picture is shifted; None where something is kept as it was.

    Half of the picture has to be shifted alike; where another look was ``asked`` for nearly all of it, or half in
    several colours. In a picture of plain areas a few of them, beside others of one change each, are enough.
    """
    flat = difference.reshape(-1, 3)
    kept = (np.abs(flat).max(axis=1) < LEAST_CAST).mean()
    areas = _areas(flat)
    plain_areas = sum(share for _, share in areas) >= PLAIN and not asked
    for shift, share in areas:
        least = ALL_OF_IT if asked else SMALL_PART if plain_areas else MOST_OF_IT
        if asked and share >= MOST_OF_IT and _colours_of(before, flat, shift) > 1:
            least = MOST_OF_IT
        if LEAST_CAST <= np.abs(shift).max() <= MOST_CAST and share >= least and kept < KEPT:
            return shift
    return None


def _colours_of(before: Any, flat: Any, shift: Any) -> int:
    """How many clearly different colours the part has that is shifted alike."""
    part = before.reshape(-1, 3)[np.abs(flat - shift).max(axis=1) <= ALIKE]
    return len(_areas(part - part.mean(axis=0)))


def _colour(shift: Any) -> str:
    return "red {:+.0f}, green {:+.0f}, blue {:+.0f}".format(*shift)


def _areas(flat: Any) -> list[tuple[Any, float]]:
    """(change of colour, share) of up to four parts of a picture that change alike, the largest first."""
    found: list[tuple[Any, float]] = []
    rest = flat
    while len(found) < 4 and len(rest) >= SMALL_PART * len(flat):
        bins = (np.rint(rest / ALIKE).astype(np.int64) + 128) @ np.array([1, 256, 65536])
        values, counts = np.unique(bins, return_counts=True)
        centre = np.median(rest[bins == values[counts.argmax()]], axis=0)
        near = np.abs(rest - centre).max(axis=1) <= ALIKE
        found.append((centre, float(near.sum() / len(flat))))
        rest = rest[~near]
    return sorted((one for one in found if one[1] >= SMALL_PART), key=lambda one: -one[1])


def _offset(before: Any, after: Any, scale: float, *, alone: float | None, asked: bool) -> str:
    """How the after picture lies against that before; empty where it lies as it is.

    Of an object alone on a plain ground a changed form looks like a movement, so all of it has to fit; ``alone`` is
    the logarithm of what it has grown by.
    """
    move = registered(before, after)
    by = float(np.hypot(move.x, move.y))
    if move.gain < LEAST_GAIN or move.gain < GAIN_OF_LOSS * move.loss or abs(move.zoom - 1) > MOST_ZOOM:
        return ""
    grown = alone is not None and abs(np.log(move.zoom) - alone) < SAME_GROWTH
    if alone is not None and move.explained < (ALL_EXPLAINED if asked else PART_EXPLAINED if grown else MOST_EXPLAINED):
        return ""
    if abs(move.zoom - 1) >= LEAST_ZOOM:
        return f"zoomed by {move.zoom:.2f}, which explains {move.gain:.1%} of the pixels better"
    if by < NEAREST * max(before.shape):
        return ""
    shifted = f"shifted by {move.x * scale:+.0f}, {move.y * scale:+.0f} px"
    return f"{shifted}, which explains {move.gain:.1%} of the pixels better"


class _Seen:
    """What pairs are compared by, about 600 bytes each."""

    def __init__(self) -> None:
        self.faults: list[dict[str, str]] = []
        self.keys: list[str] = []
        self.shares: list[float] = []
        self._hashes: list[int | None] = []
        self._thumbs: list[Any] = []
        self._texts: list[Words] = []
        self._boxes: list[tuple[Box, Box] | None] = []

    def add(self, look: _Look, key: str) -> None:
        self.faults.append(dict(look.faults))
        self.keys.append(key)
        self.shares += [] if look.share is None else [look.share]
        self._hashes.append(look.hashed)
        self._thumbs.append(look.thumbs)
        self._texts.append(look.words)
        self._boxes.append(look.boxes)

    def compared(self, test: set[int]) -> Iterable[tuple[str, int, str]]:
        """(fault, row, what was found) of what only other pairs can tell."""
        yield from (("duplicate", row, f"of {self.keys[other]}") for row, other in self._duplicates())
        yield from (("split", row, f"its source is that of {self.keys[other]}") for row, other in self._on_both(test))
        yield from (("offset", row, said) for row, said in moved_boxes(self._boxes, self._texts))
        looked = zip(self._thumbs, self.faults, strict=True)
        measured = [None if UNFIT & faults.keys() else thumbs for thumbs, faults in looked]
        yield from (("cast", row, _colour(shift)) for row, shift in casts(measured, self._texts))

    def _duplicates(self) -> Iterable[tuple[int, int]]:
        """(row, an earlier one that it is near to)."""
        first: dict[int, list[int]] = {}
        for row, group in enumerate(near_groups(self._hashes)):
            if self._hashes[row] is None:
                continue
            for other in first.setdefault(group, []):
                if self._texts[row] == self._texts[other] and self._distance(row, other, slice(0, 2)) < NEAR:
                    yield row, other
                    break
            else:
                first[group].append(row)

    def _on_both(self, test: set[int]) -> Iterable[tuple[int, int]]:
        """(row of the test split, a row outside it of a near source picture)."""
        outside: dict[int, list[int]] = {}
        groups = near_groups(self._hashes)
        for row, group in enumerate(groups):
            if row not in test and self._hashes[row] is not None:
                outside.setdefault(group, []).append(row)
        for row in sorted(test):
            for other in outside.get(groups[row], ()) if self._hashes[row] is not None else ():
                if self._distance(row, other, slice(0, 1)) < NEAR:
                    yield row, other
                    break

    def _distance(self, row: int, other: int, which: slice) -> float:
        gap = self._thumbs[row][which].astype(np.int16) - self._thumbs[other][which]
        return float(np.abs(gap).mean(axis=(1, 2, 3)).max())


class _Features:
    """CLIP's features of pairs, in half precision: 4 bytes a dimension and pair."""

    def __init__(self, clip: str) -> None:
        from ..clip.similarity import ClipSimilarity

        self._clip = ClipSimilarity.load(clip)
        self._rows: list[int] = []
        self._texts: list[str] = []
        self._found: list[Any] = []
        self._waiting: list[Image.Image] = []

    def add(self, row: int, said: str, before: Image.Image, after: Image.Image) -> None:
        self._waiting += (before, after)
        self._rows.append(row)
        self._texts.append(plain(said))
        if len(self._waiting) >= AT_ONCE:
            self._encode()

    def compared(self) -> Iterable[tuple[str, int, str]]:
        """(fault, row, what was measured); nothing where the set says too little about its own words."""
        self._encode()
        if len(self._rows) < FEWEST:
            return
        both = np.concatenate(self._found).reshape(len(self._rows), 2, -1)
        scores = agreement(both[:, 0], both[:, 1], self._texts)
        usual = float(np.median(scores))
        if usual < FOLLOWED:
            log.warning("the pictures do not follow their words closely enough to judge instructions by")
            return
        # The better the set follows its words, the less has to be wrong: measured on scenes at 2 % of false alarms.
        least = min(MOST_ASKED, 3.0 * usual - 2.35)
        for row, score in zip(self._rows, scores.tolist(), strict=True):
            if score < least:
                name = "swapped" if score < least - BACKWARDS else "instruction"
                yield name, row, f"agrees with the set by {score:.2f}"

    def _encode(self) -> None:
        if self._waiting:
            self._found.append(self._clip.image_features(self._waiting).cpu().numpy().astype(np.float16))
            self._waiting = []


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    lower, median, upper = np.quantile(np.array(values), (0.25, 0.5, 0.75)).tolist()
    return {"lower": lower, "median": median, "upper": upper}
