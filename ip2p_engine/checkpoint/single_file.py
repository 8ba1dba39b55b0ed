"""Checkpoints in one file: the authors' LDM layout, its descendants, and lone UNets."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from .autoencoder import infer_autoencoder, ldm_autoencoder_name
from .names import few, with_prefix
from .parts import Bundle, Part, check_channels, family_of, same
from .read import WeightFile, real_tensor
from .spec import ModelSpec, parse_config, recommended
from .text import from_open_clip, infer_text, strip_text_prefix
from .unet import infer_unet, ldm_unet_name, unet_layout

__all__ = ["CONFIG_KEY", "EDM_KEYS", "EMA", "PREFIXES", "bundle_of_file", "ema_name", "v_by_habit"]

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
V_KEY, V_THRESHOLD = "v_pred", 0.09
HARMLESS = re.compile(
    r"model_ema\..*|first_stage_model\.(loss|model_ema)\..*|edm_vpred\..*|v_pred|denoiser\..*"
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
    texts = _text_parts(file, architecture, text_heads)
    ema = _ema_tensors(file, unet) if layout == "ldm" else {}
    config = architecture.get("unet") or infer_unet(unet, layout, pooled_width=_pooled_width(texts))
    spec = _spec(spec, file, config, unet, layout, prediction)
    check_channels(spec.in_channels, file.name, spec.family)
    if ema:
        spec = replace(spec, weights=weights)
    chosen = ema if ema and weights == "ema" else unet
    rename = partial(ldm_unet_name, config=config) if layout == "ldm" else same
    if not lone:
        _refuse_strangers(file)
    return Bundle(
        path=file.path,
        layout=f"{layout}-unet" if lone else layout,
        spec=spec,
        unet=_part(file, kind="unet", config=config, tensors=chosen, rename=rename),
        autoencoder=_autoencoder_part(file, architecture, spec),
        text_encoders=texts,
        ema_parameters=sum(value.numel() for value in ema.values()),
        metadata=file.metadata,
        leftovers=file.leftovers,
    )


def v_by_habit(tensor: Tensor) -> bool:
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


def _autoencoder_part(file: WeightFile, architecture: Mapping[str, Any], spec: ModelSpec) -> Part | None:
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


def _spec(
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
    spec = ModelSpec(
        family=family,
        in_channels=channels,
        prediction=prediction or _prediction(file, config, unet, layout, family),
        schedule="edm" if edm else "ddpm",
        **recommended(family, channels),
    )
    if not edm:
        return spec
    said: dict[str, Any] = {
        key.rpartition(".")[2]: _number(real_tensor(file, key)) for key in EDM_KEYS if key in file.tensors
    }
    return replace(spec, **said)


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
    return "v" if v_by_habit(real_tensor(file, prefixed if prefixed in file.tensors else name)) else "eps"


def _refuse_strangers(file: WeightFile) -> None:
    """Every tensor is used, or is known to be of no use."""
    known = tuple(PREFIXES.values())
    strange = [name for name in file.tensors if not name.startswith(known) and not HARMLESS.fullmatch(name)]
    if strange:
        raise CheckpointError(
            f"{file.name} has tensors that no Stable Diffusion checkpoint has ({few(strange)}); "
            "it is of another architecture or was merged wrongly, get the original"
        )
