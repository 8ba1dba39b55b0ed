"""LoRA files of every trainer, merged into a model's weights: W + weight alpha / rank up down (Hu et al. 2021)."""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..files import NO_JSON, sha256_of
from .build import all_finite
from .keys import few, ldm_unet_name
from .merge import with_weights
from .read import read_weights
from .source import readable
from .spec import Networks

__all__ = ["Lora", "kohya_state", "parse_lora", "placed_layers", "read_lora", "with_loras"]

log = logging.getLogger(__name__)
Loaded = TypeVar("Loaded", bound=Networks)
# What the last part of a name means, as kohya, diffusers (two forms) and peft write it.
ENDINGS = {
    "down": (".lora_down.weight", ".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight"),
    "up": (".lora_up.weight", ".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight"),
    "mid": (".lora_mid.weight",),
    "alpha": (".alpha",),
    "diff": (".diff",),
    "bias": (".diff_b",),
}
ENDINGS["down"] += (".lora_A.weight", ".lora_A.default.weight")
ENDINGS["up"] += (".lora_B.weight", ".lora_B.default.weight")
OTHER_KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "oft_": "OFT", "glora": "GLoRA"}
WIDENED = ("conv_in", "input_blocks_0_0")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A file and how strongly to apply it; 1 is as it was trained."""

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.weight, int | float) or isinstance(self.weight, bool) or not -100 <= self.weight <= 100:
            raise ConfigError(f"the weight of {self.path.name} is {self.weight!r}; give a number, mostly from 0 to 1")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What a result says of it: its name and content, not its place."""
        return {"name": self.path.name, "weight": self.weight, "sha256": sha256_of(self.path)}


def parse_lora(text: str) -> Lora:
    """FILE or FILE:WEIGHT; a file of that whole name wins. Raises ConfigError or CheckpointError."""
    path, weight = Path(text).expanduser(), 1.0
    if not path.exists():
        name, colon, number = text.rpartition(":")
        with suppress(ValueError):  # a colon of the name, as in C:\loras
            path, weight = (Path(name).expanduser(), float(number)) if colon else (path, weight)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is no file; give a LoRA file, or FILE:WEIGHT")
    return Lora(path=path, weight=weight)


def with_loras(model: Loaded, loras: Sequence[Lora]) -> Loaded:
    """A new model with LoRAs added to its weights in float32; the given one stays as it is, and shares what is equal.

    UNet and text encoders, linear layers and convolutions. Raises CheckpointError for a file of which nothing fits.
    """
    homes = _homes(model)
    changed: dict[int, dict[str, Tensor]] = defaultdict(dict)
    networks = (model.unet, *model.text_encoders)
    states = [network.state_dict() for network in networks]
    for lora in loras:
        with readable(str(lora.path)):
            for (place, name), delta in _deltas(lora, homes, states):
                now = changed[place].get(name, states[place][name])
                value = now.float() + lora.weight * delta.to(now.device)
                if not all_finite(value.to(now.dtype)):
                    raise CheckpointError(
                        f"{lora.path.name} makes {name} not finite; give a smaller weight or another file"
                    )
                changed[place][name] = value if name in changed[place] else value.clone()
    merged = [_changed(network, states[n], changed[n]) for n, network in enumerate(networks)]
    result: Any = replace(model, unet=merged[0], text_encoders=tuple(merged[1:]))  # type: ignore[type-var]
    return result


def kohya_state(deltas: Mapping[str, tuple[Tensor, Tensor, float]], prefix: str) -> dict[str, Tensor]:
    """{layer: (down, up, alpha)} under the names that kohya's trainer, ComfyUI, diffusers and ``read_lora`` share.

    ``prefix`` names the network: lora_unet; lora_te, or of two lora_te1 and lora_te2.
    """
    state = {}
    for layer, (down, up, alpha) in deltas.items():
        name = f"{prefix}_{layer.replace('.', '_')}"
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = down, up
        state[f"{name}.alpha"] = torch.tensor(float(alpha))
    return state


def placed_layers(path: Path, model: Networks) -> Iterator[tuple[str, tuple[int, str] | None, dict[str, Tensor]]]:
    """(layer as the file names it, (place of its network, its weight's name) or None, its parts) of each layer."""
    homes = _homes(model)
    for layer, parts in read_lora(path).items():
        yield layer, homes.get(_plain(layer)), parts


def read_lora(path: Path) -> dict[str, dict[str, Tensor]]:
    """{layer as the file names it: {down, up, mid, alpha, diff, bias}}; raises CheckpointError for another kind."""
    file = read_weights(path)
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in file.tensors.items():
        if other := next((kind for mark, kind in OTHER_KINDS.items() if mark in name), None):
            raise CheckpointError(f"{path.name} is a {other}, and LoRA is what can be merged; convert it first")
        part, ending = next(
            ((part, ending) for part, endings in ENDINGS.items() for ending in endings if name.endswith(ending)),
            (None, ""),
        )
        if part is not None:
            layers[name.removesuffix(ending)][part] = value
    if not any({"down", "up"} <= parts.keys() or "diff" in parts for parts in layers.values()):
        raise CheckpointError(f"{path.name} holds no LoRA (pairs of down and up); give a LoRA file")
    for name, scale in _peft_alphas(file.metadata, layers).items():
        layers[name].setdefault("alpha", torch.tensor(scale))
    return dict(layers)


def _peft_alphas(metadata: Mapping[str, str], layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Alphas of peft's settings, which diffusers writes into the header in place of tensors."""
    try:
        said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except NO_JSON:
        said = {}
    found = {}
    for name in layers:
        prefix = name.partition(".")[0]
        alpha = said.get(f"{prefix}.lora_alpha") if isinstance(said, dict) else None
        if isinstance(alpha, int | float):
            patterns = said.get(f"{prefix}.alpha_pattern") or {}
            own = [value for key, value in patterns.items() if name.endswith(key)]
            found[name] = float(own[0] if own else alpha)
    return found


def _homes(model: Networks) -> dict[str, tuple[int, str]]:
    """{a layer's name in some file: (place of its network, its weight's name)}."""
    homes: dict[str, tuple[int, str]] = {}
    for weight in _weights(model.unet):
        layer = weight.removesuffix(".weight")
        ldm = ldm_unet_name(weight, model.unet.config).removesuffix(".weight")
        names = [f"lora_unet_{form.replace('.', '_')}" for form in (layer, ldm)]
        names += [layer, f"unet.{layer}", f"base_model.model.{layer}", f"unet.base_model.model.{layer}"]
        names += [f"diffusion_model.{ldm}"]
        homes |= dict.fromkeys(names, (0, weight))
    for place, encoder in enumerate(model.text_encoders, start=1):
        for weight in _weights(encoder):
            layer = "text_model." + weight.removesuffix(".weight").removeprefix("text_model.")
            flat, number = layer.replace(".", "_"), "" if place == 1 else f"_{place}"
            names = [f"lora_te{place}_{flat}", f"text_encoder{number}.{layer}"]
            names += [f"text_encoder{number}.{layer.removeprefix('text_model.')}"]
            names += [f"text_encoder{number}.base_model.model.{layer}"]
            names += [f"lora_te_{flat}"] if place == 1 else []
            homes |= dict.fromkeys(names, (place, weight))
    return homes


def _weights(network: nn.Module) -> list[str]:
    """Of layers that peft has wrapped, their own."""
    names = [name for name, value in network.state_dict().items() if name.endswith(".weight") and value.ndim >= 2]
    return [name.replace(".base_layer.", ".") for name in names if ".lora_" not in name]


def _deltas(
    lora: Lora, homes: Mapping[str, tuple[int, str]], states: Sequence[Mapping[str, Tensor]]
) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """((network, tensor), what is added at weight 1) for each layer that the model has."""
    strange, fitting = [], 0
    for layer, parts in read_lora(lora.path).items():
        home = homes.get(_plain(layer))
        if home is None:
            strange.append(layer)
            continue
        fitting += 1
        place, name = home
        _check_room(parts, states[place][name], layer, lora.path)
        yield home, _fit(_delta(parts, layer, lora.path), states[place][name], layer, lora.path)
        bias = name.removesuffix("weight") + "bias"
        if "bias" in parts and bias in states[place]:
            yield (place, bias), _fit(parts["bias"].float(), states[place][bias], layer, lora.path)
    if not fitting:
        raise CheckpointError(
            f"{lora.path.name} has no layer that this model has ({few(strange)}); give a LoRA of the model's own family"
        )
    if strange:
        log.warning(
            "%s: %d of %d layers are not in this model and left out: %s",
            *(lora.path.name, len(strange), len(strange) + fitting, few(strange)),
        )


def _plain(layer: str) -> str:
    """Diffusers' names of 2023 go by the processor, and leave out the number of the only layer of to_out."""
    layer = layer.replace(".processor.", ".")
    return re.sub(r"(attn\d\.to_out)$", r"\1.0", layer)


def _check_room(parts: Mapping[str, Tensor], weight: Tensor, layer: str, path: Path) -> None:
    """Two long thin factors multiply to a matrix of any size, so the size is known before they do."""
    if {"down", "up"} <= parts.keys() and "mid" not in parts:
        size = parts["up"].shape[0] * parts["down"][0].numel()
        if size > weight.numel():
            raise CheckpointError(
                f"{path.name}: {layer} multiplies to {size:,} numbers and this model's weight has {weight.numel():,}; "
                "give a LoRA of the model's own family"
            )


def _delta(parts: Mapping[str, Tensor], layer: str, path: Path) -> Tensor:
    """alpha / rank up down, float32, in the shape that the factors give."""
    if "diff" in parts:
        return parts["diff"].float()
    if not {"down", "up"} <= parts.keys():
        raise CheckpointError(f"{path.name}: {layer} lacks its up or its down; the file is incomplete, get it again")
    down, up = parts["down"].float(), parts["up"].float()
    rank = down.shape[0]
    scale = float(parts["alpha"]) / rank if "alpha" in parts and rank else 1.0
    try:
        if "mid" in parts:
            middle = parts["mid"].float()
            return scale * torch.einsum("or,rskl,si->oikl", up.flatten(1), middle, down.flatten(1))
        product = up.flatten(1) @ down.flatten(1)
        return scale * product.reshape(up.shape[0], *down.shape[1:])
    except RuntimeError as error:
        raise CheckpointError(
            f"{path.name}: {layer} has factors of {tuple(up.shape)} and {tuple(down.shape)}, which do not multiply; "
            "get the file again"
        ) from error


def _fit(delta: Tensor, weight: Tensor, layer: str, path: Path) -> Tensor:
    """In the weight's shape: 1x1 convolutions are linear layers, and a first convolution may have more channels."""
    if delta.numel() == weight.numel() and delta.shape[:1] == weight.shape[:1]:
        return delta.reshape(weight.shape)
    widened = layer.endswith(WIDENED)
    if widened and delta.ndim == 4 and delta.shape[0] == weight.shape[0] and delta.shape[1] < weight.shape[1]:
        return nn.functional.pad(delta, (0, 0, 0, 0, 0, weight.shape[1] - delta.shape[1]))
    raise CheckpointError(
        f"{path.name}: {layer} is for weights of {tuple(delta.shape)} and this model's are {tuple(weight.shape)}; "
        "give a LoRA of the model's own family"
    )


def _changed(network: Any, state: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> Any:
    """The network, or where weights changed a new one that shares the others."""
    if not changed:
        return network
    return with_weights(network, {**state, **{name: value.to(state[name].dtype) for name, value in changed.items()}})
