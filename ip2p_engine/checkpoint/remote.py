"""Checkpoints in shared storage (s3://, gs://, https:// ...), copied to this machine once for each version."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import locked
from ..storage import public_name, reason_of
from .folder import choose_files

__all__ = ["CACHE_VARIABLE", "fetch"]

log = logging.getLogger(__name__)

CACHE_VARIABLE = "IP2P_CACHE"
A_DAY = 24 * 3600


def fetch(url: str, weights: str) -> Path:
    """A local copy of a file, or of what loading needs of a diffusers folder; copied again only if it has changed.

    Copies lie in ``$IP2P_CACHE``, or ~/.cache/instruct-pix2pix. Raises CheckpointError for an address that cannot be
    read.
    """
    name = public_name(url)
    try:
        return _fetch(url, name, weights)
    except CheckpointError:
        raise
    except Exception as error:  # each kind of storage raises its own
        advice = "check the address and your access to it, or give a downloaded file"
        raise CheckpointError(f"{name} cannot be read ({reason_of(error, url)}); {advice}") from error


def _fetch(url: str, name: str, weights: str) -> Path:
    from fsspec.core import url_to_fs

    storage, path = url_to_fs(url)
    alone = Path(name).name if storage.isfile(path) else ""
    files = {alone: path} if alone else _folder(storage, path, weights)
    if not files:
        raise CheckpointError(
            f"{name} is not there or holds no checkpoint; give the address of a file or of a diffusers folder"
        )
    state = "\n".join([name, *(f"{part} {storage.ukey(file)}" for part, file in sorted(files.items()))])
    target = _cache() / hashlib.sha256(state.encode()).hexdigest()[:32]
    refusal = f"another process has been copying {name} for a day; end it"
    with locked(target.with_suffix(".lock"), refusal, CheckpointError, wait=A_DAY):
        if not target.exists():
            log.info("copying %s", name)
            _copy(storage, files, target)
    return target / alone


def _cache() -> Path:
    home = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "instruct-pix2pix").expanduser()
    (home / "checkpoints").mkdir(parents=True, exist_ok=True)
    return home / "checkpoints"


def _folder(storage: Any, path: str, weights: str) -> dict[str, str]:
    """{name within the folder: path} of what loading a diffusers folder needs."""
    found = {file.removeprefix(path.rstrip("/") + "/"): file for file in storage.find(path)}
    return {name: found[name] for name in choose_files(found, weights=weights)}


def _copy(storage: Any, files: dict[str, str], target: Path) -> None:
    """All files, or none."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        for name, file in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            storage.get_file(file, str(temporary / name))
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
