"""What the embedded models know, and which of them a picture is for."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
from PIL import Image

from .world import BACKGROUNDS, COLOURS, STYLES, Scene, render

__all__ = ["NOTICE", "PHOTOS_NOTICE", "is_scene", "model_for"]

FULL = "run this once: ip2p fetch instruct-pix2pix, and edit with the checkpoint instruct-pix2pix"
NOTICE = (
    "the embedded model knows drawn scenes alone (one shape on a plain ground), and this picture is none, so the "
    f"result is no edit of it; edit photographs with the checkpoint embedded-photos, or {FULL}"
)
PHOTOS_NOTICE = (
    "no checkpoint was named, so embedded-photos edited this, a miniature that knows some kinds of edits alone (night, "
    f"snow, sketch, the red things blue, a heart added; docs/photos.md); for every instruction {FULL}"
)
SIDE, NEAR, ALIKE = 64, 7, 10  # pixels; levels to a colour of the world; levels between neighbours
OFTEN = 60  # pixels of a scene that make a colour one of the world's
FROM_THE_WORLD, FLAT = 0.65, 0.6  # shares of the pixels: no scene of 500 had less than .69 and .61


def is_scene(picture: Image.Image) -> bool:
    """Whether a picture may be one of the embedded world's, at any size, PNG or JPEG: by its colours and flatness."""
    small = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)).astype(int)
    down, across = (np.abs(np.diff(small, axis=axis)).max(-1) <= ALIKE for axis in (0, 1))
    if (down[:, :-1] & across[:-1]).mean() < FLAT:
        return False
    points = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)).reshape(-1, 1, 3)
    distances = np.abs(points.astype(int) - _colours()).max(-1).min(1)
    return bool((distances <= NEAR).mean() >= FROM_THE_WORLD)


def model_for(picture: Image.Image) -> str:
    """The embedded model that a picture is for, where nobody named one."""
    return "embedded" if is_scene(picture) else "embedded-photos"


@cache
def _colours() -> np.ndarray:
    """The world's colours, (n, 3): those that cover a good part of a scene in some style."""
    found = set()
    for style, background, colour in product(STYLES, BACKGROUNDS, COLOURS):
        scene = Scene(shape="square", colour=colour, background=background, size="large", style=style)
        values, counts = np.unique(np.asarray(render(scene)).reshape(-1, 3), axis=0, return_counts=True)
        found |= set(map(tuple, values[counts >= OFTEN].tolist()))
    return np.array(sorted(found))
