"""Editing inside a mask alone: outside it every step starts and ends at the source."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from .guidance import Denoiser

__all__ = ["Masked", "latent_mask"]


class Masked:
    """A denoiser whose results outside a mask are the source's latent, as ComfyUI's KSamplerX0Inpaint has it.

    There x is the source at the noise level, by the walk's first noise, and the clean latent is the source.
    """

    def __init__(self, denoiser: Denoiser, free: Tensor, source: Tensor, noise: Tensor) -> None:
        """``free`` (B, 1, h, w) is 1 where something may change; ``source`` (B, C, h, w) a clean latent."""
        self._denoiser, self._free, self._source, self._noise = denoiser, free, source, noise

    def __call__(self, x: Tensor, sigma: float, cond: Any) -> Tensor:
        """The clean latent, (B, C, h, w)."""
        kept = 1 - self._free
        inside = self._denoiser(x * self._free + (self._source + self._noise * sigma) * kept, sigma, cond)
        return inside * self._free + self._source * kept


def latent_mask(pixels: Tensor, latent: Tensor) -> Tensor:
    """A mask of pixels (B, 1, H, W) as one of a latent's size and device, bilinear as ComfyUI's."""
    return functional.interpolate(pixels, size=latent.shape[-2:], mode="bilinear").to(latent)
