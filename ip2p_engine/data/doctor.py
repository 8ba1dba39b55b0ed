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
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..captions.edits import plain
from ..errors import ConfigError, DatasetError
from ..hooks import Hooks
from .reading import Reading, open_pairs
from .record import PairRecord
from .sheet import write_page
from .split import near_groups, picture_hash, test_rows
from .store import PairWriter

__all__ = ["FAULTS", "Doctored", "Finding", "doctor", "drop", "show"]

FAULTS = ("offset", "unchanged", "cast", "blocks", "duplicate", "caption", "aspect", "tiny", "broken", "split")
KEPT_FAULTS = ("split",)
"""Not a reason to leave a pair out."""
SIDE, FARTHEST, NEAREST = 128, 0.08, 1.4
ZOOMS = (0.9, 0.92, 0.94, 0.96, 1.04, 1.06, 1.08, 1.1)
MATCHED, BETTER, BETTER_IF_ASKED, CLEAR = 0.5, 0.12, 0.25, 0.95
CHANGED, FEW, LITTLE = 12, 0.002, 2.0
LEAST_CAST, MOST_CAST, ALIKE, MOST_OF_IT, ALL_OF_IT = 5.0, 48.0, 6.0, 0.5, 0.93
BLOCKY, VISIBLE, FEWEST_LINES = 1.35, 0.3, 5
SMALLEST, FLAT, SAME_ASPECT, NEAR = 48, 1.0, 0.02, 3.0
ARTICLES = ("a", "an", "the", "this", "there", "two", "three", "photo", "photograph", "picture", "image", "painting")
ASKS = re.compile(r"\b(should|must|make|turn|change|replace|add|remove|become|be|put|swap|have|let|convert|edit)\b")
LOOKS = re.compile(
    r"\b(background|backdrop|ground|behind|sky|style|look\w*|sketch\w*|draw\w*|paint\w*|pencil|photo\w*|picture|image|scene|"
    r"snow\w*|winter|summer|autumn|spring|night|day\w*|evening|morning|sun\w*|dark\w*|bright\w*|light\w*|black|sepia|"
    r"vintage|colou?r it|tone\w*|warm\w*|cold\w*|fog\w*|rain\w*|weather|season)\b"
)
"""Instructions that ask for another look or ground may well shift the colours of most of the picture."""
SHOWN = 40


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

    def counts(self) -> dict[str, int]:
        """How many pairs have each fault."""
        found = Counter(name for one in self.findings for name in one.faults)
        return {name: found[name] for name in FAULTS}

    def as_text(self) -> str:
        """The same for people."""
        lines = [f"{self.pairs:,} pairs, {len(self.findings):,} with a fault"]
        for name, count in self.counts().items():
            examples = [one for one in self.findings if name in one.faults][:2]
            shown = "; ".join(f"{one.key}: {one.faults[name]}" for one in examples)
            lines.append(f"{name:>10} {count:7,}  {count / max(1, self.pairs):6.1%}  {shown}".rstrip())
        if self.changed:
            lines.append("pixels changed: " + ", ".join(f"{name} {value:.1%}" for name, value in self.changed.items()))
        return "\n".join(lines)


def doctor(folder: Path | str, reading: Reading | None = None, *, hooks: Hooks | None = None) -> Doctored:
    """Look at every pair of a data set of any layout, about 20 ms each. Raises DatasetError."""
    pairs, hooks = open_pairs(folder, reading), hooks or Hooks()
    if not len(pairs):
        raise DatasetError(f"{folder} has no pairs yet; the doctor needs at least one")
    found: dict[int, dict[str, str]] = {}
    seen = _Seen()
    shares: list[float] = []
    keys: list[str] = []
    for row, pair in enumerate(pairs.outcomes()):
        hooks.check_stop()
        if isinstance(pair, DatasetError):
            found[row] = {"broken": str(pair)}
            seen.add(None, None, None)
            keys.append(f"row {row + 1}")
        else:
            found[row], share, thumbs = _faults_of(pair)
            shares += [] if share is None else [share]
            seen.add(pair, thumbs, picture_hash(pair.original_image))
            keys.append(pair.key or f"row/{row}")
        hooks.progress(row + 1, len(pairs))
    for row, other in seen.duplicates():
        found[row]["duplicate"] = f"of {keys[other]}"
    rule, test = test_rows(pairs, [text or "" for text in pairs.columns("original_prompt")["original_prompt"]])
    for row, other in seen.on_both_sides(set(test)):
        found[row]["split"] = f"its source is that of {keys[other]}"
    findings = tuple(Finding(row=row, key=keys[row], faults=faults) for row, faults in found.items() if faults)
    return Doctored(pairs=len(keys), findings=findings, split_rule=rule, changed=_quartiles(shares))


def show(folder: Path | str, out: Path, doctored: Doctored, reading: Reading | None = None) -> int:
    """A page (``sheet``) of up to 40 pairs of each fault, to look at; returns how many. Raises DatasetError."""
    chosen: dict[int, str] = {}
    counted: Counter[str] = Counter()
    for one in doctored.findings:
        if "broken" not in one.faults and any(counted[name] < SHOWN for name in one.faults):
            counted.update(one.faults.keys())
            chosen[one.row] = "; ".join(f"{name}: {said}" for name, said in one.faults.items())
    pairs = open_pairs(folder, reading)
    title = f"{Path(folder).resolve().name}: {len(chosen)} of {len(doctored.findings):,} pairs with a fault"
    write_page([(row, pairs[row]) for row in sorted(chosen)], out, title, notes=chosen)
    return len(chosen)


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
    pairs, count = open_pairs(folder, reading), 0
    manifest = {"config": {"doctored": str(folder), "without": sorted(left_out)}}
    with PairWriter(out, manifest=manifest) as writer:
        done = writer.done_keys()
        for row, pair in enumerate(pairs.outcomes()):
            if row in bad or isinstance(pair, DatasetError):
                continue
            key = pair.key or f"row/{row}"
            if key not in done:
                writer.write(pair if pair.key else PairRecord(**{**vars(pair), "key": key}))
                count += 1
    return count


def _faults_of(pair: PairRecord) -> tuple[dict[str, str], float | None, Any]:
    """(faults, share of pixels changed, small versions of both pictures)."""
    found: dict[str, str] = {}
    if words := _caption_fault(pair):
        found["caption"] = words
    pictures = [_opened(data) for data in (pair.original_image, pair.edited_image)]
    before, after = pictures
    if before is None or after is None:
        return {**found, "broken": "a picture cannot be decoded"}, None, None
    for name, picture in (("before", before), ("after", after)):
        small = np.asarray(picture.resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
        if min(picture.size) < SMALLEST:
            found["tiny"] = f"{name} is {picture.width} x {picture.height}"
        elif small.std(axis=(0, 1)).max() < FLAT:
            found["tiny"] = f"{name} is of one colour"
    if abs(before.width * after.height / (before.height * after.width) - 1) > SAME_ASPECT:
        sizes = f"{before.width} x {before.height}, {after.width} x {after.height}"
        return {**found, "aspect": sizes}, None, _thumbs(before, after)
    grid = _blockiness(after)
    if grid > BLOCKY:
        found["blocks"] = f"steps at the grid are {grid:.1f} times those within"
    scale = SIDE / max(before.size)
    size = (max(8, round(before.width * scale)), max(8, round(before.height * scale)))
    arrays = [np.asarray(one.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) for one in pictures if one]
    difference, asked = arrays[1] - arrays[0], bool(LOOKS.search(pair.edit_prompt.lower()))
    share = float((np.abs(difference).max(axis=2) > CHANGED).mean())
    if share < FEW and np.abs(difference).mean() < LITTLE:
        found["unchanged"] = f"{share:.2%} of the pixels differ"
    elif (shift := _cast(difference, asked=asked)) is not None:
        found["cast"] = "red {:+.0f}, green {:+.0f}, blue {:+.0f}".format(*shift)
    elif moved := _offset(arrays[0], arrays[1], before.width / size[0], asked=asked):
        found["offset"] = moved
    return found, share, _thumbs(before, after)


def _opened(data: bytes) -> Image.Image | None:
    try:
        with Image.open(io.BytesIO(data)) as picture:
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


def _cast(difference: Any, *, asked: bool) -> Any:
    """The colour by which at least half of the picture is shifted alike; None where it is not.

    Where another look was ``asked`` for, nearly all of it has to be.
    """
    shift = np.median(difference.reshape(-1, 3), axis=0)
    if not LEAST_CAST <= np.abs(shift).max() <= MOST_CAST:
        return None
    alike = np.abs(difference - shift).max(axis=2) <= ALIKE
    return shift if alike.mean() >= (ALL_OF_IT if asked else MOST_OF_IT) else None


def _offset(before: Any, after: Any, scale: float, *, asked: bool) -> str:
    """How the edges of the after picture lie against those before; empty where they lie as they are.

    Where another look was ``asked`` for, which draws edges of its own, they have to match much better.
    """
    better = BETTER_IF_ASKED if asked else BETTER
    one, other = (_edges(picture) for picture in (before, after))
    still = float((one * other).sum())
    if still > CLEAR:
        return ""
    dx, dy, best = _best_shift(one, other)
    if np.hypot(dx, dy) >= NEAREST and best > MATCHED and best > still + better:
        return f"shifted by {dx * scale:+.0f}, {dy * scale:+.0f} px (edges match {best:.2f}, unshifted {still:.2f})"
    zoomed = max(((float((one * _edges(_zoomed(after, zoom))).sum()), zoom) for zoom in ZOOMS), default=(0.0, 1.0))
    if zoomed[0] > MATCHED and zoomed[0] > still + better:
        return f"zoomed by {1 / zoomed[1]:.2f} (edges match {zoomed[0]:.2f}, unzoomed {still:.2f})"
    return ""


def _edges(picture: Any) -> Any:
    """Of the strongest channel, spread a little, with length 1."""
    across = np.abs(np.diff(picture, axis=1, prepend=picture[:, :1])).max(axis=2)
    down = np.abs(np.diff(picture, axis=0, prepend=picture[:1])).max(axis=2)
    edges = np.sqrt(np.minimum(across + down, 96))
    edges = edges - edges.mean()
    length = np.linalg.norm(edges)
    return edges / length if length > 0 else edges


def _best_shift(one: Any, other: Any) -> tuple[int, int, float]:
    correlation = np.fft.irfft2(np.fft.rfft2(one) * np.conj(np.fft.rfft2(other)), s=one.shape)
    reach = max(2, round(FARTHEST * max(one.shape)))
    shifts = range(-reach, reach + 1)
    near = correlation[np.ix_(np.array(shifts) % one.shape[0], np.array(shifts) % one.shape[1])]
    y, x = np.unravel_index(int(near.argmax()), near.shape)
    return -(int(x) - reach), -(int(y) - reach), float(near.max())


def _zoomed(picture: Any, zoom: float) -> Any:
    height, width = picture.shape[:2]
    left, right = (width * (1 + sign / zoom) / 2 for sign in (-1, 1))
    top, bottom = (height * (1 + sign / zoom) / 2 for sign in (-1, 1))
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    if zoom < 1:  # beyond the edge lies the edge
        pad = [int(np.ceil(height * (1 / zoom - 1) / 2)) + 1, int(np.ceil(width * (1 / zoom - 1) / 2)) + 1]
        wide = np.pad(np.asarray(image), ((pad[0],) * 2, (pad[1],) * 2, (0, 0)), mode="edge")
        image = Image.fromarray(wide)
        left, right, top, bottom = left + pad[1], right + pad[1], top + pad[0], bottom + pad[0]
    resized = image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return np.asarray(resized, dtype=np.float32)


class _Seen:
    """What pairs are compared by, 400 bytes each."""

    def __init__(self) -> None:
        self._hashes: list[int | None] = []
        self._thumbs: list[Any] = []
        self._texts: list[int] = []

    def add(self, pair: PairRecord | None, thumbs: Any, hashed: int | None) -> None:
        self._hashes.append(hashed if thumbs is not None else None)
        self._thumbs.append(thumbs)
        self._texts.append(hash(plain(pair.edit_prompt)) if pair else 0)

    def duplicates(self) -> Iterable[tuple[int, int]]:
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

    def on_both_sides(self, test: set[int]) -> Iterable[tuple[int, int]]:
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


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    lower, median, upper = np.quantile(np.array(values), (0.25, 0.5, 0.75)).tolist()
    return {"lower": lower, "median": median, "upper": upper}
