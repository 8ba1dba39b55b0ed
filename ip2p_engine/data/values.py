"""Values of other people's columns as those of ours."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import DatasetError
from ..files import NO_JSON
from ..images import open_image
from .layouts import cell

__all__ = [
    "Cells",
    "format_of",
    "kept_bytes",
    "label_of",
    "number_of",
    "own_scores",
    "parsed",
    "single",
    "swapped",
]


class Cells(Mapping[str, Any]):
    """A row whose columns are asked for with dots."""

    def __init__(self, row: Any) -> None:
        self._row = row

    def __getitem__(self, name: str) -> Any:
        value = cell(self._row, name)
        if isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", value):
            return float(value)  # CSV has texts only
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def single(value: Any) -> Any:
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise DatasetError(f"there are {len(value)} pictures in a list; give one")
        return value[0]
    return value


def format_of(data: bytes) -> str:
    """Of the formats that a store keeps as they are: PNG, JPEG, WEBP; empty for all else."""
    if data.startswith(b"\x89PNG"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def kept_bytes(picture: Any, name: str) -> bytes:
    """A picture's file as it is, where a store keeps its format, else as PNG. Raises ImageError."""
    if isinstance(picture, bytes) and format_of(picture):
        return picture
    stream = io.BytesIO()
    open_image(picture, name=name).save(stream, "PNG")
    return stream.getvalue()


def number_of(name: str, value: Any) -> float | int | None:
    """Of a column or a CSV; None for nothing, and for the NaN that pandas writes for nothing."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    whole = name == "seed"
    what = "a whole number below 2**63" if whole else "a number"
    try:
        number: float = int(str(value).removesuffix(".0")) if whole else float(value)  # spreadsheets write 12 as 12.0
        fits = -(2**63) <= number < 2**63 if whole else math.isfinite(number)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits or isinstance(value, bool):
        raise DatasetError(f"its {name} is {str(value)[:60]!r}; give {what}, or leave it out")
    return number


def swapped(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of an edit, for the edit that leads back."""
    back = {"sim_0": "sim_1", "sim_1": "sim_0"}
    return {back.get(name, name): value for name, value in numbers.items()}


def label_of(value: Any) -> str | None:
    """Of numbers and empty texts too."""
    return str(value) if value is not None and value != "" and not isinstance(value, bytes) else None


def parsed(value: Any) -> Any:
    """The store keeps lists and objects as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except NO_JSON:
        return None


def own_scores(value: Any) -> dict[str, Any]:
    found = parsed(value)
    return {str(name): number_of(str(name), one) for name, one in found.items()} if isinstance(found, Mapping) else {}
