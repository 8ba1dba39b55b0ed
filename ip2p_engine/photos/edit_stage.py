"""Stage 4 of the photo model: InstructPix2Pix from nothing on true pairs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion.guidance import conditioning_dropout
from ..diffusion.schedule import DiscreteSchedule
from ..errors import ConfigError
from ..train.config import preset
from .latents import Chunks
from .networks import LATENT_SCALE, make_unet
from .texts import FACTS, any_wording, compact_text_encoder, compact_tokens, padded

__all__ = ["EditStage"]

SCHEDULE = DiscreteSchedule.stable_diffusion()
LARGE_BATCH = 10
LOOK_EVERY = 50
EARLY = 0.7
"""The exponent of a uniform number that picks t: below 1, high noise, where an edit is decided, comes more often."""
ADDS = FACTS.index("is Add")
CHANGED, STRENGTH = 0.3, 6.0
"""A latent pixel that differs by more counts 1 + STRENGTH times, scaled to a mean of 1 a picture."""


class EditStage:
    """UNet and text encoder together, v-prediction, 5/5/5 dropout; views of 128 pixels by 40 or of 256 by 10."""

    config = preset("embedded", steps=12_000, batch_size=40, learning_rate=2e-3, warm_up=100, ema_decay=0.995)
    large_shares = (0.2, 0.5)
    """Part of the steps on views of 256 pixels: in the first 60 % of the training, and after."""

    def __init__(self, latents: Path, text: dict[str, Tensor]) -> None:
        torch.manual_seed(self.config.seed + 2)
        self.small, self.large = _chunks(latents, 128), _chunks(latents, 256)
        encoder = compact_text_encoder()
        encoder.load_state_dict(text)
        self._nets = nn.ModuleDict({"unet": make_unet(), "text": encoder})
        self.trained: nn.Module = self._nets
        self._empty = compact_tokens([""])[0]

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if step % LOOK_EVERY == 0:
            self.small.refresh()
            self.large.refresh()
        share = self.large_shares[step >= 0.6 * self.config.steps]
        large = bool(torch.rand(1, generator=generator) < share)
        table = (self.large if large else self.small).table
        count = LARGE_BATCH if large else self.config.batch_size
        rows = torch.randint(len(table["kind"]), (count,), generator=generator)
        tokens = padded(any_wording(table["tokens"][rows], generator))
        drop_text, drop_image = conditioning_dropout(torch.rand(count, generator=generator))
        tokens[drop_text] = self._empty
        condition = table["source"][rows].float()
        condition[drop_image] = 0
        z = LATENT_SCALE * table["target"][rows].float()
        return {
            "z": z,
            "condition": condition,
            "noise": torch.randn(z.shape, generator=generator),
            "t": (SCHEDULE.steps * torch.rand(count, generator=generator) ** EARLY).long(),
            "tokens": tokens,
            "weight": _weights(z, LATENT_SCALE * table["source"][rows].float(), table["facts"][rows, ADDS]),
        }

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of v = sqrt(a) noise - sqrt(1 - a) z (Salimans & Ho 2022, appendix D)."""
        alpha, sigma = SCHEDULE.alpha_sigma(batch["t"])
        noisy = alpha * batch["z"] + sigma * batch["noise"]
        target = alpha * batch["noise"] - sigma * batch["z"]
        context = self._nets["text"](batch["tokens"]).last_hidden_state
        velocity = self._nets["unet"](torch.cat([noisy, batch["condition"]], dim=1), batch["t"], context).sample
        error = (batch["weight"] * (velocity - target).square()).mean((1, 2, 3))
        late = batch["t"] >= SCHEDULE.steps // 2
        figures = {"high_noise": error.detach()[late].mean().item(), "low_noise": error.detach()[~late].mean().item()}
        return error.mean(), figures


def _chunks(folder: Path, side: int) -> Chunks:
    chunks = Chunks(folder, side)
    if not chunks.refresh():
        raise ConfigError(
            f"{folder} has no latents of views of {side} pixels; make them first (ip2p photos train latents)"
        )
    return chunks


def _weights(target: Tensor, source: Tensor, adds: Tensor) -> Tensor:
    """Where a local edit changes something, its loss counts more; (B, 1, h, w), of mean 1.

    Not for additions: there the place is chance, and the weights would say where it will be.
    """
    changed = ((target - source).abs().amax(1, keepdim=True) > CHANGED).float()
    weight = 1 + STRENGTH * changed * (adds == 0).view(-1, 1, 1, 1)
    return weight / weight.mean((1, 2, 3), keepdim=True)
