"""Checkpoints that go by name, on this disk: whether one is here, and bringing it where the hub does not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import CheckpointError
from ..files import locked
from ..progress import progress
from .published import Published

__all__ = ["CACHE_VARIABLE", "A_DAY", "cache", "download", "fetched"]

CACHE_VARIABLE = "IP2P_CACHE"
A_DAY = 24 * 3600
BLOCK = 1 << 22
NETWORKS = ("unet", "vae", "text_encoder")


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
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if known.file:
        found = try_to_load_from_cache(known.repository, known.file)
        return Path(found) if isinstance(found, str) else None
    with suppress(Exception):  # the client's own error, by its version, where there is nothing
        folder = Path(snapshot_download(known.repository, local_files_only=True))
        if all(any((folder / name).glob("*.safetensors")) or any((folder / name).glob("*.bin")) for name in NETWORKS):
            return folder
    return None


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
    from fsspec.core import url_to_fs

    remote = [url_to_fs(address) for address in addresses]
    sizes = [storage.size(path) for storage, path in remote]
    if not all(sizes):
        raise CheckpointError(f"{addresses[sizes.index(None)]} does not say how long it is; download it by hand")
    if part.exists() and part.stat().st_size > sum(sizes):  # of another file
        part.unlink()
    start = 0
    with part.open("ab") as stream, progress(sum(sizes) >> 20, "MiB") as show:
        for (storage, path), size in zip(remote, sizes, strict=True):
            if stream.tell() < start + size:
                with storage.open(path, "rb", block_size=BLOCK) as source:
                    source.seek(stream.tell() - start)
                    while block := source.read(BLOCK):
                        stream.write(block)
                        show(stream.tell() >> 20, sum(sizes) >> 20)
            start += size
        stream.flush()
        os.fsync(stream.fileno())
    if part.stat().st_size != start:
        raise CheckpointError(f"{part} has {part.stat().st_size:,} of {start:,} bytes; fetch it again to go on")
