"""Guidance of one's own: a denoiser over the branches c (text and picture), i (picture), u (neither) and t (text).

Here the formula of InstructDiffusion (Geng et al. 2023): half of the way starts at the picture alone, half at the text.
python own_guidance.py PICTURE "make it night" RESULT [CHECKPOINT]
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from ip2p_engine import Branches, InstructPix2Pix


class TextAndPicture:
    """0.5 (i + t) + s_T (c - i) + s_I (c - t)."""

    def __init__(self, branches: Branches) -> None:
        self.branches = branches

    def __call__(self, x: Tensor, sigma: float, cond: Any) -> Tensor:
        b = self.branches(x, sigma, cond, ["c", "i", "t"])
        return 0.5 * (b["i"] + b["t"]) + 5.0 * (b["c"] - b["i"]) + 1.25 * (b["c"] - b["t"])


def main(picture: str, instruction: str, result: str, checkpoint: str = "embedded") -> None:
    edited = InstructPix2Pix.load(checkpoint).edit(picture, instruction, guidance=TextAndPicture)[0]
    edited.image.save(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
