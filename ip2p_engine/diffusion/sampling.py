"""Samplers as k-diffusion defines them, on the one contract denoiser(x, sigma, cond) -> denoised.

x = clean + sigma * noise throughout. A sampler is one function that takes a step; ``sample`` walks the sigmas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..hooks import Hooks
from .guidance import Denoiser

__all__ = ["SAMPLERS", "Sampler", "Step", "ancestral_split", "named", "sample", "sampler_of"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """All that a sampler may use for one step from ``sigma`` down to ``next_sigma``."""

    x: Tensor
    denoised: Tensor
    sigma: float
    next_sigma: float
    last_denoised: Tensor | None
    last_sigma: float
    denoise: Callable[[Tensor, float], Tensor]
    noise: Callable[[], Tensor]

    @property
    def slope(self) -> Tensor:
        """dx / dsigma of the probability-flow ODE, equation 3 of Karras et al. (2022)."""
        return (self.x - self.denoised) / self.sigma

    @property
    def h(self) -> float:
        """The step in -log sigma."""
        return math.log(self.sigma / self.next_sigma)

    @property
    def ratio(self) -> float:
        """The last step's h over this one's."""
        return math.log(self.last_sigma / self.sigma) / self.h


Sampler = Callable[[Step], Tensor]
"""Takes one step: returns x at ``step.next_sigma``."""


def sample(
    sampler: str | Sampler,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    *,
    noise: Callable[[Tensor], Tensor] | None = None,
    after_step: Callable[[int, Tensor], Tensor] | None = None,
    hooks: Hooks | None = None,
) -> Tensor:
    """Walk x from sigmas[0] to sigmas[-1] with a sampler, by name or a function that takes one step.

    ``x`` has shape (B, C, h, w) and standard deviation of about sigmas[0]; ``sigmas`` falls, shape (n + 1,).
    ``noise(x)`` gives a step's unit normal noise; only stochastic samplers call it. ``after_step(i, x)`` says where a
    step arrives instead of x. Raises ConfigError for an unknown name, Interrupted once ``hooks.should_stop()``.
    """
    take_step, hooks = sampler_of(sampler), hooks or Hooks()
    levels = [float(sigma) for sigma in sigmas]
    last_denoised: Tensor | None = None
    for i, (sigma, next_sigma) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        hooks.check_stop(f"stopped before step {i + 1} of {len(levels) - 1}, as asked")
        denoised = denoiser(x, sigma, cond)
        if hooks.on_step is not None:
            hooks.on_step(i, len(levels) - 1, x, sigma, denoised)
        step = Step(
            x=x,
            denoised=denoised,
            sigma=sigma,
            next_sigma=next_sigma,
            last_denoised=last_denoised,
            last_sigma=levels[i - 1] if i else sigma,
            denoise=lambda point, level: denoiser(point, level, cond),
            noise=partial(_draw, noise, sampler, x),
        )
        x, last_denoised = take_step(step), denoised
        if after_step is not None:
            x = after_step(i, x)
    return x


def sampler_of(sampler: str | Sampler) -> Sampler:
    """The function that a sampler's name means, or the function itself; raises ConfigError for neither."""
    found = SAMPLERS.get(sampler) if isinstance(sampler, str) else sampler
    if not callable(found):
        known = ", ".join(SAMPLERS)
        raise ConfigError(f"sampler {sampler!r} is unknown; choose one of {known}, or give a function of a Step")
    return found


def named(choice: Any) -> Any:
    """What settings call a choice: a name stays, and a function or a class is named by its module and name."""
    if not callable(choice):
        return choice
    own = getattr(choice, "func", choice)  # a partial has no name
    own = own if hasattr(own, "__qualname__") else type(own)
    return f"{own.__module__}:{own.__qualname__}"


def ancestral_split(sigma: float, next_sigma: float, eta: float = 1.0) -> tuple[float, float]:
    """(sigma_down, sigma_up): step down to the first, add noise of the second, and arrive at next_sigma."""
    if eta == 0 or next_sigma == 0:
        return next_sigma, 0.0
    up = min(next_sigma, eta * math.sqrt(next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2))
    return math.sqrt(next_sigma**2 - up**2), up


def euler(step: Step) -> Tensor:
    """Algorithm 2 of Karras et al. (2022), Euler steps, no churn."""
    return step.x + step.slope * (step.next_sigma - step.sigma)


def euler_ancestral(step: Step) -> Tensor:
    """An Euler step to sigma_down, then fresh noise of sigma_up: what the paper samples with."""
    down, up = ancestral_split(step.sigma, step.next_sigma)
    x = step.x + step.slope * (down - step.sigma)
    return x + step.noise() * up if step.next_sigma > 0 else x


def heun(step: Step) -> Tensor:
    """Algorithm 2 of Karras et al. (2022), second order: the slope is averaged over both ends of the step."""
    ahead = euler(step)
    if step.next_sigma == 0:
        return ahead
    slope = (ahead - step.denoise(ahead, step.next_sigma)) / step.next_sigma
    return step.x + (step.slope + slope) / 2 * (step.next_sigma - step.sigma)


def dpmpp_2m(step: Step) -> Tensor:
    """DPM-Solver++(2M), Lu et al. (2022)."""
    if step.next_sigma == 0:
        return step.denoised
    denoised = step.denoised
    if step.last_denoised is not None:
        denoised = denoised + (denoised - step.last_denoised) / (2 * step.ratio)
    return step.next_sigma / step.sigma * step.x - math.expm1(-step.h) * denoised


def dpmpp_2m_sde(step: Step) -> Tensor:
    """DPM-Solver++(2M) for the SDE (eta = 1, midpoint), as in k-diffusion; noise is independent from step to step."""
    if step.next_sigma == 0:
        return step.denoised
    gain = -math.expm1(-2 * step.h)
    x = step.next_sigma / step.sigma * math.exp(-step.h) * step.x + gain * step.denoised
    if step.last_denoised is not None:
        x = x + 0.5 * gain / step.ratio * (step.denoised - step.last_denoised)
    return x + step.noise() * step.next_sigma * math.sqrt(gain)


def ddim(step: Step) -> Tensor:
    """DDIM with eta = 0 (Song et al. 2021, equation 12): the noise found now is put back at the next level."""
    noise = (step.x - step.denoised) / step.sigma
    return step.denoised + step.next_sigma * noise


def lcm(step: Step) -> Tensor:
    """Consistency sampling (Song et al. 2023, algorithm 1): the clean picture, noised anew at the next level.

    For models distilled to few steps, with the schedule trailing.
    """
    return step.denoised + step.noise() * step.next_sigma if step.next_sigma > 0 else step.denoised


SAMPLERS: dict[str, Sampler] = {
    "euler_ancestral": euler_ancestral,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "ddim": ddim,
    "lcm": lcm,
}


def _draw(noise: Callable[[Tensor], Tensor] | None, sampler: str | Sampler, like: Tensor) -> Tensor:
    if noise is None:
        raise ConfigError(
            f"sampler {named(sampler)!r} draws noise in each step and none was given; "
            "pass noise=SampleNoise(seeds).draw"
        )
    return noise(like)
