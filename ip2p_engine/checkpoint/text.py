"""The text encoders: OpenAI's CLIP (SD1, SDXL's first) and open_clip's (SD2, SDXL's second), as transformers modules.

open_clip packs query, key and value into one tensor, multiplies by the text projection from the other side, and SD2
reads the last layer but one: that last layer is left out, as its output is never used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .names import count, replace_parts, shape_of, with_prefix

__all__ = ["from_open_clip", "infer_text", "is_open_clip", "strip_text_prefix", "to_open_clip"]

PART = "text encoder"
HEAD_WIDTH, MINIATURE_HEADS = 64, 4
UNUSED = ("position_ids", "logit_scale", "attn_mask")
OPEN_CLIP_TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "c_fc": "fc1",
    "c_proj": "fc2",
}
PACKED = ("q_proj", "k_proj", "v_proj")
SD2_LAYERS = 23  # some converters write SD2's text encoder without the layer that is never used
LAYER, BLOCKS = "encoder.layers.", "transformer.resblocks."


def infer_text(
    tensors: Mapping[str, Tensor], *, hidden_act: str = "quick_gelu", heads: int | None = None
) -> dict[str, Any]:
    """CLIPTextConfig's values from names (without ``text_model.``) and shapes.

    Shapes do not say the number of heads: width / 64, and 4 where 64 does not divide the width (miniatures).
    """
    vocabulary, width = shape_of(tensors, "embeddings.token_embedding.weight", PART)
    projection = tensors.get("text_projection.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": shape_of(tensors, "embeddings.position_embedding.weight", PART)[0],
        "intermediate_size": shape_of(tensors, "encoder.layers.0.mlp.fc1.weight", PART)[0],
        "num_hidden_layers": count(tensors, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": heads or (width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else MINIATURE_HEADS),
        "hidden_act": hidden_act,
        "projection_dim": width if projection is None else projection.shape[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1 if hidden_act == "quick_gelu" else 0,
    }


def is_open_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are open_clip's."""
    return "positional_embedding" in tensors


def strip_text_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors by the names that files with and without ``text_model.`` share; unused ones left out."""
    return {name.removeprefix("text_model."): value for name, value in tensors.items() if not name.endswith(UNUSED)}


def from_open_clip(tensors: Mapping[str, Tensor], *, keep_last: bool) -> dict[str, Tensor]:
    """transformers' tensors of an open_clip text tower. SDXL keeps the last layer and the projection, SD2 neither."""
    layers = count(tensors, r"transformer\.resblocks\.(\d+)\.")
    kept = layers if keep_last or layers == SD2_LAYERS else layers - 1
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.startswith(BLOCKS):
            index, _, tail = name.removeprefix(BLOCKS).partition(".")
            if not index.isdigit() or int(index) < kept:
                state.update(_layer_from_open_clip(f"{LAYER}{index}.", tail, value))
        elif name == "text_projection":
            state.update({"text_projection.weight": value.t().contiguous()} if keep_last else {})
        elif not name.endswith(UNUSED):
            state[OPEN_CLIP_TOP.get(name, name)] = value
    return state


def to_open_clip(state: Mapping[str, Tensor], *, repeat_last: bool = False) -> dict[str, Tensor]:
    """open_clip's tensors of a transformers text encoder.

    ``repeat_last`` appends a copy of the last layer where ``from_open_clip`` leaves one out, so that readers that
    count layers find what they expect.
    """
    if repeat_last:
        last = count(state, r"encoder\.layers\.(\d+)\.") - 1
        copies = with_prefix(state, f"{LAYER}{last}.")
        state = {**state, **{f"{LAYER}{last + 1}.{name}": value.clone() for name, value in copies.items()}}
    top = {new: old for old, new in OPEN_CLIP_TOP.items()}
    inner = {new: old for old, new in OPEN_CLIP_LAYER.items()}
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.startswith(LAYER):
            projection = name == "text_projection.weight"
            out["text_projection" if projection else top[name]] = value.t().contiguous() if projection else value
            continue
        index, _, tail = name.removeprefix(LAYER).partition(".")
        prefix, kind = f"{BLOCKS}{index}.", tail.rpartition(".")[2]
        if "q_proj" in tail:
            parts = [state[name.replace("q_proj", part)] for part in PACKED]
            out[f"{prefix}attn.in_proj_{kind}"] = torch.cat(parts)
        elif "k_proj" not in tail and "v_proj" not in tail:
            out[prefix + replace_parts(tail, inner)] = value
    return out


def _layer_from_open_clip(prefix: str, tail: str, value: Tensor) -> dict[str, Tensor]:
    if tail.startswith("attn.in_proj_"):
        kind = tail.removeprefix("attn.in_proj_")
        parts = value.chunk(3)
        return {f"{prefix}self_attn.{name}.{kind}": part for name, part in zip(PACKED, parts, strict=True)}
    return {prefix + replace_parts(tail, OPEN_CLIP_LAYER): value}
