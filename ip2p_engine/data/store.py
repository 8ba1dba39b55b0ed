"""Pairs on disk: Parquet shards in the hub's layout, whole at every instant, resumed where they stopped.

A folder holds ``manifest.json`` (what made the pairs) and ``data/train-IIIII-of-NNNNN-SSSSSS.parquet``: shard S of
partition I of N. The names, the Image features in the schema and the folder are what ``datasets.load_dataset`` expects.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ..config import versions_of
from ..errors import ConfigError, DatasetError
from ..files import (
    NO_JSON,
    TEMPORARY,
    disk_errors,
    is_locked,
    locked,
    read_json,
    remove,
    sweep,
    whole_file,
    write_json,
)
from .parquet import ParquetFiles, pyarrow_modules, read_columns, schema_of
from .record import CHECKS, COLUMNS, IMAGE_COLUMNS, OPTIONAL, PICTURES, SCORES, PairRecord

__all__ = ["IMAGE_COLUMNS", "MANIFEST", "SCHEMA_VERSION", "SCORES", "PairRecord", "PairStore", "PairWriter"]

SCHEMA_VERSION = 1
MANIFEST, DATA, WORK = "manifest.json", "data", "work"
AS_JSON = ("scores", "paraphrases")
SHARD = re.compile(r"(train-\d{5}-of-\d{5})-(\d{6})")
ROWS_PER_SHARD, BYTES_PER_SHARD = 1000, 256 * 2**20
# One row is read by reading its group, so groups are small; smaller ones would make footers slow to open.
ROWS_PER_GROUP = 100
HUB_TYPES = {"string": "string", "int64": "int64", "double": "float64"}
VERSIONED = ("torch", "diffusers", "transformers", "open_clip_torch", "pyarrow")

log = logging.getLogger(__name__)


class PairWriter:
    """Appends pairs to a folder; use it in a ``with`` block.

    Records wait in memory until a shard is full, and the block's end writes the rest, also after Ctrl-C. A later
    writer fills a short last shard up, so a run that was stopped or killed ends with the files of one that was not.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        manifest: Mapping[str, Any],
        partition: tuple[int, int] = (0, 1),
        rows_per_shard: int = ROWS_PER_SHARD,
    ) -> None:
        """``manifest``: config and seeds, as JSON takes them. ``partition``: this writer's number, and how many write.

        Its ``work`` says how the work is divided: the first writer's stays, and later ones find it in the attribute
        ``work``. Raises ConfigError for an impossible partition or shard.
        """
        number, count = partition
        if not 0 <= number < count <= 99999:
            raise ConfigError(f"partition is {number}/{count}; give i/n with 0 <= i < n, such as 0/1")
        if rows_per_shard < 1:
            raise ConfigError(f"rows_per_shard is {rows_per_shard}; give a whole number of at least 1")
        self.folder, self._data = Path(folder), Path(folder) / DATA
        self._manifest, self._partition, self._rows_per_shard = dict(manifest), partition, rows_per_shard
        self._rows: list[PairRecord] = []
        self._keys: set[str] = set()
        self._shard = 0
        self._dirty = False
        self._columns: tuple[str, ...] = COLUMNS
        self._dropped: set[str] = set()
        self._open = ExitStack()
        self.work: Any = None

    @property
    def _name(self) -> str:
        return "{:05d}-of-{:05d}".format(*self._partition)

    def __enter__(self) -> PairWriter:
        """Lock the partition; raises DatasetError if it has a writer, or the folder holds another run's pairs."""
        pyarrow_modules()
        with disk_errors(self.folder, "written", DatasetError):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._open:
            opening = f"{self.folder} is being opened by other writers for a minute; try again"
            with locked(self.folder / ".opening.lock", opening, DatasetError, wait=60):
                refusal = (
                    f"{self.folder} has a writer of partition {self._name}; wait for it, or give each its `partition`"
                )
                self._open.enter_context(locked(self.folder / f".{self._name}.lock", refusal, DatasetError))
                self._refuse_overlap()
                self._agree_on_manifest()
            with disk_errors(self._data, "written", DatasetError):
                self._data.mkdir(exist_ok=True)
            sweep(self.folder)
            for left in self._data.glob(f".train-{self._name}-*{TEMPORARY}"):
                remove(left)
            self._take_up()
            self._open = self._open.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            try:
                self.flush()
            except DatasetError as refused:
                if error is None:
                    raise
                log.error("the last %d pairs could not be written (%s)", len(self._rows), refused)

    def write(self, *records: PairRecord) -> None:
        """Append records; those of one call end in one shard, so a kill leaves all of them or none.

        Raises DatasetError for a key that exists, or if the disk refuses; the data set then stays as it was.
        """
        if not records:
            return
        keys = [record.key for record in records]
        for key in keys:
            if not key:
                raise DatasetError(f"a pair for {self.folder} has no key; name the work that made it")
            if key in self._keys or keys.count(key) > 1:
                raise DatasetError(f"pair {key!r} exists in {self.folder}; give it a key of its own, or leave it out")
        self._rows += map(self._fitted, records)
        self._keys.update(keys)
        self._dirty = True
        if self._is_full():
            self.flush()
            self._rows, self._shard = [], self._shard + 1

    def flush(self) -> None:
        """Bring everything written so far to the disk, in a shard that further records will fill up."""
        if not self._dirty:
            return
        path = self._data / f"train-{self._name}-{self._shard:06d}.parquet"
        whole = "free some space and repeat the same call: the data set is whole, and finished shards are kept"
        with disk_errors(path, "written", DatasetError, whole), whole_file(path) as stream:
            _write_shard(stream, self._rows, self._columns)
        self._dirty = False

    def done_keys(self) -> set[str]:
        """The keys of every pair in the folder, of all partitions, and of those not yet on the disk."""
        return PairStore(self.folder).keys() | self._keys

    def _fitted(self, record: PairRecord) -> PairRecord:
        """Without what the store has no column for: shards of one store have one schema, or ``datasets`` opens none."""
        values: dict[str, Any] = {
            name: None for name in OPTIONAL if name not in self._columns and getattr(record, name) is not None
        }
        if new := values.keys() - self._dropped:
            self._dropped |= new
            without = f"{self.folder} was begun without columns for {', '.join(sorted(new))}"
            log.warning("%s, so they are left out; write to a new folder to have them", without)
        return replace(record, **values) if values else record

    def _is_full(self) -> bool:
        size = sum(len(row.original_image) + len(row.edited_image) for row in self._rows)
        return len(self._rows) >= self._rows_per_shard or size >= BYTES_PER_SHARD

    def _refuse_overlap(self) -> None:
        """Runs cut into different numbers of partitions would make the same pairs twice."""
        for lock in self.folder.glob(".*-of-*.lock"):
            if lock.name.split("-")[2] != f"{self._partition[1]:05d}.lock" and is_locked(lock):
                writer = lock.stem.removeprefix(".")
                raise DatasetError(
                    f"{self.folder} is being written as partition {writer}, and this writer is {self._name}; "
                    "cut the work into the same number of partitions"
                )

    def _agree_on_manifest(self) -> None:
        path = self.folder / MANIFEST
        mine = json.loads(json.dumps({**self._manifest, "schema_version": SCHEMA_VERSION}))
        if not path.exists():
            if any(self.folder.glob("*.parquet")) or any(self._data.glob("*.parquet")):
                raise DatasetError(f"{self.folder} holds pairs of unknown origin; import it, or write to a new folder")
            with disk_errors(path, "written", DatasetError):
                write_json(path, {**mine, "versions": versions_of(*VERSIONED)})
        theirs = read_manifest(self.folder)
        self.work = theirs.pop(WORK, None)
        mine.pop(WORK, None)
        changed = _difference(theirs.pop("versions", None), versions_of(*VERSIONED), "versions")
        if changed:
            log.warning("%s goes on with other software: %s; equal seeds may give other pictures", self.folder, changed)
        for name in sorted(mine.keys() | theirs.keys()):
            difference = _difference(theirs.get(name), mine.get(name), name)
            if difference:
                raise DatasetError(f"{self.folder} holds pairs of another run: {difference}; write to a new folder")

    def _take_up(self) -> None:
        """Go on where the last writer of this partition stopped."""
        store = PairStore(self.folder)
        if lost := store.lost():
            raise DatasetError(f"{self._data} has lost {lost[0]}; restore it from a copy, or write to a new folder")
        self._keys = store.keys()
        if store.shards:
            self._columns = tuple(name for name in COLUMNS if name in schema_of(store.shards[0]).names)
        shards = sorted(self._data.glob(f"train-{self._name}-*.parquet"))
        if not shards:
            return
        self._shard = int(shards[-1].stem.rpartition("-")[2])
        self._rows = list(PairStore(self.folder, shards=shards[-1:]))
        if self._is_full():
            self._rows, self._shard = [], self._shard + 1


class PairStore(Sequence[PairRecord]):
    """The pairs of a folder, in the order of their shards; only footers are read until a pair is asked for.

    Safe to share between threads, and to send to other processes.
    """

    def __init__(self, folder: Path | str, *, shards: Sequence[Path] | None = None) -> None:
        """Any folder of Parquet files with these columns will do; raises DatasetError for a broken or missing one."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DatasetError(f"{folder} is no folder; give the folder of a data set")
        inside = self.folder / DATA
        found = sorted((inside if inside.is_dir() else self.folder).glob("[!.]*.parquet"))
        self._files = ParquetFiles(found if shards is None else shards)
        self.shards = self._files.paths

    @property
    def is_ours(self) -> bool:
        """Whether a writer of ours made the rows; the hub's have no keys."""
        return not self.shards or "key" in schema_of(self.shards[0]).names

    @property
    def manifest(self) -> dict[str, Any]:
        """What made the pairs; raises DatasetError where the folder has no readable manifest."""
        return read_manifest(self.folder)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        """One pair, or a list for a slice; raises IndexError beyond the end."""
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        path, row, values = self._files.row(index % len(self))
        return _record(values, path, row)

    def __iter__(self) -> Iterator[PairRecord]:
        for found in self.outcomes():
            if isinstance(found, DatasetError):
                raise found
            yield found

    def outcomes(self) -> Iterator[PairRecord | DatasetError]:
        """Every row in order; in place of a row that is no pair, or of what a broken shard still had, what is wrong."""
        for path, row, values in self._files.rows():
            yield values if isinstance(values, DatasetError) else _outcome(values, path, row)

    def licences(self) -> set[str]:
        """What the pairs say of their licences."""
        return set(self.columns("licence")["licence"]) - {None}

    def lost(self) -> list[str]:
        """The names of shards that must have been there, since later ones of their partition are."""
        there: dict[str, set[int]] = {}
        for name in filter(None, (SHARD.fullmatch(path.stem) for path in self.shards)):
            there.setdefault(name[1], set()).add(int(name[2]))
        gaps = ((part, set(range(max(numbers))) - numbers) for part, numbers in sorted(there.items()))
        return [f"{part}-{number:06d}.parquet" for part, missing in gaps for number in sorted(missing)]

    def columns(self, *names: str) -> dict[str, list[Any]]:
        """Whole columns without pictures (default: every one but the pictures), in the order of the pairs.

        Raises ConfigError for an unknown name.
        """
        known = [name for name in COLUMNS if name not in PICTURES]
        for name in names:
            if name not in known:
                raise ConfigError(f"column {name!r} cannot be listed; choose among {', '.join(known)}")
        wanted = list(names or known)
        result: dict[str, list[Any]] = {name: [] for name in wanted}
        for path in self.shards:
            table = read_columns(path, wanted)
            for name in wanted:
                there = name in table.column_names
                result[name] += _checked(name, table[name].to_pylist(), path) if there else [None] * table.num_rows
        return result

    def keys(self) -> set[str]:
        """The keys of all pairs."""
        return set(self.columns("key")["key"]) - {None, ""}


def _outcome(row: dict[str, Any], path: Path, number: int) -> PairRecord | DatasetError:
    try:
        return _record(row, path, number)
    except DatasetError as error:
        return error


def _record(row: dict[str, Any], path: Path, number: int) -> PairRecord:
    """Raises DatasetError, naming the row, where it is no pair."""
    if missing := [name for name in (*IMAGE_COLUMNS, "edit_prompt") if name not in row]:
        what = f"{path} lacks {missing[0]!r} in its rows"
        raise DatasetError(f"{what}; give a data set with original_image, edit_prompt, edited_image, or import it")
    values: dict[str, Any] = {name: row.get(name) for name in COLUMNS}
    values |= {name: _bytes_of(values[name]) for name in PICTURES}
    values |= {name: values[name] or "" for name in ("original_prompt", "edited_prompt", "key")}
    try:
        values |= {name: _unwrapped(name, values[name]) for name in AS_JSON}
        return PairRecord(**values)
    except DatasetError as error:
        raise DatasetError(f"{path}, row {number}: {error}") from error


def _bytes_of(picture: Any) -> Any:
    return picture.get("bytes") if isinstance(picture, dict) else picture


def _unwrapped(name: str, text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except NO_JSON as error:
        raise DatasetError(f"its {name} is not JSON ({error}); correct it") from error


def _checked(name: str, values: list[Any], path: Path) -> list[Any]:
    """A column's values; those of another type than the column's are left out, and that is said."""
    found, wrong = [], 0
    for value in values:
        try:
            found.append(
                None if value is None else CHECKS[name](name, _unwrapped(name, value) if name in AS_JSON else value)
            )
        except DatasetError:
            found.append(None)
            wrong += 1
    if wrong:
        log.warning("%s: %d of %d rows have a %s of the wrong type, left out", path, wrong, len(values), name)
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a data set; raises DatasetError for another schema than this version's."""
    manifest = read_json(folder / MANIFEST, DatasetError)
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if found != SCHEMA_VERSION:
        got = f"{folder / MANIFEST} has the schema version {found!r}"
        raise DatasetError(f"{got}, and this ip2p reads {SCHEMA_VERSION}; use the ip2p that wrote it")
    for name in ("versions", WORK):
        if not isinstance(manifest.get(name, {}), dict):
            raise DatasetError(f"{folder / MANIFEST} has the {name} {manifest[name]!r}; restore it from a copy")
    return manifest


def _difference(theirs: Any, mine: Any, name: str) -> str:
    """Where two JSON values first differ, in words; empty if they do not."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        parts = (_difference(theirs.get(key), mine.get(key), f"{name}.{key}") for key in sorted(theirs | mine))
        return next(filter(None, parts), "")
    return "" if theirs == mine else f"its {name} is {theirs!r} and now it is {mine!r}"


def _write_shard(stream: Any, records: Sequence[PairRecord], names: Sequence[str] = COLUMNS) -> None:
    arrow, parquet = pyarrow_modules()
    columns: dict[str, list[Any]] = {name: [getattr(record, name) for record in records] for name in names}
    for name in AS_JSON:
        if name in names:
            columns[name] = [value and json.dumps(value, ensure_ascii=False) for value in columns[name]]
    pictures = [name for name in PICTURES if name in names]
    for name in pictures:
        columns[name] = [None if data is None else {"bytes": data, "path": None} for data in columns[name]]
    texts = [name for name in names if name not in pictures]
    parquet.write_table(
        arrow.Table.from_pydict(columns, schema=_schema(arrow, names)),
        stream,
        row_group_size=ROWS_PER_GROUP,
        # Pictures are compressed already, and their statistics would be pictures.
        compression={**dict.fromkeys(texts, "ZSTD"), **{f"{name}.bytes": "NONE" for name in pictures}},
        use_dictionary=[
            name for name in ("original_prompt", "edit_prompt", "edited_prompt", "kind", "licence") if name in names
        ],
        write_statistics=list(SCORES),
    )


def _schema(arrow: Any, names: Sequence[str]) -> Any:
    """Columns with the hub's features, so that ``datasets`` shows pictures and not bytes."""
    picture = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    kinds = {"seed": arrow.int64(), **dict.fromkeys(("p", "cfg", *SCORES), arrow.float64())}
    kinds |= dict.fromkeys(PICTURES, picture)
    types = {name: kinds.get(name, arrow.string()) for name in names}
    features = {
        name: {"_type": "Image"} if name in PICTURES else {"_type": "Value", "dtype": HUB_TYPES[str(kind)]}
        for name, kind in types.items()
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return arrow.schema(list(types.items()), metadata=metadata)
