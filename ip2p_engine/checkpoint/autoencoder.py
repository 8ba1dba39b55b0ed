"""The KL autoencoder: its configuration from the tensors' shapes, and its names in the two layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from .names import count, replace_parts, shape_of

__all__ = ["infer_autoencoder", "ldm_autoencoder_name", "modern_attention_name"]

PART = "autoencoder"
MIDDLE = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
BLOCK = re.compile(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")


def infer_autoencoder(tensors: Mapping[str, Tensor], layout: str, *, latent_scale: float) -> dict[str, Any]:
    """AutoencoderKL's configuration from names and shapes."""
    widths, layers = _levels(tensors, layout)
    norm = "encoder.norm_out.weight" if layout == "ldm" else "encoder.conv_norm_out.weight"
    shape_of(tensors, norm, PART)
    return {
        "in_channels": shape_of(tensors, "encoder.conv_in.weight", PART)[1],
        "out_channels": shape_of(tensors, "decoder.conv_out.weight", PART)[0],
        "latent_channels": shape_of(tensors, "decoder.conv_in.weight", PART)[1],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "scaling_factor": latent_scale,
    }


def ldm_autoencoder_name(name: str, config: Mapping[str, Any]) -> str:
    """The LDM name of a diffusers autoencoder tensor."""
    found = BLOCK.fullmatch(name)
    if found is None:
        return _outside_blocks(name)
    side, index, kind, position, tail = found[1], int(found[2]), found[3], found[4], found[5]
    level = index if side == "encoder.down" else len(config["block_out_channels"]) - 1 - index
    if kind == "resnets":
        return f"{side}.{level}.block.{position}.{replace_parts(tail, {'conv_shortcut': 'nin_shortcut'})}"
    return f"{side}.{level}.{kind.removesuffix('rs')}.{tail}"


def modern_attention_name(name: str) -> str:
    """Today's name of an attention tensor: files of 2022 and 2023 say query, key, value and proj_attn."""
    return replace_parts(name, OLD_ATTENTION) if ".attentions." in name else name


def _outside_blocks(name: str) -> str:
    for old, new in MIDDLE.items():
        if f".{old}." in name:
            return name.replace(old, new).replace("conv_shortcut", "nin_shortcut")
    if ".mid_block.attentions.0." in name:
        return replace_parts(name.replace("mid_block.attentions.0", "mid.attn_1"), ATTENTION)
    return replace_parts(name, {"conv_norm_out": "norm_out"})


def _levels(tensors: Mapping[str, Tensor], layout: str) -> tuple[tuple[int, ...], int]:
    prefix, block = ("encoder.down.", ".block.") if layout == "ldm" else ("encoder.down_blocks.", ".resnets.")
    levels = count(tensors, re.escape(prefix) + r"(\d+)\.")
    layers = count(tensors, re.escape(f"{prefix}0{block}") + r"(\d+)\.")
    if not levels or not layers:
        raise CheckpointError("the autoencoder has no encoder levels; InstructPix2Pix needs its encoder as well")
    widths = tuple(shape_of(tensors, f"{prefix}{level}{block}0.conv1.weight", PART)[0] for level in range(levels))
    return widths, layers
