"""Untrained models with CLIP's whole vocabulary, small enough that a whole walk takes a moment."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ip2p_engine.networks.model import Model, ModelSpec

SHARPNESS = {"attn1": 4, "attn2": 12}
DOUBLE = ("sdxl", "cosxl")
OWN = {"sd2": {"prediction": "v"}, "cosxl": {"prediction": "v", "schedule": "edm", "scaled_condition": True}}


def tiny_model(family: str = "sd1", dtype: torch.dtype = torch.float32, *, in_channels: int = 4) -> Model:
    """Two levels with 8 x 8 and 4 x 4 places at 64 pixels; SDXL has two text encoders, pooled text and sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        texts = (_text(24), _text(24, projected=True)) if family in DOUBLE else (_text(24),)
        networks = (_unet(family, in_channels), _autoencoder(), *texts)
    for network in networks:
        network.eval().requires_grad_(False)
        if dtype != torch.float32:
            network.to(dtype=dtype)
    values = {"prediction": "eps", "scaled_condition": False, **OWN.get(family, {})}
    spec = ModelSpec(
        family=family,
        in_channels=in_channels,
        latent_scale=0.18215,
        text_cfg=7.5,
        image_cfg=1.0,
        resolution=64,
        steps=20,
        **values,
    )
    return Model(spec=spec, unet=networks[0], autoencoder=networks[1], text_encoders=networks[2:])


def _unet(family: str, in_channels: int) -> UNet2DConditionModel:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    }
    unet = UNet2DConditionModel(
        in_channels=in_channels,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=48 if family in DOUBLE else 24,
        attention_head_dim=4,
        norm_num_groups=4,
        **(added if family in DOUBLE else {}),
    )
    # Untrained attention is almost uniform, and nearly uniform maps hide mistakes.
    for name, weight in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            weight.data *= SHARPNESS["attn1" if "attn1" in name else "attn2"]
    return unet


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )


def _text(width: int, *, projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        hidden_size=width,
        projection_dim=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
