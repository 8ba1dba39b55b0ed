"""Checkpoints of the field that go by name: where each lies, its licence, and how it is used."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED", "Published", "published"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A repository of the hub, and its one file where it is no folder that loads."""

    repository: str
    file: str = ""
    licence: str
    gated: bool = False
    """Whether its licence has to be accepted on its page, and its files need a token."""
    settings: str

    @property
    def source(self) -> str:
        """What the loader takes."""
        return f"hf://{self.repository}/{self.file}" if self.file else self.repository

    def __str__(self) -> str:
        access = f"accept it at https://huggingface.co/{self.repository} and log in" if self.gated else "free to fetch"
        return f"{self.repository}\n    {self.settings}; licence: {self.licence}; {access}"


PUBLISHED = (
    Published(
        repository="timbrooks/instruct-pix2pix", licence="MIT", settings="SD1.5, 512 px, text_cfg 7.5, image_cfg 1.5"
    ),
    Published(
        repository="osunlp/InstructPix2Pix-MagicBrush",
        file="MagicBrush-epoch-52-step-4999.ckpt",
        licence="CC-BY-4.0",
        settings="SD1.5, 512 px, text_cfg 7.5, image_cfg 1.5",
    ),
    Published(
        repository="diffusers/sdxl-instructpix2pix-768",
        licence="CreativeML OpenRAIL++-M",
        settings="SDXL, 768 px, text_cfg 3, image_cfg 1.5",
    ),
    Published(
        repository="stabilityai/cosxl",
        file="cosxl_edit.safetensors",
        licence="Stability AI non-commercial research",
        gated=True,
        settings="CosXL, 1024 px, text_cfg 5, image_cfg 1.5",
    ),
)


def published(name: str) -> Published | None:
    """The checkpoint that a name means: its repository, or the part of it after the owner, in any case."""
    asked = name.strip().lower()
    return next(
        (one for one in PUBLISHED if asked in (one.repository.lower(), one.repository.lower().split("/")[1])), None
    )
