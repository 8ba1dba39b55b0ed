"""Training an InstructPix2Pix: ``train(config, data=..., base=..., out=...)``.

From the bottom up: config, randomness, optimizers, progress; augment, sources, order, batches; adapters, networks,
objective, distill, encoding, planning; checkpoints, snapshots, run_folder, hub, results, validation; setup, loop;
posthoc. stage and miniature train networks of worlds with known truth.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PRESETS, TrainConfig, preset
    from .loop import plan, train
    from .planning import Plan
    from .progress import Progress, TrainResult
    from .sources import Example, Rows

__all__ = ["PRESETS", "Example", "Plan", "Progress", "Rows", "TrainConfig", "TrainResult", "plan", "preset", "train"]

HOMES = {
    "PRESETS": "config",
    "TrainConfig": "config",
    "preset": "config",
    "Plan": "planning",
    "Progress": "progress",
    "TrainResult": "progress",
    "Rows": "sources",
    "Example": "sources",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f".{HOMES.get(name, 'loop')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
