"""A UNet's evaluation written out: what diffusers computes, without what a walk need not do anew in each step.

The times of all steps are projected at once, self-attention projects once for queries, keys and values, a 1 x 1
convolution is a product, and nothing is divided by 1. The modules and their weights stay diffusers', unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from .attention import AttentionCall, is_ours

__all__ = ["TimeRows", "forward", "is_plain", "project_times"]

TimeRows = Mapping[nn.Module, Tensor]
"""What each residual block adds to its features, (B, C, 1, 1), or (1, C, 1, 1) for all rows."""
BLOCKS = {
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "UNetMidBlock2DCrossAttn",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
}
CHANGES = ("_forward_hooks", "_forward_pre_hooks", "_compiled_call_impl")


def is_plain(unet: Any) -> bool:
    """Whether ``forward`` is this UNet's own evaluation: Stable Diffusion's layers, not compiled, and without hooks."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    odd = (unet.class_embedding, unet.encoder_hid_proj, unet.time_embed_act, unet.config.center_input_sample)
    return (
        not unet.training
        and not any(odd)
        and unet.config.addition_embed_type in (None, "text_time")
        and unet.conv_norm_out is not None
        and all(type(block).__name__ in BLOCKS and not getattr(block, "s1", None) for block in blocks)
        and all(map(_is_usual, unet.modules()))
    )


def _is_usual(module: Any) -> bool:
    if "forward" in vars(module) or any(getattr(module, name, None) for name in CHANGES):
        return False
    match type(module).__name__:
        case "ResnetBlock2D":
            own = (module.up, module.down, module.skip_time_act, module.time_embedding_norm != "default")
            return not any(own) and module.output_scale_factor == 1 and type(module.nonlinearity) is nn.SiLU
        case "Transformer2DModel":
            return module.is_input_continuous and type(module.proj_in) in (nn.Linear, nn.Conv2d)
        case "BasicTransformerBlock":
            kind = type(module.ff.net[0]).__name__
            return (module.norm_type, module.pos_embed, kind) == ("layer_norm", None, "GEGLU") and all(
                is_ours(one) for one in (module.attn1, module.attn2)
            )
    return True


def project_times(
    unet: Any, t: Tensor, added: dict[str, Tensor] | None = None, scales: Tensor | None = None
) -> TimeRows:
    """Times (B,) as each residual block adds them; ``added`` is SDXL's text and sizes, with as many rows.

    ``scales`` (1, width) are the guidance scales of a network that takes them, for all rows.
    """
    dtype = unet.conv_in.weight.dtype
    time = unet.time_embedding(unet.time_proj(t).to(dtype), scales)
    more = unet.get_aug_embed(emb=time, encoder_hidden_states=None, added_cond_kwargs=added)
    hidden = silu(time if more is None else time + more)
    return {
        resnet: resnet.time_emb_proj(hidden)[:, :, None, None]
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
        for resnet in block.resnets
    }


def forward(
    unet: Any,
    inputs: Tensor,
    times: TimeRows,
    call: AttentionCall,
    *,
    residuals: tuple[Sequence[Tensor], Tensor] | None = None,
    deep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, what came into the finest upward block) for inputs (B, C, h, w); without gradients.

    ``residuals`` are a ControlNet's, on the way down and in the middle. ``deep`` stands in for all below the finest
    level (``feature_cache.py``). Up to the first text ``call.twins`` are computed once.
    """
    twins = call.twins
    x = unet.conv_in(inputs[twins:])
    skips = [_with_twins(x, twins)]
    for block in unet.down_blocks[: len(unet.down_blocks) if deep is None else 1]:
        for resnet, transformer in _layers(block):
            x = _attended(transformer, _resnet(resnet, x, times), call, twins)
            twins = 0
            skips.append(x)
        for downsampler in block.downsamplers or ():
            x = downsampler(x)
            skips.append(x)
    *inner, last = unet.up_blocks
    if deep is None:
        if residuals is not None:
            skips = [skip + more for skip, more in zip(skips, residuals[0], strict=True)]
        x = _middle(unet.mid_block, x, times, call)
        deep = x if residuals is None else x + residuals[1]
        for block in inner:
            own, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            deep = _up(block, deep, own, times, call, skips[-1].shape[2:])
    x = _up(last, deep, skips[: len(last.resnets)], times, call, None)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x))), deep


def _layers(block: Any) -> Iterator[tuple[Any, Any]]:
    """The residual blocks, each with the transformer that follows it or None."""
    transformers = block.attentions if getattr(block, "has_cross_attention", False) else repeat(None)
    return zip(block.resnets, transformers, strict=False)


def _middle(block: Any, x: Tensor, times: TimeRows, call: AttentionCall) -> Tensor:
    first, *others = block.resnets
    x = _resnet(first, x, times)
    for transformer, resnet in zip(block.attentions, others, strict=True):
        x = _resnet(resnet, _attended(transformer, x, call), times)
    return x


def _up(block: Any, x: Tensor, skips: Sequence[Tensor], times: TimeRows, call: AttentionCall, size: Any) -> Tensor:
    for (resnet, transformer), skip in zip(_layers(block), reversed(skips), strict=False):
        x = _attended(transformer, _resnet(resnet, torch.cat([x, skip], dim=1), times), call)
    for upsampler in block.upsamplers or ():
        x = upsampler(x, size)
    return x


def _resnet(block: Any, x: Tensor, times: TimeRows) -> Tensor:
    hidden = block.conv1(silu(block.norm1(x), inplace=True))
    hidden = block.conv2(silu(block.norm2(hidden.add_(times[block])), inplace=True))
    return hidden.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))


def _with_twins(x: Tensor, twins: int) -> Tensor:
    """All rows, of those that follow the twins."""
    return torch.cat([x[:twins], x]) if twins else x


def _attended(module: Any, x: Tensor, call: AttentionCall, twins: int = 0) -> Tensor:
    """A transformer over the places of x, as a residual; None is none. Rows without their twins become all rows."""
    if module is None:
        return x
    tokens = _product(module.proj_in, module.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
    for block in module.transformer_blocks:
        tokens = tokens + block.attn1.processor(block.attn1, block.norm1(tokens), call=call)
        x, tokens, twins = _with_twins(x, twins), _with_twins(tokens, twins), 0
        tokens = tokens + block.attn2.processor(block.attn2, block.norm2(tokens), call=call)
        widen, _, narrow = block.ff.net
        value, gate = widen.proj(block.norm3(tokens)).chunk(2, dim=-1)
        tokens = tokens + narrow(value * gelu(gate))
    return x + _product(module.proj_out, tokens).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def _product(layer: nn.Module, tokens: Tensor) -> Tensor:
    """A linear layer, or a 1 x 1 convolution, on tokens (B, n, width)."""
    weight: Any = layer.weight
    return linear(tokens, weight.flatten(1), layer.bias)  # type: ignore[arg-type]
