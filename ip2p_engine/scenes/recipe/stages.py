"""How the embedded models are made from nothing: six stages, each resumable, then the files that ship."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint.keys import with_prefix
from ...checkpoint.write import NETWORK_FILE, TEXT_FILE, write_safetensors
from ...errors import ConfigError, Interrupted
from ...hooks import Hooks
from ...networks.model import ModelSpec
from ...train.config import preset
from ...train.miniature import (
    LATENT_SCALE,
    export_miniature,
    finished_weights,
    fold_latent_scale,
    make_text_encoder,
    with_vocabulary,
)
from ...train.sources import open_source
from ...train.stage import Stage, run_stage
from .clip_stage import ClipStage, ClipTextStage, clip_config_json, with_text_tower
from .diffusion import (
    AutoencoderStage,
    DecoderStage,
    EditStage,
    TextToImageStage,
    make_autoencoder,
    make_unet,
)
from .tables import as_input, latent_table, training_pixels, words_in_use

__all__ = ["EMBEDDED_SPEC", "STAGES", "export_embedded", "train_in_processes", "train_on_pairs", "train_stage"]

ASKED_EVERY = 0.2
STAGES: dict[str, Callable[[Path], Stage]] = {
    "autoencoder": lambda runs: AutoencoderStage(),
    "decoder": lambda runs: DecoderStage(finished_weights(runs, "autoencoder", "scenes"), _latents(runs)),
    "clip": lambda runs: ClipStage(),
    "clip-text": lambda runs: ClipTextStage(finished_weights(runs, "clip", "scenes")),
    "text-to-image": lambda runs: TextToImageStage(_latents(runs)),
    "edit": lambda runs: EditStage(_latents(runs), finished_weights(runs, "text-to-image", "scenes")),
}
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

log = logging.getLogger(__name__)


def train_in_processes(
    stages: Sequence[str], runs: Path, *, processes: int, device: str, hooks: Hooks | None = None
) -> int:
    """Train stages one after another, each in its own processes of one thread; returns the first exit code but 0.

    Two processes of one thread beat one process of two: these networks are too small to share a matrix product.
    Raises ConfigError for an unknown stage, and Interrupted when it was asked to stop.
    """
    for stage in stages:
        _check_stage(stage)
    for stage in stages:
        count = 1 if stage.startswith("clip") else processes  # a contrastive batch is compared as a whole
        code = _launch(["scenes", "train", stage, "--runs", str(runs), "--processes", "1"], count, device, hooks)
        if code:
            return code
    return 0


def train_on_pairs(pairs: Path, runs: Path, *, processes: int, device: str, hooks: Hooks | None = None) -> int:
    """The edit model on a data set instead of true pairs, by ``ip2p train``: into ``runs``/edit-pairs.

    Returns its exit code. Raises DatasetError for what is no data set, and Interrupted when it was asked to stop.
    """
    open_source(pairs, preset("embedded"))  # before several processes say so
    out = runs / "edit-pairs"
    command = ["train", "--data", str(pairs), "--base", "embedded-sd", "--out", str(out), "--preset", "embedded"]
    return _launch(command, processes, device, hooks)


def _launch(command: Sequence[str], processes: int, device: str, hooks: Hooks | None) -> int:
    """Run an ip2p command, as several processes if wanted, and let it save when it is to stop."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    program = [*(torchrun if processes > 1 else []), "-m", __package__.split(".")[0]]
    threads = {} if device != "cpu" else {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    arguments = [sys.executable, *program, *command, "--device", device]
    # In a session of its own, so that a terminal's Ctrl-C reaches it once, from here.
    child = subprocess.Popen(arguments, env={**os.environ, **threads}, start_new_session=True)
    told, should_stop = False, (hooks or Hooks()).should_stop or bool
    try:
        while child.poll() is None:
            if should_stop() and not told:
                told = True
                if os.name != "nt":  # where there are no sessions
                    child.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(ASKED_EVERY)
    finally:
        child.terminate()
    if told and child.returncode:
        raise Interrupted("stopped, as asked; the same call goes on")
    return child.returncode


def _check_stage(name: str) -> None:
    if name not in STAGES:
        raise ConfigError(f"stage {name!r} is unknown; choose one of {', '.join(STAGES)}")


def train_stage(
    name: str,
    runs: Path,
    *,
    device: str = "cpu",
    hooks: Hooks | None = None,
) -> None:
    """Train one stage in this process, or as one process of several; a finished one's weights stay as they are.

    Raises ConfigError for an unknown stage or one whose forerunner is not finished, and as ``run_stage`` does.
    """
    _check_stage(name)
    path = _weights_of(runs, name)
    if path.exists():
        log.info("%s is finished; remove it and %s to train the stage anew", path, runs / name)
        return
    if device == "cpu":
        torch.set_num_threads(1)
    stage = STAGES[name](runs)
    weights = run_stage(stage, runs / name, device=device, hooks=hooks)
    if os.environ.get("RANK", "0") == "0":
        write_safetensors(_folded(weights) if name == "autoencoder" else weights, path, {"format": "pt"})
        log.info("wrote %s", path)


def export_embedded(runs: Path, folder: Path) -> None:
    """Write the shipped files from the stages' weights, in half precision: a diffusers folder, the CLIP beside it."""
    painter = finished_weights(runs, "text-to-image", "scenes")
    clip = with_text_tower(finished_weights(runs, "clip", "scenes"), finished_weights(runs, "clip-text", "scenes"))
    text_config = make_text_encoder().config.to_dict()
    text = with_vocabulary(with_prefix(painter, "text."), words_in_use())
    autoencoder = finished_weights(runs, "autoencoder", "scenes") | finished_weights(runs, "decoder", "scenes")
    networks = (
        ("text_encoder", text_config, text, TEXT_FILE),
        ("unet_text_to_image", make_unet(4).config, with_prefix(painter, "unet."), NETWORK_FILE),
        ("unet", make_unet(8).config, finished_weights(runs, "edit", "scenes"), NETWORK_FILE),
        ("vae", make_autoencoder().config, autoencoder, NETWORK_FILE),
        ("clip", clip_config_json(), with_vocabulary(clip, words_in_use(), "token_embedding.weight"), TEXT_FILE),
    )
    export_miniature(folder, EMBEDDED_SPEC, networks)


def _latents(runs: Path) -> dict[str, Tensor]:
    """Latents of the training scenes under the finished autoencoder."""
    autoencoder = make_autoencoder()
    autoencoder.load_state_dict(finished_weights(runs, "autoencoder", "scenes"))
    return latent_table(autoencoder.eval(), runs / "latents.safetensors")


def _folded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    autoencoder = make_autoencoder()
    autoencoder.load_state_dict(weights)
    fold_latent_scale(autoencoder.eval(), as_input(training_pixels()[::8]))
    return autoencoder.state_dict()


def _weights_of(runs: Path, name: str) -> Path:
    return runs / f"{name}.safetensors"
