"""Snapshots of a run's two averages, and any other length made of them (Karras et al. 2024, section 3.2)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.write import write_safetensors
from ..errors import CheckpointError, ConfigError, first_line
from .optimizers import power_exponent

__all__ = ["Snapshot", "coefficients", "combine", "snapshots", "write_snapshot"]

FOLDER, STEP, LENGTHS, STORED = "averages", "step", "sigma_rel", torch.float16
NAME = re.compile(r"step-(\d{8})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One average after one step."""

    path: Path
    number: int
    """Which of the averages in the file."""
    step: int
    sigma_rel: float


def write_snapshot(folder: Path, step: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """The averages by their sigma_rel after a step, in half precision as in the paper; whole or not at all."""
    tensors = {
        f"{number}.{name}": value.detach().cpu().to(STORED)
        for number, values in enumerate(averages.values())
        for name, value in values.items()
    }
    about = {STEP: str(step), LENGTHS: json.dumps(list(averages))}
    write_safetensors(tensors, folder / f"step-{step:08d}.safetensors", about)


def snapshots(run: Path) -> list[Snapshot]:
    """What a run kept, in the order of its steps. Raises CheckpointError where it kept none, or a file is damaged."""
    found = []
    for path in sorted((run / FOLDER).glob("step-*.safetensors")):
        if not NAME.fullmatch(path.name):
            continue
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
            step, lengths = int(about[STEP]), [float(one) for one in json.loads(about[LENGTHS])]
        except Exception as error:  # safetensors raises nearly every class
            raise CheckpointError(
                f"{path} is damaged ({first_line(error)}); delete it, the others do without it"
            ) from error
        found += [Snapshot(path=path, number=n, step=step, sigma_rel=one) for n, one in enumerate(lengths)]
    if not found:
        raise CheckpointError(f"{run} kept no averages to combine; train with `posthoc_every`, such as 500")
    return found


def coefficients(kept: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> list[float]:
    """What each kept average counts in the wanted one; both are (step, sigma_rel).

    Least squares (equation 4) among those that sum to 1, as an average's weights do: where snapshots are too few for
    a length, free ones would sum to less, and no network works with all its weights scaled.
    """
    steps, exponents = (np.array(column, dtype=np.float64) for column in zip(*kept, strict=True))
    exponents = np.array([power_exponent(one) for one in exponents])
    target, exponent = wanted[0], power_exponent(wanted[1])
    matrix = _products(steps[:, None], exponents[:, None], steps[None], exponents[None])
    right = _products(steps, exponents, target, exponent)
    ones = np.ones((1, len(kept)))
    bordered = np.block([[matrix, ones.T], [ones, np.zeros((1, 1))]])  # of Lagrange's multiplier
    return np.linalg.lstsq(bordered, np.append(right, 1.0), rcond=None)[0][:-1].tolist()


def _products(t: Any, a: Any, s: Any, b: Any) -> Any:
    """Inner products of the profiles (a + 1) tau^a / t^(a + 1) up to t and (b + 1) tau^b / s^(b + 1) up to s."""
    ratio, exponent = t / s, np.where(t < s, b, -a)
    return (a + 1) * (b + 1) * ratio**exponent / ((a + b + 1) * np.maximum(t, s))


def combine(kept: Sequence[Snapshot], sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of a length after a step (None: the last that is kept), float32.

    Raises ConfigError for a length or a step that the snapshots do not reach.
    """
    last = kept[-1].step if step is None else step
    used = [one for one in kept if one.step <= last]
    if not used or used[-1].step != last:
        known = ", ".join(str(n) for n in sorted({one.step for one in kept}))
        raise ConfigError(f"there is no average after step {last}; choose among {known}")
    factors = coefficients([(one.step, one.sigma_rel) for one in used], (last, sigma_rel))
    total: dict[str, Tensor] = {}
    for one, factor in zip(used, factors, strict=True):
        with safe_open(one.path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                number, _, own = name.partition(".")
                if int(number) == one.number:
                    part = file.get_tensor(name).float() * factor
                    total[own] = part if own not in total else total[own].add_(part)
    return total
