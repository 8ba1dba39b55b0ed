"""Numbers of two pictures without any network: L1, L2, PSNR, SSIM, and the same away from where an edit was wanted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, ImageError

__all__ = ["background", "distances", "evaluate_extra", "same_size", "unit"]

SSIM_WINDOW = 11


def unit(image: Image.Image) -> Tensor:
    """An RGB picture as float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def same_size(image: Image.Image, other: Image.Image) -> Image.Image:
    """The picture at the other's size, Pillow's bicubic: how MagicBrush's evaluation makes sizes equal."""
    return image if image.size == other.size else image.resize(other.size, Image.Resampling.BICUBIC)


def distances(image: Image.Image, other: Image.Image) -> dict[str, float]:
    """l1 and l2 (mean absolute and mean squared difference in [0, 1]), psnr (dB) and ssim; sizes are made equal."""
    a, b = unit(same_size(image, other)), unit(other)
    squared = float(((a - b) ** 2).mean())
    ssim = float(_ssim_map(a, b)[:, _inner(a)].mean())
    return {"l1": float((a - b).abs().mean()), "l2": squared, "psnr": _psnr(squared), "ssim": ssim}


def background(source: Image.Image, edited: Image.Image, mask: Image.Image) -> dict[str, float]:
    """How well an edit kept what lies outside a mask: psnr, ssim and l2 of source and edited over its black pixels.

    ``mask`` is white (128 and more) where the edit was wanted. Only pixels outside count, so a large mask does not
    flatter; SSIM's windows reach 5 pixels into it. Raises ImageError for a mask without an outside.
    """
    outside = torch.from_numpy(np.array(mask.convert("L").resize(source.size, Image.Resampling.NEAREST)) < 128)
    if not outside.any():
        raise ImageError("the mask is white everywhere, so nothing is outside the edit; give one with black parts")
    a, b = unit(source), unit(same_size(edited, source))
    squared = float(((a - b) ** 2)[:, outside].mean())
    inner = outside & _inner(a)
    chosen = inner if inner.any() else outside
    ssim = float(_ssim_map(a, b)[:, chosen].mean())
    return {"background_l2": squared, "background_psnr": _psnr(squared), "background_ssim": ssim}


def _psnr(squared: float) -> float:
    """10 log10(1 / MSE), in dB; equal pictures give infinity."""
    return -10 * math.log10(squared) if squared > 0 else math.inf


def _inner(picture: Tensor) -> Tensor:
    """Where the whole window lies inside the picture: (H, W) bool."""
    inside, edge = torch.zeros(picture.shape[-2:], dtype=torch.bool), SSIM_WINDOW // 2
    inside[edge:-edge, edge:-edge] = True
    return inside


def _ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """SSIM at each pixel, (3, H, W): Wang et al. (2004), Gaussian window of 11, sigma 1.5, range 1."""
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ImageError(f"SSIM looks at windows of {SSIM_WINDOW} pixels and the picture is {tuple(a.shape[-2:])}")
    metric = evaluate_extra("torchmetrics.functional.image").structural_similarity_index_measure
    _, full = metric(a[None], b[None], data_range=1.0, kernel_size=SSIM_WINDOW, sigma=1.5, return_full_image=True)
    return full[0]


def evaluate_extra(module: str) -> Any:
    """A module of the extra [evaluate]; raises ConfigError, naming it, where it is missing."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(f"this measure needs {package}, which is missing; pip install {package}") from error
