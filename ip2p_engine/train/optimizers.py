"""Optimisers by name, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..errors import ConfigError
from .config import TrainConfig
from .muon import Muon, is_matrix

__all__ = ["learning_rate", "make_optimizers", "set_learning_rate"]


def make_optimizers(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of a run: one, or for muon two, the matrices' and the rest's."""
    if config.optimizer == "adamw":
        return [_adamw(parameters.values(), config)]
    if config.optimizer == "adamw8bit":
        return [_adamw8bit(parameters.values(), config)]
    matrices = [p for name, p in parameters.items() if is_matrix(name, p)]
    rest = [p for name, p in parameters.items() if not is_matrix(name, p)]
    muon = [Muon(matrices, lr=config.learning_rate)] if matrices else []
    return [*muon, *([_adamw(rest, config)] if rest else [])]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of a step counted from 0: a linear warm-up, then constant, or a cosine that ends at 0."""
    warm = min(1.0, (step + 1) / config.warm_up) if config.warm_up else 1.0
    fall = 1.0 if config.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.learning_rate * warm * fall


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Use a learning rate in every group from now on."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def _adamw(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Fused: one kernel for all tensors, on GPUs and CPUs."""
    parameters = list(parameters)
    fused = parameters[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=fused
    )


def _adamw8bit(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError("adamw8bit needs bitsandbytes, which is missing; pip install bitsandbytes") from error
    return AdamW8bit(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
