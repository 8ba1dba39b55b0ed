"""The photographs' miniature Stable Diffusion: its networks and sizes."""

from __future__ import annotations

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

__all__ = ["LATENT_SCALE", "TEXT_WIDTH", "make_autoencoder", "make_text_encoder", "make_unet"]

LATENT_SCALE = 0.18215
TEXT_WIDTH = 96


def make_autoencoder() -> AutoencoderKL:
    """AutoencoderKL, f = 8, 4 latent channels, 1.7 M parameters; 4 norm groups, as the scenes' has."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=256,
        scaling_factor=LATENT_SCALE,
    )


def make_text_encoder() -> CLIPTextModel:
    """CLIP's text encoder with the standard vocabulary and 77 positions."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    return CLIPTextModel(config)


def make_unet() -> UNet2DConditionModel:
    """UNet2DConditionModel of 8 channels, three levels, 8 heads, 4.8 M parameters.

    No attention at the finest level, as in SDXL: there it cost half of a step (heads are narrow and places many).
    """
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=8,
        out_channels=4,
        block_out_channels=(64, 96, 112),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )
