"""What a file or a folder of tensors is: the authors' LDM layout and its descendants, a lone UNet, or diffusers'."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..files import NO_JSON, is_within, short_text
from .keys import (
    UNET_MARKS,
    few,
    from_open_clip,
    infer_autoencoder,
    infer_text,
    infer_unet,
    ldm_autoencoder_name,
    ldm_unet_name,
    modern_attention_name,
    strip_text_prefix,
    unet_layout,
    with_prefix,
)
from .read import WeightFile, read_header, read_weights, real_tensor
from .spec import BASE_NAMES, Bundle, ModelSpec, Part, check_channels, family_of, parse_config, recommended, same

__all__ = [
    "CONFIG_FILE",
    "EMBEDDED_FOLDER",
    "CONFIG_KEY",
    "EDM_KEYS",
    "EMA",
    "PREFIXES",
    "ZERO_SNR_KEY",
    "bundle_of_file",
    "bundle_of_folder",
    "choose_files",
    "ema_name",
    "json_object",
    "network_tensors",
    "predicts_v",
]

CONFIG_FILE = "ip2p_config.json"
EMBEDDED_FOLDER = Path(__file__).parent.parent / "scenes" / "embedded"
PHOTOS_FOLDER = Path(__file__).parent.parent / "photos" / "embedded"
MINIATURE_WIDTH, MINIATURE_CONTEXT = 64, 96
# Where the embedded models' attention begins: the photographs' has none at the finest level.
MINIATURES = {
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": EMBEDDED_FOLDER,
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": EMBEDDED_FOLDER,
    "input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight": PHOTOS_FOLDER,
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": PHOTOS_FOLDER,
}
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
RAW_VARIANT = ".non_ema"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
Reader = Callable[[Path], WeightFile]
log = logging.getLogger(__name__)
CONFIG_KEY = "ip2p_config"
EMA = "model_ema."
PREFIXES = {
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "clip": "cond_stage_model.transformer.",
    "open_clip": "cond_stage_model.model.",
    "sdxl_clip": "conditioner.embedders.0.transformer.",
    "sdxl_open_clip": "conditioner.embedders.1.model.",
}
EDM_KEYS = ("edm_vpred.sigma_min", "edm_vpred.sigma_max")
V_KEY, ZERO_SNR_KEY, V_THRESHOLD = "v_pred", "ztsnr", 0.09
HARMLESS = re.compile(
    r"model_ema\..*|first_stage_model\.(loss|model_ema)\..*|edm_vpred\..*|v_pred|ztsnr|denoiser\..*"
    r"|(cond_stage_model|conditioner\.embedders\.\d+)\.(logit_scale|text_projection(\.weight)?)"
    r"|betas|alphas_cumprod(_prev)?|sqrt_\w+|log_one_minus_\w+|posterior_\w+|lvlb_weights|logvar|scale_factor"
    r"|.*position_ids|.*logit_scale|.*attn_mask|cond_stage_model\.transformer\.text_projection\.weight"
)


def ema_name(ldm_name: str) -> str:
    """LitEma's name of a UNet tensor: it registers buffers, which cannot have dots."""
    return EMA + f"diffusion_model.{ldm_name}".replace(".", "")


def bundle_of_file(
    file: WeightFile, *, weights: str = "ema", text_heads: int | None = None, prediction: str | None = None
) -> Bundle:
    """Take a file apart; shapes alone are read, except where SD2 keeps its prediction type in a tensor's values."""
    spec, architecture = parse_config(file.metadata.get(CONFIG_KEY), file.name)
    unet, layout, lone = _unet_tensors(file)
    home = _miniature_home(unet, layout) if spec is None else None
    if home is not None:
        spec, architecture = _miniature(home, lone)
    texts = _text_parts(file, architecture, text_heads)
    ema = _ema_tensors(file, unet) if layout == "ldm" else {}
    config = architecture.get("unet") or infer_unet(unet, layout, pooled_width=_pooled_width(texts))
    spec = _file_spec(spec, file, config, unet, layout, prediction)
    check_channels(spec.in_channels, file.name, spec.family)
    _check_spec(spec, config, texts, file.name)
    if ema:
        spec = replace(spec, weights=weights)
    chosen = ema if ema and weights == "ema" else unet
    rename = partial(ldm_unet_name, config=config) if layout == "ldm" else same
    if not lone:
        _refuse_unknown(file)
    return Bundle(
        path=file.path,
        layout=f"{layout}-unet" if lone else layout,
        spec=spec,
        unet=_part(file, kind="unet", config=config, tensors=chosen, rename=rename),
        autoencoder=_file_autoencoder(file, architecture, spec),
        text_encoders=texts,
        ema_parameters=sum(value.numel() for value in ema.values()),
        metadata=file.metadata,
        leftovers=file.leftovers,
    )


def predicts_v(tensor: Tensor) -> bool:
    """Whether an SD2 UNet predicts v, by a bias of its last attention: the spread is larger where it does."""
    return bool(tensor.float().std(unbiased=False) > V_THRESHOLD)


def _unet_tensors(file: WeightFile) -> tuple[dict[str, Tensor], str, bool]:
    """(tensors without prefix, layout, whether the file holds nothing else)."""
    unet = with_prefix(file.tensors, PREFIXES["unet"])
    others = any(name.startswith(tuple(PREFIXES.values())[1:]) for name in file.tensors)
    if unet_layout(unet):
        return unet, str(unet_layout(unet)), not others
    layout = unet_layout(file.tensors)
    if layout is None or not any("transformer_blocks" in name for name in file.tensors):
        _refuse_without_unet(file)
    return dict(file.tensors), str(layout), True


def _refuse_without_unet(file: WeightFile) -> None:
    names = list(file.tensors)
    if any("lora_" in name or ".lora" in name for name in names):
        what = "a LoRA, not a checkpoint; load the model it was made for"
    elif any(name.startswith(("encoder.", "decoder.")) for name in names):
        what = "an autoencoder alone; give the checkpoint with the UNet"
    else:
        what = f"no UNet (its tensors are {few(names)}); give a Stable Diffusion checkpoint"
    raise CheckpointError(f"{file.name} holds {what}")


def _ema_tensors(file: WeightFile, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averaged UNet by LDM names; empty if the file has none."""
    if not any(name.startswith(f"{EMA}diffusion_model") for name in file.tensors):
        return {}
    missing = [ema_name(name) for name in raw if ema_name(name) not in file.tensors]
    if missing:
        raise CheckpointError(
            f"{file.name} has averaged weights without {few(missing)}; the file is incomplete, get it again"
        )
    return {name: file.tensors[ema_name(name)] for name in raw}


def _part(file: WeightFile, **values: Any) -> Part:
    return Part(files=(file.path,), release=file.release, **values)


def _file_autoencoder(file: WeightFile, architecture: Mapping[str, Any], spec: ModelSpec) -> Part | None:
    found = with_prefix(file.tensors, PREFIXES["autoencoder"])
    kept = {name: value for name, value in found.items() if not name.startswith(("loss.", "model_ema."))}
    if not kept:
        return None
    config = architecture.get("autoencoder") or infer_autoencoder(kept, "ldm", latent_scale=spec.latent_scale)
    rename = partial(ldm_autoencoder_name, config=config)
    return _part(file, kind="autoencoder", config=config, tensors=kept, rename=rename)


def _text_parts(file: WeightFile, architecture: Mapping[str, Any], heads: int | None) -> tuple[Part, ...]:
    """The text encoders in the order the UNet reads them, under transformers' names."""
    found: list[tuple[str, dict[str, Tensor], str]] = []
    for prefix in ("clip", "sdxl_clip"):
        state = strip_text_prefix(with_prefix(file.tensors, PREFIXES[prefix]))
        state.pop("text_projection.weight", None)
        found.append(("text", state, "quick_gelu"))
    for prefix, kind in (("open_clip", "text"), ("sdxl_open_clip", "projected_text")):
        state = with_prefix(file.tensors, PREFIXES[prefix])
        keep = kind == "projected_text"
        found.append((kind, from_open_clip(state, keep_last=keep) if state else {}, "gelu"))
    found = [entry for entry in found if entry[1]]
    configs = architecture.get("text_encoders") or [None] * len(found)
    if len(configs) != len(found):
        raise CheckpointError(
            f"{file.name} has {len(found)} text encoders and its ip2p_config tells of {len(configs)}; save it again"
        )
    return tuple(
        _part(file, kind=kind, tensors=state, config=config or infer_text(state, hidden_act=act, heads=heads))
        for (kind, state, act), config in zip(found, configs, strict=True)
    )


def _pooled_width(texts: tuple[Part, ...]) -> int | None:
    return next((part.config["projection_dim"] for part in texts if part.kind == "projected_text"), None)


def _file_spec(
    saved: ModelSpec | None,
    file: WeightFile,
    config: Mapping[str, Any],
    unet: Mapping[str, Tensor],
    layout: str,
    prediction: str | None,
) -> ModelSpec:
    """The saved spec, or one inferred from the tensors."""
    if saved is not None:
        return saved if prediction is None else replace(saved, prediction=prediction)
    edm = EDM_KEYS[1] in file.tensors
    family, channels = family_of(config, edm=edm), config["in_channels"]
    predicted = prediction or _prediction(file, config, unet, layout, family)
    spec = ModelSpec(
        family=family,
        in_channels=channels,
        prediction=predicted,
        schedule="edm" if edm else "ddpm",
        zero_snr=ZERO_SNR_KEY in file.tensors and predicted == "v" and not edm,
        **recommended(family, channels),
    )
    if not edm:
        return spec
    said: dict[str, Any] = {
        key.rpartition(".")[2]: _number(real_tensor(file, key)) for key in EDM_KEYS if key in file.tensors
    }
    return replace(spec, **said)


def _check_spec(spec: ModelSpec, config: Mapping[str, Any], texts: tuple[Part, ...], name: str) -> None:
    """Raises CheckpointError where the spec that a file carries is of another network than its tensors."""
    wide = spec.family in ("sdxl", "cosxl")
    wide_unet = family_of(config, edm=False) == "sdxl"
    fits = wide == wide_unet and len(texts) in (0, 2 if wide else 1)
    if not fits or config.get("in_channels") != spec.in_channels:
        raise CheckpointError(
            f"{name} says {BASE_NAMES[spec.family]} with {spec.in_channels} input channels, and its UNet is of "
            f"{str(config.get('in_channels'))[:20]} with {len(texts)} text encoders; the parts are of different models"
        )


def _miniature_home(unet: Mapping[str, Tensor], layout: str) -> Path | None:
    """The folder of the embedded UNet with these shapes: ComfyUI saves it without the settings shapes do not tell."""
    first, context = UNET_MARKS[layout], next((name for name in MINIATURES if name in unet), None)
    if context is None or first not in unet:
        return None
    (width, channels), home = unet[first].shape[:2], MINIATURES[context]
    unet_home = home / ("unet" if channels == 8 else "unet_text_to_image")
    known = width == MINIATURE_WIDTH and unet[context].shape[1] == MINIATURE_CONTEXT and unet_home.is_dir()
    return unet_home if known else None


def _miniature(home: Path, lone: bool) -> tuple[ModelSpec, dict[str, Any]]:
    """(spec, architecture) of the embedded model whose UNet lies in ``home``."""
    config, folder = json_object(home / "config.json"), home.parent
    spec = _folder_spec(folder, config, "only", None)
    others = {} if lone else {"autoencoder": json_object(folder / "vae" / "config.json")}
    texts = [] if lone else [json_object(folder / "text_encoder" / "config.json")]
    return spec, {"unet": config, "text_encoders": texts, **others}


def _number(tensor: Tensor) -> float:
    """The decimal that was meant: float32 holds about seven digits."""
    return float(f"{float(tensor):.7g}")


def _prediction(
    file: WeightFile, config: Mapping[str, Any], unet: Mapping[str, Tensor], layout: str, family: str
) -> str:
    """eps or v: said by the metadata or a marker, for SD2 by a tensor's values, else eps."""
    said = file.metadata.get("modelspec.prediction_type", "")
    if said or family == "cosxl" or V_KEY in file.tensors:
        return "v" if said.startswith("v") or family == "cosxl" or (not said and V_KEY in file.tensors) else "eps"
    if family != "sd2":
        return "eps"
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    name = f"up_blocks.{levels - 1}.attentions.{layers}.transformer_blocks.0.norm1.bias"
    name = ldm_unet_name(name, config) if layout == "ldm" else name
    if name not in unet:
        return "v"
    prefixed = PREFIXES["unet"] + name
    return "v" if predicts_v(real_tensor(file, prefixed if prefixed in file.tensors else name)) else "eps"


def _refuse_unknown(file: WeightFile) -> None:
    """Every tensor is used, or is known to be of no use."""
    known = tuple(PREFIXES.values())
    strange = [name for name in file.tensors if not name.startswith(known) and not HARMLESS.fullmatch(name)]
    if strange:
        raise CheckpointError(
            f"{file.name} has tensors that no Stable Diffusion checkpoint has ({few(strange)}); "
            "it is of another architecture or was merged wrongly, get the original"
        )


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
    loaded = network_tensors(home, read, raw=choice == "raw")
    texts = () if lone else tuple(_text_part(folder / name, read, text_heads) for name in _text_folders(folder))
    pooled = next((part.config["projection_dim"] for part in texts if part.kind == "projected_text"), None)
    config = json_object(home / "config.json") or infer_unet(loaded.tensors, "diffusers", pooled_width=pooled)
    spec = _folder_spec(folder, config, choice, prediction)
    check_channels(spec.in_channels, folder.name, spec.family)
    _check_spec(spec, config, texts, folder.name)
    unet = Part(kind="unet", config=config, **loaded._asdict())
    return Bundle(
        path=folder,
        layout="diffusers-unet" if lone else "diffusers",
        spec=spec,
        unet=unet,
        autoencoder=None if lone else _folder_autoencoder(folder / "vae", read, spec),
        text_encoders=texts,
        ema_parameters=0 if choice == "only" else unet.parameters,
    )


def choose_files(names: Iterable[str], *, weights: str = "ema") -> list[str]:
    """The files of a pipeline repository that loading it needs, one set of weights a network."""
    paths = [Path(name) for name in names if is_within(name)]
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


def network_tensors(folder: Path, read: Reader, *, raw: bool = False) -> _Loaded:
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
    loaded = network_tensors(folder, read)
    state = strip_text_prefix(loaded.tensors)
    projected = "text_projection.weight" in state and folder.name.endswith("_2")
    if not projected:
        state.pop("text_projection.weight", None)
    config = json_object(folder / "config.json") or infer_text(state, heads=heads)
    kind = "projected_text" if projected else "text"
    return Part(kind=kind, config=config, **loaded._replace(tensors=state)._asdict())


def _folder_autoencoder(folder: Path, read: Reader, spec: ModelSpec) -> Part | None:
    if not folder.is_dir():
        return None
    loaded = network_tensors(folder, read)
    state = {modern_attention_name(name): value for name, value in loaded.tensors.items()}
    config = json_object(folder / "config.json") or infer_autoencoder(
        state, "diffusers", latent_scale=spec.latent_scale
    )
    return Part(kind="autoencoder", config=config, **loaded._replace(tensors=state)._asdict())


def _folder_spec(folder: Path, unet: Mapping[str, Any], choice: str, prediction: str | None) -> ModelSpec:
    """The saved spec, or one from diffusers' own settings."""
    path = folder / CONFIG_FILE
    saved, _ = parse_config(short_text(path, CheckpointError) if path.is_file() else None, str(folder))
    if saved is not None:
        spec = replace(saved, in_channels=unet["in_channels"], prediction=prediction or saved.prediction)
        return spec if choice == "only" else replace(spec, weights=choice)
    scheduler = json_object(folder / "scheduler" / "scheduler_config.json")
    index = json_object(folder / "model_index.json")
    edm = "EDM" in scheduler.get("_class_name", "") or bool(index.get("is_cosxl_edit"))
    family = family_of(unet, edm=edm)
    values = {**recommended(family, unet["in_channels"]), **_schedule(folder, scheduler, edm=edm)}
    scale = json_object(folder / "vae" / "config.json").get("scaling_factor")
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
    zero_snr = scheduler.get("rescale_betas_zero_snr", False)
    return {"prediction": PREDICTIONS[said], "beta_start": start, "beta_end": end, "zero_snr": zero_snr}


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(short_text(path, CheckpointError)))
    except (*NO_JSON, TypeError) as error:
        raise CheckpointError(f"{path} is not a JSON object ({error}); get the folder again") from error
