"""One real ComfyUI for the whole session, with the pack installed as a user installs it.

COMFYUI_PATH=checkout [COMFYUI_PYTHON=python] runs the same tests in any other version; without it
comfy_install.py fetches ComfyUI 0.3.75, or the version that IP2P_COMFYUI names, once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from comfy_install import NoComfyUI, find  # noqa: E402
from comfy_server import ComfyServer  # noqa: E402


@pytest.fixture(scope="session")
def comfyui():
    """A checkout and the Python that runs it."""
    try:
        return find()
    except NoComfyUI as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def in_comfyui(comfyui):
    """Runs one of the scripts beside this file in ComfyUI's folder."""

    def run(script, *arguments):
        command = [comfyui.python, str(Path(__file__).parent / script), *map(str, arguments)]
        subprocess.run(command, cwd=comfyui.path, env={**os.environ, **comfyui.environment}, check=True)

    return run


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """A running ComfyUI; tests share it, as an artist's jobs do."""
    base = tmp_path_factory.mktemp("comfyui")
    shutil.copytree(Path(__file__).parent / "watching_nodes", base / "custom_nodes" / "watching_nodes")
    with ComfyServer(comfyui, base) as running:
        yield running


@pytest.fixture(scope="session")
def object_info(server):
    return server.object_info()
