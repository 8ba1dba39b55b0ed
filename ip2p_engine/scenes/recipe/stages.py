"""How the embedded models are made from nothing: six stages, each resumable, then the files that ship."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import ConfigError, Interrupted
from ...train import preset
from ...train.sources import open_source
from .clip_stage import with_text_tower
from .export import export_autoencoder, export_clip, export_settings, export_text_encoder, export_unet
from .stage import run_stage

__all__ = ["STAGES", "export_embedded", "train_in_processes", "train_on_pairs", "train_stage"]

logger = logging.getLogger(__name__)

ASKED_EVERY = 0.2
STAGES = ("autoencoder", "decoder", "clip", "clip-text", "text-to-image", "edit")


def train_in_processes(
    stages: Sequence[str], runs: Path, *, processes: int, device: str, should_stop: Callable[[], bool] = bool
) -> int:
    """Train stages one after another, each in its own processes of one thread; returns the first exit code but 0.

    Two processes of one thread beat one process of two: these networks are too small to share a matrix product.
    Raises ConfigError for an unknown stage, and Interrupted when it was asked to stop.
    """
    for stage in stages:
        _check_stage(stage)
    for stage in stages:
        count = 1 if stage.startswith("clip") else processes  # a contrastive batch is compared as a whole
        code = _launch(["scenes", "train", stage, "--runs", str(runs), "--processes", "1"], count, device, should_stop)
        if code:
            return code
    return 0


def train_on_pairs(
    pairs: Path, runs: Path, *, processes: int, device: str, should_stop: Callable[[], bool] = bool
) -> int:
    """The edit model on a data set instead of true pairs, by ``ip2p train``: into ``runs``/edit-pairs.

    Returns its exit code. Raises DatasetError for what is no data set, and Interrupted when it was asked to stop.
    """
    open_source(pairs, preset("embedded"))  # before several processes say so
    out = runs / "edit-pairs"
    command = ["train", "--data", str(pairs), "--base", "embedded-sd", "--out", str(out), "--preset", "embedded"]
    return _launch(command, processes, device, should_stop)


def _launch(command: Sequence[str], processes: int, device: str, should_stop: Callable[[], bool]) -> int:
    """Run an ip2p command, as several processes if wanted, and let it save when it is to stop."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    program = [*(torchrun if processes > 1 else []), "-m", __package__.split(".")[0]]
    threads = {} if device != "cpu" else {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    arguments = [sys.executable, *program, *command, "--device", device]
    # In a session of its own, so that a terminal's Ctrl-C reaches it once, from here.
    child = subprocess.Popen(arguments, env={**os.environ, **threads}, start_new_session=True)
    told = False
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
        raise Interrupted("stopped, as asked; the same command goes on")
    return child.returncode


def _check_stage(name: str) -> None:
    if name not in STAGES:
        raise ConfigError(f"stage {name!r} is unknown; choose one of {', '.join(STAGES)}")


def train_stage(name: str, runs: Path, *, device: str = "cpu") -> None:
    """Train one stage in this process, or as one process of several."""
    _check_stage(name)
    if device == "cpu":
        torch.set_num_threads(1)
    make = {
        "autoencoder": _autoencoder_stage,
        "decoder": _decoder_stage,
        "clip": _clip_stage,
        "clip-text": _clip_text_stage,
        "text-to-image": _text_to_image_stage,
        "edit": _edit_stage,
    }[name]
    weights = run_stage(make(runs), runs / name, device=device)
    if os.environ.get("RANK", "0") == "0":
        finish = _fold if name == "autoencoder" else lambda weights: weights
        _save(finish(weights), runs / f"{name}.safetensors")


def export_embedded(runs: Path, folder: Path) -> None:
    """Write the shipped files from the stages' weights."""
    _export_text_to_image(_finished(runs, "text-to-image"), folder)
    export_unet(_finished(runs, "edit"), folder, in_channels=8)
    export_clip(with_text_tower(_finished(runs, "clip"), _finished(runs, "clip-text")), folder)
    export_autoencoder(_finished(runs, "autoencoder") | _finished(runs, "decoder"), folder)
    export_settings(folder)


def _export_text_to_image(weights: dict[str, Tensor], folder: Path) -> None:
    export_text_encoder(_part(weights, "text."), folder)
    export_unet(_part(weights, "unet."), folder, in_channels=4)


def _autoencoder_stage(runs: Path):
    from .diffusion import AutoencoderStage

    return AutoencoderStage()


def _decoder_stage(runs: Path):
    from .diffusion import DecoderStage

    return DecoderStage(_finished(runs, "autoencoder"), _latents(runs))


def _clip_stage(runs: Path):
    from .clip_stage import ClipStage

    return ClipStage()


def _clip_text_stage(runs: Path):
    from .clip_stage import ClipTextStage

    return ClipTextStage(_finished(runs, "clip"))


def _text_to_image_stage(runs: Path):
    from .diffusion import TextToImageStage

    return TextToImageStage(_latents(runs))


def _edit_stage(runs: Path):
    from .diffusion import EditStage

    return EditStage(_latents(runs), _finished(runs, "text-to-image"))


def _latents(runs: Path) -> dict[str, Tensor]:
    """Latents of the training scenes under the finished autoencoder; made once, then read."""
    from .diffusion import AutoencoderStage
    from .networks import make_autoencoder
    from .tables import latent_table

    autoencoder = make_autoencoder()
    autoencoder.load_state_dict(_finished(runs, "autoencoder"))
    return latent_table(
        autoencoder.eval(), partial(getattr, AutoencoderStage(), "pixels"), runs / "latents.safetensors"
    )


def _fold(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    from .diffusion import AutoencoderStage, fold_latent_scale

    stage = AutoencoderStage()
    stage.trained.load_state_dict(weights)
    fold_latent_scale(stage.trained.eval(), stage.pixels[::8].float() / 127.5 - 1)
    return stage.trained.state_dict()


def _finished(runs: Path, name: str) -> dict[str, Tensor]:
    path = runs / f"{name}.safetensors"
    if not path.exists():
        raise ConfigError(f"{path} does not exist; train the stage {name!r} first (ip2p scenes train {name})")
    return load_file(path)


def _save(weights: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, temporary)
    temporary.replace(path)
    logger.info("wrote %s", path)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
