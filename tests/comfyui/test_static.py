"""What can be checked of the pack without running it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pathspec import GitIgnoreSpec
from PIL import Image

ROOT = Path(__file__).parents[2]
PINNED = json.loads((Path(__file__).parent / "nodes.json").read_text())
PAGES = sorted((ROOT / "workflows").glob("*.json"))
SOURCES = [ROOT / "__init__.py", *sorted((ROOT / "nodes").glob("*.py"))]
READ_ONLY = {"PreviewAny", "PreviewImage", "SaveImage", "MarkdownNote"}


def nodes_of(page: Path) -> list[dict]:
    return json.loads(page.read_text())["nodes"]


def test_every_node_is_in_a_workflow_and_has_a_page():
    used = {node["type"] for page in PAGES for node in nodes_of(page)}
    assert set(PINNED) - used == set()
    for name in PINNED:
        text = (ROOT / "web" / "docs" / f"{name}.md").read_text()
        assert text.startswith("# IP2P ") and len(text.split()) > 30
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(PINNED)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_workflow_is_whole(page):
    assert page.with_suffix(".jpg").stat().st_size > 1000
    twin = json.loads((page.parent / "api" / page.name).read_text())
    nodes = {str(node["id"]): node for node in nodes_of(page)}
    assert {name for name, node in nodes.items() if node["type"] != "MarkdownNote"} == set(twin)
    assert all(nodes[name]["type"] == node["class_type"] for name, node in twin.items())
    note = next(node["widgets_values"][0] for node in nodes.values() if node["type"] == "MarkdownNote")
    assert "ComfyUI/" in note and ("https://huggingface.co/" in note or "full checkpoint" in note)
    assert note.startswith("# ") and "`" not in note  # code in a note cannot be read in Nodes 2.0
    names = {node["properties"].get("cnr_id") for node in nodes.values() if node["type"] != "MarkdownNote"}
    assert names <= {"comfy-core", "instruct-pix2pix"}
    links = {link[0]: link for link in json.loads(page.read_text())["links"]}
    for node in nodes.values():
        for slot, socket in enumerate(node["inputs"]):
            if socket["link"] is not None:
                assert links[socket["link"]][3:5] == [node["id"], slot]


def test_filters_by_the_embedded_clip_use_its_own_thresholds():
    """docs/pairs.md: the paper's let wrong pairs pass here."""
    own = json.loads((ROOT / "ip2p_engine/scenes/embedded/clip/config.json").read_text())["thresholds"]
    steps = [step for path in (ROOT / "workflows/api").glob("*.json") for step in json.loads(path.read_text()).values()]
    filters = [step["inputs"] for step in steps if step["class_type"] == "IP2P_ClipFilter"]
    assert len(filters) >= 2
    assert all({name: inputs[name] for name in own} == own for inputs in filters if inputs["clip_model"] == "embedded")


def test_workflows_are_numbered_and_the_readme_names_each():
    numbers = sorted(int(page.stem.split()[0]) for page in PAGES)
    assert numbers == list(range(1, len(PAGES) + 1)) and len(PAGES) >= 10
    readme = (ROOT / "README.md").read_text()
    assert [page.stem for page in PAGES if page.stem not in readme] == []


def test_thumbnails_have_one_shape():
    sizes = set()
    for page in PAGES:
        with Image.open(page.with_suffix(".jpg")) as picture:
            sizes.add(picture.size)
    assert sizes == {(640, 400)}


def test_requirements_are_the_dependencies_but_torch():
    """ComfyUI brings torch, built for its GPU; pip would replace it by another build."""
    wanted = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    others = [name for name in re.findall(r'"(.+?)"', wanted[1]) if not name.startswith("torch>")]
    assert (ROOT / "requirements.txt").read_text().split() == others


def test_the_registry_finds_what_it_asks_for():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "\d+\.\d+\.\d+"$', text, re.MULTILINE)
    assert 'requires-comfyui = ">=0.3.75"' in text and "PublisherId" in text
    icon = re.search(r'^Icon = "(.+)"', text, re.MULTILINE)[1]
    assert (ROOT / icon).exists()


@pytest.mark.parametrize("language", sorted(path.name for path in (ROOT / "locales").iterdir()))
def test_translations_have_the_keys_of_the_nodes(language):
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(texts) == set(PINNED)
    for name, node in PINNED.items():
        inputs, outputs = texts[name]["inputs"], texts[name]["outputs"]
        assert set(inputs) == {given["name"] for given in node["inputs"]}, name
        assert set(outputs) == {str(number) for number in range(len(node["outputs"]))}, name
        words = [texts[name]["display_name"], texts[name]["description"]]
        words += [text for given in inputs.values() for text in (given["name"], given["tooltip"])]
        assert all(word.strip() for word in [*words, *(given["name"] for given in outputs.values())]), name


def test_the_blueprint_is_whole():
    for path in (ROOT / "subgraphs").glob("*.json"):
        page = json.loads(path.read_text())
        (inner,) = page["definitions"]["subgraphs"]
        assert page["nodes"][0]["type"] == inner["id"] and inner["name"] == path.stem
        links = {link["id"]: link for link in inner["links"]}
        nodes = {node["id"]: node for node in inner["nodes"]}
        for node in nodes.values():
            for slot, socket in enumerate(node["inputs"]):
                if socket["link"] is not None:
                    assert (links[socket["link"]]["target_id"], links[socket["link"]]["target_slot"]) == (
                        node["id"],
                        slot,
                    )
        assert [links[slot["linkIds"][0]]["origin_slot"] for slot in inner["inputs"]] == list(
            range(len(inner["inputs"]))
        )
        assert page["extra"]["BlueprintDescription"] and page["extra"]["BlueprintSearchAliases"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_does_what_the_registry_forbids(path):
    tree = ast.parse(path.read_text())
    called = {getattr(n.func, "id", "") for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not called & {"eval", "exec", "print", "__import__"}
    imported = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    assert not imported & {"subprocess", "pickle", "nodes", "ip2p_engine", "sys"}


def test_ruff_finds_nothing_of_the_registry_s():
    checks = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "S102,S307,E702", "."]
    run = subprocess.run(checks, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_what_is_published_runs_and_explains_itself():
    """A pattern without its leading slash once took web/docs for docs."""
    ignored = GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text().splitlines())
    needed = [ROOT / "__init__.py", ROOT / "requirements.txt"]
    folders = ("nodes", "ip2p_engine", "web", "workflows", "subgraphs", "locales")
    needed += [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    shown = re.findall(r"!\[.*?\]\((.+?)\)", (ROOT / "README.md").read_text())
    icon = re.search(r'^Icon = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    needed += [ROOT / name for name in (*shown, icon)]
    assert len(needed) > 150 and all(path.exists() for path in needed)
    assert not [path for path in needed if ignored.match_file(path.relative_to(ROOT))]
    assert ignored.match_file("docs/nodes.md") and ignored.match_file("tests/conftest.py")


def test_help_pages_show_pictures_that_are_there():
    for page in (ROOT / "web" / "docs").glob("*.md"):
        shown = re.findall(r"!\[.+?\]\((.+?)\)", page.read_text())
        assert shown and all((page.parent / name).stat().st_size > 1000 for name in shown), page.name


def test_the_door_is_small_and_imports_nothing():
    source = (ROOT / "__init__.py").read_text()
    assert len(source.splitlines()) <= 20
    assert not [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("workflows/*.json"), *ROOT.glob("subgraphs/*.json")]), ids=lambda path: path.stem
)
def test_our_nodes_in_what_ships_name_this_version(path):
    """By which the page says that a workflow wants another version of the pack."""
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    pack = re.search(r'^name = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    found = re.findall(rf'"cnr_id": "{pack}",\s*"ver": "(.+)"', path.read_text())
    assert set(found) == {version}
