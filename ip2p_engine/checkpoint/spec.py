"""What a host must know about a checkpoint that its weights do not say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import from_mapping
from ..diffusion.guidance import FORMULAS
from ..diffusion.sampling import SAMPLERS
from ..diffusion.schedule import SCHEDULES
from ..errors import CheckpointError, ConfigError
from ..files import NO_JSON
from .read import keep

__all__ = [
    "ARCHITECTURE",
    "BASE_NAMES",
    "Bundle",
    "FAMILIES",
    "ModelSpec",
    "Networks",
    "Part",
    "autoencoder_dtype",
    "check_channels",
    "family_of",
    "parse_config",
    "recommended",
    "same",
    "spec_to_json",
]

CHANNEL_MEANING = {9: "an inpainting model", 5: "a depth model", 7: "an upscaler"}
TEXT_TO_IMAGE, EDIT, MASKED_EDIT = 4, 8, 12  # channels: noise; noise, picture; noise, picture, mask (UltraEdit)
FAMILIES = ("sd1", "sd2", "sdxl", "cosxl")
BASE_NAMES = {"sd1": "SD1.5", "sd2": "SD2", "sdxl": "SDXL", "cosxl": "CosXL"}
ARCHITECTURE = "architecture"
SD_SCALE, SDXL_SCALE = 0.18215, 0.13025
KINDS = {"str": (str,), "bool": (bool,), "int": (int,), "float": (float, int)}
# What a stranger's file may recommend: a resolution of a million would be taken at its word.
LIMITS = {
    "in_channels": (1, 1 << 20),
    "latent_scale": (1e-6, 1e6),
    "text_cfg": (-1000, 1000),
    "image_cfg": (-1000, 1000),
    "resolution": (8, 4096),
    "steps": (1, 1000),
    "guidance_low": (0, 1e6),
    "guidance_high": (0, 1e6),
    "beta_start": (1e-12, 0.999),
    "beta_end": (1e-12, 0.999),
    "sigma_min": (1e-12, 1e6),
    "sigma_max": (1e-12, 1e6),
}
NAME_LENGTH = 200
SINCE_0_1 = ("sampler", "levels", "guidance", "guidance_low", "guidance_high", "suffix", "zero_snr", "scale_inputs")
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
    """Of the UNet: 4 for text to image (the noise), 8 for an InstructPix2Pix (noise, picture), 12 with UltraEdit's mask
    (noise, picture, mask)."""
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
    sampler: str = "euler_ancestral"
    """Recommended sampler; a distilled model wants lcm."""
    levels: str = "model"
    """Recommended schedule of noise levels; a distilled model wants trailing."""
    guidance: str = "dual"
    """The formula of the two scales: dual, or instruct-diffusion."""
    guidance_low: float = 0.0
    """Lowest noise level (sigma) at which the recommended scales act."""
    guidance_high: float = 0.0
    """Highest one; 0: they act everywhere."""
    suffix: str = ""
    """Said after each instruction, as HIVE's models want it."""
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
    zero_snr: bool = False
    """Whether the ladder is rescaled to end in pure noise (Lin et al. 2023); ddpm and v only."""
    scale_inputs: bool = False
    """Whether the UNet is told s_T and s_I, as one distilled for many scales is: one branch, c, is all it needs."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, kinds = getattr(self, one.name), KINDS[str(one.type)]
            if type(value) not in kinds or (float in kinds and not math.isfinite(value)):
                raise ConfigError(f"{one.name} is {repr(value)[:80]}; give a value of type {one.type}")
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name)!r:.40}; give a number from {low:g} to {high:g}")
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"sampler is {self.sampler[:80]!r}; choose one of {', '.join(SAMPLERS)}")
        if self.levels not in SCHEDULES:
            raise ConfigError(f"levels are {self.levels[:80]!r}; choose one of {', '.join(SCHEDULES)}")
        if self.guidance not in FORMULAS:
            raise ConfigError(f"guidance is {self.guidance[:80]!r}; choose one of {', '.join(FORMULAS)}")
        if self.guidance_high and self.guidance_low >= self.guidance_high:
            raise ConfigError("guidance_low is not below guidance_high; give the smaller one first")
        if self.beta_start > self.beta_end or self.sigma_min >= self.sigma_max:
            raise ConfigError("beta_start or sigma_min is above its other end; give the smaller one first")
        if self.zero_snr and (self.prediction, self.schedule) != ("v", "ddpm"):
            got = f"{self.prediction} on {self.schedule}"
            raise ConfigError(f"zero_snr is of v-prediction on DDPM's ladder, and this is {got}; give one without it")
        for name in ("name", "weights", "suffix"):
            if len(getattr(self, name)) > NAME_LENGTH:
                raise ConfigError(f"{name} has {len(getattr(self, name)):,} characters; give at most {NAME_LENGTH}")
        for name, known in (("family", FAMILIES), ("prediction", ("eps", "v")), ("schedule", ("ddpm", "edm"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)[:80]!r}; choose one of {', '.join(known)}")

    @property
    def edits(self) -> bool:
        """Whether the UNet is told a picture."""
        return self.in_channels in (EDIT, MASKED_EDIT)

    @property
    def takes_mask(self) -> bool:
        """Whether the UNet is told a mask after the picture, as UltraEdit's are: four more channels, a latent as it."""
        return self.in_channels == MASKED_EDIT


def recommended(family: str, in_channels: int) -> dict[str, Any]:
    """The settings of a family as its authors use it, by the names of ModelSpec."""
    text_cfg, image_cfg, resolution, steps, scale = RECOMMENDED[family]
    if in_channels == TEXT_TO_IMAGE:
        image_cfg, resolution = 1.0, {"sdxl": 1024}.get(family, resolution)
    if in_channels == MASKED_EDIT:
        text_cfg, resolution, steps = 7.5, 512, 50
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
    for name in SINCE_0_1:  # left out where they say nothing, so that 0.1 reads the rest
        if values[name] == getattr(ModelSpec, name):
            del values[name]
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


def same(name: str) -> str:
    """The renaming of a layout that needs none."""
    return name


class Networks(Protocol):
    """What writing and merging need of a loaded checkpoint; ``networks.model.Model`` is one."""

    spec: ModelSpec
    unet: Any
    autoencoder: Any
    text_encoders: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One network: unet, autoencoder, text or projected_text."""

    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    rename: Callable[[str], str] = same
    """The name in ``tensors`` of a tensor of the module."""
    release: Callable[[Tensor], None] = keep
    """Of the file: for tensors that were copied."""
    files: tuple[Path, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(dict.fromkeys(t.dtype for t in self.tensors.values() if t.is_floating_point()))


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What a file or a folder holds. A lone UNet has neither autoencoder nor text encoders."""

    path: Path
    layout: str
    """ldm, ldm-unet, diffusers, diffusers-unet, or run (a step of a training run)."""
    spec: ModelSpec
    unet: Part
    autoencoder: Part | None = None
    text_encoders: tuple[Part, ...] = ()
    ema_parameters: int = 0
    """Of the averaged copy beside the raw weights; 0 if there is none."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    leftovers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The UNet, then what is there of autoencoder and text encoders."""
        return tuple(part for part in (self.unet, self.autoencoder, *self.text_encoders) if part is not None)

    @property
    def files(self) -> tuple[Path, ...]:
        """What the networks were read from."""
        return tuple(dict.fromkeys(path for part in self.parts for path in part.files))

    @property
    def complete(self) -> bool:
        return self.autoencoder is not None and bool(self.text_encoders)


def autoencoder_dtype(family: str, dtype: torch.dtype) -> torch.dtype:
    """The autoencoder's type where the other networks have ``dtype``: SDXL's overflows in float16."""
    overflows = dtype == torch.float16 and family in ("sdxl", "cosxl")
    return torch.float32 if overflows else dtype


def family_of(unet_config: Mapping[str, Any], *, edm: bool) -> str:
    """sd1, sd2, sdxl or cosxl, by the UNet's structure."""
    if unet_config.get("addition_embed_type") == "text_time":
        return "cosxl" if edm else "sdxl"
    return "sd2" if unet_config.get("use_linear_projection") else "sd1"


def check_channels(channels: int, name: str, family: str) -> None:
    """Raises CheckpointError for a UNet that is neither text to image nor an InstructPix2Pix."""
    if channels in (TEXT_TO_IMAGE, EDIT, MASKED_EDIT):
        return
    meaning = CHANNEL_MEANING.get(channels, f"no {BASE_NAMES[family]} model we know")
    raise CheckpointError(
        f"{name} has a UNet of {channels} input channels ({meaning}), and an InstructPix2Pix takes 8, UltraEdit's with "
        "a mask 12, text to image 4; give a checkpoint of one of these"
    )
