"""The report card: what a checkpoint is, told without loading it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch

from ..files import NO_JSON, public_name, sha256_of, size_text
from .build import check_bundle
from .source import EMBEDDED, open_bundle
from .spec import BASE_NAMES, Bundle, Part, autoencoder_dtype
from .write import TRAINING_KEY

__all__ = ["ReportCard", "report_card", "training_settings"]

ACTIVATIONS_PER_PIXEL = 60
DECODER_COPIES = 4
BRANCHES = 3
WIDTH = 105
UNSAID: tuple[Any, ...] = (None, False, 0, "", [])
"""Settings that a card leaves out; its JSON has all."""
TASKS = {4: "text to image", 8: "InstructPix2Pix", 12: "InstructPix2Pix with a mask"}


@dataclass(frozen=True, kw_only=True)
class ReportCard:
    """What a checkpoint is and how to use it; sizes in bytes."""

    source: str
    layout: str
    """ldm, ldm-unet, diffusers, diffusers-unet, or run (a step of a training run)."""
    base: str
    """SD1.5, SD2, SDXL, CosXL or embedded."""
    task: str
    """InstructPix2Pix, InstructPix2Pix with a mask, or text to image."""
    in_channels: int
    prediction: str
    schedule: str
    condition: str
    """Whether the latent scale multiplies the image condition: unscaled or scaled; none without a picture."""
    has_ema: bool
    weights: str
    """The UNet weights that loading takes: ema, raw or only."""
    parameters: dict[str, int]
    dtypes: dict[str, str]
    lacking: tuple[str, ...]
    """Networks that a base has to give."""
    file_bytes: int
    text_cfg: float
    image_cfg: float
    resolution: int
    steps: int
    guidance: str
    """The formula of the two scales."""
    suffix: str
    """Said after each instruction."""
    memory: dict[str, int]
    """An estimate for one edit at the recommended resolution, all branches in one batch, by type."""
    training: dict[str, Any]
    """The run that made it, as far as the file says."""
    sha256: dict[str, str]
    """{path inside the folder, or the file's name: SHA-256}, on request."""

    def to_json(self) -> str:
        """The card as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    def __str__(self) -> str:
        return "\n".join(f"{name:<12} {value}" for name, value in _lines(self))


def report_card(source: str | Path, sha256: bool = False, *, weights: str = "ema") -> ReportCard:
    """Describe a checkpoint; of safetensors the header alone is read.

    Raises CheckpointError where loading would, but for values: NaN is not looked for.
    """
    bundle = open_bundle(source, weights=weights, header_only=True)
    check_bundle(bundle)
    spec, parts = bundle.spec, _parts(bundle)
    return ReportCard(
        source=public_name(source),
        layout=bundle.layout,
        base="embedded" if source in EMBEDDED else BASE_NAMES[spec.family],
        task=TASKS[spec.in_channels],
        in_channels=spec.in_channels,
        prediction=spec.prediction,
        schedule=spec.schedule + (", zero terminal SNR" if spec.zero_snr else ""),
        condition="none" if spec.in_channels == 4 else "scaled" if spec.scaled_condition else "unscaled",
        has_ema=bundle.ema_parameters > 0,
        weights=spec.weights,
        parameters={name: part.parameters for name, part in parts.items()},
        dtypes={name: _type_names(part) for name, part in parts.items()},
        lacking=tuple(name for name in ("autoencoder", "text_encoder") if name not in parts),
        file_bytes=sum(path.stat().st_size for path in bundle.files),
        text_cfg=spec.text_cfg,
        image_cfg=spec.image_cfg,
        resolution=spec.resolution,
        steps=spec.steps,
        guidance=spec.guidance,
        suffix=spec.suffix,
        memory={name: _memory(bundle, getattr(torch, name)) for name in ("float16", "float32")},
        training=training_settings(bundle),
        sha256={_name_inside(bundle, path): sha256_of(path) for path in bundle.files} if sha256 else {},
    )


def _parts(bundle: Bundle) -> dict[str, Part]:
    texts = zip(("text_encoder", "text_encoder_2"), bundle.text_encoders, strict=False)
    autoencoder = {} if bundle.autoencoder is None else {"autoencoder": bundle.autoencoder}
    return {"unet": bundle.unet, **autoencoder, **dict(texts)}


def _type_names(part: Part) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in part.dtypes)


def _memory(bundle: Bundle, dtype: torch.dtype) -> int:
    """Weights, and the larger of the UNet's and the decoder's activations."""
    kept = autoencoder_dtype(bundle.spec.family, dtype)
    types = {"autoencoder": kept}
    weights = sum(part.parameters * types.get(part.kind, dtype).itemsize for part in _parts(bundle).values())
    latent = (bundle.spec.resolution // 8) ** 2
    unet = BRANCHES * latent * bundle.unet.config["block_out_channels"][0] * ACTIVATIONS_PER_PIXEL * dtype.itemsize
    if bundle.autoencoder is None:
        return weights + unet
    width = bundle.autoencoder.config["block_out_channels"][0]
    return weights + max(unet, latent * 64 * width * DECODER_COPIES * kept.itemsize)


def training_settings(bundle: Bundle) -> dict[str, Any]:
    """Our own run's settings from the header or the folder, or the counters that Lightning leaves in a pickle."""
    saved = bundle.metadata.get(TRAINING_KEY)
    beside = bundle.path / f"{TRAINING_KEY}.json"
    if saved is None and beside.is_file():
        saved = beside.read_text(encoding="utf-8", errors="replace")
    if saved is not None:
        try:
            return dict(json.loads(saved))
        except (*NO_JSON, TypeError):
            return {"unreadable": saved[:200]}
    counters = ("global_step", "epoch", "pytorch-lightning_version")
    return {name: value for name in counters if isinstance(value := bundle.leftovers.get(name), int | str)}


def _name_inside(bundle: Bundle, path: Path) -> str:
    return path.relative_to(bundle.path).as_posix() if bundle.path.is_dir() else path.name


def _lines(card: ReportCard) -> list[tuple[str, str]]:
    channels = f"{card.task}, {card.in_channels} input channels"
    lines = [
        ("checkpoint", card.source),
        ("layout", card.layout),
        ("base", f"{card.base}; {channels}"),
        ("prediction", f"{card.prediction}, {card.schedule} schedule"),
        ("condition", f"{card.condition} image latent" if card.condition != "none" else "text alone"),
        ("weights", {"ema": "ema (averaged)", "raw": "raw (not averaged)"}.get(card.weights, "the only ones")),
        *((name, f"{count / 1e6:.1f} M parameters, {card.dtypes[name]}") for name, count in card.parameters.items()),
        ("file", f"{size_text(card.file_bytes)}{', with raw and ema weights' if card.has_ema else ''}"),
        ("use", f"s_T {card.text_cfg}, s_I {card.image_cfg}, {card.resolution} px, {card.steps} steps"),
        *((name, said) for name, said, plain in _asks(card) if said != plain),
        ("memory", ", ".join(f"about {size_text(value)} in {name}" for name, value in card.memory.items())),
    ]
    if card.lacking:
        lines.append(("lacking", f"{', '.join(card.lacking)}: name a base that gives them"))
    lines += _tail(card.training, card.sha256)
    return lines


def _asks(card: ReportCard) -> list[tuple[str, str, str]]:
    """(name, value, what goes without saying) of what edits need to know besides."""
    return [("guidance", card.guidance, "dual"), ("suffix", card.suffix, "")]


def _paragraph(values: Mapping[str, Any]) -> str:
    """Names and values in lines that a terminal shows, beside the column of the card's names."""
    text = ", ".join(f"{name} {value}" for name, value in values.items())
    return f"\n{' ' * 13}".join(wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False))


def _tail(training: Mapping[str, Any], digests: Mapping[str, str]) -> list[tuple[str, str]]:
    config = training.get("config")
    given = {name: value for name, value in config.items() if value not in UNSAID} if isinstance(config, dict) else {}
    told = {name: value for name, value in training.items() if not isinstance(value, dict)}
    return [
        *((name, _paragraph(values)) for name, values in (("training", told), ("settings", given)) if values),
        *(("sha256", f"{digest}  {name}") for name, digest in digests.items()),
    ]
