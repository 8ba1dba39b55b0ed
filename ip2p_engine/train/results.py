"""What a run leaves: averaged or raw weights as LDM files, a diffusers folder, adapters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.write import RAW_UNET, save_diffusers, save_ldm, write_safetensors
from ..networks.model import Model, load_model
from .adapters import lora_state
from .config import TrainConfig
from .networks import finished, usable
from .optimizers import Average

__all__ = ["export"]

FORMAT = {"format": "pt"}


def export(
    model: Model,
    average: Average,
    config: TrainConfig,
    folder: Path,
    training: Mapping[str, Any],
    *,
    base: str | Path,
    writes: bool,
) -> dict[str, Path]:
    """Write the forms that ``config.outputs`` names.

    ema.safetensors and raw.safetensors are whole checkpoints with the run in their headers; diffusers/ is a pipeline of
    one type, float32, with the averaged UNet. lora.safetensors is what diffusers, ComfyUI and ``ip2p edit --lora``
    take; a first convolution that was trained beside it lies in conv_in.safetensors. Every process calls this, and one
    ``writes``.
    """
    wanted = config.outputs or ("ema",)
    files: dict[str, Path] = {kind: folder / f"{kind}.safetensors" for kind in ("ema", "raw") if kind in wanted}
    files |= {"diffusers": folder / "diffusers"} if "diffusers" in wanted else {}
    for kind in ("ema", "raw"):
        if not _uses(kind, wanted):
            continue
        with average.applied() if kind == "ema" else nullcontext(), usable(model) as shown:
            if not writes:
                continue
            if {kind, "diffusers"} & set(wanted):
                whole = finished(shown, load_model(base, device="cpu", dtype="file"), config)
                _write_whole(replace(whole, spec=replace(whole.spec, weights=kind)), files, training, kind)
            if kind == "ema" and "lora" in wanted:
                files |= _write_adapters(model, folder)
    return files


def _uses(kind: str, wanted: Collection[str]) -> bool:
    return kind in wanted or (kind == "ema" and not {"diffusers", "lora"}.isdisjoint(wanted))


def _write_whole(whole: Model, files: Mapping[str, Path], training: Mapping[str, Any], kind: str) -> None:
    if kind in files:
        save_ldm(whole, files[kind], training=training)
    if "diffusers" not in files:
        return
    if kind == "ema":
        # Of one type: plain from_pretrained leaves text encoders as they lie on the disk and makes the rest float32.
        save_diffusers(whole, files["diffusers"], torch.float32, training=training)
    else:
        write_safetensors(_on_cpu(whole.unet), files["diffusers"] / RAW_UNET, FORMAT)


def _write_adapters(model: Model, folder: Path) -> dict[str, Path]:
    files = {"lora": folder / "lora.safetensors"}
    write_safetensors(lora_state(model), files["lora"], FORMAT)
    first = model.unet.conv_in
    if first.weight.requires_grad:
        files["conv_in"] = folder / "conv_in.safetensors"
        write_safetensors({f"conv_in.{name}": v for name, v in _on_cpu(first).items()}, files["conv_in"], FORMAT)
    return files


def _on_cpu(module: Any) -> dict[str, Any]:
    return {name: value.detach().cpu() for name, value in module.state_dict().items()}
