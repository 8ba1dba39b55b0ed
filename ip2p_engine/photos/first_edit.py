"""The first edit of a photograph: one of those that ship, and four instructions that embedded-photos knows."""

from __future__ import annotations

from PIL import Image

from ..images import open_image
from .pictures import demo_picture

__all__ = ["INSTRUCTIONS", "demo_source"]

INSTRUCTIONS = ("make it night", "make it autumn", "make it black and white", "make the green things purple")


def demo_source() -> Image.Image:
    """The picture that the instructions are for; no network was trained on it."""
    return open_image(demo_picture("moose"))
