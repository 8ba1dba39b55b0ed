"""Checkpoints in diffusers' layout: a pipeline folder, or the folder of a lone UNet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..files import NO_JSON
from .autoencoder import infer_autoencoder, modern_attention_name
from .parts import Bundle, Part, check_channels, family_of
from .read import WeightFile, read_header, read_weights
from .spec import ModelSpec, parse_config, recommended
from .text import infer_text, strip_text_prefix
from .unet import infer_unet

__all__ = ["CONFIG_FILE", "bundle_of_folder", "choose_files"]

CONFIG_FILE = "ip2p_config.json"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
INDEX = ".safetensors.index.json"
RAW_VARIANT = ".non_ema"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
Reader = Callable[[Path], WeightFile]


def bundle_of_folder(
    folder: Path,
    *,
    weights: str = "ema",
    unet_folder: str = "unet",
    text_heads: int | None = None,
    prediction: str | None = None,
    header_only: bool = False,
) -> Bundle:
    """Take a folder apart; ``unet_folder`` names the UNet's."""
    read = read_header if header_only else read_weights
    lone = not (folder / unet_folder).is_dir()
    home, choice = (folder, "only") if lone else _unet_home(folder, unet_folder, weights)
    if lone and not (_has_weights(home) and (home / "config.json").is_file()):
        raise CheckpointError(
            f"{folder} is a folder without {unet_folder}/ and without a UNet's config.json; "
            "give a diffusers pipeline folder, or a file in it"
        )
    loaded = _load(home, read, raw=choice == "raw")
    texts = () if lone else tuple(_text_part(folder / name, read, text_heads) for name in _text_folders(folder))
    pooled = next((part.config["projection_dim"] for part in texts if part.kind == "projected_text"), None)
    config = _read_json(home / "config.json") or infer_unet(loaded.tensors, "diffusers", pooled_width=pooled)
    spec = _spec(folder, config, choice, prediction)
    check_channels(spec.in_channels, folder.name, spec.family)
    unet = Part(kind="unet", config=config, **loaded._asdict())
    return Bundle(
        path=folder,
        layout="diffusers-unet" if lone else "diffusers",
        spec=spec,
        unet=unet,
        autoencoder=None if lone else _autoencoder_part(folder / "vae", read, spec),
        text_encoders=texts,
        ema_parameters=0 if choice == "only" else unet.parameters,
    )


def choose_files(names: Iterable[str], *, weights: str = "ema") -> list[str]:
    """The files of a pipeline repository that loading it needs, one set of weights a network."""
    paths = [Path(name) for name in names]
    chosen = [path for path in paths if path.suffix == ".json" and len(path.parts) <= 2]
    for folder in sorted({path.parent for path in paths if len(path.parts) == 2 or path.name.startswith(STEMS)}):
        own = [path for path in paths if path.parent == folder]
        if str(folder) in ("safety_checker", "feature_extractor", "tokenizer", "tokenizer_2"):
            continue
        chosen += _preferred(own, raw=weights == "raw" and str(folder) == "unet")
    return sorted({path.as_posix() for path in chosen})


def _preferred(paths: Iterable[Path], *, raw: bool) -> list[Path]:
    """One complete set of weights: safetensors before pickles, the plain variant first, one file before many."""
    own = sorted(path for path in paths if path.name.startswith(STEMS))
    if raw and any(RAW_VARIANT in path.name for path in own):
        own = [path for path in own if RAW_VARIANT in path.name]
    plain = [path for path in own if path.name.split(".")[0] in STEMS]
    for suffix in (".safetensors", ".bin"):
        single = [path for path in plain if path.suffix == suffix]
        if single:
            return [min(single, key=lambda path: (path.name.count("."), path.name))]
        if suffix == ".safetensors":
            shards = [path for path in own if "-of-" in path.name and path.suffix == suffix]
            variant = min((_variant(path) for path in shards), default="")
            if shards:
                return [path for path in shards if _variant(path) == variant]
    return []


def _variant(path: Path) -> str:
    """The part of a shard's name that is neither stem nor number, e.g. fp16."""
    return ".".join(part for part in path.name.split(".")[1:-1] if "-of-" not in part)


def _unet_home(folder: Path, unet_folder: str, weights: str) -> tuple[Path, str]:
    """(folder, which weights): training runs keep unet and unet_ema, some repositories a non_ema variant."""
    home, averaged = folder / unet_folder, folder / f"{unet_folder}_ema"
    if averaged.is_dir():
        return (averaged, "ema") if weights == "ema" else (home, "raw")
    has_choice = any(RAW_VARIANT in path.name for path in home.iterdir())
    return home, weights if has_choice else "only"


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and bool(_preferred(folder.iterdir(), raw=False))


def _text_folders(folder: Path) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if (folder / name).is_dir()]


class _Loaded(NamedTuple):
    """A network's tensors, its files, and how to give mapped ones back."""

    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    release: Callable[[Tensor], None]


def _load(folder: Path, read: Reader, *, raw: bool = False) -> _Loaded:
    """A network's tensors, of one file or of shards."""
    paths = _preferred(folder.iterdir(), raw=raw) if folder.is_dir() else []
    if not paths:
        raise CheckpointError(
            f"{folder} has no weights ({STEMS[0]}.safetensors or .bin); the folder is incomplete, get it again"
        )
    _check_shards(folder, paths)
    pieces = [read(path) for path in paths]

    def release(tensor: Tensor) -> None:
        for piece in pieces:
            piece.release(tensor)

    tensors = {name: tensor for piece in pieces for name, tensor in piece.tensors.items()}
    return _Loaded(tensors, tuple(paths), release)


def _check_shards(folder: Path, files: list[Path]) -> None:
    promised = max((int(file.name.partition("-of-")[2][:5]) for file in files if "-of-" in file.name), default=1)
    if promised != len(files):
        raise CheckpointError(f"{folder} has {len(files)} of {promised} pieces of its weights; get the others")


def _text_part(folder: Path, read: Reader, heads: int | None) -> Part:
    loaded = _load(folder, read)
    state = strip_text_prefix(loaded.tensors)
    projected = "text_projection.weight" in state and folder.name.endswith("_2")
    if not projected:
        state.pop("text_projection.weight", None)
    config = _read_json(folder / "config.json") or infer_text(state, heads=heads)
    kind = "projected_text" if projected else "text"
    return Part(kind=kind, config=config, **loaded._replace(tensors=state)._asdict())


def _autoencoder_part(folder: Path, read: Reader, spec: ModelSpec) -> Part | None:
    if not folder.is_dir():
        return None
    loaded = _load(folder, read)
    state = {modern_attention_name(name): value for name, value in loaded.tensors.items()}
    config = _read_json(folder / "config.json") or infer_autoencoder(state, "diffusers", latent_scale=spec.latent_scale)
    return Part(kind="autoencoder", config=config, **loaded._replace(tensors=state)._asdict())


def _spec(folder: Path, unet: Mapping[str, Any], choice: str, prediction: str | None) -> ModelSpec:
    """The saved spec, or one from diffusers' own settings."""
    path = folder / CONFIG_FILE
    saved, _ = parse_config(path.read_text(encoding="utf-8") if path.is_file() else None, str(folder))
    if saved is not None:
        spec = replace(saved, in_channels=unet["in_channels"], prediction=prediction or saved.prediction)
        return spec if choice == "only" else replace(spec, weights=choice)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    index = _read_json(folder / "model_index.json")
    edm = "EDM" in scheduler.get("_class_name", "") or bool(index.get("is_cosxl_edit"))
    family = family_of(unet, edm=edm)
    values = {**recommended(family, unet["in_channels"]), **_schedule(folder, scheduler, edm=edm)}
    scale = _read_json(folder / "vae" / "config.json").get("scaling_factor")
    if scale:
        values["latent_scale"] = scale
    if prediction:
        values["prediction"] = prediction
    try:
        return ModelSpec(family=family, in_channels=unet["in_channels"], weights=choice, **values)
    except ConfigError as error:
        raise CheckpointError(f"{folder} has settings that cannot be used ({error}); get the folder again") from error


def _schedule(folder: Path, scheduler: Mapping[str, Any], *, edm: bool) -> dict[str, Any]:
    """What a scheduler_config.json says about the noise, in the spec's words."""
    said = scheduler.get("prediction_type", "v_prediction" if edm else "epsilon")
    if said not in PREDICTIONS:
        raise CheckpointError(f"{folder} predicts {said!r}, not epsilon or v_prediction; use a checkpoint that does")
    if edm:
        low, high = scheduler.get("sigma_min", 0.002), scheduler.get("sigma_max", 120.0)
        return {"prediction": "v", "schedule": "edm", "sigma_min": low, "sigma_max": high}
    betas, steps = scheduler.get("beta_schedule", "scaled_linear"), scheduler.get("num_train_timesteps", 1000)
    if betas != "scaled_linear" or steps != 1000:
        raise CheckpointError(
            f"{folder} was trained on {steps} steps of {betas} betas, not on 1000 of scaled_linear ones; "
            "use a checkpoint of Stable Diffusion's schedule"
        )
    start, end = scheduler.get("beta_start", 0.00085), scheduler.get("beta_end", 0.012)
    return {"prediction": PREDICTIONS[said], "beta_start": start, "beta_end": end}


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (*NO_JSON, TypeError) as error:
        raise CheckpointError(f"{path} is not a JSON object ({error}); get the folder again") from error
