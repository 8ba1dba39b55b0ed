"""A finished run's model with an average of any length, and which length its validation pairs like best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.training_run import base_of, settings_of
from ..config import from_mapping
from ..errors import CheckpointError, ConfigError
from ..hooks import Hooks
from ..networks.model import Model, load_model
from .config import TrainConfig
from .encoding import Encoder
from .networks import finished, make_trainable, needs_masks, trained_of, trained_texts
from .optimizers import Average
from .snapshots import combine, snapshots
from .sources import open_source
from .validation import ValidationSet

__all__ = ["length_losses", "model_of_length"]


def model_of_length(run: Path, sigma_rel: float, *, step: int | None = None, base: str | None = None) -> Model:
    """The run's model with the average of a length, whole. ``base`` where the run's own has moved."""
    kept = snapshots(run)
    config, source = _of_run(run, base)
    state = combine(kept, sigma_rel, step)
    model = make_trainable(load_model(source, device="cpu", dtype="file"), config)
    _assign(trained_of(model), state, run)
    whole = finished(model, load_model(source, device="cpu", dtype="file"), config)
    return replace(whole, spec=replace(whole.spec, weights="ema"))


def length_losses(
    run: Path,
    lengths: Sequence[float],
    *,
    data: Any,
    base: str | None = None,
    device: str | None = None,
    hooks: Hooks | None = None,
) -> list[tuple[float, float]]:
    """(sigma_rel, validation loss) of averages after the last step that is kept, on the run's validation pairs."""
    kept, hooks = snapshots(run), hooks or Hooks()
    config, source = _of_run(run, base)
    model = make_trainable(load_model(source, device="cpu", dtype="file"), config).to(device or "cpu")
    masks = needs_masks(model, config)
    pairs = ValidationSet(open_source(data, config), replace(config, validate_with=None), masks=masks)
    parameters, encoder = trained_of(model), Encoder(model, trained_texts(model))
    found = []
    for done, sigma_rel in enumerate(lengths, start=1):
        hooks.check_stop(f"stopped after {done - 1} of {len(lengths)} averages")
        _assign(parameters, combine(kept, sigma_rel), run)
        losses = pairs.losses(model, Average(parameters, 0.0), encoder, config.micro_batch or 4)
        if not losses:
            raise ConfigError(f"{run} has no validation pairs; give data with some")
        found.append((sigma_rel, losses["raw"]))
        hooks.progress(done, len(lengths))
    return found


def _of_run(run: Path, base: str | None) -> tuple[TrainConfig, str]:
    """(the run's config, what it was trained from)."""
    about = settings_of(run)
    return from_mapping(TrainConfig, about["config"]), base or base_of(about)


@torch.no_grad()
def _assign(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], run: Path) -> None:
    if parameters.keys() != state.keys():
        raise CheckpointError(f"{run} kept averages of other weights than its base has; give its base")
    for name, parameter in parameters.items():
        parameter.copy_(state[name])
