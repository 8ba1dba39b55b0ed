"""Prompt-to-Prompt the slow way: one pair at a time, every attention map materialised, logits copied, loops.

What the engine does without maps and in batches is held against this, in tests and in benchmarks/pairs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

U_SOURCE, U_EDITED, C_SOURCE, C_EDITED = range(4)


@dataclass
class State:
    """What the attentions do in the current step, and what they saw."""

    share: bool = False
    edit: Callable[[Tensor, Tensor], Tensor] | None = None
    seen: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


class SlowAttention:
    """A diffusers attention processor with explicit maps, for a batch of four rows a pair."""

    def __init__(self, state: State, crossing: bool) -> None:
        self.state, self.crossing = state, crossing

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_, **__):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            self.split(t, attn.heads) for t in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if self.state.share and not self.crossing:
            logits[U_EDITED] = logits[U_SOURCE]
            logits[C_EDITED] = logits[C_SOURCE]
        maps = logits.softmax(-1)
        if self.crossing and self.state.edit is not None:
            maps[C_EDITED] = self.state.edit(maps[C_SOURCE], maps[C_EDITED])
        if self.crossing:
            self.state.seen.setdefault(maps.shape[2], []).append((maps[C_SOURCE].mean(0), maps[C_EDITED].mean(0)))
        mixed = (maps @ v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed))

    @staticmethod
    def split(tensor: Tensor, heads: int) -> Tensor:
        return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


@contextmanager
def slow_attention(unet) -> Iterator[State]:
    """Every attention of the UNet the slow way."""
    before, state = unet.attn_processors, State()
    unet.set_attn_processor({name: SlowAttention(state, name.endswith("attn2.processor")) for name in before})
    try:
        yield state
    finally:
        unet.set_attn_processor(before)


def slow_denoised(model, state, x, sigma, texts, scale, *, late=False) -> Tensor:
    """u + w (c - u) on the clean latents of one pair; ``texts`` is (3, 77, d): none, source, edited."""
    context = texts[[0, 0, 1, 1 if late else 2]].to(model.dtype)
    inputs = torch.cat([x, x]) / (sigma**2 + 1) ** 0.5
    t = model.timestep(sigma).expand(4)
    eps = model.unet(inputs.to(model.dtype), t, encoder_hidden_states=context).sample.to(x.dtype)
    denoised = torch.cat([x, x]) - sigma * eps
    return denoised[:2] + scale * (denoised[2:] - denoised[:2])


@torch.inference_mode()
def slow_pair(
    model, texts, p, scale, sigmas, noises, *, late_steps=0, edit=None, edit_steps=0, blend=None, blend_from=0
) -> Tensor:
    """The clean latents (2, 4, h, w) of one pair by ancestral Euler steps; ``noises`` are (1, 4, h, w) in draw order.

    ``edit(source map, own map)`` acts in the first ``edit_steps``; ``blend(seen)`` gives a mask (h, w).
    """
    steps = len(sigmas) - 1
    x = noises[0].repeat(2, 1, 1, 1) * sigmas[0]
    seen: dict[int, list] = {}
    with slow_attention(model.unet) as state:
        for i, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            late = i < late_steps
            state.share = p > (i / (steps - 1) if steps > 1 else 0)
            state.edit = edit if i < edit_steps and not late else None
            state.seen = {} if late else seen
            denoised = slow_denoised(model, state, x, sigma, texts, scale, late=late)
            up = (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5
            down = (after**2 - up**2) ** 0.5
            x = x + (x - denoised) / sigma * (down - sigma)
            if after > 0:
                x = x + noises[i + 1] * up
            if blend is not None and not late and i >= blend_from:
                mask = blend(seen)
                x[1] = torch.where(mask, x[1], x[0])
    return x
