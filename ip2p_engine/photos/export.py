"""From training runs to the files that ship: a diffusers folder in half precision, as the scenes' is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.spec import spec_to_json
from ..networks.model import ModelSpec
from .networks import LATENT_SCALE, make_autoencoder, make_text_encoder, make_unet
from .texts import scatter_vocabulary

__all__ = ["PHOTOS_SPEC", "export_photos"]

PHOTOS_SPEC = ModelSpec(
    name="photos",
    family="sd1",
    in_channels=8,
    prediction="v",
    scaled_condition=False,
    latent_scale=LATENT_SCALE,
    text_cfg=2.0,
    image_cfg=1.2,
    resolution=256,
    steps=10,
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
MODEL_INDEX = {
    "_class_name": "StableDiffusionInstructPix2PixPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
TABLE = "embeddings.token_embedding.weight"


def export_photos(
    autoencoder: Mapping[str, Tensor], text: Mapping[str, Tensor], unet: Mapping[str, Tensor], folder: Path
) -> None:
    """Write the folder; words that the grammar lacks get a row of zeros."""
    full = {**text, TABLE: scatter_vocabulary(text[TABLE])}
    _write(folder / "vae", make_autoencoder().config, autoencoder, WEIGHTS_FILE)
    _write(folder / "text_encoder", make_text_encoder().config.to_dict(), full, "model.safetensors")
    _write(folder / "unet", make_unet().config, unet, WEIGHTS_FILE)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    _write_json(folder / "ip2p_config.json", json.loads(spec_to_json(PHOTOS_SPEC)))
    _write_json(folder / "model_index.json", MODEL_INDEX)


def _write(folder: Path, config: Mapping, state: Mapping[str, Tensor], weights: str) -> None:
    _write_json(folder / "config.json", {k: v for k, v in dict(config).items() if not k.startswith("_name")})
    half = {name: (value.half() if value.is_floating_point() else value).contiguous() for name, value in state.items()}
    temporary = folder / f"{weights}.tmp"
    save_file(half, temporary, metadata={"format": "pt"})
    temporary.replace(folder / weights)


def _write_json(path: Path, value: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
