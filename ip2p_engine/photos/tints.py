"""Edits of what has one colour: hues by name, how much of them a picture has, and another hue in their place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .tones import soft_step

__all__ = ["HUES", "colour_share", "membership", "tint"]

HUES = {
    "red": (-15.0, 15.0, 0.0),
    "orange": (15.0, 42.0, 30.0),
    "yellow": (42.0, 70.0, 56.0),
    "green": (70.0, 165.0, 120.0),
    "blue": (165.0, 260.0, 225.0),
    "purple": (260.0, 345.0, 290.0),
}
"""(first, last, pure) angle of each name on the colour circle, in degrees."""
SOFT_EDGE = 6.0
SMOOTHING = 5


def membership(picture: Tensor, colour: str) -> Tensor:
    """How much each pixel of an RGB picture in [0, 1] has a colour, (1, H, W); grey and black have none."""
    first, last, _ = HUES[colour]
    hue, saturation, value = _hsv(picture)
    centre, width = (first + last) / 2, (last - first) / 2
    distance = (torch.remainder(hue - centre + 180, 360) - 180).abs()
    inside = 1 - soft_step(distance, width - SOFT_EDGE, width + SOFT_EDGE)
    inside = inside * soft_step(saturation, 0.2, 0.35) * soft_step(value, 0.12, 0.22)
    return F.avg_pool2d(inside[None], SMOOTHING, stride=1, padding=SMOOTHING // 2, count_include_pad=False)[0]


def colour_share(picture: Tensor, colour: str) -> float:
    """Which part of the picture has a colour."""
    return float(membership(picture, colour).mean())


def tint(picture: Tensor, colour: str, target: str) -> Tensor:
    """What has ``colour`` gets the hue of ``target``; saturation and value stay."""
    mask = membership(picture, colour)
    _, saturation, value = _hsv(picture)
    turned = value * (1 - saturation * (1 - _pure(HUES[target][2])))
    return picture * (1 - mask) + turned * mask


def _hsv(picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in degrees, saturation and value in [0, 1], each (1, H, W)."""
    red, green, blue = picture
    value, low = picture.amax(0), picture.amin(0)
    chroma = value - low
    safe = chroma.clamp(min=1e-6)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    saturation = chroma / value.clamp(min=1e-6)
    return (60 * sector)[None], saturation[None], value[None]


def _pure(hue: float) -> Tensor:
    """The full colour of a hue in degrees, (3, 1, 1)."""
    offsets = torch.tensor([5.0, 3.0, 1.0]) + hue / 60
    k = torch.remainder(offsets, 6)
    return (1 - torch.minimum(k, 4 - k).clamp(0, 1)).view(3, 1, 1)
