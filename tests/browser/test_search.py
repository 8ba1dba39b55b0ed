"""What artists type into the page's search, and the node that they mean."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.browser, pytest.mark.slow]
SEARCHES = {
    "xy plot": "IP2P Sweep Guidance",
    "before after": "IP2P Before and After",
    "compare": "IP2P Before and After",
    "side by side": "IP2P Before and After",
    "finetune": "IP2P Train",
    "fine tune": "IP2P Train",
    "resize back": "IP2P Restore Size",
    "original size": "IP2P Restore Size",
    "magicbrush": "IP2P Load Data Set",
    "hugging face dataset": "IP2P Load Data Set",
    "instruct pix2pix": "IP2P Load Checkpoint",
    "cosxl edit": "IP2P Load Checkpoint",
    "edit image": "IP2P Edit Image",
    "image editing": "IP2P Edit Image",
    "prompt to prompt": "IP2P Generate Pairs",
    "clip score": "IP2P CLIP Filter",
    "dual cfg": "IP2P Guider",
    "image cfg": "IP2P Guider",
    "edit strength": "IP2P Adjust Scales",
    "contact sheet": "IP2P Labelled Grid",
    "benchmark": "IP2P Evaluate",
    "edit instructions": "IP2P Captions",
    "demo picture": "IP2P Render Scene",
    "own pairs": "IP2P Pair Images",
    "save dataset": "IP2P Save Data Set",
    "InstructPixToPixConditioning": "IP2P Encode Image",
}


@pytest.fixture(scope="module")
def search(page, server):
    """Types into the search box; the titles of what it offers."""
    if not server.object_info()["IP2P_Train"].get("search_aliases"):
        pytest.skip("this ComfyUI knows no search words")
    page.evaluate("window.app.graph.clear()")

    def offered(words):
        page.evaluate("window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        box = page.get_by_placeholder("Add a node...")
        box.fill(words)
        page.wait_for_timeout(700)
        titles = [item.inner_text().splitlines()[0] for item in page.get_by_test_id("result-item").all()[:3]]
        page.keyboard.press("Escape")
        page.wait_for_timeout(300)
        return titles

    return offered


@pytest.mark.parametrize("words", SEARCHES)
def test_the_node_is_among_the_first_three(search, words):
    assert SEARCHES[words] in search(words)
