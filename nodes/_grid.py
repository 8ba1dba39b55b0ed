"""Sheets of labelled pictures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ..ip2p_engine.errors import ConfigError
from ..ip2p_engine.images import strip

__all__ = ["grid", "numbers"]


def numbers(name: str, text: str) -> list[float]:
    """Numbers divided by commas or spaces; raises ConfigError."""
    try:
        values = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        values = []
    if not values:
        raise ConfigError(f"{name} is {text!r}; give numbers divided by commas, such as 3, 5, 7.5")
    return values


def grid(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int, height: int) -> Image.Image:
    """Strips of ``columns`` pictures below each other; raises ConfigError if labels and pictures do not pair."""
    texts = list(labels) or [""] * len(pictures)
    if len(texts) != len(pictures):
        raise ConfigError(
            f"the grid got {len(pictures)} pictures and {len(texts)} labels; give one line a picture, or none"
        )
    rows = [
        strip(pictures[start : start + columns], texts[start : start + columns], height=height)
        for start in range(0, len(pictures), columns)
    ]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet
