"""The loop that trains every network of the embedded world: resumable, and shared between processes.

What a step sees follows from (seed, step) alone; every process draws the whole batch and computes its slice, so the
number of processes changes only the order of summation.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...train.optimizers import Muon, split_parameters

__all__ = ["Stage", "StageConfig", "run_stage"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """How long and how fast one network trains; the learning rate warms up and then falls to 0 as a cosine."""

    steps: int
    batch: int
    learning_rate: float
    warm_up: int = 50
    ema_decay: float = 0.998
    seed: int = 0
    save_every: int = 100
    log_every: int = 20


class Stage(Protocol):
    """One network's part of the loop."""

    config: StageConfig
    trained: nn.Module

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The whole batch of one step."""
        ...

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of a slice of the batch, and figures for the log."""
        ...


def run_stage(stage: Stage, folder: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """Train to the end, resuming from the folder if it holds a checkpoint; returns the EMA weights."""
    config, rank, world = stage.config, *_processes()
    stage.trained.to(device).train()
    matrices, rest = split_parameters(stage.trained)
    optimisers = [Muon(matrices, lr=1.0), torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)]
    ema = {name: value.detach().clone() for name, value in stage.trained.state_dict().items()}
    first = _restore(folder, stage.trained, optimisers, ema)
    started = time.monotonic()
    figures: dict[str, float] = {}
    for step in range(first, config.steps):
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = config.learning_rate * _schedule(config, step)
        batch = stage.draw(step, torch.Generator().manual_seed(config.seed * 1_000_003 + step))
        share = {name: value[rank::world].to(device) for name, value in batch.items()}
        loss, figures = stage.loss(share, step)
        loss.backward()
        _average_gradients(matrices + rest, world)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        _update_ema(ema, stage.trained, min(config.ema_decay, (1 + step) / (10 + step)))
        done = step + 1
        if rank == 0 and (done % config.log_every == 0 or done == config.steps):
            rate = (done - first) / (time.monotonic() - started)
            _log(folder, {"step": done, "steps_per_second": round(rate, 3), "loss": loss.item(), **figures})
        if rank == 0 and (done % config.save_every == 0 or done == config.steps):
            _save(folder, stage, optimisers, ema, done)
    return ema


def _processes() -> tuple[int, int]:
    """(rank, number of processes), joining the group that torchrun or our launcher announces."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    return dist.get_rank(), dist.get_world_size()


def _schedule(config: StageConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / config.warm_up)
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def _average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients]) / world
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def _update_ema(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)


def _save(folder: Path, stage: Stage, optimisers: list, ema: Mapping[str, Tensor], step: int) -> None:
    state = {
        "step": step,
        "config": asdict(stage.config),
        "trained": stage.trained.state_dict(),
        "ema": dict(ema),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
    }
    temporary = folder / "checkpoint.pt.tmp"
    with temporary.open("wb") as file:
        torch.save(state, file)
        os.fsync(file.fileno())
    temporary.replace(folder / "checkpoint.pt")


def _restore(folder: Path, module: nn.Module, optimisers: list, ema: dict[str, Tensor]) -> int:
    path = folder / "checkpoint.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["trained"])
    for name, value in state["ema"].items():
        ema[name].copy_(value)
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    logger.info("resuming at step %d from %s", state["step"], path)
    return state["step"]


def _log(folder: Path, row: dict[str, Any]) -> None:
    logger.info("%s", "  ".join(f"{k} {v:.5g}" for k, v in row.items()))
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
