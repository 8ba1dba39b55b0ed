"""Files of rows, whatever their format: Parquet, JSON Lines, CSV, tars, folders; read by number or in order.

A row is {column: value}. Pictures stay as they are kept: bytes, the hub's {"bytes", "path"}, or a path.
"""

from __future__ import annotations

import csv
import gzip
import json
import tarfile
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import DatasetError
from ..files import NO_JSON, SURPLUS, comma_of, disk_errors, is_url, json_lines, read_json
from .layouts import ONE_OF_A_PAIR, is_inline, is_picture
from .parquet import UNFOLDED, UNFOLDS, ParquetFiles

__all__ = [
    "CsvTable",
    "LinesTable",
    "ListsTable",
    "ListTable",
    "OriginalTable",
    "ParquetTable",
    "Table",
    "TarTable",
    "each_row",
    "is_original",
    "unpacked",
]

LONGEST_LINE, LARGEST_MEMBER, SAMPLE, MOST_BROKEN = 2**26, 2**30, 20, 1000
GZIPPED = (".gz", ".tgz")
FILE_NAME = "_file_name"
Row = dict[str, Any]


class Table(Protocol):
    """Rows that are read by number or in order; one that cannot be read is a DatasetError in its place."""

    @property
    def kind(self) -> str: ...

    @property
    def place(self) -> str: ...

    @property
    def home(self) -> Path | None:
        """Paths in the rows are relative to it, and stay below it; None where they may lie anywhere."""

    @property
    def names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def row(self, number: int, columns: Sequence[str] | None = None) -> Row: ...

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row | DatasetError]: ...


class ParquetTable:
    """Parquet files of one schema."""

    kind = "parquet"

    def __init__(self, home: Path, paths: Sequence[Path]) -> None:
        self.home, self.place = home, str(home)
        self._files, self.paths = ParquetFiles(paths), list(paths)
        self.names = self._files.names()

    def __len__(self) -> int:
        return len(self._files)

    def row(self, number: int, columns: Sequence[str] | None = None) -> Row:
        return self._files.row(number, columns)[2]

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row | DatasetError]:
        for *_, values in self._files.rows(columns):
            yield values


class ListTable:
    """Rows that are there already; without a home they are the caller's own, and their paths may lie anywhere."""

    kind = "triplets"

    def __init__(self, rows: Any, place: str, home: Path | None) -> None:
        self._rows, self.place, self.home = rows, place, home
        self.names = _names_of(self.rows())

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int, columns: Sequence[str] | None = None) -> Row:
        try:
            row = self._rows[number]
        except Exception as error:  # it may be anybody's code
            raise DatasetError(f"it cannot be read ({error!r:.200}); leave it out") from error
        if not isinstance(row, Mapping):
            raise DatasetError(f"it is {str(row)[:60]!r}; give one object a row")
        return _without_suffix(row)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row | DatasetError]:
        return each_row(self)


class _TextTable:
    """Rows at known places of a text file; only the places are kept in memory."""

    kind = "triplets"

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.home = path, str(path), path.parent
        self._header: list[str] = []
        with disk_errors(path, "read", DatasetError), path.open("rb") as stream:
            if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise DatasetError(f"{path} is UTF-16 text; save it as UTF-8")
            stream.seek(0)
            self._starts = array("Q", self._index(stream))
        self.names: Sequence[str] = self._header or _names_of(self.rows())

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, number: int, columns: Sequence[str] | None = None) -> Row:
        with disk_errors(self.path, "read", DatasetError), self.path.open("rb") as stream:
            stream.seek(self._starts[number])
            return _without_suffix(self._parsed(stream))

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row | DatasetError]:
        return each_row(self)

    def _index(self, stream: BinaryIO) -> Iterator[int]:
        raise NotImplementedError

    def _parsed(self, stream: BinaryIO) -> Mapping[str, Any]:
        raise NotImplementedError


class LinesTable(_TextTable):
    """JSON Lines."""

    def _index(self, stream: BinaryIO) -> Iterator[int]:
        start = 0
        while line := stream.readline(LONGEST_LINE):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield start
            start += len(line)

    def _parsed(self, stream: BinaryIO) -> Mapping[str, Any]:
        line = stream.readline(LONGEST_LINE)
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except NO_JSON as error:
            raise DatasetError(f"it is not JSON ({error}); correct or remove the line") from error
        if not isinstance(row, dict):
            raise DatasetError(f"it is {str(row)[:60]!r}; give one JSON object a line")
        return row


class ListsTable:
    """Lists of one split in several folders, each with paths relative to its own."""

    kind = "triplets"

    def __init__(self, home: Path, tables: Sequence[Table]) -> None:
        self.home, self.place, self._tables = home, str(home), list(tables)
        self.names = list(dict.fromkeys(name for table in self._tables for name in table.names))
        self._ends = list(accumulate(map(len, self._tables)))

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, number: int, columns: Sequence[str] | None = None) -> Row:
        which = bisect_right(self._ends, number)
        table = self._tables[which]
        row = table.row(number - self._ends[which] + len(table), columns)
        return {name: self._below(table.home or self.home, value) for name, value in row.items()}

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row | DatasetError]:
        return each_row(self, columns)

    def _below(self, folder: Path, value: Any) -> Any:
        """A path, or each of a list, from here."""
        if isinstance(value, list):
            return [self._below(folder, one) for one in value]
        if not isinstance(value, str) or not is_picture(value) or is_url(value) or is_inline(value):
            return value
        return str(folder.relative_to(self.home) / value)


class CsvTable(_TextTable):
    """CSV with commas, semicolons or tabs, whichever the first line has most of."""

    def _index(self, stream: BinaryIO) -> Iterator[int]:
        first = stream.readline(LONGEST_LINE).decode("utf-8-sig", "replace")
        self._comma = comma_of(first)
        stream.seek(0)
        reader = csv.reader(self._lines(stream), delimiter=self._comma)
        self._header = [_hub_name(name.strip()) for name in next(reader, [])]
        start = stream.tell()
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error:  # said when the row is read
                row = ["broken"]
            if row:
                yield start
            start = stream.tell()

    def _parsed(self, stream: BinaryIO) -> Mapping[str, Any]:
        try:
            values = next(csv.reader(self._lines(stream), delimiter=self._comma))
        except csv.Error as error:
            raise DatasetError(f"it is not CSV ({error}); correct or remove it") from error
        if any(values[len(self._header) :]):
            raise DatasetError(f"it {SURPLUS}")
        return dict(zip(self._header, values, strict=False))

    def _lines(self, stream: BinaryIO) -> Iterator[str]:
        """Read when they are asked for, so that the stream stands behind the row that was made of them."""
        while line := stream.readline(LONGEST_LINE):
            try:
                yield line.decode("utf-8-sig" if stream.tell() == len(line) else "utf-8")
            except UnicodeDecodeError as error:
                raise DatasetError(f"{self.path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error


class TarTable:
    """WebDataset: members of one stem that follow each other are a row, what comes after the stem names the column.

    Where no two members have a stem in common, those that begin alike are a row, or those of one folder.
    """

    kind = "tar"

    def __init__(self, home: Path, paths: Sequence[Path]) -> None:
        self.home, self.paths, self.place = home, list(paths), str(home if len(paths) > 1 else paths[0])
        self.names: list[str] = []
        # Of rows the first member and the file; of members the column, the place and the size.
        self._first, self._file = array("Q"), array("I")
        self._column, self._start, self._size = array("I"), array("Q"), array("Q")
        self._unpacked: dict[int, Any] = {}
        for number, path in enumerate(self.paths):
            if path.suffix.lower() in GZIPPED:
                self._unpacked[number] = unpacked(path)
        for parts_of in (_by_stem, _by_ending, _by_folder):
            for number in range(len(self.paths)):
                self._index(number, self._file_of(number), parts_of)
            if len(self) < len(self._column):
                return
            if parts_of is not _by_folder:
                self.names = []
                for values in (self._first, self._file, self._column, self._start, self._size):
                    del values[:]

    def _file_of(self, number: int) -> Path:
        found = self._unpacked.get(number)
        return self.paths[number] if found is None else Path(found.name)

    def _index(self, number: int, path: Path, parts_of: Callable[[str, str], tuple[str, str]]) -> None:
        columns = {name: n for n, name in enumerate(self.names)}
        stem = None
        with disk_errors(path, "read", DatasetError), _tar_errors(path), tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or it would keep every member in memory
                folder, _, name = member.name.rpartition("/")
                if not member.isreg() or name.startswith("."):
                    continue
                row, column = parts_of(folder, name)
                if stem != (stem := (folder, row)):
                    self._first.append(len(self._column))
                    self._file.append(number)
                self._column.append(columns.setdefault(column.lower(), len(columns)))
                self._start.append(member.offset_data)
                self._size.append(member.size)
        self.names = list(columns)

    def __len__(self) -> int:
        return len(self._first)

    def row(self, number: int, columns: Sequence[str] | None = None) -> Row:
        last = self._first[number + 1] if number + 1 < len(self) else len(self._column)
        path, found = self._file_of(self._file[number]), {}
        with disk_errors(path, "read", DatasetError), path.open("rb") as stream:
            for member in range(self._first[number], last):
                name = self.names[self._column[member]]
                if columns is None or any(one == name or one.startswith(f"{name}.") for one in columns):
                    found[name] = _member(stream, name, self._start[member], self._size[member])
        return found

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row | DatasetError]:
        return each_row(self, columns)


def _by_stem(folder: str, name: str) -> tuple[str, str]:
    """(row, column) of a member, as WebDataset has it: 7.input.png, 7.output.png, 7.txt."""
    return name.partition(".")[0], name.partition(".")[2]


def _by_folder(folder: str, name: str) -> tuple[str, str]:
    """7/input.png, 7/output.png, 7/prompt.txt."""
    return folder, name


def _by_ending(folder: str, name: str) -> tuple[str, str]:
    """7_input.png, 7_output.png, 7.txt."""
    stem, _, ending = name.rpartition(".")
    found = ONE_OF_A_PAIR.fullmatch(stem)
    return (found["root"], f"{found['part']}.{ending}") if found else (stem, ending)


def unpacked(path: Path) -> Any:
    """A gzipped file once more on the disk, for as long as it is used: in a compressed one no place can be gone to."""
    copy = tempfile.NamedTemporaryFile(suffix=Path(path.stem).suffix)  # noqa: SIM115 (it lives as long as the table)
    try:
        with disk_errors(path, "read", DatasetError), gzip.open(path) as packed:
            most = max(UNFOLDED, UNFOLDS * path.stat().st_size)
            while block := packed.read(2**20):
                copy.write(block)
                if copy.tell() > most:
                    raise DatasetError(
                        f"{path} unfolds to more than {most:,} bytes, which pictures never do; leave it out"
                    )
            copy.flush()
    except (EOFError, zlib.error) as error:
        raise DatasetError(f"{path} is no whole gzipped file ({error}); restore it") from error
    return copy


@contextmanager
def _tar_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two: numbers in extended headers
        raise DatasetError(f"{path} is no whole tar ({error}); decompress or restore it") from error


def _member(stream: BinaryIO, name: str, start: int, size: int) -> Any:
    is_text = name.endswith(("json", "txt", "caption", "text"))
    if size > (LONGEST_LINE if is_text else LARGEST_MEMBER):
        raise DatasetError(f"its {name} has {size:,} bytes; leave it out")
    stream.seek(start)
    data = stream.read(size)
    if not is_text:
        return data
    try:
        return json.loads(data) if name.endswith("json") else data.decode("utf-8-sig").strip()
    except NO_JSON as error:
        raise DatasetError(f"its {name} cannot be read ({error}); correct it") from error


class OriginalTable:
    """The original repository's folders: ``0000012/prompt.json``, ``{seed}_0.jpg`` before, ``{seed}_1.jpg`` after.

    ``prompt.json`` has input (or caption), edit and output; ``metadata.jsonl``, if there, a line of scores a seed;
    above them ``seeds.json``, [[folder, [seed, ...]], ...], or else what files are there counts.
    """

    kind = "original"
    TEXTS = {
        "original_prompt": ("original_prompt", "caption", "input", "original_caption"),
        "edit_prompt": ("edit_prompt", "instruction", "edit"),
        "edited_prompt": ("edited_prompt", "edited_caption", "output"),
    }
    NUMBERS = {
        "p2p_threshold": "p",
        "cfg_scale": "cfg",
        "clip_sim_0": "sim_0",
        "clip_sim_1": "sim_1",
        "clip_sim_image": "sim_image",
        "clip_sim_dir": "sim_direction",
    }

    def __init__(self, home: Path) -> None:
        self.home, self.place = home, str(home)
        self.names = ["original_image", "edited_image", *self.TEXTS, "seed", "key", *self.NUMBERS.values()]
        self.places = [(name, seed) for name, seeds in _listing(home) for seed in seeds]
        self._about: tuple[str, dict[str, str], dict[str, Any]] = ("", {}, {})

    def __len__(self) -> int:
        return len(self.places)

    def row(self, number: int, columns: Sequence[str] | None = None) -> Row:
        name, seed = self.places[number]
        if self._about[0] != name:
            self._about = (name, self._prompt(name), self._metadata(name))
        _, texts, metadata = self._about
        scores = metadata.get(seed, {})
        pictures = {"original_image": f"{name}/{seed}_0.jpg", "edited_image": f"{name}/{seed}_1.jpg"}
        numbers = {ours: scores.get(theirs) for theirs, ours in self.NUMBERS.items()}
        return {**pictures, **texts, **numbers, "seed": int(seed), "key": f"{name}/{seed}"}

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row | DatasetError]:
        return each_row(self)

    def _prompt(self, name: str) -> dict[str, str]:
        path = self.home / name / "prompt.json"
        row, found = read_json(path, DatasetError), {}
        if not isinstance(row, Mapping):
            raise DatasetError(f"{path} is not a JSON object; give one with input, edit and output")
        for column, names in self.TEXTS.items():
            texts = [row[one] for one in names if isinstance(row.get(one), str)]
            if not texts:
                raise DatasetError(f"{path} has no {' or '.join(names)}, only {', '.join(map(str, row))}; add it")
            found[column] = texts[0]
        return found

    def _metadata(self, name: str) -> dict[str, Any]:
        path = self.home / name / "metadata.jsonl"
        return {str(row.get("seed")): row for row in json_lines(path, DatasetError)} if path.exists() else {}


def is_original(folder: Path) -> bool:
    """Whether a folder is laid out as the original repository's."""
    return (folder / "seeds.json").exists() or any(folder.glob("*/prompt.json"))


def _listing(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, seeds) as seeds.json lists them, or else as the files are there."""
    path = folder / "seeds.json"
    if not path.exists():
        for prompt in sorted(folder.glob("*/prompt.json")):
            seeds = sorted(before.name.removesuffix("_0.jpg") for before in prompt.parent.glob("*_0.jpg"))
            yield prompt.parent.name, [seed for seed in seeds if seed.isdecimal()]
        return
    rows = read_json(path, DatasetError)
    try:
        found = [(str(name), [str(int(seed)) for seed in seeds]) for name, seeds in rows]
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{path} is no list of [folder, [seeds]]; remove it to go by the files") from error
    for name, _ in found:
        if Path(name).name != name:
            raise DatasetError(f"{path} names {name!r}, which is no folder beside it; correct it")
    yield from found


def each_row(table: Table, columns: Sequence[str] | None = None) -> Iterator[Row | DatasetError]:
    for number in range(len(table)):
        try:
            yield table.row(number, columns)
        except DatasetError as error:
            yield error


def _names_of(rows: Iterator[Row | DatasetError]) -> list[str]:
    """Of the first rows that can be read."""
    good = (row for row in islice(rows, MOST_BROKEN) if not isinstance(row, DatasetError))
    return list(dict.fromkeys(name for row in islice(good, SAMPLE) for name in row))


def _without_suffix(row: Mapping[str, Any]) -> Row:
    """The hub's folders of pictures call a column of paths ``NAME_file_name``."""
    return {_hub_name(str(name)): one for name, one in row.items()}


def _hub_name(name: str) -> str:
    return "image" if name == FILE_NAME[1:] else name.removesuffix(FILE_NAME)
