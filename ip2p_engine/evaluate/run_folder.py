"""What every evaluation leaves in its folder, so that a report can be made of it later: run.json and pictures.

``run.json`` holds the kind of evaluation, its settings, the versions, and tables: titles, column names and rows.
``rows.jsonl`` holds one line a picture. A folder is of one kind: a row of another would be lost or misread.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import versions_of
from ..errors import DatasetError, first_line
from ..files import AppendLog, disk_errors, locked, read_json, whole_file, write_json
from ..version import __version__

__all__ = [
    "FLAG",
    "NUMBER",
    "OBJECT",
    "ROWS",
    "RUN",
    "Row",
    "Run",
    "TEXT",
    "Table",
    "check_run",
    "claim_run",
    "load_run",
    "row_key",
    "row_log",
    "save_run",
    "text_of",
    "versions",
    "write_rows",
]

Row = dict[str, Any]
RUN, ROWS = "run.json", "rows.jsonl"
NUMBER, FLAG, TEXT, OBJECT = (int, float, type(None)), (int, float), (str,), (dict,)
"""What a row's result may be: JSON knows no others, and a file may come from anyone."""
LARGEST = 10**15
PLAIN = re.compile(r"[\w-][\w .-]*")  # of a picture that lies in the folder
PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "pillow", "torchmetrics")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a report; cells are texts and numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    apart: str = ""
    """Why the rows after it do not compare with those before: they stand below this line."""
    rows_apart: Sequence[Sequence[Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished evaluation, as its folder tells it."""

    kind: str
    settings: dict[str, Any]
    versions: dict[str, str]
    tables: list[Table]
    pictures: dict[str, str] = field(default_factory=dict)
    """Captions by file name."""
    figures: dict[str, Any] = field(default_factory=dict)


def check_run(folder: Path, kind: str) -> None:
    """Raises DatasetError for a folder that holds anything but a run of this kind, finished or not."""
    if (folder / RUN).exists():
        content = read_json(folder / RUN, DatasetError)
        found = content.get("kind", "training") if isinstance(content, dict) else "something else"
    elif (folder / ROWS).exists():
        found = f"{ROWS} without {RUN}"
    else:
        return
    if found != kind:
        raise DatasetError(f"{folder} holds another run ({found}), and this one is {kind}; give a new folder")


def claim_run(folder: Path, kind: str) -> None:
    """Write down of which kind a folder's rows will be, before the first of them. Raises as ``check_run``."""
    check_run(folder, kind)
    if not (folder / RUN).exists():
        save_run(folder, kind, settings={"state": "not finished; the same call goes on"}, tables=[])


def save_run(
    folder: Path,
    kind: str,
    *,
    settings: Mapping[str, Any],
    tables: Sequence[Table],
    pictures: Mapping[str, str] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Write run.json whole; ``pictures`` are captions by file name, in their order. Raises DatasetError."""
    content = {
        "kind": kind,
        "settings": dict(settings),
        "versions": versions(),
        "tables": [vars(table) for table in tables],
        "pictures": list((pictures or {}).items()),
        "figures": dict(figures or {}),
    }
    with disk_errors(folder, "written", DatasetError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN, content)


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows.jsonl whole, for an evaluation that is made anew each time. Raises DatasetError."""
    with disk_errors(folder, "written", DatasetError):
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / ROWS) as stream:
            stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def load_run(folder: Path) -> Run:
    """Raises DatasetError for a folder that no evaluation wrote."""
    content = read_json(folder / RUN, DatasetError)
    try:
        tables = [_checked_table(Table(**table)) for table in content["tables"]]
        pictures = dict(content.get("pictures", {}))
        run = Run(**{**content, "tables": tables, "pictures": pictures})
        plain = all(isinstance(name, str) and PLAIN.fullmatch(name) for name in pictures)
        if not plain or not all(isinstance(words, str) for words in (run.kind, *pictures.values())):
            raise ValueError("its kind and its pictures are names of files and captions")
        if not all(isinstance(values, dict) for values in (run.settings, run.versions, run.figures)):
            raise ValueError("settings, versions and figures are names and values")
        return run
    except (TypeError, KeyError, ValueError) as error:
        raise DatasetError(f"{folder / RUN} is no evaluation's ({first_line(error)}); make it again") from error


def _checked_table(table: Table) -> Table:
    texts = all(isinstance(words, str) for words in (table.title, table.note, table.apart))
    lists = (table.columns, table.rows, *table.rows, *table.rows_apart)
    if not texts or not all(isinstance(row, list) for row in lists):
        raise ValueError("a table is a title, column names and rows")
    return table


def versions() -> dict[str, str]:
    """Of this engine and what its numbers depend on."""
    return {"ip2p_engine": __version__, "python": platform.python_version(), **versions_of(*PACKAGES)}


def text_of(table: Table) -> str:
    """The table for a terminal."""
    every = (table.columns, *table.rows, *table.rows_apart)
    cells = [[str(cell) for cell in row] for row in every]
    widths = [max(len(row[n]) for row in cells) for n in range(len(table.columns))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    below = len(lines) - len(table.rows_apart)
    parts = [*lines[:below], *([f"-- {table.apart}:", *lines[below:]] if table.rows_apart else [])]
    return "\n".join([table.title, *(line.rstrip() for line in parts), *([table.note] if table.note else [])])


def row_key(identity: Row) -> str:
    """What makes a row, as one text: rows of one key are measured once."""
    return json.dumps(identity, sort_keys=True)


def _is_whole(row: Row, results: Mapping[str, Any], optional: Container[str], path: Path) -> bool:
    """Whether a row of a file has all its results. Raises DatasetError where one is of another type."""
    for name, form in results.items():
        if name in row and not _fits(row[name], form):
            got = f"{path} has {str(row[name])[:60]!r} as a row's {name}, which no evaluation wrote"
            raise DatasetError(f"{got}; remove the line, and it is measured again")
    return all(name in row or name in optional for name in results)


def _fits(value: Any, form: Any) -> bool:
    if isinstance(form, list):
        return isinstance(value, list) and len(value) > 0 and all(_fits(one, form[0]) for one in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(_fits(value.get(name), one) for name, one in form.items())
    return isinstance(value, form) and value == value and (type(value) is not int or abs(value) < LARGEST)


@contextmanager
def row_log(
    folder: Path | None, results: Mapping[str, Any], optional: Container[str] = ()
) -> Iterator[tuple[dict[str, Row], Callable[[list[Row]], None]]]:
    """(rows by key, how to add more): in memory, or in a folder's rows.jsonl, locked against a second writer.

    The key is all of a row but its ``results``, {name: NUMBER, FLAG, TEXT, OBJECT, or a list or mapping of those}. A
    row of the file that lacks one is not known, unless it is ``optional``. Raises DatasetError, also for a result of
    another type.
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
        remember([row for row in log if _is_whole(row, results, optional, log.path)])

        def append(rows: list[Row]) -> None:
            log.append(*rows)
            remember(rows)

        yield known, append
