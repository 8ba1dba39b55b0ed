"""Stage 1 of the embedded models: the autoencoder."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ..grammar import is_held_out, scenes_of
from ..world import WORLD_SIZE, all_scenes, world_pixels
from .networks import LATENT_SCALE, make_autoencoder
from .stage import StageConfig

__all__ = ["AutoencoderStage", "DecoderStage", "fold_latent_scale"]

CROP = 32
CROPPED_SHARE = 0.65
CELL = 8


class AutoencoderStage:
    """L1 + MSE + 0.5 gradient L1 + a small KL; quarter-size crops first, whole pictures last."""

    config = StageConfig(steps=2600, batch=24, learning_rate=2e-3)
    kl_weight = 2e-4

    def __init__(self) -> None:
        torch.manual_seed(self.config.seed)
        self.trained = make_autoencoder()

    @cached_property
    def pixels(self) -> Tensor:
        """Training scenes, uint8, (N, 3, 64, 64)."""
        keep = [not is_held_out(scene) for scene in all_scenes()]
        return torch.from_numpy(np.ascontiguousarray(world_pixels()[keep].transpose(0, 3, 1, 2)))

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = self.config.batch if self._cropping(step) else self.config.batch // 2
        index = torch.randint(len(self.pixels), (size,), generator=generator)
        pictures = self.pixels[index].float() / 127.5 - 1
        if self._cropping(step):
            places = (WORLD_SIZE - CROP) // CELL + 1
            y, x = (CELL * torch.randint(places, (2,), generator=generator)).tolist()
            pictures = pictures[:, :, y : y + CROP, x : x + CROP]
        shape = (size, 4, pictures.shape[-2] // CELL, pictures.shape[-1] // CELL)
        return {"pictures": pictures, "noise": torch.randn(shape, generator=generator)}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        pictures = batch["pictures"]
        posterior = self.trained.encode(pictures).latent_dist
        decoded = self.trained.decode(posterior.mean + posterior.std * batch["noise"]).sample
        error = decoded - pictures
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error.abs().mean() + error.square().mean() + 0.5 * edges + self.kl_weight * divergence
        psnr = -10 * torch.log10(error.detach().square().mean((1, 2, 3)) / 4).mean()
        figures = {"psnr": psnr.item(), "kl": divergence.item(), "std": posterior.std.mean().item()}
        return loss, figures

    def _cropping(self, step: int) -> bool:
        return step < CROPPED_SHARE * self.config.steps


@torch.no_grad()
def fold_latent_scale(autoencoder, pictures: Tensor) -> None:
    """Shift and scale each latent channel through the 1 x 1 convolutions, so that 0.18215 z has mean 0, variance 1."""
    latents = torch.cat([autoencoder.encode(part).latent_dist.mean for part in pictures.split(64)])
    centre, scale = latents.mean((0, 2, 3)), LATENT_SCALE * latents.std((0, 2, 3))
    encode, decode = autoencoder.quant_conv, autoencoder.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ centre
    decode.weight *= scale[None, :, None, None]
    encode.weight[:4] /= scale[:, None, None, None]
    encode.bias[:4] = (encode.bias[:4] - centre) / scale
    encode.bias[4:] -= 2 * torch.log(scale)


class DecoderStage:
    """The decoder alone, on whole pictures and fixed latents: flakes and stars, which L1 leaves out.

    Stable Diffusion's own autoencoder was finished in the same way. Latents stay as they are, so UNets trained on them
    stay valid.
    """

    config = StageConfig(steps=700, batch=32, learning_rate=1e-3)
    fine_share = 0.7

    def __init__(self, weights: dict[str, Tensor], latents: dict[str, Tensor]) -> None:
        autoencoder = make_autoencoder()
        autoencoder.load_state_dict(weights)
        self.trained = nn.ModuleDict({"decoder": autoencoder.decoder, "post_quant_conv": autoencoder.post_quant_conv})
        self.latents = latents
        self.pixels = AutoencoderStage().pixels
        fine = [scene.style in ("night", "snow") for scene in scenes_of(held_out=False)]
        self._fine = torch.tensor(fine).nonzero()[:, 0]

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        count = self.config.batch
        index = torch.randint(len(self.pixels), (count,), generator=generator)
        fine = self._fine[torch.randint(len(self._fine), (count,), generator=generator)]
        index = torch.where(torch.rand(count, generator=generator) < self.fine_share, fine, index)
        noise = torch.randn(count, *self.latents["mean"].shape[1:], generator=generator)
        z = self.latents["mean"][index] + self.latents["std"][index] * noise
        return {"z": z, "pictures": self.pixels[index].float() / 127.5 - 1}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        decoded = self.trained["decoder"](self.trained["post_quant_conv"](batch["z"]))
        error = decoded - batch["pictures"]
        square = error.square().mean()
        loss = 4 * square + 0.25 * error.abs().mean()
        return loss, {"psnr": -10 * torch.log10(square.detach() / 4).item()}
