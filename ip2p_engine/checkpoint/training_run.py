"""A training run as a checkpoint: the networks of its base, and the UNet of one of its steps."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..config import from_mapping
from ..errors import CheckpointError
from ..files import is_url, read_json
from .build import module_state, skeleton
from .keys import with_prefix
from .spec import Bundle, ModelSpec, Part
from .unpickle import read_pickle
from .write import TRAINING_KEY

__all__ = [
    "CHECKPOINTS",
    "EXPORTS",
    "RUN",
    "RunStep",
    "TEXT_PREFIXES",
    "base_of",
    "bundle_of_step",
    "find_step",
    "settings_of",
    "with_adapters",
    "with_channels",
]

RUN, CHECKPOINTS, EXPORTS = "run.json", "checkpoints", "exports"
STEP_FILE = re.compile(r"step-(\d{8})\.pt")
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
TEXT_PREFIXES = ("text_encoder.", "text_encoder_2.")
"""Of what a step holds of the text encoders, where they were trained."""
PARTS = {"ema": "ema", "raw": "trained"}


@dataclass(frozen=True, kw_only=True)
class RunStep:
    """One step of a run on the disk."""

    folder: Path
    file: Path
    """A step to go on from (.pt), or a whole checkpoint that the run exported."""
    about: Mapping[str, Any]
    """What run.json says."""

    @property
    def exported(self) -> bool:
        """Whether the file is whole by itself."""
        return self.file.suffix != ".pt"


def find_step(source: str, weights: str) -> RunStep | None:
    """The step that ``RUN`` (its last), ``RUN@N`` or ``RUN/checkpoints/step-N.pt`` names; None for all else.

    Raises CheckpointError for a run that has no such step yet.
    """
    path = Path(source).expanduser()
    name, at, number = source.rpartition("@")
    if path.is_dir() and (path / RUN).is_file():
        return _last(path, weights)
    if path.is_file() and STEP_FILE.fullmatch(path.name) and (path.parent.parent / RUN).is_file():
        return RunStep(folder=path.parent.parent, file=path, about=settings_of(path.parent.parent))
    folder = Path(name).expanduser()
    if at and number.isdecimal() and not path.exists() and (folder / RUN).is_file():
        return _numbered(folder, int(number), weights)
    return None


def base_of(about: Mapping[str, Any]) -> str:
    """What a run was trained from, as it was named then, or where that was."""
    base = str(about.get("base", ""))
    there = Path(str(about.get("directory", ""))) / base
    return str(there) if base and not is_url(base) and not Path(base).exists() and there.exists() else base


def bundle_of_step(step: RunStep, base: Bundle, weights: str, *, header_only: bool) -> Bundle:
    """The base with what a step trained, averaged (ema) or raw, adapters added to the weights they adapt.

    Raises CheckpointError for a step that does not fit the base.
    """
    saved = read_pickle(step.file)
    state = saved.get(PARTS[weights])
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{step.file} is no step of a training run; give the run's folder")
    spec = replace(from_mapping(ModelSpec, step.about.get("spec", {})), weights=weights)
    config = dict(step.about.get("config", {}))
    unet = replace(base.unet, config={**base.unet.config, "in_channels": spec.in_channels})
    tensors = {name: value for name, value in state.items() if not name.startswith(TEXT_PREFIXES)}
    scales = [_scale(config, "lora"), _scale(config, "lora_conv")]
    if any(name.endswith(DOWN) for name in tensors):
        whole = _widened_state(base.unet, spec.in_channels, step.file.name)
        tensors = with_adapters(whole, tensors, *scales, values=not header_only)
    texts = [
        replace(part, tensors=with_adapters(part.tensors, own, *scales, values=not header_only)) if own else part
        for part, own in (
            (part, with_prefix(state, prefix)) for part, prefix in zip(base.text_encoders, TEXT_PREFIXES, strict=False)
        )
    ]
    known = {name: value for name, value in step.about.items() if name not in ("versions", "directory")}
    about = {**known, "step": saved.get("step")}
    return replace(
        base,
        path=step.file,
        layout="run",
        spec=spec,
        unet=Part(kind="unet", config=unet.config, tensors=tensors, files=(step.file,)),
        text_encoders=tuple(texts),
        ema_parameters=sum(value.numel() for value in tensors.values()),
        metadata={TRAINING_KEY: json.dumps(about, sort_keys=True)},
        leftovers={},
    )


def with_adapters(
    whole: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    scale: float,
    conv_scale: float | None = None,
    *,
    values: bool = True,
) -> dict[str, Tensor]:
    """W + scale B A for each adapted weight of a network, float32 (Hu et al. 2021, equation 3); others are replaced.

    ``conv_scale`` is of convolutions, where it is another. ``values`` False leaves the numbers as they are, where names
    and shapes are enough.
    """
    merged = {name: value.float() for name, value in whole.items()}
    for name, value in state.items():
        if name.endswith(UP):
            continue
        if not name.endswith(DOWN):
            merged[name] = value
            continue
        target = name.removesuffix(DOWN) + ".weight"
        up = state[name.removesuffix(DOWN) + UP]
        if target not in merged:
            raise CheckpointError(f"the adapter {name} has no weight in the base; use the base that the run began with")
        if values:
            factor = scale if value.ndim == 2 or conv_scale is None else conv_scale
            merged[target] = merged[target] + factor * (up.flatten(1) @ value.flatten(1)).view_as(merged[target])
    return merged


def _scale(config: Mapping[str, Any], kind: str) -> float:
    """alpha / rank of the run's adapters on linear layers (lora) or convolutions (lora_conv)."""
    rank = int(config.get(f"{kind}_rank") or 0)
    return float(config.get(f"{kind}_alpha") or rank) / max(1, rank)


def with_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution's weight with so many input channels, the new ones zero."""
    return torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, channels - weight.shape[1]))


def _widened_state(unet: Part, channels: int, name: str) -> dict[str, Tensor]:
    """The base's weights under the network's names, its first convolution widened with zeros."""
    state = module_state(unet, skeleton(unet, name=name).state_dict(), name=name)
    state["conv_in.weight"] = with_channels(state["conv_in.weight"], channels)
    return state


def _last(folder: Path, weights: str) -> RunStep:
    """A finished run's file, unless it was trained further since; else the last step."""
    steps = sorted((folder / CHECKPOINTS).glob("step-*.pt"))
    steps = [path for path in steps if STEP_FILE.fullmatch(path.name)]
    finished = folder / f"{weights}.safetensors"
    if finished.is_file() and (not steps or _step_in(finished) >= _number(steps[-1])):
        return RunStep(folder=folder, file=finished, about={})
    if not steps:
        raise CheckpointError(f"{folder} is a run without a checkpoint yet; wait for its first save_every steps")
    return RunStep(folder=folder, file=steps[-1], about=settings_of(folder))


def _numbered(folder: Path, number: int, weights: str) -> RunStep:
    exported = folder / EXPORTS / f"step-{number:08d}" / f"{weights}.safetensors"
    file = folder / CHECKPOINTS / f"step-{number:08d}.pt"
    finished = folder / f"{weights}.safetensors"
    for whole in (exported, *([finished] if finished.is_file() and _step_in(finished) == number else [])):
        if whole.is_file():
            return RunStep(folder=folder, file=whole, about={})
    if not file.is_file():
        kept = [*(folder / CHECKPOINTS).glob("step-*.pt"), *(folder / EXPORTS).glob("step-*")]
        known = ", ".join(str(n) for n in sorted({_number(path) for path in kept})) or "none yet"
        raise CheckpointError(f"{folder} has no step {number}; it has {known} (train with `export_every` to keep more)")
    return RunStep(folder=folder, file=file, about=settings_of(folder))


def settings_of(folder: Path) -> Mapping[str, Any]:
    """What run.json says; raises CheckpointError where there is no training run."""
    about = read_json(folder / RUN, CheckpointError)
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict) or "base" not in about:
        raise CheckpointError(f"{folder} holds no training run; give a checkpoint file, a diffusers folder or a hub id")
    return about


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def _step_in(path: Path) -> int:
    """After which step a whole checkpoint was written; -1 where it does not say."""
    with safe_open(os.fspath(path), "pt") as file:
        about = json.loads((file.metadata() or {}).get(TRAINING_KEY, "{}"))
    return int(about.get("step", -1))
