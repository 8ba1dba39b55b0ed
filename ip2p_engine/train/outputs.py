"""What a finished run gives away: averaged and raw weights as LDM files, a diffusers folder, adapters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..checkpoint.export import save_diffusers, save_ldm, write_safetensors
from ..model import Model
from .config import TrainConfig
from .ema import Average
from .networks import exportable, lora_state

__all__ = ["export"]

RAW_UNET = "unet/diffusion_pytorch_model.non_ema.safetensors"


def export(
    model: Model, average: Average, config: TrainConfig, folder: Path, training: Mapping[str, Any]
) -> dict[str, Path]:
    """Write ema.safetensors and raw.safetensors (whole checkpoints, the run in their headers) and diffusers/.

    diffusers/ holds the averaged UNet, and the raw one as variant non_ema. With LoRA also lora.safetensors, which
    diffusers' ``load_lora_weights`` takes; a first convolution that was trained beside it lies in conv_in.safetensors.
    """
    files = {}
    for kind in ("ema", "raw"):
        with average.applied() if kind == "ema" else nullcontext(), exportable(model, config) as shown:
            files[kind] = save_ldm(_marked(shown, kind), folder / f"{kind}.safetensors", training=training)
            if kind == "ema":
                files["diffusers"] = save_diffusers(shown, folder / "diffusers", training=training)
                files.update(_adapters(model, folder) if config.lora_rank else {})
            else:
                state = {name: value.detach().cpu() for name, value in shown.unet.state_dict().items()}
                write_safetensors(state, folder / "diffusers" / RAW_UNET, {"format": "pt"})
    return files


def _marked(model: Model, kind: str) -> Model:
    from dataclasses import replace

    return replace(model, spec=replace(model.spec, weights=kind))


def _adapters(model: Model, folder: Path) -> dict[str, Path]:
    files = {"lora": folder / "lora.safetensors"}
    write_safetensors(lora_state(model.unet), files["lora"], {"format": "pt"})
    first = model.unet.conv_in
    if first.weight.requires_grad:
        files["conv_in"] = folder / "conv_in.safetensors"
        state = {f"conv_in.{name}": value.detach().cpu() for name, value in first.state_dict().items()}
        write_safetensors(state, files["conv_in"], {"format": "pt"})
    return files
