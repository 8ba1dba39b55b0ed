"""The paper's dual guidance and conditioning dropout, as tensor functions and as a denoiser over branches.

Branches are c = (image, text), i = (image, no text), u = (no image, no text) and t = (no image, text). A guidance is
made over something that gives them by name and is then a denoiser itself, so guidances of one's own are short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..errors import ConfigError

__all__ = [
    "BRANCHES",
    "Branches",
    "Denoiser",
    "DualGuidance",
    "FORMULAS",
    "Formula",
    "Guidance",
    "ProjectedGuidance",
    "Remembered",
    "Scale",
    "check_scale",
    "conditioning_dropout",
    "dual_guidance",
    "guidance_of",
    "instruct_diffusion",
    "needed_branches",
    "rescaled",
    "within",
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


Scale = float | Callable[[float], float]
"""A guidance scale, or what it is at a noise level sigma."""


def within(scale: float, low: float, high: float, elsewhere: float = 1.0) -> Callable[[float], float]:
    """A scale that acts from sigma ``low`` to ``high`` alone and is ``elsewhere`` otherwise (Kynkäänniemi et al. 2024).

    Where both scales are 1 only c is computed. Raises ConfigError for bounds that are not in order.
    """
    if not 0 <= low < high:
        raise ConfigError(f"the interval is {low} to {high}; give two noise levels, the lower first")
    return lambda sigma: scale if low <= sigma <= high else elsewhere


class DualGuidance:
    """Equation 3 of Brooks et al. (2023) as a denoiser; a step computes no branch that cannot change its result."""

    def __init__(
        self, branches: Branches, text_cfg: Scale, image_cfg: Scale, *, formula: Formula | None = None
    ) -> None:
        """``formula`` is another rule of two scales. Raises ConfigError for a scale that is no finite number >= 0."""
        self.branches, self._formula = branches, formula or FORMULAS["dual"]
        self._scales = {"text_cfg": text_cfg, "image_cfg": image_cfg}
        for name, scale in self._scales.items():
            if not callable(scale):
                check_scale(name, scale)

    def at(self, sigma: float) -> tuple[float, float]:
        """(s_T, s_I) at a noise level."""
        text_cfg, image_cfg = (
            check_scale(name, scale(sigma) if callable(scale) else scale) for name, scale in self._scales.items()
        )
        return text_cfg, image_cfg

    def __call__(self, x: Tensor, sigma: float, cond: Any) -> Tensor:
        """The guided clean latent, (B, C, h, w)."""
        scales = self.at(sigma)
        return self._formula.combine(self.branches(x, sigma, cond, self._formula.needed(*scales)), *scales)


class ProjectedGuidance(DualGuidance):
    """Dual guidance of which what is parallel to c is left out (APG, Sadat et al. 2024), so that it does not burn.

    guided = c + (s_T - 1) p(c - i) + (s_I - 1) p(i - u), which is equation 3 where p is the identity. p(d) is d without
    its part along c, and no longer than ``norm`` where that is above 0, sample by sample.
    """

    def __init__(
        self, branches: Branches, text_cfg: Scale, image_cfg: Scale, *, parallel: float = 0.0, norm: float = 0.0
    ):
        """``parallel``: the share of the parallel part that is kept, 0 to 1; 1 is equation 3."""
        super().__init__(branches, text_cfg, image_cfg)
        self._parallel, self._norm = check_scale("parallel", parallel), check_scale("norm", norm)

    def __call__(self, x: Tensor, sigma: float, cond: Any) -> Tensor:
        """The guided clean latent, (B, C, h, w)."""
        text_cfg, image_cfg = self.at(sigma)
        needed = {"c": True, "i": text_cfg != 1 or image_cfg != 1, "u": image_cfg != 1}
        found = self.branches(x, sigma, cond, [name for name, wanted in needed.items() if wanted])
        guided = c = found["c"]
        if text_cfg != 1:
            guided = guided + (text_cfg - 1) * self._projected(c - found["i"], c)
        if image_cfg != 1:
            guided = guided + (image_cfg - 1) * self._projected(found["i"] - found["u"], c)
        return guided

    def _projected(self, difference: Tensor, along: Tensor) -> Tensor:
        if self._norm:
            length = difference.flatten(1).norm(dim=1).clamp(min=1e-12)
            difference = difference * (self._norm / length).clamp(max=1)[:, None, None, None]
        flat = along.flatten(1)
        share = (difference.flatten(1) * flat).sum(1) / flat.square().sum(1).clamp(min=1e-12)
        return difference - (1 - self._parallel) * share[:, None, None, None] * along


class Remembered:
    """Branches that are not computed twice for one x: guidances that wrap one another share them."""

    def __init__(self, branches: Branches) -> None:
        self._branches = branches
        self._seen: tuple[Tensor, float, Any, dict[str, Tensor]] | None = None

    def __call__(self, x: Tensor, sigma: float, cond: Any, names: Sequence[str]) -> dict[str, Tensor]:
        seen = self._seen
        found = seen[3] if seen and seen[0] is x and seen[1:3] == (sigma, cond) else {}
        missing = [name for name in names if name not in found]
        if missing:
            found = {**found, **self._branches(x, sigma, cond, missing)}
            self._seen = (x, sigma, cond, found)
        return {name: found[name] for name in names}


def rescaled(guidance: Guidance, share: float) -> Guidance:
    """A guidance whose results get back the spread of c, to a share of 0 to 1 (Lin et al. 2024, section 3.4).

    share * guided std(c) / std(guided) + (1 - share) * guided, sample by sample. Raises ConfigError for another share.
    """
    if check_scale("rescale", share) > 1:
        raise ConfigError(f"rescale is {share}; give a share, 0 to 1")

    def over(branches: Branches) -> Denoiser:
        remembered = Remembered(branches)
        inner = guidance(remembered)

        def denoiser(x: Tensor, sigma: float, cond: Any) -> Tensor:
            guided, c = inner(x, sigma, cond), remembered(x, sigma, cond, ["c"])["c"]
            ratio = c.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True).clamp(min=1e-12)
            return guided * (share * ratio + (1 - share))

        return denoiser

    return over


def guidance_of(
    text_cfg: float,
    image_cfg: float,
    *,
    name: str = "dual",
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    apg: bool = False,
) -> Guidance:
    """The guidance of settings: a formula's two scales, in an interval of sigma, projected (APG), rescaled to c's.

    Raises ConfigError for a name that is none of FORMULAS.
    """
    if name not in tuple(FORMULAS):
        raise ConfigError(f"guidance is {name!r}; choose one of {', '.join(FORMULAS)}, or give a function of branches")
    if apg and name != "dual":
        raise ConfigError(f"apg projects what dual guidance adds, and guidance is {name!r}; leave one of the two out")
    formula, scales = FORMULAS[name], (text_cfg, image_cfg)
    acting = [s if interval is None else within(s, *interval, elsewhere=formula.alone) for s in scales]

    def guidance(branches: Branches) -> Denoiser:
        return ProjectedGuidance(branches, *acting) if apg else DualGuidance(branches, *acting, formula=formula)

    return rescaled(guidance, rescale) if rescale else guidance


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


def _weights(text_cfg: float, image_cfg: float) -> dict[str, float]:
    """The factor of each branch once equation 3 is multiplied out."""
    return {"c": text_cfg, "i": image_cfg - text_cfg, "u": 1 - image_cfg}


def instruct_diffusion(branches: dict[str, Tensor], text_cfg: float, image_cfg: float) -> Tensor:
    """0.5 (i + t) + s_T (c - i) + s_I (c - t) as the code of InstructDiffusion has it (Geng et al. 2023)."""
    weights = _instruct_diffusion_weights(text_cfg, image_cfg)
    return sum(weight * branches[name] for name, weight in weights.items() if weight != 0)  # type: ignore[return-value]


def _instruct_diffusion_weights(text_cfg: float, image_cfg: float) -> dict[str, float]:
    return {"c": text_cfg + image_cfg, "i": 0.5 - text_cfg, "t": 0.5 - image_cfg}


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A rule that makes one prediction of branches and two scales."""

    combine: Callable[[dict[str, Tensor], float, float], Tensor]
    weights: Callable[[float, float], dict[str, float]]
    """The factor of each branch, once the rule is multiplied out; they sum to 1."""
    alone: float
    """At this value of both scales it is c alone."""
    scales: tuple[float, float]
    """(s_T, s_I) that its authors recommend."""

    def needed(self, text_cfg: float, image_cfg: float) -> tuple[str, ...]:
        """The branches whose weight is not 0."""
        return tuple(name for name, weight in self.weights(text_cfg, image_cfg).items() if weight != 0)


FORMULAS = {
    "dual": Formula(combine=dual_guidance, weights=_weights, alone=1.0, scales=(7.5, 1.5)),
    "instruct-diffusion": Formula(
        combine=instruct_diffusion, weights=_instruct_diffusion_weights, alone=0.5, scales=(5.0, 1.25)
    ),
}


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


def _between(branches: dict[str, Tensor], start: str, end: str, scale: float) -> Tensor:
    """start + scale (end - start), reading only what the scale needs."""
    if scale == 1:
        return branches[end]
    if scale == 0:
        return branches[start]
    return branches[start] + scale * (branches[end] - branches[start])
