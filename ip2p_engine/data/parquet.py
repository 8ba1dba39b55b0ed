"""Rows of Parquet files, by number or in order."""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DatasetError, first_line
from ..files import check_file
from .pages import NoPlainValues, dictionary_size, places_of

__all__ = [
    "UNFOLDED",
    "UNFOLDS",
    "LostRows",
    "ParquetFiles",
    "numbered",
    "pyarrow_modules",
    "read_columns",
    "schema_of",
]

AT_ONCE, BUFFER = 100, 2**20
MOST_BYTES = 2**28  # of the columns without pictures that are kept
MOST_BATCH = 2**26  # which is there four times: this one and the last, each as Arrow's and as Python's
# A small file may ask for much: rows that take no byte each, columns that unfold to so many times its size.
MOST_ROWS, MOST_COLUMNS, UNFOLDS, UNFOLDED = 2**20, 2000, 20, 2**26


class LostRows(DatasetError):
    """What a file still had when it could not be read on: so many ``rows``; 0 where it is missing, and nobody knows."""

    def __init__(self, said: str, rows: int) -> None:
        super().__init__(said)
        self.rows = rows

    def __reduce__(self) -> Any:
        return LostRows, (str(self), self.rows)


def numbered(rows: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """(number, row) of rows in order; what a broken file still had, one row here, has the numbers of all of it."""
    number = 0
    for row in rows:
        yield number, row
        number += row.rows if isinstance(row, LostRows) else 1


class ParquetFiles:
    """The rows of several files in turn; only footers are read until a row is asked for. Raises DatasetError.

    Safe to share between threads, and to send to other processes.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._ends = list(accumulate(map(_row_count, self.paths)))
        self._latest: tuple[Path, int, Any] | None = None
        self._known: dict[Path, _File | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_latest": None, "_known": {}}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def names(self) -> list[str]:
        """The columns of the first file."""
        return list(schema_of(self.paths[0]).names) if self.paths else []

    def row(self, number: int, columns: Sequence[str] | None = None) -> tuple[Path, int, dict[str, Any]]:
        """(file, row in it from 1, values) of a row from 0."""
        place = bisect_right(self._ends, number)
        path, row = self.paths[place], number - (self._ends[place - 1] if place else 0)
        if (file := self._file(path)) is not None:
            return path, row + 1, file.row(row, columns)
        latest = self._latest
        # The row group that was read last is kept, for those who read in order or in blocks.
        if latest is None or latest[0] != path or not 0 <= row - latest[1] < latest[2].num_rows:
            latest = self._latest = (path, *_read_group(path, row))
        values = latest[2].slice(row - latest[1], 1).to_pylist()[0]
        return path, row + 1, values if columns is None else {name: values.get(name) for name in columns}

    def _file(self, path: Path) -> _File | None:
        """None where the pictures lie compressed, and rows can only be read by groups."""
        if path not in self._known:
            if sum(file.bytes for file in self._known.values() if file is not None) > MOST_BYTES:
                self._known = {}
            self._known[path] = _File.open(path)
        return self._known[path]

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[tuple[Path, int, dict[str, Any] | DatasetError]]:
        """(file, row in it from 1, values) in order; what is left of a broken file is one row with what is wrong."""
        for path, first, end in zip(self.paths, [0, *self._ends], self._ends, strict=False):
            done = 0
            try:
                # Not pre-buffered, or whole row groups would lie in memory.
                with _opened(path, buffer_size=BUFFER, pre_buffer=False) as file:
                    names = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
                    for batch in file.iter_batches(_rows_at_once(file, path), columns=names, use_threads=False):
                        yield from ((path, n, row) for n, row in enumerate(batch.to_pylist(), start=done + 1))
                        done += batch.num_rows
            except DatasetError as error:
                lost = max(1, end - first - done)
                yield path, done + 1, LostRows(f"{error} ({lost:,} of its {end - first:,} rows are lost)", lost)


class _File:
    """One file whose pictures are read alone; the other columns lie in memory."""

    def __init__(self, path: Path, texts: Any, ends: list[int], pictures: dict[str, list[Any]]) -> None:
        self._path, self._texts, self._ends, self._chunks = path, texts, ends, pictures
        self._places: dict[tuple[str, int], Any] = {}
        self.bytes = texts.nbytes

    @classmethod
    def open(cls, path: Path) -> _File | None:
        with _opened(path, memory_map=True) as file:
            leaves = {file.schema.column(n).path: n for n in range(len(file.schema.names))}
            names = [name for name in file.schema_arrow.names if f"{name}.bytes" in leaves]
            if not names:
                return None
            groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
            pictures, texts = {}, [name for name in file.schema_arrow.names if name not in names]
            texts += [f"{name}.path" for name in names if f"{name}.path" in leaves]
            for name in names:
                column = leaves[f"{name}.bytes"]
                chunks = [group.column(column) for group in groups]
                if any(chunk.compression != "UNCOMPRESSED" for chunk in chunks):
                    return None
                pictures[name] = [(chunk, file.schema.column(column).max_definition_level) for chunk in chunks]
            table = _table(file, path, columns=texts).combine_chunks()
            return cls(path, table, list(accumulate(group.num_rows for group in groups)), pictures)

    def row(self, row: int, columns: Sequence[str] | None) -> dict[str, Any]:
        """Raises DatasetError where the file has gone or changed."""
        values = {name: self._texts[name][row].as_py() for name in self._texts.column_names}
        group = bisect_right(self._ends, row)
        within = row - (self._ends[group - 1] if group else 0)
        try:
            with self._path.open("rb", buffering=0) as stream:
                for name in self._chunks if columns is None else [one for one in self._chunks if one in columns]:
                    data = self._picture(stream, name, group, within)
                    values[name] = {**(values.get(name) or {}), "bytes": data} if data or values.get(name) else None
        except NoPlainValues:
            start, table = _read_group(self._path, row)
            values = table.slice(row - start, 1).to_pylist()[0]
        except (OSError, struct.error, LookupError, RecursionError, TypeError, ValueError) as error:
            raise DatasetError(f"{self._path} cannot be read ({first_line(error)}); restore it from a copy") from error
        return values if columns is None else {name: values.get(name) for name in columns}

    def _picture(self, stream: Any, name: str, group: int, within: int) -> bytes | None:
        if (name, group) not in self._places:
            chunk, most = self._chunks[name][group]
            self._places[name, group] = places_of(stream, chunk, most_levels=most)
        place, length = self._places[name, group][2 * within : 2 * within + 2]
        if length < 0:
            return None
        if place + length > stream.seek(0, os.SEEK_END):  # before room is made for it
            raise DatasetError(f"{self._path} is shorter than it was; restore it from a copy")
        stream.seek(place)
        data = stream.read(length)
        if len(data) != length:
            raise DatasetError(f"{self._path} is shorter than it was; restore it from a copy")
        return data


def _row_count(path: Path) -> int:
    _, parquet = pyarrow_modules()
    with _reading(path):
        return parquet.read_metadata(path).num_rows


def schema_of(path: Path) -> Any:
    """The Arrow schema of a file; raises DatasetError."""
    _, parquet = pyarrow_modules()
    with _reading(path):
        return parquet.read_schema(path)


def read_columns(path: Path, names: Sequence[str]) -> Any:
    """The table of those columns that a file has; raises DatasetError."""
    with _opened(path) as file:
        return _table(file, path, columns=[name for name in names if name in file.schema_arrow.names])


def _read_group(path: Path, row: int) -> tuple[int, Any]:
    """The row group that holds a row, and the number of its first row."""
    with _opened(path, memory_map=True) as file:
        sizes = (file.metadata.row_group(n).num_rows for n in range(file.num_row_groups))
        ends = list(accumulate(sizes))
        group = bisect_right(ends, row)
        return (ends[group - 1] if group else 0), _table(file, path, row_groups=[group])


@contextmanager
def _opened(path: Path, **how: Any) -> Iterator[Any]:
    """A file whose footer promises no more than its bytes can hold; Arrow's errors as DatasetError."""
    _, parquet = pyarrow_modules()
    with _reading(path), parquet.ParquetFile(path, **how) as file:
        found, size = file.metadata, path.stat().st_size
        if found.num_rows > max(MOST_ROWS, size) or found.num_columns > MOST_COLUMNS:
            raise _too_much(path, f"{found.num_rows:,} rows of {found.num_columns:,} columns")
        chunks = (found.row_group(n).column(k) for n in range(found.num_row_groups) for k in range(found.num_columns))
        if (total := sum(chunk.total_uncompressed_size for chunk in chunks)) > _most_bytes(size):
            raise _too_much(path, f"{total:,} bytes")
        yield file


def _rows_at_once(file: Any, path: Path) -> int:
    """So few that a batch stays small even if each row repeats the largest text of its column's dictionary."""
    largest = 1
    with path.open("rb") as stream:
        for n in range(file.num_row_groups):
            group = file.metadata.row_group(n)
            chunks = (group.column(k) for k in range(group.num_columns))
            largest = max(largest, *(dictionary_size(stream, one) for one in chunks if one.num_values), 1)
    return max(1, min(AT_ONCE, MOST_BATCH // largest))


def _table(file: Any, path: Path, **choice: Any) -> Any:
    """What is chosen of a file, in memory."""
    pyarrow, _ = pyarrow_modules()
    most, batches = _most_bytes(path.stat().st_size), []
    # One thread, so that a process forked from this one may read too.
    for batch in file.iter_batches(100 * _rows_at_once(file, path) // AT_ONCE or 1, use_threads=False, **choice):
        batches.append(batch)
        most -= batch.nbytes
        if most < 0:
            raise _too_much(path, "a column of a few texts that it repeats without end")
    if batches:
        return pyarrow.Table.from_batches(batches)
    names = choice.get("columns")
    schema = file.schema_arrow
    return (schema if names is None else pyarrow.schema([schema.field(name) for name in names])).empty_table()


def _most_bytes(size: int) -> int:
    return max(UNFOLDED, UNFOLDS * size)


def _too_much(path: Path, what: str) -> DatasetError:
    return DatasetError(f"{path} promises {what}, which no data set of {path.stat().st_size:,} bytes has; leave it out")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Arrow's errors, which are OSError for broken files and ValueError for broken content, as DatasetError."""
    check_file(path, DatasetError)
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        advice = "restore it from a copy, or delete it and repeat the same call"
        raise DatasetError(f"{path} is no whole Parquet file ({reason}); {advice}") from error


def pyarrow_modules() -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet); raises ConfigError where they are missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("data sets need pyarrow, which is missing; pip install pyarrow") from error
    return pyarrow, pyarrow.parquet
