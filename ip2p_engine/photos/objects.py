"""Flat objects that are laid on photographs: shapes in colours, on a grid of 8 pixels, which is the latent grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["COLOURS", "GRID", "LARGE", "REGULAR", "SHAPES", "Thing", "draw_things", "opacity"]

GRID = 8
REGULAR = 48
LARGE = 80
SUPERSAMPLING = 4
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring")
COLOURS = {
    "red": (0.90, 0.08, 0.10),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.92, 0.10),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.10, 0.25, 0.90),
    "purple": (0.60, 0.15, 0.75),
    "white": (0.97, 0.97, 0.97),
    "black": (0.04, 0.04, 0.04),
}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: its shape, its colour, its side, and the pixel of its top left corner, all multiples of 8."""

    shape: str
    colour: str
    size: int = REGULAR
    y: int
    x: int

    def moved(self, *, y: int = 0, x: int = 0) -> Thing:
        return replace(self, y=self.y + y, x=self.x + x)

    def resized(self, size: int) -> Thing:
        """Around the same centre."""
        shift = (self.size - size) // 2
        return replace(self, size=size, y=self.y + shift, x=self.x + shift)

    def fits(self, height: int, width: int) -> bool:
        return 0 <= self.y <= height - self.size and 0 <= self.x <= width - self.size

    def overlaps(self, other: Thing) -> bool:
        """Whether their boxes have a pixel in common."""
        apart_y = self.y + self.size <= other.y or other.y + other.size <= self.y
        apart_x = self.x + self.size <= other.x or other.x + other.size <= self.x
        return not (apart_y or apart_x)


def draw_things(picture: Tensor, things: tuple[Thing, ...]) -> Tensor:
    """The picture, (3, H, W) in [0, 1], with objects laid on it, the last one on top."""
    if things:
        picture = picture.clone()
    for thing in things:
        area = picture[:, thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]
        area.lerp_(colour_of(thing.colour).expand_as(area), opacity(thing.shape, thing.size))
    return picture


def colour_of(name: str) -> Tensor:
    return torch.tensor(COLOURS[name]).view(3, 1, 1)


@lru_cache(maxsize=64)
def opacity(shape: str, size: int) -> Tensor:
    """Antialiased, (1, size, size) in [0, 1]."""
    fine = size * SUPERSAMPLING
    line = (torch.arange(fine) + 0.5) / fine * 2 - 1
    inside = _inside(shape, line.view(-1, 1), line.view(1, -1)).float()
    return F.avg_pool2d(inside[None, None], SUPERSAMPLING)[0]


def _inside(shape: str, y: Tensor, x: Tensor) -> Tensor:
    """Whether points of the square [-1, 1] x [-1, 1] (y downwards) belong to a shape."""
    radius = (x * x + y * y).sqrt()
    if shape == "circle":
        return radius <= 0.97
    if shape == "ring":
        return (radius <= 0.97) & (radius >= 0.5)
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) <= 0.86
    if shape == "triangle":
        return (y <= 0.85) & (y >= -0.95 + 1.8 * x.abs())
    if shape == "cross":
        return (torch.minimum(x.abs(), y.abs()) <= 0.33) & (torch.maximum(x.abs(), y.abs()) <= 0.95)
    if shape == "heart":
        u, v = x * 1.2, -y * 1.2 + 0.15
        return (u * u + v * v - 1) ** 3 - u * u * v**3 <= 0
    return _star(y, x, radius)


def _star(y: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """Five points; the inner radius is 0.45 of the outer one."""
    outer, inner, sector = 0.99, 0.45, 2 * torch.pi / 5
    angle = torch.remainder(torch.atan2(x.expand_as(radius), -y.expand_as(radius)), sector)
    angle = torch.minimum(angle, sector - angle)
    # the edge from the point (outer, 0) to the notch (inner, sector / 2) in polar coordinates
    half = torch.tensor(sector / 2)
    px, py = radius * angle.cos(), radius * angle.sin()
    dx, dy = inner * half.cos() - outer, inner * half.sin()
    return (px - outer) * dy - py * dx <= 0
