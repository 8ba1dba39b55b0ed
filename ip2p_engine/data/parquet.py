"""Rows of Parquet files, by number or in order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DatasetError
from ..files import check_file

__all__ = ["ParquetFiles", "pyarrow_modules", "reading"]

AT_ONCE, BUFFER = 100, 2**20


class ParquetFiles:
    """The rows of several files in turn; only footers are read until a row is asked for. Raises DatasetError.

    Safe to share between threads, and to send to other processes.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._ends = list(accumulate(map(_row_count, self.paths)))
        self._latest: tuple[Path, int, Any] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def names(self) -> list[str]:
        """The columns of the first file."""
        return list(schema_of(self.paths[0]).names) if self.paths else []

    def row(self, number: int, columns: Sequence[str] | None = None) -> tuple[Path, int, dict[str, Any]]:
        """(file, row in it from 1, values) of a row from 0."""
        place = bisect_right(self._ends, number)
        path, row = self.paths[place], number - (self._ends[place - 1] if place else 0)
        latest = self._latest
        # The row group that was read last is kept, for those who read in order or in blocks.
        if latest is None or latest[0] != path or not 0 <= row - latest[1] < latest[2].num_rows:
            latest = self._latest = (path, *_read_group(path, row))
        values = latest[2].slice(row - latest[1], 1).to_pylist()[0]
        return path, row + 1, values if columns is None else {name: values.get(name) for name in columns}

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[tuple[Path, int, dict[str, Any] | DatasetError]]:
        """(file, row in it from 1, values) in order; what is left of a broken file is one row with what is wrong."""
        _, parquet = pyarrow_modules()
        for path in self.paths:
            done = 0
            try:
                # Not pre-buffered, or whole row groups would lie in memory.
                with reading(path), parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
                    names = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
                    for batch in file.iter_batches(AT_ONCE, columns=names, use_threads=False):
                        yield from ((path, n, row) for n, row in enumerate(batch.to_pylist(), start=done + 1))
                        done += batch.num_rows
            except DatasetError as error:
                yield path, done + 1, error


def _row_count(path: Path) -> int:
    _, parquet = pyarrow_modules()
    check_file(path, DatasetError)
    with reading(path):
        return parquet.read_metadata(path).num_rows


def schema_of(path: Path) -> Any:
    """The Arrow schema of a file; raises DatasetError."""
    _, parquet = pyarrow_modules()
    with reading(path):
        return parquet.read_schema(path)


def _read_group(path: Path, row: int) -> tuple[int, Any]:
    """The row group that holds a row, and the number of its first row."""
    _, parquet = pyarrow_modules()
    with reading(path), parquet.ParquetFile(path, memory_map=True) as file:
        sizes = (file.metadata.row_group(n).num_rows for n in range(file.num_row_groups))
        ends = list(accumulate(sizes))
        group = bisect_right(ends, row)
        # One thread, so that a process forked from this one may read too.
        return (ends[group - 1] if group else 0), file.read_row_group(group, use_threads=False)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Arrow's errors, which are OSError for broken files and ValueError for broken content, as DatasetError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        advice = "restore it from a copy, or delete it and run the same command again"
        raise DatasetError(f"{path} is no whole Parquet file ({reason}); {advice}") from error


def pyarrow_modules() -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet); raises ConfigError where they are missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("data sets need pyarrow, which is missing; pip install pyarrow") from error
    return pyarrow, pyarrow.parquet
