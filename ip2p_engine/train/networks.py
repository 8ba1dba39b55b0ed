"""The network that is trained: from text to image widened to 8 channels, or an InstructPix2Pix; whole, or adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ..checkpoint.spec import EDIT, MASKED_EDIT, autoencoder_dtype, recommended
from ..checkpoint.training_run import TEXT_PREFIXES, with_adapters, with_channels
from ..edit_config import SCALES
from ..errors import CheckpointError
from ..networks.model import Model, ModelSpec
from ..networks.scales import SCALES_WIDTH
from .adapters import add_adapters
from .checkpoints import is_sharded, whole
from .config import TrainConfig

__all__ = [
    "arithmetic",
    "finished",
    "make_trainable",
    "move_frozen",
    "needs_masks",
    "trained_of",
    "trained_parameters",
    "trained_texts",
    "usable",
    "widened",
]

TWO_ENCODERS = 2
DISTILLED: dict[str, Any] = {"steps": 4, "sampler": "lcm", "levels": "trailing"}
ONE_BRANCH = {"text_cfg": 1.0, "image_cfg": 1.0}
SCALES_LAYER = "time_embedding.cond_proj.weight"
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


def with_scales(model: Model) -> Model:
    """A model whose UNet is told s_T and s_I beside the time, through a layer of zeros: its output is what it was."""
    inner = model.unet.config.block_out_channels[0]
    state = {**model.unet.state_dict(), SCALES_LAYER: torch.zeros(inner, SCALES_WIDTH, device=model.device)}
    config = {name: value for name, value in model.unet.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": SCALES_WIDTH})
    unet.load_state_dict(state, strict=True, assign=True)
    return replace(model, spec=replace(model.spec, scale_inputs=True), unet=unet)


def make_trainable(model: Model, config: TrainConfig) -> Model:
    """The model to train: 8 channels, or 12 with masks, float32 weights that take gradients, the other networks frozen.

    With LoRA the weights are frozen in the run's precision and float32 adapters train, with the first convolution
    where it is new. Raises ConfigError if peft is missing.
    """
    if model.spec.scale_inputs:
        raise CheckpointError("the base is told its scales (distill_to); train from the model that it was made from")
    if config.distill is not None:
        model.require_edit()
        model = with_scales(model) if config.distill_to is not None else model
    channels = max(model.spec.in_channels, MASKED_EDIT if config.mask_channels else EDIT)
    new = channels > model.spec.in_channels
    model = widened(model, channels) if new else model
    spec = replace(model.spec, weights="only", **_predicted(model.spec, config))
    unet = model.unet.float().requires_grad_(not config.lora_rank)
    if config.lora_rank:
        add_adapters(unet, config)
        unet.conv_in.requires_grad_(new)
    if config.train_text_encoder:
        _train_texts(model, config)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    _cast_frozen(model, config)
    return replace(model, spec=spec, unet=unet.train())


def _predicted(spec: ModelSpec, config: TrainConfig) -> dict[str, Any]:
    """What the network is taught to predict, and on which ladder; of a distilled one how it is used."""
    if config.distill is not None:
        ends = zip(SCALES, config.distill, config.distill_to or (1.0, 1.0), strict=True)
        between = {name: sorted([getattr(spec, name), *two])[1] for name, *two in ends}  # the nearest one
        own = between if config.distill_to is not None else ONE_BRANCH
        return {**DISTILLED, **own, "guidance_low": 0.0, "guidance_high": 0.0}
    if config.zero_snr:
        return {"prediction": "v", "zero_snr": True}
    return {"prediction": config.prediction or spec.prediction}


def _train_texts(model: Model, config: TrainConfig) -> None:
    """Let the text encoders take gradients, or adapters on them.

    Of two, the first is read before its last layer (SDXL), which then learns nothing.
    """
    for number, encoder in enumerate(model.text_encoders, start=1):
        encoder.float().requires_grad_(not config.lora_rank)
        if config.lora_rank:
            add_adapters(encoder, config, text=number)
    if len(model.text_encoders) == TWO_ENCODERS:
        inner = getattr(model.text_encoders[0], "text_model", model.text_encoders[0])
        for unread in (inner.encoder.layers[-1], inner.final_layer_norm):
            unread.requires_grad_(False)


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """What takes gradients, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def trained_of(model: Model) -> dict[str, nn.Parameter]:
    """What takes gradients in the UNet, and behind a prefix in the text encoders."""
    found = trained_parameters(model.unet)
    for prefix, encoder in zip(TEXT_PREFIXES, model.text_encoders, strict=False):
        own = trained_parameters(encoder)
        found |= {prefix + name.removeprefix("text_model."): parameter for name, parameter in own.items()}
    return found


def trained_texts(model: Model) -> list[nn.Module]:
    """The text encoders that take gradients: all or none."""
    return [encoder for encoder in model.text_encoders if trained_parameters(encoder)]


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
    """The model to export: what was trained, and what was frozen as the base has it, not as the run rounded it.

    Adapters are merged into the base's own weights. ``base`` is loaded anew, and used up.
    """
    texts = _finished_texts(model, base, config) if config.train_text_encoder else base.text_encoders
    parts: dict[str, Any] = {"autoencoder": base.autoencoder, "text_encoders": texts}
    if not config.lora_rank:
        return replace(model, **parts)
    channels = model.spec.in_channels
    new = channels > base.spec.in_channels
    fresh: Any = widened(base, channels).unet if new else base.unet
    add_adapters(fresh.float(), config)
    fresh.conv_in.requires_grad_(new)
    trained = trained_parameters(model.unet)
    for name, parameter in trained_parameters(fresh).items():
        parameter.data.copy_(trained[name].detach())
    fresh.fuse_lora()
    fresh.unload_lora()
    return replace(model, unet=fresh.eval().requires_grad_(False), **parts)


def _finished_texts(model: Model, base: Model, config: TrainConfig) -> tuple[Any, ...]:
    """The base's text encoders with what was trained of them, float32."""
    scale = (config.lora_alpha or config.lora_rank) / max(1, config.lora_rank)
    for encoder, trained in zip(base.text_encoders, model.text_encoders, strict=True):
        own = {name: parameter.detach().cpu() for name, parameter in trained_parameters(trained).items()}
        encoder.float().load_state_dict(with_adapters(encoder.state_dict(), own, scale))
    return base.text_encoders


def arithmetic(device: str, config: TrainConfig) -> Any:
    """The run's precision, outside of the network that Accelerate has prepared for it."""
    half = HALF.get(config.precision)
    return nullcontext() if half is None else torch.autocast(device, half)


def move_frozen(model: Model, device: str | torch.device) -> None:
    """The autoencoder and the text encoders to a device, but for those that are trained."""
    trained = trained_texts(model)
    for module in (model.autoencoder, *model.text_encoders):
        if module not in trained:
            module.to(device)


def _gathered(unet: Any) -> nn.Module:
    state = {name: whole(value.detach()) for name, value in unet.state_dict().items()}
    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(dict(unet.config))
    copy.load_state_dict(state, strict=True, assign=True)
    return copy.eval()


def _cast_frozen(model: Model, config: TrainConfig) -> None:
    """Frozen networks compute in the run's precision."""
    half = HALF.get(config.precision, torch.float32)
    for network in (model.unet, *trained_texts(model)):
        for parameter in network.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(half)
    nn.Module.to(model.autoencoder, dtype=autoencoder_dtype(model.spec.family, half))
    for encoder in model.text_encoders if not trained_texts(model) else ():
        encoder.to(dtype=half)
