"""Checkpoints going out: one LDM file, or a diffusers folder. What exists under its name is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from .build import all_finite, overflow
from .diffusers_settings import TOKENIZER_FILES, model_index, scheduler_config, write_json, write_tokenizers
from .folder import CONFIG_FILE
from .ldm_state import architecture_of, ldm_state
from .names import few
from .parts import Networks
from .read import SAFE_SUFFIXES, WEIGHT_SUFFIXES
from .single_file import CONFIG_KEY
from .spec import BASE_NAMES, spec_to_json

__all__ = ["RAW_UNET", "TRAINING_KEY", "save_diffusers", "save_ldm", "write_safetensors"]

TRAINING_KEY = "ip2p_training"
RAW_UNET = "unet/diffusion_pytorch_model.non_ema.safetensors"
NETWORK_FILE, TEXT_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
PIPELINE_FILES = {
    *("model_index.json", CONFIG_FILE, f"{TRAINING_KEY}.json", "scheduler/scheduler_config.json", RAW_UNET),
    *(f"{folder}/{name}" for folder in ("unet", "vae") for name in ("config.json", NETWORK_FILE)),
    *(f"text_encoder{suffix}/{name}" for suffix in ("", "_2") for name in ("config.json", TEXT_FILE)),
    *(f"tokenizer{suffix}/{name}" for suffix in ("", "_2") for name in TOKENIZER_FILES),
}
INNER = ("_name_or_path", "_use_default_values")  # by the second diffusers leaves out what the file says
ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2"}
XL_ARCHITECTURE = "stable-diffusion-xl-v1"
IMPLEMENTATION = "https://github.com/CompVis/stable-diffusion"
XL_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"


def save_ldm(
    model: Networks, path: str | Path, dtype: torch.dtype | None = None, *, training: Mapping[str, Any] | None = None
) -> Path:
    """Write one .safetensors file in the authors' layout, which ComfyUI and others load.

    The header carries ``modelspec.*``, the ModelSpec with the networks' configurations, and ``training``: the
    settings of the run that made it. ``dtype`` None keeps the networks' own.
    """
    path = Path(path)
    if path.suffix.lower() not in SAFE_SUFFIXES:
        raise CheckpointError(f"{path.name} ends in {path.suffix or 'nothing'}; give a name ending in .safetensors")
    metadata = _modelspec(model, path.stem)
    metadata[CONFIG_KEY] = spec_to_json(model.spec, architecture_of(model))
    if training is not None:
        metadata[TRAINING_KEY] = json.dumps(training, sort_keys=True)
    write_safetensors(_cast(ldm_state(model), dtype, path.name), path, metadata)
    return path


def save_diffusers(
    model: Networks, folder: str | Path, dtype: torch.dtype | None = None, *, training: Mapping[str, Any] | None = None
) -> Path:
    """Write a pipeline folder that diffusers' InstructPix2Pix pipeline loads; replaces one that holds nothing else."""
    folder = Path(folder).resolve()
    if folder.suffix.lower() in WEIGHT_SUFFIXES:
        raise CheckpointError(f"{folder.name} is a file's name and a pipeline is a folder; leave {folder.suffix} out")
    with _replacing(folder) as new:
        _write_network(new / "unet", model.unet.config, model.unet.state_dict(), dtype, NETWORK_FILE)
        _write_network(new / "vae", model.autoencoder.config, model.autoencoder.state_dict(), dtype, NETWORK_FILE)
        for suffix, encoder in zip(("", "_2"), model.text_encoders, strict=False):
            config = {**encoder.config.to_dict(), "architectures": [type(encoder).__name__]}
            _write_network(new / f"text_encoder{suffix}", config, _on_disk(encoder), dtype, TEXT_FILE)
        write_tokenizers(new, model.spec.family, len(model.text_encoders))
        write_json(new / "scheduler" / "scheduler_config.json", scheduler_config(model.spec))
        write_json(new / "model_index.json", model_index(model.spec))
        (new / CONFIG_FILE).write_text(spec_to_json(model.spec) + "\n", encoding="utf-8")
        if training is not None:
            write_json(new / f"{TRAINING_KEY}.json", training)
    return folder


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write under another name, flush to disk, then rename: a killed writer leaves no half file under the name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives; safetensors makes private files
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, dict(metadata))
        temporary.chmod(mode)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own
        raise CheckpointError(f"{path} cannot be written ({error}); choose a place with room and permission") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder beside the wanted one, which takes its place when the block ends well."""
    new = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        _check_replaceable(folder)
        new.mkdir(parents=True)
        yield new
        _take_place(new, folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error}); choose a place with room and permission"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    """Raises CheckpointError where replacing the folder would take more than a pipeline that we wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; choose another name or remove it first")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if strange := files - PIPELINE_FILES:
        raise CheckpointError(
            f"{folder} holds {few(strange)}, which would be lost; choose another name or move it first"
        )
    if Path.cwd().is_relative_to(folder):
        raise CheckpointError(f"{folder} is where this command runs; give the name of a new folder")


def _take_place(new: Path, folder: Path) -> None:
    """Give the new folder the name; where that fails, the old one has it again."""
    if not folder.exists():
        new.replace(folder)
        return
    old = new.with_suffix(".old")
    folder.replace(old)
    try:
        new.replace(folder)
    except BaseException:
        old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_network(
    folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype | None, file: str
) -> None:
    plain = {name: value for name, value in dict(config).items() if name not in INNER and _is_json(value)}
    write_json(folder / "config.json", plain)
    write_safetensors(_cast(state, dtype, folder.name), folder / file, {"format": "pt"})


def _on_disk(encoder: Any) -> dict[str, Tensor]:
    """Text encoders' names on disk begin with text_model. in every published folder; transformers 5 dropped that."""
    top = ("text_model.", "text_projection.")
    return {name if name.startswith(top) else f"text_model.{name}": v for name, v in encoder.state_dict().items()}


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype | None, name: str) -> dict[str, Tensor]:
    """Every tensor on the CPU and in the wanted type; markers, which are single numbers, keep theirs."""
    return {key: _cast_one(key, value.detach().cpu(), dtype, name) for key, value in state.items()}


def _cast_one(key: str, value: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if dtype in (None, value.dtype) or value.ndim == 0 or not value.is_floating_point():
        return value
    cast = value.to(dtype)
    if not all_finite(cast) and all_finite(value):
        raise overflow(key, value, cast.dtype, name)
    return cast


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple | dict)


def _modelspec(model: Networks, title: str) -> dict[str, str]:
    """Stability AI's ModelSpec 1.0.0, as far as it is known."""
    spec = model.spec
    architecture = ARCHITECTURES.get(spec.family, XL_ARCHITECTURE)
    if spec.family == "sd2":
        architecture += "-768-v" if spec.prediction == "v" else "-512"
    edit = "-edit" if spec.in_channels == 8 else "-base" if architecture == XL_ARCHITECTURE else ""
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture + edit,
        "modelspec.implementation": XL_IMPLEMENTATION if architecture == XL_ARCHITECTURE else IMPLEMENTATION,
        "modelspec.title": spec.name or title,
        "modelspec.description": f"{BASE_NAMES[spec.family]}, {spec.in_channels} channels, {spec.weights} weights",
        "modelspec.prediction_type": "v" if spec.prediction == "v" else "epsilon",
        "modelspec.resolution": f"{spec.resolution}x{spec.resolution}",
    }
