"""The source's detail in an edited picture: a local colour transform from what was seen to what was made.

An edit happens at some 512 pixels. Around each pixel the 3 x 3 matrix and offset are fitted that lead from the source's
own round trip through the autoencoder to the edit (a guided filter with colours, He et al. 2013, equations 14 to 19),
and applied to the full-size source. Where no such transform leads there, the edit made something new, and its own
pixels count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from .images import frame_of

__all__ = ["with_detail"]

RADIUS, RIDGE = 12, 2e-4
GATE_RADIUS = 4
OPEN, SHUT = 0.15, 0.35  # the share of the edit's variance that the fit leaves
NOISE = 0.02  # standard deviation, of a range of 1, that an autoencoder adds and no transform explains
BAND, WIDE = 256, 4096  # rows of the full-size picture in work at one time, a quarter of them where it is wider


def with_detail(round_trip: Image.Image, edited: Image.Image, source: Image.Image) -> Image.Image:
    """The edited picture in the source's frame, with the source's detail where a local colour transform explains it.

    ``round_trip`` and ``edited`` are RGB at the size that was edited, ``source`` is the whole picture.
    """
    maps = _fit(_tensor(round_trip), _tensor(edited))
    frame = _Frame(maps, source.size)
    made, rows = Image.new("RGB", source.size), BAND if source.width <= WIDE else BAND // 4
    for top in range(0, source.height, rows):
        made.paste(Image.fromarray(frame.blend(source, top, rows)), (0, top))
    return made


@dataclass(frozen=True)
class _Maps:
    """Per pixel of the small picture: the transform (12, h, w), the edit (3, h, w), and how far it counts (1, h, w)."""

    transform: np.ndarray
    edited: np.ndarray
    new: np.ndarray


def _fit(seen: Tensor, made: Tensor) -> _Maps:
    """Ridge regression in boxes; coefficients and the share of what is new."""
    count = seen.shape[-2:]
    mean_seen, mean_made = _box(seen), _box(made)
    square = torch.stack([_box(seen[i] * seen) - mean_seen[i] * mean_seen for i in range(3)])
    cross = torch.stack([_box(seen[i] * made) - mean_seen[i] * mean_made for i in range(3)])
    ridge = RIDGE * torch.eye(3, dtype=seen.dtype)
    matrix = torch.linalg.solve(square.permute(2, 3, 0, 1) + ridge, cross.permute(2, 3, 0, 1))  # h, w, in, out
    offset = mean_made - torch.einsum("ihw,hwij->jhw", mean_seen, matrix)
    matrix = _box(matrix.reshape(*count, 9).permute(2, 0, 1), RADIUS // 2)
    offset = _box(offset, RADIUS // 2)
    fitted = torch.einsum("ihw,ijhw->jhw", seen, matrix.reshape(3, 3, *count)) + offset
    left = _box((made - fitted).square(), GATE_RADIUS).mean(0, keepdim=True)
    spread = (_box(made.square(), GATE_RADIUS) - _box(made, GATE_RADIUS).square()).mean(0, keepdim=True)
    share = ((left / (spread.clamp(min=0) + NOISE**2) - OPEN) / (SHUT - OPEN)).clamp(0, 1)
    new = share * share * (3 - 2 * share)
    transform = torch.cat([matrix, offset])
    return _Maps(transform.float().numpy(), made.float().numpy(), new.float().numpy())


def _box(values: Tensor, radius: int = RADIUS) -> Tensor:
    """The mean over a window, which is smaller at the borders."""
    padded = functional.pad(values[None], (radius,) * 4, mode="replicate")
    return functional.avg_pool2d(padded, 2 * radius + 1, 1)[0]


class _Frame:
    """Small maps as the rows of a full-size picture, whose crop they were."""

    def __init__(self, maps: _Maps, size: tuple[int, int]) -> None:
        self._size = size
        h, w = maps.new.shape[-2:]
        padding, self._box = frame_of((w, h), size)
        self._transform = [_plane(plane, padding) for plane in maps.transform]
        self._edited = [_plane(plane, padding) for plane in maps.edited]
        self._new = _plane(maps.new[0], padding)

    def blend(self, source: Image.Image, top: int, height: int) -> np.ndarray:
        """So many rows from ``top`` on, (rows, W, 3), uint8."""
        bottom = min(top + height, self._size[1])
        rows = self._rows(top, bottom)
        pixels = np.asarray(source.crop((0, top, self._size[0], bottom)), dtype=np.float32) / 255
        new = rows(self._new, Image.Resampling.BILINEAR)
        result = np.empty_like(pixels)
        for channel in range(3):
            planes = [self._transform[3 * i + channel] for i in range(3)] + [self._transform[9 + channel]]
            matrix = [rows(plane, Image.Resampling.BILINEAR) for plane in planes]
            value = matrix[3]
            for i in range(3):
                value = value + pixels[..., i] * matrix[i]
            edited = rows(self._edited[channel], Image.Resampling.LANCZOS)
            result[..., channel] = value.clip(0, 1) + new * (edited.clip(0, 1) - value.clip(0, 1))
        return np.rint(result * 255).astype(np.uint8)

    def _rows(self, top: int, bottom: int) -> Callable[[Image.Image, Image.Resampling], np.ndarray]:
        left, upper, right, lower = self._box
        scale = (lower - upper) / self._size[1]
        # Pillow's filters read beyond the box, so bands join without a seam.
        box = (left, upper + top * scale, right, upper + bottom * scale)
        size = (self._size[0], bottom - top)
        return lambda plane, method: np.asarray(plane.resize(size, method, box=box))


def _plane(values: np.ndarray, padding: tuple[int, int]) -> Image.Image:
    x, y = padding
    return Image.fromarray(np.pad(values, ((y, y), (x, x)), mode="symmetric"))


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float64) / 255).permute(2, 0, 1)
