"""How the photo model is made from nothing: four stages, each resumable, then the files that ship."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ConfigError
from ..hooks import Hooks
from ..train.stage import run_stage
from .networks import make_autoencoder

__all__ = ["STAGES", "export_embedded_photos", "train_stage"]

logger = logging.getLogger(__name__)

STAGES = ("autoencoder", "text", "latents", "edit")
FOLDED_OVER = 128
"""Views over which the latents' mean and variance are taken."""


def train_stage(name: str, runs: Path, pictures: Path, *, steps: int | None = None, device: str = "cpu") -> None:
    """Train one stage, or go on with it; its weights are then in ``runs/NAME.safetensors``.

    ``steps`` takes the place of the stage's own number: with more, a finished stage goes on, its learning rate on the
    longer cosine. Raises ConfigError for an unknown stage or one whose predecessors are not finished, and DatasetError
    without pictures.
    """
    if name not in STAGES:
        raise ConfigError(f"stage {name!r} is unknown; choose one of {', '.join(STAGES)}")
    if device == "cpu":
        torch.set_num_threads(1)
    if name == "latents":
        _make_latents(runs, pictures)
        return
    stage = {"autoencoder": _autoencoder, "text": _text, "edit": _edit}[name](runs, pictures)
    if steps is not None:
        stage.config = replace(stage.config, steps=steps)
    weights = run_stage(stage, runs / name, device=device)
    _save(_folded(stage, weights) if name == "autoencoder" else weights, runs / f"{name}.safetensors")


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


def _autoencoder(runs: Path, pictures: Path) -> Any:
    from .autoencoder_stage import AutoencoderStage

    return AutoencoderStage(pictures)


def _folded(stage: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's weights with latents of mean 0, variance 1 a channel."""
    from .autoencoder_stage import fold_latent_scale

    stage.trained.load_state_dict(weights)
    stage.trained.cpu().eval()
    fold_latent_scale(stage.trained, stage.examples(FOLDED_OVER, size=128))
    return stage.trained.state_dict()


def _text(runs: Path, pictures: Path) -> Any:
    from .text_stage import TextStage

    return TextStage()


def _edit(runs: Path, pictures: Path) -> Any:
    from .edit_stage import EditStage

    return EditStage(runs / "latents", part(finished(runs, "text"), "text."))


def _make_latents(runs: Path, pictures: Path) -> None:
    from .latents import make_chunks

    autoencoder = make_autoencoder()
    autoencoder.load_state_dict(finished(runs, "autoencoder"))
    make_chunks(
        autoencoder.eval(),
        pictures,
        runs / "latents",
        hooks=Hooks(on_progress=lambda done, count, _: logger.info("latents %d of %d", done, count)),
    )


def _save(weights: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, temporary)
    temporary.replace(path)
    logger.info("wrote %s", path)
