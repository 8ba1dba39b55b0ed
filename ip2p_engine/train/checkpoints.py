"""Checkpoints of a run: everything the next step needs, in one file that is whole or absent.

Data order, noise, crops and the learning rate follow from (seed, step), so the step is their whole state.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..checkpoint.unpickle import read_pickle
from ..errors import CheckpointError, first_line
from ..files import TEMPORARY, disk_errors, remove, whole_file
from .optimizers import Average, PowerAverage
from .progress import diverged

__all__ = [
    "State",
    "keep_last",
    "is_sharded",
    "latest",
    "load_checkpoint",
    "save_checkpoint",
    "step_of",
    "whole",
]

NAME = re.compile(r"step-(\d{8})\.pt")
PARTS = ("step", "trained", "ema", "optimizers", "scaler", "broken")
LENGTHS = "lengths"
ADVICE = "free some space and repeat the same call: earlier checkpoints are whole"


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write a run's state after ``step`` steps, then remove all but the last ``keep``; returns the file."""
    path = folder / f"step-{step:08d}.pt"
    with disk_errors(path, "written", CheckpointError, ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".*{TEMPORARY}"):
            remove(left)
        with whole_file(path) as stream:
            try:
                torch.save({"step": step, **state}, stream)
            except RuntimeError as error:  # torch's own way to say that the disk refused
                raise OSError(str(error.__context__ or first_line(error))) from error
    keep_last(folder, keep)
    return path


def keep_last(folder: Path, count: int) -> None:
    """Remove all but the last ``count`` checkpoints."""
    with disk_errors(folder, "changed", CheckpointError):
        found = _all(folder)
        for old in found[: len(found) - count]:
            old.unlink()


def latest(folder: Path) -> Path | None:
    """The last checkpoint, if there is one."""
    found = _all(folder)
    return found[-1] if found else None


def step_of(path: Path | None) -> int:
    """Steps that are done in a checkpoint; 0 without one."""
    return int(path.stem.removeprefix("step-")) if path else 0


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What was saved, mapped rather than read; loading runs no code. Raises CheckpointError for a damaged file."""
    with _whole(path):
        saved = _unpickled(path)
        with zipfile.ZipFile(path) as archive:
            if spoiled := archive.testzip():  # torch takes flipped bits as they are
                raise ValueError(f"{spoiled} is not as it was written")
        found = {name: saved[name] for name in PARTS} | ({LENGTHS: saved[LENGTHS]} if LENGTHS in saved else {})
        if found["step"] != step_of(path) or not all(isinstance(row, str) for row in found["broken"]):
            raise ValueError("it is of another step")
        return found


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        return read_pickle(path, own=True)
    except CheckpointError as error:
        raise ValueError(str(error)) from error


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Whatever a damaged checkpoint makes torch and us raise, as one sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # nearly every class
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"{path} cannot be read ({reason}); delete it and repeat the same call, the one before it goes on"
        ) from error


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name))


@dataclass(frozen=True, kw_only=True)
class State:
    """What a step changes."""

    parameters: Mapping[str, nn.Parameter]
    average: Average
    optimizers: Sequence[Any]
    scaler: Any
    """Of float16; None otherwise."""
    lengths: Sequence[PowerAverage] = ()
    """Averages of which others are made after the run (``posthoc``)."""

    def follow(self, step: int) -> None:
        """Let the averages move towards the parameters after a step."""
        for average in (self.average, *self.lengths):
            average.update(step)

    def wait(self) -> None:
        """Before the parameters change: let what follows on the GPU come after the averages' last update."""
        for average in (self.average, *self.lengths):
            average.wait()

    def saved(self, last_good: Path | None = None) -> dict[str, Any]:
        """As a checkpoint holds it; raises TrainingError if a weight is not finite, naming the last good checkpoint."""
        self.wait()
        trained = {name: whole(parameter.detach()) for name, parameter in self.parameters.items()}
        for name, value in trained.items():
            if not value.sum().isfinite() and not value.isfinite().all():
                raise diverged(f"the weight {name} is not finite any more", last_good)
        return {
            "trained": trained,
            "ema": self._whole(self.average),
            "optimizers": [_mapped(optimizer.state_dict(), whole) for optimizer in self.optimizers],
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            **({LENGTHS: [self._whole(one) for one in self.lengths]} if self.lengths else {}),
        }

    def _whole(self, average: Average) -> dict[str, Tensor]:
        return {name: whole(value) for name, value in average.values.items()}

    def of_lengths(self) -> dict[float, dict[str, Tensor]]:
        """The averages by their sigma_rel, gathered from their pieces."""
        self.wait()
        return {one.sigma_rel: self._whole(one) for one in self.lengths}

    @torch.no_grad()
    def load(self, saved: Mapping[str, Any], where: str) -> None:
        """Go on from a checkpoint; raises CheckpointError if it is another network's, or damaged."""
        with _whole(Path(where)):
            self._load(saved, where)

    def _load(self, saved: Mapping[str, Any], where: str) -> None:
        if saved["trained"].keys() != self.parameters.keys():
            raise CheckpointError(f"{where} holds other weights than this run trains; use the base that it began with")
        for name, parameter in self.parameters.items():
            _check_shape(saved["trained"][name], parameter, name, where)
            parameter.copy_(_in_pieces(saved["trained"][name], parameter))
            self.average.values[name].copy_(_in_pieces(saved["ema"][name], parameter))
            for average, values in zip(self.lengths, saved.get(LENGTHS, ()), strict=True):
                average.values[name].copy_(_in_pieces(values[name], parameter))
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(_like_parameters(state, optimizer))
        if self.scaler is not None and saved["scaler"] is not None:  # float16 from now on
            self.scaler.load_state_dict(saved["scaler"])


def whole(value: Any) -> Any:
    """A tensor gathered from its pieces; what is whole, or no tensor, as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP holds a network in pieces."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _in_pieces(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _like_parameters(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """An optimiser's saved state, cut as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {}
    for number, entries in state["state"].items():
        like = parameters[number]
        cut[number] = {
            name: _in_pieces(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value
            for name, value in entries.items()
        }
    return {**state, "state": cut}


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested dicts and lists with every leaf changed."""
    if isinstance(value, dict):
        return {name: _mapped(part, change) for name, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, change) for part in value]
    return change(value)


def _check_shape(value: Tensor, parameter: Tensor, name: str, where: str) -> None:
    if value.shape != parameter.shape:
        raise CheckpointError(
            f"{where}: {name} has the shape {tuple(value.shape)} and this run's {tuple(parameter.shape)}; "
            "use the base that it began with"
        )
