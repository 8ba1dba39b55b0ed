"""How the photo model is made from nothing: four stages, each resumable, then the files that ship."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.keys import with_prefix
from ..checkpoint.write import NETWORK_FILE, TEXT_FILE, write_safetensors
from ..errors import ConfigError
from ..hooks import Hooks
from ..networks.model import ModelSpec
from ..train.miniature import (
    LATENT_SCALE,
    export_miniature,
    finished_weights,
    fold_latent_scale,
    make_text_encoder,
    with_vocabulary,
)
from ..train.stage import run_stage
from .latents import make_chunks
from .stages import AutoencoderStage, EditStage, TextStage, make_autoencoder, make_unet
from .texts import words_in_use

__all__ = [
    "PHOTOS_SPEC",
    "STAGES",
    "export_photos",
    "train_stage",
]

PHOTOS_SPEC = ModelSpec(
    name="photos",
    family="sd1",
    in_channels=8,
    prediction="v",
    scaled_condition=False,
    latent_scale=LATENT_SCALE,
    resolution=256,
    # As `ip2p evaluate recommend photos` measured it: docs/evaluation.md.
    text_cfg=2.0,
    image_cfg=1.0,
    steps=4,
    guidance_low=0.5,
    guidance_high=5.0,
)
STAGES = ("autoencoder", "text", "latents", "edit")
FOLDED_OVER = 128
"""Views over which the latents' mean and variance are taken."""

log = logging.getLogger(__name__)


def train_stage(
    name: str,
    runs: Path,
    pictures: Path,
    *,
    steps: int | None = None,
    device: str = "cpu",
    hooks: Hooks | None = None,
) -> None:
    """Train one stage, or go on with it; its weights are then in ``runs/NAME.safetensors``.

    ``steps`` takes the place of the stage's own number: with more, a finished stage goes on, its learning rate on the
    longer cosine. Raises ConfigError for an unknown stage or one whose predecessors are not finished, DatasetError
    without pictures, and Interrupted after saving if it is to stop.
    """
    if name not in STAGES:
        raise ConfigError(f"stage {name!r} is unknown; choose one of {', '.join(STAGES)}")
    if device == "cpu":
        torch.set_num_threads(1)
    if name == "latents":
        _make_latents(runs, pictures, hooks)
        return
    stage = _stage(name, runs, pictures)
    if steps is not None:
        stage.config = replace(stage.config, steps=steps)
    weights = run_stage(stage, runs / name, device=device, hooks=hooks)
    path = runs / f"{name}.safetensors"
    write_safetensors(_folded(stage, weights) if name == "autoencoder" else weights, path, {"format": "pt"})
    log.info("wrote %s", path)


def export_photos(runs: Path, folder: Path) -> None:
    """Write the shipped files from the stages' weights; words that the grammar lacks get a row of zeros."""
    edit = finished_weights(runs, "edit", "photos")
    text = with_vocabulary(with_prefix(edit, "text."), words_in_use())
    networks = (
        ("vae", make_autoencoder().config, finished_weights(runs, "autoencoder", "photos"), NETWORK_FILE),
        ("text_encoder", make_text_encoder().config.to_dict(), text, TEXT_FILE),
        ("unet", make_unet().config, with_prefix(edit, "unet."), NETWORK_FILE),
    )
    export_miniature(folder, PHOTOS_SPEC, networks)


def _stage(name: str, runs: Path, pictures: Path) -> Any:
    if name == "autoencoder":
        return AutoencoderStage(pictures)
    if name == "text":
        return TextStage()
    text = with_prefix(finished_weights(runs, "text", "photos"), "text.")
    return EditStage(runs / "latents", text)


def _folded(stage: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's weights with latents of mean 0, variance 1 a channel."""
    stage.trained.load_state_dict(weights)
    stage.trained.cpu().eval()
    fold_latent_scale(stage.trained, stage.examples(FOLDED_OVER, size=128), at_once=16)
    return stage.trained.state_dict()


def _make_latents(runs: Path, pictures: Path, hooks: Hooks | None) -> None:
    autoencoder = make_autoencoder()
    autoencoder.load_state_dict(finished_weights(runs, "autoencoder", "photos"))
    make_chunks(autoencoder.eval(), pictures, runs / "latents", hooks=hooks)
