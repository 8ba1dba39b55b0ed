"""Write the pictures of the help pages, of README.md and of docs/nodes.md, from real runs in ComfyUI's own page.

usage: IP2P_COMFYUI=0.30.0 python scripts/make_pictures.py     (needs playwright and Chromium)
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "comfyui"))

from comfy_install import find  # noqa: E402
from comfy_server import ComfyServer  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

HELP, IMAGES = ROOT / "web" / "docs" / "images", ROOT / "docs" / "images"
SCREEN, MARGIN, SHEET = {"width": 1440, "height": 900}, 14, (720, 450)
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.VueNodes.Enabled": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
OPEN = """async ([name, app]) => {
    const answer = await fetch(`/api/workflow_templates/instruct-pix2pix/${encodeURIComponent(name)}.json`);
    const workflow = await answer.json();
    if (!app) delete workflow.extra.linearMode;
    await window.app.loadGraphData(workflow, true, true, name);
}"""
LOOK_AT = """([id, left, top]) => {
    const node = window.app.graph.getNodeById(id), view = window.app.canvas;
    view.ds.scale = 1;
    view.ds.offset[0] = left - node.pos[0];
    view.ds.offset[1] = top - node.pos[1];
    view.setDirty(true, true);
}"""
IDLE = "!window.app.runningNodeId && !window.app.ui.lastQueueSize"
PLACE = """id => {
    const box = document.querySelector(`[data-node-id="${id}"]`).getBoundingClientRect();
    return {x: box.x, y: box.y, width: box.width, height: box.height};
}"""


def main() -> None:
    HELP.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as base, ComfyServer(find(), Path(base)) as server, sync_playwright() as player:
        server.post("/settings", SETTINGS)
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
        page = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page(viewport=SCREEN)
        page.set_default_timeout(300_000)
        page.goto(server.url)
        page.wait_for_function("window.app && window.app.graph && window.app.extensionManager")
        page.wait_for_timeout(4000)
        files = sorted((ROOT / "workflows").glob("*.json"), key=lambda file: int(file.stem.split()[0]))
        done: set[str] = set()
        sheet = []
        for file in files:
            run(page, server, file.stem)
            picture = shot(page)
            if file == files[0]:
                save(picture, IMAGES / "comfyui.png")
            sheet.append(picture.resize(SHEET, Image.Resampling.LANCZOS))
            for node in json.loads(file.read_text())["nodes"]:
                kind = node["type"]
                if kind.startswith("IP2P_") and kind not in done:
                    done.add(kind)
                    save(portrait(page, node["id"]), HELP / f"{kind}.jpg")
        save(contact_sheet(sheet), IMAGES / "templates.jpg")
        run(page, server, files[0].stem, app=True)
        save(shot(page), IMAGES / "app.jpg")


def run(page: Any, server: ComfyServer, name: str, *, app: bool = False) -> None:
    """Open a template and run it; its pictures are shown."""
    page.evaluate(OPEN, [name, app])
    page.wait_for_timeout(2000)
    before = set(server.get("/history"))
    page.evaluate("window.app.queuePrompt(0, 1)")
    while not (new := set(server.get("/history")) - before):
        page.wait_for_timeout(500)
    if server.wait(new.pop(), fetch=False).status != "success":
        sys.exit(f"{name} failed")
    page.wait_for_function(IDLE)  # a slow page hears of the end later than the server says it
    page.wait_for_timeout(4000)
    sys.stdout.write(f"{name}\n")


def portrait(page: Any, node: int) -> Image.Image:
    """One node, at its natural size."""
    page.evaluate(LOOK_AT, [node, 120, 140])
    page.wait_for_timeout(1200)
    box = page.evaluate(PLACE, node)
    clip = {"x": box["x"] - MARGIN, "y": box["y"] - MARGIN}
    clip |= {
        "width": box["width"] + 2 * MARGIN,
        "height": min(box["height"] + 2 * MARGIN, SCREEN["height"] - clip["y"]),
    }
    return shot(page, clip=clip)


def shot(page: Any, **options: Any) -> Image.Image:
    return Image.open(io.BytesIO(page.screenshot(**options))).convert("RGB")


def contact_sheet(pictures: list[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (2 * SHEET[0], -(-len(pictures) // 2) * SHEET[1]))
    for number, picture in enumerate(pictures):
        whole.paste(picture, (number % 2 * SHEET[0], number // 2 * SHEET[1]))
    return whole


def save(picture: Image.Image, path: Path) -> None:
    picture.save(path, **({"optimize": True} if path.suffix == ".png" else {"quality": 82, "optimize": True}))


if __name__ == "__main__":
    main()
