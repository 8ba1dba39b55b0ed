"""What an edit is conditioned on: texts and the source picture, as the networks see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..devices import free_memory
from ..errors import CheckpointError
from ..images import images_of, to_levels
from ..tokenizer import END_OF_TEXT, MAX_TOKENS, check_length, token_chunks
from .control import Control
from .model import Model

__all__ = [
    "Conditioning",
    "TextEmbedding",
    "clean_latents",
    "decode_latents",
    "decode_pictures",
    "decoded_at_once",
    "embed_text",
    "encode_image",
    "encode_text",
    "even",
    "size_ids",
]

LAST_LAYERS = {"sdxl", "cosxl"}
DECODER_ACTIVATIONS_PER_PIXEL = 16
DECODER_WIDTHS = 2  # the widest map of all pixels has so many times the last level's channels
LARGEST_TENSOR = 2**31 - 1
USABLE_MEMORY = 0.6
LATENT_CHANNELS = 4


@dataclass(frozen=True, kw_only=True)
class TextEmbedding:
    """Encoded texts: tokens (B, 77 n, width) of up to n chunks, and for SDXL the pooled vector (B, width)."""

    tokens: Tensor
    pooled: Tensor | None = None

    def rows(self, index: Sequence[int]) -> TextEmbedding:
        """The same texts, picked and repeated by row."""
        # Not a list as an index: its copy to a GPU would wait, and training asks in every micro-batch.
        chosen = torch.tensor(list(index), dtype=torch.long).to(self.tokens.device, non_blocking=True)
        return TextEmbedding(tokens=self.tokens[chosen], pooled=None if self.pooled is None else self.pooled[chosen])


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The two conditions of a batch and their absence.

    ``image`` (B, 4, h, w) is the posterior's mode, not multiplied by the latent scale (CosXL-Edit: scaled); no image
    is a zero latent. For a UNet that takes a mask it is (B, 8, h, w), the mask's latent after the picture's. ``text``
    has B rows, ``null_text`` has one: the encoding of the empty text. ``size_ids`` (B, 6) is SDXL's original size, crop
    corner and target size.
    """

    text: TextEmbedding
    null_text: TextEmbedding
    image: Tensor
    size_ids: Tensor | None = None
    control: Control | None = None


@torch.inference_mode()
def encode_text(model: Model, texts: Sequence[str]) -> TextEmbedding:
    """Encode texts as the checkpoint's family does; long ones in chunks of 75 tokens, one after another.

    The pooled vector is the first chunk's; texts of fewer chunks are repeated (``even``). So ComfyUI does. Raises
    ConfigError for more than 2,400 tokens.
    """
    return embed_text(model, texts, model.text_encoders)


def embed_text(model: Model, texts: Sequence[str], encoders: Sequence[Any]) -> TextEmbedding:
    """The same by the model's text encoders as they may be wrapped, and with gradients where they are on."""
    for encoder in model.text_encoders:
        words, places = encoder.config.vocab_size, encoder.config.max_position_embeddings
        if words <= END_OF_TEXT or places < MAX_TOKENS:
            raise CheckpointError(
                f"the text encoder reads {words:,} tokens at {places} places, and CLIP's are {END_OF_TEXT + 1:,} at "
                f"{MAX_TOKENS}; the checkpoint is no Stable Diffusion"
            )
    for text in texts:
        check_length(text)
    double = model.spec.family in LAST_LAYERS
    pads = (END_OF_TEXT, 0) if double else (0,) if model.spec.family == "sd2" else (END_OF_TEXT,)
    outputs = []
    for encoder, network, pad in zip(encoders, model.text_encoders, pads, strict=True):
        chunks = [token_chunks(text, pad=pad, words=model.words) for text in texts]
        with model.running(network):
            rows = torch.cat(chunks).to(network.device, non_blocking=True)
            outputs.append(encoder(rows, output_hidden_states=double))
    counts = [len(rows) for rows in chunks]
    if not double:
        return TextEmbedding(tokens=_joined(outputs[0].last_hidden_state, counts))
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    firsts = torch.tensor([0, *counts[:-1]]).cumsum(0).to(hidden.device, non_blocking=True)
    return TextEmbedding(tokens=_joined(hidden, counts), pooled=outputs[1].text_embeds[firsts])


def _joined(hidden: Tensor, counts: Sequence[int]) -> Tensor:
    """(B, 77 n, width) of the chunks (sum of counts, 77, width) of B texts."""
    return torch.stack(even([chunks.flatten(0, 1) for chunks in hidden.split(list(counts))]))


def even(texts: Sequence[Tensor]) -> list[Tensor]:
    """Encoded texts (..., tokens, width) of one length, their least common multiple: each as often as it takes.

    Attention to a text n times over is attention to it once, which is how ComfyUI evens branches out.
    """
    length = math.lcm(*(text.shape[-2] for text in texts))
    return [text if text.shape[-2] == length else torch.cat([text] * (length // text.shape[-2]), -2) for text in texts]


@torch.inference_mode()
def encode_image(model: Model, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
    """The image condition c_I: the mode of the autoencoder's posterior (paper's code; unscaled but for CosXL-Edit).

    ``pixels`` is (B, 3, H, W) in [-1, 1] with sides divisible by 8; returns (B, 4, H/8, W/8). A UNet that takes a mask
    (Zhao et al. 2024, UltraEdit) is told ``mask``, a picture as ``pixels`` are, white where something may change, as
    the last four of (B, 8, H/8, W/8); no mask is a white one. Other UNets are not told.
    """
    latents = _mode(model, pixels)
    if not model.spec.takes_mask:
        return latents
    told = _mode(model, torch.ones_like(pixels[:1]) if mask is None else mask)
    return torch.cat([latents, told.expand_as(latents)], dim=1)


def _mode(model: Model, pixels: Tensor) -> Tensor:
    autoencoder = model.autoencoder
    with model.running(autoencoder):
        # In channels_last torch's group norm on a CPU (2.14) loses digits where a mean is large beside its spread.
        there = pixels.to(autoencoder.device, autoencoder.dtype).contiguous()
        mode = autoencoder.encode(there).latent_dist.mode()
    if 8 * mode.shape[-1] != pixels.shape[-1]:
        raise CheckpointError(
            f"the autoencoder makes {mode.shape[-1]} latents of {pixels.shape[-1]} pixels, and Stable Diffusion's an "
            "eighth; the checkpoint is of another family"
        )
    return mode * model.spec.latent_scale if model.spec.scaled_condition else mode


def clean_latents(model: Model, image: Tensor) -> Tensor:
    """The clean latents (B, 4, h, w), as a sampler would return them, of pictures whose conditions are ``image``."""
    image = image[:, :LATENT_CHANNELS]
    return image if model.spec.scaled_condition else image * model.spec.latent_scale


@torch.inference_mode()
def decode_latents(model: Model, latents: Tensor) -> Tensor:
    """Pictures (B, 3, 8h, 8w) in about [-1, 1] of clean latents (B, 4, h, w) as the sampler returns them."""
    autoencoder = model.autoencoder
    scaled = latents / model.spec.latent_scale
    with model.running(autoencoder):
        return autoencoder.decode(scaled.to(autoencoder.device, autoencoder.dtype)).sample.float()


def decode_pictures(model: Model, latents: Tensor, most: int) -> list[Image.Image]:
    """The pictures of clean latents (B, 4, h, w), at most so many decoded at once, fewer where memory is short."""
    count = decoded_at_once(model, latents.shape[-2:], most)
    return images_of([to_levels(decode_latents(model, part)) for part in latents.split(count)])


def decoded_at_once(model: Model, size: Sequence[int], most: int) -> int:
    """How many latents of (h, w) are decoded at once: as memory allows, and no feature map of 2**31 numbers or more.

    Kernels that count places in 32 bits fail there.
    """
    autoencoder = model.autoencoder
    width, places = autoencoder.config.block_out_channels[0], 64 * size[0] * size[1]
    a_picture = places * width * DECODER_ACTIVATIONS_PER_PIXEL * autoencoder.dtype.itemsize
    with model.running(autoencoder):  # before it is asked what is free
        fitting = int(USABLE_MEMORY * free_memory(autoencoder.device) / a_picture)
    return max(1, min(most, fitting, LARGEST_TENSOR // (places * width * DECODER_WIDTHS)))


def size_ids(model: Model, sizes: Sequence[tuple[int, int]]) -> Tensor | None:
    """SDXL's six numbers a sample: height and width before, no crop, height and width after; None elsewhere."""
    if model.spec.family not in LAST_LAYERS:
        return None
    rows = [(height, width, 0, 0, height, width) for width, height in sizes]
    return torch.tensor(rows, dtype=torch.float32, device=model.device)
