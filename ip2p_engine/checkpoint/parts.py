"""A checkpoint taken apart: each network's configuration and tensors, and what is known about the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .read import keep
from .spec import BASE_NAMES, ModelSpec

__all__ = ["Bundle", "Networks", "Part", "autoencoder_dtype", "check_channels", "family_of", "same"]

CHANNEL_MEANING = {9: "an inpainting model", 12: "UltraEdit's stage with a mask", 5: "a depth model", 7: "an upscaler"}


def same(name: str) -> str:
    """The renaming of a layout that needs none."""
    return name


class Networks(Protocol):
    """What writing and merging need of a loaded checkpoint: ip2p_engine.model.Model."""

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
    """ldm, ldm-unet, diffusers or diffusers-unet."""
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
    if channels in (4, 8):
        return
    meaning = CHANNEL_MEANING.get(channels, f"no {BASE_NAMES[family]} model we know")
    raise CheckpointError(
        f"{name} has a UNet of {channels} input channels ({meaning}), and an InstructPix2Pix takes 8, text to image 4; "
        "give a checkpoint of one of these"
    )
