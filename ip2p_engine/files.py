"""Files that are whole or absent, whatever kills the process: how data sets and captions reach the disk."""

from __future__ import annotations

import csv
import io
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock, Timeout

from .errors import IP2PError

__all__ = [
    "AppendLog",
    "NO_JSON",
    "csv_rows",
    "disk_errors",
    "is_locked",
    "is_url",
    "json_lines",
    "locked",
    "public_name",
    "read_json",
    "reason_of",
    "text_lines",
    "whole_file",
    "write_json",
]

TEMPORARY = ".part"
# What json.loads raises; brackets within brackets end in the second.
NO_JSON = (ValueError, RecursionError)
Error = type[IP2PError]


@contextmanager
def disk_errors(
    path: Path, verb: str, error: Error, advice: str = "check the path and its permissions"
) -> Iterator[None]:
    """The operating system's errors as one sentence of the given class."""
    try:
        yield
    except OSError as cause:
        reason = cause.strerror or str(cause)
        raise error(f"{path} cannot be {verb} ({reason}); {advice}") from cause


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content appears under ``path`` at once and for good when the block ends, or not at all.

    Written to a hidden name beside it, fsynced, renamed, and the folder fsynced. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders, and its renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole; raises OSError."""
    with whole_file(path) as stream:
        stream.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path, error: Error) -> Any:
    """The content of a JSON file; raises the given class for a file that is missing, unreadable or no JSON."""
    with disk_errors(path, "read", error):
        text = path.read_bytes()
    try:
        return json.loads(text)
    except NO_JSON as cause:
        raise error(f"{path} is no JSON ({cause}); restore it from a copy or make it again") from cause


@contextmanager
def locked(path: Path, refusal: str, error: Error, *, wait: float = 0) -> Iterator[None]:
    """Hold the lock file ``path``; raises ``error(refusal)`` if another writer holds it for ``wait`` seconds more.

    The operating system holds the lock for the process, so a killed one's is free again without any clean-up.
    """
    lock = FileLock(path)
    with disk_errors(path, "locked", error):
        try:
            lock.acquire(timeout=wait)
        except Timeout as cause:
            raise error(refusal) from cause
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock file."""
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


class AppendLog:
    """A JSON Lines file that grows by whole lines, each on the disk before ``append`` returns."""

    def __init__(self, path: Path, error: Error) -> None:
        """Opens or makes the file, and cuts off a last line that a killed writer left half done."""
        self.path, self._error = path, error
        with self._refusing():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as stream:
                self._size = _whole_lines(stream)
                stream.truncate(self._size)

    def append(self, *rows: Any) -> None:
        """Write rows as lines and fsync; on any error the file is as it was before."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # Halves of letters (lone surrogates) become JSON's escapes for them.
        data = "".join(lines).encode(errors="backslashreplace")
        # Unbuffered, because a buffer would write what failed once more when the stream is closed.
        with self._refusing(), self.path.open("r+b", buffering=0) as stream:
            stream.seek(self._size)
            try:
                _write_all(stream, data)
                os.fsync(stream.fileno())
            except BaseException:
                stream.truncate(self._size)
                raise
            self._size += len(data)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return json_lines(self.path, self._error)

    def _refusing(self) -> Any:
        advice = "free some space or check the permissions and run the same command again: what was written is whole"
        return disk_errors(self.path, "written", self._error, advice)


def json_lines(path: Path, error: Error, *, growing: bool = False) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, blank lines left out; raises the given class, with the line's number.

    ``growing``: another process may be writing it, so a last line without its end is left out.
    """
    for number, line in enumerate(text_lines(path, error, growing=growing), start=1):
        if not line.strip() or (growing and not line.endswith("\n")):
            continue
        try:
            row = json.loads(line)
        except NO_JSON as cause:
            raise error(f"{path}, line {number}, is no JSON ({cause}); correct or remove the line") from cause
        if not isinstance(row, dict):
            raise error(f"{path}, line {number}, is {line.strip()[:60]!r}; give one JSON object a line")
        yield row


def csv_rows(path: Path, error: Error) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file by the names in its first line; raises the given class, with the line's number."""
    rows = csv.DictReader(text_lines(path, error))
    try:
        yield from rows
    except csv.Error as cause:
        raise error(f"{path}, line {rows.reader.line_num}, is no CSV ({cause}); correct or remove it") from cause


def text_lines(path: Path, error: Error, *, growing: bool = False) -> Iterator[str]:
    """The lines of a UTF-8 file, without a byte order mark; raises the given class for anything else."""
    # An unfinished line may end within a letter.
    faulty = "replace" if growing else "strict"
    with disk_errors(path, "read", error), path.open(encoding="utf-8-sig", errors=faulty) as lines:
        try:
            yield from lines
        except UnicodeDecodeError as cause:
            raise error(f"{path} is no UTF-8 text ({cause.reason}); save it as UTF-8") from cause


def _write_all(stream: io.FileIO, data: bytes) -> None:
    """A raw write may take only part, as on a disk that is nearly full."""
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def _whole_lines(stream: BinaryIO) -> int:
    """The length up to the last line's end."""
    end = stream.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        stream.seek(start)
        cut = stream.read(end - start).rfind(b"\n")
        if cut >= 0:
            return start + cut + 1
        end = start
    return 0


def is_url(source: str) -> bool:
    """Whether something is named by an address other than the hub's."""
    return "://" in source and not source.startswith("hf://")


def public_name(source: str | Path) -> str:
    """A source as pictures and manifests may name it: an address without its user, password and signed query."""
    text = str(source)
    if not is_url(text):
        return text
    parts = urlsplit(text)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def reason_of(error: Exception, *urls: str | Path) -> str:
    """The first line of an error of whatever class a kind of storage raises, with the addresses made public."""
    # Not cut short: of half an address the secret would stay.
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    for url in map(str, urls):
        text = text.replace(url, public_name(url))
    return text
