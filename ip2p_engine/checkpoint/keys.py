"""UNet, autoencoder and text encoders: configurations from the tensors' shapes, and names in the two layouts.

LDM numbers the blocks through, diffusers by resolution and kind; inside a block both hold the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

__all__ = [
    "UNET_MARKS",
    "count",
    "few",
    "from_open_clip",
    "infer_autoencoder",
    "infer_control",
    "infer_text",
    "infer_unet",
    "ldm_autoencoder_name",
    "ldm_control_name",
    "ldm_unet_name",
    "modern_attention_name",
    "replace_parts",
    "shape_of",
    "strip_text_prefix",
    "to_open_clip",
    "unet_layout",
    "with_prefix",
]

AUTOENCODER = "autoencoder"
NAME_SHOWN = 100  # characters
MIDDLE = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
AUTOENCODER_BLOCK = re.compile(
    r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
TEXT_ENCODER = "text encoder"
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
UNET, CONTROL = "UNet", "ControlNet"
HEADS, HEAD_WIDTH, SDXL_ID_WIDTH, SD1_CONTEXT = 8, 64, 256, 768
MAX_BLOCKS = 100  # of a UNet; SD1.5 has 12 on the way down
UNET_MARKS = {"ldm": "input_blocks.0.0.weight", "diffusers": "conv_in.weight"}
TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
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
UNET_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


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
    last = "out.2.weight" if layout == "ldm" else "conv_out.weight"
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(shape.depths))
    config = _way_down(tensors, layout, shape, pooled_width)
    return {**config, "out_channels": shape_of(tensors, last, UNET)[0], "up_block_types": up}


def infer_control(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Any]:
    """ControlNetModel's configuration from names and shapes; its middle may have no attention."""
    shape = _ldm_shape(tensors, control=True) if layout == "ldm" else _diffusers_shape(tensors, control=True)
    hint = "input_hint_block." if layout == "ldm" else "controlnet_cond_embedding."
    first = f"{hint}0.weight" if layout == "ldm" else f"{hint}conv_in.weight"
    inner = f"{hint}{{}}.weight" if layout == "ldm" else f"{hint}blocks.{{}}.weight"
    blocks = count(tensors, re.escape(hint) + r"(?:blocks\.)?(\d+)\.")
    places = range(2, blocks - 1, 2) if layout == "ldm" else range(blocks)
    widths = [shape_of(tensors, inner.format(place), CONTROL)[0] for place in places]
    config = _way_down(tensors, layout, shape, None)
    if config["cross_attention_dim"] != SD1_CONTEXT:  # as ComfyUI reads what it does not know
        config["attention_head_dim"] = _heads(shape.channels)
    return {
        **config,
        "conditioning_channels": shape_of(tensors, first, CONTROL)[1],
        "conditioning_embedding_out_channels": (*widths[::2], *widths[-1:]),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if shape.mid_depth else "UNetMidBlock2D",
    }


def _way_down(tensors: Mapping[str, Tensor], layout: str, shape: _Shape, pooled_width: int | None) -> dict[str, Any]:
    """What UNets and ControlNets share."""
    attention = shape.first_attention
    linear = len(shape_of(tensors, f"{attention}proj_in.weight", UNET)) == 2
    context = shape_of(tensors, f"{attention}transformer_blocks.0.attn2.to_k.weight", UNET)[1]
    return {
        "in_channels": shape_of(tensors, UNET_MARKS[layout], UNET)[1],
        "block_out_channels": shape.channels,
        "layers_per_block": shape.layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in shape.depths),
        "transformer_layers_per_block": _depth_config(shape),
        "cross_attention_dim": context,
        "use_linear_projection": linear,
        "attention_head_dim": _heads(shape.channels) if linear else HEADS,
        **_scales_config(tensors, layout),
        **_added_config(tensors, layout, pooled_width),
    }


def ldm_unet_name(name: str, config: Mapping[str, Any]) -> str:
    """The LDM name of a diffusers UNet tensor."""
    found = UNET_BLOCK.fullmatch(name)
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


def ldm_control_name(name: str, config: Mapping[str, Any]) -> str:
    """The name of a diffusers ControlNet tensor in its authors' files."""
    head, _, tail = name.partition(".")
    if head == "controlnet_mid_block":
        return f"middle_block_out.0.{tail}"
    if head == "controlnet_down_blocks":
        place, _, leaf = tail.partition(".")
        return f"zero_convs.{place}.0.{leaf}"
    if head != "controlnet_cond_embedding":
        return ldm_unet_name(name, config)
    kind, _, leaf = tail.partition(".")
    last = 4 * len(config["conditioning_embedding_out_channels"]) - 2
    if kind != "blocks":
        return f"input_hint_block.{0 if kind == 'conv_in' else last}.{leaf}"
    place, _, leaf = leaf.partition(".")
    return f"input_hint_block.{2 * int(place) + 2}.{leaf}"


def _split_top(name: str) -> tuple[str, str]:
    module = next((top for top in TOP if name.startswith(f"{top}.")), None)
    if module is None:
        raise CheckpointError(f"the UNet has a tensor {name} that the LDM layout cannot name; save it for diffusers")
    return module, name[len(module) + 1 :]


def _ldm_shape(tensors: Mapping[str, Tensor], *, control: bool = False) -> _Shape:
    blocks = _block_count(tensors, r"input_blocks\.(\d+)\.")
    levels: list[list[tuple[int, int]]] = [[]]
    attention = ""
    for index in range(1, blocks):
        prefix = f"input_blocks.{index}."
        if f"{prefix}0.op.weight" in tensors:
            levels.append([])
            continue
        depth = count(tensors, re.escape(f"{prefix}1.transformer_blocks.") + r"(\d+)\.")
        attention = attention or (f"{prefix}1." if depth else "")
        levels[-1].append((shape_of(tensors, f"{prefix}0.in_layers.2.weight", UNET)[0], depth))
    mid = count(tensors, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    return _checked(levels, mid, attention, control=control)


def _diffusers_shape(tensors: Mapping[str, Tensor], *, control: bool = False) -> _Shape:
    levels: list[list[tuple[int, int]]] = []
    attention = ""
    for block in range(_block_count(tensors, r"down_blocks\.(\d+)\.")):
        prefix = f"down_blocks.{block}."
        depth = count(tensors, re.escape(f"{prefix}attentions.0.transformer_blocks.") + r"(\d+)\.")
        attention = attention or (f"{prefix}attentions.0." if depth else "")
        layers = _block_count(tensors, re.escape(f"{prefix}resnets.") + r"(\d+)\.")
        width = shape_of(tensors, f"{prefix}resnets.0.conv1.weight", UNET)[0]
        levels.append([(width, depth)] * layers)
    mid = count(tensors, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    return _checked(levels, mid, attention, control=control)


def _block_count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    found = count(tensors, pattern)
    if found > MAX_BLOCKS:
        raise CheckpointError(f"the network numbers its blocks to {found:,}; give a checkpoint of Stable Diffusion")
    return found


def _checked(levels: list[list[tuple[int, int]]], mid_depth: int, attention: str, *, control: bool = False) -> _Shape:
    uniform = all(level and level == [level[0]] * len(levels[0]) for level in levels)
    if not uniform or not attention or not (mid_depth or control):
        raise CheckpointError(
            f"the {CONTROL if control else UNET}'s levels are {str(levels)[:200]} (channels, transformer depth) with "
            f"{mid_depth} in the middle, not those of Stable Diffusion 1, 2 or XL; give a checkpoint of that family"
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
    if shape.depths[-1] in (0, shape.mid_depth) or not shape.mid_depth:
        depths = (*depths[:-1], shape.mid_depth or depths[-1])
        return 1 if set(depths) == {1} else depths
    raise CheckpointError(
        f"the UNet's last level has {shape.depths[-1]} transformer blocks and its middle {shape.mid_depth}; "
        "only checkpoints where they agree can be loaded"
    )


def _heads(channels: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, width // HEAD_WIDTH) for width in channels)


def _scales_config(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Any]:
    """The width in which a distilled network is told its scales."""
    name = "time_embed.cond_proj.weight" if layout == "ldm" else "time_embedding.cond_proj.weight"
    return {"time_cond_proj_dim": shape_of(tensors, name, UNET)[1]} if name in tensors else {}


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


def infer_autoencoder(tensors: Mapping[str, Tensor], layout: str, *, latent_scale: float) -> dict[str, Any]:
    """AutoencoderKL's configuration from names and shapes."""
    widths, layers = _levels(tensors, layout)
    norm = "encoder.norm_out.weight" if layout == "ldm" else "encoder.conv_norm_out.weight"
    shape_of(tensors, norm, AUTOENCODER)
    return {
        "in_channels": shape_of(tensors, "encoder.conv_in.weight", AUTOENCODER)[1],
        "out_channels": shape_of(tensors, "decoder.conv_out.weight", AUTOENCODER)[0],
        "latent_channels": shape_of(tensors, "decoder.conv_in.weight", AUTOENCODER)[1],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "scaling_factor": latent_scale,
    }


def ldm_autoencoder_name(name: str, config: Mapping[str, Any]) -> str:
    """The LDM name of a diffusers autoencoder tensor."""
    found = AUTOENCODER_BLOCK.fullmatch(name)
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
    levels = _block_count(tensors, re.escape(prefix) + r"(\d+)\.")
    layers = count(tensors, re.escape(f"{prefix}0{block}") + r"(\d+)\.")
    if not levels or not layers:
        raise CheckpointError("the autoencoder has no encoder levels; InstructPix2Pix needs its encoder as well")
    widths = tuple(
        shape_of(tensors, f"{prefix}{level}{block}0.conv1.weight", AUTOENCODER)[0] for level in range(levels)
    )
    return widths, layers


def infer_text(
    tensors: Mapping[str, Tensor], *, hidden_act: str = "quick_gelu", heads: int | None = None
) -> dict[str, Any]:
    """CLIPTextConfig's values from names (without ``text_model.``) and shapes.

    Shapes do not say the number of heads: width / 64, and 4 where 64 does not divide the width (miniatures).
    """
    vocabulary, width = shape_of(tensors, "embeddings.token_embedding.weight", TEXT_ENCODER)
    projection = tensors.get("text_projection.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": shape_of(tensors, "embeddings.position_embedding.weight", TEXT_ENCODER)[0],
        "intermediate_size": shape_of(tensors, "encoder.layers.0.mlp.fc1.weight", TEXT_ENCODER)[0],
        "num_hidden_layers": count(tensors, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": heads or (width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else MINIATURE_HEADS),
        "hidden_act": hidden_act,
        "projection_dim": width if projection is None else projection.shape[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1 if hidden_act == "quick_gelu" else 0,
    }


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


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def count(names: Iterable[str], pattern: str) -> int:
    """How many indices 0 .. n - 1 a numbered list has; the pattern's group is the index, matched at the start."""
    matcher = re.compile(pattern)
    # Numbers of 18 digits stand for all longer ones, which Python would not even convert.
    return 1 + max((int(found[1][:18]) for found in map(matcher.match, names) if found), default=-1)


def shape_of(tensors: Mapping[str, Tensor], name: str, part: str) -> tuple[int, ...]:
    """A tensor's shape; raises CheckpointError where the tensor is missing."""
    if name not in tensors:
        raise CheckpointError(f"the {part} has no tensor {name}; the file is incomplete or of another architecture")
    return tuple(tensors[name].shape)


def replace_parts(name: str, table: Mapping[str, str]) -> str:
    """The name with whole dotted parts exchanged."""
    text = f".{name}."
    for old, new in table.items():
        text = text.replace(f".{old}.", f".{new}.")
    return text[1:-1]


def few(names: Iterable[str], limit: int = 3) -> str:
    """Some names for a message."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(name[:NAME_SHOWN] for name in ordered[:limit]) + rest
