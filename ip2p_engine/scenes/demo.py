"""The first edit on a scene of the embedded world, and what its judge sees in the results."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from .judge import read_scenes
from .world import Scene, render

__all__ = ["DEMO_SCENE", "INSTRUCTIONS", "describe", "demo_source"]

DEMO_SCENE = Scene(shape="heart", colour="red", background="sky", size="large", place="centre")
INSTRUCTIONS = ("make it snow", "turn the heart into a star", "paint it blue", "make it a pencil sketch")


def demo_source() -> Image.Image:
    """The picture that the instructions are for."""
    return render(DEMO_SCENE)


def describe(pictures: Sequence[Image.Image]) -> list[str]:
    """In words, a line an instruction, what the edited pictures show."""
    readings = zip(INSTRUCTIONS, read_scenes(pictures), strict=True)
    return [f"{text!r}: {_words(reading.scene)}" for text, reading in readings]


def _words(scene: Scene) -> str:
    style = "" if scene.style == "plain" else f", {scene.style}"
    return f"a {scene.size} {scene.colour} {scene.shape} on {scene.background}{style}"
