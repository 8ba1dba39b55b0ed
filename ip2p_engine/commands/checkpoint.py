"""``ip2p inspect`` and ``ip2p convert``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import ConfigError
from .options import DTYPES, GUIDANCE_NAMES, add_command, add_lora_option, loras_of, torch_dtype

__all__ = ["add"]


def add(commands: Any) -> None:
    _add_inspect(commands)
    _add_convert(commands)
    _add_fetch(commands)


def _add_inspect(commands: Any) -> None:
    parser = add_command(commands, "inspect", _inspect, "say what a checkpoint is, without loading it")
    parser.add_argument("source", metavar="CHECKPOINT", help="a file, a diffusers folder, a hub id, a URL or embedded")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--sha256", action="store_true", help="also the file's SHA-256")
    parser.add_argument("--json", action="store_true")


def _add_convert(commands: Any) -> None:
    parser = add_command(commands, "convert", _convert, "write a checkpoint in another layout, or merge three")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="SOURCE TARGET; with --add-difference TARGET alone")
    parser.add_argument("--to", choices=("ldm", "diffusers"), required=True, help="one file, or a pipeline folder")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the file's own")
    parser.add_argument("--base", help="a checkpoint that gives a lone UNet its autoencoder and text encoder")
    parser.add_argument(
        "--prediction", choices=("eps", "v"), help="of a file that does not say it (default: told by it)"
    )
    parser.add_argument("--guidance", choices=GUIDANCE_NAMES, help="the formula that the file recommends")
    parser.add_argument("--suffix", metavar="TEXT", help="what the file wants said after each instruction")
    add_lora_option(parser)
    parser.add_argument(
        "--add-difference",
        nargs=5,
        metavar=("IP2P", "-", "SD_BASE", "+", "OTHER"),
        help="write the sum: the editing skill of IP2P on another model of its family",
    )


def _add_fetch(commands: Any) -> None:
    parser = add_command(commands, "fetch", _fetch, "bring a published checkpoint here, or go on with it")
    parser.add_argument("name", nargs="?", help="of the table, which it prints without a name")


def _fetch(options: argparse.Namespace) -> None:
    from ..checkpoint.download import fetched
    from ..checkpoint.published import PUBLISHED
    from ..checkpoint.source import fetch_published

    if options.name is not None:
        sys.stdout.write(f"{fetch_published(options.name)}\n")
        return
    for one in PUBLISHED:
        here = fetched(one)
        sys.stdout.write(f"{one}\n" + (f"    here: {here}\n" if here else ""))


def _inspect(options: argparse.Namespace) -> None:
    from ..checkpoint.report import report_card

    card = report_card(options.source, sha256=options.sha256, weights=options.weights)
    sys.stdout.write((card.to_json() if options.json else str(card)) + "\n")


def _recommends(options: argparse.Namespace) -> dict[str, Any]:
    """What a written file recommends from now on, by the names of ModelSpec."""
    from ..diffusion.guidance import FORMULAS

    said = {} if options.suffix is None else {"suffix": options.suffix}
    if options.guidance is None:
        return said
    text_cfg, image_cfg = FORMULAS[options.guidance].scales
    return {**said, "guidance": options.guidance, "text_cfg": text_cfg, "image_cfg": image_cfg}


def _convert(options: argparse.Namespace) -> None:
    from ..networks.model import convert, merge_files

    settings = {"to": options.to, "weights": options.weights, "dtype": torch_dtype(options)}
    if options.add_difference:
        ip2p, minus, base, plus, other = options.add_difference
        if (minus, plus, len(options.paths)) != ("-", "+", 1):
            raise ConfigError("a merge is TARGET --to LAYOUT --add-difference IP2P - SD_BASE + OTHER; write it so")
        if options.base or options.prediction or options.lora or _recommends(options):
            only = "--base, --prediction, --guidance, --suffix and --lora"
            raise ConfigError(f"{only} are for one source; leave them out of a merge")
        written = merge_files(ip2p, base, other, options.paths[0], **settings)
    else:
        if len(options.paths) != 2:
            raise ConfigError(f"convert got {len(options.paths)} paths; give SOURCE and TARGET")
        settings |= {"base": options.base, "prediction": options.prediction, "loras": loras_of(options)}
        settings["settings"] = _recommends(options)
        written = convert(options.paths[0], options.paths[1], **settings)
    sys.stdout.write(f"{written}\n")
