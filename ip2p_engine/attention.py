"""Attention of a UNet under our control, for the length of a context manager; nothing stays patched.

The text does not change during an edit, so its keys and values are projected once and not once per step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["TextKeys", "attend", "text_keys"]


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head softmax(q k^T / sqrt(d)) v on (B, tokens, heads * d) tensors, without materialising the map."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class TextKeys:
    """Keys and values of named texts for every cross-attention of one UNet; ``use`` picks the text of the next call."""

    def __init__(self, layers: dict[str, _CachedTextAttention]) -> None:
        self._layers = layers

    @torch.no_grad()
    def prepare(self, name: str, context: Tensor) -> None:
        """Project a text's embedding, shape (B, tokens, width), in every layer."""
        for layer in self._layers.values():
            layer.prepare(name, context)

    def use(self, name: str) -> None:
        """Attend to a prepared text from now on; its batch must be the next call's."""
        for layer in self._layers.values():
            layer.active = layer.texts[name]


@contextmanager
def text_keys(unet: nn.Module) -> Iterator[TextKeys]:
    """Let a diffusers UNet attend to prepared texts; its own processors are back afterwards, whatever happens."""
    before = unet.attn_processors
    modules = dict(unet.named_modules())
    layers = {
        name: _CachedTextAttention(modules[name.removesuffix(".processor")])
        for name in before
        if name.endswith("attn2.processor")
    }
    unet.set_attn_processor({**before, **layers})
    try:
        yield TextKeys(layers)
    finally:
        unet.set_attn_processor(before)


class _CachedTextAttention:
    """A diffusers attention processor whose keys and values are projected beforehand."""

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention
        self.texts: dict[str, tuple[Tensor, Tensor]] = {}
        self.active: tuple[Tensor, Tensor] | None = None

    def prepare(self, name: str, context: Tensor) -> None:
        self.texts[name] = (self._attention.to_k(context), self._attention.to_v(context))

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        key, value = self.active
        mixed = attend(attn.to_q(hidden_states), key, value, attn.heads)
        return attn.to_out[1](attn.to_out[0](mixed))
