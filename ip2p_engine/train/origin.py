"""What a run began with, told apart by content: a folder may be moved, and another one may take its name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from ..networks.model import Model, ModelSpec

__all__ = ["digest_of_files", "digest_of_text", "digest_of_weights", "first_difference", "other_spec"]

FILES, END = 1000, 65536
VALUES = 256
SHOWN = 40
# The rest of a spec is recommendations, which another version may correct.
COMPUTED_WITH = (
    "family",
    "in_channels",
    "prediction",
    "scaled_condition",
    "latent_scale",
    "schedule",
    "beta_start",
    "beta_end",
    "sigma_min",
    "sigma_max",
)


def digest_of_text(text: str) -> str:
    """A short name for a long identity."""
    return blake2b(text.encode(), digest_size=16).hexdigest()


def digest_of_files(home: Path, names: Sequence[str]) -> str:
    """Of all names, and of the sizes and the ends of a thousand of the files; one that is missing has none."""
    content = blake2b(repr(list(names)).encode(), digest_size=16)
    for name in names[:: -(-len(names) // FILES) or 1]:
        content.update(_size_and_ends(home / name))
    return content.hexdigest()


def digest_of_weights(model: Model) -> str:
    """Of the first values of every tensor: training and merging change them all, and reading all takes long."""
    content = blake2b(digest_size=16)
    for network in (model.unet, model.autoencoder, *model.text_encoders):
        for name, value in network.state_dict().items():
            content.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            content.update(value.detach().flatten()[:VALUES].cpu().contiguous().view(torch.uint8).numpy())
    return content.hexdigest()


def other_spec(saved: Mapping[str, Any], spec: ModelSpec) -> list[str]:
    """What a step computes with and is not as it was saved."""
    return [name for name in COMPUTED_WITH if name in saved and saved[name] != getattr(spec, name)]


def first_difference(one: str, other: str) -> tuple[str, str]:
    """The part of two long texts in which they first differ."""
    start = max(0, len(os.path.commonprefix([one, other])) - SHOWN)
    first, second = (text[start : start + 2 * SHOWN] for text in (one, other))
    return first, second


def _size_and_ends(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            first = stream.read(END)
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - END))
            return b"%d " % size + first + stream.read(END)
    except OSError:
        return b"none"
