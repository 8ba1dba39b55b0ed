"""Lists of sessions, a row with several edits one after the other, as a row an edit."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from .layouts import LONE, NAMES, is_picture
from .parquet import numbered
from .tables import Row, Table, each_row

__all__ = ["TurnsTable", "text_lists", "turns_of"]

BEFORE, INSTRUCTION, AFTER, SESSION = "source_image", "instruction", "target_image", "session"
ALL_OF_ONE = "edits"
"""The list whose edits are each of the row's picture, where others' start from the result before them."""
IDS = ("session", "session_id", "id", "ID", "img_id", "key")


def turns_of(row: Mapping[str, Any]) -> list[Row]:
    """The edits of a session; none of a row that is no session.

    Either n texts and n + 1 pictures, each the result of the text before it; or a list of objects with an instruction
    and its result, of which the first starts from the row's own picture.
    """
    lists = {name: value for name, value in row.items() if isinstance(value, list) and len(value) > 0}
    for said in filter(_is_texts, lists.values()):
        for value in lists.values():
            pictures = [_picture(one) for one in value]
            if len(pictures) == len(said) + 1 and None not in pictures:
                return [_turn(pictures[n], text, pictures[n + 1]) for n, text in enumerate(said)]
    return next((found for name, value in lists.items() if (found := _of_objects(row, value, name == ALL_OF_ONE))), [])


def _is_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(one, str) and not is_picture(one) for one in values)


def text_lists(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row whose values are lists of texts."""
    return [name for name, value in row.items() if isinstance(value, list) and value and _is_texts(value)]


def _of_objects(row: Mapping[str, Any], turns: Sequence[Any], of_one: bool) -> list[Row]:
    """``of_one``: each starts from the row's picture."""
    before, found = _named("before", row) or _named("alone", row), []
    for turn in turns:
        if not isinstance(turn, Mapping):
            return []
        said, after = _named("instruction", turn), _named("after", turn) or _named("alone", turn)
        start = _named("before", turn) or before
        if not said or not after or not start:
            return []
        found.append(_turn(start, said, after))
        before = before if of_one else after
    return found


def _turn(before: Any, said: str, after: Any) -> Row:
    return {BEFORE: before, INSTRUCTION: said, AFTER: after}


def _named(part: str, row: Mapping[str, Any]) -> Any:
    values = [row.get(name) for name in NAMES.get(part, LONE).split()]
    if part == "instruction":
        return next((one for one in values if isinstance(one, str) and one.strip() and not is_picture(one)), None)
    return next((one for one in map(_picture, values) if one is not None), None)


def _picture(value: Any) -> Any:
    """A path, an address or a file, or what an object says to be one."""
    if isinstance(value, Mapping) and not is_picture(value):
        value = next((one for one in value.values() if isinstance(one, str) and is_picture(one)), None)
    return value if value is not None and not isinstance(value, list | tuple) and is_picture(value) else None


class TurnsTable:
    """The turns of another table's rows; where each stands is known, the rest is read when it is asked for."""

    kind = "turns"
    names: Sequence[str] = (BEFORE, INSTRUCTION, AFTER, SESSION)

    def __init__(self, table: Table, columns: Sequence[str] | None = None) -> None:
        """``columns``: of the lists of texts, where only these are to be read to know how many turns there are."""
        self._table, self.place, self.home = table, table.place, table.home
        self._row, self._turn = array("Q"), array("I")
        for number, row in numbered(table.rows(columns)):
            # A row that is none of a session stays, so that it is named.
            for turn in range(_count(row, columns)):
                self._row.append(number)
                self._turn.append(turn)

    @property
    def paths(self) -> list[Path]:
        return list(getattr(self._table, "paths", ()))

    def __len__(self) -> int:
        return len(self._row)

    def row(self, number: int, columns: Sequence[str] | None = None) -> Row:
        row = self._table.row(self._row[number])
        turns = turns_of(row)
        if not turns:
            raise DatasetError("it is no session of edits, as the others are; correct it")
        name = next((row[one] for one in IDS if row.get(one) is not None), self._row[number])
        return {**turns[self._turn[number]], SESSION: str(name)}

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row | DatasetError]:
        return each_row(self)


def _count(row: Mapping[str, Any] | DatasetError, columns: Sequence[str] | None) -> int:
    if isinstance(row, DatasetError):
        return 1
    if columns is None:
        return len(turns_of(row)) or 1
    return len(next((row[name] for name in columns if isinstance(row.get(name), list)), ())) or 1
