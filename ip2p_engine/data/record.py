"""One pair as a row, with the types of its columns checked where it is made."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import DatasetError

__all__ = ["COLUMNS", "IMAGE_COLUMNS", "OPTIONAL", "PICTURES", "SCORES", "PairRecord"]

IMAGE_COLUMNS = ("original_image", "edited_image")
SCORES = ("sim_0", "sim_1", "sim_image", "sim_direction")
OPTIONAL = ("mask", "kind", "scores", "session", "licence", "paraphrases")
"""Columns that stores of 0.1 do not have."""
PICTURES = (*IMAGE_COLUMNS, "mask")


@dataclass(frozen=True, kw_only=True)
class PairRecord:
    """One pair; the fields are the columns. Raises DatasetError for a value of another type than its column's."""

    original_image: bytes
    """PNG, JPEG or WebP."""
    edited_image: bytes
    edit_prompt: str
    original_prompt: str
    edited_prompt: str
    seed: int | None
    p: float | None
    """Fraction of the steps during which self-attention was shared; None if unknown, as are all that may be None."""
    cfg: float | None
    sim_0: float | None = None
    sim_1: float | None = None
    sim_image: float | None = None
    sim_direction: float | None = None
    key: str
    """The work that made the pair, such as "0000012/34" for caption 12 and seed 34: unique; empty in foreign sets."""
    mask: bytes | None = None
    """Where the picture was edited, as an encoded picture."""
    kind: str | None = None
    """Of edit, such as "add" or "style", in the words of the set that it came from."""
    scores: Mapping[str, float] | None = None
    """Of other judges than CLIP, by name."""
    session: str | None = None
    """Turns of one session have the same, and follow one another."""
    licence: str | None = None
    paraphrases: tuple[str, ...] | None = None
    """Other ways to say ``edit_prompt``."""

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))


MOST_LETTERS = 1 << 20


def _refuse(name: str, value: Any, what: str) -> DatasetError:
    return DatasetError(f"its {name} is {repr(value)[:60]} ({type(value).__name__}); give {what}")


def _picture(name: str, value: Any) -> bytes:
    if value is None:
        raise DatasetError(f"it is without {name}; fill it in, or leave the row out")
    if not isinstance(value, bytes | bytearray | memoryview):
        raise _refuse(name, value, "an encoded picture")
    return bytes(value)


def _text(name: str, value: Any) -> str:
    if value is None:
        raise DatasetError(f"it is without {name}; fill it in, or leave the row out")
    if not isinstance(value, str):
        raise _refuse(name, value, "a text")
    if len(value) > MOST_LETTERS:  # rows are gathered before they are written
        raise DatasetError(f"its {name} has {len(value):,} letters; give at most {MOST_LETTERS:,}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(f"its {name} has half a letter (a lone surrogate); correct it") from error
    return value


def _whole(name: str, value: Any) -> int:
    exact = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    # Where a column has holes, pandas writes whole numbers as floats.
    if not exact and not (isinstance(value, float) and value.is_integer()):
        raise _refuse(name, value, "a whole number")
    if not -(2**63) <= int(value) < 2**63:
        raise _refuse(name, value, "a whole number below 2**63")
    return int(value)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise _refuse(name, value, "a number")
    return float(value)


def _numbers(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise _refuse(name, value, "numbers by name")
    found = {_text(f"name in {name}", key): _number(f"{name}.{key}", one) for key, one in value.items()}
    if not all(map(math.isfinite, found.values())):
        raise _refuse(name, value, "finite numbers by name")
    return found


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise _refuse(name, value, "a list of texts")
    return tuple(_text(name, one) for one in value)


def _seed(name: str, value: Any) -> int | None:
    hole = value is None or (isinstance(value, float) and math.isnan(value))  # pandas writes no whole number as NaN
    return None if hole else _whole(name, value)


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(IMAGE_COLUMNS, _picture),
    **dict.fromkeys(("edit_prompt", "original_prompt", "edited_prompt", "key"), _text),
    "seed": _seed,
    **dict.fromkeys(("p", "cfg", *SCORES), _or_none(_number)),
    "mask": _or_none(_picture),
    **dict.fromkeys(("kind", "session", "licence"), _or_none(_text)),
    "scores": _or_none(_numbers),
    "paraphrases": _or_none(_texts),
}
COLUMNS = tuple(field.name for field in fields(PairRecord))
