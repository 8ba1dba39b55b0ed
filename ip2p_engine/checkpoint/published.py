"""Checkpoints of the field that go by name: where each lies, its licence, and how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["EMBEDDED_MODELS", "PUBLISHED", "Published", "published"]

EMBEDDED_MODELS = ("embedded", "embedded-sd", "embedded-photos")
"""The models that are part of the engine, by name."""

PAPERS = "SD1.5, 512 px, text_cfg 7.5, image_cfg 1.5"
QUALITY = ", image quality is five out of five"
HIVE = "https://storage.googleapis.com/sfr-hive-data-research/checkpoints"
INSTRUCT_DIFFUSION = (
    "https://github.com/TiankaiHang/storage-2023/releases/download/0924/v1-5-pruned-emaonly-adaption-task"
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A repository of the hub, and its one file where it is no folder that loads; or addresses elsewhere."""

    name: str
    repository: str = ""
    file: str = ""
    addresses: tuple[str, ...] = ()
    """Of a file, or of the pieces that make it when one is put after the other."""
    page: str
    """Where its authors tell of it."""
    licence: str
    gated: bool = False
    """Whether its licence has to be accepted on its page, and its files need a token."""
    size: str = ""
    settings: str
    recommends: Mapping[str, Any] = field(default_factory=dict)
    """What the file does not say itself, by the names of ModelSpec."""

    def __str__(self) -> str:
        access = f"accept it at {self.page} and log in" if self.gated else "free to fetch"
        told = [self.settings, self.size, f"licence: {self.licence}", access]
        return f"{self.name}  ({self.page})\n    {'; '.join(filter(None, told))}"


def _hub(name: str, repository: str, **values: Any) -> Published:
    return Published(name=name, repository=repository, page=f"https://huggingface.co/{repository}", **values)


def _hive(file: str, base: str, *, conditional: bool) -> Published:
    """HIVE's own: those of conditional reward are told of quality after each instruction (its edit_cli_rw_label.py)."""
    recommends = {"resolution": 512, "prediction": "eps", **({"suffix": QUALITY} if conditional else {})}
    return Published(
        name=file.replace("_", "-").removesuffix(".ckpt"),
        addresses=(f"{HIVE}/{file}",),
        page="https://github.com/salesforce/HIVE",
        licence="not said of the weights; the code is Apache-2.0",
        settings=f"{base}, 512 px, text_cfg 7.5, image_cfg 1.5{', with a suffix' if conditional else ''}",
        recommends=recommends,
    )


def _instruct_diffusion(name: str, ending: str) -> Published:
    return Published(
        name=name,
        addresses=tuple(f"{INSTRUCT_DIFFUSION}{ending}_a{piece}" for piece in "abcdef"),
        page="https://github.com/cientgu/InstructDiffusion",
        licence="MIT, and Stable Diffusion's CreativeML OpenRAIL-M",
        settings="SD1.5, 512 px, guidance instruct-diffusion, text_cfg 5, image_cfg 1.25",
        recommends={"guidance": "instruct-diffusion", "text_cfg": 5.0, "image_cfg": 1.25},
    )


PUBLISHED = (
    _hub("instruct-pix2pix", "timbrooks/instruct-pix2pix", licence="MIT", settings=PAPERS),
    _hub(
        "magicbrush",
        "osunlp/InstructPix2Pix-MagicBrush",
        file="MagicBrush-epoch-52-step-4999.ckpt",
        licence="CreativeML OpenRAIL-M",
        size="7.7 GB",
        settings=PAPERS,
    ),
    _hub(
        "sdxl-instructpix2pix-768",
        "diffusers/sdxl-instructpix2pix-768",
        licence="CreativeML OpenRAIL++-M",
        size="12.3 GB",
        settings="SDXL, 768 px, text_cfg 3, image_cfg 1.5",
    ),
    _hub(
        "cosxl",
        "stabilityai/cosxl",
        file="cosxl_edit.safetensors",
        licence="Stability AI's for CosXL, non-commercial",
        gated=True,
        size="6.9 GB",
        settings="CosXL, 1024 px, text_cfg 5, image_cfg 1.5",
    ),
    _hub(
        "hive-magicbrush",
        "osunlp/HIVE-MagicBrush",
        file="MagicBrush-epoch-000130.ckpt",
        licence="CreativeML OpenRAIL-M",
        size="8.7 GB",
        settings=PAPERS,
    ),
    _hive("hive_rw_condition.ckpt", "SD1.5", conditional=True),
    _hive("hive_rw.ckpt", "SD1.5", conditional=False),
    _hive("hive_v2_rw_condition.ckpt", "SD2.1 base", conditional=True),
    _hive("hive_v2_rw.ckpt", "SD2.1 base", conditional=False),
    _instruct_diffusion("instruct-diffusion", ""),
    _instruct_diffusion("instruct-diffusion-aligned", "-humanalign"),
)


def published(name: str) -> Published | None:
    """The checkpoint that a name means: its own, its repository, or the part of that after the owner, in any case."""
    asked = name.strip().lower()
    for one in PUBLISHED:
        repository = one.repository.lower()
        if asked and asked in (one.name, repository, repository.rpartition("/")[2]):
            return one
    return None
