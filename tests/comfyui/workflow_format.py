"""ComfyUI's two workflow formats: the page's (layout, widgets by position) and the API's (inputs by name)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
PAGE_ONLY = {"MarkdownNote", "Note"}
SEED_CONTROL = "fixed"
SEEDS = {"seed", "noise_seed"}


def inputs_of(info: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, type, options) of a node's inputs in the order of the page."""
    for kind in ("required", "optional"):
        for name in info.get("input_order", info["input"]).get(kind, ()):
            given = info["input"][kind][name]
            yield name, given[0], given[1] if len(given) > 1 else {}


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput")


def type_name(kind: Any) -> str:
    return "COMBO" if isinstance(kind, list) else kind


def choices(kind: Any, options: dict[str, Any]) -> list[Any] | None:
    """What a combo offers; V1 nodes put the list where V3 nodes put COMBO."""
    return kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None


def default_of(kind: Any, options: dict[str, Any]) -> Any:
    offered = choices(kind, options)
    return options.get("default", offered[0] if offered else "" if kind == "STRING" else 0)


def widgets_of(info: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """The widgets in the order of ``widgets_values``; a seed is followed by its control, named None."""
    found: list[tuple[str, Any, dict[str, Any]]] = []
    for name, kind, options in inputs_of(info):
        if is_widget(kind, options):
            found.append((name, kind, options))
            # The page gives every number of these names a control, unless the node says otherwise.
            if options.get("control_after_generate", kind == "INT" and name in SEEDS):
                found.append((None, "COMBO", {"options": ["fixed", "increment", "decrement", "randomize"]}))
    return found


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """What the page posts when Run is pressed."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in sorted(workflow["nodes"], key=lambda node: node["id"]):
        if node["type"] in PAGE_ONLY:
            continue
        info = object_info[node["type"]]
        # A page that was saved before a widget came has no value for it.
        values = zip(widgets_of(info), node.get("widgets_values", ()), strict=False)
        inputs = {name: value for (name, _, _), value in values if name is not None}
        for socket in node.get("inputs", ()):
            if socket.get("link") is not None:
                inputs[socket["name"]] = sources[socket["link"]]
        order = [name for name, _, _ in inputs_of(info) if name in inputs]
        title = node.get("title") or info["display_name"] or node["type"]
        prompt[str(node["id"])] = {
            "inputs": {name: inputs[name] for name in order},
            "class_type": node["type"],
            "_meta": {"title": title},
        }
    return prompt
