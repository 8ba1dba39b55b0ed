"""How the photo model is made from nothing: four stages, each resumable, then the files that ship."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ConfigError
from ..scenes.stage import run_stage
from .networks import make_autoencoder

__all__ = ["STAGES", "export_embedded_photos", "train_stage"]

logger = logging.getLogger(__name__)

STAGES = ("autoencoder", "text", "latents", "edit")


def train_stage(name: str, runs: Path, pictures: Path, *, device: str = "cpu") -> None:
    """Train one stage, or go on with it; its weights are then in ``runs/NAME.safetensors``.

    Raises ConfigError for an unknown stage or one whose predecessors are not finished, DatasetError without pictures.
    """
    if name not in STAGES:
        raise ConfigError(f"stage {name!r} is unknown; choose one of {', '.join(STAGES)}")
    if device == "cpu":
        torch.set_num_threads(1)
    {"autoencoder": _autoencoder, "latents": _latents, "text": _text, "edit": _edit}[name](runs, pictures, device)


def export_embedded_photos(runs: Path, folder: Path) -> None:
    """Write the shipped files from the stages' weights."""
    from .export import export_photos

    edit = finished(runs, "edit")
    export_photos(finished(runs, "autoencoder"), part(edit, "text."), part(edit, "unet."), folder)


def finished(runs: Path, name: str) -> dict[str, Tensor]:
    """The weights of a finished stage. Raises ConfigError if there are none."""
    path = runs / f"{name}.safetensors"
    if not path.exists():
        raise ConfigError(f"{path} does not exist; train the stage {name!r} first (ip2p photos train {name})")
    return load_file(path)


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _autoencoder(runs: Path, pictures: Path, device: str) -> None:
    from .autoencoder_stage import AutoencoderStage, fold_latent_scale

    stage = AutoencoderStage(pictures)
    stage.trained.load_state_dict(run_stage(stage, runs / "autoencoder", device=device))
    stage.trained.cpu().eval()
    fold_latent_scale(stage.trained, stage.examples(256, size=128))
    _save(stage.trained.state_dict(), runs / "autoencoder.safetensors")


def _latents(runs: Path, pictures: Path, device: str) -> None:
    from .latents import make_chunks

    autoencoder = make_autoencoder()
    autoencoder.load_state_dict(finished(runs, "autoencoder"))
    make_chunks(
        autoencoder.eval(),
        pictures,
        runs / "latents",
        on_progress=lambda done, count: logger.info("latents %d of %d", done, count),
    )


def _text(runs: Path, pictures: Path, device: str) -> None:
    from .text_stage import TextStage

    _save(run_stage(TextStage(), runs / "text", device=device), runs / "text.safetensors")


def _edit(runs: Path, pictures: Path, device: str) -> None:
    from .edit_stage import EditStage

    stage = EditStage(runs / "latents", part(finished(runs, "text"), "text."))
    _save(run_stage(stage, runs / "edit", device=device), runs / "edit.safetensors")


def _save(weights: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, temporary)
    temporary.replace(path)
    logger.info("wrote %s", path)
