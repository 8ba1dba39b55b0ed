"""Training an InstructPix2Pix: ``train(config, data=..., base=..., out=...)``.

From the bottom up: config, draws, ema, muon, optimizers, origin; crops, sources, order, batches, cache; networks,
objective; checkpoints, outputs, watching; loop.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["PRESETS", "Progress", "TrainConfig", "TrainResult", "preset", "train"]

HOMES = {"PRESETS": "config", "TrainConfig": "config", "preset": "config"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f".{HOMES.get(name, 'loop')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
