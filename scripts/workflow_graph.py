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

WIDTH, GAP, SLOT, WIDGET, TEXT, LINE, PICTURE = 300, 60, 20, 24, 80, 18, 270
NOTE_WIDTH, NOTE_LETTERS = 360, 52
GROUP_MARGIN, GROUP_TITLE = 30, 80
# Nodes with a text field stretch it over free room, so those that show previews get none: they grow when they do.
SHOWS_PICTURE = {"SaveImage", "PreviewImage", "LoadImage", "SamplerCustomAdvanced"}
SHOWS_TEXT = {"PreviewAny"}
CORE, PACK = "comfy-core", "instruct-pix2pix"


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
    """Nodes in columns from left to right, each column filled from the top, within bands one below the other."""

    def __init__(self, name: str, object_info: dict[str, Any], version: str) -> None:
        self.name, self._info, self._version = name, object_info, version
        self._nodes: list[dict[str, Any]] = []
        self._links: list[list[Any]] = []
        self._bands: dict[str, list[dict[str, Any]]] = {}
        self._bottom: dict[int, int] = {}
        self._top = 0
        self._widths: dict[int, int] = {}

    def note(self, text: str) -> None:
        """A note with Markdown, left of all else."""
        lines = sum(_lines_of(paragraph) for paragraph in text.strip().split("\n\n"))
        self._place(0, "MarkdownNote", [NOTE_WIDTH, 60 + LINE * lines], "Note")
        self._nodes[-1].update(color="#432", bgcolor="#653", widgets_values=[text.strip()])

    def band(self, title: str) -> None:
        """What is added from now on lies in a group of that title, below the groups before it."""
        if self._bands:
            self._top = max(bottom for column, bottom in self._bottom.items() if column)
        self._top += GROUP_TITLE
        self._bottom = {0: self._bottom[0]}
        self._bands[title] = []

    def add(
        self, column: int, kind: str, *, title: str | None = None, width: int = WIDTH, lines: int = 8, **given: Any
    ) -> Node:
        """A node; inputs by name, a value for a widget or an output of another node for a wire.

        ``lines`` is the room for text in a node that shows some.
        """
        info = self._info[kind]
        known = {name for name, _, _ in inputs_of(info)}
        if set(given) - known:
            raise KeyError(f"{kind} has no input {sorted(set(given) - known)}; it has {sorted(known)}")
        values = [
            SEED_CONTROL if name is None else self._value(given.get(name), kind_, options, f"{kind}.{name}")
            for name, kind_, options in widgets_of(info)
        ]
        number = self._place(column, kind, [width, _height(kind, info, lines)], title)
        node = self._nodes[-1]
        if self._bands:
            next(reversed(self._bands.values())).append(node)
        node["inputs"], node["widgets_values"] = self._sockets(number, info, given), values
        node["outputs"] = [
            {"name": name, "type": type_name(output), "links": []}
            for name, output in zip(info["output_name"], info["output"], strict=True)
        ]
        node["properties"]["Node name for S&R"] = kind
        ours = kind.startswith("IP2P_")
        node["properties"].update(cnr_id=PACK if ours else CORE, ver=self._version if ours else "0.3.75")
        return Node(number, kind, info)

    def _place(self, column: int, kind: str, size: list[int], title: str | None) -> int:
        """Put a node below the last one of its column; columns are laid out when the page is written."""
        top = self._bottom.get(column, self._top if column else 0)
        number = len(self._nodes) + 1
        self._nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [column, top],
                "size": size,
                "flags": {},
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
        self._bottom[column] = top + size[1] + GAP
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
        """The page's format, version 0.4."""
        left = {column: sum(self._widths[n] + GAP for n in range(column)) for column in self._widths}
        nodes = [{**node, "pos": [left[node["pos"][0]], node["pos"][1]]} for node in self._nodes]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, self.name)),
            "revision": 0,
            "last_node_id": len(self._nodes),
            "last_link_id": len(self._links),
            "nodes": nodes,
            "links": self._links,
            "groups": [
                _group(number, title, [nodes[node["id"] - 1] for node in band])
                for number, (title, band) in enumerate(self._bands.items(), 1)
            ],
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [120, 240]}},  # right of the page's side bar, below its tabs
            "version": 0.4,
        }


def _lines_of(paragraph: str) -> int:
    """Lines of a paragraph of Markdown in a note, with the space below it; addresses are not shown."""
    shown = re.sub(r"\]\(.*?\)", "", paragraph)
    items = re.split(r"\n(?=- )", shown) if "\n- " in shown else [shown.replace("\n", " ")]
    return 1 + sum(math.ceil(len(item) / NOTE_LETTERS) for item in items) + shown.startswith("#")


def _height(kind: str, info: dict[str, Any], lines: int) -> int:
    sockets = sum(not is_widget(t, o) for _, t, o in inputs_of(info))
    height = 10 + SLOT * max(len(info["output"]), sockets)
    height += sum(TEXT if options.get("multiline") else WIDGET for _, _, options in widgets_of(info))
    return height + (PICTURE if kind in SHOWS_PICTURE else 20 + LINE * lines if kind in SHOWS_TEXT else 0)


def _group(number: int, title: str, nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """A frame around nodes."""
    left, top = (min(node["pos"][n] for node in nodes) for n in (0, 1))
    right, bottom = (max(node["pos"][n] + node["size"][n] for node in nodes) for n in (0, 1))
    above = GROUP_TITLE
    bounding = [left - GROUP_MARGIN, top - above, right - left + 2 * GROUP_MARGIN, bottom - top + above + GROUP_MARGIN]
    return {"id": number, "title": title, "bounding": bounding, "color": "#3f789e", "font_size": 24, "flags": {}}
