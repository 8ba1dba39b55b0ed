"""Attention of a UNet under our control, for the length of a context manager; nothing stays patched.

The text does not change during an edit, so its keys and values are projected once and not once per step. In a pair of
pictures the edited one may look where the source looks (self-attention sharing, section 3.1 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

__all__ = [
    "CachedTextAttention",
    "SelfSharing",
    "TextKeys",
    "attend",
    "p2p_active",
    "self_sharing",
    "share_self_attention",
    "sharing_rows",
    "text_keys",
]

Processor = TypeVar("Processor")
CPU_BLOCK = 16


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head softmax(q k^T / sqrt(d)) v on (B, tokens, heads * d) tensors, without materialising the map."""
    key, value, mask = _in_blocks(key, value)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _in_blocks(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """On a CPU, keys and values filled up to whole blocks, and the mask that hides what was filled in.

    A CPU's kernel takes three times as long for a text's 77 keys as for 80 (heads of 8, torch 2.15): the result is the
    same, and an edit takes a quarter less.
    """
    missing = -key.shape[1] % CPU_BLOCK
    if key.device.type != "cpu" or not missing:
        return key, value, None
    mask = torch.zeros(1, key.shape[1] + missing, dtype=key.dtype)
    mask[:, -missing:] = -torch.inf
    return pad(key, (0, 0, 0, missing)), pad(value, (0, 0, 0, missing)), mask


def p2p_active(step: int, steps: int, p2p_threshold: float) -> bool:
    """Whether a pair shares its self-attention in a step 0 .. steps - 1: while p > i / (n - 1) (the paper's code).

    p = 0 never shares, p = 0.3 shares 3 of 10 steps, p > 1 all. A single step is the first one: it shares if p > 0.
    """
    return p2p_threshold > step / max(1, steps - 1)


def sharing_rows(active: Sequence[bool], halves: int = 2) -> list[int]:
    """For each row of a batch, the row whose queries and keys it uses.

    The batch is ``halves`` blocks (the guidance branches in it), each of the pairs [source, edited, source, edited,
    ...]; ``active[k]`` says whether pair k shares. A source always uses its own.
    """
    block = [row for pair, shares in enumerate(active) for row in (2 * pair, 2 * pair + (not shares))]
    return [half * len(block) + row for half in range(halves) for row in block]


def share_self_attention(query: Tensor, key: Tensor, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, tokens, width) of which each row uses those of another: softmax(q_src k_src^T) v_own.

    With the rows of ``sharing_rows`` this is the paper's copying of the source's attention logits (section 3.1, after
    Hertz et al. 2022), without the logits. It holds for the inputs of the two projections as well, so a patch that
    runs before them may call it.
    """
    index = torch.as_tensor(rows, device=query.device)
    return query[index], key[index]


class TextKeys:
    """Keys and values of named texts for every cross-attention of one UNet; ``use`` picks the text of the next call."""

    def __init__(self, layers: dict[str, CachedTextAttention]) -> None:
        self._layers = layers

    @torch.no_grad()
    def prepare(self, name: str, context: Tensor, rows: Sequence[int] | None = None) -> None:
        """Project a text's embedding, shape (B, tokens, width), in every layer; ``rows`` repeats the results."""
        for layer in self._layers.values():
            layer.prepare(name, context, rows)

    def use(self, name: str) -> None:
        """Attend to a prepared text from now on; its batch must be the next call's."""
        for layer in self._layers.values():
            layer.active = layer.texts[name]


@contextmanager
def text_keys(unet: nn.Module, layer: Callable[[nn.Module], CachedTextAttention] | None = None) -> Iterator[TextKeys]:
    """Let a diffusers UNet attend to prepared texts; its own processors are back afterwards, whatever happens.

    ``layer`` makes the processor of a cross-attention, if it is to do more than that.
    """
    with _installed(unet, "attn2", layer or CachedTextAttention) as layers:
        yield TextKeys(layers)


class SelfSharing:
    """Which row's queries and keys each row of the next calls uses, for every self-attention of one UNet."""

    def __init__(self) -> None:
        self.projected: Tensor | None = None
        self.rows: Tensor | None = None

    def use(self, rows: Sequence[int] | None, device: torch.device | None = None) -> None:
        """Share by ``sharing_rows`` from now on; None, or each row its own, is plain self-attention."""
        if rows is None or list(rows) == list(range(len(rows))):
            self.projected = self.rows = None
            return
        used = sorted(set(rows))
        self.projected = torch.tensor(used, device=device)
        self.rows = torch.tensor([used.index(row) for row in rows], device=device)


@contextmanager
def self_sharing(unet: nn.Module) -> Iterator[SelfSharing]:
    """Put every self-attention of a diffusers UNet under a SelfSharing; its own processors are back afterwards."""
    sharing = SelfSharing()
    with _installed(unet, "attn1", lambda _: _SharedSelfAttention(sharing)):
        yield sharing


class CachedTextAttention:
    """A diffusers attention processor whose keys and values are projected beforehand."""

    def __init__(self, attention: nn.Module) -> None:
        self._attention: Any = attention
        self.texts: dict[str, tuple[Tensor, Tensor]] = {}
        self.active: tuple[Tensor, Tensor] | None = None

    def prepare(self, name: str, context: Tensor, rows: Sequence[int] | None = None) -> None:
        key, value = self._attention.to_k(context), self._attention.to_v(context)
        chosen = slice(None) if rows is None else list(rows)
        self.texts[name] = (key[chosen], value[chosen])

    def mix(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        return attend(query, key, value, heads)

    def __call__(self, attn: Any, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        if self.active is None:
            raise RuntimeError("no text was chosen; call TextKeys.prepare and TextKeys.use first")
        mixed = self.mix(attn.to_q(hidden_states), *self.active, attn.heads)
        return attn.to_out[1](attn.to_out[0](mixed))


class _SharedSelfAttention:
    """A diffusers attention processor: sdpa(q_src, k_src, v_own); what nobody looks with is not projected."""

    def __init__(self, sharing: SelfSharing) -> None:
        self._sharing = sharing

    def __call__(self, attn: Any, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        projected, rows = self._sharing.projected, self._sharing.rows
        looking = hidden_states if projected is None else hidden_states[projected]
        query, key = attn.to_q(looking), attn.to_k(looking)
        if rows is not None:
            query, key = share_self_attention(query, key, rows)
        mixed = attend(query, key, attn.to_v(hidden_states), attn.heads)
        return attn.to_out[1](attn.to_out[0](mixed))


@contextmanager
def _installed(unet: Any, ending: str, make: Callable[[nn.Module], Processor]) -> Iterator[dict[str, Processor]]:
    """Processors made for the layers of that name, in the UNet's place of its own until the block ends."""
    # One walk through the modules; attn_processors and set_attn_processor take several each.
    modules: dict[str, Any] = {name: module for name, module in unet.named_modules() if name.endswith(ending)}
    before = {name: module.processor for name, module in modules.items()}
    layers = {name: make(module) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.set_processor(layers[name])
        yield layers
    finally:
        for name, module in modules.items():
            module.set_processor(before[name])
