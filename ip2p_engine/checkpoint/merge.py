"""Moving the editing skill to another model of the same family by adding a difference of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .spec import BASE_NAMES, Networks

__all__ = ["add_difference", "with_weights"]

Loaded = TypeVar("Loaded", bound=Networks)
WIDENED = "conv_in.weight"


def add_difference(ip2p: Loaded, base: Networks, other: Networks) -> Loaded:
    """ip2p - base + other: an InstructPix2Pix on top of ``other``, where ``base`` is what ip2p was trained from.

    UNet and text encoders are added up in float64 and kept in ip2p's type; the four channels that only ip2p has stay
    as they are. The autoencoder is other's, as latents cannot be averaged. Raises CheckpointError for models that do
    not fit together.
    """
    _check(ip2p, base, other)
    unet = _sum(ip2p.unet, base.unet, other.unet, "UNet")
    encoders = zip(ip2p.text_encoders, base.text_encoders, other.text_encoders, strict=True)
    texts = tuple(_sum(*three, "text encoder") for three in encoders)
    spec = replace(ip2p.spec, name="")
    merged: Any = replace(  # type: ignore[type-var]
        ip2p, spec=spec, unet=unet, text_encoders=texts, autoencoder=other.autoencoder
    )
    return merged


def _check(ip2p: Networks, base: Networks, other: Networks) -> None:
    for model, word, channels in ((ip2p, "ip2p", 8), (base, "base", 4), (other, "other", 4)):
        if model.spec.in_channels != channels:
            raise CheckpointError(
                f"the {word} model takes {model.spec.in_channels} input channels and {channels} were expected; "
                "the order is IP2P - BASE + OTHER, an InstructPix2Pix and two text-to-image models"
            )
    said = {(model.spec.family, model.spec.prediction) for model in (ip2p, base, other)}
    if len(said) > 1:
        kinds = ", ".join(f"{BASE_NAMES[family]} ({prediction})" for family, prediction in sorted(said))
        raise CheckpointError(f"the models are {kinds}; give three of one family and prediction type")


def _sum(ip2p: nn.Module, base: nn.Module, other: nn.Module, word: str) -> nn.Module:
    """A module like ip2p's with the sum as its weights; nothing of the three is changed."""
    ours, theirs, others = ip2p.state_dict(), base.state_dict(), other.state_dict()
    _check_shapes(ours, theirs, word, "base")
    _check_shapes(ours, others, word, "other")
    state = {name: _moved(value, theirs[name], others[name]) for name, value in ours.items()}
    return with_weights(ip2p, state)


def with_weights(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A network of the same make with other weights, for inference; the given one stays as it is."""
    with torch.device("meta"):
        kind: Any = type(network)
        config: Any = network.config
        module: nn.Module = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    module.load_state_dict(state, strict=True, assign=True)
    _share_buffers(network, module)
    return module.eval().requires_grad_(False)


def _moved(ip2p: Tensor, base: Tensor, other: Tensor) -> Tensor:
    if not ip2p.is_floating_point():
        return ip2p
    result = ip2p.double()
    difference = other.to(ip2p.device).double() - base.to(ip2p.device).double()
    if difference.shape == result.shape:
        return result.add_(difference).to(ip2p.dtype)
    result[:, : difference.shape[1]] += difference
    return result.to(ip2p.dtype)


def _check_shapes(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], word: str, who: str) -> None:
    strange = ours.keys() ^ theirs.keys()
    strange |= {name for name in ours.keys() & theirs.keys() if not _fits(name, ours[name], theirs[name])}
    if strange:
        raise CheckpointError(
            f"the {who} model's {word} differs in {min(strange)} from ip2p's; give the models that it came from"
        )


def _fits(name: str, ours: Tensor, theirs: Tensor) -> bool:
    widened = name == WIDENED and ours.shape[0] == theirs.shape[0] and ours.shape[2:] == theirs.shape[2:]
    return ours.shape == theirs.shape or widened


def _share_buffers(source: nn.Module, target: nn.Module) -> None:
    """Buffers that are in no state dict (the positions' numbers)."""
    for path, buffer in source.named_buffers():
        owner, _, name = path.rpartition(".")
        if target.get_submodule(owner)._buffers[name].is_meta:  # type: ignore[union-attr]
            target.get_submodule(owner).register_buffer(name, buffer, persistent=False)
