"""Folders of pictures without a list: two with equal names, or files whose names say which part of a pair they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..files import NO_JSON, disk_errors, read_json
from .layouts import AFTER_WORDS, BEFORE_WORDS, ONE_OF_A_PAIR, SUFFIXES
from .tables import LONGEST_LINE, Row, each_row

__all__ = ["SPLIT_NAMES", "TEXT", "FolderTable", "GroupedTable", "inside"]

BEFORE = ("control", "source", "before", "input", "original", "conditioning", "src", "a")
AFTER = ("target", "edited", "after", "output", "images", "image", "img", "train", "b")
TEXT = "txt"
SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "test", "eval")
Choose = Callable[[Sequence[str]], str]
SIDES, MOST_PARTS = (BEFORE_WORDS, AFTER_WORDS), 6


class FolderTable:
    """Two folders of pictures with equal names, of any format.

    The instruction is a text of the same name beside the picture after, beside the one before, or in a third folder; or
    all of them are one file beside the folders: a line for each pair in the order of the names, or JSON by name.
    """

    kind = "folders"

    def __init__(self, home: Path, before: str, text: str, after: str, choose: Choose) -> None:
        """``choose`` is asked for one of the splits: those whose names the folders of pictures have, or train alone."""
        self.home, self.place, self.names = home, str(home), [before, text, after]
        self._before, self._after = _pictures(home / before), _pictures(home / after)
        splits = list(dict.fromkeys(stem.partition("/")[0] for stem in self._after))
        has_splits = bool(splits) and set(splits) <= set(SPLIT_NAMES)
        chosen = choose(splits if has_splits else ["train"])
        self._stems = sorted(stem for stem in self._after if not has_splits or stem.startswith(f"{chosen}/"))
        places = dict.fromkeys((after, before, *inside(home)))
        self._notes = [name for name in places if next((home / name).rglob(f"*.{text}"), None)]
        self._listed = {} if self._notes else _listed_texts(home, self._stems)

    @property
    def has_texts(self) -> bool:
        return bool(self._notes or self._listed)

    def __len__(self) -> int:
        return len(self._stems)

    def row(self, number: int, columns: Sequence[str] | None = None) -> Row:
        stem = self._stems[number]
        before, text, after = self.names
        notes = (self.home / name / f"{stem}.{text}" for name in self._notes)
        note = next((one for one in notes if one.is_file()), None)
        picture = self._before.get(stem)
        return {
            before: picture and f"{before}/{picture}",
            text: self._listed.get(stem) if note is None else _text(self.home, note),
            after: f"{after}/{self._after[stem]}",
            "key": f"{after}/{stem}",
        }

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row | DatasetError]:
        return each_row(self)

    @classmethod
    def found_in(cls, home: Path) -> tuple[str, str] | None:
        """(folder before, folder after) by their names, or of two the one without texts and the one with; or None."""
        with_pictures = {name.lower(): name for name in inside(home) if _pictures(home / name)}
        before = next((with_pictures[name] for name in BEFORE if name in with_pictures), None)
        after = next((with_pictures[name] for name in AFTER if name in with_pictures), None)
        if before and after:
            return before, after
        texts = [name for name in with_pictures.values() if next((home / name).glob(f"*.{TEXT}"), None) is not None]
        if len(with_pictures) != 2 or len(texts) != 1:
            return None
        return next(name for name in with_pictures.values() if name not in texts), texts[0]


class GroupedTable:
    """Pictures of one pair, and its text, told by their names: a folder a pair, or files that begin alike.

    ``7/input.png, 7/output.png, 7/prompt.txt`` or ``7_start.png, 7_end.png, 7.txt``: what differs is the column.
    """

    kind = "folders"

    def __init__(self, home: Path, groups: dict[str, dict[str, str]]) -> None:
        self.home, self.place, self._groups = home, str(home), sorted(groups.items())
        self.names = list(dict.fromkeys(column for _, files in self._groups for column in files))

    @classmethod
    def open(cls, home: Path) -> GroupedTable | None:
        """None where names do not tell."""
        groups = _by_folder(home) or _by_name(home)
        return cls(home, groups) if groups else None

    def __len__(self) -> int:
        return len(self._groups)

    def row(self, number: int, columns: Sequence[str] | None = None) -> Row:
        key, files = self._groups[number]
        wanted = {column: name for column, name in files.items() if columns is None or column in columns}
        return {"key": key, **{column: _content(self.home, name) for column, name in wanted.items()}}

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row | DatasetError]:
        return each_row(self, columns)


def _by_folder(home: Path) -> dict[str, dict[str, str]]:
    """{folder: {what the file is called: its path}} of folders with two pictures and more, called alike in each."""
    found = {
        folder: {_column(path): f"{folder}/{path.name}" for path in _files(home / folder)} for folder in inside(home)
    }
    found = {folder: files for folder, files in found.items() if sum(map(_is_picture, files.values())) > 1}
    parts = {column for files in found.values() for column in files}
    sides = [any(word in re.split(r"[\W_]", part) for part in parts for word in words.split()) for words in SIDES]
    return found if len(parts) <= MOST_PARTS and all(sides) else {}


def _by_name(home: Path) -> dict[str, dict[str, str]]:
    """{what names have in common: {the rest: its path}} of the files in a folder whose names end with what they are."""
    found: dict[str, dict[str, str]] = {}
    for path in _files(home):
        if _is_picture(path.name) and (name := ONE_OF_A_PAIR.fullmatch(path.stem)):
            found.setdefault(name["root"], {})[name["part"].lower()] = path.name
    found = {root: files for root, files in found.items() if len(files) > 1}
    for path in _files(home):
        if path.stem in found and not _is_picture(path.name):
            found[path.stem][path.suffix[1:].lower()] = path.name
    return found


def _column(path: Path) -> str:
    """A picture's and a text's name, but of JSON what it is, into which dots lead."""
    return "json" if path.suffix.lower() == ".json" else path.stem.lower()


def _content(home: Path, name: str) -> Any:
    if _is_picture(name):
        return name
    text = _text(home, home / name)
    try:
        return json.loads(text) if name.lower().endswith(".json") else text
    except NO_JSON as error:
        raise DatasetError(f"{name} is not JSON ({error}); correct it") from error


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def inside(home: Path) -> list[str]:
    """The folders in a folder, by name."""
    return sorted(path.name for path in home.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    known = (*SUFFIXES, ".txt", ".json", ".caption")
    named = (path for path in sorted(folder.iterdir()) if path.name.lower().endswith(known))
    return [path for path in named if path.is_file() and not path.name.startswith(".")]


def _text(home: Path, path: Path) -> str:
    """Raises DatasetError for what cannot be read, and for a link that leads out."""
    if not path.resolve().is_relative_to(home.resolve()):
        raise DatasetError(f"{path} leads out of {home}; put the text itself there")
    with disk_errors(path, "read", DatasetError), path.open("rb") as stream:
        return stream.read(LONGEST_LINE).decode("utf-8-sig", errors="replace").rstrip("\r\n")


def _listed_texts(home: Path, stems: Sequence[str]) -> dict[str, str]:
    """{stem: instruction} of one file beside the folders; empty where there is none. Raises DatasetError."""
    files = [path for path in _files(home) if not _is_picture(path.name)]
    if len(files) != 1:
        return {}
    if files[0].suffix.lower() != ".json":
        return _in_order(files[0], stems, _text(home, files[0]).splitlines())
    found = read_json(files[0], DatasetError)
    texts = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        return {}
    if isinstance(found, list):
        return _in_order(files[0], stems, found)
    return {name.removesuffix(Path(name).suffix) if _is_picture(name) else name: found[name] for name in found}


def _in_order(path: Path, stems: Sequence[str], texts: Sequence[Any]) -> dict[str, Any]:
    if len(texts) != len(stems):
        raise DatasetError(
            f"{path} has {len(texts):,} texts, and there are {len(stems):,} pictures; give one for each, in the order "
            "of their names"
        )
    return dict(zip(sorted(stems, key=_as_counted), texts, strict=True))


def _as_counted(name: str) -> list[Any]:
    """So that 10 comes after 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _pictures(folder: Path) -> dict[str, str]:
    """{stem: name within the folder} of its pictures."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if _is_picture(path.name) and path.is_file() and not path.name.startswith("."):
            name = path.relative_to(folder).as_posix()
            found.setdefault(name.removesuffix(path.suffix), name)
    return found
