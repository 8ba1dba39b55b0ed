"""Deep features kept for some evaluations: between two noise levels that lie close they change little.

The idea is DeepCache's (Ma et al. 2024): what comes out of the deeper levels is kept, and only the finest level is
computed anew. What is kept lies beside the call, and nothing of it in the network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import AttentionCall

__all__ = ["FeatureCache", "forward"]


class FeatureCache:
    """Evaluates a UNet whole at every ``keep``-th call, and at the others at its finest level alone."""

    def __init__(self, keep: int) -> None:
        self._keep, self._calls, self._deep = keep, 0, torch.empty(0)

    def __call__(
        self, unet: Any, inputs: Tensor, t: Tensor, call: AttentionCall, added: dict[str, Tensor] | None
    ) -> Tensor:
        """The UNet's output for inputs (B, C, h, w); one shape for all calls."""
        kept = self._deep if self._calls % self._keep else None
        output, self._deep = forward(unet, inputs, t, call, added, kept)
        self._calls += 1
        return output


def forward(
    unet: Any, inputs: Tensor, t: Tensor, call: AttentionCall, added: dict[str, Tensor] | None, deep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(output, what came into the finest upward block) of a diffusers UNet; ``deep`` stands in for all below it."""
    time = unet.time_embedding(unet.get_time_embed(sample=inputs, timestep=t))
    more = unet.get_aug_embed(emb=time, encoder_hidden_states=None, added_cond_kwargs=added)
    time = time if more is None else time + more
    told: dict[str, Any] = {"temb": time, "call": call}
    x = unet.conv_in(inputs)
    skips = (x,)
    for block in unet.down_blocks[: len(unet.down_blocks) if deep is None else 1]:
        x, found = _run(block, told, hidden_states=x)
        skips += found
    *inner, last = unet.up_blocks
    if deep is None:
        deep = _run(unet.mid_block, told, hidden_states=x)
        for block in inner:
            own, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            size = skips[-1].shape[2:]
            deep = _run(block, told, hidden_states=deep, res_hidden_states_tuple=own, upsample_size=size)
    x = _run(last, told, hidden_states=deep, res_hidden_states_tuple=skips[: len(last.resnets)])
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x))), deep


def _run(block: Any, told: dict[str, Any], **given: Any) -> Any:
    """A block, which hears of the texts only if it attends to them."""
    if getattr(block, "has_cross_attention", False):
        given |= {"encoder_hidden_states": None, "cross_attention_kwargs": {"call": told["call"]}}
    return block(temb=told["temb"], **given)
