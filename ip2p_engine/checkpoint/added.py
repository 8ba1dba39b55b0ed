"""What people add to a checkpoint: another autoencoder, a ControlNet, words of their own (textual inversion)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..files import sha256_of
from .keys import (
    few,
    infer_autoencoder,
    infer_control,
    ldm_autoencoder_name,
    ldm_control_name,
    modern_attention_name,
    with_prefix,
)
from .read import SAFE_SUFFIXES, read_weights
from .recognise import CONFIG_KEY, PREFIXES, json_object, network_tensors
from .source import local_copy, readable
from .spec import ModelSpec, Part, parse_config, same
from .unpickle import read_pickle

__all__ = ["Word", "read_autoencoder", "read_control", "read_word"]

CONTROL_MARKS = {"ldm": "zero_convs.0.0.weight", "diffusers": "controlnet_down_blocks.0.weight"}
POOLED = ("_shuffle", "_shuffle_fp16")  # ends of names of ControlNets that are averaged over all places, as in ComfyUI
OTHER_CONTROLS = {
    "lora_controlnet": "a Control-LoRA",
    "adapter.": "a T2I-Adapter",
    "body.0.": "a T2I-Adapter",
    "task_embedding": "a ControlNet of several kinds (union)",
    "control_add_embedding.": "a ControlNet of several kinds (union)",
    "controlnet_blocks.": "a ControlNet of a transformer (Flux, SD3)",
}
CLIP_KEYS = ("clip_l", "clip_g")


def read_autoencoder(source: str | Path, spec: ModelSpec, own: Mapping[str, Any]) -> Part:
    """An autoencoder of its authors' or diffusers' names: its file or folder, or one that holds it beside others.

    ``own`` is the configuration of the checkpoint's: one of the same shapes takes from it what shapes do not say.
    Raises CheckpointError.
    """
    with readable(str(source)):
        path = local_copy(str(source), "ema")
        tensors, config, release, files = _network_of(path, "vae")
        inner = with_prefix(tensors, PREFIXES["autoencoder"]) or tensors
        layout = "ldm" if any(name.startswith("encoder.down.") for name in inner) else "diffusers"
        prefixes = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
        state = {modern_attention_name(name): value for name, value in inner.items() if name.startswith(prefixes)}
        if not state:
            raise CheckpointError(f"{path.name} holds no autoencoder ({few(tensors)}); give a VAE's file or folder")
        config = config or _own_where_alike(infer_autoencoder(state, layout, latent_scale=spec.latent_scale), own)
        _check_scale(config, spec, path)
        rename = partial(ldm_autoencoder_name, config=config) if layout == "ldm" else same
        return Part(kind="autoencoder", config=config, tensors=state, rename=rename, release=release, files=files)


def _own_where_alike(found: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    shapes = ("block_out_channels", "layers_per_block", "latent_channels")
    alike = all(_plain(found[name]) == _plain(own.get(name)) for name in shapes)
    return {**own} if alike else found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_scale(config: Mapping[str, Any], spec: ModelSpec, path: Path) -> None:
    said = config.get("scaling_factor")
    if isinstance(said, int | float) and abs(said - spec.latent_scale) > 1e-3 * spec.latent_scale:
        raise CheckpointError(
            f"{path.name} is for latents times {said:g}, and this checkpoint's are times {spec.latent_scale:g}; "
            "give an autoencoder of the checkpoint's own family"
        )


def read_control(source: str | Path) -> Part:
    """A ControlNet of SD1.5, SD2 or SDXL in its authors' names or diffusers', a file or a folder.

    Raises CheckpointError for other kinds of control.
    """
    with readable(str(source)):
        path = local_copy(str(source), "ema")
        tensors, config, release, files = _network_of(path, "controlnet")
        state = with_prefix(tensors, "control_model.") or tensors
        layout = next((name for name, mark in CONTROL_MARKS.items() if mark in state), None)
        for mark, what in OTHER_CONTROLS.items():
            if any(name.startswith(mark) for name in state):
                raise CheckpointError(f"{path.name} is {what}, and ControlNets of SD1.5, SD2 and SDXL are what is read")
        if "difference" in tensors:
            raise CheckpointError(f"{path.name} holds differences to a model; get the whole ControlNet")
        if layout is None:
            raise CheckpointError(
                f"{path.name} holds no ControlNet ({few(tensors)}); give a ControlNet's file or folder"
            )
        config = config or infer_control(state, layout)
        if path.stem.endswith(POOLED):
            config = {**config, "global_pool_conditions": True}
        rename = partial(ldm_control_name, config=config) if layout == "ldm" else same
        return Part(kind="control", config=config, tensors=state, rename=rename, release=release, files=files)


def _network_of(
    path: Path, inner: str
) -> tuple[Mapping[str, Tensor], dict[str, Any], Callable[[Tensor], None], tuple[Path, ...]]:
    """(tensors, configuration or nothing, release, files) of a file, a network's folder, or a pipeline's."""
    if path.is_dir():
        folder = path / inner if (path / inner).is_dir() else path
        loaded = network_tensors(folder, read_weights)
        return loaded.tensors, json_object(folder / "config.json"), loaded.release, loaded.files
    file = read_weights(path)
    _, architecture = parse_config(file.metadata.get(CONFIG_KEY), file.name)
    config = architecture.get("autoencoder") if inner == "vae" else None
    return file.tensors, dict(config or {}), file.release, (path,)


@dataclass(frozen=True, kw_only=True)
class Word:
    """A file of textual inversion: what it is called in a text, and its vectors."""

    path: Path
    names: tuple[str, ...]
    """``embedding:`` and the file's stem, as ComfyUI reads it, and the word that the file itself says, or the stem."""
    vectors: tuple[Tensor, ...]
    """(n, width), for each text encoder."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What a result says of it: its name and content, not its place."""
        return {"name": self.path.name, "sha256": sha256_of(self.path)}


def read_word(path: Path, widths: tuple[int, ...]) -> Word:
    """A file of A1111 (.pt, .safetensors) or diffusers, for text encoders of these widths. Raises CheckpointError."""
    with readable(str(path)):
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist or is no file; give a file of textual inversion")
        said, found = _vectors(path)
        chosen = []
        for place, width in enumerate(widths):
            fitting = [one for one in (found.get(CLIP_KEYS[place]), *found.values()) if one is not None]
            fitting = [one for one in fitting if one.ndim in (1, 2) and one.shape[-1] == width]
            if not fitting:
                got = ", ".join(sorted({str(one.shape[-1]) for one in found.values() if one.ndim})) or "none"
                raise CheckpointError(
                    f"{path.name} has vectors of width {got}, and this checkpoint's text encoders take "
                    f"{' and '.join(map(str, widths))}; give an embedding of the checkpoint's own family"
                )
            chosen.append(fitting[0].float().reshape(-1, width))
        if len({len(one) for one in chosen}) > 1:
            raise CheckpointError(
                f"{path.name} has {len(chosen[0])} vectors for one text encoder and "
                f"{len(chosen[1])} for the other; get the file again"
            )
        if not all(bool(one.isfinite().all()) for one in chosen):
            raise CheckpointError(f"{path.name} has vectors that are not finite; get the file again")
        names = dict.fromkeys((f"embedding:{path.stem}", said or path.stem))
        return Word(path=path, names=tuple(names), vectors=tuple(chosen))


def _vectors(path: Path) -> tuple[str, dict[str, Tensor]]:
    """(the word that the file says, its vectors by their keys)."""
    if path.suffix.lower() in SAFE_SUFFIXES:
        content: Mapping[str, Any] = read_weights(path).tensors
    else:
        content = read_pickle(path)
    if isinstance(inner := content.get("string_to_param"), Mapping):
        said = content.get("name")
        return (said if isinstance(said, str) and said.strip() else ""), _tensors(inner)
    tensors = _tensors(content)
    plain = {"emb_params", *CLIP_KEYS}
    said = next(iter(tensors)) if len(tensors) == 1 and not plain & tensors.keys() else ""
    if not tensors:
        raise CheckpointError(f"{path.name} holds no vectors; give a file of textual inversion")
    return said, tensors


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
