"""Edits with exact truth, a formula each, from RGB in [0, 1], (3, H, W), to the same.

Tones change the whole picture, tints what has one colour.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "HUES",
    "TONES",
    "colour_share",
    "luminance",
    "membership",
    "soft_step",
    "tint",
]

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
FLAKE_CELL = 16
FLAKE_SHARE = 0.45


def luminance(picture: Tensor) -> Tensor:
    """Rec. 601 luma, (1, H, W)."""
    return (picture * picture.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)


def soft_step(value: Tensor, start: float, end: float) -> Tensor:
    """0 below ``start``, 1 above ``end``, a straight line between."""
    return ((value - start) / (end - start)).clamp(0, 1)


def night(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Dim and blue, with little colour left."""
    return (0.6 * picture + 0.4 * luminance(picture)) * _colour(picture, 0.25, 0.32, 0.55)


def sunset(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Orange light that is strongest at the top."""
    light = 0.15 * _down(picture, 1.6, 0.6) * _colour(picture, 1.0, 0.45, 0.15)
    return (0.85 * picture * _colour(picture, 1.15, 0.85, 0.6) + light).clamp(0, 1)


def black_and_white(picture: Tensor, generator: torch.Generator) -> Tensor:
    return luminance(picture).expand(3, -1, -1)


def sepia(picture: Tensor, generator: torch.Generator) -> Tensor:
    return (luminance(picture) * _colour(picture, 1.07, 0.86, 0.62)).clamp(0, 1)


def fog(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Light grey that is thickest at the top, where things are far."""
    thickness = _down(picture, 0.8, 0.4)
    return picture * (1 - thickness) + 0.86 * thickness


def sketch(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Pencil on paper: luma divided by its own blur (the dodge of a darkroom)."""
    grey = luminance(picture).expand(3, -1, -1)
    lines = (grey / (_blur(grey, 13) + 0.02)).clamp(0, 1) ** 2.2
    return lines * _colour(picture, 0.98, 0.96, 0.9)


def painting(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Smooth areas in few strong colours, as oil on canvas."""
    smooth = _blur(picture, 7)
    grey = luminance(smooth)
    return ((((grey + 1.5 * (smooth - grey)) * 6).round() / 6) * 1.05).clamp(0, 1)


def snow(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Pale and bright, with flakes that fall anywhere."""
    pale = 0.5 * picture + 0.15 * luminance(picture) + _colour(picture, 0.31, 0.33, 0.36)
    flakes = _flakes(picture.shape[1], picture.shape[2], generator)
    return (pale * (1 - flakes) + flakes).clamp(0, 1)


def autumn(picture: Tensor, generator: torch.Generator) -> Tensor:
    """What is green turns orange and brown."""
    red, green, blue = picture
    leaves = torch.maximum(
        soft_step(green - torch.maximum(red, blue), 0, 1 / 6),
        soft_step(green - blue, 0, 1 / 3) * soft_step(green - red, -0.08, 1 / 6 - 0.08),
    )
    turned = torch.stack([1.15 * green, 0.55 * green, 0.4 * blue]).clamp(0, 1)
    return picture * (1 - leaves) + turned * leaves


def negative(picture: Tensor, generator: torch.Generator) -> Tensor:
    return 1 - picture


def warmer(picture: Tensor, generator: torch.Generator) -> Tensor:
    return (picture * _colour(picture, 1.2, 1.02, 0.75)).clamp(0, 1)


def colder(picture: Tensor, generator: torch.Generator) -> Tensor:
    return (picture * _colour(picture, 0.77, 0.98, 1.2)).clamp(0, 1)


TONES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "night": night,
    "sunset": sunset,
    "black and white": black_and_white,
    "sepia": sepia,
    "fog": fog,
    "sketch": sketch,
    "painting": painting,
    "snow": snow,
    "autumn": autumn,
    "negative": negative,
    "warmer": warmer,
    "colder": colder,
}


def _colour(picture: Tensor, red: float, green: float, blue: float) -> Tensor:
    return picture.new_tensor([red, green, blue]).view(3, 1, 1)


def _down(picture: Tensor, top: float, bottom: float) -> Tensor:
    """A ramp from the first row to the last, (1, H, 1)."""
    return torch.linspace(top, bottom, picture.shape[1]).view(1, -1, 1)


def _blur(picture: Tensor, size: int) -> Tensor:
    """A Gaussian of ``size`` taps whose standard deviation is a quarter of them; the border is mirrored."""
    offsets = torch.arange(size) - size // 2
    taps = torch.exp(-(offsets.float() ** 2) / (2 * (size / 4) ** 2))
    taps = taps / taps.sum()
    padded = F.pad(picture[None], (size // 2,) * 4, mode="reflect")[0][:, None]
    rows = F.conv2d(padded, taps.view(1, 1, 1, size))
    return F.conv2d(rows, taps.view(1, 1, size, 1))[:, 0]


def _flakes(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Round flakes of 2 to 4 pixels' radius, at most one a cell of 16 pixels; opacity, (1, H, W)."""
    rows, columns = -(-height // FLAKE_CELL), -(-width // FLAKE_CELL)
    draws = torch.rand(4, rows, columns, generator=generator)
    cells = draws.repeat_interleave(FLAKE_CELL, 1).repeat_interleave(FLAKE_CELL, 2)[:, :height, :width]
    y = (torch.arange(height) % FLAKE_CELL).view(-1, 1) + 0.5
    x = (torch.arange(width) % FLAKE_CELL).view(1, -1) + 0.5
    distance = ((y - 5 - 6 * cells[0]) ** 2 + (x - 5 - 6 * cells[1]) ** 2).sqrt()
    shown = (cells[3] < FLAKE_SHARE).float()
    return (shown * soft_step(2.5 + 2 * cells[2] - distance, 0, 1))[None]


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
