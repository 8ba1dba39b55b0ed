"""How to edit: the settings of an edit, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .diffusion.guidance import Guidance, check_scale, guidance_of
from .diffusion.sampling import Sampler, sampler_of
from .diffusion.schedule import SCHEDULES
from .errors import ConfigError

__all__ = ["HOW_FAST", "SCALES", "EditConfig", "Settled"]

SCALES = ("text_cfg", "image_cfg")
HOW_FAST = ("batch", "together")  # settings that no picture depends on


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """How to edit; None takes the checkpoint's recommendation."""

    text_cfg: float | None = None
    """s_T: how strongly to follow the instruction, 0 to about 15."""
    image_cfg: float | None = None
    """s_I: how strongly to stay close to the picture, 0 to about 3."""
    steps: int | None = None
    sampler: str | Sampler | None = None
    """A name of SAMPLERS, or a function that takes a Step and returns x at its next sigma."""
    schedule: str | None = None
    """Of noise levels, a name of SCHEDULES."""
    guidance: str | Guidance | None = None
    """A name of FORMULAS, or a function that makes the denoiser over the branches c, i, u and t."""
    guidance_interval: tuple[float, float] | None = None
    """The noise levels, lowest and highest sigma, within which guidance acts; elsewhere c alone is computed. None: the
    checkpoint's recommendation where both scales are, else everywhere."""
    guidance_rescale: float = 0.0
    """Rescaled guidance: the share, 0 to 1, in which results get the standard deviation of c again."""
    apg: bool = False
    """Leave out what is parallel to c, so that high scales do not burn (adaptive projected guidance)."""
    suffix: str | None = None
    """Said after each instruction."""
    size: str | tuple[int, int] = "paper"
    """paper: the 64 rule of the paper's code; keep: the picture's own size; or WxH."""
    resolution: int | None = None
    """The longer side that the paper's rule aims at."""
    batch: int = 8
    """Edits in one batch at most; a picture does not depend on it."""
    together: bool | None = None
    """The guidance branches in one batch (True), one after another (False), or as memory allows (None)."""
    restore_size: bool = True
    """Give the original width and height back."""
    feature_cache: int = 1
    """Keep the deep features for so many evaluations: faster, and a little off (``networks/feature_cache.py``)."""
    auto_mask: bool = False
    """Set back what neither the instruction may change (``find_area``) nor the edit has clearly changed: there the
    source's pixels come back, to the bit."""
    control_weight: float = 1.0
    """How strongly a ControlNet acts, where one is loaded and has a picture."""
    detail: bool = False
    """Take the source's detail where a local colour transform explains the edit (``detail.with_detail``)."""

    def __post_init__(self) -> None:
        for name in SCALES:
            if getattr(self, name) is not None:
                check_scale(name, getattr(self, name))
        for name, floor, most in (
            ("steps", 1, 1000),
            ("resolution", 64, 4096),
            ("batch", 1, 1024),
            ("feature_cache", 1, 100),
        ):
            _check_whole(name, getattr(self, name), floor, most)
        check_scale("control_weight", self.control_weight)
        if self.sampler is not None:
            sampler_of(self.sampler)
        name = "dual" if self.guidance is None or callable(self.guidance) else self.guidance
        how: Any = {"interval": self.guidance_interval, "rescale": self.guidance_rescale, "apg": self.apg}
        guidance_of(1.0, 1.0, name=name, **how)
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule {self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")


@dataclass(frozen=True, kw_only=True)
class Settled(EditConfig):
    """A config in which nothing is left to the checkpoint."""

    text_cfg: float
    image_cfg: float
    steps: int
    sampler: str | Sampler
    schedule: str
    guidance: str | Guidance
    suffix: str
    resolution: int


def _check_whole(name: str, value: Any, floor: int, most: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not floor <= value <= most):
        raise ConfigError(f"{name} is {value!r}; give a whole number from {floor} to {most}")
