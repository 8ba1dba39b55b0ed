"""A workflow written down once, in Python, as ComfyUI's page wants it: places, widgets by position, links."""

from __future__ import annotations

import math
import re
import sys
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "comfyui"))

from workflow_format import SEED_CONTROL, choices, default_of, inputs_of, is_widget, type_name, widgets_of  # noqa: E402

__all__ = ["Graph", "Node"]

WIDTH, ACROSS, DOWN, SLOT, LINE, LETTER = 300, 40, 56, 20, 18, 6.2
# A widget's height, a text field's, a badge's, a footer's for advanced inputs: as LiteGraph draws them, and Nodes 2.0.
CLASSIC, NODES_2 = (24, 80, 0, 0), (29, 96, 28, 32)
# The most that FitView shows with readable text (62 %) on a page of 1440 x 900.
LARGEST = (1700, 1066)
# Nodes with a text field stretch it over free room, so those that also show previews get none and stand last in their
# column: they grow when they do.
SHOWS_PICTURE = {"SaveImage", "PreviewImage", "LoadImage", "SamplerCustomAdvanced", "IP2P_BeforeAfter"}
SHOWS_TEXT = {"PreviewAny"}
GROWS = {"IP2P_Sample", "IP2P_GeneratePairs", "IP2P_Train", "IP2P_Evaluate"}
HEAD = "#2c2c2c"  # of titles: the page's own grey leaves its titles a contrast of 4.4
CORE, PACK = "comfy-core", "instruct-pix2pix"
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


class Node:
    """One node of a graph; ``node["image"]`` is an output of it."""

    def __init__(self, number: int, kind: str, info: dict[str, Any]) -> None:
        self.number, self.kind, self.info = number, kind, info

    def __getitem__(self, output: str) -> tuple[Node, int]:
        names = self.info["output_name"]
        if output not in names:
            raise KeyError(f"{self.kind} has the outputs {names}, not {output}")
        return self, names.index(output)


class Graph:
    """Nodes in columns from left to right, each column filled from the top."""

    def __init__(self, name: str, object_info: dict[str, Any], version: str) -> None:
        self.name, self._info, self._version = name, object_info, version
        self._nodes: list[dict[str, Any]] = []
        self._links: list[list[Any]] = []
        self._bottom: dict[int, int] = {}
        self._last: dict[int, str] = {}
        self._widths: dict[int, int] = {}
        self._extra: dict[str, Any] = {}
        self.width = WIDTH
        """Of nodes that say nothing else."""

    def note(self, text: str) -> None:
        """A note with Markdown, at the top left: what is read first."""
        letters = int(self.width / LETTER)
        lines = sum(_lines_of(paragraph, letters) for paragraph in text.strip().split("\n\n"))
        self._place(0, "MarkdownNote", [self.width, 60 + LINE * lines], "Note")
        # Dark, so that links and code can be read in both renderings.
        self._nodes[-1].update(color="#233", bgcolor="#122", widgets_values=[text.strip()])

    def add(
        self,
        column: int,
        kind: str,
        *,
        title: str | None = None,
        width: int = 0,
        shown: int = 270,
        folded: bool = False,
        models: list[dict[str, str]] | None = None,
        **given: Any,
    ) -> Node:
        """A node; inputs by name, a value for a widget or an output of another node for a wire.

        ``shown`` is the height of what it shows, if it shows something. ``models``: what the page offers to download
        where a file is chosen that is not there.
        """
        info = self._info[kind]
        known = {name for name, _, _ in inputs_of(info)}
        if set(given) - known:
            raise KeyError(f"{kind} has no input {sorted(set(given) - known)}; it has {sorted(known)}")
        values = [
            SEED_CONTROL if name is None else self._value(given.get(name), kind_, options, f"{kind}.{name}")
            for name, kind_, options in widgets_of(info)
        ]
        number = self._place(column, kind, [width or self.width, _height(kind, info, shown)], title, folded)
        node = self._nodes[-1]
        node["inputs"], node["widgets_values"] = self._sockets(number, info, given), values
        node["outputs"] = [
            {"name": name, "type": type_name(output), "links": []}
            for name, output in zip(info["output_name"], info["output"], strict=True)
        ]
        node["properties"]["Node name for S&R"] = kind
        ours = kind.startswith("IP2P_")
        node["properties"].update(cnr_id=PACK if ours else CORE, ver=self._version if ours else "0.3.75")
        if models:
            node["properties"]["models"] = models
        return Node(number, kind, info)

    def app(self, inputs: list[tuple[Node, str]], outputs: list[Node]) -> None:
        """Pages that have it open the workflow as an app of these widgets and results."""
        self._extra["linearMode"] = True
        chosen = [[node.number, widget] for node, widget in inputs]
        self._extra["linearData"] = {"inputs": chosen, "outputs": [node.number for node in outputs]}

    def _place(self, column: int, kind: str, size: list[int], title: str | None, folded: bool = False) -> int:
        """Put a node below the last one of its column; columns are laid out when the page is written."""
        top = self._bottom.get(column, 0)
        if self._last.get(column) in GROWS:
            raise ValueError(f"{self._last[column]} grows when it runs, so nothing may stand below it")
        self._last[column] = kind
        number = len(self._nodes) + 1
        self._nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [column, top],
                "size": size,
                "color": HEAD,
                "flags": {"collapsed": True} if folded else {},
                "order": number - 1,
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "properties": {},
                "widgets_values": [],
                **({"title": title} if title else {}),
            }
        )
        self._widths[column] = max(self._widths.get(column, 0), size[0])
        self._bottom[column] = top + (0 if folded else size[1]) + DOWN
        return number

    def _sockets(self, number: int, info: dict[str, Any], given: dict[str, Any]) -> list[dict[str, Any]]:
        """Inputs as the page lists them: wires first, then widgets, which may be wired too."""
        inputs = sorted(inputs_of(info), key=lambda entry: is_widget(entry[1], entry[2]))
        sockets: list[dict[str, Any]] = []
        for slot, (name, kind, options) in enumerate(inputs):
            widget = {"widget": {"name": name}} if is_widget(kind, options) else {}
            link = (
                self._link(given[name], number, slot, type_name(kind)) if isinstance(given.get(name), tuple) else None
            )
            sockets.append({"name": name, "type": type_name(kind), **widget, "link": link})
        return sockets

    def _link(self, output: tuple[Node, int], target: int, slot: int, kind: str) -> int:
        source, index = output
        number = len(self._links) + 1
        self._links.append([number, source.number, index, target, slot, kind])
        self._nodes[source.number - 1]["outputs"][index]["links"].append(number)
        return number

    def _value(self, given: Any, kind: Any, options: dict[str, Any], where: str) -> Any:
        if given is None or isinstance(given, tuple):
            return default_of(kind, options)
        offered = choices(kind, options)
        if offered is not None and given not in offered:
            raise ValueError(f"{where} offers {offered}, not {given!r}")
        return given

    def page(self) -> dict[str, Any]:
        """The page's format, version 0.4; raises ValueError for a graph that a laptop does not show readably."""
        left = {column: sum(self._widths[n] + ACROSS for n in range(column)) for column in self._widths}
        nodes = [{**node, "pos": [left[node["pos"][0]], node["pos"][1]]} for node in self._nodes]
        size = sum(self._widths.values()) + ACROSS * (len(left) - 1), max(self._bottom.values()) - DOWN + 30
        if size[0] > LARGEST[0] or size[1] > LARGEST[1]:
            raise ValueError(f"{self.name} is {size[0]} x {size[1]}, and at most {LARGEST} can be read on a laptop")
        scale = min(1350 / size[0], 750 / size[1], 1)
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, self.name)),
            "revision": 0,
            "last_node_id": len(self._nodes),
            "last_link_id": len(self._links),
            "nodes": nodes,
            "links": self._links,
            "groups": [],
            "config": {},
            # Right of the page's side bar, below its tabs and its Run button.
            "extra": {**self._extra, "ds": {"scale": round(scale, 2), "offset": [60 / scale + 10, 90 / scale + 40]}},
            "version": 0.4,
        }

    def blueprint(
        self, inputs: list[tuple[Node, str]], output: tuple[Node, int], *, description: str, aliases: list[str]
    ) -> dict[str, Any]:
        """The graph as one node of the page's library, with some of its inputs and one output."""
        page, identity = self.page(), str(uuid.uuid5(uuid.NAMESPACE_URL, f"blueprint {self.name}"))
        nodes = {node["id"]: node for node in page["nodes"]}
        links = [dict(zip(LINK, link, strict=True)) for link in page["links"]]
        right = max(node["pos"][0] + node["size"][0] for node in nodes.values())
        slots, sockets, values = [], [], []
        for slot, (node, name) in enumerate(inputs):
            entry = nodes[node.number]
            target, socket = next((n, one) for n, one in enumerate(entry["inputs"]) if one["name"] == name)
            socket["link"] = len(links) + 1
            links.append(dict(zip(LINK, [len(links) + 1, -10, slot, entry["id"], target, socket["type"]], strict=True)))
            slots.append(self._slot("in", slot, name, socket["type"], links[-1]["id"], -100))
            sockets.append({key: socket[key] for key in ("name", "type", "widget") if key in socket} | {"link": None})
            if "widget" in socket:
                names = [widget for widget, _, _ in widgets_of(node.info)]
                values.append(entry["widgets_values"][names.index(name)])
        source, index = output
        kind = type_name(source.info["output"][index])
        links.append(dict(zip(LINK, [len(links) + 1, source.number, index, -20, 0, kind], strict=True)))
        nodes[source.number]["outputs"][index]["links"].append(links[-1]["id"])
        result = self._slot("out", 0, "image", kind, links[-1]["id"], right + 100)
        inner = {
            "id": identity,
            "version": 1,
            "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
            "revision": 0,
            "config": {},
            "name": self.name,
            "inputNode": {"id": -10, "bounding": [-260, 0, 140, 20 * len(slots) + 40]},
            "outputNode": {"id": -20, "bounding": [right + 60, 0, 120, 60]},
            "inputs": slots,
            "outputs": [result],
            "widgets": [],
            "nodes": list(nodes.values()),
            "groups": [],
            "links": links,
            "extra": {},
            "category": "InstructPix2Pix",
            "description": description,
        }
        return {
            "revision": 0,
            "last_node_id": 1,
            "last_link_id": 0,
            "nodes": [self._blueprint_node(identity, sockets, values, kind)],
            "links": [],
            "version": 0.4,
            "definitions": {"subgraphs": [inner]},
            "extra": {"BlueprintDescription": description, "BlueprintSearchAliases": aliases},
        }

    def _blueprint_node(
        self, identity: str, sockets: list[dict[str, Any]], values: list[Any], kind: str
    ) -> dict[str, Any]:
        """The node that stands for the subgraph."""
        return {
            "id": 1,
            "type": identity,
            "pos": [0, 0],
            "size": [360, 300],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": sockets,
            "outputs": [{"name": "image", "type": kind, "links": []}],
            "title": self.name,
            "properties": {
                "proxyWidgets": [["-1", one["name"]] for one in sockets if "widget" in one],
                "cnr_id": PACK,
                "ver": self._version,
            },
            "widgets_values": values,
        }

    def _slot(self, side: str, number: int, name: str, kind: str, link: int, x: float) -> dict[str, Any]:
        identity = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.name} {side} {name}"))
        return {"id": identity, "name": name, "type": kind, "linkIds": [link], "pos": [x, 20 + 20 * number]}


def _lines_of(paragraph: str, letters: int) -> int:
    """Lines of a paragraph of Markdown in a note, with the space below it; addresses are not shown."""
    shown = re.sub(r"\]\(.*?\)", "", paragraph)
    items = re.split(r"\n(?=- )", shown) if "\n- " in shown else [shown.replace("\n", " ")]
    return 1 + sum(math.ceil(len(item) / letters) for item in items) + shown.startswith("#")


def _height(kind: str, info: dict[str, Any], shown: int) -> int:
    """As high as the higher of the page's two renderings, which a saved height does not shrink."""
    sockets = sum(not is_widget(t, o) for _, t, o in inputs_of(info))
    rows = SLOT * max(len(info["output"]), sockets) + 10
    widgets = [options for _, _, options in widgets_of(info)]
    heights = []
    for widget, text, badge, footer in (CLASSIC, NODES_2):
        folds = bool(footer) and any(one.get("advanced") for one in widgets)
        seen = [one for one in widgets if not (folds and one.get("advanced"))]
        below = badge * kind.startswith("IP2P_") + footer * folds
        heights.append(rows + below + sum(text if one.get("multiline") else widget for one in seen))
    return max(heights) + (shown if kind in SHOWS_PICTURE | SHOWS_TEXT else 0)
