"""What a finished run gives away: averaged and raw weights as LDM files, a diffusers folder, adapters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.write import RAW_UNET, save_diffusers, save_ldm, write_safetensors
from ..networks.model import Model, load_model
from .config import TrainConfig
from .networks import finished, lora_state, usable
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
    """Write ema.safetensors and raw.safetensors (whole checkpoints, the run in their headers) and diffusers/.

    diffusers/ holds the averaged UNet, and the raw one as variant non_ema. With LoRA also lora.safetensors, which
    diffusers, ComfyUI and ``ip2p edit --lora`` take; a first convolution that was trained beside it lies in
    conv_in.safetensors.
    Every process calls this, and one ``writes``.
    """
    files = {name: folder / f"{name}.safetensors" for name in ("ema", "raw")}
    files["diffusers"] = folder / "diffusers"
    for kind in ("ema", "raw"):
        with average.applied() if kind == "ema" else nullcontext(), usable(model) as shown:
            if not writes:
                continue
            whole = finished(shown, load_model(base, device="cpu", dtype="file"), config)
            whole = replace(whole, spec=replace(whole.spec, weights=kind))
            save_ldm(whole, files[kind], training=training)
            if kind == "ema":
                save_diffusers(whole, files["diffusers"], training=training)
                files |= _write_adapters(model, folder, config) if config.lora_rank else {}
            else:
                write_safetensors(_on_cpu(whole.unet), files["diffusers"] / RAW_UNET, FORMAT)
    return files


def _write_adapters(model: Model, folder: Path, config: TrainConfig) -> dict[str, Path]:
    files = {"lora": folder / "lora.safetensors"}
    write_safetensors(lora_state(model.unet, config), files["lora"], FORMAT)
    first = model.unet.conv_in
    if first.weight.requires_grad:
        files["conv_in"] = folder / "conv_in.safetensors"
        write_safetensors({f"conv_in.{name}": v for name, v in _on_cpu(first).items()}, files["conv_in"], FORMAT)
    return files


def _on_cpu(module: Any) -> dict[str, Any]:
    return {name: value.detach().cpu() for name, value in module.state_dict().items()}
