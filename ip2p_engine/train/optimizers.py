"""Optimisers by name, and the learning rate of each step."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoint.training_run import TEXT_PREFIXES
from ..errors import ConfigError
from .config import TrainConfig

__all__ = [
    "Average",
    "Muon",
    "PowerAverage",
    "check_packages",
    "decay_at",
    "is_matrix",
    "learning_rate",
    "make_optimizers",
    "orthogonalise",
    "power_exponent",
    "set_learning_rate",
    "text_share",
]

PACKAGES = {"adamw8bit": "bitsandbytes", "lion": "lion-pytorch", "prodigy": "prodigyopt"}
TEXT = "text"
WIDEST = 12**-0.5  # of an even average over the whole run
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def make_optimizers(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of a run: one, or for muon two, the matrices' and the rest's."""
    if config.optimizer == "adamw":
        return [_adamw(_groups(parameters), config)]
    if config.optimizer == "adamw8bit":
        return [_adamw8bit(_groups(parameters), config)]
    if config.optimizer in LIBRARY:
        return [LIBRARY[config.optimizer](_groups(parameters), config)]
    matrices = {name: p for name, p in parameters.items() if is_matrix(name, p)}
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    muon = [Muon(_groups(matrices), lr=config.learning_rate)] if matrices else []
    return [*muon, *([_adamw(_groups(rest), config)] if rest else [])]


def _groups(parameters: Mapping[str, nn.Parameter]) -> list[Any]:
    """The parameters, or where text encoders are among them two groups, the second marked as theirs."""
    text = [p for name, p in parameters.items() if name.startswith(TEXT_PREFIXES)]
    rest = [p for name, p in parameters.items() if not name.startswith(TEXT_PREFIXES)]
    return [{"params": rest}, {"params": text, TEXT: True}] if text else rest


def check_packages(config: TrainConfig) -> None:
    """Raises ConfigError for an extra that the run will need and that is missing."""
    needed = {"peft": ("LoRA", config.lora_rank > 0)}
    needed |= {package: (name, config.optimizer == name) for name, package in PACKAGES.items()}
    for package, (what, is_needed) in needed.items():
        if is_needed and find_spec(package.replace("-", "_")) is None:
            raise ConfigError(f"{what} needs {package}, which is missing; pip install {package}")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of a step counted from 0: a linear warm-up, then constant, or down to 0 along a line, a power or cosines."""
    warm = min(1.0, (step + 1) / config.warm_up) if config.warm_up else 1.0
    return config.learning_rate * warm * _fall(config, step / config.steps)


def _fall(config: TrainConfig, done: float) -> float:
    """The share of the rate that is left after a share of the steps."""
    if config.schedule == "constant":
        return 1.0
    if config.schedule in ("linear", "polynomial"):
        return (1 - done) ** (config.schedule_power if config.schedule == "polynomial" else 1)
    cycle = done if config.schedule == "cosine" else config.schedule_restarts * done % 1
    return 0.5 * (1 + math.cos(math.pi * cycle))


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float, text_share: float = 1.0) -> None:
    """Use a learning rate in every group from now on, ``text_share`` of it in the text encoders'."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * text_share if group.get(TEXT) else rate


def text_share(config: TrainConfig) -> float:
    """The text encoders' learning rate over the UNet's."""
    return 1.0 if config.text_learning_rate is None else config.text_learning_rate / config.learning_rate


def _adamw(parameters: list[Any], config: TrainConfig) -> torch.optim.Optimizer:
    """Fused: one kernel for all tensors, on GPUs and CPUs."""
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    fused = first.device.type in ("cuda", "cpu")
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=fused
    )


def _adamw8bit(parameters: list[Any], config: TrainConfig) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError("adamw8bit needs bitsandbytes, which is missing; pip install bitsandbytes") from error
    return AdamW8bit(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)


def _adafactor(parameters: list[Any], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def _lion(parameters: list[Any], config: TrainConfig) -> torch.optim.Optimizer:
    from lion_pytorch import Lion

    return Lion(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)


def _prodigy(parameters: list[Any], config: TrainConfig) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    with redirect_stdout(io.StringIO()):  # it prints how it decays, among what a command prints for programs
        return Prodigy(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)


LIBRARY = {"adafactor": _adafactor, "lion": _lion, "prodigy": _prodigy}


def decay_at(updates: int, highest: float) -> float:
    """min(highest, (1 + n) / (10 + n)) for the n-th update, counted from 1: the first one has 2/11."""
    return min(highest, (1 + updates) / (10 + updates))


def power_exponent(sigma_rel: float) -> float:
    """gamma of the average whose width is ``sigma_rel`` of the run (Karras et al. 2024, equation 3 and algorithm 2)."""
    if not 0 < sigma_rel < WIDEST:
        raise ConfigError(f"sigma_rel is {sigma_rel}; give a number above 0 and below {WIDEST:.4f}, such as 0.1")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class Average:
    """Averages of some parameters. On a GPU it is updated on a stream of its own, beside the next step's work."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], highest: float) -> None:
        self._parameters, self._highest = dict(parameters), highest
        self.values: dict[str, Tensor] = {name: p.detach().clone().float() for name, p in parameters.items()}
        first = next(iter(self._parameters.values()))
        self._stream = torch.cuda.Stream(first.device) if first.is_cuda else None

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the parameters; ``updates`` counts this one. Call ``wait`` before the parameters change."""
        weight = self._weight(updates)
        if self._stream is None:
            self._move(weight)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._move(weight)

    def _weight(self, updates: int) -> float:
        """Of the parameters as they are."""
        return 1 - decay_at(updates, self._highest)

    def wait(self) -> None:
        """Let what follows on the GPU come after the last update."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in the parameters' place until the block ends."""
        self.wait()
        raw = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._assign(self.values)
            yield
        finally:
            self._assign(raw)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def _move(self, weight: float) -> None:
        averages, current = list(self.values.values()), [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(averages, current, weight)


class PowerAverage(Average):
    """Step n counts as n^gamma: a profile that grows with the run (Karras et al. 2024, equation 2)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], sigma_rel: float) -> None:
        super().__init__(parameters, 1.0)
        self.sigma_rel, self._exponent = sigma_rel, power_exponent(sigma_rel)

    def _weight(self, updates: int) -> float:
        return 1 - (1 - 1 / updates) ** (self._exponent + 1)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Approximate U V^T of a matrix's singular value decomposition by a quintic Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum; the step is scaled to the size of an AdamW step (0.2 sqrt(max side))."""

    def __init__(self, parameters: Iterable[Any], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            parameters = group["params"]
            updates = [torch.zeros_like(p) for p in parameters]
            for position, (parameter, update) in enumerate(zip(parameters, updates, strict=True)):
                direction = self._direction(parameter, group["momentum"])
                if position % world == rank:
                    update.copy_(_scaled(direction))
            if world > 1:
                _sum_over_processes(updates)
            most = max(torch.finfo(parameter.dtype).max for parameter in parameters)  # torch raises for more
            torch._foreach_add_(parameters, updates, alpha=-min(group["lr"], most))

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        gradient: Any = parameter.grad
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter; tables, first and last layers, norms and biases are AdamW's."""
    outer = any(word in name for word in ("embedding", "conv_in", "conv_out", "logit_scale"))
    return parameter.ndim >= 2 and not outer


def _scaled(direction: Tensor) -> Tensor:
    matrix = direction.reshape(direction.shape[0], -1)
    return (orthogonalise(matrix) * (0.2 * max(matrix.shape) ** 0.5)).view_as(direction)


def _sum_over_processes(tensors: list[Tensor]) -> None:
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
