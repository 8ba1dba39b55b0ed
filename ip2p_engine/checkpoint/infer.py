"""What a network is, told by the names and shapes of its tensors; never by the name of a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError

__all__ = ["autoencoder_config", "count", "text_config", "unet_config"]

HEADS_OF_SD1 = 8
HEAD_WIDTH = 64


def count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """1 + the largest number that the pattern's group finds among the names, or 0."""
    found = [int(match.group(1)) for name in tensors if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def unet_config(tensors: Mapping[str, Tensor], *, norm_groups: int = 32) -> dict[str, Any]:
    """Arguments of UNet2DConditionModel for a UNet in the LDM layout; raises CheckpointError if it is none."""
    stem = _need(tensors, "input_blocks.0.0.weight")
    downs = sorted(
        int(match.group(1)) for name in tensors if (match := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", name))
    )
    blocks = count(tensors, r"input_blocks\.(\d+)\.")
    layers = (downs[0] if downs else blocks) - 1
    levels = len(downs) + 1
    firsts = [1 + level * (layers + 1) for level in range(levels)]
    attention = [f"input_blocks.{first}.1.proj_in.weight" in tensors for first in firsts]
    channels = [_need(tensors, f"input_blocks.{first}.0.out_layers.3.weight").shape[0] for first in firsts]
    cross = _need(tensors, "middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    linear = _need(tensors, "middle_block.1.proj_in.weight").ndim == 2
    depths = [count(tensors, rf"input_blocks\.{first}\.1\.transformer_blocks\.(\d+)\.") or 1 for first in firsts]
    config = {
        "in_channels": stem.shape[1],
        "out_channels": _need(tensors, "out.2.weight").shape[0],
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "cross_attention_dim": cross.shape[1],
        "attention_head_dim": tuple(c // HEAD_WIDTH for c in channels) if linear else HEADS_OF_SD1,
        "use_linear_projection": linear,
        "transformer_layers_per_block": tuple(depths),
        "norm_num_groups": norm_groups,
    }
    if "label_emb.0.0.weight" in tensors:
        size = tensors["label_emb.0.0.weight"].shape[1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": size,
        }
    return config


def autoencoder_config(tensors: Mapping[str, Tensor], *, latent_scale: float, norm_groups: int = 32) -> dict[str, Any]:
    """Arguments of AutoencoderKL for an autoencoder in the LDM layout; raises CheckpointError if it is none."""
    levels = count(tensors, r"encoder\.down\.(\d+)\.")
    if not levels:
        raise CheckpointError("the file has no autoencoder (first_stage_model.*); name a checkpoint that has one")
    layers = count(tensors, r"encoder\.down\.0\.block\.(\d+)\.")
    channels = [_need(tensors, f"encoder.down.{level}.block.0.conv1.weight").shape[0] for level in range(levels)]
    return {
        "block_out_channels": tuple(channels),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": layers,
        "latent_channels": _need(tensors, "post_quant_conv.weight").shape[0],
        "norm_num_groups": norm_groups,
        "scaling_factor": latent_scale,
    }


def text_config(tensors: Mapping[str, Tensor], *, heads: int | None = None) -> dict[str, Any]:
    """Arguments of CLIPTextConfig for a text encoder in the transformers layout, without the text_model prefix.

    The number of heads is no part of the weights: one for every 64 channels as in every published encoder, or 4 in
    miniatures narrower than 256, unless it is given.
    """
    embedding = _need(tensors, "embeddings.token_embedding.weight")
    width = embedding.shape[1]
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": _need(tensors, "encoder.layers.0.mlp.fc1.weight").shape[0],
        "num_hidden_layers": count(tensors, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": heads or (width // HEAD_WIDTH if width >= 256 else 4),
        "max_position_embeddings": _need(tensors, "embeddings.position_embedding.weight").shape[0],
        "hidden_act": "quick_gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }


def _need(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(
            f"the file lacks the tensor {name!r}; expected a Stable Diffusion or InstructPix2Pix model"
        )
    return tensors[name]
