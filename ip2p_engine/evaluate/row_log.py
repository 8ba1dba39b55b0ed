"""Rows that are measured once: known ones by what makes them, new ones on the disk as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..files import AppendLog, disk_errors, locked
from .run_folder import ROWS

__all__ = ["Row", "row_key", "row_log"]

Row = dict[str, Any]


def row_key(identity: Row) -> str:
    """What makes a row, as one text: rows of one key are measured once."""
    return json.dumps(identity, sort_keys=True)


@contextmanager
def row_log(
    folder: Path | None, results: Container[str]
) -> Iterator[tuple[dict[str, Row], Callable[[list[Row]], None]]]:
    """(rows by key, how to add more): in memory, or in a folder's rows.jsonl, locked against a second writer.

    The key is all of a row but its ``results``. Raises DatasetError.
    """
    known: dict[str, Row] = {}

    def remember(rows: list[Row]) -> None:
        known.update((row_key({n: v for n, v in row.items() if n not in results}), row) for row in rows)

    if folder is None:
        yield known, remember
        return
    with disk_errors(folder, "written", DatasetError):
        folder.mkdir(parents=True, exist_ok=True)
    refusal = f"{folder} is being written by another evaluation; wait for it, or give another folder"
    with locked(folder / ".rows.lock", refusal, DatasetError):
        log = AppendLog(folder / ROWS, DatasetError)
        remember(list(log))

        def append(rows: list[Row]) -> None:
            log.append(*rows)
            remember(rows)

        yield known, append
