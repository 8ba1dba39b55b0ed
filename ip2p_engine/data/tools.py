"""What one does with a data set as a whole: say what is in it, verify it, bring it in and out."""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..files import TEMPORARY
from ..hooks import Hooks, passing_over
from ..images import encoded
from .export import export_pairs
from .ledger import pair_key, read_candidates
from .parquet import numbered
from .reading import ForeignPairs, Pairs, Reading, open_pairs
from .record import OPTIONAL, SCORES, PairRecord
from .store import MANIFEST, ROWS_PER_SHARD, PairStore, PairWriter

__all__ = ["DatasetInfo", "Verdict", "export_dataset", "import_dataset", "info", "merge_datasets", "verify"]

ORIGINS = {"imported": "imported from", "merged": "merged from", "doctored": "without faults, from"}
"""What a store without a maker of pictures was made of, by the name in its manifest's config."""
MAX_FAULTS = 100
MOST_FAULTS = 1000

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a data set holds."""

    folder: str
    pairs: int
    captions: int
    """Different triples of caption, instruction and edited caption."""
    captioned: bool
    """Whether any pair has captions."""
    shards: int
    bytes: int
    picture_sizes: dict[str, int]
    """Sizes and formats of ten pairs, such as "512x512 JPEG", with their number."""
    scores: dict[str, dict[str, float]]
    """Of each score that is there: how many, least, quartiles, most."""
    manifest: dict[str, Any] | None

    def as_text(self) -> str:
        """The same for people."""
        texts = "of {:,} captions" if self.captioned else "with {:,} instructions and no captions"
        lines = [f"{self.folder}: {self.pairs:,} pairs {texts.format(self.captions)}"]
        files = f"{self.shards} {'file' if self.shards == 1 else 'files'}"
        lines += [f"{files}, {self.bytes / 2**20:,.1f} MiB, pictures {', '.join(self.picture_sizes)}"]
        for name, row in self.scores.items():
            figures = "  ".join(f"{key} {row[key]:.3f}" for key in ("least", "lower", "median", "upper", "most"))
            lines.append(f"{name:>13}  {figures}  ({row['count']:,} pairs)")
        versions = (self.manifest or {}).get("versions", {})
        config = (self.manifest or {}).get("config", {})
        origin = next((name for name in ORIGINS if isinstance(config, dict) and name in config), "")
        if origin:  # the packages of that day did not make its pictures
            came = config[origin] if isinstance(config[origin], list) else [config[origin]]
            lines.append(f"{ORIGINS[origin]} {', '.join(map(str, came))}")
        elif versions:
            lines.append(f"made by {', '.join(f'{name} {number}' for name, number in versions.items())}")
        return "\n".join(lines)


def info(folder: Path | str, reading: Reading | None = None) -> DatasetInfo:
    """What is in a data set, or in the part that is read of it, without reading all pictures. Raises DatasetError."""
    pairs = open_pairs(folder, reading)
    columns = pairs.columns("original_prompt", "edit_prompt", "edited_prompt", *SCORES)
    texts = set(zip(*(columns[name] for name in ("original_prompt", "edit_prompt", "edited_prompt")), strict=True))
    sizes = Counter(_size(pairs, n) for n in range(0, len(pairs), max(1, len(pairs) // 10)))
    summaries = {name: _summary([value for value in columns[name] if value is not None]) for name in SCORES}
    return DatasetInfo(
        folder=str(folder),
        pairs=len(pairs),
        captions=len(texts),
        captioned=any(before or after for before, _, after in texts),
        shards=len(pairs.shards),
        bytes=sum(path.stat().st_size for path in pairs.shards),
        picture_sizes=dict(sizes.most_common()),
        scores={name: summary for name, summary in summaries.items() if summary},
        manifest=pairs.manifest if (Path(folder) / MANIFEST).exists() else None,
    )


def _size(pairs: Pairs, row: int) -> str:
    try:
        with encoded(pairs[row].original_image) as picture:
            return f"{picture.width}x{picture.height} {picture.format}"
    except Exception:  # as in _pair_faults
        return "unreadable"


def _summary(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    names = ("least", "lower", "median", "upper", "most")
    return {"count": len(values), **dict(zip(names, (min(values), *quarters, max(values)), strict=True))}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What ``verify`` found."""

    pairs: int
    faults: tuple[str, ...]
    """One sentence each; after 100 of them the search stops."""
    digest: str
    """Of the content in the order of the keys: equal for equal pairs, however they are cut into shards."""

    @property
    def sound(self) -> bool:
        return not self.faults


def verify(folder: Path | str, reading: Reading | None = None, *, hooks: Hooks | None = None) -> Verdict:
    """Read everything: every shard whole, every picture decodes, pairs match in size, keys once, scores in range.

    Raises DatasetError only where there is no data set at all, or a shard's footer is broken.
    """
    # The ledger first: a writer at work brings pictures to the disk before their line.
    named, faults = _named_by_ledger(Path(folder))
    noting = Hooks(on_error=lambda _, error: faults.append(str(error)))
    pairs, digests, hooks = open_pairs(folder, reading, hooks=noting), [], hooks or Hooks()
    if (Path(folder) / MANIFEST).exists():
        faults += _caught(lambda: pairs.manifest)
    elif isinstance(pairs, PairStore) and pairs.is_ours:
        faults.append(f"{folder} has no {MANIFEST}; import it to give it one")
    faults += [f"{path} is left of a killed writer; it goes when writing goes on" for path in _leftovers(Path(folder))]
    seen: set[str] = set()
    for row, pair in numbered(pairs.outcomes()):
        number = row + 1
        hooks.check_stop()
        if isinstance(pair, DatasetError):
            faults.append(str(pair))
        else:
            faults += [f"pair {pair.key or number}: {fault}" for fault in _pair_faults(pair, seen)]
            seen.add(pair.key)
            digests.append(_digest(pair))
        hooks.progress(number, len(pairs))
        if len(faults) >= MAX_FAULTS:
            break
    else:
        faults += [f"pair {key}: the ledger names it, and it is not there" for key in named if key not in seen]
    whole = hashlib.sha256(b"".join(digest for _, digest in sorted(digests))).hexdigest()
    return Verdict(pairs=len(pairs), faults=tuple(faults[:MAX_FAULTS]), digest=whole)


def _caught(read: Callable[[], Any]) -> list[str]:
    try:
        read()
    except DatasetError as error:
        return [str(error)]
    return []


def _leftovers(folder: Path) -> Iterator[Path]:
    yield from folder.rglob(f".*{TEMPORARY}")


def _pair_faults(pair: PairRecord, seen: set[str]) -> Iterator[str]:
    if pair.key and pair.key in seen:
        yield "its key is there twice"
    if not pair.edit_prompt.strip():
        yield "it has no instruction"
    sizes = []
    for name in ("original_image", "edited_image"):
        try:
            with encoded(getattr(pair, name), name) as picture:
                picture.load()
                sizes.append(picture.size)
        except Exception as error:  # decoders raise nearly every class of exception on broken data
            yield f"its {name} cannot be decoded ({error})"
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        yield f"its pictures have the sizes {sizes[0]} and {sizes[1]}"
    for name in SCORES:
        value = getattr(pair, name)
        # A hair's breadth beyond 1 is rounding.
        if value is not None and not (math.isfinite(value) and abs(value) <= 1.001):
            yield f"its {name} is {value}"


def _named_by_ledger(folder: Path) -> tuple[list[str], list[str]]:
    """(keys of the pairs that the ledger of candidates calls kept, its faults)."""
    try:
        return [pair_key(row.caption, seed) for row in read_candidates(folder) for seed in row.kept], []
    except DatasetError as error:
        return [], [str(error)]


def _digest(pair: PairRecord) -> tuple[str, bytes]:
    content = hashlib.sha256()
    for name, value in sorted(vars(pair).items()):
        if name in OPTIONAL and value is None:  # stores of 0.1 have no such columns, and the same digest
            continue
        data = value if isinstance(value, bytes) else repr(value).encode()
        content.update(f"{name} {len(data)} ".encode() + data)
    return pair.key, content.digest()


def import_dataset(
    source: Path | str,
    out: Path | str,
    reading: Reading | None = None,
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    hooks: Hooks | None = None,
) -> int:
    """Bring a data set of any known layout into a store (``reading.open_pairs``), or a part of it.

    A row that cannot be used is passed over: ``hooks.on_error`` hears of it, or the log. What the store has already is
    skipped, so a stopped import goes on. Returns the number of new pairs. Raises DatasetError, also where no row can be
    used.
    """
    reading, hooks = reading or Reading(), passing_over(hooks)
    pairs = open_pairs(source, reading, streaming=True, hooks=hooks)
    manifest = {"config": {"imported": str(source), "layout": _format_name(pairs), **reading.in_manifest()}}
    count, seen, faults, said = 0, set[str](), 0, ""
    with PairWriter(out, manifest=manifest, rows_per_shard=rows_per_shard) as writer:
        done = writer.done_keys()
        for number, pair in _all_keyed(pairs):
            hooks.check_stop(f"stopped with {count} new pairs in {out}")
            if isinstance(pair, PairRecord) and pair.key in seen:
                pair = DatasetError(f"{source}, row {number + 1}: another row has its key {pair.key!r}")
            if isinstance(pair, DatasetError):
                faults, said = faults + 1, str(pair)
                hooks.error(number, pair)
                if faults >= MOST_FAULTS and not seen:
                    raise DatasetError(f"none of the first {faults} rows of {source} can be used; the last: {said}")
                continue
            seen.add(pair.key)
            if pair.key not in done:
                writer.write(pair)
                count += 1
            hooks.progress(count, count)
    if faults and not seen:
        raise DatasetError(f"no row of {source} can be used; the last: {said}")
    return count


def _format_name(pairs: Pairs) -> str:
    """As manifests of 0.1 have it."""
    return pairs.table.kind if isinstance(pairs, ForeignPairs) else "parquet"


def export_dataset(
    folder: Path | str,
    out: Path | str,
    reading: Reading | None = None,
    *,
    layout: str = "original",
    hooks: Hooks | None = None,
) -> int:
    """Write a data set in one of the layouts of ``export.EXPORTS``; returns the number of pairs.

    A row that cannot be used is passed over: ``hooks.on_error`` hears of it, or the log. A killed export goes on.
    Raises ConfigError, DatasetError.
    """
    return export_pairs(open_pairs(folder, reading, hooks=hooks), Path(out), layout, hooks=hooks)


def merge_datasets(
    sources: Sequence[Path | str],
    out: Path | str,
    *,
    hooks: Hooks | None = None,
) -> int:
    """Several data sets of any layout as one store; the keys of source n begin with ``n/``. Returns the new pairs.

    A row that cannot be used is passed over: ``hooks.on_error`` hears of it, or the log. A stopped merge goes on.
    Raises DatasetError.
    """
    hooks = passing_over(hooks)
    opened = [open_pairs(source, hooks=hooks) for source in sources]
    count, total = 0, sum(map(len, opened))
    with PairWriter(out, manifest={"config": {"merged": list(map(str, sources))}}) as writer:
        done = writer.done_keys()
        firsts = accumulate(map(len, opened), initial=0)
        for source, (first, pairs) in enumerate(zip(firsts, opened, strict=False)):
            for number, pair in _all_keyed(pairs):
                hooks.check_stop(f"stopped with {count} new pairs in {out}")
                if isinstance(pair, DatasetError):
                    hooks.error(first + number, pair)
                elif (key := f"{source}/{pair.key}") not in done:
                    writer.write(replace(pair, key=key))
                    count += 1
                hooks.progress(first + number + 1, total)
    return count


def _all_keyed(pairs: Pairs) -> Iterator[tuple[int, PairRecord | DatasetError]]:
    """(row, pair), each with a key."""
    for number, pair in numbered(pairs.outcomes()):
        nameless = isinstance(pair, PairRecord) and not pair.key
        yield number, replace(pair, key=f"row/{number}") if nameless else pair
