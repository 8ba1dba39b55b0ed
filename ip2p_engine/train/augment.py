"""Sizes, crops and mirrors of training pairs: one draw for both pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .config import TrainConfig

__all__ = ["Crop", "bucket_shapes", "crop_mask", "crop_pair", "draw_crop", "nearest_shape", "size_ids"]

Size = tuple[int, int]
MOST_ASPECT = 2.0


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Resize to ``resized``, cut ``size`` at (left, top), mirror. Sizes are (width, height) in pixels."""

    original: Size
    resized: Size
    left: int
    top: int
    size: Size
    mirrored: bool


def draw_crop(original: Size, size: Size, config: TrainConfig, generator: torch.Generator) -> Crop:
    """The paper's augmentation: cover the crop with 256 .. 288 / 256 of its size, cut anywhere, mirror half."""
    low, high = config.resize if not config.buckets else _relative(config)
    side = int(torch.randint(low, high + 1, (), generator=generator))
    scale = max(size[0] / original[0], size[1] / original[1]) * side / config.resolution
    width, height = (max(least, round(full * scale)) for full, least in zip(original, size, strict=True))
    left = int(torch.randint(width - size[0] + 1, (), generator=generator))
    top = int(torch.randint(height - size[1] + 1, (), generator=generator))
    mirrored = bool(torch.rand((), generator=generator) < config.flip)
    return Crop(original=original, resized=(width, height), left=left, top=top, size=size, mirrored=mirrored)


def crop_pair(pictures: Sequence[Image.Image], crop: Crop) -> Tensor:
    """Pictures under one crop: uint8, shape (pictures, 3, height, width)."""
    box = (crop.left, crop.top, crop.left + crop.size[0], crop.top + crop.size[1])
    done = []
    for picture in pictures:
        resized = picture if picture.size == crop.resized else picture.resize(crop.resized, Image.Resampling.LANCZOS)
        cut = resized.crop(box)
        done.append(np.asarray(ImageOps.mirror(cut) if crop.mirrored else cut))
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).contiguous()


def crop_mask(mask: Image.Image | None, crop: Crop) -> Tensor:
    """A pair's mask under its crop: uint8, shape (1, height, width); white where there is none."""
    if mask is None:
        return torch.full((1, crop.size[1], crop.size[0]), 255, dtype=torch.uint8)
    return crop_pair([mask.convert("RGB")], crop)[0, :1]


def size_ids(crop: Crop) -> Tensor:
    """SDXL's six numbers: original height and width, top and left of the crop, target height and width; (6,)."""
    (width, height), (w, h) = crop.original, crop.size
    return torch.tensor([height, width, crop.top, crop.left, h, w], dtype=torch.float32)


def bucket_shapes(resolution: int) -> list[Size]:
    """Shapes of about resolution^2 pixels up to 2 : 1, sides multiples of 64 (of 16 below 256)."""
    unit = 64 if resolution >= 256 else 16
    area = resolution**2
    widths = range(unit, 2 * resolution + 1, unit)
    shapes = [(width, max(unit, int(area / width // unit) * unit)) for width in widths]
    return [shape for shape in shapes if max(shape) <= MOST_ASPECT * min(shape)]


def nearest_shape(size: Size, shapes: Sequence[Size]) -> int:
    """The shape whose aspect is nearest in ratio."""
    aspect = math.log(size[0] / size[1])
    return min(range(len(shapes)), key=lambda n: abs(math.log(shapes[n][0] / shapes[n][1]) - aspect))


def _relative(config: TrainConfig) -> Size:
    """Bounds of at least the resolution, since a bucket's crop must be covered."""
    low, high = config.resize
    return max(low, config.resolution), max(high, config.resolution)
