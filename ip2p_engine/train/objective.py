"""What the network is asked to predict: denoising under the paper's conditioning dropout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..diffusion.guidance import conditioning_dropout
from ..networks.conditioning import TextEmbedding, even
from ..networks.model import Model
from .config import TrainConfig
from .encoding import Encoded
from .randomness import Draws

__all__ = ["Objective", "change_weights", "dropped", "mask_weights", "noise_levels", "snr_weight"]


class Objective:
    """Equation 2 of Brooks et al. (2023), for a checkpoint's own noise levels and prediction."""

    def __init__(self, model: Model, null_text: TextEmbedding, config: TrainConfig) -> None:
        self._model, self._null, self._config = model, null_text, config

    def __call__(self, unet: Any, encoded: Encoded, draws: Draws) -> Tensor:
        """Each example's mean squared error, weighted; (n,), float32. ``unet`` may be wrapped."""
        model, config = self._model, self._config
        z = model.spec.latent_scale * (encoded.mean + encoded.std * draws.posterior)
        levels = noise_levels(model, draws.level.cpu())
        alpha, sigma, t = (value.to(z.device, non_blocking=True) for value in levels)
        noise = draws.noise + config.offset_noise * draws.offset
        null = self._null if encoded.null_text is None else encoded.null_text
        text, condition = dropped(encoded, null, draws.drop, config.dropouts)
        inputs = torch.cat([alpha * z + sigma * noise, condition], dim=1)
        output = unet(inputs, t, text.tokens, added_cond_kwargs=self._added(text, encoded.size_ids)).sample
        target = noise if model.spec.prediction == "eps" else alpha * noise - sigma * z
        squares = (output.float() - target).square()
        if config.change_weight:
            scale = model.spec.latent_scale if model.spec.scaled_condition else 1.0
            squares = squares * change_weights(encoded.mean - encoded.condition[:, :4] / scale, config.change_weight)
        if encoded.mask is not None and config.unmasked_weight < 1:
            squares = squares * mask_weights(encoded.mask, config.unmasked_weight)
        errors = squares.mean(dim=(1, 2, 3))
        return errors * snr_weight(alpha, sigma, model.spec.prediction, config.min_snr)

    def _added(self, text: TextEmbedding, size_ids: Tensor) -> dict[str, Tensor] | None:
        return None if text.pooled is None else {"text_embeds": text.pooled, "time_ids": size_ids}


def noise_levels(model: Model, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(alpha, sigma, t) for uniform u of shape (n,): x_t = alpha z + sigma noise, alpha^2 + sigma^2 = 1.

    DDPM's ladder: t = floor(1000 u). EDM (CosXL's name says its levels are those of a cosine): the angle
    atan(sigma_edm) is uniform between sigma_min's and sigma_max's, and t = ln(sigma_edm) / 4.
    """
    spec = model.spec
    if spec.schedule == "ddpm":
        t = (level * model.schedule.steps).long()
        return (*model.schedule.alpha_sigma(t), t)
    low, high = math.atan(spec.sigma_min), math.atan(spec.sigma_max)
    angle = (low + level * (high - low)).view(-1, 1, 1, 1)
    return angle.cos().float(), angle.sin().float(), (angle.tan().log() / 4).flatten().float()


def change_weights(change: Tensor, weight: float) -> Tensor:
    """(1 + w d) / (1 + w), d the size of a latent change (B, C, h, w) over its mean; (B, 1, h, w), of mean 1.

    Of a pair without any change: ones.
    """
    size = change.abs().mean(dim=1, keepdim=True)
    mean = size.mean(dim=(2, 3), keepdim=True)
    d = torch.where(mean > 0, size / mean.clamp(min=1e-12), torch.ones_like(size))
    return (1 + weight * d) / (1 + weight)


def mask_weights(mask: Tensor, outside: float) -> Tensor:
    """m + (1 - m) w over its mean, m the edited share of each place, (B, 1, h, w), w the weight outside.

    Of mean 1, so that a small mask counts as much as a large one; without any inside, and w 0, ones.
    """
    weights = mask + (1 - mask) * outside
    mean = weights.mean(dim=(1, 2, 3), keepdim=True)
    return torch.where(mean > 0, weights / mean.clamp(min=1e-12), torch.ones_like(weights))


def dropped(
    encoded: Encoded, null: TextEmbedding, r: Tensor, probability: float | tuple[float, float, float]
) -> tuple[TextEmbedding, Tensor]:
    """(text, condition) where r leaves them out: the empty text with its pooled vector, the zero latent."""
    no_text, no_image = _left_out(r, probability)
    empty, own = even([null.tokens, encoded.text.tokens])
    tokens = torch.where(no_text.view(-1, 1, 1), empty, own)
    pooled = encoded.text.pooled
    if pooled is not None and null.pooled is not None:
        pooled = torch.where(no_text.view(-1, 1), null.pooled, pooled)
    return TextEmbedding(tokens=tokens, pooled=pooled), encoded.condition * ~no_image.view(-1, 1, 1, 1)


def _left_out(r: Tensor, probability: float | tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    """One share for text alone, both and picture alone, or three of them."""
    text, both, image = probability if isinstance(probability, tuple) else (probability,) * 3
    if text == both == image:
        return conditioning_dropout(r, both)
    return r < text + both, (r >= text) & (r < text + both + image)


def snr_weight(alpha: Tensor, sigma: Tensor, prediction: str, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR for eps, / (SNR + 1) for v (Hang et al. 2023, section 3.4); (n,). gamma 0: ones."""
    snr = (alpha / sigma).square().flatten()
    if not gamma:
        return torch.ones_like(snr)
    return snr.clamp(max=gamma) / (snr if prediction == "eps" else snr + 1)
