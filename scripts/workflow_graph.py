"""A workflow written down once, in Python, as ComfyUI's page wants it: places, widgets by position, links."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "comfyui"))

from workflow_format import SEED_CONTROL, choices, default_of, inputs_of, is_widget, type_name, widgets_of  # noqa: E402

__all__ = ["Graph", "Node"]

WIDTH, GAP, TITLE, SLOT, WIDGET, TEXT, PICTURE = 300, 60, 30, 22, 26, 90, 270
SHOWS_PICTURE = {"SaveImage", "PreviewImage", "LoadImage", "SamplerCustomAdvanced", "IP2P_Sample", "IP2P_GeneratePairs"}
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
    """Nodes in columns from left to right, each column filled from the top."""

    def __init__(self, name: str, object_info: dict[str, Any], version: str) -> None:
        self.name, self._info, self._version = name, object_info, version
        self._nodes: list[dict[str, Any]] = []
        self._links: list[list[Any]] = []
        self._groups: list[dict[str, Any]] = []
        self._bottom: dict[int, int] = {}
        self._left = {0: 0}

    def note(self, column: int, text: str, *, width: int = 360) -> None:
        """A note with Markdown."""
        lines = sum(1 + len(line) // 48 for line in text.strip().splitlines())
        self._place(column, "MarkdownNote", [width, 50 + 19 * lines], text.strip(), title="Note")
        self._nodes[-1].update(color="#432", bgcolor="#653", widgets_values=[text.strip()])

    def add(self, column: int, kind: str, *, title: str | None = None, **given: Any) -> Node:
        """A node; inputs by name, a value for a widget or an output of another node for a wire."""
        info = self._info[kind]
        known = {name for name, _, _ in inputs_of(info)}
        if set(given) - known:
            raise KeyError(f"{kind} has no input {sorted(set(given) - known)}; it has {sorted(known)}")
        values = [
            SEED_CONTROL if name is None else self._value(given.get(name), kind_, options, f"{kind}.{name}")
            for name, kind_, options in widgets_of(info)
        ]
        height = TITLE + SLOT * max(len(info["output"]), sum(not is_widget(t, o) for _, t, o in inputs_of(info)))
        height += sum(TEXT if options.get("multiline") else WIDGET for _, _, options in widgets_of(info))
        height += PICTURE if kind in SHOWS_PICTURE else 2 * TEXT if kind in SHOWS_TEXT else 0
        number = self._place(column, kind, [WIDTH, height + 10], None, title=title)
        node = self._nodes[-1]
        node["inputs"], node["widgets_values"] = self._sockets(number, info, given), values
        node["outputs"] = [
            {"name": name, "type": type_name(output), "links": []}
            for name, output in zip(info["output_name"], info["output"], strict=True)
        ]
        node["properties"]["Node name for S&R"] = kind
        ours = kind.startswith("IP2P_")
        node["properties"].update(cnr_id=PACK if ours else CORE, ver=self._version if ours else "0.3.75")
        return Node(number, kind, info)

    def _place(self, column: int, kind: str, size: list[int], text: str | None, *, title: str | None) -> int:
        top = self._bottom.get(column, 0)
        left = sum(self._left.get(n, WIDTH + GAP) for n in range(column)) if column else 0
        number = len(self._nodes) + 1
        self._nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [left, top],
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
        self._left[column] = max(self._left.get(column, 0), size[0] + GAP)
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
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, self.name)),
            "revision": 0,
            "last_node_id": len(self._nodes),
            "last_link_id": len(self._links),
            "nodes": self._nodes,
            "links": self._links,
            "groups": self._groups,
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [60, 80]}},
            "version": 0.4,
        }
