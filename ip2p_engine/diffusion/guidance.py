"""The paper's dual guidance and conditioning dropout, as tensor functions and as a denoiser over branches.

Branches are c = (image, text), i = (image, no text), u = (no image, no text) and t = (no image, text). A guidance is
made over something that gives them by name and is then a denoiser itself, so guidances of one's own are short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..errors import ConfigError

__all__ = [
    "BRANCHES",
    "Branches",
    "Denoiser",
    "DualGuidance",
    "Guidance",
    "check_scale",
    "conditioning_dropout",
    "dual_guidance",
    "needed_branches",
]

BRANCHES = ("c", "i", "u")


class Denoiser(Protocol):
    """Predicts the clean latent of x (B, C, h, w) at noise level sigma, under a condition of its own kind."""

    def __call__(self, x: Tensor, sigma: float, cond: Any) -> Tensor: ...


class Branches(Protocol):
    """Predicts the clean latents of the named branches."""

    def __call__(self, x: Tensor, sigma: float, cond: Any, names: Sequence[str]) -> dict[str, Tensor]: ...


Guidance = Callable[[Branches], Denoiser]
"""Makes a denoiser over branches; ``lambda branches: DualGuidance(branches, 7.5, 1.5)`` is one."""


class DualGuidance:
    """Equation 3 of Brooks et al. (2023) as a denoiser; branches that cannot change the result are not computed."""

    def __init__(self, branches: Branches, text_cfg: float, image_cfg: float) -> None:
        """Raises ConfigError for a scale that is not a finite number of at least 0."""
        self.text_cfg, self.image_cfg = check_scale("text_cfg", text_cfg), check_scale("image_cfg", image_cfg)
        self.branches, self._needed = branches, needed_branches(self.text_cfg, self.image_cfg)

    def __call__(self, x: Tensor, sigma: float, cond: Any) -> Tensor:
        """The guided clean latent, (B, C, h, w)."""
        return dual_guidance(self.branches(x, sigma, cond, self._needed), self.text_cfg, self.image_cfg)


def dual_guidance(branches: dict[str, Tensor], text_cfg: float, image_cfg: float) -> Tensor:
    """u + s_I (i - u) + s_T (c - i), equation 3 of Brooks et al. (2023).

    ``branches`` holds at least ``needed_branches(text_cfg, image_cfg)``, tensors of one shape: predictions of the
    clean latent, of the noise or of v (the rule is linear, its weights sum to 1). A branch whose weight is 0 is
    never read, so it need not be computed; that changes nothing but the cost.
    """
    if text_cfg == image_cfg:
        return _between(branches, "u", "c", text_cfg)
    towards_image = _between(branches, "u", "i", image_cfg)
    if text_cfg == 0:
        return towards_image
    return towards_image + text_cfg * (branches["c"] - branches["i"])


def needed_branches(text_cfg: float, image_cfg: float) -> tuple[str, ...]:
    """The branches whose weight is not 0.

    s_I = 1 needs no u; s_T = s_I no i; s_T = 0 no c; both 1 only c; both 0 only u.
    """
    return tuple(name for name, weight in _weights(text_cfg, image_cfg).items() if weight != 0)


def conditioning_dropout(r: Tensor, probability: float = 0.05) -> tuple[Tensor, Tensor]:
    """(drop text, drop image) for uniforms r of shape (B,): r < 2p drops the text, p <= r < 3p the image.

    So p of all examples lose only the text, p both, p only the image (paper, section 3.2.1). Returns bool, (B,).
    """
    return r < 2 * probability, (r >= probability) & (r < 3 * probability)


def check_scale(name: str, value: float) -> float:
    """The value, if it is a finite number of at least 0; raises ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name} is {value!r}; give a finite number of at least 0")
    return float(value)


def _weights(text_cfg: float, image_cfg: float) -> dict[str, float]:
    """The factor of each branch once equation 3 is multiplied out."""
    return {"c": text_cfg, "i": image_cfg - text_cfg, "u": 1 - image_cfg}


def _between(branches: dict[str, Tensor], start: str, end: str, scale: float) -> Tensor:
    """start + scale (end - start), reading only what the scale needs."""
    if scale == 1:
        return branches[end]
    if scale == 0:
        return branches[start]
    return branches[start] + scale * (branches[end] - branches[start])
