"""Checkpoints that go by name, on this disk: whether one is here, and bringing it where the hub does not."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from ..files import locked, public_name, sha256_of, size_text, web_stream
from ..progress import progress
from .published import Published

__all__ = ["CACHE_VARIABLE", "A_DAY", "bring", "cache", "download", "fetched", "snapshot"]

CACHE_VARIABLE = "IP2P_CACHE"
A_DAY = 24 * 3600
BLOCK = 1 << 22
NETWORKS = ("unet", "vae", "text_encoder")
SHA256 = re.compile(r"[0-9a-f]{64}")


def cache() -> Path:
    """The folder of copies, ``$IP2P_CACHE`` or ~/.cache/instruct-pix2pix; made if need be."""
    home = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "instruct-pix2pix").expanduser()
    (home / "checkpoints").mkdir(parents=True, exist_ok=True)
    return home / "checkpoints"


def fetched(known: Published) -> Path | None:
    """Where a published checkpoint lies on this disk; None if it was not fetched, or not to its end. No connection."""
    if known.addresses:
        target = _place(known)
        return target if target.is_file() else None
    folder = snapshot(known.repository)
    if folder is None or known.file:
        return folder / known.file if folder and (folder / known.file).is_file() else None
    whole = all(any((folder / name).glob("*.safetensors")) or any((folder / name).glob("*.bin")) for name in NETWORKS)
    return folder if whole else None


def snapshot(repository: str) -> Path | None:
    """The folder of what the hub's client has of a repository; None if that is nothing. No connection.

    The client's own question (2.4) takes a repository of which loading needs a part for one that is not here.
    """
    home = _home(repository)
    with suppress(OSError):
        folder = home / "snapshots" / (home / "refs" / "main").read_text().strip()
        return folder if folder.is_dir() else None
    return None


def _home(repository: str) -> Path:
    """A repository's folder in the hub's cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"))


def bring(repository: str, file: str) -> None:
    """A large file of the hub into its client's cache, where the client finds it; what a broken try brought is kept.

    Some clients (2.4) begin anew. Whatever the hub refuses, the client says itself afterwards.
    Raises CheckpointError for bytes that are not the hub's.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    about = None
    if not isinstance(try_to_load_from_cache(repository, file), str):
        with suppress(Exception):  # the client's own errors, by its version
            about = get_hf_file_metadata(url := hf_hub_url(repository, file))
    if about is None or not about.size or not SHA256.fullmatch(about.etag or ""):  # small ones have no digest
        return
    folder = _home(repository) / "blobs"
    folder.mkdir(parents=True, exist_ok=True)
    blob, part = folder / str(about.etag), folder / f"{about.etag}.part"
    refusal = f"another process has been fetching {file} for a day; end it"
    with locked(part.with_suffix(".lock"), refusal, CheckpointError, wait=A_DAY):
        if blob.exists():
            return
        with part.open("r+b" if part.exists() else "wb") as stream:
            begun = min(stream.seek(0, os.SEEK_END), about.size)
            http_get(url, stream, resume_size=begun, headers=build_hf_headers(), expected_size=about.size)
        if sha256_of(part) != about.etag:
            part.unlink()
            raise CheckpointError(f"{file} of {repository} came damaged; fetch it again")
        part.replace(blob)


def download(known: Published) -> Path:
    """The file that a checkpoint's addresses make, one piece after the other; what a broken try brought is kept.

    Raises CheckpointError where a server does not say how long a piece is, and what the storage raises.
    """
    target = _place(known)
    refusal = f"another process has been fetching {known.name} for a day; end it"
    with locked(target.with_suffix(".lock"), refusal, CheckpointError, wait=A_DAY):
        if not target.is_file():
            part = target.with_suffix(".part")
            _append(known.addresses, part)
            part.replace(target)
    return target


def _place(known: Published) -> Path:
    return cache() / f"{known.name}.ckpt"


def _append(addresses: Sequence[str], part: Path) -> None:
    remote = [storage_of(address) for address in addresses]
    sizes = [size_of(storage, path, address) for (storage, path), address in zip(remote, addresses, strict=True)]
    check_room(sum(sizes), part.parent)
    if part.exists() and part.stat().st_size > sum(sizes):  # of another file
        part.unlink()
    start = 0
    with part.open("ab") as stream, progress(sum(sizes) >> 20, "MiB") as show:
        for (storage, path), size in zip(remote, sizes, strict=True):
            if stream.tell() < start + size:
                done = lambda: show(stream.tell() >> 20, sum(sizes) >> 20)  # noqa: E731
                pour(storage, path, stream, stream.tell() - start, size, done)
            start += size
            if stream.tell() < start:
                break
        stream.flush()
        os.fsync(stream.fileno())
    if part.stat().st_size != sum(sizes):
        raise CheckpointError(f"{part} has {part.stat().st_size:,} of {sum(sizes):,} bytes; fetch it again to go on")


class _Web:
    """Files of the web, by Python's own library: what fsspec has for them keeps in memory whatever a server sends."""

    def isfile(self, path: str) -> bool:
        return True

    def size(self, path: str) -> int | None:
        # Not HEAD, which signed addresses refuse.
        with web_stream(path) as answer:
            said = answer.headers.get("Content-Length", "")
        return int(said) if said.isdecimal() else None

    def ukey(self, path: str) -> str:
        with web_stream(path) as answer:
            return " ".join(str(answer.headers.get(name)) for name in ("ETag", "Last-Modified", "Content-Length"))


def storage_of(address: str) -> tuple[Any, str]:
    """(the storage that an address lies in, its path there)."""
    if address.lower().startswith(("http://", "https://")):
        return _Web(), address
    from fsspec.core import url_to_fs

    storage, path = url_to_fs(address)
    return storage, path


def size_of(storage: Any, path: str, address: str) -> int:
    """How long a file in shared storage is; raises CheckpointError where that is not said."""
    size = storage.size(path)
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"{public_name(address)} does not say how long it is; download it by hand")
    return size


def check_room(size: int, folder: Path) -> None:
    """Raises CheckpointError for more bytes than the disk has left: a server may promise any number."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise CheckpointError(f"it has {size_text(size)}, and {folder} has {size_text(free)} left; make room first")


def pour(storage: Any, path: str, stream: BinaryIO, start: int, size: int, done: Callable[[], Any]) -> None:
    """Write the bytes from ``start`` to ``size`` of a file in shared storage, and no more, whatever is sent.

    ``done`` is called after each block.
    """
    with _remote(storage, path, start) as source:
        left = size - start
        while left > 0 and (block := source.read(min(BLOCK, left))):
            stream.write(block)
            left -= len(block)
            done()


def _remote(storage: Any, path: str, start: int) -> Any:
    if isinstance(storage, _Web):
        return web_stream(path, start)
    source = storage.open(path, "rb", block_size=BLOCK)
    source.seek(start)
    return source
