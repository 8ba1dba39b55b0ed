"""Checkpoints going out: one LDM file, or a diffusers folder. What exists under its name is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import whole_folder, whole_path, write_json
from ..tokenizer import MAX_TOKENS, clip_tokenizer, merges
from .build import all_finite, overflow
from .keys import few, ldm_autoencoder_name, ldm_unet_name, strip_text_prefix, to_open_clip
from .read import SAFE_SUFFIXES, WEIGHT_SUFFIXES
from .recognise import CONFIG_FILE, CONFIG_KEY, EDM_KEYS, PREFIXES, V_KEY, ZERO_SNR_KEY
from .spec import BASE_NAMES, ModelSpec, Networks, spec_to_json

__all__ = [
    "NETWORK_FILE",
    "RAW_UNET",
    "TEXT_FILE",
    "TOKENIZER_FILES",
    "TRAINING_KEY",
    "architecture_of",
    "ldm_state",
    "model_index",
    "save_diffusers",
    "save_ldm",
    "scheduler_config",
    "write_network",
    "write_safetensors",
    "write_tokenizers",
]

CLIP_INSIDE = "text_model."
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "projection_dim",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
TOKENIZER_FILES = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
DIFFUSERS, TRANSFORMERS = "diffusers", "transformers"
START, END = "<|startoftext|>", "<|endoftext|>"
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
    """Write a pipeline folder that diffusers' InstructPix2Pix pipeline loads; replaces one that holds nothing else.

    ``dtype`` None keeps the networks' own; where they have several it is the widest, since they meet in the pipeline.
    """
    folder = Path(folder).resolve()
    if folder.suffix.lower() in WEIGHT_SUFFIXES:
        raise CheckpointError(f"{folder.name} is a file's name and a pipeline is a folder; leave {folder.suffix} out")
    dtype = dtype or _widest(model)
    with _replacing(folder) as new:
        write_network(new / "unet", model.unet.config, model.unet.state_dict(), dtype, NETWORK_FILE)
        write_network(new / "vae", model.autoencoder.config, model.autoencoder.state_dict(), dtype, NETWORK_FILE)
        for suffix, encoder in zip(("", "_2"), model.text_encoders, strict=False):
            config = {**encoder.config.to_dict(), "architectures": [type(encoder).__name__]}
            write_network(new / f"text_encoder{suffix}", config, _on_disk(encoder), dtype, TEXT_FILE)
        write_tokenizers(new, model.spec.family, len(model.text_encoders))
        (new / "scheduler").mkdir()
        write_json(new / "scheduler" / "scheduler_config.json", scheduler_config(model.spec))
        write_json(new / "model_index.json", model_index(model.spec))
        (new / CONFIG_FILE).write_text(spec_to_json(model.spec) + "\n", encoding="utf-8")
        if training is not None:
            write_json(new / f"{TRAINING_KEY}.json", training)
    return folder


def _widest(model: Networks) -> torch.dtype | None:
    """The type that holds all of the networks' weights; None where they have one."""
    found = {network.dtype for network in (model.unet, model.autoencoder, *model.text_encoders)}
    return reduce(torch.promote_types, found) if len(found) > 1 else None


def write_network(
    folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype | None, file: str
) -> None:
    """A network's folder: config.json and the weights, on the CPU and in the wanted type; None keeps theirs."""
    plain = {name: value for name, value in dict(config).items() if name not in INNER and _is_json(value)}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", plain)
    write_safetensors(_cast(state, dtype, folder.name), folder / file, {"format": "pt"})


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a file whole or not at all; parents are made. Raises CheckpointError."""
    with _refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_path(path) as new:
            new.touch()
            mode = new.stat().st_mode  # what the user's umask gives; safetensors makes private files
            save_file({name: value.contiguous() for name, value in tensors.items()}, new, dict(metadata))
            new.chmod(mode)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own
        raise CheckpointError(f"{path} cannot be written ({error}); choose a place with room and permission") from error


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder, which takes the wanted one's place when the block ends well. Raises CheckpointError."""
    with _refusing(folder):
        _check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as new:
            yield new


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
    edit = "-edit" if spec.edits else "-base" if architecture == XL_ARCHITECTURE else ""
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


def ldm_state(model: Networks) -> dict[str, Tensor]:
    """Every tensor of a checkpoint as the authors' code, and ComfyUI, name it. Nothing is copied but packed tensors."""
    state = {
        PREFIXES["unet"] + ldm_unet_name(name, model.unet.config): value
        for name, value in model.unet.state_dict().items()
    }
    for name, value in model.autoencoder.state_dict().items():
        ldm_name = ldm_autoencoder_name(name, model.autoencoder.config)
        convolution = ".attn_1." in ldm_name and value.ndim == 2
        state[PREFIXES["autoencoder"] + ldm_name] = value[:, :, None, None] if convolution else value
    return {**state, **_text_state(model), **_markers(model)}


def architecture_of(model: Networks) -> dict[str, Any]:
    """The networks' configurations, as plain values: what shapes do not say is in them."""
    return {
        "unet": _plain(model.unet.config),
        "autoencoder": _plain(model.autoencoder.config),
        "text_encoders": [_text_config(encoder) for encoder in model.text_encoders],
    }


def _text_state(model: Networks) -> dict[str, Tensor]:
    family = model.spec.family
    clean = [strip_text_prefix(encoder.state_dict()) for encoder in model.text_encoders]
    if family == "sd2":
        return _prefixed(PREFIXES["open_clip"], to_open_clip(clean[0], repeat_last=True))
    clip = PREFIXES["clip" if family == "sd1" else "sdxl_clip"] + CLIP_INSIDE
    positions = torch.arange(clean[0]["embeddings.position_embedding.weight"].shape[0])[None]
    state = _prefixed(clip, {**clean[0], "embeddings.position_ids": positions})
    if family != "sd1":
        state.update(_prefixed(PREFIXES["sdxl_open_clip"], to_open_clip(clean[1])))
    return state


def _markers(model: Networks) -> dict[str, Tensor]:
    """The tensors by which ComfyUI knows a prediction type."""
    spec = model.spec
    if spec.schedule == "edm":
        return {key: torch.tensor(value) for key, value in zip(EDM_KEYS, (spec.sigma_min, spec.sigma_max), strict=True)}
    if spec.zero_snr:
        return {V_KEY: torch.zeros(0), ZERO_SNR_KEY: torch.zeros(0)}
    return {V_KEY: torch.zeros(0)} if spec.family == "sdxl" and spec.prediction == "v" else {}


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}


def _text_config(encoder: nn.Module) -> dict[str, Any]:
    values = encoder.config.to_dict()  # type: ignore[union-attr, operator]
    return {name: values[name] for name in TEXT_FIELDS if name in values}


def model_index(spec: ModelSpec) -> dict[str, Any]:
    """model_index.json: the pipeline's class and its parts."""
    double = spec.family in ("sdxl", "cosxl")
    task = "InstructPix2PixPipeline" if spec.edits else "Pipeline"
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if double else ''}{task}",
        "unet": [DIFFUSERS, "UNet2DConditionModel"],
        "vae": [DIFFUSERS, "AutoencoderKL"],
        "text_encoder": [TRANSFORMERS, "CLIPTextModel"],
        "tokenizer": [TRANSFORMERS, "CLIPTokenizer"],
        "scheduler": [DIFFUSERS, scheduler_config(spec)["_class_name"]],
    }
    if not double:
        absent = {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
        return {**index, **absent, "requires_safety_checker": False}
    index["text_encoder_2"] = [TRANSFORMERS, "CLIPTextModelWithProjection"]
    index["tokenizer_2"] = [TRANSFORMERS, "CLIPTokenizer"]
    index["force_zeros_for_empty_prompt"] = spec.in_channels == 4
    if spec.edits:
        index["is_cosxl_edit"] = spec.scaled_condition
    return index


def scheduler_config(spec: ModelSpec) -> dict[str, Any]:
    """scheduler_config.json; "linspace" is the only spacing that equals the paper's code, but for zero_snr."""
    prediction = "v_prediction" if spec.prediction == "v" else "epsilon"
    if spec.schedule == "edm":
        return {
            "_class_name": "EDMEulerScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": prediction,
            "sigma_data": 1.0,
            "sigma_max": spec.sigma_max,
            "sigma_min": spec.sigma_min,
            "sigma_schedule": "exponential",
        }
    return {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "beta_end": spec.beta_end,
        "beta_schedule": "scaled_linear",
        "beta_start": spec.beta_start,
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "timestep_spacing": "trailing" if spec.zero_snr else "linspace",
        **({"rescale_betas_zero_snr": True} if spec.zero_snr else {}),
    }


def write_tokenizers(folder: Path, family: str, encoders: int) -> None:
    """CLIP's vocabulary and merges beside each text encoder; open_clip's encoders pad with token 0."""
    for suffix in ("", "_2")[:encoders]:
        open_clip = family == "sd2" or bool(suffix)
        target = folder / f"tokenizer{suffix}"
        target.mkdir()
        for name, text in _vocabulary_files().items():
            (target / name).write_text(text, encoding="utf-8")
        tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": "!" if open_clip else END}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, **tokens}
        write_json(target / "tokenizer_config.json", config)
        write_json(target / "special_tokens_map.json", tokens)


@lru_cache(maxsize=1)
def _vocabulary_files() -> dict[str, str]:
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    vocabulary = json.dumps(clip_tokenizer().get_vocab(), ensure_ascii=False)
    return {"vocab.json": f"{vocabulary}\n", "merges.txt": "\n".join(lines) + "\n"}
