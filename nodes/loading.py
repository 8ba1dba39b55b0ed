"""IP2P Load Checkpoint: any layout becomes MODEL, CLIP and VAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from . import _host, _models
from ._api import advanced, io, schema

SAME = "from the file itself"


class LoadCheckpoint(io.ComfyNode):
    """A checkpoint of any layout, or an embedded miniature."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_LoadCheckpoint",
            display_name="IP2P Load Checkpoint",
            group="loading",
            description=(
                "Loads an InstructPix2Pix: single files with or without EMA weights, UNets alone, diffusers folders, "
                "SD1.5, SDXL and CosXL-Edit, and the embedded miniatures, which need no download."
            ),
            search_aliases=[
                "InstructPix2Pix",
                "instruct pix2pix",
                "edit by instruction",
                "cosxl edit",
                "pix2pix checkpoint",
                "load ip2p",
            ],
            inputs=_inputs(),
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The UNet with 8 input channels; takes LoRAs as any MODEL."
                ),
                io.Clip.Output(display_name="clip", tooltip="The text encoder for the instruction."),
                io.Vae.Output(display_name="vae", tooltip="The autoencoder for the picture and the result."),
                io.Float.Output(
                    display_name="text_cfg",
                    tooltip="What the checkpoint recommends for text_cfg, 7.5 for the paper's. Wire it, or type one.",
                ),
                io.Float.Output(
                    display_name="image_cfg",
                    tooltip="What the checkpoint recommends for image_cfg, 1.5 for the paper's. Wire it, or type one.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What the file is: base, prediction, weights, memory. Show it with Preview Any.",
                ),
                io.Int.Output(
                    display_name="resolution",
                    tooltip="The side that the checkpoint was trained at, in pixels, for IP2P Encode Image.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, weights: str = "ema", base: str = SAME) -> str:
        named = [_models.source_of(name) for name in (checkpoint, base) if name not in (SAME, *_models.EMBEDDED)]
        files = [
            file for path in map(Path, named) for file in ([path] if path.is_file() else sorted(path.rglob("*.*")))
        ]
        state = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
        return f"{checkpoint} {weights} {base} {state}"

    @classmethod
    def execute(cls, checkpoint: str, weights: str = "ema", base: str = SAME) -> io.NodeOutput:
        source = _models.source_of(checkpoint)
        giver = None if base == SAME else _models.source_of(base)
        native = _models.load_native(source, weights=weights, base=giver)
        card = _host.preformatted(report(source, weights, base))
        spec = native.spec
        return io.NodeOutput(
            native.model, native.clip, native.vae, spec.text_cfg, spec.image_cfg, card, spec.resolution
        )


def report(source: str | Path, weights: str, base: str) -> str:
    """The report card, and what the base gave."""
    from ..ip2p_engine.checkpoint.report import report_card

    card = report_card(source, weights=weights)
    if base == SAME:
        return str(card)
    given = f"{', '.join(card.lacking)} from {base}" if card.lacking else f"{base} is not used: the file is whole"
    return f"{replace(card, lacking=())}\n{'given':<12} {given}"


def _inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "checkpoint",
            options=_models.sources(),
            tooltip=(
                "embedded-photos: the miniature that comes with the pack, for photographs and some kinds of edits. "
                "embedded: the one for drawn scenes of 64 px; embedded-sd: its text-to-image model, for making pairs. "
                "Others: files in models/checkpoints and "
                "models/diffusion_models, folders in models/diffusers, published/...: what `ip2p fetch` brings. "
                "Change it for sharper edits by any instruction."
            ),
        ),
        advanced(
            io.Combo.Input(
                "weights",
                options=["ema", "raw"],
                default="ema",
                tooltip=(
                    "Which UNet weights to take from a file that has both. ema: averaged over the training, "
                    "the paper's choice. raw: the last ones; change it only to compare with other programs."
                ),
            )
        ),
        advanced(
            io.Combo.Input(
                "base",
                options=[SAME, *(name for name in _models.sources() if "diffusion_models/" not in name)],
                default=SAME,
                tooltip=(
                    "Where the text encoder and the autoencoder come from. Change it only for a UNet that "
                    "comes alone, to the checkpoint that the UNet was trained from; a whole file keeps its own."
                ),
            )
        ),
    ]
