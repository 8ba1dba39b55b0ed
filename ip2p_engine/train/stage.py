"""The loop that trains one network of a world with known truth, made of train's parts: resumable, in processes.

What a step sees follows from (seed, step) alone; every process draws the whole batch and computes its share, so the
number of processes changes only the order of summation.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import Interrupted
from ..hooks import Hooks
from .checkpoints import State
from .config import TrainConfig
from .distributed import accelerated
from .networks import trained_parameters
from .optimizers import Average, learning_rate, make_optimizers, set_learning_rate
from .progress import Clock
from .randomness import stream
from .run_folder import RunFolder
from .watch import Watch

__all__ = ["Stage", "run_stage"]


class Stage(Protocol):
    """One network's part of the loop."""

    config: TrainConfig
    """Steps, batch size, optimiser, learning rates, EMA, seed and checkpoints; what is about data sets is not used."""

    @property
    def trained(self) -> nn.Module: ...

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The whole batch of one step."""
        ...

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of a share of the batch, and figures for the log."""
        ...


class _Loss(nn.Module):
    """A stage's loss as a forward pass, in which several processes find each other's gradients."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.trained, self._loss = stage.trained, stage.loss

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        return self._loss(batch, step)


def run_stage(
    stage: Stage,
    folder: Path,
    *,
    device: str | None = "cpu",
    hooks: Hooks | None = None,
) -> dict[str, Tensor]:
    """Train to the end, or go on where ``folder`` stopped; returns the averaged weights, on the CPU.

    ``hooks.on_result`` hears of each step and its Progress. Raises Interrupted after saving if it is to stop,
    ConfigError for a folder of another run, and TrainingError if the loss is not finite.
    """
    config, hooks = stage.config, hooks or Hooks()
    stopping = hooks.should_stop or bool
    with accelerated(config, folder, device) as accelerator, ExitStack() as held:
        run = RunFolder(folder, writes=accelerator.is_main_process)
        run.refuse_other(config)
        held.enter_context(run.taken())
        network, state = _prepared(stage, accelerator)
        first, _ = run.take_up(state)
        run.begin(config, {"processes": accelerator.num_processes, **run.adjusted(config, first)}, first)
        held.callback(run.draw_curve)
        rank, world = accelerator.process_index, accelerator.num_processes
        watch, step = Watch(accelerator, run, Clock(config.steps, config.batch_size)), first
        while step < config.steps and not watch.stopped:
            rate = learning_rate(config, step)
            set_learning_rate(state.optimizers, rate)
            batch = stage.draw(step, stream(config.seed, "stage", step))
            loss, figures = network({name: v[rank::world].to(accelerator.device) for name, v in batch.items()}, step)
            accelerator.backward(loss)
            state.average.wait()
            for optimizer in state.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            state.average.update(step)
            keeps = step % config.save_every == 0 or step == config.steps
            seen = watch.after(step, loss.detach() / world, rate, bool(stopping()), keeps=keeps, **figures)
            if keeps or watch.stopped:
                run.save(step, state, config.keep)
                accelerator.wait_for_everyone()
            for progress in seen:
                hooks.result(progress.step, progress)
                hooks.progress(progress.step, config.steps, progress.note)
        accelerator.end_training()
        if step < config.steps:
            raise Interrupted(f"stopped after step {step}; the same call goes on")
        with state.average.applied():
            return {name: value.detach().cpu().clone() for name, value in stage.trained.state_dict().items()}


def _prepared(stage: Stage, accelerator: Any) -> tuple[Any, State]:
    """(the loss as Accelerate wraps it, what its steps change)."""
    parameters = trained_parameters(stage.trained.to(accelerator.device).train())
    network, *optimizers = accelerator.prepare(_Loss(stage), *make_optimizers(parameters, stage.config))
    average = Average(parameters, stage.config.ema_decay)
    return network, State(parameters=parameters, average=average, optimizers=optimizers, scaler=accelerator.scaler)
