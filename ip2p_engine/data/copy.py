"""Data sets to shared storage and back (s3://, gs:// ...), file by file, also while a writer is at work on them."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DatasetError, IP2PError
from ..files import check_file, is_locked, is_url, public_name, reason_of, sweep, whole_file
from ..hooks import Hooks
from .ledger import FOLDER as LEDGER
from .store import DATA, MANIFEST

__all__ = ["CopyReport", "copy_dataset"]

PART = re.compile(rf"(?:{DATA}/train-|{LEDGER}/)(?P<part>\d{{5}}-of-(?P<count>\d{{5}}))(?:-\d{{6}}\.parquet|\.jsonl)")
CHUNK = 2**23


@dataclass(frozen=True, kw_only=True)
class CopyReport:
    """What a copy did."""

    files: int
    """Copied by this call."""
    bytes: int
    present: int


def copy_dataset(source: Path | str, target: Path | str, *, hooks: Hooks | None = None) -> CopyReport:
    """Bring a data set to where it is not, or up to date where it is; folders and fsspec's addresses, either way.

    Each file appears whole. Ledgers are taken first and brought last, so that a copy never names a pair that it has
    not, and a run goes on from a copy as from a killed writer's folder. The parts of several machines may meet in one
    target. Raises DatasetError for a target with another data set or with more than the source, and if storage refuses.
    """
    hooks = hooks or Hooks()
    with _storage_errors(source, target):
        origin, goal = _Place(source), _Place(target)
        goal.sweep()
        found, there = origin.sizes(), goal.sizes()
        ledgers = {name: _whole_lines(origin.read(name)) for name in found if name.startswith(LEDGER)}
        # Listed again: what the ledgers name is there by now.
        found = origin.sizes() | {name: len(data) for name, data in ledgers.items()}
        if MANIFEST not in found:
            raise DatasetError(f"{origin.name} holds no data set of ours ({MANIFEST} is missing); import it first")
        _refuse_other(origin, goal, found, there)
        names = _to_copy(found, there)
        for number, name in enumerate(names):
            hooks.check_stop(f"stopped after {number} of {len(names)} files; what was copied stays")
            with goal.writing(name) as stream, origin.reading(name, ledgers) as content:
                shutil.copyfileobj(content, stream, CHUNK)
            hooks.progress(number + 1, len(names))
    return CopyReport(files=len(names), bytes=sum(found[name] for name in names), present=len(found) - len(names))


class _Place:
    """A folder, here or in shared storage."""

    def __init__(self, address: Path | str) -> None:
        from fsspec.core import url_to_fs

        self.name, self._here = public_name(address), None if is_url(str(address)) else Path(address)
        self._storage, root = url_to_fs(str(address))
        self._root = root.rstrip("/")

    def sizes(self) -> dict[str, int]:
        """{name within the folder: bytes} of the files that make up a data set; empty where there is no folder."""
        self._storage.invalidate_cache()
        if not self._storage.exists(self._root):
            return {}
        found = self._storage.find(self._root, detail=True)
        names = {path.removeprefix(self._root + "/"): row["size"] for path, row in found.items()}
        parts = {name: size for name, size in names.items() if name == MANIFEST or PART.fullmatch(name)}
        if self._here is not None:
            for name in parts:
                check_file(self._here / name, DatasetError)
        return parts

    def read(self, name: str) -> bytes:
        return self._storage.cat_file(f"{self._root}/{name}")

    def reading(self, name: str, known: dict[str, bytes]) -> Any:
        return io.BytesIO(known[name]) if name in known else self._storage.open(f"{self._root}/{name}", "rb")

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A stream whose content appears at once when the block ends, or not at all."""
        if self._here is not None:
            (self._here / name).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self._here / name) as stream:
                yield stream
            return
        self._storage.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
        with self._storage.transaction, self._storage.open(f"{self._root}/{name}", "wb") as stream:
            yield stream

    def sweep(self) -> None:
        """Remove what a killed copy left of a file that it had finished."""
        if self._here is not None:
            sweep(self._here)

    def writers(self) -> list[str]:
        """The parts that a living process of this machine is writing."""
        locks = [] if self._here is None else self._here.glob(".*-of-*.lock")
        return [lock.stem.removeprefix(".") for lock in locks if is_locked(lock)]


def _refuse_other(origin: _Place, goal: _Place, found: dict[str, int], there: dict[str, int]) -> None:
    """Nothing that only the target has may be lost."""
    if writers := goal.writers():
        raise DatasetError(f"{goal.name} is being written (part {writers[0]}); wait for its writer")
    if not there:
        return
    if MANIFEST not in there or _origin(origin) != _origin(goal):
        other = f"{goal.name} holds another data set than {origin.name}, or one that was cut into other batches"
        raise DatasetError(f"{other}; copy to an empty place")
    mine, theirs = _parts(found), _parts(there)
    if counts := {part[-5:] for part in theirs} - {part[-5:] for part in mine}:
        raise DatasetError(f"{goal.name} is cut into {int(min(counts))} parts, and {origin.name} otherwise; see both")
    ahead = [name for name, size in there.items() if _part(name) in mine and size > found.get(name, -1)]
    if ahead:
        raise DatasetError(f"{goal.name} has more than {origin.name}, such as {min(ahead)}; copy the other way")


def _origin(place: _Place) -> dict[str, Any]:
    """What made the pairs, and how the work was cut; other versions of the software may go on with it."""
    manifest = json.loads(place.read(MANIFEST))
    return {name: value for name, value in manifest.items() if name != "versions"}


def _part(name: str) -> str:
    """Such as 00000-of-00004; empty for the manifest."""
    found = PART.fullmatch(name)
    return found["part"] if found else ""


def _parts(names: dict[str, int]) -> set[str]:
    return set(map(_part, names)) - {""}


def _to_copy(found: dict[str, int], there: dict[str, int]) -> list[str]:
    """The manifest where there is none, then shards, then ledgers; a shard before a part's last never changes."""
    shards = sorted(name for name in found if name.startswith(DATA))
    last = {_part(name): name for name in shards}
    copied = [name for name in shards if found[name] != there.get(name) or name in last.values()]
    manifest = [] if MANIFEST in there else [MANIFEST]
    return [*manifest, *copied, *sorted(name for name in found if name.startswith(LEDGER))]


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


@contextmanager
def _storage_errors(source: Path | str, target: Path | str) -> Iterator[None]:
    try:
        yield
    except IP2PError:
        raise
    except Exception as error:  # each kind of storage raises its own
        places = f"{public_name(source)} cannot be copied to {public_name(target)}"
        reason = reason_of(error, source, target)
        raise DatasetError(f"{places} ({reason}); what has arrived is whole, and the same call goes on") from error
