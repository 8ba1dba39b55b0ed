"""The attention of a UNet. What a call attends to travels with the call: nothing of it stays in the network.

The text does not change during an edit, so its keys and values are projected once and not once per step. In a pair of
pictures the edited one may look where the source looks (self-attention sharing, section 3.1 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention

__all__ = [
    "AttentionCall",
    "KeyValue",
    "Sharing",
    "attend",
    "fused_projections",
    "install",
    "is_ours",
    "project_text",
    "share_self_attention",
    "whole_blocks",
]

KeyValue = tuple[Tensor, Tensor]
Fused = tuple[Tensor, Tensor | None]
Mix = Callable[[Tensor, Tensor, Tensor, int], Tensor]
CPU_BLOCK = 16


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head softmax(q k^T / sqrt(d)) v on (B, tokens, heads * d) tensors, without materialising the map.

    ``mask`` (1, keys) is what ``whole_blocks`` gives.
    """
    if mask is None:
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


def whole_blocks(texts: Sequence[KeyValue]) -> tuple[list[KeyValue], Tensor | None]:
    """Texts of one length, filled up once where ``attend`` would fill them up in each step, and the mask for it."""
    filled = [_in_blocks(*text) for text in texts]
    return [(key, value) for key, value, _ in filled], filled[0][2] if filled else None


def share_self_attention(query: Tensor, key: Tensor, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, tokens, width) of which each row uses those of another: softmax(q_src k_src^T) v_own.

    This is the paper's copying of the source's attention logits (section 3.1, after Hertz et al. 2022), without the
    logits. It holds for the inputs of the two projections as well, so a patch that runs before them may call it.
    """
    index = torch.as_tensor(rows, device=query.device)
    return query[index], key[index]


@dataclass(frozen=True, eq=False)
class Sharing:
    """Which row's queries and keys each row of a batch uses in self-attention."""

    projected: Tensor
    """The rows whose queries and keys are used; the others' are not computed."""
    rows: Tensor
    """For each row of the batch, which of them it uses."""

    @classmethod
    def of(cls, rows: Sequence[int], device: torch.device | None = None, *, fixed: bool = False) -> Sharing | None:
        """The sharing of those rows; None where each row uses its own.

        ``fixed``: all are projected and none is None, so that whatever rows share, a compiled network sees one shape.
        """
        if not fixed and list(rows) == list(range(len(rows))):
            return None
        used = list(range(len(rows))) if fixed else sorted(set(rows))
        places = [used.index(row) for row in rows]
        return cls(*(torch.tensor(index).to(device, non_blocking=True) for index in (used, places)))


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What one call of a UNet attends to; handed over as ``cross_attention_kwargs={"call": ...}``."""

    texts: Sequence[KeyValue] | None = None
    """Keys and values of the batch's texts, one pair a cross-attention, as ``project_text`` gives them."""
    sharing: Sharing | None = None
    """Self-attention sharing; None is plain self-attention."""
    mix: Mix = attend
    """(query, key, value, heads) -> what cross-attention gives, before the last projection."""
    mask: Tensor | None = None
    """Hides what the texts were filled up with (``whole_blocks``); not with another mix."""
    fused: Sequence[Fused] | None = None
    """Weights and biases of each self-attention's three projections in one, as ``fused_projections`` gives them."""
    twins: int = 0
    """So many first rows differ from as many following ones in their text alone."""


class _Processor:
    """A diffusers attention processor that follows an AttentionCall; without one the processor before it answers."""

    def __init__(self, default: Any, place: int) -> None:
        """``place``: which of the network's self- or cross-attentions it is."""
        self._default, self._place = default, place


class _CrossAttention(_Processor):
    """Attention to the call's texts."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, *args: Any, call: AttentionCall | None = None, **given: Any
    ) -> Tensor:
        if call is None or call.texts is None:
            return self._default(attn, hidden_states, *args, **given)
        key, value = call.texts[self._place]
        query = attn.to_q(hidden_states)
        if call.mask is None:
            return attn.to_out[0](call.mix(query, key, value, attn.heads))
        return attn.to_out[0](attend(query, key, value, attn.heads, call.mask))


class _SelfAttention(_Processor):
    """sdpa(q_src, k_src, v_own), as the call shares."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, *args: Any, call: AttentionCall | None = None, **given: Any
    ) -> Tensor:
        if call is None:
            return self._default(attn, hidden_states, *args, **given)
        shared = call.sharing
        looking = hidden_states if shared is None else hidden_states[shared.projected]
        if call.fused is None:
            query, key, value = attn.to_q(looking), attn.to_k(looking), attn.to_v(hidden_states)
        else:
            query, key, value = _projected(*call.fused[self._place], looking, hidden_states)
        if shared is not None:
            query, key = share_self_attention(query, key, shared.rows)
        return attn.to_out[0](attend(query, key, value, attn.heads))


def _projected(weight: Tensor, bias: Tensor | None, looking: Tensor, own: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys of some rows and values of all, by one product where they are the same rows."""
    if looking is own:
        return linear(own, weight, bias).chunk(3, dim=-1)
    cut = 2 * len(weight) // 3
    first, last = (None, None) if bias is None else (bias[:cut], bias[cut:])
    return (*linear(looking, weight[:cut], first).chunk(2, dim=-1), linear(own, weight[cut:], last))


def is_ours(attn: Any) -> bool:
    """Whether an attention of a UNet follows an AttentionCall and is but projections around softmax(q k^T) v."""
    odd = (attn.group_norm, attn.spatial_norm, attn.norm_q, attn.norm_k, attn.norm_cross, attn.residual_connection)
    layers = (attn.to_q, attn.to_k, attn.to_v)
    return (
        isinstance(attn.processor, _Processor)
        and not any(odd)
        and attn.rescale_output_factor == 1
        and all(type(layer) is nn.Linear for layer in layers)
    )


@torch.no_grad()
def fused_projections(unet: nn.Module) -> list[Fused]:
    """Copies of the projections of every self-attention of a UNet as they are now: (q, k, v) in one, and their bias."""
    found = []
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            layers: Any = (module.to_q, module.to_k, module.to_v)
            biases = [layer.bias for layer in layers]
            bias = None if biases[0] is None else torch.cat(biases)
            found.append((torch.cat([layer.weight for layer in layers]), bias))
    return found


def install(unet: nn.Module) -> list[Any]:
    """Let the attentions of a diffusers UNet be told by their calls, and return the cross-attentions in order.

    Done once, when a model is loaded: a call that tells nothing is answered as before. Where it was done already,
    nothing changes.
    """
    layers: dict[str, list[Any]] = {"attn1": [], "attn2": []}
    kinds = {"attn1": _SelfAttention, "attn2": _CrossAttention}
    for name, module in unet.named_modules():
        kind = name.rpartition(".")[2]
        if kind in kinds:
            if not isinstance(module.processor, _Processor):
                module.set_processor(kinds[kind](module.processor, len(layers[kind])))
            layers[kind].append(module)
    return layers["attn2"]


@torch.no_grad()
def project_text(unet: nn.Module, context: Tensor, rows: Sequence[int] | None = None) -> list[KeyValue]:
    """Keys and values of texts (B, tokens, width) for every cross-attention of a UNet; ``rows`` repeats the results."""
    chosen = slice(None) if rows is None else list(rows)
    return [(layer.to_k(context)[chosen], layer.to_v(context)[chosen]) for layer in install(unet)]
