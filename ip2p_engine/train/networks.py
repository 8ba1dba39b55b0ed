"""The network that is trained: from text to image widened to 8 channels, or an InstructPix2Pix; whole, or adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..checkpoint.lora import kohya_state
from ..checkpoint.spec import EDIT, MASKED_EDIT, autoencoder_dtype, recommended
from ..checkpoint.training_run import with_channels
from ..errors import ConfigError
from ..networks.model import Model, ModelSpec
from .checkpoints import is_sharded, whole
from .config import TrainConfig
from .randomness import stream

__all__ = [
    "LORA_LAYERS",
    "arithmetic",
    "finished",
    "lora_state",
    "make_trainable",
    "move_frozen",
    "needs_masks",
    "trained_parameters",
    "usable",
    "widened",
]

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def widened(model: Model, channels: int = EDIT) -> Model:
    """A model with further input channels whose weights are zero (paper, section 3.2; 12 of them: UltraEdit's mask).

    The first convolution's bias is kept, so the network's output is what it was, whatever the picture or the mask.
    """
    spec = model.spec
    hints = recommended(spec.family, channels) if spec.image_cfg == 1 else {}
    kept = {name: hints[name] for name in ("image_cfg", "resolution") if name in hints}
    scaled = spec.family == "cosxl"
    config = {**dict(model.unet.config), "in_channels": channels}
    state = model.unet.state_dict()
    state["conv_in.weight"] = with_channels(state["conv_in.weight"], channels)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(state, strict=True, assign=True)
    spec = replace(spec, in_channels=channels, scaled_condition=scaled, **kept)
    return replace(model, spec=spec, unet=unet)


def make_trainable(model: Model, config: TrainConfig) -> Model:
    """The model to train: 8 channels, or 12 with masks, float32 weights that take gradients, the other networks frozen.

    With LoRA the weights are frozen in the run's precision and float32 adapters train, with the first convolution
    where it is new. Raises ConfigError if peft is missing.
    """
    channels = max(model.spec.in_channels, MASKED_EDIT if config.mask_channels else EDIT)
    new = channels > model.spec.in_channels
    model = widened(model, channels) if new else model
    spec = replace(model.spec, weights="only", **_predicted(model.spec, config))
    unet = model.unet.float().requires_grad_(not config.lora_rank)
    if config.lora_rank:
        _add_adapters(unet, config, train_conv_in=new)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    _cast_frozen(model, config)
    return replace(model, spec=spec, unet=unet.train())


def _predicted(spec: ModelSpec, config: TrainConfig) -> dict[str, Any]:
    """What the network is taught to predict, and on which ladder."""
    if config.zero_snr:
        return {"prediction": "v", "zero_snr": True}
    return {"prediction": config.prediction or spec.prediction}


def trained_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """What takes gradients, by name."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def needs_masks(model: Model, config: TrainConfig) -> bool:
    """Whether a run reads the data's masks: for its loss, or as channels."""
    return model.spec.takes_mask or config.unmasked_weight < 1


@contextmanager
def usable(model: Model) -> Iterator[Model]:
    """The model for editing with it: in eval mode until the block ends, or a copy gathered from its pieces."""
    if is_sharded(model.unet):
        yield replace(model, unet=_gathered(model.unet))
        return
    model.unet.eval()
    try:
        yield model
    finally:
        model.unet.train()


def finished(model: Model, base: Model, config: TrainConfig) -> Model:
    """The model to give away: the trained UNet, and what was frozen as the base has it, not as the run rounded it.

    Adapters are merged into the base's own weights. ``base`` is loaded anew, and used up.
    """
    parts = {"autoencoder": base.autoencoder, "text_encoders": base.text_encoders}
    if not config.lora_rank:
        return replace(model, **parts)
    channels = model.spec.in_channels
    new = channels > base.spec.in_channels
    fresh: Any = widened(base, channels).unet if new else base.unet
    _add_adapters(fresh.float(), config, train_conv_in=new)
    trained = trained_parameters(model.unet)
    for name, parameter in trained_parameters(fresh).items():
        parameter.data.copy_(trained[name].detach())
    fresh.fuse_lora()
    fresh.unload_lora()
    return replace(model, unet=fresh.eval().requires_grad_(False), **parts)


def arithmetic(device: str, config: TrainConfig) -> Any:
    """The run's precision, outside of the network that Accelerate has prepared for it."""
    half = HALF.get(config.precision)
    return nullcontext() if half is None else torch.autocast(device, half)


def move_frozen(model: Model, device: str | torch.device) -> None:
    """The autoencoder and the text encoders to a device."""
    for module in (model.autoencoder, *model.text_encoders):
        module.to(device)


def lora_state(unet: nn.Module, config: TrainConfig) -> dict[str, Tensor]:
    """The adapters as one file that ComfyUI, diffusers and ``ip2p edit --lora`` take alike (kohya's names)."""
    from peft.utils import get_peft_model_state_dict

    state: Mapping[str, Tensor] = get_peft_model_state_dict(unet)
    ending = ".lora_A.weight"
    layers = [name.removesuffix(ending) for name in state if name.endswith(ending)]
    factors = {layer: tuple(state[f"{layer}.lora_{part}.weight"].detach().cpu() for part in "AB") for layer in layers}
    return kohya_state(factors, config.lora_alpha or config.lora_rank)  # type: ignore[arg-type]


def _gathered(unet: Any) -> nn.Module:
    state = {name: whole(value.detach()) for name, value in unet.state_dict().items()}
    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(dict(unet.config))
    copy.load_state_dict(state, strict=True, assign=True)
    return copy.eval()


def _add_adapters(unet: Any, config: TrainConfig, *, train_conv_in: bool) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("LoRA needs peft, which is missing; pip install peft") from error
    settings: Any = {"lora_alpha": config.lora_alpha or config.lora_rank, "target_modules": LORA_LAYERS}
    adapters = LoraConfig(r=config.lora_rank, init_lora_weights="gaussian", **settings)
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.default_generator.manual_seed(stream(config.seed, "lora").initial_seed())
        unet.add_adapter(adapters)
    unet.conv_in.requires_grad_(train_conv_in)


def _cast_frozen(model: Model, config: TrainConfig) -> None:
    """Frozen networks compute in the run's precision."""
    half = HALF.get(config.precision, torch.float32)
    for parameter in model.unet.parameters():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(half)
    nn.Module.to(model.autoencoder, dtype=autoencoder_dtype(model.spec.family, half))
    for encoder in model.text_encoders:
        encoder.to(dtype=half)
