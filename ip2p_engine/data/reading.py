"""Any data set of edits as pairs: our store, and the layouts of ``layouts`` in the formats of ``tables``.

One reader for training, import, evaluation, filter, sheet, verify and doctor.
"""

from __future__ import annotations

import json
import logging
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError, DatasetError, ImageError, first_line
from ..files import digest_of_files, digest_of_text, disk_errors, is_url, web_stream
from ..hooks import Hooks, passing_over
from .formats import card_licence, missing_files, open_table
from .layouts import cell, inline_picture, layout_of
from .parquet import LostRows, numbered
from .record import CHECKS, COLUMNS, PICTURES, PairRecord
from .store import PairStore, read_manifest
from .tables import OriginalTable, Table
from .turns import TurnsTable, text_lists, turns_of
from .values import Cells, kept_bytes, label_of, number_of, own_scores, parsed, single, swapped
from .where import Where

__all__ = [
    "Example",
    "ForeignPairs",
    "Pairs",
    "Reading",
    "Rows",
    "name_of_identity",
    "name_of_pairs",
    "open_pairs",
]

log = logging.getLogger(__name__)
SAMPLE, MOST_BROKEN, MOST_BYTES = 3, 1000, 100 * 2**20
FREE = ("limit", "download", "pictures_from")
STORE_COLUMNS = ("original_image", "edit_prompt", "edited_image")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read of a data set, and how."""

    columns: tuple[str, str, str] | None = None
    """Names of picture, instruction and edited picture; None goes by the names that the field uses (``layouts``).
    A dot leads into a JSON column; of two folders of pictures the names of the folders and the texts' suffix."""
    split: str | None = None
    """None: train, or the only one that is there."""
    limit: int | None = None
    """So many rows at most, of those that ``where`` lets through."""
    where: str | None = None
    """A condition on the columns (``where.Where``)."""
    inverses: bool = False
    """Rows with an instruction that leads back are two pairs."""
    pictures_from: str | Path | None = None
    """The folder that paths in a table are relative to, and that they may not leave; None: the table's own."""
    download: bool = False
    """Fetch pictures that are given as addresses."""
    licence: str | None = None
    """Of all pairs; None: what the rows say, else the data card."""

    def __post_init__(self) -> None:
        if self.limit is not None and (type(self.limit) is not int or self.limit < 1):
            raise ConfigError(f"`limit` is {self.limit!r}; give a whole number of at least 1")
        if self.where is not None:
            Where(self.where)

    def in_manifest(self) -> dict[str, Any]:
        """What of it makes other pairs, for a manifest; a limit only makes more or fewer."""
        values = {name: value for name, value in asdict(self).items() if value and name not in FREE}
        return {"reading": json.loads(json.dumps(values, default=str))} if values else {}

    @property
    def chooses(self) -> bool:
        """Whether some rows are left out, or added."""
        return self.limit is not None or self.where is not None or self.inverses


@dataclass(frozen=True, kw_only=True)
class Example:
    """One pair as it is stored: pictures encoded or decoded, not yet looked at."""

    name: str
    original: Any
    """Bytes, a path, or a Pillow picture."""
    instruction: Any
    """A text, or several that say the same, of which training draws one."""
    edited: Any
    mask: Any = None
    """Where the picture was edited, white; None where the data do not say."""
    captions: tuple[str, str] | None = None
    """Before and after, where the data have both."""


class Rows(Protocol):
    """Pairs that are read by number: what ``train(data=...)`` takes from anyone.

    ``identity`` says what the rows are: equal for equal data, wherever it lies; a run that goes on compares it.
    ``__getitem__`` raises DatasetError, naming the row, where it cannot be read; others then stand in for it.
    """

    identity: str

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Example: ...


def _sessions(table: Table, sample: Sequence[Mapping[str, Any]]) -> Table | None:
    """The turns of a table whose rows are sessions; of Parquet, whose rows are large, only texts are counted."""
    turns = max((len(turns_of(row)) for row in sample), default=0)
    if table.kind == "triplets" and turns:
        return TurnsTable(table)
    if table.kind == "parquet" and turns > 1 and (texts := text_lists(sample[0])):
        return TurnsTable(table, texts)
    return None


class ForeignPairs(Sequence[PairRecord]):
    """The pairs of a table whose columns are someone else's; with the methods of ``PairStore``."""

    def __init__(self, folder: Path, table: Table, reading: Reading, columns: Sequence[str] | None = None) -> None:
        good = (row for row in islice(table.rows(), MOST_BROKEN) if not isinstance(row, DatasetError))
        sample = list(islice(good, SAMPLE))
        if not columns and not reading.columns and (found := _sessions(table, sample)):
            table = found
            sample = [row for row in islice(table.rows(), SAMPLE) if not isinstance(row, DatasetError)]
        self.folder, self.table, self.reading = folder, table, reading
        names = table.names or list(dict.fromkeys(name for row in sample for name in row))
        self.layout = layout_of(names, sample, reading.columns or columns, table.place)
        self._columns = list(dict.fromkeys(self.layout.columns()))
        self._where = Where(reading.where) if reading.where else None
        for name in self._where.names if self._where else ():
            if not {name, name.partition(".")[0]} & set(names):
                raise ConfigError(
                    f"`where` asks for {name!r}, and {table.place} has {', '.join(map(str, names))[:600]}"
                )
        if reading.inverses and not self.layout.inverse:
            raise ConfigError(f"{table.place} has no instructions that lead back; leave `inverses` out")
        home = reading.pictures_from or table.home
        self._home = None if home is None else Path(home).resolve()
        self._licence = reading.licence or card_licence(folder if folder.is_dir() else folder.parent)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        """One pair, or a list for a slice; raises IndexError beyond the end, DatasetError for a row that is none."""
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        number, inverse = divmod(self._chosen[index], 2)
        return self._found(number, self._row(number), inverse=bool(inverse))

    def __iter__(self) -> Iterator[PairRecord]:
        for found in self.outcomes():
            if isinstance(found, DatasetError):
                raise found
            yield found

    def outcomes(self) -> Iterator[PairRecord | DatasetError]:
        """Every pair in order; in place of a row that is none, what is wrong with it."""
        columns = [*self._columns, *(self._where.names if self._where else ())]
        for number, row, entries in self._wanted(columns):
            for inverse in entries:
                try:
                    yield self._found(number, row, inverse=inverse)
                except DatasetError as error:
                    yield error

    def columns(self, *names: str) -> dict[str, list[Any]]:
        """Whole columns without pictures, in the order of the pairs; raises ConfigError for an unknown name."""
        known = [name for name in COLUMNS if name not in PICTURES]
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(f"column {unknown[0]!r} cannot be listed; choose among {', '.join(known)}")
        wanted, result = list(names or known), {name: [] for name in names or known}  # type: ignore[var-annotated]
        pictures = {self.layout.before, self.layout.after, self.layout.mask, self.layout.without}
        texts = [name for name in self._columns if name not in pictures]
        for number, row, entries in self._wanted([*texts, *(self._where.names if self._where else ())]):
            for inverse in entries:
                values = self._texts(row, number, inverse=inverse) if not isinstance(row, DatasetError) else {}
                for name in wanted:
                    result[name].append(_checked(name, values.get(name)))
        return result

    def keys(self) -> set[str]:
        """The keys of all pairs."""
        return set(self.columns("key")["key"]) - {None, ""}

    def licences(self) -> set[str]:
        """What the pairs, or their data card, say of their licences."""
        if self.layout.licence:
            return set(self.columns("licence")["licence"]) - {None}
        return {self._licence} if self._licence else set()

    def lost(self) -> list[str]:
        """As of a store, where it is one of which a part is read."""
        return self.table.lost() if isinstance(self.table, _StoreTable) else []

    @property
    def shards(self) -> list[Path]:
        """The files with the pairs inside, as far as they are."""
        return list(getattr(self.table, "paths", ()))

    @property
    def manifest(self) -> dict[str, Any]:
        """Raises DatasetError where there is none, as there is beside few foreign sets."""
        return read_manifest(self.folder)

    @cached_property
    def identity(self) -> str:
        """What the pairs are: of files what is in them, of the hub's the library's fingerprint."""
        own = getattr(self.table, "identity", "") or _identity_of(self.folder, self.table)
        chosen = {name: value for name, value in asdict(self.reading).items() if value and name in CHOOSING}
        return f"{own}{PART}{json.dumps(chosen, sort_keys=True)[2:]}" if chosen else own

    def example(self, index: int) -> Example:
        """A pair for training: pictures are not read, nor looked at. Raises DatasetError, naming the row."""
        number, inverse = divmod(self._chosen[index], 2)
        return self.example_of(self._row(number), f"{self.table.place}, row {number + 1}", inverse=bool(inverse))

    def example_of(self, row: Mapping[str, Any] | DatasetError, name: str, *, inverse: bool = False) -> Example:
        """The same of a row that is there already."""
        if isinstance(row, DatasetError):
            raise DatasetError(f"{name}: {row}")
        try:
            before, after = (self._placed(cell(row, column)) for column in (self.layout.before, self.layout.after))
            texts = self._instructions(row, inverse=inverse)
        except DatasetError as error:
            raise DatasetError(f"{name}: {error}") from error
        before, after = (after, before) if inverse else (before, after)
        said = texts if isinstance(texts, tuple) and len(texts) > 1 else texts[0] if texts else None
        mask = self._mask(row, name) if self.layout.mask else None
        captions = self._both_captions(row, inverse=inverse)
        return Example(name=name, original=before, instruction=said, edited=after, mask=mask, captions=captions)

    def _both_captions(self, row: Mapping[str, Any], *, inverse: bool) -> tuple[str, str] | None:
        names = (self.layout.caption, self.layout.edited_caption)
        before, after = (cell(row, name) if name else None for name in (names[::-1] if inverse else names))
        return (before, after) if isinstance(before, str) and isinstance(after, str) else None

    @cached_property
    def _chosen(self) -> Sequence[int]:
        """Of each pair twice the row's number, and one more for the edit that leads back."""
        if not self.reading.chooses:
            return range(0, 2 * len(self.table), 2)
        if self._where is None and not self.reading.inverses:
            return range(0, 2 * min(len(self.table), self.reading.limit or len(self.table)), 2)
        names = [*(self._where.names if self._where else ()), self.layout.inverse]
        rows = self._wanted([name for name in names if name] or [self.layout.instructions[0]])
        return array("Q", (2 * number + inverse for number, _, entries in rows for inverse in entries))

    def _wanted(
        self, columns: Sequence[str]
    ) -> Iterator[tuple[int, Mapping[str, Any] | DatasetError, tuple[bool, ...]]]:
        """(row's number, row, whether each pair of it leads back) of what the reading asks for."""
        left = self.reading.limit if self.reading.limit is not None else math.inf
        for number, row in numbered(self.table.rows(_tops(columns))):
            if left < 1:
                return
            if self._where is not None and (isinstance(row, DatasetError) or not self._where(Cells(row))):
                continue
            left -= 1
            back = (
                self.reading.inverses
                and not isinstance(row, DatasetError)
                and isinstance(cell(row, self.layout.inverse), str)
            )
            yield number, row, (False, True) if back else (False,)

    def _row(self, number: int) -> Mapping[str, Any] | DatasetError:
        try:
            return self.table.row(number, _tops(self._columns))
        except DatasetError as error:
            return error

    def _found(self, number: int, row: Mapping[str, Any] | DatasetError, *, inverse: bool) -> PairRecord:
        place = f"{self.table.place}, row {number + 1}"
        if isinstance(row, DatasetError):
            raise row if "row" in str(row) else DatasetError(f"{place}: {row}")
        try:
            return self._record(row, number, inverse=inverse)
        except (DatasetError, ImageError) as error:
            raise DatasetError(f"{place}: {error}") from error

    def _record(self, row: Mapping[str, Any], number: int, *, inverse: bool) -> PairRecord:
        layout = self.layout
        if layout.without and cell(row, layout.without) is not None:
            raise DatasetError(f"it has a {layout.without}, so it is of another task; leave it out")
        for name in (layout.before, layout.after):
            pictures = cell(row, name.removesuffix(".0").removesuffix(".-1")) if name.endswith((".0", ".-1")) else None
            if isinstance(pictures, list | tuple) and len(pictures) != 2:
                raise DatasetError(f"it has {len(pictures)} pictures, so it is of another task; give two")
        values = self._texts(row, number, inverse=inverse)
        if not (isinstance(values["edit_prompt"], str) and values["edit_prompt"].strip()):
            raise DatasetError(f"its {'/'.join(layout.instructions)} is {values['edit_prompt']!r}; give a text")
        pictures = [self._encoded(cell(row, name), name) for name in (layout.before, layout.after)]
        before, after = reversed(pictures) if inverse else pictures
        mask = cell(row, layout.mask) if layout.mask else None
        mask = None if mask is None else self._encoded(mask, layout.mask)
        return PairRecord(**values, original_image=before, edited_image=after, mask=mask)

    def _texts(self, row: Mapping[str, Any], number: int, *, inverse: bool) -> dict[str, Any]:
        """Every column but the pictures."""
        layout, texts = self.layout, self._instructions(row, inverse=inverse)
        numbers = {ours: number_of(ours, row.get(theirs)) for theirs, ours in layout.numbers.items()}
        scores = {name: number_of(name, row.get(name)) for name in layout.scores} | own_scores(
            cell(row, layout.own_scores)
        )
        more = parsed(cell(row, layout.paraphrases)) if layout.paraphrases and not inverse else None
        captions = [cell(row, name) or "" for name in (layout.caption, layout.edited_caption)]
        labels = {name: label_of(cell(row, getattr(layout, name))) for name in ("kind", "session", "licence")}
        key = label_of(cell(row, layout.key)) if layout.key else row.get("key")
        key = key or f"{Path(self.table.place).stem if self.table.kind == 'triplets' else 'row'}/{number}"
        return {
            "seed": None,
            "p": None,
            "cfg": None,
            **(swapped(numbers) if inverse else numbers),
            "edit_prompt": texts[0] if texts else None,
            "paraphrases": (*texts[1:], *(more or ())) or None,
            "original_prompt": captions[inverse],
            "edited_prompt": captions[not inverse],
            "scores": {name: value for name, value in scores.items() if value is not None} or None,
            **labels,
            "licence": labels["licence"] or self._licence,
            "key": f"{key}/inverse" if inverse else key,
        }

    def _instructions(self, row: Mapping[str, Any], *, inverse: bool) -> tuple[Any, ...]:
        found: list[Any] = []
        for name in (self.layout.inverse,) if inverse else self.layout.instructions:
            value = cell(row, name)
            if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):  # a message in parts
                value = [one.get("text") for one in value if isinstance(one, Mapping) and one.get("text")][:1]
            found += value if isinstance(value, list | tuple) else [value]
        texts = [
            one.replace("<image>", "").strip() if isinstance(one, str) and "<image>" in one else one for one in found
        ]
        kept = tuple(dict.fromkeys(one for one in texts if isinstance(one, str) and one.strip()))
        return kept or tuple(found[:1])

    def _placed(self, value: Any) -> Any:
        """A picture as training opens it; raises DatasetError for one that may not be read."""
        value = single(value)
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if value is None:
            raise DatasetError("a picture is missing")
        if isinstance(value, str):
            data, value = inline_picture(value), value.removeprefix("file://")
            return data or (self._fetched(value) if is_url(value) else str(self._within(value)))
        return value

    def _mask(self, row: Mapping[str, Any], name: str) -> Any:
        """A row's mask, None, or what is wrong with it, which concerns only those who look at masks."""
        value = cell(row, self.layout.mask)
        try:
            return None if value is None or (isinstance(value, str) and not value) else self._placed(value)
        except DatasetError as error:
            return DatasetError(f"{name}: {error}")

    def _encoded(self, value: Any, column: str) -> bytes:
        """A picture's file as it is, in a format of the store, else as PNG."""
        try:
            value = self._placed(value)
        except DatasetError as error:
            raise DatasetError(f"its {column}: {error}") from error
        if isinstance(value, str):
            with disk_errors(Path(value), "read", DatasetError):
                value = Path(value).read_bytes()
        return kept_bytes(value, f"its {column}")

    def _within(self, name: str) -> Path:
        """A path in a row, which may reach only below its folder."""
        if "\0" in name:
            raise DatasetError(f"{name!r} is no path, since it holds a NUL; correct it")
        if self._home is None:
            return Path(name)
        try:
            path = (self._home / name).resolve()
            if "\\" in name and not path.exists():  # as Windows writes it
                path = (self._home / name.replace("\\", "/")).resolve()
            is_file, exists = path.is_file(), path.exists()
        except (OSError, RuntimeError, ValueError) as error:
            raise DatasetError(f"{name[:100]!r} cannot be read ({first_line(error)}); correct the path") from error
        if not path.is_relative_to(self._home):
            raise DatasetError(f"{name!r} lies outside {self._home}; allow its folder with `pictures_from`")
        if not exists:
            elsewhere = self.table.kind in ("triplets", "parquet") and not self.reading.pictures_from
            other = ", or name the folder that pictures lie in with `pictures_from`" if elsewhere else ""
            raise DatasetError(f"{name!r} is not in {self._home}; restore it{other}")
        if not is_file:
            raise DatasetError(f"{name!r} is no file; give the path of a picture")
        return path

    def _fetched(self, address: str) -> bytes:
        if not self.reading.download or not address.startswith(("http://", "https://")):
            raise DatasetError(
                f"{address[:200]} is an address; fetch pictures with `download`, or name a column of files"
            )
        try:
            with web_stream(address) as answer:
                data = answer.read(MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            raise DatasetError(f"{address[:200]} cannot be fetched ({first_line(error)}); check it") from error
        if len(data) > MOST_BYTES:
            raise DatasetError(f"{address[:200]} has more than {MOST_BYTES // 2**20} MiB; leave it out")
        return data


Pairs = PairStore | ForeignPairs
PART = ' {"'
"""What begins what an identity says of the part that is read."""
CHOOSING = ("split", "limit", "where", "inverses", "columns")


def open_pairs(
    source: str | Path, reading: Reading | None = None, *, streaming: bool = False, hooks: Hooks | None = None
) -> Pairs:
    """The pairs of a data set in any layout, by number and in order; ``streaming`` opens one of the hub in order only.

    ``hooks.on_error``, or the log, hears of a store's files that are lost. Raises DatasetError for what is no data set,
    or has columns that nothing is known of, and ConfigError.
    """
    pairs = _opened(source, reading or Reading(), streaming)
    if pairs.folder.is_dir() and (said := missing_files(pairs.shards)):
        log.warning("%s has %s; what is there is read", pairs.folder, said)
    for name in pairs.lost():
        passing_over(hooks).error(0, LostRows(f"{pairs.folder} has lost {name}; restore it from a copy", 0))
    return pairs


def _opened(source: str | Path, reading: Reading, streaming: bool) -> Pairs:
    path = Path(source).expanduser()
    if is_store(path, reading):
        store = PairStore(path)
        return ForeignPairs(path, _StoreTable(store), reading) if reading.chooses else store
    table, columns = open_table(source, reading.columns, reading.split, streaming=streaming)
    return ForeignPairs(path, table, reading, columns)


def is_store(path: Path, reading: Reading) -> bool:
    """Parquet at the store's place, with the store's columns and one split; or none yet, and the store's manifest."""
    if not path.is_dir() or reading.columns not in (None, STORE_COLUMNS):
        return False
    store = PairStore(path)
    if not store.shards:
        return _has_manifest(store)
    from .parquet import schema_of

    return set(STORE_COLUMNS) <= set(schema_of(store.shards[0]).names) and not _has_other_splits(store, reading)


def _has_manifest(store: PairStore) -> bool:
    try:
        return bool(store.manifest)
    except DatasetError:
        return False


def _has_other_splits(store: PairStore, reading: Reading) -> bool:
    from .formats import split_of

    splits = {split_of(path, store.folder) for path in store.shards}
    return len(splits) > 1 or reading.split not in (None, *splits)


class _StoreTable:
    """A store as a table, so that some of its rows can be chosen."""

    kind = "store"

    def __init__(self, store: PairStore) -> None:
        self._store, self.home, self.place = store, store.folder, str(store.folder)
        scores = store.columns("scores")["scores"]
        self.names = [*COLUMNS, *dict.fromkeys(name for one in scores if one for name in one)]
        self.identity = store_identity(store)

    def __len__(self) -> int:
        return len(self._store)

    def lost(self) -> list[str]:
        return self._store.lost()

    def row(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        return _as_row(self._store[number])

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any] | DatasetError]:
        for found in self._store.outcomes():
            yield found if isinstance(found, DatasetError) else _as_row(found)


def name_of_pairs(pairs: Pairs) -> str:
    """A digest of the whole data set, whatever part of it is read: what a checkpoint's header calls it."""
    return name_of_identity(store_identity(pairs) if isinstance(pairs, PairStore) else pairs.identity)


def name_of_identity(identity: str) -> str:
    """The same of what ``identity`` says."""
    return digest_of_text(identity.partition(PART)[0])


def store_identity(store: PairStore) -> str:
    """Of the names and sizes of its shards."""
    return repr([(shard.name, shard.stat().st_size) for shard in store.shards])


def _as_row(pair: PairRecord) -> dict[str, Any]:
    return {**(pair.scores or {}), **vars(pair)}


def _tops(columns: Sequence[str]) -> list[str]:
    """With the columns that dotted names lead into, for tables that know only those."""
    return list(dict.fromkeys(part for name in columns for part in (name, name.partition(".")[0])))


def _checked(name: str, value: Any) -> Any:
    try:
        return None if value is None else CHECKS[name](name, value)
    except DatasetError:
        return None


def _identity_of(source: Path, table: Table) -> str:
    """As runs of 0.1 have it."""
    if isinstance(table, OriginalTable):
        files = [f"{name}/prompt.json" for name in dict.fromkeys(name for name, _ in table.places)]
        files += [f"{name}/{seed}_1.jpg" for name, seed in table.places]
        return f"{len(table.places)} pairs {digest_of_files(source, files)}"
    if source.is_file():
        return f"{source.name} {digest_of_files(source.parent, [source.name])}"
    home = source if source.is_dir() else table.home or Path()
    inside = (path.relative_to(home) for path in home.rglob("*") if path.is_file())
    names = sorted(path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts))
    return f"{len(names)} files {digest_of_files(home, names)}"
