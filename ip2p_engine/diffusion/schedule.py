"""Noise schedules: the variance-preserving ladder of Stable Diffusion, EDM's, and the sigmas that samplers walk.

Everything is float64 inside, so that a schedule is the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import ConfigError

__all__ = [
    "SCHEDULES",
    "DiscreteSchedule",
    "exponential_sigmas",
    "karras_sigmas",
    "make_sigmas",
    "model_sigmas",
    "step_of",
    "trailing_sigmas",
]

SAME_SIGMA = 1e-6
LEAST_SIGNAL = 4.8973451890853435e-08  # a of the last step to a sampler, whose sigma would be infinite: ComfyUI's


@dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """The DDPM ladder sigma_t = sqrt((1 - a_t) / a_t), t = 0 .. steps - 1; between the steps in log sigma."""

    alphas_cumprod: Tensor
    zero_snr: bool = False
    """Whether the last step is pure noise; walks then start there, and space their steps from there."""

    @classmethod
    def stable_diffusion(
        cls, start: float = 0.00085, end: float = 0.0120, steps: int = 1000, *, zero_snr: bool = False
    ) -> DiscreteSchedule:
        """Stable Diffusion's "scaled linear" betas: their square roots are evenly spaced.

        ``zero_snr``: sqrt(a_t) shifted and scaled so that the last is 0 and the first as it was (Lin et al. 2023,
        algorithm 1).
        """
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        a = (1 - betas).cumprod(0)
        if zero_snr:
            first, last = a[0].sqrt(), a[-1].sqrt()
            a = ((a.sqrt() - last) * first / (first - last)).square()
        return cls(a, zero_snr)

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def sigmas(self) -> Tensor:
        """Ascending sigmas, float64, shape (steps,)."""
        a = self.alphas_cumprod.clamp(min=LEAST_SIGNAL) if self.zero_snr else self.alphas_cumprod
        return ((1 - a) / a).sqrt()

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigma at a fractional t, by linear interpolation of log sigma (k-diffusion)."""
        log_sigmas = self.sigmas.log()
        t = t.double().clamp(0, self.steps - 1)
        low = t.floor().long()
        weight = t - low
        return ((1 - weight) * log_sigmas[low] + weight * log_sigmas[t.ceil().long()]).exp()

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Fractional t of a sigma, the inverse of ``t_to_sigma``, on its device; clamped to the ladder's ends."""
        log_sigmas = self._log_sigmas(sigma.device)
        log_sigma = sigma.detach().to(log_sigmas.dtype).log()
        high = torch.searchsorted(log_sigmas, log_sigma).clamp(1, self.steps - 1)
        low = high - 1
        weight = (log_sigma - log_sigmas[low]) / (log_sigmas[high] - log_sigmas[low])
        return low + weight.clamp(0, 1)

    def _log_sigmas(self, device: torch.device) -> Tensor:
        """Float64 on the CPU; elsewhere float32, which all devices have, since asking the CPU would wait."""
        if device not in self._on_devices:
            exact = self.sigmas.log()
            self._on_devices[device] = exact if device.type == "cpu" else exact.float().to(device)
        return self._on_devices[device]

    @cached_property
    def _on_devices(self) -> dict[torch.device, Tensor]:
        return {}

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(a_t), sqrt(1 - a_t)) for integer t of shape (B,), float32, shaped (B, 1, 1, 1)."""
        a = self.alphas_cumprod[t.cpu()].view(-1, 1, 1, 1)
        return a.sqrt().float().to(t.device), (1 - a).sqrt().float().to(t.device)


def model_sigmas(schedule: DiscreteSchedule, steps: int) -> Tensor:
    """The paper's code's sigmas: t = linspace(last, 0, n), fractional, then 0. Shape (steps + 1,), float64.

    Of a ladder that ends in pure noise they are ``trailing_sigmas``.
    """
    if schedule.zero_snr:
        return trailing_sigmas(schedule, steps)
    _check_steps(steps)
    return _with_zero(schedule.t_to_sigma(torch.linspace(schedule.steps - 1, 0, steps, dtype=torch.float64)))


def trailing_sigmas(schedule: DiscreteSchedule, steps: int) -> Tensor:
    """t = T (1 - k / n) - 1, then 0 (Lin et al. 2023, section 3.3): no step is spent on the last bit of noise.

    Shape (steps + 1,), float64.
    """
    _check_steps(steps)
    t = schedule.steps * (1 - torch.arange(steps, dtype=torch.float64) / steps) - 1
    return _with_zero(schedule.t_to_sigma(t))


def karras_sigmas(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> Tensor:
    """Equation 5 of Karras et al. (2022), then 0. Shape (steps + 1,), float64."""
    _check_steps(steps)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _with_zero((high + ramp * (low - high)) ** rho)


def exponential_sigmas(sigma_min: float, sigma_max: float, steps: int) -> Tensor:
    """Sigmas evenly spaced in log sigma, then 0. Shape (steps + 1,), float64."""
    _check_steps(steps)
    low, high = torch.tensor([sigma_min, sigma_max], dtype=torch.float64).log().tolist()
    return _with_zero(torch.linspace(high, low, steps, dtype=torch.float64).exp())


SCHEDULES = {
    "model": model_sigmas,
    "karras": lambda schedule, steps: karras_sigmas(schedule.sigma_min, schedule.sigma_max, steps),
    "exponential": lambda schedule, steps: exponential_sigmas(schedule.sigma_min, schedule.sigma_max, steps),
    "trailing": trailing_sigmas,
}


def make_sigmas(name: str, schedule: DiscreteSchedule, steps: int) -> Tensor:
    """Sigmas of a named schedule; raises ConfigError for an unknown name or fewer than 1 step."""
    if name not in SCHEDULES:
        raise ConfigError(f"schedule {name!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](schedule, steps)


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """Which step 0 .. n - 1 a noise level belongs to: the last that starts at it or above.

    ``sigmas`` are the n + 1 falling levels of a walk. Between two levels is still the step that leads down there.
    """
    return max(sum(level >= sigma * (1 - SAME_SIGMA) for level in sigmas[:-1]) - 1, 0)


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps is {steps!r}; give a whole number of at least 1")


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])
