"""InstructPix2Pix, from captions to edited pictures, without a host.

Importing it is light; each name loads what it needs on first use. Training is ``ip2p_engine.train.train``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    CaptionError,
    CheckpointError,
    ConfigError,
    DatasetError,
    ImageError,
    Interrupted,
    IP2PError,
    TrainingError,
)
from .hooks import Hooks
from .version import __version__

if TYPE_CHECKING:
    from .clip.filter import FilterConfig, PairScores, filter_candidates
    from .clip.similarity import ClipSimilarity
    from .data.store import PairRecord, PairStore, PairWriter
    from .diffusion.guidance import Branches, DualGuidance
    from .diffusion.sampling import SAMPLERS, Step
    from .edit import EditConfig, EditResult, InstructPix2Pix
    from .evaluate.measure import measure
    from .factory.run import make_pairs
    from .networks.denoiser import BranchDenoiser
    from .networks.model import Model, convert, load_model
    from .p2p.generator import PairCandidate, PairConfig, PairGenerator
    from .train.config import TrainConfig, preset
    from .train.loop import TrainResult

HOMES = {
    "BranchDenoiser": "networks.denoiser",
    "Branches": "diffusion.guidance",
    "ClipSimilarity": "clip.similarity",
    "DualGuidance": "diffusion.guidance",
    "EditConfig": "edit",
    "EditResult": "edit",
    "FilterConfig": "clip.filter",
    "InstructPix2Pix": "edit",
    "Model": "networks.model",
    "PairCandidate": "p2p.generator",
    "PairConfig": "p2p.generator",
    "PairGenerator": "p2p.generator",
    "PairRecord": "data.store",
    "PairScores": "clip.filter",
    "PairStore": "data.store",
    "PairWriter": "data.store",
    "SAMPLERS": "diffusion.sampling",
    "Step": "diffusion.sampling",
    "TrainConfig": "train.config",
    "TrainResult": "train.progress",
    "convert": "networks.model",
    "filter_candidates": "clip.filter",
    "load_model": "networks.model",
    "make_pairs": "factory.run",
    "measure": "evaluate.measure",
    "preset": "train.config",
}

__all__ = [
    "SAMPLERS",
    "BranchDenoiser",
    "Branches",
    "CaptionError",
    "CheckpointError",
    "ClipSimilarity",
    "ConfigError",
    "DatasetError",
    "DualGuidance",
    "EditConfig",
    "EditResult",
    "FilterConfig",
    "Hooks",
    "IP2PError",
    "ImageError",
    "InstructPix2Pix",
    "Interrupted",
    "Model",
    "PairCandidate",
    "PairConfig",
    "PairGenerator",
    "PairRecord",
    "PairScores",
    "PairStore",
    "PairWriter",
    "Step",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "__version__",
    "convert",
    "filter_candidates",
    "load_model",
    "make_pairs",
    "measure",
    "preset",
]


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f".{HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
