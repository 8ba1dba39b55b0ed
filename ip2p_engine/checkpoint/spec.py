"""What a host must know about a checkpoint that its weights do not say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..config import from_mapping
from ..errors import CheckpointError, ConfigError
from ..files import NO_JSON

__all__ = ["ARCHITECTURE", "BASE_NAMES", "FAMILIES", "ModelSpec", "parse_config", "recommended", "spec_to_json"]

FAMILIES = ("sd1", "sd2", "sdxl", "cosxl")
BASE_NAMES = {"sd1": "SD1.5", "sd2": "SD2", "sdxl": "SDXL", "cosxl": "CosXL"}
ARCHITECTURE = "architecture"
SD_SCALE, SDXL_SCALE = 0.18215, 0.13025
KINDS = {"str": (str,), "bool": (bool,), "int": (int,), "float": (float, int)}
POSITIVE = ("resolution", "steps", "latent_scale", "beta_start", "beta_end", "sigma_min", "sigma_max")

# text_cfg, image_cfg, resolution, steps, latent scale
RECOMMENDED = {
    "sd1": (7.5, 1.5, 512, 100, SD_SCALE),
    "sd2": (7.5, 1.5, 768, 100, SD_SCALE),
    "sdxl": (5.0, 1.5, 768, 50, SDXL_SCALE),
    "cosxl": (5.0, 1.5, 1024, 20, SDXL_SCALE),
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The part of a checkpoint that is not weights; saved with them as ``ip2p_config``."""

    family: str
    """sd1, sd2, sdxl or cosxl: which text encoders, and how they are read."""
    in_channels: int
    """Of the UNet: 8 for an InstructPix2Pix, 4 for text to image."""
    prediction: str
    """eps or v: what the UNet's output means."""
    scaled_condition: bool
    """Whether the image condition is multiplied by the latent scale; only CosXL-Edit."""
    latent_scale: float
    """Latents are the autoencoder's times this."""
    text_cfg: float
    """Recommended s_T."""
    image_cfg: float
    """Recommended s_I."""
    resolution: int
    """Recommended longer side, pixels."""
    steps: int
    """Recommended sampling steps."""
    name: str = ""
    """e.g. "scenes" for the embedded model."""
    weights: str = "only"
    """Which UNet weights these are: ema, raw, or only (there was no choice)."""
    schedule: str = "ddpm"
    """ddpm: 1000 scaled-linear betas, t is a ladder step. edm: log-spaced sigmas, t = ln(sigma) / 4."""
    beta_start: float = 0.00085
    beta_end: float = 0.012
    sigma_min: float = 0.002
    """Smallest sigma, edm only."""
    sigma_max: float = 120.0
    """Largest sigma, edm only."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kinds = getattr(self, field.name), KINDS[str(field.type)]
            if type(value) not in kinds or (float in kinds and not math.isfinite(value)):
                raise ConfigError(f"{field.name} is {value!r}; give a value of type {field.type}")
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give a number above 0")
        for name, known in (("family", FAMILIES), ("prediction", ("eps", "v")), ("schedule", ("ddpm", "edm"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")


def recommended(family: str, in_channels: int) -> dict[str, Any]:
    """The settings of a family as its authors use it, by the names of ModelSpec."""
    text_cfg, image_cfg, resolution, steps, scale = RECOMMENDED[family]
    if in_channels == 4:
        image_cfg, resolution = 1.0, {"sdxl": 1024}.get(family, resolution)
    return {
        "text_cfg": text_cfg,
        "image_cfg": image_cfg,
        "resolution": resolution,
        "steps": steps,
        "latent_scale": scale,
        "scaled_condition": family == "cosxl",
    }


def spec_to_json(spec: ModelSpec, architecture: Mapping[str, Any] | None = None) -> str:
    """The spec, and on request the networks' own configurations, as one line of JSON."""
    values = asdict(spec)
    if architecture is not None:
        values[ARCHITECTURE] = architecture
    return json.dumps(values, sort_keys=True)


def parse_config(text: str | None, where: str) -> tuple[ModelSpec | None, dict[str, Any]]:
    """(spec, architecture) of an ``ip2p_config``; (None, {}) where there is none."""
    if text is None:
        return None, {}
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(values.get(ARCHITECTURE, {}), dict):
            raise ConfigError("it is no object of names and values")
        architecture = values.pop(ARCHITECTURE, {})
        return from_mapping(ModelSpec, values), architecture
    except (*NO_JSON, ConfigError) as error:
        raise CheckpointError(f"{where} carries an ip2p_config that cannot be used ({error}); save it again") from error
