"""The changing state of a run: trained weights, their average, the optimisers; out to a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, TrainingError
from .ema import Average

__all__ = ["State"]


@dataclass(frozen=True, kw_only=True)
class State:
    """What a step changes."""

    parameters: Mapping[str, nn.Parameter]
    average: Average
    optimizers: Sequence[Any]
    scaler: Any
    """Of float16; None otherwise."""

    def saved(self) -> dict[str, Any]:
        """As a checkpoint holds it; raises TrainingError if a weight is not finite."""
        self.average.wait()
        for name, parameter in self.parameters.items():
            if not parameter.detach().sum().isfinite() and not parameter.detach().isfinite().all():
                raise TrainingError(f"the weight {name} is not finite")
        return {
            "trained": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "ema": dict(self.average.values),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    @torch.no_grad()
    def load(self, saved: Mapping[str, Any], where: str) -> None:
        """Go on from a checkpoint; raises CheckpointError if it is another network's."""
        if saved["trained"].keys() != self.parameters.keys():
            raise CheckpointError(f"{where} holds other weights than this run trains; use the base that it began with")
        for name, parameter in self.parameters.items():
            parameter.copy_(_fitting(saved["trained"][name], parameter, name, where))
            self.average.values[name].copy_(saved["ema"][name])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])


def _fitting(value: Tensor, parameter: Tensor, name: str, where: str) -> Tensor:
    if value.shape != parameter.shape:
        raise CheckpointError(
            f"{where}: {name} has the shape {tuple(value.shape)} and this run's {tuple(parameter.shape)}; "
            "use the base that it began with"
        )
    return value
