"""Small words over tensor names that every architecture module uses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ..errors import CheckpointError

__all__ = ["count", "few", "replace_parts", "shape_of", "with_prefix"]


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def count(names: Iterable[str], pattern: str) -> int:
    """How many indices 0 .. n - 1 a numbered list has; the pattern's group is the index, matched at the start."""
    matcher = re.compile(pattern)
    return 1 + max((int(found[1]) for found in map(matcher.match, names) if found), default=-1)


def shape_of(tensors: Mapping[str, Tensor], name: str, part: str) -> tuple[int, ...]:
    """A tensor's shape; raises CheckpointError where the tensor is missing."""
    if name not in tensors:
        raise CheckpointError(f"the {part} has no tensor {name}; the file is incomplete or of another architecture")
    return tuple(tensors[name].shape)


def replace_parts(name: str, table: Mapping[str, str]) -> str:
    """The name with whole dotted parts exchanged."""
    text = f".{name}."
    for old, new in table.items():
        text = text.replace(f".{old}.", f".{new}.")
    return text[1:-1]


def few(names: Iterable[str], limit: int = 3) -> str:
    """Some names for a message."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + rest
