"""The nodes as a running ComfyUI knows them: the public API that workflows are built on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote

import pytest
from workflow_format import choices, default_of, inputs_of, is_widget, to_api, type_name, widgets_of

pytestmark = pytest.mark.comfy
ROOT = Path(__file__).parents[2]
PINNED = Path(__file__).parent / "nodes.json"
PAGES = sorted((ROOT / "workflows").glob("*.json"))
FILES = {"checkpoint", "base", "name"}
"""Combos whose choices depend on the files that are there."""


@pytest.fixture(scope="module")
def ours(object_info):
    return {name: info for name, info in object_info.items() if name.startswith("IP2P_")}


def contract(info):
    """What a workflow relies on: names, order, types, defaults, bounds and choices."""
    inputs = []
    for name, kind, options in inputs_of(info):
        row = {"name": name, "type": type_name(kind), "optional": name in info["input"].get("optional", {})}
        if is_widget(kind, options):
            row["default"] = default_of(kind, options)
            row |= {bound: options[bound] for bound in ("min", "max") if bound in options}
            if choices(kind, options) and name not in FILES:
                row["choices"] = choices(kind, options)
        inputs.append(row)
    outputs = [{"name": n, "type": type_name(t)} for n, t in zip(info["output_name"], info["output"], strict=True)]
    return {"inputs": inputs, "outputs": outputs}


def test_ids_inputs_and_defaults_are_as_pinned(ours):
    found = {name: contract(info) for name, info in sorted(ours.items())}
    if os.environ.get("IP2P_PIN_NODES"):  # after adding an input at the end, or a node; never after a rename
        PINNED.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(PINNED.read_text())


def test_every_input_and_output_explains_itself(ours):
    for name, info in ours.items():
        assert info["category"].split("/")[0] == "InstructPix2Pix"
        assert info["display_name"].startswith("IP2P ") and len(info["description"]) > 40, name
        for given, _, options in inputs_of(info):
            assert len(options.get("tooltip", "")) > 10, (name, given)
        assert len(info["output_tooltips"]) == len(info["output"])
        assert all(len(text or "") > 10 for text in info["output_tooltips"]), name


def test_advanced_inputs_are_marked(ours):
    marked = [given for given, _, options in inputs_of(ours["IP2P_Sample"]) if options.get("advanced")]
    options = ["guidance_low", "guidance_high", "rescale", "apg", "find_area"]
    assert marked == ["sampler", "schedule", "size", "resolution", *options]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_both_formats_agree_with_object_info(object_info, page):
    workflow = json.loads(page.read_text())
    twin = json.loads((page.parent / "api" / page.name).read_text())
    assert without_titles(to_api(workflow, object_info)) == without_titles(twin)
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        info = object_info[node["type"]]
        for (name, kind, options), value in zip(widgets_of(info), node["widgets_values"], strict=True):
            offered = choices(kind, options)
            assert offered is None or value in offered, (node["type"], name)
        # Core's nodes gain outputs with time, behind those they had.
        outputs = [type_name(kind) for kind in info["output"][: len(node["outputs"])]]
        assert [output["type"] for output in node["outputs"]] == outputs


def without_titles(prompt):
    """Core renames its nodes now and then."""
    return {number: {key: node[key] for key in ("class_type", "inputs")} for number, node in prompt.items()}


def test_no_workflow_uses_what_comfyui_has_given_up(object_info):
    used = {node["type"] for page in PAGES for node in json.loads(page.read_text())["nodes"]} - {"MarkdownNote"}
    assert [name for name in sorted(used) if object_info[name].get("deprecated")] == []


def test_templates_are_offered(server):
    offered = server.get("/workflow_templates")
    assert sorted(offered["instruct-pix2pix"]) == sorted(page.stem for page in PAGES)
    for page in PAGES:
        address = f"/api/workflow_templates/instruct-pix2pix/{quote(page.name)}"
        assert server.get(address) == json.loads(page.read_text())
        assert server.get(address.replace(".json", ".jpg")) == page.with_suffix(".jpg").read_bytes()
    assert server.get("/extensions/instruct-pix2pix/docs/IP2P_Sample.md").startswith(b"# IP2P Edit Image")


def test_help_pages_pictures_are_delivered(server):
    for picture in (ROOT / "web" / "docs" / "images").glob("*.jpg"):
        assert server.get(f"/extensions/instruct-pix2pix/docs/images/{picture.name}") == picture.read_bytes()


def test_translations_and_the_blueprint_are_delivered(server):
    assert server.get("/i18n")["zh"]["nodeDefs"]["IP2P_Sample"]["display_name"] == "IP2P 编辑图像"
    try:
        found = server.get("/global_subgraphs")
    except HTTPError:
        pytest.skip("this ComfyUI has no blueprints")
    ours = [entry for entry in found.values() if entry["info"]["node_pack"] == "custom_nodes.instruct-pix2pix"]
    assert [entry["name"] for entry in ours] == ["Edit image (InstructPix2Pix)"]


def test_importing_the_pack_loads_nothing_heavy(server):
    line = next(line for line in server.log.read_text().splitlines() if "heavy modules:" in line)
    assert line.split("heavy modules:")[1].strip() == "none"
    assert "IMPORT FAILED" not in "".join(line for line in server.log.read_text().splitlines() if "instruct" in line)
