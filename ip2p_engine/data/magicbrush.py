"""MagicBrush's own files, as its test set comes: edit_turns.json or edit_sessions.json, and images/SESSION/NAME.png."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..files import read_json

__all__ = ["TURNS", "is_turns", "turn_rows"]

TURNS = ("edit_turns.json", "edit_sessions.json")
CAPTIONS = "global_descriptions.json"
PARTS = {"source_img": "input", "target_img": "output", "mask_img": "mask"}


def is_turns(path: Path) -> bool:
    """Whether a file is one of these."""
    return path.name in TURNS


def turn_rows(path: Path) -> list[dict[str, Any]]:
    """The turns under the names of the columns that the hub's copy has, with captions where they lie beside.

    Raises DatasetError for a file of other content.
    """
    beside = path.parent / CAPTIONS
    captions = read_json(beside, DatasetError) if beside.is_file() else {}
    known = captions if isinstance(captions, Mapping) else {}
    return [_row(session, number, turn, known.get(session), path) for session, number, turn in _turns(path)]


def _turns(path: Path) -> Iterator[tuple[str, int, Any]]:
    """(session, turn from 1, what the file says of it)."""
    content = read_json(path, DatasetError)
    if isinstance(content, Mapping):
        yield from (
            (str(name), n, turn) for name, some in content.items() for n, turn in enumerate(_list(some, path), 1)
        )
        return
    counts: dict[str, int] = {}
    for turn in _list(content, path):
        session = str(turn.get("input", "") if isinstance(turn, Mapping) else "").partition("-")[0]
        counts[session] = counts.get(session, 0) + 1
        yield session, counts[session], turn


def _list(content: Any, path: Path) -> list[Any]:
    if not isinstance(content, list):
        raise DatasetError(f"{path} holds {str(content)[:60]!r} in place of turns; give MagicBrush's own file")
    return content


def _row(session: str, number: int, turn: Any, captions: Any, path: Path) -> dict[str, Any]:
    needed = ("input", "output", "instruction")
    if not isinstance(turn, Mapping) or not all(isinstance(turn.get(name), str) for name in needed):
        raise DatasetError(f"{path}, session {session}, turn {number}, lacks {', '.join(needed)}; fill it in")
    row = {"img_id": session, "turn_index": number, "instruction": turn["instruction"]}
    row |= {ours: f"images/{session}/{turn[theirs]}" for ours, theirs in PARTS.items() if turn.get(theirs)}
    told = captions if isinstance(captions, Mapping) else {}
    texts = {"source_global_caption": told.get(turn["input"]), "target_global_caption": told.get(turn["output"])}
    return {**row, **{name: text for name, text in texts.items() if isinstance(text, str)}}
