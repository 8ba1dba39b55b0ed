"""The photographs of the world, their licences and files, and random views of them; and pictures of dead leaves."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import DatasetError
from ..images import open_image

__all__ = [
    "FREE_LICENCES",
    "PhotoPool",
    "Photograph",
    "SPLITS",
    "catalogue",
    "dead_leaves",
    "demo_picture",
    "find_picture",
    "jitter",
    "load_pixels",
    "reduced",
]

HALVINGS_PER_OCTAVE = 2
FINEST_SIDE = 1400
SPLITS = ("train", "demo", "held-out")
FREE_LICENCES = ("public-domain", "CC0-1.0", "CC-BY-1.0", "CC-BY-2.0", "CC-BY-3.0", "CC-BY-4.0")
"""What pictures of the split ``train`` may be licensed under: shipped weights saw no others."""
LARGEST_SIDE = 1600


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """One picture of the catalogue: ``package`` is "debian:NAME" or "pypi:REQUIREMENT", ``member`` a file of it."""

    key: str
    split: str
    licence: str
    package: str
    member: str
    title: str
    author: str


@lru_cache(maxsize=1)
def catalogue() -> tuple[Photograph, ...]:
    """All photographs, training ones first."""
    text = resources.files(__package__).joinpath("pictures.tsv").read_text(encoding="utf-8")
    return tuple(Photograph(**row) for row in csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def demo_picture(key: str) -> Path:
    """One of the four photographs that ship (split ``demo``); no network was trained on them."""
    return Path(str(resources.files(__package__).joinpath("demo").joinpath(f"{key}.jpg")))


def find_picture(folder: Path, key: str) -> Path:
    """The gathered file of a photograph. Raises DatasetError if it was not gathered."""
    path = folder / f"{key}.png"
    if not path.exists():
        raise DatasetError(f"{path} does not exist; gather the photographs first (ip2p photos gather {folder})")
    return path


def load_pixels(path: Path) -> Tensor:
    """RGB, uint8, (3, H, W). Raises ImageError."""
    return torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1).contiguous()


def reduced(picture: Image.Image) -> Image.Image:
    """At most 1,600 pixels a side: more detail than a crop of 256 pixels can use."""
    picture = picture.convert("RGB")
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return picture


class PhotoPool:
    """The photographs of some splits at several scales, ready to be cut from.

    A photograph's smallest scale has a short side of about ``smallest`` pixels, its largest is the picture itself; two
    scales an octave. Larger pictures are drawn more often, by the square root of their side.
    """

    def __init__(self, folder: Path, splits: Sequence[str], *, smallest: int) -> None:
        self.keys = [photo.key for photo in catalogue() if photo.split in splits]
        self.levels = [_levels(load_pixels(find_picture(folder, key)), smallest) for key in self.keys]
        sides = torch.tensor([float(min(levels[0].shape[1:])) for levels in self.levels])
        self.weights = sides.sqrt()

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """One view, RGB in [0, 1], (3, size, size)."""
        index = int(torch.multinomial(self.weights, 1, generator=generator))
        return self.draw_from(index, size, generator)

    def draw_from(self, index: int, size: int, generator: torch.Generator) -> Tensor:
        """A view of one photograph; half of them are mirrored."""
        levels = [level for level in self.levels[index] if min(level.shape[1:]) >= size]
        level = levels[_integer(len(levels), generator)] if levels else self.levels[index][0]
        level = level if levels else _enlarged(level, size)
        y = _integer(level.shape[1] - size + 1, generator)
        x = _integer(level.shape[2] - size + 1, generator)
        view = level[:, y : y + size, x : x + size].float() / 255
        return view.flip(-1) if _integer(2, generator) else view


def jitter(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Another exposure, contrast, saturation and hue: gains a channel, a power, and a mix with grey."""
    draws = torch.rand(6, generator=generator)
    gains = 0.75 + 0.5 * draws[:3].view(3, 1, 1)
    grey = picture.mean(0, keepdim=True)
    saturated = grey + (0.4 + 1.2 * draws[3]) * (picture - grey)
    shuffled = saturated[torch.randperm(3, generator=generator)] if draws[5] < 0.25 else saturated
    return (shuffled.clamp(0, 1) ** (0.6 + 0.9 * draws[4]) * gains).clamp(0, 1)


def dead_leaves(size: int, generator: torch.Generator) -> Tensor:
    """Discs and boxes over one another, radii as 1 / r**3 (Lee et al. 2001): the statistics of natural edges."""
    count = 60
    draws = torch.rand(count, 9, generator=generator)
    radii = (draws[:, 0] * (1 / 9 - 1 / size**2) + 1 / size**2).rsqrt()
    y = torch.arange(size).view(-1, 1) + 0.5
    x = torch.arange(size).view(1, -1) + 0.5
    picture = draws[0, 3:6].view(3, 1, 1).expand(3, size, size)
    order = radii.argsort(descending=True)
    for leaf in order.tolist():
        dy, dx = y - size * draws[leaf, 1], x - size * draws[leaf, 2]
        angle = math.pi * float(draws[leaf, 6])
        u, v = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
        box = torch.maximum(u.abs(), v.abs() * (1 + 2 * draws[leaf, 7]))
        distance = (u * u + v * v).sqrt() if draws[leaf, 8] < 0.5 else box
        inside = (radii[leaf] + 0.5 - distance).clamp(0, 1)
        shade = 1 + 0.3 * (draws[leaf, 7] - 0.5) * u / radii[leaf]
        colour = (draws[leaf, 3:6].view(3, 1, 1) * shade).clamp(0, 1)
        picture = picture * (1 - inside) + colour * inside
    return picture


def _levels(pixels: Tensor, smallest: int) -> list[Tensor]:
    """The picture and its reductions, finest first, uint8."""
    short = min(pixels.shape[1:])
    largest = min(1.0, FINEST_SIDE / short)
    octaves = max(0.0, math.log2(short * largest / smallest))
    count = int(HALVINGS_PER_OCTAVE * octaves) + 1
    scales = [largest * 2 ** (-n / HALVINGS_PER_OCTAVE) for n in range(count)]
    return [_reduced(pixels, scale) for scale in scales]


def _reduced(pixels: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return pixels
    small = F.interpolate(pixels[None].float(), scale_factor=scale, mode="bicubic", antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8)


def _enlarged(pixels: Tensor, size: int) -> Tensor:
    scale = size / min(pixels.shape[1:])
    height, width = (max(size, round(side * scale)) for side in pixels.shape[1:])
    large = F.interpolate(pixels[None].float(), size=(height, width), mode="bicubic", antialias=True)
    return large[0].round().clamp(0, 255).to(torch.uint8)


def _integer(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))
