"""What every evaluation leaves in its folder, so that a report can be made of it later: run.json and pictures.

``run.json`` holds the kind of evaluation, its settings, the versions, and tables: titles, column names and rows.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import DatasetError
from ..files import disk_errors, read_json, write_json

__all__ = ["RUN", "Run", "Table", "load_run", "save_run", "text_of", "versions"]

RUN = "run.json"
PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "pillow", "torchmetrics")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a report; cells are texts and numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


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


def save_run(
    folder: Path,
    kind: str,
    *,
    settings: Mapping[str, Any],
    tables: Sequence[Table],
    pictures: Mapping[str, str] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Write run.json whole; ``pictures`` are captions by file name. Raises DatasetError."""
    content = {
        "kind": kind,
        "settings": dict(settings),
        "versions": versions(),
        "tables": [vars(table) for table in tables],
        "pictures": dict(pictures or {}),
        "figures": dict(figures or {}),
    }
    with disk_errors(folder, "written", DatasetError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN, content)


def load_run(folder: Path) -> Run:
    """Raises DatasetError for a folder that no evaluation wrote."""
    content = read_json(folder / RUN, DatasetError)
    try:
        return Run(**{**content, "tables": [Table(**table) for table in content["tables"]]})
    except (TypeError, KeyError) as error:
        raise DatasetError(f"{folder / RUN} is no evaluation's ({error}); make it again") from error


def versions() -> dict[str, str]:
    """Of this engine and what its numbers depend on."""
    found = {"ip2p_engine": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def text_of(table: Table) -> str:
    """The table for a terminal."""
    cells = [list(map(str, table.columns)), *([str(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(table.columns))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return "\n".join([table.title, *(line.rstrip() for line in lines), *([table.note] if table.note else [])])
