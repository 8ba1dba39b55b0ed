"""A loaded checkpoint: its networks, and what a host must know that is not in the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..checkpoint.build import build, check_widths
from ..checkpoint.lora import Lora, with_loras
from ..checkpoint.merge import add_difference
from ..checkpoint.report import training_settings
from ..checkpoint.source import open_bundle
from ..checkpoint.spec import BASE_NAMES, Bundle, ModelSpec, autoencoder_dtype, recommended
from ..checkpoint.write import save_diffusers, save_ldm
from ..devices import default_dtype, usable_device
from ..diffusion.schedule import DiscreteSchedule
from ..errors import CheckpointError, ConfigError
from .attention import install
from .offload import Offload

__all__ = ["Model", "ModelSpec", "convert", "load_model", "merge_files"]

log = logging.getLogger(__name__)

EDM_STEPS = 1000


@dataclass(kw_only=True)
class Model:
    """The networks of one checkpoint, in eval mode and without gradients."""

    spec: ModelSpec
    unet: UNet2DConditionModel
    autoencoder: AutoencoderKL
    text_encoders: tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]
    """One, or for sdxl and cosxl two: the second gives the pooled text."""
    words: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Tokens of words that were added by textual inversion (networks/added.py)."""
    offload: Offload | None = None
    """With little memory: keeps on the device what runs (networks/offload.py)."""
    turn: Lock | None = None
    """A compiled UNet's (networks/compiled.py): held during a call, whose result the next call may overwrite."""

    def __post_init__(self) -> None:
        install(self.unet)
        if self.spec.scale_inputs and (self.unet.config.time_cond_proj_dim or 1) % 2:
            raise CheckpointError(
                "the ip2p_config says that the UNet is told its scales, and it has no place for two of them; save the "
                "checkpoint again"
            )

    @cached_property
    def schedule(self) -> DiscreteSchedule:
        """The sigmas the network was trained on: DDPM's ladder, or for EDM 1000 log-spaced ones."""
        spec = self.spec
        if spec.schedule == "ddpm":
            return DiscreteSchedule.stable_diffusion(spec.beta_start, spec.beta_end, zero_snr=spec.zero_snr)
        low, high = math.log(spec.sigma_min), math.log(spec.sigma_max)
        sigmas = torch.linspace(low, high, EDM_STEPS, dtype=torch.float64).exp()
        return DiscreteSchedule(1 / (1 + sigmas**2))

    @property
    def device(self) -> torch.device:
        """Where the UNet is, or with little memory goes when it runs."""
        if self.offload is not None:
            return self.offload.device
        # By its first weight: diffusers' own property walks through all modules, and each step asks.
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's."""
        return next(self.unet.parameters()).dtype

    def running(self, *networks: Any) -> AbstractContextManager[None]:
        """For the length of a with-block these networks are on the device."""
        return nullcontext() if self.offload is None else self.offload.running(*networks)

    def with_little_memory(self, device: torch.device) -> Model:
        """The same networks, which wait in the host's memory and come to the device one after another."""
        return replace(self.to("cpu"), offload=Offload(device))

    def timestep(self, sigma: float) -> Tensor:
        """The t that the network is told for a sigma, fractional, float32, shape (1,); for EDM ln(sigma) / 4."""
        if self.spec.schedule == "edm":
            return torch.tensor([math.log(sigma) / 4])
        return self.schedule.sigma_to_t(torch.tensor([sigma], dtype=torch.float64)).float()

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Model:
        """Move and cast every network in place; returns itself."""
        # diffusers warns of any dtype that is passed on, even None.
        wanted = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
        for module in (self.unet, *self.text_encoders):
            module.to(**wanted)
        if dtype is not None:
            wanted["dtype"] = autoencoder_dtype(self.spec.family, dtype)
        self.autoencoder.to(**wanted)
        return self

    def require_edit(self) -> None:
        """Raises CheckpointError if the UNet does not take the 8 channels of an InstructPix2Pix, or 12 with a mask."""
        if not self.spec.edits:
            raise CheckpointError(
                f"this checkpoint's UNet takes {self.spec.in_channels} input channels (text to image), and an "
                "InstructPix2Pix takes 8; load one, e.g. instruct-pix2pix-00-22000.safetensors"
            )


def load_model(
    source: str | Path,
    *,
    weights: str = "ema",
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | Literal["file"] | None = None,
    text_heads: int | None = None,
    prediction: str | None = None,
) -> Model:
    """Load "embedded", "embedded-sd", a checkpoint file, a diffusers folder, a training run, a hub id or a URL.

    ``weights`` picks the averaged (ema) or the raw UNet where there are both. ``base`` gives the autoencoder and the
    text encoders to a lone UNet. The device defaults to a GPU if there is one, the type to half precision there and
    float32 elsewhere; "file" keeps the file's types. In float16 SDXL's autoencoder stays float32.
    ``text_heads`` and ``prediction`` (eps or v) say what shapes cannot, for files that do not say it themselves.
    Raises CheckpointError for what cannot be loaded.
    """
    device = usable_device(device)
    bundle = _complete_bundle(source, base, weights=weights, text_heads=text_heads, prediction=prediction)
    return _model_of(bundle, device=device, dtype=None if dtype == "file" else dtype or default_dtype(device))


def _complete_bundle(
    source: str | Path, base: str | Path | None, *, weights: str, text_heads: int | None, prediction: str | None
) -> Bundle:
    """The source taken apart, with what it lacks from the base."""
    bundle = open_bundle(source, weights=weights, text_heads=text_heads, prediction=prediction, base=base)
    if not bundle.complete:
        bundle = _with_base(bundle, base, text_heads)
    elif base is not None and bundle.layout != "run":
        log.warning("%s is complete, so nothing of the base is taken", bundle.path.name)
    if weights == "raw" and bundle.spec.weights != "raw":
        log.warning("%s has one set of UNet weights, so there is no raw one to choose", bundle.path.name)
    return bundle


def _model_of(bundle: Bundle, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Model:
    spec, name = bundle.spec, bundle.path.name
    types = {"autoencoder": autoencoder_dtype(spec.family, dtype)} if dtype else {}
    modules = [build(part, name=name, device=device, dtype=types.get(part.kind, dtype)) for part in bundle.parts]
    check_widths(modules[0], modules[2:], name=name)
    log.info("%s: %s, %s weights", name, BASE_NAMES[spec.family], spec.weights)
    return Model(spec=spec, unet=modules[0], autoencoder=modules[1], text_encoders=tuple(modules[2:]))


def _with_base(bundle: Bundle, base: str | Path | None, text_heads: int | None) -> Bundle:
    """The bundle with the networks it lacks, from another checkpoint of its family."""
    if base is None:
        lacking = "a text encoder" if bundle.autoencoder else "an autoencoder and a text encoder"
        raise CheckpointError(
            f"{bundle.path.name} lacks {lacking if not bundle.text_encoders else 'an autoencoder'}; "
            "name a complete checkpoint of the same kind that gives them as the `base`"
        )
    giver = open_bundle(base, text_heads=text_heads)
    if not giver.complete or not _related(bundle.spec.family, giver.spec.family):
        what = BASE_NAMES[giver.spec.family] if giver.complete else "incomplete itself"
        raise CheckpointError(
            f"the base {giver.path.name} is {what}, and {bundle.path.name} needs a complete "
            f"{BASE_NAMES[bundle.spec.family]} checkpoint; give one"
        )
    return replace(
        bundle,
        spec=_spec_with(bundle.spec, giver.spec),
        autoencoder=bundle.autoencoder or giver.autoencoder,
        text_encoders=bundle.text_encoders or giver.text_encoders,
    )


def _spec_with(spec: ModelSpec, giver: ModelSpec) -> ModelSpec:
    """A lone UNet of SDXL's shape is CosXL's if its base is: who extracts it loses the sigmas that would say so."""
    if (spec.family, giver.family) != ("sdxl", "cosxl"):
        return replace(spec, latent_scale=giver.latent_scale)
    own = {"in_channels": spec.in_channels, "weights": spec.weights, "name": spec.name}
    return replace(giver, **{**recommended("cosxl", spec.in_channels), "latent_scale": giver.latent_scale, **own})


def _related(family: str, other: str) -> bool:
    return family == other or {family, other} == {"sdxl", "cosxl"}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    text_heads: int | None = None,
    prediction: str | None = None,
    loras: Sequence[Lora] = (),
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint as one file (to="ldm") or as a pipeline folder (to="diffusers"); returns its path.

    What the file says of the run that made it goes along. ``loras`` are merged into its weights. ``settings`` are
    what it recommends from now on, by the names of ModelSpec.
    """
    writer = _writer(to)
    bundle = _complete_bundle(source, base, weights=weights, text_heads=text_heads, prediction=prediction)
    bundle = replace(bundle, spec=replace(bundle.spec, **(settings or {})))
    model = with_loras(_model_of(bundle), loras)
    return writer(model, target, dtype, training=training_settings(bundle) or None)


def merge_files(
    ip2p: str | Path,
    base: str | Path,
    other: str | Path,
    target: str | Path,
    *,
    to: str = "ldm",
    weights: str = "ema",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write ip2p - base + other: the editing skill on another model of the family; returns the written path.

    ``weights`` are ip2p's; a lone UNet as ip2p takes the other networks from ``base``.
    """
    writer = _writer(to)
    alone = not open_bundle(ip2p, header_only=True).complete
    kept: dict[str, Any] = {"device": "cpu", "dtype": "file"}
    skilled = load_model(ip2p, weights=weights, base=base if alone else None, **kept)
    models = (skilled, load_model(base, **kept), load_model(other, **kept))
    return writer(add_difference(*models), target, dtype)


def _writer(to: str) -> Callable[..., Path]:
    writers = {"ldm": save_ldm, "diffusers": save_diffusers}
    if to not in writers:
        raise ConfigError(f"the layout is {to!r}; choose {' or '.join(writers)}")
    return writers[to]
