"""The embedded world: every scene is one object on a plain ground, drawn exactly from its attributes.

A scene has six attributes. The world is finite (12,960 scenes), deterministic and drawn with antialiased
polygons, so the true result of an edit is a picture and not an opinion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "COLOURS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "STYLES",
    "WORLD_SIZE",
    "Scene",
    "all_scenes",
    "halved",
    "object_mask",
    "render",
    "world_at_half_size",
    "world_pixels",
]

WORLD_SIZE = 64
SUPERSAMPLING = 8

COLOURS = {
    "red": (222, 40, 43),
    "orange": (250, 138, 24),
    "yellow": (250, 214, 30),
    "green": (38, 158, 68),
    "blue": (36, 84, 214),
    "purple": (128, 48, 176),
}
BACKGROUNDS = {
    "pink": (252, 190, 208),
    "mint": (178, 236, 206),
    "sand": (238, 216, 170),
    "sky": (168, 216, 248),
    "lavender": (208, 192, 240),
    "grey": (190, 192, 196),
}
SHAPES = ("circle", "square", "triangle", "star", "heart")
SIZES = {"small": 13.0, "large": 21.0}
STYLES = ("plain", "night", "snow", "sketch")
PLACES = {
    f"{vertical} {horizontal}".replace("middle centre", "centre"): (x, y)
    for (vertical, y), (horizontal, x) in product(
        (("top", 24), ("middle", 32), ("bottom", 40)), (("left", 24), ("centre", 32), ("right", 40))
    )
}
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "size": tuple(SIZES),
    "style": STYLES,
    "place": tuple(PLACES),
}

STARS = ((8, 9, 1.2), (21, 5, 0.9), (33, 10, 1.1), (5, 24, 0.9), (59, 27, 1.0), (43, 6, 0.8), (58, 43, 0.8))
MOON = (53.0, 10.0, 6.0)
FLAKES = (
    *((5, 6), (19, 4), (32, 9), (46, 5), (59, 8), (4, 20), (60, 22)),
    *((3, 34), (61, 37), (6, 48), (17, 53), (47, 53), (59, 50)),
)
SNOW_LINE = 57.0
PAPER = np.array((250.0, 248.0, 242.0))
GRAPHITE = np.array((44.0, 44.0, 50.0))


@dataclass(frozen=True, kw_only=True, order=True)
class Scene:
    """One picture of the world, named by its attributes."""

    shape: str
    colour: str
    background: str
    size: str
    style: str = "plain"
    place: str = "centre"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in ATTRIBUTES[field.name]:
                raise ValueError(f"scene {field.name} is {value!r}; choose one of {', '.join(ATTRIBUTES[field.name])}")

    def with_(self, **changes: str) -> Scene:
        """The same scene with some attributes changed."""
        return replace(self, **changes)

    def differs(self, other: Scene) -> list[str]:
        """The names of the attributes that are others in another scene."""
        return [name for name, value in vars(self).items() if getattr(other, name) != value]


@lru_cache(maxsize=1)
def all_scenes() -> tuple[Scene, ...]:
    """Every scene of the world, in one fixed order."""
    return tuple(
        Scene(style=style, shape=shape, size=size, place=place, colour=colour, background=background)
        for style, shape, size, place, colour, background in product(
            STYLES, SHAPES, SIZES, PLACES, COLOURS, BACKGROUNDS
        )
    )


def render(scene: Scene) -> Image.Image:
    """Draw a scene: 64 x 64, RGB, antialiased."""
    backdrop, tint = _backdrop(scene.background, scene.style)
    return Image.fromarray(_painted(scene, backdrop, tint(np.array(COLOURS[scene.colour], dtype=np.float64))), "RGB")


def render_two(left: Scene, right: Scene) -> Image.Image:
    """Two small objects side by side on the left one's ground: no scene of the world, for what models cannot do."""
    picture, tint = _backdrop(left.background, left.style)
    for scene, shift in ((left, -WORLD_SIZE // 4), (right, WORLD_SIZE // 4)):
        mask = np.roll(_coverage(scene.shape, "small"), shift, axis=1)[..., None]
        picture = picture * (1 - mask) + tint(np.array(COLOURS[scene.colour], dtype=np.float64)) * mask
    return Image.fromarray(np.rint(picture).clip(0, 255).astype(np.uint8), "RGB")


@cache
def world_pixels() -> np.ndarray:
    """Every scene drawn as ``render`` does: uint8, shape (12960, 64, 64, 3), in the order of all_scenes()."""
    per_layout = len(COLOURS) * len(BACKGROUNDS)
    return np.concatenate([_recoloured(layout) for layout in all_scenes()[::per_layout]])


def _recoloured(layout: Scene) -> np.ndarray:
    """A scene in every colour on every background: (36, 64, 64, 3)."""
    return _painted(layout, *_palette(layout.style)).reshape(-1, WORLD_SIZE, WORLD_SIZE, 3)


@cache
def world_at_half_size() -> np.ndarray:
    """Every scene averaged over 2 x 2 pixels, in [0, 1]: float32, shape (12960, 32, 32, 3).

    Painting is linear in the colours, so averaging once a layout serves its 36 scenes; nothing is rounded to 8 bits.
    """
    per_layout = len(COLOURS) * len(BACKGROUNDS)
    return np.concatenate([_recoloured_at_half_size(layout) for layout in all_scenes()[::per_layout]])


def _recoloured_at_half_size(layout: Scene) -> np.ndarray:
    backdrops, colours = _palette(layout.style)
    ground, body, line = _shares(layout)
    fixed = halved(backdrops * ground + GRAPHITE * line)
    return ((fixed + colours * halved(body)) / 255).astype(np.float32).reshape(-1, WORLD_SIZE // 2, WORLD_SIZE // 2, 3)


def halved(pixels: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels: (..., h, w, channels) to (..., h / 2, w / 2, channels)."""
    *batch, height, width, channels = pixels.shape
    return pixels.reshape(*batch, height // 2, 2, width // 2, 2, channels).mean(axis=(-4, -2))


@cache
def _palette(style: str) -> tuple[np.ndarray, np.ndarray]:
    """Every ground (1, 6, 64, 64, 3) and every tinted colour (6, 1, 1, 1, 3) of a style, in 0..255."""
    grounds = [_backdrop(background, style) for background in BACKGROUNDS]
    tint = grounds[0][1]
    colours = np.stack([tint(np.array(colour, dtype=np.float64)) for colour in COLOURS.values()])
    return np.stack([ground for ground, _ in grounds])[None], colours[:, None, None, None]


def _painted(layout: Scene, backdrop: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """The object of a layout over backdrops (..., 64, 64, 3) in tinted colours that broadcast with them; uint8."""
    ground, body, line = _shares(layout)
    return np.rint(backdrop * ground + colour * body + GRAPHITE * line).clip(0, 255).astype(np.uint8)


def _shares(layout: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much of each pixel is ground, object and pencil line: three of (64, 64, 1), which sum to 1."""
    mask = object_mask(layout)[..., None]
    line = np.zeros_like(mask)
    if layout.style == "sketch":
        line = _placed(_outline(layout.shape, layout.size), layout.place)[..., None]
    return (1 - mask) * (1 - line), mask * (1 - line), line


def object_mask(scene: Scene) -> np.ndarray:
    """Coverage of the object in [0, 1], shape (64, 64)."""
    return _placed(_coverage(scene.shape, scene.size), scene.place)


def _backdrop(background: str, style: str):
    """The ground as (64, 64, 3) in 0..255 and the function that tints the object alike."""
    tint = {"night": _at_night, "sketch": _on_paper}.get(style, lambda colour: colour)
    ground = np.broadcast_to(tint(np.array(BACKGROUNDS[background], dtype=np.float64)), (WORLD_SIZE, WORLD_SIZE, 3))
    if style == "night":
        lights = _night_lights()[..., None]
        ground = ground * (1 - lights) + np.array((255.0, 246.0, 200.0)) * lights
    if style == "snow":
        white = _snow_cover()[..., None]
        ground = ground * (1 - white) + 255.0 * white
    return ground, tint


def _at_night(colour: np.ndarray) -> np.ndarray:
    return colour * (0.40, 0.42, 0.54) + (0.0, 2.0, 16.0)


def _on_paper(colour: np.ndarray) -> np.ndarray:
    return 0.42 * colour + 0.58 * PAPER


@cache
def _coverage(shape: str, size: str) -> np.ndarray:
    canvas, draw = _canvas()
    draw.polygon(_polygon(shape, SIZES[size]), fill=255)
    return _downsample(canvas)


@cache
def _outline(shape: str, size: str) -> np.ndarray:
    canvas, draw = _canvas()
    points = _polygon(shape, SIZES[size])
    width = round(2.4 * SUPERSAMPLING)
    draw.line([*points, points[0], points[1]], fill=255, width=width, joint="curve")
    return _downsample(canvas)


@lru_cache(maxsize=1)
def _night_lights() -> np.ndarray:
    canvas, draw = _canvas()
    for x, y, radius in STARS:
        _disc(draw, x, y, radius, 255)
    left, top, size = MOON
    _disc(draw, left, top, size, 255)
    _disc(draw, left - 3.0, top - 1.5, size * 0.9, 0)
    return _downsample(canvas)


@lru_cache(maxsize=1)
def _snow_cover() -> np.ndarray:
    canvas, draw = _canvas()
    for x, y in FLAKES:
        _disc(draw, x, y, 1.7, 255)
    edge = WORLD_SIZE * SUPERSAMPLING
    drift = [(x, SUPERSAMPLING * (SNOW_LINE + 1.6 * math.sin(x / SUPERSAMPLING / 5.1))) for x in range(0, edge + 1, 4)]
    draw.polygon([(0, edge), *drift, (edge, edge)], fill=255)
    return _downsample(canvas)


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    edge = WORLD_SIZE * SUPERSAMPLING
    canvas = Image.new("L", (edge, edge), 0)
    return canvas, ImageDraw.Draw(canvas)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: int) -> None:
    box = [SUPERSAMPLING * v for v in (x - radius, y - radius, x + radius, y + radius)]
    draw.ellipse(box, fill=fill)


def _downsample(canvas: Image.Image) -> np.ndarray:
    grid = np.asarray(canvas, dtype=np.float64) / 255
    n, s = WORLD_SIZE, SUPERSAMPLING
    return grid.reshape(n, s, n, s).mean(axis=(1, 3))


def _placed(centred: np.ndarray, place: str) -> np.ndarray:
    """Move a mask drawn in the centre; objects stay inside the frame, so rolling wraps only zeros."""
    x, y = PLACES[place]
    return np.roll(centred, (y - WORLD_SIZE // 2, x - WORLD_SIZE // 2), axis=(0, 1))


def _polygon(shape: str, radius: float) -> list[tuple[float, float]]:
    """Corners of a shape of about equal visual weight, in supersampled pixels, centred."""
    unit = {
        "circle": lambda: _regular(96, 0.94),
        "square": lambda: [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
        "triangle": lambda: [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)],
        "star": lambda: _star(1.08, 0.46),
        "heart": _heart,
    }[shape]()
    centre = WORLD_SIZE / 2
    return [(SUPERSAMPLING * (centre + radius * x), SUPERSAMPLING * (centre + radius * y)) for x, y in unit]


def _regular(corners: int, radius: float) -> list[tuple[float, float]]:
    angles = [2 * math.pi * k / corners for k in range(corners)]
    return [(radius * math.sin(a), -radius * math.cos(a)) for a in angles]


def _star(outer: float, inner: float) -> list[tuple[float, float]]:
    radii = (outer, inner) * 5
    return [(r * math.sin(math.pi * k / 5), 0.06 - r * math.cos(math.pi * k / 5)) for k, r in enumerate(radii)]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * k / 96 for k in range(96)]
    x = [16 * math.sin(a) ** 3 for a in angles]
    y = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(u / 16.5, -(v + 2.5) / 16.0) for u, v in zip(x, y, strict=True)]
