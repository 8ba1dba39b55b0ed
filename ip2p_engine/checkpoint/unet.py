"""The UNet: its configuration from the tensors' shapes, and its names in the two layouts.

LDM numbers the blocks through, diffusers by resolution and kind; inside a block both hold the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from .names import count, replace_parts, shape_of

__all__ = ["UNET_MARKS", "infer_unet", "ldm_unet_name", "unet_layout"]

PART = "UNet"
HEADS, HEAD_WIDTH, SDXL_ID_WIDTH = 8, 64, 256
UNET_MARKS = {"ldm": "input_blocks.0.0.weight", "diffusers": "conv_in.weight"}
TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What the two layouts say in different words."""

    channels: tuple[int, ...]
    layers: int
    depths: tuple[int, ...]
    """Transformer blocks per level, 0 for none."""
    mid_depth: int
    first_attention: str
    """Prefix of an attention module."""


def unet_layout(tensors: Mapping[str, Tensor]) -> str | None:
    """ "ldm", "diffusers" or None, by the first convolution's name."""
    return next((layout for layout, mark in UNET_MARKS.items() if mark in tensors), None)


def infer_unet(tensors: Mapping[str, Tensor], layout: str, *, pooled_width: int | None = None) -> dict[str, Any]:
    """UNet2DConditionModel's configuration from names and shapes.

    Shapes do not say the number of heads: 1x1-convolution projections (SD1.x) mean 8 heads, linear ones (SD2, SDXL)
    heads of 64 channels. ``pooled_width`` is that of SDXL's pooled text.
    """
    shape = _ldm_shape(tensors) if layout == "ldm" else _diffusers_shape(tensors)
    first, last = UNET_MARKS[layout], "out.2.weight" if layout == "ldm" else "conv_out.weight"
    attention = shape.first_attention
    linear = len(shape_of(tensors, f"{attention}proj_in.weight", PART)) == 2
    context = shape_of(tensors, f"{attention}transformer_blocks.0.attn2.to_k.weight", PART)[1]
    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in shape.depths)
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(shape.depths))
    return {
        "in_channels": shape_of(tensors, first, PART)[1],
        "out_channels": shape_of(tensors, last, PART)[0],
        "block_out_channels": shape.channels,
        "layers_per_block": shape.layers,
        "down_block_types": down,
        "up_block_types": up,
        "transformer_layers_per_block": _depth_config(shape),
        "cross_attention_dim": context,
        "use_linear_projection": linear,
        "attention_head_dim": _heads(shape.channels) if linear else HEADS,
        **_added_config(tensors, layout, pooled_width),
    }


def ldm_unet_name(name: str, config: Mapping[str, Any]) -> str:
    """The LDM name of a diffusers UNet tensor."""
    found = BLOCK.fullmatch(name)
    if found is None:
        module, tail = _split_top(name)
        return f"{TOP[module]}.{replace_parts(tail, RESNET) if '.resnets.' in module else tail}"
    side, block, kind, index, tail = found[1], int(found[2]), found[3], int(found[4]), found[5]
    stride = config["layers_per_block"] + 1
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * stride}.0.{tail.replace('conv.', 'op.')}"
    if kind == "upsamplers":
        slot = 2 if config["up_block_types"][block].startswith("CrossAttn") else 1
        return f"output_blocks.{block * stride + stride - 1}.{slot}.{tail}"
    position = block * stride + index
    home = f"input_blocks.{position + 1}" if side == "down" else f"output_blocks.{position}"
    return f"{home}.0.{replace_parts(tail, RESNET)}" if kind == "resnets" else f"{home}.1.{tail}"


def _split_top(name: str) -> tuple[str, str]:
    module = next((top for top in TOP if name.startswith(f"{top}.")), None)
    if module is None:
        raise CheckpointError(f"the UNet has a tensor {name} that the LDM layout cannot name; save it for diffusers")
    return module, name[len(module) + 1 :]


def _ldm_shape(tensors: Mapping[str, Tensor]) -> _Shape:
    blocks = count(tensors, r"input_blocks\.(\d+)\.")
    levels: list[list[tuple[int, int]]] = [[]]
    attention = ""
    for index in range(1, blocks):
        prefix = f"input_blocks.{index}."
        if f"{prefix}0.op.weight" in tensors:
            levels.append([])
            continue
        depth = count(tensors, re.escape(f"{prefix}1.transformer_blocks.") + r"(\d+)\.")
        attention = attention or (f"{prefix}1." if depth else "")
        levels[-1].append((shape_of(tensors, f"{prefix}0.in_layers.2.weight", PART)[0], depth))
    return _checked(levels, count(tensors, r"middle_block\.1\.transformer_blocks\.(\d+)\."), attention)


def _diffusers_shape(tensors: Mapping[str, Tensor]) -> _Shape:
    levels: list[list[tuple[int, int]]] = []
    attention = ""
    for block in range(count(tensors, r"down_blocks\.(\d+)\.")):
        prefix = f"down_blocks.{block}."
        depth = count(tensors, re.escape(f"{prefix}attentions.0.transformer_blocks.") + r"(\d+)\.")
        attention = attention or (f"{prefix}attentions.0." if depth else "")
        layers = count(tensors, re.escape(f"{prefix}resnets.") + r"(\d+)\.")
        width = shape_of(tensors, f"{prefix}resnets.0.conv1.weight", PART)[0]
        levels.append([(width, depth)] * layers)
    mid = count(tensors, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    return _checked(levels, mid, attention)


def _checked(levels: list[list[tuple[int, int]]], mid_depth: int, attention: str) -> _Shape:
    uniform = all(level and level == [level[0]] * len(levels[0]) for level in levels)
    if not uniform or not attention or not mid_depth:
        raise CheckpointError(
            f"the UNet's levels are {levels} (channels, transformer depth) with {mid_depth} in the middle, not those "
            "of Stable Diffusion 1, 2 or XL; give a checkpoint of that family"
        )
    return _Shape(
        channels=tuple(level[0][0] for level in levels),
        layers=len(levels[0]),
        depths=tuple(level[0][1] for level in levels),
        mid_depth=mid_depth,
        first_attention=attention,
    )


def _depth_config(shape: _Shape) -> int | tuple[int, ...]:
    """Diffusers takes the middle's depth from the last level; a level without attention may say anything."""
    depths = tuple(depth or 1 for depth in shape.depths)
    if shape.depths[-1] in (0, shape.mid_depth):
        depths = (*depths[:-1], shape.mid_depth)
        return 1 if set(depths) == {1} else depths
    raise CheckpointError(
        f"the UNet's last level has {shape.depths[-1]} transformer blocks and its middle {shape.mid_depth}; "
        "only checkpoints where they agree can be loaded"
    )


def _heads(channels: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, width // HEAD_WIDTH) for width in channels)


def _added_config(tensors: Mapping[str, Tensor], layout: str, pooled_width: int | None) -> dict[str, Any]:
    """SDXL's embedding of six sizes and the pooled text."""
    name = "label_emb.0.0.weight" if layout == "ldm" else "add_embedding.linear_1.weight"
    if name not in tensors:
        return {}
    width = tensors[name].shape[1]
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SDXL_ID_WIDTH if pooled_width is None else (width - pooled_width) // 6,
        "projection_class_embeddings_input_dim": width,
    }
