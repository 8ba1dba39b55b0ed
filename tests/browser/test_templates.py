"""Each template as a laptop shows it: whole, readable, nothing on top of another, in both renderings of the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from contrast import ELEMENTS, contrast, faint, texts

pytestmark = [pytest.mark.comfy, pytest.mark.browser, pytest.mark.slow]
PAGES = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))
SCREENS = [(1440, 900), (1920, 1080)]
SMALLEST = 0.62  # the page draws no text below about 0.6
OPEN = """async (name) => {
    const answer = await fetch(`/api/workflow_templates/instruct-pix2pix/${encodeURIComponent(name)}.json`);
    const workflow = await answer.json();
    delete workflow.extra.linearMode;  // as its nodes, not as an app
    await window.app.loadGraphData(workflow, true, true, name);
}"""
FIT = "window.app.extensionManager.command.execute('Comfy.Canvas.FitView')"
# In Nodes 2.0 nodes are elements of the page, and as high as their content.
RECTANGLES = """() => window.app.graph.nodes.map(node => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`);
    if (!element) return [node.title, ...node.getBounding()];
    const box = element.getBoundingClientRect();
    return [node.title, box.x, box.y, box.width, box.height];
})"""


def test_contrast_is_wcag_s():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)


@pytest.fixture(scope="module", params=["classic", "nodes-2"])
def rendering(request, browser, server):
    """A page in one of the two renderings; on 0.3.75's page Nodes 2.0 is an experiment that spreads every graph."""
    version = server.get("/system_stats")["system"]["comfyui_version"]
    if request.param == "nodes-2" and tuple(map(int, version.split(".")[:2])) < (0, 16):
        pytest.skip(f"Nodes 2.0 is an experiment in ComfyUI {version}")
    server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": request.param == "nodes-2"})
    opened = browser.new_page(viewport={"width": 1440, "height": 900})
    opened.set_default_timeout(300_000)
    opened.goto(server.url)
    opened.wait_for_function("window.app && window.app.graph && window.app.extensionManager")
    opened.wait_for_timeout(3000)
    yield request.param, opened
    opened.close()
    server.post("/settings", {"Comfy.VueNodes.Enabled": False})


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_a_template_fits_and_can_be_read(rendering, screenshots, file):
    name, page = rendering
    for width, height in SCREENS:
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate(OPEN, file.stem)
        page.wait_for_timeout(1500)
        page.screenshot(path=screenshots / f"{file.stem} {width} {name}.png")
        if name == "nodes-2":  # whole as it opens; the classic canvas tells no places on the screen
            seen = page.evaluate(RECTANGLES)
            assert [one for one in seen if one[1] + one[3] > width or one[2] + one[4] > height] == []
        page.evaluate(FIT)
        page.wait_for_timeout(1000)
        assert page.evaluate("window.app.canvas.ds.scale") >= SMALLEST
        assert overlaps(page.evaluate(RECTANGLES)) == []
        assert len(page.evaluate(ELEMENTS)) > 3 and len(texts(page, name)) > 50
        assert faint(page, name) == []


def overlaps(rectangles):
    """Pairs of titles whose rectangles share more than a border."""
    found = []
    for number, (title, x, y, width, height) in enumerate(rectangles):
        for other, left, top, broad, high in rectangles[:number]:
            if min(x + width, left + broad) - max(x, left) > 1 and min(y + height, top + high) - max(y, top) > 1:
                found.append((other, title))
    return found


def test_overlaps_are_seen():
    one, beside, upon = ("a", 0, 0, 10, 10), ("b", 10, 0, 10, 10), ("c", 5, 5, 10, 10)
    assert overlaps([one, beside]) == [] and overlaps([one, upon]) == [("a", "c")]
