"""The one import of ComfyUI's node API, and what its versions differ in."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import ComfyExtension, io, ui

__all__ = ["CATEGORY", "ComfyExtension", "Pairs", "advanced", "io", "schema", "ui"]

CATEGORY = "InstructPix2Pix"
FIELDS = {field.name for field in dataclasses.fields(io.Schema)}

# A sequence of the engine's PairRecord: a tuple, or a data set on disk.
Pairs = io.Custom("IP2P_PAIRS")


def schema(node_id: str, display_name: str, group: str = "", **fields: Any) -> io.Schema:
    """A schema without the fields that this ComfyUI does not know yet."""
    known = {name: value for name, value in fields.items() if name in FIELDS}
    category = f"{CATEGORY}/{group}" if group else CATEGORY
    return io.Schema(node_id=node_id, display_name=display_name, category=category, **known)


def advanced(given: io.Input) -> io.Input:
    """The input among the advanced ones; the keyword itself is newer than our floor of 0.3.75."""
    given.extra_dict = {**(given.extra_dict or {}), "advanced": True}
    return given
