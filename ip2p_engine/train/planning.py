"""What a run is about to take, told before it takes it: pairs, steps, memory, time, disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import size_text
from ..networks.conditioning import TextEmbedding
from ..networks.model import Model
from .config import TrainConfig
from .encoding import Encoded
from .objective import Objective
from .randomness import draw

__all__ = ["Plan", "plan_of", "seconds_of_a_micro_batch"]

# Bytes that an optimiser keeps for each trained number.
STATES = {"adamw": 8, "adamw8bit": 2, "muon": 4, "adafactor": 1, "lion": 4, "prodigy": 16}
SUPPOSED_WIDTH = 77  # tokens of a text


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is about to do; sizes in bytes."""

    pairs: int | None
    """To train on; None of a stream, which has no end."""
    held_out: int
    """Left out of training, to measure on."""
    test_pairs: int
    """Of the test split, and trained on all the same."""
    first: int
    """Steps that are done already."""
    steps: int
    batch_size: int
    trained: int
    """Numbers that are trained."""
    frozen: int
    device: str
    memory: int
    """Weights, gradients, optimiser states and average, without activations."""
    seconds: float | None
    """Of the steps to come, estimated from a timed micro-batch of noise; None where none was timed."""
    checkpoint: int
    """Of one state to go on from."""
    cache: int
    outputs: int
    """Of what a finished run leaves."""
    exports: int
    free: int
    """On the disk."""

    @property
    def steps_an_epoch(self) -> float | None:
        return None if self.pairs is None else self.pairs / self.batch_size

    @property
    def disk(self) -> int:
        """At the most: two checkpoints while one is replaced, and all that is kept."""
        return 2 * self.checkpoint + self.cache + self.outputs + self.exports

    def __str__(self) -> str:
        return "\n".join(f"{name:<10} {value}" for name, value in _lines(self))

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "steps_an_epoch": self.steps_an_epoch, "disk": self.disk}


def plan_of(
    config: TrainConfig,
    model: Model,
    out: Path,
    *,
    pairs: int | None,
    test_pairs: int,
    held_out: int,
    first: int,
    seconds: float | None = None,
) -> Plan:
    """The plan of a run whose networks are loaded."""
    networks = (model.unet, model.autoencoder, *model.text_encoders)
    trained = sum(p.numel() for network in networks for p in network.parameters() if p.requires_grad)
    frozen = [p for network in networks for p in network.parameters() if not p.requires_grad]
    states = STATES[config.optimizer] + (4 * len(config.posthoc_lengths) if config.posthoc_every else 0)
    whole = sum(4 * p.numel() for p in model.unet.parameters()) + _bytes(networks[1:])
    forms = {
        "ema": whole,
        "raw": whole,
        "diffusers": 4 * (trained + sum(p.numel() for p in frozen)),
        "lora": 4 * trained,
    }
    outputs = sum(forms[kind] for kind in config.outputs or ())
    exported = config.steps // config.export_every if config.export_every else 0
    snapshots = -(-config.steps // config.posthoc_every) if config.posthoc_every else 0
    return Plan(
        pairs=pairs,
        held_out=held_out,
        test_pairs=test_pairs,
        first=first,
        steps=config.steps,
        batch_size=config.batch_size,
        trained=trained,
        frozen=sum(p.numel() for p in frozen),
        device=str(model.device),
        memory=trained * (4 + 4 + 4 + states) + sum(p.numel() * p.element_size() for p in frozen),
        seconds=seconds,
        checkpoint=trained * (4 + 4 + states),
        cache=(pairs or 0) * _cached_bytes(config, model) if config.cache else 0,
        outputs=outputs,
        exports=exported * outputs + snapshots * 2 * 2 * trained,
        free=shutil.disk_usage(_existing(out)).free,
    )


def seconds_of_a_micro_batch(
    model: Model, unet: Any, objective: Objective, null: TextEmbedding, micro: int, config: TrainConfig
) -> float:
    """The second of two passes, forward and back, over latents of noise; gradients are thrown away."""
    side = config.resolution // 8
    device = model.device
    draws = draw(0, 0, range(micro), (4, side, side))
    moved = type(draws)(**{name: value if name == "level" else value.to(device) for name, value in vars(draws).items()})
    latents, condition = (
        torch.zeros(micro, channels, side, side, device=device) for channels in (4, model.spec.in_channels - 4)
    )
    tokens = null.tokens.expand(micro, -1, -1)
    pooled = None if null.pooled is None else null.pooled.expand(micro, -1)
    sizes = torch.full((micro, 6), config.resolution, device=device)
    encoded = Encoded(
        mean=latents, std=latents, condition=condition, text=TextEmbedding(tokens=tokens, pooled=pooled), size_ids=sizes
    )
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        objective(unet, encoded, moved).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begun
    model.unet.zero_grad()
    return seconds


def _bytes(networks: Any) -> int:
    return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())


def _cached_bytes(config: TrainConfig, model: Model) -> int:
    """Of one pair: its variants' three latents, and a text of its own."""
    size = 4 if config.precision == "float32" else 2
    width = sum(int(encoder.config.hidden_size) for encoder in model.text_encoders)
    return config.variants * 3 * 4 * (config.resolution // 8) ** 2 * size + SUPPOSED_WIDTH * width * size


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _lines(plan: Plan) -> list[tuple[str, str]]:
    epoch = plan.steps_an_epoch
    rate = "" if epoch is None else f", {epoch:,.1f} an epoch, {(plan.steps - plan.first) / epoch:,.1f} epochs to come"
    pairs = "a stream" if plan.pairs is None else f"{plan.pairs:,}"
    pairs += f"; {plan.held_out:,} held out" if plan.held_out else ""
    pairs += f"; {plan.test_pairs:,} of the test split among them" if plan.test_pairs else ""
    disk = f"{size_text(plan.disk)} at the most, of {size_text(plan.free)} free: one state {size_text(plan.checkpoint)}"
    parts: Mapping[str, int] = {"cache": plan.cache, "outputs": plan.outputs, "exports": plan.exports}
    disk += "".join(f", {name} {size_text(value)}" for name, value in parts.items() if value)
    lines = [
        ("pairs", pairs),
        ("steps", f"{plan.first:,} of {plan.steps:,} done{rate}"),
        ("trains", f"{plan.trained / 1e6:,.1f} M numbers beside {plan.frozen / 1e6:,.1f} M frozen ones"),
        ("memory", f"{size_text(plan.memory)} on {plan.device}, and activations"),
        ("disk", disk),
    ]
    return lines + ([("time", f"about {_duration(plan.seconds)}")] if plan.seconds is not None else [])


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
