"""What suits the embedded models where the paper's numbers, made for Stable Diffusion and ViT-L/14, do not."""

from __future__ import annotations

from ..p2p.generator import PairConfig

__all__ = ["EMBEDDED_PAIRS"]

EMBEDDED_PAIRS = PairConfig(
    steps=8,
    sampler="ddim",
    p2p_range=(0.1, 0.9),
    cfg_range=(2.0, 4.0),
    edited_prompt_start=0.35,
)
"""Measured in docs/pairs.md. w of 7.5 to 15 burns a miniature's colours, and its layout settles in the first steps."""
