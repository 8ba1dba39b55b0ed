"""Where training pairs come from: our store, the original layout, or whatever the ``datasets`` library opens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..captions.edits import in_test_split
from ..data.layouts import is_original, listing, named
from ..data.store import PairRecord, PairStore
from ..errors import ConfigError, DatasetError, IP2PError
from ..files import digest_of_files, read_json
from ..images import Size, open_image, upright_size
from .config import TrainConfig

__all__ = [
    "Chosen",
    "Example",
    "Pair",
    "Rows",
    "Stream",
    "measured_rows",
    "name_of",
    "open_pair",
    "open_source",
    "size_of",
]

SAME_ASPECT = 0.02
STORE_COLUMNS = ("original_image", "edit_prompt", "edited_image")
BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tar": "webdataset"}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One pair as it is stored: pictures encoded or decoded, not yet looked at."""

    name: str
    original: Any
    instruction: Any
    edited: Any


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One pair that can be trained on."""

    name: str
    original: Image.Image
    instruction: str
    edited: Image.Image


class Rows(Protocol):
    """Pairs that are read by number."""

    identity: str
    """What the rows are: equal for equal data, wherever it lies."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Example:
        """Raises DatasetError, naming the row, where it cannot be read."""
        ...


class Stream(Protocol):
    """Pairs that are read in their own order, shuffled within a buffer."""

    identity: str

    def epoch(self, seed: int) -> Iterator[Example]: ...


def open_source(data: str | Path | Sequence[PairRecord] | Rows, config: TrainConfig) -> Any:
    """Open a store, an original data set, or a hub data set, folder or file with the config's three columns.

    Pairs may also be given as a sequence. Returns Rows, or with ``config.streaming`` a Stream. Raises DatasetError
    where there is nothing to train on, and ConfigError if a test split is to be held out that nothing names, or what
    is read by number is to be streamed.
    """
    source = _opened(data, config)
    if config.streaming and hasattr(source, "__len__"):
        raise ConfigError(f"{name_of(data)} is read by row number and cannot be streamed; leave streaming out")
    if config.hold_out_test:
        source = _held_out(source, data)
    if hasattr(source, "__len__") and not len(source):
        raise DatasetError(f"{name_of(data)} holds no pair; give a data set that does")
    return source


def name_of(data: Any) -> str:
    """What to call a data set in a sentence."""
    return str(data)[:500] if isinstance(data, str | Path) else f"the {type(data).__name__} of pairs"


def measured_rows(source: Rows | Stream) -> list[int]:
    """Rows of the test split, on which ``ip2p evaluate`` measures; none where there are no captions to tell."""
    if not isinstance(source, _StoreRows):
        return []
    return [row for row, caption in enumerate(source.captions()) if in_test_split(caption)]


def _held_out(source: Rows | Stream, data: Any) -> Rows:
    captions = source.captions() if isinstance(source, _StoreRows) else []
    if not isinstance(source, _StoreRows) or not any(captions):
        reason = f"hold_out_test goes by the captions of a store, and {name_of(data)} has none"
        raise ConfigError(f"{reason}; bring it in with ip2p dataset import, or leave the option out")
    return Chosen(source, [row for row, caption in enumerate(captions) if not in_test_split(caption)])


def open_pair(example: Example) -> Pair:
    """Decode and check an example; raises DatasetError, naming it, for what cannot be trained on."""
    if not isinstance(example.instruction, str):
        raise DatasetError(f"{example.name}: the instruction is {type(example.instruction).__name__}; give a text")
    if not example.instruction.strip():
        raise DatasetError(f"{example.name}: the instruction is empty; give a text")
    try:
        original, edited = open_image(_encoded(example.original)), open_image(_encoded(example.edited))
    except IP2PError as error:
        raise DatasetError(f"{example.name}: {error}") from error
    aspects = [picture.width / picture.height for picture in (original, edited)]
    if abs(aspects[0] / aspects[1] - 1) > SAME_ASPECT:
        sizes = f"{original.width} x {original.height} and {edited.width} x {edited.height}"
        raise DatasetError(f"{example.name}: the pictures are {sizes}; give pairs of one aspect")
    return Pair(name=example.name, original=original, instruction=example.instruction, edited=edited)


def size_of(example: Example) -> Size:
    """Of the picture before the edit, by its header; raises DatasetError, naming the example."""
    try:
        return upright_size(_encoded(example.original))
    except IP2PError as error:
        raise DatasetError(f"{example.name}: {error}") from error


def _opened(data: Any, config: TrainConfig) -> Any:
    if isinstance(data, PairStore):
        data = data.folder
    if not isinstance(data, str | Path):
        return data if hasattr(data, "identity") else _StoreRows(data, _identity(data))
    path = Path(data).expanduser()
    if path.is_dir() and is_original(path):
        return _OriginalRows(path)
    if config.columns == STORE_COLUMNS and _is_store(path):
        store = PairStore(path)
        return _StoreRows(store, repr([(shard.name, shard.stat().st_size) for shard in store.shards]))
    return _from_hub(path if path.exists() else str(data), config)


def _is_store(path: Path) -> bool:
    """Parquet at the store's place, with the store's columns; or none yet, and the store's manifest."""
    if not path.is_dir():
        return False
    store = PairStore(path)
    if not store.shards:
        return _has_manifest(store)
    import pyarrow.parquet

    return set(STORE_COLUMNS) <= set(pyarrow.parquet.read_schema(store.shards[0]).names)


def _has_manifest(store: PairStore) -> bool:
    try:
        return bool(store.manifest)
    except DatasetError:
        return False


def _identity(pairs: Sequence[PairRecord]) -> str:
    content = blake2b(digest_size=16)
    for pair in pairs:
        content.update(repr((pair.key, pair.edit_prompt)).encode() + pair.original_image + pair.edited_image)
    return content.hexdigest()


class _StoreRows:
    def __init__(self, pairs: Sequence[PairRecord], identity: str) -> None:
        self._pairs, self.identity = pairs, identity

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, row: int) -> Example:
        pair = self._pairs[row]
        name = f"pair {pair.key or row}"
        return Example(name=name, original=pair.original_image, instruction=pair.edit_prompt, edited=pair.edited_image)

    def captions(self) -> list[str]:
        """Of the pictures before the edit; empty where unknown."""
        if isinstance(self._pairs, PairStore):
            return [caption or "" for caption in self._pairs.columns("original_prompt")["original_prompt"]]
        return [pair.original_prompt for pair in self._pairs]


class Chosen:
    """Some of the rows, read when they are asked for."""

    def __init__(self, rows: Rows, numbers: Sequence[int]) -> None:
        self._rows, self._numbers = rows, numbers
        self.identity = f"{len(numbers)} rows of {rows.identity}"

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, row: int) -> Example:
        return self._rows[self._numbers[row]]


class _OriginalRows:
    """The authors' folders; each pair of a caption is a row of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places = [(name, seed) for name, seeds in listing(folder) for seed in seeds]
        files = [f"{name}/prompt.json" for name in dict.fromkeys(name for name, _ in self._places)]
        files += [f"{name}/{seed}_1.jpg" for name, seed in self._places]
        self.identity = f"{len(self._places)} pairs {digest_of_files(folder, files)}"

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> Example:
        name, seed = self._places[row]
        place = self._folder / name
        instruction = named(read_json(place / "prompt.json", DatasetError), "edit_prompt", place / "prompt.json")
        before, after = (str(place / f"{seed}_{n}.jpg") for n in (0, 1))
        return Example(name=f"{name}/{seed}", original=before, instruction=instruction, edited=after)


def _from_hub(data: Path | str, config: TrainConfig) -> Any:
    datasets = _datasets()
    options: dict[str, Any] = {"split": config.split, "streaming": config.streaming}
    with _library_errors(f"{data} cannot be opened as a data set", "check its name and layout"):
        if isinstance(data, Path) and data.is_file():
            kind = BUILDERS.get(data.suffix.lower())
            if kind is None:
                raise DatasetError(f"{data} ends in {data.suffix!r}; give {', '.join(BUILDERS)} or a folder")
            found = datasets.load_dataset(kind, data_files=str(data), **options)
        elif isinstance(data, Path) and (data / "state.json").is_file():
            found = datasets.load_from_disk(str(data))
        else:
            found = datasets.load_dataset(str(data), **options)
    _check_columns(found, data, config)
    identity = _hub_identity(found, data)
    if config.streaming:
        found = found.to_iterable_dataset() if hasattr(found, "to_iterable_dataset") else found
    home = data.parent if isinstance(data, Path) and data.is_file() else Path(str(data))
    rows = _HubStream if config.streaming else _HubRows
    return rows(_undecoded(found, datasets), config, home, identity)


@contextmanager
def _library_errors(what: str, advice: str) -> Iterator[None]:
    """The datasets library raises many classes, of other libraries too."""
    try:
        yield
    except IP2PError:
        raise
    except Exception as error:
        raise DatasetError(f"{what} ({' '.join(str(error).split())[:300]}); {advice}") from error


def _hub_identity(found: Any, data: Path | str) -> str:
    """Of files what is in them; the library's fingerprint tells what was saved by it or came from the hub."""
    if isinstance(data, Path) and not (data / "state.json").is_file():
        if data.is_file():
            return f"{data.name} {digest_of_files(data.parent, [data.name])}"
        inside = (path.relative_to(data) for path in data.rglob("*") if path.is_file())
        names = sorted(path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts))
        return f"{len(names)} files {digest_of_files(data, names)}"
    name = "" if isinstance(data, Path) else f"{data} "
    return f"{name}{getattr(found, '_fingerprint', '')}"


def _check_columns(found: Any, data: Any, config: TrainConfig) -> None:
    names = found.column_names
    for column in config.columns:
        if names is not None and not {column, column.partition(".")[0]} & set(names):
            raise DatasetError(f"{data} has the columns {', '.join(names)} and no {column!r}; name three with columns")


def _undecoded(found: Any, datasets: Any) -> Any:
    """Pictures stay encoded, so that a broken one breaks only its own row."""
    for name, feature in (found.features or {}).items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
    return found


class _HubRows:
    def __init__(self, rows: Any, config: TrainConfig, home: Path, identity: str) -> None:
        self._rows, self._columns, self._home, self.identity = rows, config.columns, home, identity

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Example:
        with _library_errors(f"row {row} cannot be read", "restore it, or leave it out"):
            return _example(self._rows[row], self._columns, self._home, f"row {row}")


class _HubStream:
    def __init__(self, rows: Any, config: TrainConfig, home: Path, identity: str) -> None:
        self._rows, self._columns, self._home, self.identity = rows, config.columns, home, identity
        self._buffer = config.shuffle_buffer

    def epoch(self, seed: int) -> Iterator[Example]:
        shuffled = self._rows.shuffle(seed=seed, buffer_size=self._buffer)
        with _library_errors("the stream broke off", "check the data set and run the same command again"):
            # Plain iteration would give each of DataLoader's workers other shards; iter() gives all of them everything.
            for number, batch in enumerate(shuffled.iter(batch_size=1)):
                row = {name: values[0] for name, values in batch.items()}
                yield _example(row, self._columns, self._home, f"row {number} of the stream")


def _example(row: dict[str, Any], columns: tuple[str, str, str], home: Path, name: str) -> Example:
    original, instruction, edited = (_cell(row, column) for column in columns)
    return Example(name=name, original=_placed(original, home), instruction=instruction, edited=_placed(edited, home))


def _cell(row: Any, column: str) -> Any:
    value: Any = row
    for part in [column] if column in row else column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _placed(picture: Any, home: Path) -> Any:
    """A path beside the data set as a path from here; all else as it is."""
    try:
        return str(home / picture) if isinstance(picture, str) and (home / picture).is_file() else picture
    except OSError:  # no name that a file could have
        return picture


def _encoded(value: Any) -> Any:
    """What open_image takes, of the forms that data sets have pictures in."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise DatasetError("a picture is missing")
    return value


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "foreign data sets need the datasets library, which is missing; pip install datasets"
        ) from error
    return datasets
