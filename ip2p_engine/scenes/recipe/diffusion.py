"""Stages 3 and 4 of the embedded models: text to image, and InstructPix2Pix on true pairs."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from ...diffusion.guidance import conditioning_dropout
from ...diffusion.schedule import DiscreteSchedule
from ..grammar import is_held_out, scenes_of
from ..world import WORLD_SIZE, all_scenes, world_pixels
from .networks import LATENT_SCALE, make_autoencoder, make_text_encoder, make_unet, widen_conv_in
from .stage import StageConfig
from .tables import caption_rows, edit_table, text_table, words_in_use

__all__ = [
    "AutoencoderStage",
    "DecoderStage",
    "EditStage",
    "TextToImageStage",
    "fold_latent_scale",
]

CROP = 32
CROPPED_SHARE = 0.65
CELL = 8
INSTRUCTION_SHARE = 0.22
TEXT_DROP = 0.10
SCHEDULE = DiscreteSchedule.stable_diffusion()


def sample_latents(table: dict[str, Tensor], rows: Tensor, generator: torch.Generator) -> Tensor:
    """Posterior samples times 0.18215: what a UNet is trained on."""
    noise = torch.randn(len(rows), *table["mean"].shape[1:], generator=generator)
    return LATENT_SCALE * (table["mean"][rows] + table["std"][rows] * noise)


def velocity_loss(unet: nn.Module, batch: dict[str, Tensor], condition: Tensor | None, context: Tensor) -> Tensor:
    """Mean squared error of v = sqrt(a) noise - sqrt(1 - a) z (Salimans & Ho 2022, appendix D)."""
    alpha, sigma = SCHEDULE.alpha_sigma(batch["t"])
    noisy = alpha * batch["z"] + sigma * batch["noise"]
    inputs = noisy if condition is None else torch.cat([noisy, condition], dim=1)
    target = alpha * batch["noise"] - sigma * batch["z"]
    return (unet(inputs, batch["t"], context).sample - target).square().mean()


def compact_text_encoder() -> CLIPTextModel:
    """The miniature's text encoder with a table of the words in use only."""
    encoder = make_text_encoder()
    width = encoder.config.hidden_size
    encoder.embeddings.token_embedding = nn.Embedding(len(words_in_use()), width)
    nn.init.normal_(encoder.embeddings.token_embedding.weight, std=0.02)
    return encoder


class TextToImageStage:
    """UNet and text encoder together; some texts are instructions that lead to the picture."""

    config = StageConfig(steps=1500, batch=96, learning_rate=2e-3)

    def __init__(self, latents: dict[str, Tensor]) -> None:
        torch.manual_seed(self.config.seed + 1)
        self.latents = latents
        self.trained = nn.ModuleDict({"unet": make_unet(4), "text": compact_text_encoder()})

    @cached_property
    def _texts(self) -> tuple[Tensor, Tensor, int]:
        """(compact tokens of captions, then instructions, then the empty text; caption rows per scene; offset)."""
        captions, rows = caption_rows()
        table = text_table([*captions, *self._edits.texts, ""])
        return table.tokens, rows, len(captions)

    @cached_property
    def _edits(self):
        return edit_table()

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        tokens, captions, offset = self._texts
        count = self.config.batch
        scenes = torch.randint(len(captions), (count,), generator=generator)
        texts = captions[scenes, torch.randint(captions.shape[1], (count,), generator=generator)]
        _, edited, instruction = self._edits.draw(count, generator)
        led = torch.rand(count, generator=generator) < INSTRUCTION_SHARE
        scenes, texts = torch.where(led, edited, scenes), torch.where(led, offset + instruction, texts)
        texts[torch.rand(count, generator=generator) < TEXT_DROP] = len(tokens) - 1
        z = sample_latents(self.latents, scenes, generator)
        return {
            "z": z,
            "noise": torch.randn(z.shape, generator=generator),
            "t": torch.randint(SCHEDULE.steps, (count,), generator=generator),
            "tokens": tokens[texts].long(),
        }

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        context = self.trained["text"](batch["tokens"]).last_hidden_state
        return velocity_loss(self.trained["unet"], batch, None, context), {}


class EditStage:
    """The InstructPix2Pix UNet on true pairs: widened from text to image, text encoder frozen, 5/5/5 dropout."""

    config = StageConfig(steps=3500, batch=96, learning_rate=2e-3, ema_decay=0.998)

    def __init__(self, latents: dict[str, Tensor], text_to_image: dict[str, Tensor]) -> None:
        self.latents = latents
        unet = make_unet(4)
        unet.load_state_dict(_part(text_to_image, "unet."))
        self.trained = widen_conv_in(unet)
        text = compact_text_encoder()
        text.load_state_dict(_part(text_to_image, "text."))
        self._edits = edit_table()
        self._contexts = _encode(text, text_table([*self._edits.texts, ""]).tokens.long())

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        count = self.config.batch
        source, target, texts = self._edits.draw(count, generator)
        drop_text, drop_image = conditioning_dropout(torch.rand(count, generator=generator))
        texts[drop_text] = len(self._contexts) - 1
        condition = self.latents["mean"][source]
        condition[drop_image] = 0
        z = sample_latents(self.latents, target, generator)
        return {
            "z": z,
            "condition": condition,
            "noise": torch.randn(z.shape, generator=generator),
            "t": torch.randint(SCHEDULE.steps, (count,), generator=generator),
            "texts": texts,
        }

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        context = self._contexts[batch["texts"]]
        return velocity_loss(self.trained, batch, batch["condition"], context), {}


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@torch.no_grad()
def _encode(text: CLIPTextModel, tokens: Tensor) -> Tensor:
    return torch.cat([text(part).last_hidden_state for part in tokens.split(256)])


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
