"""What the frozen networks make of a batch: the posterior of the edited picture, the condition, the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..networks.conditioning import TextEmbedding, encode_text
from ..networks.model import Model
from .batches import Batch

__all__ = ["Encoded", "Encoder"]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A micro-batch of n examples in the latent world, float32."""

    mean: Tensor
    """Of the edited picture's posterior, (n, 4, h, w), unscaled."""
    std: Tensor
    condition: Tensor
    """c_I, (n, 4, h, w): the mode, unscaled but for CosXL-Edit."""
    text: TextEmbedding
    size_ids: Tensor
    """(n, 6); only SDXL's network reads it."""


class Encoder:
    """Encodes batches of pictures and texts; passes on what a cache has encoded."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.null_text = self.text([""])

    def __call__(self, batch: Batch) -> Encoded:
        tensors = batch.tensors
        if "pixels" in tensors:
            tensors = {**tensors, **self.latents(tensors["pixels"])}
            text = self.text(batch.instructions)
        else:
            pooled = tensors.get("pooled")
            text = TextEmbedding(tokens=tensors["tokens"].float(), pooled=None if pooled is None else pooled.float())
        mean, std, condition = (tensors[name].float() for name in ("mean", "std", "condition"))
        return Encoded(mean=mean, std=std, condition=condition, text=text, size_ids=tensors["size_ids"])

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> dict[str, Tensor]:
        """Of uint8 pixels (n, 2, 3, H, W), before and after, in one pass of the autoencoder."""
        autoencoder, spec = self._model.autoencoder, self._model.spec
        values = (2 * pixels.to(autoencoder.device).float() / 255 - 1).flatten(0, 1)
        posterior = autoencoder.encode(values.to(autoencoder.dtype)).latent_dist
        mode = posterior.mode().float().unflatten(0, (-1, 2))
        std = posterior.std.float().unflatten(0, (-1, 2))
        scale = spec.latent_scale if spec.scaled_condition else 1.0
        return {"mean": mode[:, 1], "std": std[:, 1], "condition": scale * mode[:, 0]}

    def text(self, texts: Sequence[str]) -> TextEmbedding:
        """Each different text is encoded once; float32."""
        distinct = list(dict.fromkeys(texts))
        with torch.inference_mode():
            embedded = encode_text(self._model, distinct).rows([distinct.index(text) for text in texts])
        # Out of inference mode a clone is an ordinary tensor, which a backward pass may keep.
        pooled = None if embedded.pooled is None else embedded.pooled.clone().float()
        return TextEmbedding(tokens=embedded.tokens.clone().float(), pooled=pooled)
