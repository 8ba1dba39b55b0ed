"""Each template in the real page: opens without missing nodes, posts what its twin says, runs, shows its picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_templates import OPEN, RECTANGLES, overlaps

pytestmark = [pytest.mark.comfy, pytest.mark.browser, pytest.mark.slow]
FOLDER = Path(__file__).parents[2] / "workflows"
PAGES = sorted(FOLDER.glob("*.json"))
MISSING = (
    "window.app.graph.nodes.filter(node => !(node.type in LiteGraph.registered_node_types)).map(node => node.type)"
)
POSTED = "async () => (await window.app.graphToPrompt()).output"
SHOWN = "window.app.graph.nodes.some(node => node.imgs && node.imgs.length && node.imgs[0].naturalWidth > 0)"


def ours(page):
    """Complaints that name the pack, but for what the page itself tries in vain.

    It asks the registry about every pack in a workflow, and for each page of help in the language of the browser first.
    """
    named = [text for text in page.complaints if "IP2P" in text or "instruct-pix2pix" in text]
    return [text for text in named if "https://api.comfy.org" not in text and not text.endswith("/en.md")]


def open_template(page, name):
    page.complaints.clear()
    page.evaluate(OPEN, name)
    page.wait_for_timeout(2000)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_a_template_opens_and_runs(page, server, screenshots, file):
    open_template(page, file.stem)
    assert page.evaluate(MISSING) == []
    twin = json.loads((FOLDER / "api" / file.name).read_text())
    assert known_inputs(page.evaluate(POSTED), twin) == {number: node["inputs"] for number, node in twin.items()}
    page.screenshot(path=screenshots / f"{file.stem} opened.png")
    page.evaluate(
        "window.app.extensionManager.command.execute('Comfy.Canvas.FitView')"
    )  # what is not seen is not drawn
    before = set(server.get("/history"))
    press_run(page)
    page.wait_for_timeout(1000)
    job = wait_for_job(page, server, before)
    run = server.wait(job, fetch=False)
    assert run.status == "success", run.message
    page.wait_for_function(SHOWN)
    page.wait_for_timeout(1500)
    page.screenshot(path=screenshots / f"{file.stem} done.png")
    assert overlaps(page.evaluate(RECTANGLES)) == []  # with their pictures, too
    assert ours(page) == []


def known_inputs(posted, twin):
    """What the page posts, without the widgets that only the page knows, such as the text of a Preview Any."""
    assert {number: node["class_type"] for number, node in posted.items()} == {
        number: node["class_type"] for number, node in twin.items()
    }
    return {
        number: {name: value for name, value in node["inputs"].items() if name in twin[number]["inputs"]}
        for number, node in posted.items()
    }


def press_run(page):
    """The button of the queue, wherever this version of the page has it."""
    page.locator('[data-testid="queue-button"] button, button:has-text("Run")').first.click()


def wait_for_job(page, server, before):
    for _ in range(120):
        queue = server.get("/queue")
        jobs = [entry[1] for entry in queue["queue_running"] + queue["queue_pending"]]
        new = [job for job in [*jobs, *server.get("/history")] if job not in before]
        if new:
            return new[0]
        page.wait_for_timeout(500)
    raise TimeoutError("pressing Run queued nothing")


APP = """async (name) => {
    const answer = await fetch(`/api/workflow_templates/instruct-pix2pix/${encodeURIComponent(name)}.json`);
    await window.app.loadGraphData(await answer.json(), true, true, name);
}"""


def test_the_first_template_opens_as_an_app(page, screenshots):
    page.evaluate(APP, PAGES[0].stem)
    page.wait_for_timeout(2500)
    if not page.get_by_text("Number of runs").count():
        pytest.skip("this page has no app view")
    page.screenshot(path=screenshots / "app.png")
    for label in ("instruction", "follow_instruction", "keep_picture", "seed"):
        assert any(one.is_visible() for one in page.get_by_text(label, exact=True).all()), label
    page.evaluate(OPEN, PAGES[0].stem)  # the tests after this one want nodes


def test_the_blueprint_edits(page, server):
    """As the page puts it into a graph: a node around three."""
    file = next((Path(__file__).parents[2] / "subgraphs").glob("*.json"))
    page.evaluate(
        "async workflow => window.app.loadGraphData(workflow, true, true, 'blueprint')", json.loads(file.read_text())
    )
    page.wait_for_timeout(1500)
    posted = {node["class_type"]: node["inputs"] for node in page.evaluate(POSTED).values()}
    assert set(posted) == {"IP2P_LoadCheckpoint", "IP2P_AdjustScales", "IP2P_Sample"}
    assert posted["IP2P_LoadCheckpoint"]["checkpoint"] == "embedded-photos"
    assert posted["IP2P_Sample"]["instruction"] == "make it snow"
    assert posted["IP2P_AdjustScales"]["keep_picture"] == 1


def test_the_help_panel_shows_our_page(page, screenshots):
    open_template(page, PAGES[0].stem)
    page.evaluate(
        """() => {
            const node = window.app.graph.nodes.find(node => node.type === 'IP2P_Sample');
            window.app.canvas.selectNode(node, false);
            window.app.canvas.centerOnNode(node);
            window.app.canvas.setDirty(true, true);
        }"""
    )
    page.wait_for_timeout(1000)
    page.locator('[data-testid="info-button"]').first.click()
    page.get_by_text("Every picture of a batch is edited with the same seed").first.wait_for()
    page.screenshot(path=screenshots / "help.png")
    assert ours(page) == []


def test_a_saved_picture_reopens_its_workflow(page, server):
    """A PNG dropped on the page is read by the page itself, which looks for our workflow in it."""
    pictures = sorted((server.base / "output" / "ip2p").glob("edit*.png"))
    assert pictures, "the first template saves a picture"
    page.evaluate("() => window.app.graph.clear()")
    page.evaluate(
        """async (bytes) => {
            const file = new File([new Uint8Array(bytes)], 'edit.png', {type: 'image/png'});
            await window.app.handleFile(file);
        }""",
        list(pictures[0].read_bytes()),
    )
    page.wait_for_timeout(1500)
    assert page.evaluate("window.app.graph.nodes.some(node => node.type === 'IP2P_Sample')")
