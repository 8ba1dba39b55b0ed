"""Adapters (Hu et al. 2021) on the networks that are trained: where they sit, and the files they begin and end as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.keys import few
from ..checkpoint.lora import kohya_state, placed_layers
from ..errors import CheckpointError, ConfigError
from ..networks.model import Model
from .config import TrainConfig
from .randomness import stream

__all__ = ["LORA_LAYERS", "TEXT_LAYERS", "add_adapters", "begin_from", "lora_state"]

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
OUTER = ("conv_in", "conv_out")


def add_adapters(network: Any, config: TrainConfig, *, text: int = 0) -> None:
    """Adapters on a UNet's attention, on request on its convolutions; ``text`` n: on the n-th text encoder's attention.

    The network's own weights are frozen. Raises ConfigError if peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("LoRA needs peft, which is missing; pip install peft") from error
    settings: Any = {"lora_alpha": config.lora_alpha or config.lora_rank}
    settings["target_modules"] = list(TEXT_LAYERS if text else LORA_LAYERS)
    if config.lora_conv_rank and not text:
        layers = [name for name, part in network.named_modules() if isinstance(part, nn.Conv2d) and name not in OUTER]
        settings["target_modules"] += layers
        settings["rank_pattern"] = dict.fromkeys(layers, config.lora_conv_rank)
        settings["alpha_pattern"] = dict.fromkeys(layers, config.lora_conv_alpha or config.lora_conv_rank)
    adapters = LoraConfig(r=config.lora_rank, init_lora_weights="gaussian", **settings)
    place = ("lora", text) if text else ("lora",)
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.default_generator.manual_seed(stream(config.seed, *place).initial_seed())
        if text:
            inject_adapter_in_model(adapters, network)
        else:
            network.add_adapter(adapters)


def lora_state(model: Model) -> dict[str, Tensor]:
    """The adapters as one file that ComfyUI, diffusers and ``ip2p edit --lora`` take alike (kohya's names)."""
    state = kohya_state(_factors(model.unet), "lora_unet")
    numbered = len(model.text_encoders) > 1
    for number, encoder in enumerate(model.text_encoders, start=1):
        factors = {f"text_model.{name.removeprefix('text_model.')}": parts for name, parts in _factors(encoder).items()}
        state |= kohya_state(factors, f"lora_te{number}" if numbered else "lora_te")
    return state


def begin_from(model: Model, path: Path) -> None:
    """Put a LoRA's numbers into the adapters of a model, whatever trainer wrote it; layers that it lacks begin anew.

    Raises CheckpointError for a file that adapts what this model does not train, or with another rank.
    """
    networks, strange = (model.unet, *model.text_encoders), []
    for layer, home, parts in placed_layers(path, model):
        adapted = _adapter(networks[home[0]], home[1].removesuffix(".weight")) if home else None
        if adapted is None or not {"down", "up"} <= parts.keys() or "mid" in parts:
            strange.append(layer)
            continue
        down, up = (getattr(adapted, part)["default"].weight for part in ("lora_A", "lora_B"))
        rank = parts["down"].shape[0]
        if parts["down"].numel() != down.numel() or parts["up"].numel() != up.numel():
            raise CheckpointError(
                f"{path.name} has rank {rank} at {layer}, and this run's adapters have rank {down.shape[0]}; give its "
                "own rank (`lora_rank`, `lora_conv_rank`), and a LoRA of the model's family"
            )
        scale = float(parts["alpha"]) / rank if "alpha" in parts else 1.0
        with torch.no_grad():
            down.copy_(parts["down"].float().view_as(down))
            up.copy_(parts["up"].float().view_as(up) * (scale / adapted.scaling["default"]))
    if strange:
        raise CheckpointError(
            f"{path.name} adapts {len(strange)} layers that this run does not train ({few(strange)}), which would be "
            "lost; for text encoders add `train_text_encoder`, for convolutions `lora_conv_rank`"
        )


def _adapter(network: nn.Module, layer: str) -> Any:
    """The adapted layer of that name; None where it is not adapted."""
    for name in (layer, f"text_model.{layer}", layer.removeprefix("text_model.")):
        try:
            found = network.get_submodule(name)
        except AttributeError:
            continue
        return found if hasattr(found, "lora_A") else None
    return None


def _factors(network: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{layer: (down, up, alpha)} of every adapted layer."""
    adapted: dict[str, Any] = {name: part for name, part in network.named_modules() if hasattr(part, "lora_A")}
    weights = {
        name: [getattr(part, half)["default"].weight.detach().cpu() for half in ("lora_A", "lora_B")]
        for name, part in adapted.items()
    }
    return {name: (down, up, float(adapted[name].lora_alpha["default"])) for name, (down, up) in weights.items()}
