"""Which table a path, a pattern or a name on the hub is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice, product
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DatasetError, IP2PError
from ..files import NO_JSON, disk_errors, is_url, read_json
from .folders import SPLIT_NAMES, TEXT, FolderTable, GroupedTable, inside
from .layouts import is_inline, is_picture
from .magicbrush import TURNS, is_turns, turn_rows
from .store import SHARD
from .tables import (
    LONGEST_LINE,
    CsvTable,
    LinesTable,
    ListsTable,
    ListTable,
    OriginalTable,
    ParquetTable,
    Table,
    TarTable,
    is_original,
    unpacked,
)

__all__ = [
    "HubTable",
    "card_licence",
    "datasets_library",
    "library_errors",
    "missing_files",
    "open_hub",
    "open_table",
    "split_of",
    "undecoded",
]

NUMBERED = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5}).*")
HUB_NAME = re.compile(r"(hf://datasets/)?[\w-][\w.-]*/[\w-][\w.-]*")
TARS, ARCHIVES = (".tar.gz", ".tgz"), (".zip", ".7z", ".rar")
METADATA = ("metadata.jsonl", "metadata.csv")
LISTS, GZIPPED = (".jsonl", ".ndjson", ".csv", ".tsv", ".json"), ".gz"
"""Of several kinds in a folder the first is taken."""
MOST_FILES, FIRST = 100_000, 3
KINDS = (
    "a folder of the original layout (0000000/prompt.json), of Parquet files or tars, of two folders of pictures or "
    "with metadata.jsonl, or MagicBrush's own; a .csv, .tsv, .json, .jsonl, .parquet, .arrow or .tar file; a pattern "
    "such as {000..031}.tar; or a name on the hub"
)


def open_table(
    source: str | Path, columns: Sequence[str] | None, split: str | None, *, streaming: bool = False
) -> tuple[Table, Sequence[str] | None]:
    """(table, its columns of picture, instruction and edited picture where its format says them).

    Raises DatasetError for what is none, for several splits of which none was chosen, and for one that is not there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, columns, split)
    if path.exists():
        return _beside(_file(path, split), path.parent), None
    if "{" in path.name or "*" in path.name:
        return _pattern(path, split), None
    if HUB_NAME.fullmatch(str(source)) and not path.suffix:
        return HubTable(open_hub(str(source), split, streaming=streaming), str(source)), None
    raise DatasetError(f"{source} is no known layout; give {KINDS}")


def _folder(path: Path, columns: Sequence[str] | None, split: str | None) -> tuple[Table, Sequence[str] | None]:
    def choose(splits: Sequence[str]) -> str:
        return _chosen_split(split, splits, str(path))

    if is_original(path):
        choose(["train"])
        return OriginalTable(path), ("original_image", "edit_prompt", "edited_image")
    if own := [path / name for name in TURNS if (path / name).is_file()]:
        return _file(own[0], split), None
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return HubTable(_saved(path, split), str(path)), None
    if columns and all((path / name).is_dir() for name in (columns[0], columns[2])):
        return FolderTable(path, columns[0], columns[1], columns[2], choose), columns
    for endings, table in (((".parquet",), ParquetTable), ((".tar", *TARS), TarTable)):
        found = (one for one in path.rglob("[!.]*") if one.name.lower().endswith(endings) and _is_visible(one, path))
        if paths := sorted(found):
            return table(path, _of_split(paths, path, split)), None
    if lists := [one for name in METADATA for one in sorted(path.rglob(name)) if _is_visible(one, path)]:
        chosen = _of_split(lists, path, split)
        tables = [_file(one) for one in chosen]
        return (tables[0] if len(tables) == 1 else ListsTable(path, tables)), None
    lists = _lists(path) or [one for name in inside(path) for one in _lists(path / name)]
    if names := FolderTable.found_in(path):
        named = (names[0], columns[1] if columns else TEXT, names[1])
        folders = FolderTable(path, *named, choose)
        if folders.has_texts or not lists:
            return folders, named
    is_list = bool(lists) and lists[0].parent == path and ".json" not in lists[0].suffixes
    if not is_list and (grouped := GroupedTable.open(path)):
        choose(["train"])
        return grouped, None
    if lists:
        chosen = lists if len(lists) == 1 else _of_split(lists, path, split)
        tables = [_beside(_file(one, split), path) for one in chosen]
        return (tables[0] if len(tables) == 1 else ListsTable(path, tables)), None
    if splits := [name for name in SPLIT_NAMES if (path / name).is_dir()]:
        return _folder(path / choose(splits), columns, None)
    raise DatasetError(f"{path} is no known layout; give {KINDS}")


def _lists(folder: Path) -> list[Path]:
    """Files of rows in a folder, of one kind."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        name = path.name.lower().removesuffix(GZIPPED)
        if not name.startswith(".") and path.is_file() and (kind := Path(name).suffix) in LISTS:
            kinds.setdefault(kind, []).append(path)
    return next((kinds[kind] for kind in LISTS if kind in kinds), [])


def _beside(table: Table, folder: Path) -> Table:
    """A list's paths may be relative to the folder above it, up to ``folder``, or to one that lies beside it."""
    good = (row for row in islice(table.rows(), FIRST) if not isinstance(row, DatasetError))
    values = [value for row in good for value in row.values() if isinstance(value, str)]
    paths = [one for one in values if is_picture(one) and not is_inline(one) and not is_url(one)]
    if isinstance(table, LinesTable | CsvTable | ListTable) and table.home is not None:
        beside = [table.home / name for name in inside(table.home)]
        places = (table.home, folder, *(one for one in beside if not one.is_symlink()))
        with suppress(OSError, ValueError):
            table.home = next((one for one in places if any((one / name).is_file() for name in paths)), table.home)
    return table


def _file(path: Path, split: str | None = None) -> Table:
    """``split``: that it has to be, unless it has several."""
    ending = path.suffix.lower()
    has_several = ending in (".json", GZIPPED)
    if not has_several:
        _chosen_split(split, [split_of(path, path.parent.parent)], str(path))
    if ending == GZIPPED and Path(path.stem).suffix.lower() in LISTS:
        copy = unpacked(path)
        table: Any = _file(Path(copy.name), split)
        table.place, table.home, table.unpacked = str(path), path.parent, copy
        return table
    if ending == ".arrow":
        return HubTable(_of_arrow(path), str(path))
    if ending in (".csv", ".tsv"):
        return CsvTable(path)
    if ending == ".parquet":
        return ParquetTable(path.parent, [path])
    if ending == ".tar" or path.name.lower().endswith(TARS):
        return TarTable(path.parent, [path])
    if is_turns(path):
        return ListTable(turn_rows(path), str(path), path.parent)
    if ending == ".json" and not _has_lines(path):
        return ListTable(_rows_in(read_json(path, DatasetError), split, path), str(path), path.parent)
    if ending in (".jsonl", ".ndjson", ".json"):
        return LinesTable(path)
    if ending in ARCHIVES:
        raise DatasetError(f"{path} is an archive; unpack it, and give the folder")
    raise DatasetError(f"{path} ends in {ending!r}; give {KINDS}")


def _has_lines(path: Path) -> bool:
    """Whether a file of JSON has an object a line, which one of its first lines shows, and more than one."""
    with disk_errors(path, "read", DatasetError), path.open("rb") as stream:
        if stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return False
        stream.seek(0)
        first = [stream.readline(LONGEST_LINE) for _ in range(FIRST)]
    for line in first if first[1] else ():
        with suppress(*NO_JSON):
            if isinstance(json.loads(line.decode("utf-8-sig")), dict):
                return True
    return False


def _rows_in(content: Any, split: str | None, path: Path) -> list[Any]:
    """The rows of a JSON file: a list, an object with one, or with one for each split, or an object of objects."""
    is_object = isinstance(content, dict) and bool(content)
    if is_object and set(content) <= set(SPLIT_NAMES) and all(isinstance(one, list) for one in content.values()):
        return content[_chosen_split(split, list(content), str(path))]
    _chosen_split(split, [split_of(path, path.parent.parent)], str(path))
    if not is_object:
        return content if isinstance(content, list) else [content]
    lists = [one for one in content.values() if isinstance(one, list) and one and all(isinstance(x, dict) for x in one)]
    if len(lists) == 1 and not any(isinstance(one, str) and is_picture(one) for one in content.values()):
        return lists[0]
    objects = [set(one) for one in content.values() if isinstance(one, dict)]
    if objects and len(objects) == len(content) and set.intersection(*objects):
        return [{"key": name, **one} for name, one in content.items()]
    return [content]


def _pattern(path: Path, split: str | None) -> Table:
    """Braces as in a shell, {000..031} and {a,b}, and then ``*``."""
    parts = [list(_alternatives(part)) for part in re.split(r"(\{[^{}]*\})", path.name)]
    names = ["".join(one) for _, one in zip(range(MOST_FILES), product(*parts), strict=False)]
    found = [one for name in names for one in (sorted(path.parent.glob(name)) if "*" in name else [path.parent / name])]
    if not found or not all(one.is_file() for one in found):
        missing = next((one for one in found if not one.is_file()), path)
        raise DatasetError(f"{missing} does not exist; correct the pattern {path.name}")
    _chosen_split(split, [split_of(found[0], path.parent)], str(path))
    endings = {".tar" if one.name.lower().endswith(TARS) else one.suffix.lower() for one in found}
    if endings == {".tar"}:
        return TarTable(path.parent, found)
    if endings == {".parquet"}:
        return ParquetTable(path.parent, found)
    raise DatasetError(f"{path.name} names files that end in {', '.join(sorted(endings))}; give .tar or .parquet")


def _alternatives(part: str) -> Iterator[str]:
    span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
    if span and int(span[2]) - int(span[1]) < MOST_FILES:
        yield from (f"{n:0{len(span[1])}d}" for n in range(int(span[1]), int(span[2]) + 1))
    elif part.startswith("{") and part.endswith("}"):
        yield from part[1:-1].split(",")
    else:
        yield part


def _is_visible(path: Path, home: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(home).parts)


def split_of(path: Path, home: Path) -> str:
    """The split of a file: NAME-00000-of-00004.parquet, a usual NAME.parquet or folder; else train."""
    numbered = NUMBERED.fullmatch(path.stem)
    if numbered:
        return numbered["split"]
    names = (path.stem, *reversed(path.relative_to(home).parent.parts))
    return next((name for one in names if (name := one.removeprefix("split=")) in SPLIT_NAMES), "train")


def missing_files(paths: Sequence[Path]) -> str:
    """How many files there are of as many as their names promise (NAME-00000-of-00004); empty if all, or if none does.

    Names of our own shards promise nothing: the second number is of writers.
    """
    found: dict[tuple[Path, str, int], set[str]] = {}
    for path in paths:
        if (name := NUMBERED.fullmatch(path.stem)) and not SHARD.fullmatch(path.stem):
            found.setdefault((path.parent, name["split"], int(name["count"])), set()).add(name["number"])
    short = [(len(numbers), count, split) for (_, split, count), numbers in found.items() if len(numbers) < count]
    return ", ".join(f"{there:,} of the {count:,} files of {split}" for there, count, split in short)


def _of_split(paths: Sequence[Path], home: Path, split: str | None) -> list[Path]:
    splits: dict[str, list[Path]] = {}
    for path in paths:
        splits.setdefault(split_of(path, home), []).append(path)
    return splits[_chosen_split(split, list(splits), str(home))]


def _chosen_split(split: str | None, there: Sequence[str], place: str) -> str:
    """The split that was asked for; where none was, train, or the only one there is."""
    if split in there:
        return str(split)
    if split in (None, "train"):
        if "train" in there:
            return "train"
        if len(there) == 1:
            return there[0]
    has = f"the splits {', '.join(there)}" if len(there) > 1 else f"one split, {there[0]}"
    raise DatasetError(f"{place} has {has}, not {split or 'train'}; choose one with `split`")


class HubTable:
    """Rows that the ``datasets`` library reads; a streamed one has no length and no rows by number."""

    kind = "hub"

    def __init__(self, rows: Any, place: str) -> None:
        self.dataset, self.place = undecoded(rows), place
        self.home = Path(place) if Path(place).is_dir() else Path()
        self.names = list(rows.column_names or ())
        self.identity = f"{'' if Path(place).exists() else f'{place} '}{getattr(rows, '_fingerprint', '')}"

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        with library_errors(f"row {number + 1} cannot be read", "restore it, or leave it out"):
            return self.dataset[number]

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any] | DatasetError]:
        with library_errors(f"{self.place} broke off", "check the data set and repeat the same call"):
            there = [name for name in columns or () if name in self.names]
            yield from self.dataset.select_columns(there) if there else self.dataset


def open_hub(name: str, split: str | None, *, streaming: bool = False, **more: Any) -> Any:
    """A data set of the ``datasets`` library, with the split asked for, train, or the only one there is."""
    datasets = datasets_library()
    name = name.removeprefix("hf://datasets/")
    with library_errors(f"{name} cannot be opened as a data set", "check its name and layout"):
        found = datasets.load_dataset(name, streaming=streaming, **more)
        return found[_chosen_split(split, list(found), name)]


def _saved(path: Path, split: str | None) -> Any:
    with library_errors(f"{path} cannot be opened as a data set", "check its name and layout"):
        found = datasets_library().load_from_disk(str(path))
    if isinstance(found, dict):
        return found[_chosen_split(split, list(found), str(path))]
    _chosen_split(split, [str(found.split or "train")], str(path))
    return found


def _of_arrow(path: Path) -> Any:
    """A file that the library keeps, as in its cache."""
    with library_errors(f"{path} cannot be opened as a data set", "restore it from a copy"):
        return datasets_library().Dataset.from_file(str(path))


def undecoded(rows: Any) -> Any:
    """Pictures stay encoded, so that a broken one breaks only its own row."""
    datasets = datasets_library()
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def card_licence(folder: Path) -> str | None:
    """What the hub's data card says at its head."""
    card, head = folder / "README.md", ""
    with suppress(DatasetError), disk_errors(card, "read", DatasetError), card.open("rb") as stream:
        head = stream.read(20_000).decode(errors="replace")
    block = re.match(r"---\r?\n(.*?)\n---", head, re.DOTALL)
    found = re.search(r"^license: *['\"]?([\w.-]+)", block[1], re.MULTILINE) if block else None
    return found[1] if found else None


@contextmanager
def library_errors(what: str, advice: str) -> Iterator[None]:
    """The datasets library raises many classes, of other libraries too."""
    try:
        yield
    except (IP2PError, GeneratorExit):
        raise
    except Exception as error:
        raise DatasetError(f"{what} ({' '.join(str(error).split())[:300]}); {advice}") from error


def datasets_library() -> Any:
    """The ``datasets`` module; raises ConfigError where it is missing."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "data sets of the hub need the datasets library, which is missing; pip install datasets"
        ) from error
    return datasets
