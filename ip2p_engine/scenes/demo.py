"""The first edit: one scene of the embedded world, four instructions, one strip."""

from __future__ import annotations

import time
from pathlib import Path

from ..edit import InstructPix2Pix
from ..images import save_image, strip
from .judge import read_scenes
from .world import Scene, render

__all__ = ["DEMO_SCENE", "INSTRUCTIONS", "make_demo"]

DEMO_SCENE = Scene(shape="heart", colour="red", background="sky", size="large", place="centre")
INSTRUCTIONS = ("make it snow", "turn the heart into a star", "paint it blue", "make it a pencil sketch")


def make_demo(editor: InstructPix2Pix, path: Path, *, seed: int = 0) -> str:
    """Write the strip and say in words what was made, what the judge sees in it and how long it took."""
    source = render(DEMO_SCENE)
    started = time.perf_counter()
    results = editor.edit(source, INSTRUCTIONS, seeds=seed)
    seconds = time.perf_counter() - started
    pictures = [result.image for result in results]
    picture = strip([source, *pictures], ["before", *INSTRUCTIONS])
    save_image(picture, path, {"edits": [result.settings for result in results]})
    lines = [f"{text!r}: {_describe(r.scene)}" for text, r in zip(INSTRUCTIONS, read_scenes(pictures), strict=True)]
    count = len(results)
    return "\n".join([*lines, f"{path}: {count} edits in {seconds:.1f} s ({seconds / count:.2f} s an edit)"])


def _describe(scene: Scene) -> str:
    style = "" if scene.style == "plain" else f", {scene.style}"
    return f"a {scene.size} {scene.colour} {scene.shape} on {scene.background}{style}"
