"""One real ComfyUI for the whole session, with the pack installed as a user installs it.

COMFYUI_PATH=checkout [COMFYUI_PYTHON=python] runs the same tests in any other version.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from comfy_server import ComfyServer  # noqa: E402


@pytest.fixture(scope="session")
def comfyui_path():
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("set COMFYUI_PATH to a ComfyUI checkout")
    return Path(path)


@pytest.fixture(scope="session")
def comfyui_python():
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


@pytest.fixture(scope="session")
def server(comfyui_path, comfyui_python, tmp_path_factory):
    """A running ComfyUI; tests share it, as an artist's jobs do."""
    base = tmp_path_factory.mktemp("comfyui")
    shutil.copytree(Path(__file__).parent / "watching_nodes", base / "custom_nodes" / "watching_nodes")
    with ComfyServer(comfyui_path, comfyui_python, base) as running:
        yield running


@pytest.fixture(scope="session")
def object_info(server):
    return server.object_info()
