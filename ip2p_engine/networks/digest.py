"""What names a network by its weights: another one, or one that was trained on, has another digest.

The values are written into runs, caches and evaluations, so each formula stays as it is.
"""

from __future__ import annotations

from hashlib import blake2b, sha256
from typing import Any

import torch
from torch import Tensor, nn

from .model import Model

__all__ = ["digest_of_autoencoder", "digest_of_network", "digest_of_values", "digest_of_weights", "fingerprint"]

VALUES = 256


def fingerprint(*networks: nn.Module) -> str:
    """A digest of every value of the networks, 16 hexadecimal digits, by which an evaluation's rows name them."""
    content = sha256()
    for network in networks:
        for name, value in sorted(network.state_dict().items()):
            content.update(name.encode())
            content.update(_bytes(value))
    return content.hexdigest()[:16]


def digest_of_network(network: nn.Module) -> str:
    """A digest of every value of one network, by which a cache names the encoder of its latents."""
    content = blake2b(digest_size=16)
    for name, value in network.state_dict().items():
        content.update(name.encode())
        content.update(_bytes(value))
    return content.hexdigest()


def digest_of_autoencoder(model: Model) -> str:
    """Whose latents some are: of the first values of every tensor in half precision, so float32 and float16 agree."""
    content = blake2b(digest_size=16)
    for name, value in model.autoencoder.state_dict().items():
        content.update(f"{name} {tuple(value.shape)}".encode())
        content.update(_bytes(value.flatten()[:VALUES].half()))
    return content.hexdigest()


def digest_of_weights(model: Model) -> str:
    """Of the first values of every tensor of a model's networks (``digest_of_values``)."""
    return digest_of_values(model.unet, model.autoencoder, *model.text_encoders)


def digest_of_values(*networks: nn.Module) -> str:
    """Of the first values of every tensor: training and merging change them all, and reading all is slow."""
    content = blake2b(digest_size=16)
    for network in networks:
        for name, value in network.state_dict().items():
            content.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            content.update(_bytes(value.flatten()[:VALUES]))
    return content.hexdigest()


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
