"""What ``ip2p edit`` is given: files, folders, patterns, addresses, standard input, and tables of edits."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import ConfigError, ImageError
from ..files import csv_rows, is_url, json_lines, public_name, reason_of, web_stream
from ..images import is_picture_name

__all__ = ["Row", "Source", "cross", "find_sources", "read_table"]

STDIN = "-"
PATTERN = re.compile(r"[*?\[]")
MAX_BYTES = 1 << 30
TABLES = (".csv", ".jsonl")
PICTURE_COLUMNS = ("image", "picture", "source", "file_name", "source_image", "original_image", "input_image")
TEXT_COLUMNS = ("instruction", "text", "prompt", "edit_prompt")
WHOLE = re.compile(r"(-?\d+)\.0*")  # as programs write whole numbers of a column with gaps
NUMBERS = {"text_cfg": float, "image_cfg": float, "steps": int}


@dataclass(frozen=True, eq=False)
class Source:
    """A picture to edit: what names its results, and what is opened (a path or bytes)."""

    name: str
    picture: str | bytes
    address: str = ""
    """Where a copy came from; it names the picture to people."""
    fault: ImageError | None = None
    """Why there is no picture, where an address gave none."""

    def told(self, error: Exception) -> Exception:
        """An error about the picture with the name that people know it by."""
        if not self.address or not isinstance(error, ImageError):
            return error
        known = "the given data" if isinstance(self.picture, bytes) else self.picture
        return ImageError(str(error).replace(known, self.address))

    @property
    def stem(self) -> str:
        """The name without folder and suffix, fit for a file's name on every system."""
        return re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", Path(self.name).stem).rstrip(". ") or "picture"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One edit to make; ``number`` is the instruction's, where there are several, and ``settings`` the row's own."""

    source: Source
    instruction: str
    seed: int
    number: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def cross(sources: Sequence[Source], instructions: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """Every picture by every instruction with every seed, in that order of nesting."""
    return [
        Row(source=source, instruction=text, seed=seed, number=number + 1 if len(instructions) > 1 else None)
        for source in sources
        for number, text in enumerate(instructions)
        for seed in seeds
    ]


def find_sources(words: Sequence[str], scratch: Path) -> list[Source]:
    """The pictures that words name; addresses are copied into ``scratch``, a folder.

    A file of that name wins over everything else that a word may mean. Raises ImageError for a folder or a pattern
    without pictures.
    """
    return [source for word in words for source in _named(word, scratch)]


def _named(word: str, scratch: Path) -> Iterator[Source]:
    if word == STDIN and not os.path.lexists(word):
        yield Source("stdin", _standard_input(), address="standard input")
        return
    if is_url(word):
        yield _download(word, scratch)
        return
    word = _unquoted(word)
    path = Path(word).expanduser()
    if path.is_dir():
        yield from _in_folder(path)
    elif PATTERN.search(word) and not os.path.lexists(path):
        found = sorted(name for name in glob.glob(str(path), recursive=True) if not os.path.isdir(name))
        if not found:
            raise ImageError(f"{word} fits no file; check the pattern and the folder")
        yield from (Source(Path(name).name, name) for name in found)
    else:
        yield Source(path.name, str(path))


def _unquoted(word: str) -> str:
    """Without the quotes that Windows' shell hands on: 'a pattern', and a folder"  that ended with a backslash."""
    if os.path.lexists(word):
        return word
    if len(word) > 2 and word[0] == word[-1] == "'":
        return word[1:-1]
    return word.removesuffix('"')


def _in_folder(folder: Path) -> Iterator[Source]:
    """The folder's own pictures by name; hidden ones, which some systems leave beside each picture, are none."""
    names = sorted(path for path in folder.iterdir() if path.is_file() and is_picture_name(path))
    shown = [path for path in names if not path.name.startswith(".")]
    if not shown:
        raise ImageError(f"{folder} is a folder without pictures; give pictures or a folder of them")
    yield from (Source(path.name, str(path)) for path in shown)


def _standard_input() -> bytes:
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if not data:
        raise ImageError("standard input is empty; pipe a picture into it, or give a file in place of -")
    if len(data) > MAX_BYTES:
        raise ImageError("standard input gives more than 1 GiB; pipe one picture into it")
    return data


def _download(address: str, scratch: Path) -> Source:
    """A copy of what lies at an address, under its own name; what goes wrong is the picture's fault."""
    shown, name, target = public_name(address), "picture", scratch / f"{len(list(scratch.iterdir()))}"
    try:
        name = unquote(Path(urlsplit(address).path).name) or name
        target = target.with_suffix(Path(name).suffix[:10])
        target.touch()
        with _remote(address) as stream, target.open("wb") as copy:
            while block := stream.read(1 << 20):
                copy.write(block)
                if copy.tell() > MAX_BYTES:  # a server may never end
                    raise ImageError(f"{shown} gives more than 1 GiB; give the address of one picture")
    except ImageError as error:
        return Source(name, str(target), shown, error)
    except (OSError, ValueError, ImportError, HTTPException) as error:
        fault = ImageError(f"{shown} cannot be read ({reason_of(error, address)}); check the address")
        return Source(name, str(target), shown, fault)
    return Source(name, str(target), shown)


def _remote(address: str) -> Any:
    if address.lower().startswith(("http://", "https://")):
        return web_stream(address)
    import fsspec

    return fsspec.open(address, "rb")


def read_table(path: Path, seed: int, scratch: Path) -> list[Row]:
    """The edits of a .csv or .jsonl file: columns image and instruction, and seed, text_cfg, image_cfg, steps at will.

    Paths are meant from the table's folder. ``seed`` is that of rows without one. Raises ConfigError with the row.
    """
    if path.suffix.lower() not in TABLES:
        raise ConfigError(f"{path} is no table of edits; give a .csv or a .jsonl file")
    lines = csv_rows(path, ConfigError) if path.suffix.lower() == ".csv" else json_lines(path, ConfigError)
    known: dict[str, Source] = {}
    rows = []
    for number, said in enumerate(lines, start=1):
        line = _plain(said)
        place = f"{path}, row {number}"
        word = _value(line, PICTURE_COLUMNS, place)
        if word not in known:
            known[word] = _of_table(word, path.parent, scratch)
        own = {
            name: _number(line[name], kind, f"{place}, {name}") for name, kind in NUMBERS.items() if _said(line, name)
        }
        own_seed = _number(line["seed"], int, f"{place}, seed") if _said(line, "seed") else seed
        text = _value(line, TEXT_COLUMNS, place)
        rows.append(Row(source=known[word], instruction=text, seed=own_seed, settings=own))
    if not rows:
        raise ConfigError(f"{path} has no rows; give one edit a line")
    return rows


def _of_table(word: str, folder: Path, scratch: Path) -> Source:
    if is_url(word):
        return _download(word, scratch)
    path = folder / Path(word).expanduser()
    if not path.exists() and (written := folder / word.replace("\\", "/")).exists():  # a table from Windows
        path = written
    return Source(path.name, str(path))


def _plain(line: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the capitals of its columns' names and the blanks around its words."""
    return {str(name).strip().lower(): one.strip() if isinstance(one, str) else one for name, one in line.items()}


def _said(line: Mapping[str, Any], name: str) -> bool:
    return line.get(name) not in (None, "")


def _value(line: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    for name in names:
        if isinstance(value := line.get(name), str) and (value or name in TEXT_COLUMNS):
            return value
    raise ConfigError(f"{place} has no text in a column {names[0]}; name the columns image, instruction, seed")


def _number(value: Any, kind: Any, place: str) -> Any:
    try:
        if kind is int and isinstance(value, str) and (whole := WHOLE.fullmatch(value)):
            value = whole[1]
        number = kind(value)
        if isinstance(value, bool) or (not isinstance(value, str) and number != value):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{place} is {value!r}; give {what} or leave it empty") from error
    return number
