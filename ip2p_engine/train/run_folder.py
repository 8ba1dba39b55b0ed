"""The folder of a run: what was asked for, the loss of every step, the curve, the pictures.

run.json  log.jsonl  loss.png  checkpoints/  validation/  cache/  exports/, and what ``outputs`` names
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..checkpoint.training_run import CHECKPOINTS, EXPORTS, RUN
from ..config import versions_of
from ..errors import ConfigError
from ..files import AppendLog, disk_errors, json_lines, locked, read_json, sweep, whole_file, write_json
from ..images import save_image
from ..networks.model import ModelSpec
from .checkpoints import State, latest, load_checkpoint, save_checkpoint, step_of
from .config import ADJUSTABLE, TrainConfig, changed_fields, with_outputs

__all__ = [
    "RunFolder",
    "first_difference",
    "other_spec",
]

SHOWN = 40
# The rest of a spec is recommendations, which another version may correct.
COMPUTED_WITH = (
    "family",
    "in_channels",
    "prediction",
    "scaled_condition",
    "latent_scale",
    "schedule",
    "beta_start",
    "beta_end",
    "sigma_min",
    "sigma_max",
    "zero_snr",
)
VERSIONED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
CURVE_SIZE = (900, 420)
MARGIN = (64, 28, 16, 52)
SMOOTHING = 50
VALIDATED = {"raw": (230, 120, 20), "ema": (20, 140, 60)}
log = logging.getLogger(__name__)


class RunFolder:
    """One run on the disk; only the first of several processes writes."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.checkpoints, self.validation, self.cache = (path / n for n in (CHECKPOINTS, "validation", "cache"))
        self.exports, self.averages = path / EXPORTS, path / "averages"
        self.curve, self._rows_file = path / "loss.png", path / "log.jsonl"
        self._validation_file = path / "validation.jsonl"
        self._log: AppendLog | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Keep other runs out of the folder; raises ConfigError if one is at work in it."""
        if not self.writes:
            yield
            return
        with disk_errors(self.path, "written", ConfigError):
            self.path.mkdir(parents=True, exist_ok=True)
        refusal = f"{self.path} is being trained in by another process; wait for it, or train in a new folder"
        with locked(self.path / ".lock", refusal, ConfigError):
            sweep(self.path)
            yield

    def begin(self, config: TrainConfig, about: Mapping[str, Any], first: int) -> None:
        """Record what is about to happen, and forget rows that a killed run logged beyond its checkpoint."""
        if not self.writes:
            return
        with disk_errors(self.path, "written", ConfigError):
            said = {"config": asdict(config), "versions": versions_of(*VERSIONED), "directory": os.getcwd(), **about}
            write_json(self.path / RUN, said)
            rows = [row for row in self.rows() if row["step"] <= first]
            with whole_file(self._rows_file) as stream:
                stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            if known := self.validations():
                with whole_file(self._validation_file) as stream:
                    stream.write("".join(json.dumps(row) + "\n" for row in known if row["step"] <= first).encode())
        self._log = AppendLog(self._rows_file, ConfigError)

    def append(self, row: Mapping[str, Any]) -> None:
        """Log a step."""
        if self._log is not None:
            self._log.append(dict(row))

    def append_validation(self, row: Mapping[str, Any]) -> None:
        """Note the losses on the pairs that stay the same, once a step."""
        if row["step"] not in {known["step"] for known in self.validations()}:
            AppendLog(self._validation_file, ConfigError).append(dict(row))

    def validation_picture(self, step: int) -> Path:
        """Where the edits of a step are shown."""
        return self.validation / f"step-{step:08d}.png"

    def validations(self) -> list[dict[str, Any]]:
        """What was noted: step, losses raw and ema, whether the pairs are held out, and CLIP's scores of the edits.

        Where scores are, losses may be missing.
        """
        found = json_lines(self._validation_file, ConfigError, growing=True) if self._validation_file.exists() else ()
        rows = list(found)
        needed = [("step", "clip_image") if not {"raw", "ema"} & set(row) else ("step", "raw", "ema") for row in rows]
        numbers = [[row.get(name) for name in names] for row, names in zip(rows, needed, strict=True)]
        if not all(type(value) in (int, float) for values in numbers for value in values):
            raise ConfigError(f"{self._validation_file} has a row without step, raw and ema; remove the line")
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """The logged steps; a last line that a killed writer left half done is left out."""
        rows = list(json_lines(self._rows_file, ConfigError, growing=True)) if self._rows_file.exists() else []
        for number, row in enumerate(rows, start=1):
            if type(row.get("step")) is not int or type(row.get("loss")) not in (int, float):
                raise ConfigError(f"{self._rows_file}, row {number}, has no step and loss; remove the line")
        return rows

    def take_up(self, state: State) -> tuple[int, dict[str, None]]:
        """(steps that are done, rows that were broken) of the last checkpoint, whose state is loaded."""
        checkpoint = latest(self.checkpoints)
        if checkpoint is None:
            return 0, {}
        saved = load_checkpoint(checkpoint)
        state.load(saved, str(checkpoint))
        log.info("%s goes on after step %d", self.path, saved["step"])
        return saved["step"], dict.fromkeys(saved["broken"])

    def save(self, step: int, state: State, keep: int, broken: Sequence[str] = ()) -> None:
        """A checkpoint after ``step`` steps, of which the last ``keep`` are kept; every process calls this."""
        saved = state.saved(latest(self.checkpoints))
        if self.writes:
            save_checkpoint(self.checkpoints, step, {**saved, "broken": list(broken)}, keep=max(1, keep))
            self.draw_curve()

    def export_folder(self, step: int) -> Path:
        """Where the models of a step are written while the run goes on."""
        return self.exports / f"step-{step:08d}"

    def outputs(self, config: TrainConfig) -> TrainConfig:
        """The config with what this run leaves filled in."""
        about = self._saved()
        return with_outputs(config, about.get("config") if isinstance(about, dict) else None)

    def draw_curve(self) -> None:
        """loss.png: each step's loss, and their running mean; nothing before the first step."""
        if self.writes and (rows := self.rows()):
            save_image(curve([row["loss"] for row in rows], self.validations()), self.curve)

    def recent_loss(self) -> float:
        """Mean over the last 50 steps."""
        recent = [row["loss"] for row in self.rows()[-SMOOTHING:]]
        return sum(recent) / max(1, len(recent))

    def refuse_other(self, config: TrainConfig) -> None:
        """Raises ConfigError if the folder holds a run whose steps would have had other results."""
        about = self._saved()
        if about is None:
            return
        saved = about.get("config", {}) if isinstance(about, dict) else about
        if latest(self.checkpoints) is None and (gone := self._finished_step()):
            raise ConfigError(
                f"{self.path} holds a run that is finished after {gone} steps and kept no checkpoint to go on from; "
                "train in a new folder, from its ema.safetensors if you like"
            )
        finished = step_of(latest(self.checkpoints)) >= config.steps
        changed = [name for name in changed_fields(saved, config) if finished or name not in ADJUSTABLE]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"{self.path} holds a run with {name} {saved.get(name)!r} and now it is {getattr(config, name)!r}; "
                "go on with the same settings, or train in a new folder"
            )

    def refuse_other_origin(self, spec: ModelSpec, *, data_digest: str, base_digest: str) -> None:
        """Raises ConfigError if the folder's run began with other data or another base; earlier versions noted none."""
        about = self._saved() or {}
        other_data = about.get("data_digest", data_digest) != data_digest
        other_base = about.get("base_digest", base_digest) != base_digest
        changed = other_spec(about.get("spec", {}), spec)
        if other_data or other_base or changed:
            what = "on other pairs" if other_data else "from another base"
            what += f" (whose {changed[0]} is {about['spec'][changed[0]]})" if changed and not other_data else ""
            raise ConfigError(
                f"{self.path} was trained {what}; give what it began with, or train in a new folder (in ComfyUI: "
                "under another name)"
            )

    def adjusted(self, config: TrainConfig, first: int) -> dict[str, Any]:
        """Settings changed on the way, as {"changes": [{after_step, name: [before, then]}]}; warns of new ones."""
        about = self._saved() or {}
        if not first:
            return {}
        changes = [{**one, "after_step": min(one["after_step"], first)} for one in about.get("changes", [])]
        before, now = about.get("config", {}), asdict(config)
        # Under a constant rate more steps change nothing that was there before.
        noted = ADJUSTABLE | ({"steps"} if config.schedule != "constant" else set())
        new = {name: [before[name], now[name]] for name in sorted(noted & before.keys())}
        new = {name: values for name, values in new.items() if values[0] != values[1]}
        for name, (old, chosen) in new.items() if self.writes else ():
            log.warning("%s goes on after step %d with %s %s instead of %s", self.path, first, name, chosen, old)
        changes += [{"after_step": first, **new}] if new else []
        return {"changes": changes} if changes else {}

    def _finished_step(self) -> int:
        """After which step what the folder gives away was written; 0 where there is nothing yet."""
        rows = self.rows() if any((self.path / f"{kind}.safetensors").exists() for kind in ("ema", "raw")) else []
        return int(rows[-1]["step"]) if rows else 0

    def _saved(self) -> Any:
        """What run.json says; None where there is none yet."""
        path = self.path / RUN
        if not path.exists():
            return None
        about = read_json(path, ConfigError)
        kinds = {"config": dict, "spec": dict, "changes": list}
        sound = isinstance(about, dict) and all(
            isinstance(about.get(name, kind()), kind) for name, kind in kinds.items()
        )
        if not sound or not all(
            isinstance(one, dict) and type(one.get("after_step")) is int for one in about.get("changes", [])
        ):
            raise ConfigError(f"{path} is no training run's; restore it from a copy, or train in a new folder")
        return about


def curve(losses: Sequence[float], validations: Sequence[Mapping[str, Any]] = ()) -> Image.Image:
    """A plot of losses over steps: points in grey, the mean of the last 50 in blue, from 0 up to round numbers.

    Losses on validation pairs are lines through circles: orange by the raw weights, green by their average.
    """
    canvas = Image.new("RGB", CURVE_SIZE, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    validations = [row for row in validations if "raw" in row]
    left, top, right, bottom = MARGIN[0], MARGIN[1], CURVE_SIZE[0] - MARGIN[2], CURVE_SIZE[1] - MARGIN[3]
    shown = [*_trimmed(losses), *(row[kind] for row in validations for kind in VALIDATED)]
    high = 1.05 * max(shown, default=1.0) or 1.0

    def place(step: float, loss: float) -> tuple[float, float]:
        x = left + (right - left) * step / max(1, len(losses))
        return x, bottom - (bottom - top) * min(loss, high) / high

    for value in _ticks(high):
        y = place(0, value)[1]
        draw.line((left, y, right, y), fill=(225, 225, 225))
        draw.text((left - 6, y), f"{value:g}", fill=(60, 60, 60), font=font, anchor="rm")
    for value in _ticks(len(losses), least=1):
        draw.text((place(value, 0)[0], bottom + 8), f"{value:g}", fill=(60, 60, 60), font=font, anchor="ma")
    legend = "loss: each step grey, mean of the last 50 blue"
    legend += "; validation: raw orange, average green" if validations else ""
    draw.text((right, top - 8), legend, fill=(60, 60, 60), font=font, anchor="rb")
    draw.text(((left + right) / 2, CURVE_SIZE[1] - 6), "step", fill=(60, 60, 60), font=font, anchor="ms")
    for x, y in (place(step, loss) for step, loss in enumerate(losses, start=1)):
        draw.rectangle((x - 1, y - 1, x + 1, y + 1), fill=(190, 190, 190))
    draw.line([place(n, value) for n, value in enumerate(_running_mean(losses), start=1)], fill=(30, 90, 200), width=2)
    for kind, colour in VALIDATED.items() if validations else ():
        points = [place(row["step"], row[kind]) for row in validations]
        draw.line(points, fill=colour, width=2)
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), outline=colour, width=2)
    return canvas


def _ticks(high: float, least: float = 0.0) -> list[float]:
    """Four to ten round numbers from 0 to ``high`` at most, no closer than ``least``."""
    power = 10.0 ** math.floor(math.log10(high or 1.0))
    step = next(width for width in (power / 10, power / 5, power / 2, power, 2 * power) if high / width <= 9.5)
    step = max(step, least)
    return [round(n * step, 12) for n in range(math.floor(high / step + 1e-9) + 1)]


def _trimmed(losses: Sequence[float]) -> list[float]:
    """Without the largest percent, which would flatten the rest."""
    return sorted(losses)[: max(1, round(0.99 * len(losses)))] if losses else []


def _running_mean(losses: Sequence[float]) -> list[float]:
    windows = (losses[max(0, n - SMOOTHING) : n] for n in range(1, len(losses) + 1))
    return [sum(window) / len(window) for window in windows]


def other_spec(saved: Mapping[str, Any], spec: ModelSpec) -> list[str]:
    """What a step computes with and is not as it was saved."""
    return [name for name in COMPUTED_WITH if name in saved and saved[name] != getattr(spec, name)]


def first_difference(one: str, other: str) -> tuple[str, str]:
    """The part of two long texts in which they first differ."""
    start = max(0, len(os.path.commonprefix([one, other])) - SHOWN)
    first, second = (text[start : start + 2 * SHOWN] for text in (one, other))
    return first, second
