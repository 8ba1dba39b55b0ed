"""``ip2p edit`` and ``ip2p demo``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ConfigError
from .options import (
    Several,
    add_command,
    add_guidance_options,
    add_model_options,
    check_positive,
    edit_config,
    load_editor,
    local_path,
)

__all__ = ["add"]

# Diffusers imports them where they are installed, for adapters and schedulers that no edit uses, and with peft come
# transformers' losses: a fifth of the command's time.
UNUSED = ("peft", "scipy")


def add(commands: Any) -> None:
    _add_edit(commands)
    _add_demo(commands)


def _add_edit(commands: Any) -> None:
    parser = add_command(commands, "edit", _edit, "edit pictures by instructions")
    parser.set_defaults(unused=UNUSED)
    parser.error = partial(_refuse, parser.error)  # type: ignore[method-assign]
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures to edit, named before --instruction")
    parser.add_argument(
        "--instruction", action=Several, nargs="+", required=True, metavar="TEXT", help='e.g. "make it snow"'
    )
    add_model_options(parser)
    add_guidance_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first result (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="results per picture and instruction")
    parser.add_argument(
        "--size",
        default="paper",
        help="paper: the 64 rule of the paper's code; keep: the picture's own; or WxH (default: paper)",
    )
    parser.add_argument("--resolution", type=int, help="longer side that the paper's rule aims at")
    parser.add_argument("--batch", type=int, default=8, help="edits in one batch at most (default: 8)")
    parser.add_argument(
        "--out",
        type=local_path,
        default=Path("."),
        help="a folder, where nothing is overwritten, or a file if there is one result",
    )
    parser.add_argument("--json", action="store_true", help="print the settings of each result as JSON")


def _refuse(refuse: Callable[[str], NoReturn], message: str) -> NoReturn:
    """argparse's refusal; --instruction takes every word that follows it, also a picture's name."""
    if message.endswith("IMAGE"):
        message += '; name the pictures first: ip2p edit photo.png --instruction "make it snow"'
    refuse(message)


def _add_demo(commands: Any) -> None:
    parser = add_command(commands, "demo", _demo, "a first edit with the embedded model, no download")
    parser.add_argument("--out", type=local_path, default=Path("ip2p-demo.png"), help="default: ip2p-demo.png")
    parser.add_argument("--seed", type=int, default=0)
    add_model_options(parser)


def _edit(options: argparse.Namespace) -> None:
    from ..progress import write_line
    from .edit_files import edit_files

    if options.resolution and options.size != "paper":
        raise ConfigError(f"--resolution is for --size paper, and --size is {options.size}; leave one of the two out")
    config = edit_config(options, size=options.size, resolution=options.resolution, batch=options.batch)
    seeds = range(options.seed, options.seed + check_positive("--seeds", options.seeds))
    edit_files(
        options.images,
        options.instruction,
        load=lambda: load_editor(options),
        config=config,
        seeds=seeds,
        out=options.out,
        show=lambda row: write_line(json.dumps(row) if options.json else row["file"]),
    )


def _demo(options: argparse.Namespace) -> None:
    from ..images import check_output
    from ..scenes.demo import make_demo

    check_output(options.out)
    report = make_demo(load_editor(options), options.out, seed=options.seed)
    sys.stdout.write(report + "\n")
