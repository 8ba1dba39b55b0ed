"""The training loop: one straight function over the rooms beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..hooks import Hooks
from .config import TrainConfig
from .distributed import accelerated, ordinary_gradients
from .optimizers import learning_rate, set_learning_rate, text_share
from .planning import Plan
from .progress import Clock, Progress, TrainResult
from .setup import Data, begin, planned
from .watch import Watch

__all__ = ["Plan", "Progress", "TrainResult", "plan", "train"]


def train(
    config: TrainConfig,
    *,
    data: Data,
    base: str | Path,
    out: str | Path,
    device: str | None = None,
    hooks: Hooks | None = None,
    on_cache: Callable[[int, int], None] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> TrainResult:
    """Train an InstructPix2Pix (Brooks et al. 2023, section 3.2), or go on where ``out`` stopped.

    ``data``: what ``train/sources.open_source`` opens. ``base``: what load_model takes, Stable Diffusion (widened) or
    an InstructPix2Pix. ``on_cache`` hears of (rows, all rows) while they are cached, ``on_plan`` of what the run takes
    before its first step. ``hooks.on_result`` hears of each step and its Progress; ``hooks.should_stop`` is asked after
    each step, and True saves and returns an unfinished result. On a GPU what is heard is a step late. Raises
    ConfigError, CheckpointError, DatasetError, Interrupted if it is to stop while it caches, and TrainingError if the
    loss is not finite, naming the last good checkpoint.
    """
    hooks = hooks or Hooks()
    should_stop = hooks.should_stop or bool
    with ordinary_gradients(), accelerated(config, Path(out), device) as accelerator, ExitStack() as held:
        run = begin(config, accelerator, data, base, Path(out), hooks, on_cache or _ignore, on_plan or _ignore, held)
        parameters, optimizers = run.state.parameters, run.state.optimizers
        micro_batches = -(-config.batch_size // run.share.world // run.share.micro)
        run.catch_up()
        watch, step = Watch(accelerator, run.folder, Clock(config.steps, config.batch_size)), run.first
        while step < config.steps and not watch.stopped:
            rate = learning_rate(config, step)
            set_learning_rate(optimizers, rate, text_share(config))

            # 1. Gradients of the whole batch: this process's share of it, a micro-batch at a time.
            loss = torch.zeros((), device=accelerator.device)
            for number in range(micro_batches):
                batch = next(run.stream)
                run.leave_out(batch.broken)
                batch = batch.to(accelerator.device)
                encoded = run.encoder(batch)
                last = number == micro_batches - 1
                with nullcontext() if last else run.no_sync():
                    part = run.objective(run.unet, encoded, batch.draws).sum() / config.batch_size
                    accelerator.backward(part * run.share.world)  # DDP takes the mean over processes
                loss += part.detach()

            # 2. The step, and the average that follows it.
            if config.clip_norm:
                accelerator.clip_grad_norm_(parameters.values(), config.clip_norm)
            run.state.wait()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            run.state.follow(step)

            # 3. What is seen, and what is kept.
            seen = watch.after(step, loss, rate, bool(should_stop()), keeps=run.keeps(step))
            run.keep(step, stopped=watch.stopped)
            for progress in seen:
                hooks.result(progress.step, progress)
                hooks.progress(progress.step, config.steps, progress.note)
        return run.result(step)


def plan(config: TrainConfig, *, data: Data, base: str | Path, out: str | Path, device: str | None = None) -> Plan:
    """What ``train`` with the same arguments would take; loads the networks, times a micro-batch, writes nothing."""
    with ordinary_gradients(), accelerated(config, Path(out), device) as accelerator:
        return planned(config, accelerator, data, base, Path(out))


def _ignore(*told: Any) -> None:
    """Nobody watches."""
