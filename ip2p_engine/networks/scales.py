"""Guidance scales as inputs of a network: what one that was distilled for many of them is told beside the time."""

from __future__ import annotations

from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

__all__ = ["SCALES_WIDTH", "scales_embedding"]

SCALES_WIDTH = 128
FASTEST = 10.0  # radians a unit of a scale, so that 7.5 and 7.6 can be told apart


def scales_embedding(scales: Tensor, width: int = SCALES_WIDTH) -> Tensor:
    """Rows (s_T, s_I), (B, 2), as sines and cosines, (B, width): half of the width for each scale."""
    rows = FASTEST * scales.float().flatten()
    return get_timestep_embedding(rows, width // 2).view(len(scales), width)
