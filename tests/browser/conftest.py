"""The real page in headless Chromium. Screenshots go to the folder in IP2P_SCREENSHOTS, if that is set."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "comfyui"), str(Path(__file__).parent)]

from comfy_install import NoComfyUI, find  # noqa: E402
from comfy_server import ComfyServer  # noqa: E402


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    try:
        comfyui = find()
    except NoComfyUI as reason:
        pytest.skip(str(reason))
    with ComfyServer(comfyui, tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="session")
def browser():
    sync = pytest.importorskip(
        "playwright.sync_api", reason="the page is tested with playwright; pip install playwright"
    )
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("the page is tested in Chromium; install it, or set CHROMIUM to its path")
    with sync.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory):
    folder = Path(os.environ.get("IP2P_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def page(browser, server):
    """ComfyUI's page, loaded once; ``page.complaints`` collects what it says of our pack."""
    opened = browser.new_page(viewport={"width": 1600, "height": 1000})
    opened.set_default_timeout(300_000)
    opened.complaints = []

    def listen(kind, text):
        if kind == "error":
            opened.complaints.append(text)

    opened.on("console", lambda message: listen(message.type, f"{message.text} {message.location.get('url', '')}"))
    opened.on("pageerror", lambda error: listen("error", str(error)))
    server.post("/settings", {"Comfy.TutorialCompleted": True})  # else the page begins with its own templates
    opened.goto(server.url)
    opened.wait_for_function("window.app && window.app.graph && window.app.extensionManager")
    opened.wait_for_timeout(3000)
    yield opened
    opened.close()
