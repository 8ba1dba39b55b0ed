"""Stage 1 of the photo model: the autoencoder, on photographs, edited photographs, objects on them, and dead leaves."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..train.config import preset
from .crops import PhotoPool, dead_leaves, jitter
from .networks import LATENT_SCALE, make_autoencoder
from .objects import COLOURS, GRID, LARGE, REGULAR, SHAPES, Thing, draw_things
from .tones import TONES

__all__ = ["AutoencoderStage", "fold_latent_scale"]

SIZES = ((0.62, 64, 24), (0.9, 128, 7), (1.0, 256, 2))
"""(until this share of the steps, side of the views, views a step): small views first, as groups see less of them."""
LEAVES_SHARE = 0.08
JITTER_SHARE = 0.4
TONE_SHARE = 0.35
THING_SHARE = 0.35


class AutoencoderStage:
    """L1 + MSE + 0.5 gradient L1 + a small KL."""

    config = preset("embedded", steps=1900, batch_size=24, learning_rate=2e-3)
    kl_weight = 1e-4

    def __init__(self, pictures: Path) -> None:
        torch.manual_seed(self.config.seed)
        self.trained = make_autoencoder()
        self.pool = PhotoPool(pictures, ("train",), smallest=200)

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        share = step / self.config.steps
        size, count = next((size, count) for until, size, count in SIZES if share < until)
        views = torch.stack([self._view(size, generator) for _ in range(count)])
        shape = (count, 4, size // 8, size // 8)
        return {"pictures": views * 2 - 1, "noise": torch.randn(shape, generator=generator)}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        pictures = batch["pictures"]
        with torch.autocast(pictures.device.type, dtype=torch.bfloat16):
            posterior = self.trained.encode(pictures).latent_dist
            latents = posterior.mean.float() + posterior.std.float() * batch["noise"]
            decoded = self.trained.decode(latents).sample
        error = decoded.float() - pictures
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + self.kl_weight * divergence
        psnr = -10 * torch.log10(error.detach().square().mean((1, 2, 3)) / 4).mean()
        return loss, {"psnr": psnr.item(), "kl": divergence.item(), "std": posterior.std.float().mean().item()}

    def examples(self, count: int, *, size: int, seed: int = 0) -> Tensor:
        """Views as the training sees them, in [-1, 1], (count, 3, size, size)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([self._view(size, generator) for _ in range(count)]) * 2 - 1

    def _view(self, size: int, generator: torch.Generator) -> Tensor:
        draws = torch.rand(4, generator=generator)
        view = dead_leaves(size, generator) if draws[0] < LEAVES_SHARE else self.pool.draw(size, generator)
        if draws[1] < JITTER_SHARE:
            view = jitter(view, generator)
        if draws[2] < TONE_SHARE:
            view = _any(list(TONES.values()), generator)(view, generator)
        if draws[3] < THING_SHARE:
            view = draw_things(view, tuple(_any_thing(size, generator) for _ in range(max(1, size // 64))))
        return view


@torch.no_grad()
def fold_latent_scale(autoencoder, pictures: Tensor) -> None:
    """Shift and scale each latent channel through the 1 x 1 convolutions, so that 0.18215 z has mean 0, variance 1."""
    latents = torch.cat([autoencoder.encode(part).latent_dist.mean for part in pictures.split(16)])
    centre, scale = latents.mean((0, 2, 3)), LATENT_SCALE * latents.std((0, 2, 3))
    encode, decode = autoencoder.quant_conv, autoencoder.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ centre
    decode.weight *= scale[None, :, None, None]
    encode.weight[:4] /= scale[:, None, None, None]
    encode.bias[:4] = (encode.bias[:4] - centre) / scale
    encode.bias[4:] -= 2 * torch.log(scale)


def _any(options: list, generator: torch.Generator):
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def _any_thing(size: int, generator: torch.Generator) -> Thing:
    side = _any([REGULAR, LARGE], generator) if size > LARGE else REGULAR
    y, x = (GRID * torch.randint((size - side) // GRID + 1, (2,), generator=generator)).tolist()
    return Thing(shape=_any(list(SHAPES), generator), colour=_any(list(COLOURS), generator), size=side, y=y, x=x)
