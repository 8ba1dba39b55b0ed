"""From training runs to the files that ship: a diffusers folder in half precision, and the CLIP beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...networks.model import ModelSpec
from .clip_stage import clip_config_json
from .networks import LATENT_SCALE, make_autoencoder, make_text_encoder, make_unet
from .tables import words_in_use

__all__ = [
    "EMBEDDED_SPEC",
    "export_autoencoder",
    "export_clip",
    "export_text_encoder",
    "export_unet",
    "export_settings",
]

EMBEDDED_SPEC = ModelSpec(
    name="scenes",
    family="sd1",
    in_channels=8,
    prediction="v",
    scaled_condition=False,
    latent_scale=LATENT_SCALE,
    text_cfg=4.0,
    image_cfg=1.5,
    resolution=64,
    steps=20,
)
SCHEDULER_CONFIG = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "linspace",
}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def export_autoencoder(state: Mapping[str, Tensor], folder: Path) -> None:
    """The autoencoder, whose latent scale is folded in already."""
    _write(folder / "vae", make_autoencoder().config, state, WEIGHTS_FILE)


def export_text_encoder(state: Mapping[str, Tensor], folder: Path) -> None:
    """The text encoder; the rows in use are scattered into the standard vocabulary, the others are zero."""
    name = "embeddings.token_embedding.weight"
    full = scatter_vocabulary(state[name])
    _write(folder / "text_encoder", make_text_encoder().config.to_dict(), {**state, name: full}, "model.safetensors")


def export_unet(state: Mapping[str, Tensor], folder: Path, *, in_channels: int) -> None:
    """The InstructPix2Pix UNet (8 channels) or the text-to-image one (4)."""
    name = "unet" if in_channels == 8 else "unet_text_to_image"
    _write(folder / name, make_unet(in_channels).config, state, WEIGHTS_FILE)


def export_clip(state: Mapping[str, Tensor], folder: Path) -> None:
    """The CLIP, in open_clip's layout with its configuration."""
    name = "token_embedding.weight"
    _write(folder / "clip", clip_config_json(), {**state, name: scatter_vocabulary(state[name])}, "model.safetensors")


def export_settings(folder: Path) -> None:
    """What a host must know beside the weights, in diffusers' form and in ours."""
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    _write_json(folder / "ip2p_config.json", asdict(EMBEDDED_SPEC))
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionInstructPix2PixPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
        },
    )


def scatter_vocabulary(rows: Tensor) -> Tensor:
    """The 49,408-row table with the rows in use at their standard ids."""
    table = torch.zeros(49408, rows.shape[1])
    table[words_in_use()] = rows.float()
    return table


def _write(folder: Path, config: Mapping, state: Mapping[str, Tensor], weights: str) -> None:
    _write_json(folder / "config.json", {k: v for k, v in dict(config).items() if not k.startswith("_name")})
    half = {name: _half(value) for name, value in state.items() if not name.endswith("attn_mask")}
    temporary = folder / f"{weights}.tmp"
    save_file(half, temporary, metadata={"format": "pt"})
    temporary.replace(folder / weights)


def _half(value: Tensor) -> Tensor:
    return (value.half() if value.is_floating_point() else value).contiguous()


def _write_json(path: Path, value: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
