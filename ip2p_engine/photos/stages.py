"""The photographs' miniature Stable Diffusion: its networks, and the stages that train them.

The autoencoder, on photographs, edited ones, objects on them and dead leaves; the text encoder, trained to tell what an
instruction asks for; InstructPix2Pix from nothing on true pairs.
"""

from __future__ import annotations

import random
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from ..diffusion.guidance import conditioning_dropout
from ..diffusion.schedule import DiscreteSchedule
from ..errors import ConfigError
from ..train.config import preset
from ..train.miniature import LATENT_SCALE, TEXT_WIDTH, compact_text_encoder
from .latents import Chunks
from .objects import COLOURS, GRID, LARGE, REGULAR, SHAPES, Thing, draw_things
from .pictures import PhotoPool, dead_leaves, jitter
from .texts import FACTS, any_wording, compact_tokens, facts_of, padded, words_in_use
from .tones import HUES, TONES, tint
from .world import KINDS, sample_edit, say

__all__ = [
    "AutoencoderStage",
    "EditStage",
    "TextStage",
    "make_autoencoder",
    "make_unet",
]

SIZES = ((0.62, 64, 24), (0.9, 128, 7), (1.0, 256, 2))
"""(until this share of the steps, side of the views, views a step): small views first, as groups see less of them."""
LEAVES_SHARE = 0.08
JITTER_SHARE = 0.4
TONE_SHARE = 0.35
THING_SHARE = 0.35
EDITS = 1760
WORDINGS = 4
LONGEST = 40
SIDE = 128
SCHEDULE = DiscreteSchedule.stable_diffusion()
LARGE_BATCH = 10
LOOK_EVERY = 50
EARLY = 0.7
"""The exponent of a uniform number that picks t: below 1, high noise, where an edit is decided, comes more often."""
ADDS = FACTS.index("is Add")
CHANGED, STRENGTH = 0.3, 6.0
"""A latent pixel that differs by more counts 1 + STRENGTH times, scaled to a mean of 1 a picture."""


def make_autoencoder() -> AutoencoderKL:
    """AutoencoderKL, f = 8, 4 latent channels, 1.7 M parameters; 4 norm groups, as the scenes' has."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=256,
        scaling_factor=LATENT_SCALE,
    )


def make_unet() -> UNet2DConditionModel:
    """UNet2DConditionModel of 8 channels, three levels, 8 heads, 4.8 M parameters.

    No attention at the finest level, as in SDXL: there it cost half of a step (heads are narrow and places many).
    """
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=8,
        out_channels=4,
        block_out_channels=(64, 96, 112),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )


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


def _any(options: list, generator: torch.Generator):
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def _any_thing(size: int, generator: torch.Generator) -> Thing:
    side = _any([REGULAR, LARGE], generator) if size > LARGE else REGULAR
    y, x = (GRID * torch.randint((size - side) // GRID + 1, (2,), generator=generator)).tolist()
    return Thing(shape=_any(list(SHAPES), generator), colour=_any(list(COLOURS), generator), size=side, y=y, x=x)


class TextStage:
    """Every fact of an instruction is read by one linear layer from the end of the text."""

    config = preset("embedded", steps=240, batch_size=64, learning_rate=2e-3)

    def __init__(self) -> None:
        torch.manual_seed(self.config.seed + 1)
        self._nets = nn.ModuleDict(
            {"text": compact_text_encoder(words_in_use()), "facts": nn.Linear(TEXT_WIDTH, len(FACTS))}
        )
        self.trained: nn.Module = self._nets

    @cached_property
    def table(self) -> dict[str, Tensor]:
        """Texts of sampled edits of a card with every colour; no photograph is needed."""
        card, rng = _Card(), random.Random(self.config.seed)
        tokens, facts = [], []
        for n in range(EDITS):
            edit = sample_edit(card, KINDS[n % len(KINDS)], seed=n, held_out=False, size=SIDE)
            texts = [say(edit.canvas, edit.operations, rng, held_out=False) for _ in range(WORDINGS)]
            tokens.append(compact_tokens(texts)[:, :LONGEST])
            facts.append(facts_of(edit.operations))
        return {"tokens": torch.stack(tokens), "facts": torch.stack(facts)}

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(EDITS, (self.config.batch_size,), generator=generator)
        return {"tokens": any_wording(self.table["tokens"][rows], generator), "facts": self.table["facts"][rows]}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        states = self._nets["text"](padded(batch["tokens"])).last_hidden_state
        guesses = self._nets["facts"](states[:, -1])
        right = ((guesses > 0) == (batch["facts"] > 0.5)).all(1).float().mean()
        return F.binary_cross_entropy_with_logits(guesses, batch["facts"]), {"right": right.item()}


class _Card:
    """In place of a pool of photographs: stripes of all hues."""

    keys = ("card",)
    weights = torch.ones(1)

    def __init__(self) -> None:
        stripe = torch.tensor([0.8, 0.15, 0.15]).view(3, 1, 1).expand(3, SIDE, SIDE // len(HUES) + 1)
        self.view = torch.cat([stripe if name == "red" else tint(stripe, "red", name) for name in HUES], dim=2)

    def draw_from(self, index: int, size: int, generator: torch.Generator) -> Tensor:
        return self.view[:, :size, :size]


class EditStage:
    """UNet and text encoder together, v-prediction, 5/5/5 dropout; views of 128 pixels by 40 or of 256 by 10."""

    config = preset("embedded", steps=12_000, batch_size=40, learning_rate=2e-3, warm_up=100, ema_decay=0.995)
    large_shares = (0.2, 0.5)
    """Part of the steps on views of 256 pixels: in the first 60 % of the training, and after."""

    def __init__(self, latents: Path, text: dict[str, Tensor]) -> None:
        torch.manual_seed(self.config.seed + 2)
        self.small, self.large = _chunks(latents, 128), _chunks(latents, 256)
        encoder = compact_text_encoder(words_in_use())
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
