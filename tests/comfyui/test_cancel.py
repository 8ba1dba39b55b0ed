"""Cancel in the nodes that wait or go over many pairs; its seconds are printed."""

from __future__ import annotations

import socket
import sys
import threading
import time
import uuid

import pytest
from comfy_events import Listener
from comfy_prompts import node
from comfy_server import ComfyServer

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
WAITS, WORKS = 2.0, 10.0  # seconds: where a node waits, and where it works beside whatever else runs on this machine
MANY = 600


@pytest.fixture(scope="module")
def silent():
    """A caption server that takes a question and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        held = []

        def take():
            while True:
                try:
                    held.append(listening.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


@pytest.fixture(scope="module")
def server(comfyui, silent, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("IP2P_CAPTIONS_URL", silent)
        patched.setenv("IP2P_CAPTIONS_MODEL", "nobody")
        with ComfyServer(comfyui, tmp_path_factory.mktemp("cancel")) as running:
            yield running


def scenes(count):
    return node("IP2P_LoadDataset", name="embedded scenes", count=count, seed=0, preview=1)


def prompts():
    """By node, a graph that keeps it busy for long."""
    options = {
        "clip_model": "embedded",
        "keep": 4,
        "min_sim_image": 0.0,
        "min_sim_direction": 0.0,
        "min_sim_0": 0.0,
        "min_sim_1": 0.0,
    }
    return {
        "load": {"load": scenes(100_000), "end": node("PreviewImage", images=["load", 1])},
        "filter": {
            "pairs": scenes(MANY),
            "filter": node("IP2P_ClipFilter", pairs=["pairs", 0], **options),
            "end": node("PreviewAny", source=["filter", 3]),
        },
        "save": {
            "pairs": scenes(MANY),
            "save": node("IP2P_SaveDataset", pairs=["pairs", 0], name="many"),
            "end": node("PreviewAny", source=["save", 1]),
        },
        "captions": {
            "captions": node("IP2P_Captions", captions="a red heart", source="server", count=4, seed=0),
            "end": node("PreviewAny", source=["captions", 0]),
        },
    }


@pytest.mark.parametrize("name", prompts())
def test_cancel_is_heard_at_once(server, name):
    client = uuid.uuid4().hex
    with Listener(server.port, client) as listener:
        server.submit(prompts()[name], client=client)
        for kind, data in listener.events():
            assert kind not in ("execution_error", "execution_success"), data
            working = kind == "progress" and data["node"] == name
            if working or (name == "captions" and kind == "executing" and data["node"] == name):
                break
        if name == "captions":
            time.sleep(1)  # until it waits
        server.post("/interrupt", {})
        pressed = time.monotonic()
        end = next(
            kind
            for kind, _ in listener.events()
            if kind in ("execution_success", "execution_error", "execution_interrupted")
        )
    taken = time.monotonic() - pressed
    sys.stdout.write(f"{name}: {taken:.2f} s\n")
    assert end == "execution_interrupted" and taken < (WAITS if name == "captions" else WORKS)
