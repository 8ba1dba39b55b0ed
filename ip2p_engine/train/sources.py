"""Where training pairs come from: any layout that ``data.reading`` knows, or rows that someone hands over."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..captions.edits import in_test_split
from ..data.formats import HubTable, library_errors, open_hub
from ..data.layouts import is_picture
from ..data.reading import (
    STORE_COLUMNS,
    Example,
    ForeignPairs,
    Reading,
    Rows,
    name_of_identity,
    open_pairs,
    store_identity,
)
from ..data.record import PairRecord
from ..data.split import test_rows
from ..data.store import PairStore
from ..data.tables import ListTable
from ..errors import ConfigError, DatasetError, IP2PError
from ..images import Size, open_image, open_mask, upright_size
from ..tokenizer import check_length
from .config import TrainConfig

__all__ = [
    "Chosen",
    "Example",
    "Pair",
    "Rows",
    "Several",
    "Stream",
    "held_out_rows",
    "licences_of",
    "measured_rows",
    "name_of",
    "names_of",
    "open_pair",
    "open_source",
    "refuse_without_masks",
    "size_of",
]

log = logging.getLogger(__name__)
SAME_ASPECT = 0.02
SAMPLED = 16
BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tar": "webdataset"}
TAKEN = (
    "a data set's folder, file or name, PairRecords, (before, after, instruction) in tuples or objects, a data set of "
    "torch or of the datasets library, or Rows"
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One pair that can be trained on."""

    name: str
    original: Image.Image
    instruction: str
    edited: Image.Image
    mask: Image.Image | None = None
    """Grey, of the original's size, white where it was edited; None where the data do not say, or nobody asked."""
    captions: tuple[str, str] | None = None
    """Before and after, where the data have both."""


class Stream(Protocol):
    """Pairs that are read in their own order, shuffled within a buffer."""

    identity: str

    def epoch(self, seed: int) -> Iterator[Example]: ...


def open_source(data: Any, config: TrainConfig) -> Any:
    """Open a data set of any known layout, or take rows that are handed over.

    These may be PairRecords, tuples (before, after, instruction), objects with the field's column names, a Dataset of
    torch with such items, one of the ``datasets`` library, or ``Rows``. Returns Rows, or with ``config.streaming`` a
    Stream. Raises DatasetError where there is nothing to train on, and ConfigError if a test split is to be held out
    that nothing names, what is read by number is to be streamed, or the data are something else.
    """
    if _is_several(data):
        return _several(data, config)
    if config.data_weights is not None:
        raise ConfigError("`data_weights` are of several data sets, and there is one; leave them out")
    source = _opened(data, config)
    if config.streaming and hasattr(source, "__len__"):
        raise ConfigError(f"{name_of(data)} is read by row number and cannot be streamed; leave streaming out")
    if config.hold_out_test:
        source = _held_out(source, data)
    if hasattr(source, "__len__") and not len(source):
        raise DatasetError(f"{name_of(data)} holds no pair; give a data set that does")
    return source


def _is_several(data: Any) -> bool:
    """Names of data sets in a list; other lists are rows."""
    kinds = (str, Path, PairStore, ForeignPairs)
    return isinstance(data, list | tuple) and bool(data) and all(isinstance(one, kinds) for one in data)


def _several(data: Sequence[Any], config: TrainConfig) -> Any:
    weights, one = config.data_weights, replace(config, data_weights=None)
    if len(data) == 1 and weights is None:
        return open_source(data[0], config)
    if weights is not None and len(weights) != len(data):
        raise ConfigError(f"there are {len(data)} data sets and {len(weights)} `data_weights`; give one for each")
    if config.streaming:
        raise ConfigError("several data sets are drawn from by row number and cannot be streamed; leave streaming out")
    if config.buckets and weights is not None:
        raise ConfigError("buckets cut a data set into shapes, and data_weights draw from each; leave one of them out")
    return Several([open_source(name, one) for name in data], weights)


def name_of(data: Any) -> str:
    """What to call a data set in a sentence."""
    if _is_several(data):
        return ", ".join(map(name_of, data))[:500]
    return str(data)[:500] if isinstance(data, str | Path) else f"the {type(data).__name__} of pairs"


def measured_rows(source: Rows | Stream) -> list[int]:
    """Rows of the test split, on which ``ip2p evaluate`` measures; none where there are no captions to tell."""
    if isinstance(source, Several):
        return [row for start, one in source.parts() for row in (start + n for n in measured_rows(one))]
    if not isinstance(source, _StoreRows):
        return []
    return [row for row, caption in enumerate(source.captions()) if in_test_split(caption)]


def names_of(source: Any) -> list[str]:
    """What the checkpoint's header calls the data: a digest of each set, so that evaluate knows it again."""
    if isinstance(source, Several):
        return sorted({name for one in source.sources for name in names_of(one)})
    if isinstance(source, Chosen):
        return names_of(source.source)
    return [name_of_identity(source.identity)]


def held_out_rows(source: Any) -> Any:
    """The rows that are left out of training, to measure on; None where there are none."""
    if isinstance(source, Several):
        rests = [rest for rest in map(held_out_rows, source.sources) if rest is not None]
        return Several(rests, None) if rests else None
    return source.rest() if getattr(source, "held_out", 0) else None


def refuse_without_masks(source: Any, data: Any) -> None:
    """Raises ConfigError where none of some rows has a mask; of a stream nothing is known before it is read."""
    if not hasattr(source, "__len__"):
        return
    for row in range(0, len(source), -(-len(source) // SAMPLED)):
        with suppress(DatasetError):
            if source[row].mask is not None:
                return
    raise ConfigError(
        f"{name_of(data)} has no masks, by some of its rows; give pairs with a mask column, or do not ask"
    )


def licences_of(source: Any) -> list[str]:
    """What the pairs say of their licences, each once."""
    return sorted(source.licences()) if hasattr(source, "licences") else []


def _held_out(source: Rows | Stream, data: Any) -> Chosen:
    """Without the test split (``data.split``); says how many that are. Raises ConfigError where they are none."""
    if not isinstance(source, _StoreRows):
        raise ConfigError(
            f"{name_of(data)} cannot be held out of; give a data set's folder, or leave `hold_out_test` out"
        )
    rule, rows = source.test_split()
    if not rows:
        got = f"`hold_out_test` holds out none of the {len(source)} pairs of {name_of(data)} (by {rule})"
        raise ConfigError(f"{got}; bring more, or leave `hold_out_test` out")
    log.warning("%s: %d of %d pairs are held out, by %s", name_of(data), len(rows), len(source), rule)
    test = set(rows)
    chosen = Chosen(source, [row for row in range(len(source)) if row not in test])
    chosen.split_rule, chosen.held_out = rule, len(rows)
    return chosen


def open_pair(example: Example, draw: int = 0, *, masks: bool = False) -> Pair:
    """Decode and check an example, on request with its mask; of several instructions ``draw`` picks one.

    Raises DatasetError, naming the example, for what cannot be trained on.
    """
    said = example.instruction
    said = said[draw % len(said)] if isinstance(said, tuple) and said else said
    if not isinstance(said, str):
        raise DatasetError(f"{example.name}: the instruction is {type(said).__name__}; give a text")
    if not said.strip():
        raise DatasetError(f"{example.name}: the instruction is empty; give a text")
    try:
        check_length(said)
        original, edited = (open_image(_decoded(picture)) for picture in (example.original, example.edited))
        given = masks and example.mask is not None
        mask = open_mask(_decoded(example.mask), original.size) if given else None
    except IP2PError as error:
        raise DatasetError(f"{example.name}: {error}") from error
    aspects = [picture.width / picture.height for picture in (original, edited)]
    if abs(aspects[0] / aspects[1] - 1) > SAME_ASPECT:
        sizes = f"{original.width} x {original.height} and {edited.width} x {edited.height}"
        raise DatasetError(f"{example.name}: the pictures are {sizes}; give pairs of one aspect")
    known: dict[str, Any] = {"mask": mask, "captions": example.captions}
    return Pair(name=example.name, original=original, instruction=said, edited=edited, **known)


def size_of(example: Example) -> Size:
    """Of the picture before the edit, by its header; raises DatasetError, naming the example."""
    try:
        return upright_size(_decoded(example.original))
    except IP2PError as error:
        raise DatasetError(f"{example.name}: {error}") from error


def _opened(data: Any, config: TrainConfig) -> Any:
    if isinstance(data, PairStore):
        data = data.folder
    if isinstance(data, str | Path):
        return _stream(data, config) if _is_streamed(data, config) else _rows_of(open_pairs(data, _reading(config)))
    if isinstance(data, ForeignPairs):
        return _rows_of(data)
    if hasattr(data, "identity") and hasattr(data, "__getitem__"):
        return data
    if hasattr(data, "column_names"):  # the datasets library's
        return _from_library(data, config)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, bytes | Mapping):
        raise ConfigError(f"data is {type(data).__name__}; give {TAKEN}")
    if len(data) and isinstance(data[0], PairRecord):
        return _StoreRows(data, _identity(data))
    if len(data) and isinstance(data[0], Mapping):
        table = ListTable(data, f"the {type(data).__name__}", None)
        return _ForeignRows(ForeignPairs(Path(), table, _reading(config)))
    return _Handed(data)


def _reading(config: TrainConfig) -> Reading:
    columns = None if config.columns == STORE_COLUMNS else config.columns
    names = ("limit", "where", "inverses", "pictures_from")
    return Reading(columns=columns, split=config.split, **{name: getattr(config, name) for name in names})


def _rows_of(pairs: Any) -> Any:
    return _StoreRows(pairs, store_identity(pairs)) if isinstance(pairs, PairStore) else _ForeignRows(pairs)


def _identity(pairs: Sequence[PairRecord]) -> str:
    content = blake2b(digest_size=16)
    for pair in pairs:
        content.update(repr((pair.key, pair.edit_prompt)).encode() + pair.original_image + pair.edited_image)
    return content.hexdigest()


class _StoreRows:
    """Our store's, or a sequence of PairRecords."""

    def __init__(self, pairs: Any, identity: str) -> None:
        self._pairs, self.identity = pairs, identity

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, row: int) -> Example:
        pair = self._pairs[row]
        said = (pair.edit_prompt, *pair.paraphrases) if pair.paraphrases else pair.edit_prompt
        name = f"pair {pair.key or row}"
        pictures = {"original": pair.original_image, "edited": pair.edited_image, "mask": pair.mask}
        return Example(name=name, instruction=said, captions=(pair.original_prompt, pair.edited_prompt), **pictures)

    def captions(self) -> list[str]:
        """Of the pictures before the edit; empty where unknown."""
        if hasattr(self._pairs, "columns"):
            return [caption or "" for caption in self._pairs.columns("original_prompt")["original_prompt"]]
        return [pair.original_prompt for pair in self._pairs]

    def test_split(self) -> tuple[str, list[int]]:
        """(the rule, the rows)."""
        return test_rows(self._pairs, self.captions())

    def licences(self) -> set[str]:
        if hasattr(self._pairs, "licences"):
            return self._pairs.licences()
        return {pair.licence for pair in self._pairs if pair.licence}


class _ForeignRows(_StoreRows):
    """A foreign layout's; pictures are opened when a row is trained on."""

    def __init__(self, pairs: ForeignPairs) -> None:
        self._pairs = pairs

    @cached_property
    def identity(self) -> str:  # type: ignore[override]
        return _sampled_identity(self) if self._pairs.table.home is None else self._pairs.identity

    def __getitem__(self, row: int) -> Example:
        return self._pairs.example(row)

    def captions(self) -> list[str]:
        """None where the layout has none, which is known without reading."""
        return super().captions() if self._pairs.layout.caption else []


class Several:
    """Several data sets as one, one after the other; ``weights`` say how often each is drawn from (``order``)."""

    def __init__(self, sources: Sequence[Any], weights: Sequence[float] | None) -> None:
        self.sources, self.weights = list(sources), weights
        self._ends = list(accumulate(map(len, self.sources)))
        self.identity = " + ".join(source.identity for source in self.sources)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> Example:
        number = bisect_right(self._ends, row)
        return self.sources[number][row - (self._ends[number - 1] if number else 0)]

    def parts(self) -> list[tuple[int, Any]]:
        """(its first row, the data set) of each."""
        return list(zip([0, *self._ends], self.sources, strict=False))

    def licences(self) -> set[str]:
        return {licence for source in self.sources for licence in licences_of(source)}

    @property
    def held_out(self) -> int:
        return sum(getattr(source, "held_out", 0) for source in self.sources)

    @property
    def split_rule(self) -> str:
        return ", ".join(dict.fromkeys(filter(None, (getattr(source, "split_rule", "") for source in self.sources))))


class _Handed:
    """Tuples (before, after, instruction) that others' code hands over."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self._refuse_other()
        self.identity = _sampled_identity(self)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Example:
        try:
            item = self._rows[row]
        except Exception as error:  # someone else's code
            raise DatasetError(f"row {row}: it cannot be read ({error!r:.200}); leave it out") from error
        before, after, said = self._parts(item, row)
        said = tuple(said) if isinstance(said, list) else said
        return Example(name=f"row {row}", original=before, instruction=said, edited=after)

    def _parts(self, item: Any, row: int) -> tuple[Any, Any, Any]:
        if not isinstance(item, tuple | list) or len(item) != 3:
            raise DatasetError(
                f"row {row}: it is {type(item).__name__}; give (before, after, instruction) or an object"
            )
        before, after, said = item
        if isinstance(after, str) and not is_picture(after) and not (isinstance(said, str) and not is_picture(said)):
            after, said = said, after  # in the order of our columns
        return before, after, said

    def _refuse_other(self) -> None:
        """Rows of another form would only be left out one by one."""
        try:
            if len(self):
                self[0]
        except DatasetError as error:
            raise ConfigError(f"data is {type(self._rows).__name__} and {error}; data may be {TAKEN}") from error


def _from_library(data: Any, config: TrainConfig) -> Any:
    pairs = ForeignPairs(Path(), HubTable(data, f"the {type(data).__name__}"), _reading(config))
    if hasattr(data, "__len__") and not config.streaming:
        return _ForeignRows(pairs)
    if hasattr(data, "__len__"):
        data = data.to_iterable_dataset()
    return _HubStream(HubTable(data, pairs.table.place).dataset, pairs, config)


def _is_streamed(data: str | Path, config: TrainConfig) -> bool:
    """Folders that only we read are not."""
    if not config.streaming:
        return False
    pairs = open_pairs(data, _reading(config), streaming=True)
    return isinstance(pairs, ForeignPairs) and pairs.table.kind in ("hub", "parquet", "triplets", "tar")


def _stream(data: str | Path, config: TrainConfig) -> _HubStream:
    """Whatever the ``datasets`` library opens, in its own order."""
    pairs = open_pairs(data, _reading(config), streaming=True)
    if config.where or config.limit or config.inverses:
        raise ConfigError("a stream is read as it is; import the part with where, limit or inverses first")
    path = Path(data).expanduser()
    if isinstance(pairs, ForeignPairs) and isinstance(pairs.table, HubTable):
        found = pairs.table.dataset
        found = found.to_iterable_dataset() if hasattr(found, "to_iterable_dataset") else found
    elif path.is_file():
        found = open_hub(BUILDERS[path.suffix.lower()], config.split, streaming=True, data_files=str(path))
    else:
        found = open_hub(str(path), config.split, streaming=True)
    return _HubStream(HubTable(found, str(path)).dataset, pairs, config)


class _HubStream:
    def __init__(self, rows: Any, pairs: Any, config: TrainConfig) -> None:
        self._rows, self._pairs, self.identity = rows, pairs, pairs.identity
        self._buffer = config.shuffle_buffer

    def epoch(self, seed: int) -> Iterator[Example]:
        shuffled = self._rows.shuffle(seed=seed, buffer_size=self._buffer)
        with library_errors("the stream broke off", "check the data set and repeat the same call"):
            # Plain iteration would give each of DataLoader's workers other shards; iter() gives all of them everything.
            for number, batch in enumerate(shuffled.iter(batch_size=1)):
                row = {name: values[0] for name, values in batch.items()}
                name = f"row {number} of the stream"
                try:
                    yield self._pairs.example_of(row, name)
                except DatasetError as error:
                    wrong = error.__cause__ or error
                    yield Example(name=name, original=wrong, instruction="?", edited=wrong)


def _sampled_identity(rows: Any) -> str:
    """Of some rows, since others' code may take long for each."""
    content = blake2b(f"{len(rows)}".encode(), digest_size=16)
    for row in range(0, len(rows), -(-len(rows) // SAMPLED) or 1):
        try:
            example = rows[row]
            content.update(repr(example.instruction).encode() + open_image(_decoded(example.edited)).tobytes())
        except IP2PError:
            content.update(b"broken")
    return content.hexdigest()


class Chosen:
    """Some of the rows, read when they are asked for."""

    def __init__(self, rows: Rows, numbers: Sequence[int]) -> None:
        self._rows, self._numbers = rows, numbers
        self.source = rows
        self.identity = f"{len(numbers)} rows of {rows.identity}"
        self.split_rule, self.held_out = "", 0

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, row: int) -> Example:
        return self._rows[self._numbers[row]]

    def rest(self) -> Chosen:
        """The rows that were left out."""
        chosen = set(self._numbers)
        return Chosen(self._rows, [row for row in range(len(self._rows)) if row not in chosen])

    def licences(self) -> set[str]:
        return set(licences_of(self._rows))


def _decoded(value: Any) -> Any:
    """What open_image takes, of the forms that pictures are handed over in; raises what came in place of one."""
    if isinstance(value, DatasetError):
        raise value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise DatasetError("a picture is missing")
    if isinstance(value, str | Path | bytes | Image.Image):
        return value
    return _from_array(value)


def _from_array(value: Any) -> Image.Image:
    """Of numpy's and torch's: (height, width, 3) or (3, height, width), whole numbers to 255 or floats from 0 to 1."""
    import numpy as np

    try:
        pixels = np.asarray(value)
        if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
            pixels = pixels.transpose(1, 2, 0)
        if np.issubdtype(pixels.dtype, np.floating):
            pixels = (pixels.clip(0, 1) * 255).round()
        return Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DatasetError(f"a picture is {type(value).__name__}; give a path, bytes, pixels or a picture") from error
