"""A loaded checkpoint's tensors under the names of the LDM layout, and its networks' configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .autoencoder import ldm_autoencoder_name
from .parts import Networks
from .single_file import EDM_KEYS, PREFIXES, V_KEY
from .text import strip_text_prefix, to_open_clip
from .unet import ldm_unet_name

__all__ = ["architecture_of", "ldm_state"]

CLIP_INSIDE = "text_model."
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "projection_dim",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def ldm_state(model: Networks) -> dict[str, Tensor]:
    """Every tensor of a checkpoint as the authors' code, and ComfyUI, name it. Nothing is copied but packed tensors."""
    state = {
        PREFIXES["unet"] + ldm_unet_name(name, model.unet.config): value
        for name, value in model.unet.state_dict().items()
    }
    for name, value in model.autoencoder.state_dict().items():
        ldm_name = ldm_autoencoder_name(name, model.autoencoder.config)
        convolution = ".attn_1." in ldm_name and value.ndim == 2
        state[PREFIXES["autoencoder"] + ldm_name] = value[:, :, None, None] if convolution else value
    return {**state, **_text_state(model), **_markers(model)}


def architecture_of(model: Networks) -> dict[str, Any]:
    """The networks' configurations, as plain values: what shapes do not say is in them."""
    return {
        "unet": _plain(model.unet.config),
        "autoencoder": _plain(model.autoencoder.config),
        "text_encoders": [_text_config(encoder) for encoder in model.text_encoders],
    }


def _text_state(model: Networks) -> dict[str, Tensor]:
    family = model.spec.family
    clean = [strip_text_prefix(encoder.state_dict()) for encoder in model.text_encoders]
    if family == "sd2":
        return _prefixed(PREFIXES["open_clip"], to_open_clip(clean[0], repeat_last=True))
    clip = PREFIXES["clip" if family == "sd1" else "sdxl_clip"] + CLIP_INSIDE
    positions = torch.arange(clean[0]["embeddings.position_embedding.weight"].shape[0])[None]
    state = _prefixed(clip, {**clean[0], "embeddings.position_ids": positions})
    if family != "sd1":
        state.update(_prefixed(PREFIXES["sdxl_open_clip"], to_open_clip(clean[1])))
    return state


def _markers(model: Networks) -> dict[str, Tensor]:
    """The tensors by which ComfyUI knows a prediction type."""
    spec = model.spec
    if spec.schedule == "edm":
        return {key: torch.tensor(value) for key, value in zip(EDM_KEYS, (spec.sigma_min, spec.sigma_max), strict=True)}
    return {V_KEY: torch.zeros(0)} if spec.family == "sdxl" and spec.prediction == "v" else {}


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}


def _text_config(encoder: nn.Module) -> dict[str, Any]:
    values = encoder.config.to_dict()  # type: ignore[union-attr, operator]
    return {name: values[name] for name in TEXT_FIELDS if name in values}
