"""The miniature Stable Diffusion: its networks, and the stages that train them.

Autoencoder, its decoder once more, text to image, and InstructPix2Pix on true pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from ...checkpoint.keys import with_prefix
from ...diffusion.guidance import conditioning_dropout
from ...diffusion.schedule import DiscreteSchedule
from ...train.config import preset
from ...train.miniature import LATENT_SCALE, TEXT_WIDTH, compact_text_encoder
from ..grammar import scenes_of
from ..world import WORLD_SIZE
from .tables import as_input, caption_rows, edit_table, text_table, training_pixels, words_in_use

__all__ = [
    "AutoencoderStage",
    "DecoderStage",
    "EditStage",
    "TextToImageStage",
    "make_autoencoder",
    "make_unet",
]

CROP = 32
CROPPED_SHARE = 0.65
CELL = 8
INSTRUCTION_SHARE = 0.22
TEXT_DROP = 0.10
SCHEDULE = DiscreteSchedule.stable_diffusion()


def make_autoencoder() -> AutoencoderKL:
    """AutoencoderKL, f = 8, 4 latent channels; 4 norm groups, since 16 channels in 32 groups erase flat colours."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=LATENT_SCALE,
    )


def make_unet(in_channels: int) -> UNet2DConditionModel:
    """UNet2DConditionModel with cross-attention on both levels and 8 heads."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )


class AutoencoderStage:
    """L1 + MSE + 0.5 gradient L1 + a small KL; quarter-size crops first, whole pictures last."""

    config = preset("embedded", steps=2600, batch_size=24)
    kl_weight = 2e-4

    def __init__(self) -> None:
        torch.manual_seed(self.config.seed)
        self.trained: Any = make_autoencoder()

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        cropping = step < CROPPED_SHARE * self.config.steps
        size = self.config.batch_size if cropping else self.config.batch_size // 2
        pictures = as_input(_some(training_pixels(), size, generator))
        if cropping:
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


class DecoderStage:
    """The decoder alone, on whole pictures and fixed latents: flakes and stars, which L1 leaves out.

    Stable Diffusion's own autoencoder was finished in the same way. Latents stay as they are, so UNets trained on them
    stay valid.
    """

    config = preset("embedded", steps=700, batch_size=32, learning_rate=1e-3)
    fine_share = 0.7

    def __init__(self, weights: dict[str, Tensor], latents: dict[str, Tensor]) -> None:
        autoencoder = make_autoencoder()
        autoencoder.load_state_dict(weights)
        self.trained = nn.ModuleDict({"decoder": autoencoder.decoder, "post_quant_conv": autoencoder.post_quant_conv})
        self._latents = latents
        fine = [scene.style in ("night", "snow") for scene in scenes_of(held_out=False)]
        self._fine = torch.tensor(fine).nonzero()[:, 0]

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        count = self.config.batch_size
        index = torch.randint(len(training_pixels()), (count,), generator=generator)
        fine = _some(self._fine, count, generator)
        index = torch.where(torch.rand(count, generator=generator) < self.fine_share, fine, index)
        z = sample_latents(self._latents, index, generator)
        return {"z": z, "pictures": as_input(training_pixels()[index])}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        decoded = self.trained["decoder"](self.trained["post_quant_conv"](batch["z"]))
        error = decoded - batch["pictures"]
        square = error.square().mean()
        loss = 4 * square + 0.25 * error.abs().mean()
        return loss, {"psnr": -10 * torch.log10(square.detach() / 4).item()}


class TextToImageStage:
    """UNet and text encoder together; some texts are instructions that lead to the picture."""

    config = preset("embedded", steps=1500)

    def __init__(self, latents: dict[str, Tensor]) -> None:
        torch.manual_seed(self.config.seed + 1)
        self._latents = latents
        self.trained = nn.ModuleDict({"unet": make_unet(4), "text": compact_text_encoder(words_in_use())})
        captions, self._captions = caption_rows()
        self._edits, self._offset = edit_table(), len(captions)
        self._tokens = text_table([*captions, *self._edits.texts, ""])

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        count = self.config.batch_size
        scenes = torch.randint(len(self._captions), (count,), generator=generator)
        texts = self._captions[scenes, torch.randint(self._captions.shape[1], (count,), generator=generator)]
        _, edited, instruction = self._edits.draw(count, generator)
        led = torch.rand(count, generator=generator) < INSTRUCTION_SHARE
        scenes, texts = torch.where(led, edited, scenes), torch.where(led, self._offset + instruction, texts)
        texts[torch.rand(count, generator=generator) < TEXT_DROP] = len(self._tokens) - 1
        return {**noised(self._latents, scenes, generator), "tokens": self._tokens[texts].long()}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        context = self.trained["text"](batch["tokens"]).last_hidden_state
        return velocity_loss(self.trained["unet"], batch, context), {}


class EditStage:
    """The InstructPix2Pix UNet on true pairs: widened from text to image, text encoder frozen, 5/5/5 dropout."""

    config = preset("embedded", steps=3500)

    def __init__(self, latents: dict[str, Tensor], text_to_image: dict[str, Tensor]) -> None:
        self._latents = latents
        self.trained = make_unet(8)
        self.trained.load_state_dict(_widened(with_prefix(text_to_image, "unet.")))
        text = compact_text_encoder(words_in_use())
        text.load_state_dict(with_prefix(text_to_image, "text."))
        self._edits = edit_table()
        self._contexts = _encode(text, text_table([*self._edits.texts, ""]).long())

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        count = self.config.batch_size
        source, target, texts = self._edits.draw(count, generator)
        drop_text, drop_image = conditioning_dropout(torch.rand(count, generator=generator))
        texts[drop_text] = len(self._contexts) - 1
        condition = self._latents["mean"][source]
        condition[drop_image] = 0
        batch = noised(self._latents, target, generator)
        return {**batch, "condition": condition, "context": self._contexts[texts]}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        return velocity_loss(self.trained, batch, batch["context"]), {}


def sample_latents(table: dict[str, Tensor], rows: Tensor, generator: torch.Generator) -> Tensor:
    """Samples of the posteriors, unscaled."""
    noise = torch.randn(len(rows), *table["mean"].shape[1:], generator=generator)
    return table["mean"][rows] + table["std"][rows] * noise


def noised(table: dict[str, Tensor], rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """What a UNet is trained on: samples times 0.18215, noise, and a noise level each."""
    z = LATENT_SCALE * sample_latents(table, rows, generator)
    noise = torch.randn(z.shape, generator=generator)
    return {"z": z, "noise": noise, "t": torch.randint(SCHEDULE.steps, (len(rows),), generator=generator)}


def velocity_loss(unet: nn.Module, batch: dict[str, Tensor], context: Tensor) -> Tensor:
    """Mean squared error of v = sqrt(a) noise - sqrt(1 - a) z (Salimans & Ho 2022, appendix D)."""
    alpha, sigma = SCHEDULE.alpha_sigma(batch["t"])
    noisy = alpha * batch["z"] + sigma * batch["noise"]
    inputs = torch.cat([noisy, batch["condition"]], dim=1) if "condition" in batch else noisy
    target = alpha * batch["noise"] - sigma * batch["z"]
    return (unet(inputs, batch["t"], context).sample - target).square().mean()


def _widened(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """For 8 channels: the first 4 as before, the new 4 zero, the bias kept (paper, section 3.2)."""
    weight = state["conv_in.weight"]
    return {**state, "conv_in.weight": torch.cat([weight, torch.zeros_like(weight)], dim=1)}


@torch.no_grad()
def _encode(text: CLIPTextModel, tokens: Tensor) -> Tensor:
    return torch.cat([text(part).last_hidden_state for part in tokens.split(256)])


def _some(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows drawn with replacement."""
    return rows[torch.randint(len(rows), (count,), generator=generator)]
