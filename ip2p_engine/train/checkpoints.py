"""Checkpoints of a run: everything the next step needs, in one file that is whole or absent.

Data order, noise, crops and the learning rate follow from (seed, step), so the step is their whole state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, first_line
from ..files import TEMPORARY, disk_errors, whole_file

__all__ = ["latest", "load_checkpoint", "save_checkpoint", "step_of"]

NAME = re.compile(r"step-(\d{8})\.pt")
PARTS = ("step", "trained", "ema", "optimizers", "scaler", "broken")
ADVICE = "free some space and run the same command again: earlier checkpoints are whole"


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write a run's state after ``step`` steps, then remove all but the last ``keep``; returns the file."""
    path = folder / f"step-{step:08d}.pt"
    with disk_errors(path, "written", CheckpointError, ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".*{TEMPORARY}"):
            left.unlink()
        with whole_file(path) as stream:
            torch.save({"step": step, **state}, stream)
        for old in _all(folder)[:-keep]:
            old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The last checkpoint, if there is one."""
    found = _all(folder)
    return found[-1] if found else None


def step_of(path: Path | None) -> int:
    """Steps that are done in a checkpoint; 0 without one."""
    return int(path.stem.removeprefix("step-")) if path else 0


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What was saved, mapped rather than read; loading runs no code. Raises CheckpointError for a damaged file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: saved[name] for name in PARTS}
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"{path} cannot be read ({reason}); delete it and run the same command again, the one before it goes on"
        ) from error


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name))
