"""Lists of sessions, a row with several edits one after the other, as a row an edit."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from .layouts import NAMES, is_picture
from .tables import Row, Table

__all__ = ["TurnsTable", "turns_of"]

BEFORE, INSTRUCTION, AFTER, SESSION = "source_image", "instruction", "target_image", "session"
IDS = ("session", "session_id", "id", "ID", "img_id", "key")


def turns_of(row: Mapping[str, Any]) -> list[Row]:
    """The edits of a session; none of a row that is no session.

    Either n texts and n + 1 pictures, each the result of the text before it; or a list of objects with an instruction
    and its result, of which the first starts from the row's own picture.
    """
    lists = {name: value for name, value in row.items() if isinstance(value, list) and len(value) > 0}
    texts = [value for value in lists.values() if all(isinstance(one, str) and not is_picture(one) for one in value)]
    chains = [found for value in lists.values() if (found := [_picture(one) for one in value]) and None not in found]
    for said in texts:
        for pictures in chains:
            if len(pictures) == len(said) + 1:
                return [_turn(pictures[n], text, pictures[n + 1]) for n, text in enumerate(said)]
    return next((found for value in lists.values() if (found := _of_objects(row, value))), [])


def _of_objects(row: Mapping[str, Any], turns: Sequence[Any]) -> list[Row]:
    before, found = _named("before", row), []
    for turn in turns:
        if not isinstance(turn, Mapping):
            return []
        said, after = _named("instruction", turn), _named("after", turn)
        before = _named("before", turn) or before
        if not said or not after or not before:
            return []
        found.append(_turn(before, said, after))
        before = after
    return found


def _turn(before: Any, said: str, after: Any) -> Row:
    return {BEFORE: before, INSTRUCTION: said, AFTER: after}


def _named(part: str, row: Mapping[str, Any]) -> Any:
    wanted = part != "instruction"
    values = (row.get(name) for name in NAMES[part].split())
    return next((one for one in values if isinstance(one, str) and one.strip() and is_picture(one) == wanted), None)


def _picture(value: Any) -> Any:
    """A path or address, or what an object says to be one."""
    if isinstance(value, Mapping):
        value = next((one for one in value.values() if isinstance(one, str) and is_picture(one)), None)
    return value if isinstance(value, str) and is_picture(value) else None


class TurnsTable:
    """The turns of another table's rows; where each stands is known, the rest is read when it is asked for."""

    kind = "turns"
    names: Sequence[str] = (BEFORE, INSTRUCTION, AFTER, SESSION)

    def __init__(self, table: Table) -> None:
        self._table, self.place, self.home = table, table.place, table.home
        self._row, self._turn = array("Q"), array("I")
        for number, row in enumerate(table.rows()):
            # A row that is none of a session stays, so that it is named.
            for turn in range(len(turns_of(row)) or 1 if isinstance(row, Mapping) else 1):
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
        for number in range(len(self)):
            try:
                yield self.row(number)
            except DatasetError as error:
                yield error
