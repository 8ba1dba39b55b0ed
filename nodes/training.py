"""IP2P Train: an InstructPix2Pix from pairs, in this process, stopped and resumed as often as you like."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from PIL import Image

from ..ip2p_engine.errors import ConfigError, Interrupted
from ..ip2p_engine.hooks import Hooks
from . import _host, _models
from ._api import Pairs, advanced, io, schema
from .pairs import require_pairs

PRESETS = ["embedded", "lora", "one-gpu", "paper", "sd2", "sdxl", "cosxl"]
KIND = "ip2p_training"


class Train(io.ComfyNode):
    """A training run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_Train",
            display_name="IP2P Train",
            group="training",
            description=(
                "Trains an InstructPix2Pix on pairs (section 3.2 of the paper). Cancel saves, Run goes on. "
                "The result goes to models/checkpoints/ip2p and is loaded for the rest of the workflow."
            ),
            search_aliases=["finetune", "fine-tune", "fine tune", "train lora", "training", "lora training"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=_inputs(),
            outputs=[
                io.Model.Output(display_name="model", tooltip="The trained UNet, averaged weights."),
                io.Clip.Output(display_name="clip", tooltip="The base's text encoder."),
                io.Vae.Output(display_name="vae", tooltip="The base's autoencoder."),
                io.Image.Output(display_name="loss_curve", tooltip="The loss of every step, and its running mean."),
                io.String.Output(display_name="checkpoint", tooltip="Its name in IP2P Load Checkpoint."),
                io.String.Output(display_name="report", tooltip="Steps, loss, and what could not be used."),
            ],
        )

    @classmethod
    def execute(cls, pairs: Sequence[Any], name: str, base: str, preset: str, **values: Any) -> io.NodeOutput:
        result = run(pairs, name, base, preset, values, _host.teller(cls.hidden.unique_id))
        checkpoint = publish(result.files["ema"], name)
        native = _models.load_native(_models.source_of(checkpoint))
        with Image.open(result.curve) as curve:
            picture = _host.to_image([curve])
        lines = [f"{result.step} steps, loss {result.loss:.4f}, {result.broken_count} pairs could not be used"]
        report = _host.preformatted("\n".join([*lines, *result.broken]))
        return io.NodeOutput(native.model, native.clip, native.vae, picture, checkpoint, report)


def run(
    pairs: Sequence[Any], name: str, base: str, preset_name: str, values: dict[str, Any], tell: Callable[[str], None]
) -> Any:
    """Train, with progress and Cancel; returns the engine's TrainResult of a finished run."""
    from ..ip2p_engine.data.store import PairStore
    from ..ip2p_engine.train import preset, train

    folder = _host.output_folder(KIND, name)
    require_pairs(pairs)
    # 0 leaves a value to the preset. Workers could not find this pack under the name that ComfyUI gives it.
    chosen = {key: value for key, value in values.items() if value or key == "seed"}
    if chosen.get("resolution"):
        chosen["resize"] = (chosen["resolution"], round(chosen["resolution"] * 1.125))
    device = comfy.model_management.get_torch_device().type
    config = preset(preset_name, **chosen, workers=0, validation_count=1)
    config = replace(config, validate_every=min(500, max(5, config.steps // 10)))
    _require_packages(config)
    manager = comfy.model_management
    manager.unload_all_models()
    manager.soft_empty_cache()
    watch = Watch(folder / "validation", tell)
    try:
        result = train(
            config,
            data=str(pairs.folder) if isinstance(pairs, PairStore) else list(pairs),
            base=_models.source_of(base),
            out=folder,
            device=device,
            on_cache=watch.cache,
            hooks=Hooks(on_result=lambda _, progress: watch.step(progress), should_stop=manager.processing_interrupted),
        )
    except Interrupted:  # while it cached; ComfyUI's own signal follows
        result = None
    _host.check_interrupted()
    return result


def _require_packages(config: Any) -> None:
    """Raises ConfigError, before anything is loaded, for what a recipe needs and requirements.txt does not bring."""
    for package, used in (("peft", config.lora_rank), ("bitsandbytes", config.optimizer == "adamw8bit")):
        if used and find_spec(package) is None:
            raise ConfigError(
                f"this preset needs {package}, which is missing; pip install {package} in ComfyUI's Python and restart"
            )


class Watch:
    """What the node shows: a bar, a line below it that says what the bar counts, and the newest sample.

    ComfyUI's look whether Cancel was pressed is left to the loop, which saves first.
    """

    def __init__(self, samples: Path, tell: Callable[[str], None]) -> None:
        """``samples``: where the run puts pictures of its edits."""
        self._samples, self._tell, self._shown = samples, tell, ""
        self._bar = comfy.utils.ProgressBar(1)

    def cache(self, done: int, of: int) -> None:
        self._tell(f"encoding pair {done} of {of}")
        self._move(done, of, None)

    def step(self, progress: Any) -> None:
        left = timedelta(seconds=round(progress.seconds_left))
        self._tell(f"step {progress.step} of {progress.steps}, loss {progress.loss:.4f}, {left} left")
        self._move(progress.step, progress.steps, self._new_sample())

    def _new_sample(self) -> Image.Image | None:
        newest = max((path.name for path in self._samples.glob("*.png")), default="")
        if newest in ("", self._shown):
            return None
        self._shown = newest
        with Image.open(self._samples / newest) as picture:
            return picture.convert("RGB")

    def _move(self, done: int, of: int, picture: Image.Image | None) -> None:
        try:
            self._bar.update_absolute(done, of, picture and ("JPEG", picture, None))
        except comfy.model_management.InterruptProcessingException:
            comfy.model_management.interrupt_current_processing(True)


def publish(file: Path, name: str) -> str:
    """Copy a trained checkpoint where ComfyUI looks for them; returns its name in the lists."""
    folder = Path(folder_paths.get_folder_paths("checkpoints")[0]) / "ip2p"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        os.link(file, temporary)  # one content under two names, where both are on one disk
    except OSError:
        shutil.copyfile(file, temporary)
    temporary.replace(folder / f"{name}.safetensors")
    folder_paths.filename_list_cache.pop("checkpoints", None)
    return str(Path("ip2p") / f"{name}.safetensors")


def _inputs() -> list[io.Input]:
    return [
        Pairs.Input("pairs", tooltip="What to train on, from IP2P Load Data Set or Save Data Set."),
        io.String.Input(
            "name",
            default="my-edits",
            tooltip="Of the run in output/ip2p_training and of the checkpoint. The same name and settings go on.",
        ),
        io.Combo.Input(
            "base",
            options=_models.sources(),
            default="embedded",
            tooltip=(
                "What to start from: Stable Diffusion, whose first layer is widened to 8 channels, or an "
                "InstructPix2Pix to train further."
            ),
        ),
        io.Combo.Input(
            "preset",
            options=PRESETS,
            default="embedded",
            tooltip=(
                "A recipe. embedded: for scenes. lora: a small skill on a few GB; needs peft. one-gpu: SD1.5 on 24 GB; "
                "needs bitsandbytes. paper: for 8 large GPUs. sd2, sdxl, cosxl: for those bases."
            ),
        ),
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=10_000_000,
            tooltip="Optimiser steps in all; 0 is the preset's. Raise it to go on from a finished run, not embedded's.",
        ),
        io.Int.Input(
            "batch_size",
            default=0,
            min=0,
            max=65_536,
            tooltip="Pairs a step; 0 is the preset's. More is steadier and slower; memory depends on micro_batch.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=1e-7,
            tooltip="How far each step goes; 0 is the preset's. Lower it if the loss jumps.",
        ),
        *_advanced_inputs(),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**48,
            tooltip="Order, crops and noise of the run. Change it, with another name, to see how much is chance.",
        ),
    ]


def _advanced_inputs() -> list[io.Input]:
    return [
        advanced(
            io.Int.Input(
                "resolution",
                default=0,
                min=0,
                max=2048,
                step=64,
                tooltip="Side of the crops in pixels; 0 is the preset's, 256 in the paper. More needs more memory.",
            )
        ),
        advanced(
            io.Int.Input(
                "micro_batch",
                default=0,
                min=0,
                max=1024,
                tooltip="Pairs computed at once; 0 is the preset's. Lower it if memory runs out; it only costs time.",
            )
        ),
    ]
