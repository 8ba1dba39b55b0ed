"""Deep features kept for some evaluations: between two noise levels that lie close they change little.

The idea is DeepCache's (Ma et al. 2024): what comes out of the deeper levels is kept, and only the finest level is
computed anew. What is kept lies beside the call, and nothing of it in the network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import AttentionCall
from .forward import TimeRows, forward

__all__ = ["FeatureCache"]


class FeatureCache:
    """Evaluates a UNet whole at every ``keep``-th call, and at the others at its finest level alone."""

    def __init__(self, keep: int) -> None:
        self._keep, self._calls, self._deep = keep, 0, torch.empty(0)

    def __call__(self, unet: Any, inputs: Tensor, times: TimeRows, call: AttentionCall) -> Tensor:
        """The UNet's output for inputs (B, C, h, w); one shape for all calls."""
        kept = self._deep if self._calls % self._keep else None
        output, self._deep = forward(unet, inputs, times, call, deep=kept)
        self._calls += 1
        return output
