"""Consistency distillation: an InstructPix2Pix that edits in one to four evaluations, its guidance folded in."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.guidance import dual_guidance, needed_branches
from ..networks.conditioning import TextEmbedding, even
from ..networks.model import Model
from ..networks.scales import scales_embedding
from .config import TrainConfig
from .encoding import Encoded
from .randomness import Draws

__all__ = ["Distillation", "frozen_copy", "pseudo_huber"]

HUBER = 1e-3
BRANCH = {"c": (True, True), "i": (True, False), "u": (False, False)}
"""With the picture, with the text."""


def frozen_copy(unet: Any) -> Any:
    """The teacher: the network as it is now, which the steps to come do not change."""
    return copy.deepcopy(unet).eval().requires_grad_(False)


class Distillation:
    """Latent consistency distillation (Luo et al. 2023, algorithm 1), with both scales fixed, or drawn and told.

    The teacher, guided by equation 3 of Brooks et al. (2023), goes one DDIM step from a noise level to the next lower
    one, and the student's clean latents at the two ends have to agree. What it agrees with is itself without gradients,
    not an average (Song & Dhariwal 2024, section 3.2). Its boundary condition needs no scalings of its own: in the
    denoiser's form f(x, 0) = x holds for eps and for v, and the last step of the ladder leads there.
    """

    def __init__(self, model: Model, null_text: TextEmbedding, config: TrainConfig, teacher: Any) -> None:
        """``config.distill``, and ``distill_to``, are the teacher's s_T and s_I; ``teacher`` is its UNet."""
        if config.distill is None:
            raise ValueError("a distillation has the scales of its teacher")
        self._model, self._null, self._teacher, self._scales = model, null_text, teacher, config.distill
        self._far = config.distill_to
        if self._far is None:
            self._needed = tuple({**dict.fromkeys(needed_branches(*config.distill)), "c": None})
        else:
            self._needed = ("c", "i") if config.distill[1] == self._far[1] == 1 else ("c", "i", "u")
        self._rungs = config.distill_rungs
        self._interval = config.distill_interval or (0.0, float("inf"))

    def __call__(self, unet: Any, encoded: Encoded, draws: Draws) -> Tensor:
        """Each example's error, (n,), float32. ``unet`` may be wrapped."""
        model = self._model
        z = model.spec.latent_scale * (encoded.mean + encoded.std * draws.posterior)
        rung = (draws.level.cpu() * self._rungs).long()
        x = z + self._sigma(rung, z) * draws.noise
        scales = None if self._far is None else between(self._scales, self._far, draws.scales.to(z))
        told = None if scales is None else scales_embedding(scales, model.unet.config.time_cond_proj_dim)
        guess = self._clean(unet, x, rung, encoded, "c", told)
        with torch.no_grad():
            sigma, lower = self._sigma(rung, z), self._sigma(rung - 1, z)
            branches = {name: self._clean(self._teacher, x, rung, encoded, name) for name in self._needed}
            denoised = self._guided(branches, sigma, scales)
            ahead = denoised + lower / sigma * (x - denoised)
            agreed = self._clean(unet, ahead, (rung - 1).clamp(min=0), encoded, "c", told)
            agreed = torch.where(lower > 0, agreed, ahead)
        return pseudo_huber(guess - agreed)

    def _guided(self, branches: dict[str, Tensor], sigma: Tensor, scales: Tensor | None) -> Tensor:
        """What the teacher sees: guided within the interval, c alone elsewhere, example by example."""
        low, high = self._interval
        inside = (sigma >= low) & (sigma <= high)
        if scales is None:
            return torch.where(inside, dual_guidance(branches, *self._scales), branches["c"])
        text_cfg, image_cfg = scales.view(-1, 2, 1, 1, 1).unbind(1)
        i, c = branches["i"], branches["c"]
        kept = branches["u"] + image_cfg * (i - branches["u"]) if "u" in branches else i
        return torch.where(inside, kept + text_cfg * (c - i), c)

    def _sigma(self, rung: Tensor, like: Tensor) -> Tensor:
        """The noise levels of some rungs, (n, 1, 1, 1); rung -1 is none."""
        sigmas = self._model.schedule.sigmas
        places = (rung + 1) * len(sigmas) // self._rungs - 1
        found = torch.where(places >= 0, sigmas[places.clamp(min=0)], 0.0)
        return found.float().view(-1, 1, 1, 1).to(like.device, non_blocking=True)

    def _clean(
        self, unet: Any, x: Tensor, rung: Tensor, encoded: Encoded, branch: str, told: Tensor | None = None
    ) -> Tensor:
        """The clean latents that a network sees in x = z + sigma noise, for one of the branches."""
        model, sigma = self._model, self._sigma(rung, x)
        with_image, with_text = BRANCH[branch]
        null = self._null if encoded.null_text is None else encoded.null_text
        text = encoded.text if with_text else null.rows([0] * len(x))
        tokens, _ = even([text.tokens, encoded.text.tokens])
        condition = encoded.condition if with_image else torch.zeros_like(encoded.condition)
        added = None if text.pooled is None else {"text_embeds": text.pooled, "time_ids": encoded.size_ids}
        root = (sigma**2 + 1).sqrt()
        inputs = torch.cat([x / root, condition], dim=1)
        beside: dict[str, Any] = {} if told is None else {"timestep_cond": told}
        output = unet(inputs, self._t(rung, x), tokens, added_cond_kwargs=added, **beside).sample.float()
        return x - sigma * output if model.spec.prediction == "eps" else x / root**2 - output * (sigma / root)

    def _t(self, rung: Tensor, like: Tensor) -> Tensor:
        steps = self._model.schedule.steps
        if self._model.spec.schedule == "edm":
            return (self._sigma(rung, like).log() / 4).flatten()
        return ((rung + 1) * steps // self._rungs - 1).to(like.device, non_blocking=True)


def between(near: Sequence[float], far: Sequence[float], shares: Tensor) -> Tensor:
    """So far on the way from one pair of scales to another, each by itself; (n, 2)."""
    first, last = (torch.tensor(pair).to(shares) for pair in (near, far))
    return first + shares * (last - first)


def pseudo_huber(difference: Tensor, c: float = HUBER) -> Tensor:
    """The mean over a latent of sqrt(d^2 + c^2) - c; (n,)."""
    return (torch.sqrt(difference.square() + c**2) - c).mean(dim=(1, 2, 3))
